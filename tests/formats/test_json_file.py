"""Files that are damaged in any way are refused by one line that names them, or read as what they are."""

import copy
import json
import shutil
import struct
from pathlib import Path

import fuzz
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lora
from data.tokenizer import get_tokenizer, train_bpe
from formats.open_model import open_model

FIXTURES = Path(__file__).parents[1] / "fixtures"
FUZZ = fuzz.drawn(25, fuzz.PER_TEST_FIXTURES)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 300), st.integers(), st.floats(), st.text(max_size=5)
)
VALUES = st.one_of(
    SCALARS, st.sampled_from([[], {}, [[]], 0, -1, 2**62, 10**30, 1e300, "linear", ["full_attention"]]),
    st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=5), SCALARS, max_size=2),
)  # fmt: skip


def places(content, path=()):
    """Yield the paths of all values in JSON content, and one beyond the last of each object and list."""
    if isinstance(content, dict | list):
        yield (*path, "new key" if isinstance(content, dict) else len(content))
        for key in content if isinstance(content, dict) else range(len(content)):
            yield (*path, key)
            yield from places(content[key], (*path, key))


def new_value(data):
    """Return a value of JSON that is no part of what was drawn before: a list in itself is no JSON."""
    return copy.deepcopy(data.draw(VALUES))


def mutated(content, data, above=()):
    """Return JSON content with one to three of its values replaced, added or removed.

    above: keys of long lists and objects. Of what is in them, only the first ten can be changed.
    """
    if data.draw(st.integers(0, 19)) == 0:
        return new_value(data)
    content = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 3))):
        paths = list(places(content))
        long = [path for path in paths if len(path) > 2 and path[1] in above]
        paths = [path for path in paths if path not in long] + long[:10]
        if not paths:
            break
        *path, key = data.draw(st.sampled_from(paths))
        parent = content
        for step in path:
            parent = parent[step]
        if isinstance(parent, list) and key == len(parent):
            parent.append(new_value(data))
        elif data.draw(st.booleans()) or key == "new key":
            parent[key] = new_value(data)
        else:
            del parent[key]
    return content


def raises_by_name_or_works(function, directory):
    """Call a function, which may raise only a ValueError or OSError of one line that names the directory."""
    try:
        function()
    except (ValueError, OSError) as error:
        assert str(directory) in str(error) and "\n" not in str(error), error


def copy_once(source, tmp_path_factory, name):
    """Return a copy of a directory, of which a test may replace some files again and again."""
    directory = tmp_path_factory.getbasetemp() / name
    if not directory.exists():
        shutil.copytree(source, directory)
    return directory


