"""The helpers that all families of models share: names, files."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import copy_of
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from formats import safetensors_dir
from formats.json_file import json_line, read_json, write_json
from formats.open_model import open_model
from formats.safetensors_dir import (
    inverse,
    read_tensors,
    read_weights,
    rename,
    write,
    write_tensors,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_names_are_replaced_at_their_beginning_or_after_a_dot():
    table = {"h.": "layers.", ".ln.": ".norm.", "layers.0.": "first."}
    assert rename("h.0.ln.h.ln.weight", table) == "first.norm.h.ln.weight"
    assert rename("graph.h.weight", table) == "graph.h.weight"
    assert rename(rename("h.1.ln.bias", table), inverse(table)) == "h.1.ln.bias"


def test_json_is_written_whole_and_read_with_clear_errors(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"é": [1]})
    assert path.read_bytes() == '{\n  "é": [\n    1\n  ]\n}\n'.encode() and read_json(path) == {"é": [1]}
    with pytest.raises(TypeError):
        write_json(path, {"é": {1}})
    assert read_json(path) == {"é": [1]} and list(tmp_path.iterdir()) == [path]
    for content, message in (("{", "not JSON"), ("[" * 100_000, "not JSON"), ("[]", "found a list")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_json(path)
    with pytest.raises(ValueError, match=r"nowhere: no such file; expected a thing"):
        read_json(tmp_path / "nowhere", "a thing")


def test_a_row_of_numbers_is_valid_json_whatever_they_are():
    row = {"step": 3, "loss": float("nan"), "norm": float("inf"), "mfu": None, "lr": 1e-4, "name": "a"}
    line = json_line(row)
    assert line.endswith("}\n") and "NaN" not in line and "Infinity" not in line
    assert json.loads(line) == row | {"loss": None, "norm": None}


def test_weights_are_written_and_read(tmp_path):
    weights = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.zeros(2, dtype=torch.bfloat16)}
    hf = {"architectures": ["X"]}
    write(tmp_path / "deep" / "er", hf, weights)
    read = read_weights(tmp_path / "deep" / "er")
    assert read.keys() == weights.keys() and all(torch.equal(read[name], w) for name, w in weights.items())
    assert read_json(tmp_path / "deep" / "er" / "config.json") == hf | {"torch_dtype": "float32"}
    assert hf == {"architectures": ["X"]}
    with pytest.raises(ValueError, match=r"c is torch\.int64: expected floating-point weights"):
        write(tmp_path, hf, {"c": torch.zeros(2, dtype=torch.int64)})

    write_tensors(tmp_path / "t.safetensors", weights, {"of": "me"})
    assert read_tensors(tmp_path / "t.safetensors")[1] == {"format": "pt", "of": "me"}


def test_an_index_names_files_of_its_own_directory_only(tmp_path):
    index = {"weight_map": {"a": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected a file in the same directory"):
        read_weights(tmp_path)


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.ones(3)})

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors_dir, "save_file", full)
    with pytest.raises(OSError, match="the disk is full") as error:
        write_tensors(path, {"a": torch.zeros(3)})
    assert error.value.filename == str(path) and error.value.errno == errno.ENOSPC
    assert read_tensors(path)[0]["a"].tolist() == [1, 1, 1]
    assert list(tmp_path.iterdir()) == [path]


def refusal(directory) -> str:
    """What opening a model says: one line, which names the directory."""
    with pytest.raises(ValueError) as raised:
        open_model(directory)
    assert str(directory) in str(raised.value) and "\n" not in str(raised.value)
    return str(raised.value).replace(f"{directory}/", "")


@pytest.mark.parametrize("kind", ["llama", "llama-sharded", "gpt2", "olmoe", "bert-mlm", "bert-classifier"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_tensor_that_is_not_finite_is_named_with_its_file(kind, value, tmp_path):
    shutil.copytree(FIXTURES / kind, tmp_path, dirs_exist_ok=True)
    file = sorted(tmp_path.glob("model*.safetensors"))[-1]
    weights = load_file(file)
    name = sorted(weights)[-1]
    weights[name].view(-1)[-1] = value
    save_file(weights, file)
    assert refusal(tmp_path).startswith(f"{file.name}: {name} is not finite")


def test_large_but_finite_weights_are_read(tmp_path):
    """Their sum overflows, but they do not."""
    weights = {name: torch.full((4,), 6e4, dtype=torch.float16) for name in "ab"} | {"c": torch.zeros(0)}
    write_tensors(tmp_path / "model.safetensors", weights | {"d": torch.full((4,), -3e38)})
    assert read_weights(tmp_path).keys() == set("abcd")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_matrices_of_a_type_that_is_not_computed_with_are_named(dtype, tmp_path):
    for kind, name in (("llama", "model.layers.0.mlp.up_proj.weight"), ("olmoe", "lm_head.weight")):
        shutil.copytree(FIXTURES / kind, tmp_path / kind)
        weights = load_file(tmp_path / kind / "model.safetensors")
        weights[name] = weights[name].to(dtype)
        save_file(weights, tmp_path / kind / "model.safetensors")
        message = refusal(tmp_path / kind)
        assert f"{name} is {dtype}; expected one of float32, bfloat16, float16, float64" in message


@pytest.mark.parametrize(
    "kind, end",
    [("llama", "norm.weight"), ("llama", "lm_head.weight"), ("t5", ".wo.weight"), ("dots1", ".gate.weight")],
)
def test_a_file_of_several_dtypes_is_read_in_the_widest(kind, end, tmp_path):
    """As transformers saves a T5 in float16, and other programs a model with norms or a head in float32."""
    shutil.copytree(FIXTURES / kind, tmp_path / kind)
    whole = load_file(tmp_path / kind / "model.safetensors")
    stored = {name: w if name.endswith(end) else w.half() for name, w in whole.items()}
    assert 0 < sum(w.dtype == torch.float32 for w in stored.values()) < len(stored)
    save_file(stored, tmp_path / kind / "model.safetensors")
    model = open_model(tmp_path / kind).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(model.generate([[3, 4, 5]], 2, temperature=0)[0]) > 0


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_a_pickle_alone_is_refused_with_the_way_to_convert_it(file, tmp_path):
    shutil.copy(FIXTURES / "llama" / "config.json", tmp_path)
    (tmp_path / file).write_bytes(b"\x80\x04.")
    message = refusal(tmp_path)
    assert message.startswith(f"{file}: not read, because it is a pickle") and "python -c" in message


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "weight_map None: expected the file of each tensor"),
        ({"weight_map": []}, "weight_map []: expected"),
        ({"weight_map": {}}, "weight_map {}: expected"),
        ({"weight_map": {"a": 3}}, "weight_map {'a': 3}: expected"),
        ({"weight_map": {"a": "other.safetensors"}}, "other.safetensors: no such file"),
    ],
)
def test_an_index_without_files_is_named(content, message, tmp_path):
    shutil.copy(FIXTURES / "llama" / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    assert message in refusal(tmp_path)


@pytest.mark.parametrize("value", ["3", 3.0, True, [2], {"a": 2}, -1, 0, 10**9, 2**70])
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"])
def test_sizes_that_are_none_are_named(key, value, tmp_path):
    for kind in ("llama", "mixtral", "bert-mlm"):
        message = refusal(copy_of(FIXTURES / kind, tmp_path / kind, **{key: value}))
        assert key in message or value in (10**9, 2**70)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize(
    "kind, end",
    [
        ("gpt2", "attn.c_attn.bias"),
        ("imagegpt", "attn.c_attn.weight"),
        ("modernbert-mlm", "attn.Wqkv.weight"),
        ("deberta-v1", "in_proj.weight"),
        ("clip", "logit_scale"),
        ("vit", "classifier.bias"),
    ],
)
def test_a_tensor_that_is_translated_but_has_another_shape_is_named(kind, end, shape, tmp_path):
    shutil.copytree(FIXTURES / kind, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith(end))
    shape = (2,) if kind == "clip" else shape  # whose one number may have either shape
    save_file(weights | {name: torch.zeros(shape)}, tmp_path / "model.safetensors")
    assert "shape" in refusal(tmp_path)