MODELS = (
    "gpt2", "llama3-scaling", "qwen2-sliding", "mixtral", "qwen3-moe", "dots1", "roberta-mlm",
    "albert-pretraining", "modernbert-mlm", "electra-discriminator", "bert-classifier", "t5-v1_1", "bart",
    "pegasus", "deberta-v1", "deberta-v3", "vit", "vit-mae", "ast", "imagegpt", "gemma2", "gemma3",
    "deepseek-dense", "deepseek-v2", "deepseek-v3",
)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@FUZZ
@given(st.data())
def test_any_config_json_is_read_or_refused_by_name(name, tmp_path_factory, data):
    directory = copy_once(FIXTURES / name, tmp_path_factory, f"fuzz-{name}")
    content = json.loads((FIXTURES / name / "config.json").read_text())
    for file in ("config.json", "generation_config.json"):
        (directory / file).write_text(json.dumps(mutated(content, data)))
        content = {"eos_token_id": [2, 3]}
    pixels = FIXTURES / name / "preprocessor_config.json"
    if pixels.exists():
        (directory / pixels.name).write_text(json.dumps(mutated(json.loads(pixels.read_text()), data)))
    raises_by_name_or_works(lambda: open_model(directory), directory)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Return {a kind of tokenizer: the directory that holds one}."""
    directories = {kind: tmp_path_factory.mktemp(kind) for kind in ("bytes", "encoder", "wordpiece")}
    tokenizer = get_tokenizer("bytes").with_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.around = (("<|begin|>",), ())
    tokenizer.save(directories["bytes"])
    roles = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    train_bpe(["the cat sat on the mat " * 9], 262).with_special_tokens(roles).save(directories["encoder"])
    get_tokenizer(str(FIXTURES / "wordpiece" / "vocab.txt")).save(directories["wordpiece"])
    for kind in ("llama2", "t5", "words"):
        directories[kind] = FIXTURES / "tokenizers" / kind
    return directories


@pytest.mark.parametrize("kind", ["bytes", "encoder", "wordpiece", "llama2", "t5", "words"])
@FUZZ
@given(st.data())
def test_any_tokenizer_json_is_read_or_refused_by_name(kind, tokenizers, tmp_path_factory, data):
    source = tokenizers[kind]
    directory = copy_once(source, tmp_path_factory, f"fuzz-{kind}")
    changed = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((source / file).read_text())
        content = mutated(content, data, above=("vocab", "merges")) if file == changed else content
        (directory / file).write_text(json.dumps(content))
    raises_by_name_or_works(lambda: get_tokenizer(str(directory)), directory)


ADAPTERS = {"gpt2-lora": "gpt2", "llama-patterns": "llama", "llama-ia3": "llama", "olmoe-experts": "olmoe"}


@pytest.mark.parametrize("name", ADAPTERS)
@FUZZ
@given(st.data())
def test_any_adapter_config_json_is_read_or_refused_by_name(name, tmp_path_factory, data):
    source, base = FIXTURES / "adapters" / name, FIXTURES / ADAPTERS[name]
    directory = copy_once(source, tmp_path_factory, f"fuzz-{name}")
    content = json.loads((source / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(mutated(content, data)))
    raises_by_name_or_works(lambda: open_model(directory, base=base), directory)


@pytest.mark.parametrize("name", ["llama", "llama-sharded", "olmoe", "bert-mlm", "adapters/llama-lora"])
@FUZZ
@given(st.data())
def test_any_safetensors_file_is_read_or_refused_by_name(name, tmp_path_factory, data):
    """Its header is JSON: names, types, shapes, places in the file; or bytes are cut off or changed."""
    directory = copy_once(FIXTURES / name, tmp_path_factory, f"fuzz-header-{Path(name).name}")
    index = FIXTURES / name / "model.safetensors.index.json"
    if index.exists():
        (directory / index.name).write_text(json.dumps(mutated(json.loads(index.read_text()), data)))
    file = next(
        path for path in sorted(directory.glob("*.safetensors")) if path.name != "expected.safetensors"
    )
    raw = (FIXTURES / name / file.name).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    if data.draw(st.booleans()):
        header = json.dumps(mutated(json.loads(raw[8 : 8 + length]), data)).encode()
        raw = struct.pack("<Q", len(header)) + header + raw[8 + length :]
    else:
        cut, place = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(0, length + 100))
        raw = raw[:cut] if data.draw(st.booleans()) else raw[:place] + b"\xff\x7f\xff" + raw[place + 3 :]
    file.write_bytes(raw)
    raises_by_name_or_works(lambda: open_model(directory, base=FIXTURES / "llama"), directory)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe{}", b'{"a": "\xe9"}', b"\x80\x04."]
)
@pytest.mark.parametrize(
    "name, file",
    [
        ("llama", "config.json"),
        ("llama", "generation_config.json"),
        ("llama-sharded", "model.safetensors.index.json"),
        ("llama", "model.safetensors"),
        ("adapters/llama-lora", "adapter_config.json"),
        ("adapters/llama-lora", "adapter_model.safetensors"),
    ],
)
def test_a_file_of_other_content_is_named(name, file, content, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path / "model")
    (tmp_path / "model" / file).write_bytes(content)
    with pytest.raises(ValueError) as raised:
        open_model(tmp_path / "model", base=FIXTURES / "llama")
    assert str(tmp_path / "model" / file) in str(raised.value) and "\n" not in str(raised.value)


def test_an_alpha_of_zero_is_refused_with_the_directory_and_the_model_stays_as_it_is(tmp_path):
    directory = tmp_path / "adapter"
    shutil.copytree(FIXTURES / "adapters" / "gpt2-lora", directory)
    content = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(content | {"lora_alpha": 0}))
    model = open_model(FIXTURES / "gpt2")
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"adapter: alpha 0\.0: expected a number above 0"):
        lora.load_adapter(model, directory)
    assert [name for name, _ in model.named_parameters()] == names
