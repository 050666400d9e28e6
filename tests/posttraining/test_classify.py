"""Classifiers against transformers, what each way of training moves, and whole runs from file to answer."""

import gzip
import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import copy_of, run_command
from safetensors.torch import load_file, save_file

import bert
from bert import BERT
from data.tokenizer import Tokenizer, train_bpe
from formats import encoders
from language.encoder_inference import pack
from language.masking import SPECIAL_TOKENS
from posttraining import classify
from posttraining.classify import Classifier, parameter_groups, scores, slanted_triangle

FIXTURES = Path(__file__).parents[1] / "fixtures"
ENCODERS = [
    "bert-model",
    "bert-mlm",
    "bert-pretraining",
    "roberta-mlm",
    "albert-pretraining",
    "electra-discriminator",
    "electra-generator",
    "modernbert-mlm",
]
SMALL = bert.Config(2, 2, 32, 64, n_segments=1, pooler=False)


def fitted(config, tokenizer):
    """The config for this tokenizer and texts of 40 tokens."""
    return replace(config, vocab_size=tokenizer.n_vocab, max_seq_len=40, pad_token_id=tokenizer.pad_id)


def row_of(expected):
    """The texts of a fixture without their padding: token ids, cu_seqlens and segments."""
    lengths = expected["lengths"].tolist()
    tokens, cu_seqlens = pack([row[:n].tolist() for row, n in zip(expected["tokens"], lengths, strict=True)])
    segments, _ = pack([row[:n].tolist() for row, n in zip(expected["segments"], lengths, strict=True)])
    return tokens, cu_seqlens, segments


def noisy(model):
    """The same model, its outputs depending visibly on every weight."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


# --- parity with transformers


def test_logits_equal_the_recorded_ones():
    expected = load_file(FIXTURES / "bert-classifier" / "expected.safetensors")
    model = Classifier.from_pretrained(FIXTURES / "bert-classifier").eval()
    assert model.labels == ["contradiction", "entailment", "neutral"]
    with torch.no_grad():
        logits = model(*row_of(expected))
    tolerance = max(1e-5, 5 * expected["class_logits64_error"].item())  # the reference's own float32 noise
    assert (logits - expected["class_logits"]).abs().max() < tolerance


SIZE = dict(
    vocab_size=60,
    hidden_size=24,
    intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=42,
)
FAMILIES = {
    "bert": {},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "albert": {"embedding_size": 12},
    "electra": {"embedding_size": 12},
    "electra as wide as its embeddings": {"embedding_size": 24},
    "modernbert": {"local_attention": 8, "classifier_pooling": "mean", "pad_token_id": 0},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_classifiers_open_here_and_ours_there(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    names = {0: "bad", 1: "fair", 2: "good", 3: "great"}
    changes = dict(FAMILIES[name], id2label=names, label2id={label: i for i, label in names.items()})
    config = transformers.AutoConfig.for_model(name.split()[0], **SIZE | changes)
    theirs = noisy(transformers.AutoModelForSequenceClassification.from_config(config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Classifier.from_pretrained(tmp_path / "theirs").eval()
    assert ours.labels == list(names.values())
    ours.save_pretrained(tmp_path / "ours")
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(again) is type(theirs) and again.config.id2label == names
    assert again.config.label2id == {label: i for i, label in names.items()}

    lengths = torch.tensor([24, 17, 9])
    tokens = torch.randint(4, 60, (3, 24), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": tokens, "attention_mask": (torch.arange(24) < lengths[:, None]).long()}
    packed = pack([row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)])
    with torch.no_grad():
        expected = theirs(**inputs).logits
        noise = (expected - theirs.double()(**inputs).logits).abs().max().item()
        assert (ours(*packed) - expected).abs().max() < max(1e-5, 5 * noise)
        assert (again.eval()(**inputs).logits - expected).abs().max() < max(1e-5, 5 * noise)
        assert torch.equal(Classifier.from_pretrained(tmp_path / "ours").eval()(*packed), ours(*packed))


def test_an_old_pooler_beside_robertas_classifier_is_not_taken_for_its_own(tmp_path):
    config = bert.Config(
        2, 3, 18, 28, 60, 40, n_segments=1, position_offset=2, pooler=False, pad_token_id=1, mlm_head=False
    )
    model = noisy(Classifier(config, ["a", "b"], "roberta"))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights |= {
        "roberta.pooler.dense.weight": torch.ones(18, 18),
        "roberta.pooler.dense.bias": torch.ones(18),
    }
    save_file(weights, tmp_path / "model.safetensors")
    row = pack([[5, 6, 7]])
    assert torch.equal(Classifier.from_pretrained(tmp_path).eval()(*row), model(*row))


@pytest.mark.parametrize("name", ENCODERS)
def test_any_encoder_can_be_started_from(name, tmp_path):
    labels = ["a", "b", "c"]
    fields, stored = encoders.read(FIXTURES / name)
    model = Classifier.from_pretrained(FIXTURES / name, labels)
    weights = model.state_dict()
    assert weights["classifier.weight"].shape == (3, 18) and weights["classifier.bias"].eq(0).all()
    for tensor, w in stored.items():
        assert torch.equal(weights[tensor], w) if tensor in weights else classify.is_head(tensor)
    kept = weights.keys() & stored.keys() - {tensor for tensor in stored if not classify.is_head(tensor)}
    heads = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} if fields["pooler"] else set()
    if name == "modernbert-mlm":
        heads = {f"cls.predictions.transform.{part}.weight" for part in ("dense", "LayerNorm")}
    assert kept == heads

    tokens, cu_seqlens, _ = row_of(load_file(FIXTURES / name / "expected.safetensors"))
    model.save_pretrained(tmp_path)
    again = Classifier.from_pretrained(tmp_path, labels[::-1])
    assert again.labels == labels
    assert torch.equal(again.eval()(tokens, cu_seqlens), model.eval()(tokens, cu_seqlens))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"id2label": {"0": "yes", "1": "no"}}, ["3 outputs"]),
        ({"id2label": {"0": "yes", "1": "no", "2": "no"}}, ["id2label", "different"]),
        ({"problem_type": "multi_label_classification"}, ["multi_label_classification"]),
        ({"architectures": ["BertForTokenClassification"]}, ["no classifier", "--init-from"]),
    ],
)
def test_a_classifier_of_another_kind_is_refused(changes, words, tmp_path):
    with pytest.raises(ValueError) as error:
        Classifier.from_pretrained(copy_of(FIXTURES / "bert-classifier", tmp_path / "copy", **changes))
    assert all(word in str(error.value) for word in words), error.value


def test_labels_without_names_have_those_of_transformers(tmp_path):
    copy = copy_of(FIXTURES / "bert-classifier", tmp_path / "copy", id2label=None)
    assert Classifier.from_pretrained(copy).labels == ["LABEL_0", "LABEL_1", "LABEL_2"]


@pytest.mark.parametrize("pooling", ["cls", None])
def test_modernberts_other_pooling_is_refused(pooling, tmp_path):
    Classifier.from_pretrained(FIXTURES / "modernbert-mlm", ["a", "b"]).save_pretrained(tmp_path / "model")
    copy = copy_of(tmp_path / "model", tmp_path / "copy", classifier_pooling=pooling)
    with pytest.raises(ValueError, match=r"classifier_pooling .* expected 'mean'"):
        Classifier.from_pretrained(copy)


# --- the parts of training


@pytest.mark.parametrize("name", [*ENCODERS, "bert-classifier"])
def test_every_parameter_is_in_one_group_at_the_rate_of_its_depth(name):
    labels = None if name == "bert-classifier" else ["a", "b"]
    model = Classifier.from_pretrained(FIXTURES / name, labels)
    groups = parameter_groups(model, 0.01, 0.5)
    rates = {id(p): group["rate"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(list(model.parameters()))
    n_layers = 1 if name.startswith("albert") else model.config.n_layers
    for parameter, p in model.named_parameters():
        if parameter.startswith(("bert.embeddings.", "bert.embeddings_project.")):
            distance = n_layers + 1
        elif parameter.startswith("bert.encoder.layer."):
            distance = n_layers - int(parameter.split(".")[3])
        else:
            distance = 1 if parameter.startswith("bert.final_norm") else 0
        assert rates[id(p)] == pytest.approx(0.01 * 0.5**distance), parameter
    for group in groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] > 0}


def test_the_rate_is_a_slanted_triangle():
    shares = [slanted_triangle(step, 40) for step in range(40)]
    assert shares[:5] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 36 / 37])
    assert shares[22] == pytest.approx(18 / 37) and shares[39] == pytest.approx(1 / 37)
    assert [slanted_triangle(step, 3) for step in range(3)] == pytest.approx([1, 2 / 3, 1 / 3])
    assert slanted_triangle(0, 1) == 1


def test_scores_equal_those_by_hand():
    labels, predicted = torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 0, 1, 1, 0, 0])
    # label 0: TP 2, FP 2, FN 1; label 1: 1, 1, 1; label 3: 0, 0, 1; label 2 is nowhere
    assert scores(predicted, labels) == pytest.approx((3 / 6, (4 / 7 + 2 / 4 + 0) / 3))
    assert scores(labels, labels) == (1, 1)
    assert scores(torch.tensor([2, 2]), torch.tensor([0, 1])) == (0, 0)


# --- whole runs


def write_examples(path, examples):
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in examples))
    return path


@pytest.fixture(scope="module")
def labelled():
    """Texts of many words, one of which gives the label away."""
    chosen = random.Random(0)
    told = {"fine": ["good", "great", "lovely"], "poor": ["bad", "awful", "dull"]}
    examples = []
    for i in range(300):
        label = ("fine", "poor")[i % 2]
        words = chosen.choices(["the", "a", "film", "was", "and", "its", "plot"], k=chosen.randrange(3, 9))
        words.insert(chosen.randrange(len(words)), chosen.choice(told[label]))
        examples.append((" ".join(words), label))
    return examples


@pytest.fixture(scope="module")
def encoder(labelled, tmp_path_factory):
    """A random encoder with its tokenizer."""
    directory = tmp_path_factory.mktemp("encoder")
    tokenizer = train_bpe([text for text, _ in labelled], 320).with_special_tokens(SPECIAL_TOKENS)
    tokenizer.save(directory)
    torch.manual_seed(0)
    BERT(fitted(SMALL, tokenizer)).save_pretrained(directory)
    return directory


def flags(data, init_from, out, **changes):
    """A run small enough for a test: every flag can be changed, None leaves it out."""
    small = dict(data=data, init_from=init_from, out=out, epochs=2, batch_size=8, lr=0.003) | changes
    argv = []
    for name, value in small.items():
        if value is not None:
            argv += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return argv


def moved(encoder, out):
    """Return the names of those tensors of the encoder that a run changed."""
    before, after = encoders.read(encoder)[1], encoders.read(out / "model")[1]
    return {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}


def test_a_run_from_the_files_to_the_answer(labelled, encoder, tmp_path, capsys, monkeypatch):
    data, out = write_examples(tmp_path / "data.jsonl", labelled), tmp_path / "run"
    argv = flags(data, encoder, out, epochs=4, layer_decay=0.9)
    monkeypatch.chdir(tmp_path)
    run = run_command("-m", "posttraining.classify", *argv)
    assert run.code == 0, run.err
    for told in (
        "270 texts, 30 held out; labels fine, poor",
        "most frequent label",
        f"model: {out / 'model'}",
    ):
        assert told in run.out
    assert sorted(path.name for path in out.iterdir()) == ["metrics.jsonl", "model", "report.txt"]
    report = (out / "report.txt").read_text(encoding="utf-8").splitlines()
    assert report[2].startswith("naive Bayes on word counts: ") and report[-1].startswith("epoch 4: ")
    assert all(line in run.out for line in report[:4]) and "peak learning rate 0.003" in report
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 34), (2, 68), (3, 102), (4, 136)]
    assert rows[-1].keys() == {"epoch", "step", "loss", "val_accuracy", "val_f1", "seconds"}
    assert rows[-1]["val_accuracy"] > 0.95 and rows[-1]["val_f1"] > 0.95

    assert classify.main([str(out / "model"), "--text", "the plot was lovely"]) == 0
    first, second = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (first[1], second[1]) == ("fine", "poor") and float(first[0][:-1]) > 80
    tokenizer = Tokenizer.load(out / "model")
    assert tokenizer.fingerprint == Tokenizer.load(encoder).fingerprint

    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out / "model")
    with torch.no_grad():
        inputs = transformers.AutoTokenizer.from_pretrained(out / "model")("the plot was lovely")
        p = theirs(torch.tensor([inputs["input_ids"]])).logits[0].softmax(-1)
    assert f"{p[0]:.1%}" == first[0] and theirs.config.id2label == {0: "fine", 1: "poor"}


def test_a_modern_encoder_in_half_precision_is_trained_in_float32(labelled, encoder, tmp_path):
    tokenizer = Tokenizer.load(encoder)
    tokenizer.save(tmp_path / "modern")
    torch.manual_seed(0)
    config = fitted(bert.Config(2, 2, 32, 64, **bert.MODERN, window=3), tokenizer)
    BERT(config).bfloat16().save_pretrained(tmp_path / "modern")
    data = write_examples(tmp_path / "data.jsonl", labelled)
    assert classify.main(flags(data, tmp_path / "modern", tmp_path / "run", epochs=3)) == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val_accuracy"] > 0.95
    model = Classifier.from_pretrained(tmp_path / "run" / "model")
    assert model.family == "modernbert" and {p.dtype for p in model.parameters()} == {torch.float32}


def test_gradual_unfreezing_begins_at_the_top(labelled, encoder, tmp_path):
    data = write_examples(tmp_path / "data.jsonl", labelled[:30])
    layers = [("bert.encoder.layer.1.",), ("bert.encoder.layer.0.",), ("bert.embeddings.",)]
    names = set(encoders.read(encoder)[1])
    for epochs in (1, 2, 3, 4):
        out = tmp_path / str(epochs)
        assert classify.main(flags(data, encoder, out, epochs=epochs, unfreeze="gradual")) == 0
        free = tuple(prefix for prefixes in layers[: epochs - 1] for prefix in prefixes)
        changed = {name for name in names if name.startswith(free)} if free else set()
        changed -= {name for name in changed if "key.bias" in name}  # a softmax does not see what all share
        found = moved(encoder, out)
        assert {name for name in found if "key.bias" not in name} == changed
        assert all(name.startswith(free) for name in found)


def test_without_unfreezing_only_the_heads_learn(labelled, encoder, tmp_path):
    data = write_examples(tmp_path / "data.jsonl", labelled[:30])
    for seed in (0, 1):
        assert classify.main(flags(data, encoder, tmp_path / str(seed), unfreeze="none", seed=seed)) == 0
        assert moved(encoder, tmp_path / str(seed)) == set()
    a, b = (encoders.read(tmp_path / run / "model")[1] for run in "01")
    assert all(not torch.equal(a[name], b[name]) for name in a if classify.is_head(name))


def test_the_optimizer_works_at_these_rates(labelled, encoder, tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def seen(self, *args, **kwargs):
        rates.append({(group["depth"], group["lr"]) for group in self.param_groups})
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", seen)
    data = write_examples(tmp_path / "data.jsonl", labelled[:30])
    assert classify.main(flags(data, encoder, tmp_path / "run", lr=0.01, layer_decay=0.5)) == 0
    assert rates == [
        {(depth, 0.01 * 0.5 ** (3 - depth) * slanted_triangle(i, 8)) for depth in range(4)} for i in range(8)
    ]


def test_a_run_is_a_function_of_its_seed(labelled, encoder, tmp_path):
    """And of nothing else: neither of what ran before, nor of how the file is packed."""
    data = write_examples(tmp_path / "data.jsonl", labelled[:60])
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(gzip.compress(data.read_bytes()))
    for out, path, seed in (("a", data, 3), ("b", packed, 3), ("c", data, 4)):
        assert classify.main(flags(path, encoder, tmp_path / out, seed=seed)) == 0
    a, b, c = (load_file(tmp_path / out / "model" / "model.safetensors") for out in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_examples_to_hold_out_can_be_given_and_training_can_go_on(labelled, encoder, tmp_path, capsys):
    data = write_examples(tmp_path / "data.jsonl", labelled[:60])
    val = write_examples(tmp_path / "val.jsonl", labelled[60:70])
    assert classify.main(flags(data, encoder, tmp_path / "a", val=val)) == 0
    assert "60 texts, 10 held out" in capsys.readouterr().out
    again = flags(data, tmp_path / "a" / "model", tmp_path / "b", val=val)
    assert classify.main(again) == 0
    losses = [
        json.loads((tmp_path / out / "metrics.jsonl").read_text().split("\n")[0])["loss"] for out in "ab"
    ]
    assert losses[1] < losses[0]


@pytest.fixture
def ctrl_c_counts():
    """Python's own handler, for a process that a shell starts in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_counts")
def test_ctrl_c_leaves_the_epochs_that_ended_and_nothing_half_written(
    labelled, encoder, tmp_path, capsys, monkeypatch
):
    data, calls, predict = write_examples(tmp_path / "data.jsonl", labelled[:30]), [], classify.predict

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return predict(*args)

    monkeypatch.setattr(classify, "predict", interrupted)
    assert classify.main(flags(data, encoder, tmp_path / "run", epochs=5)) == 130
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert "Traceback" not in capsys.readouterr().err

    monkeypatch.setattr(Tokenizer, "save", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    assert classify.main(flags(data, encoder, tmp_path / "run", epochs=1)) == 130
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


# --- mistakes


def refused(capsys, argv):
    """The one line a mistake gives, without any training."""
    try:
        code = classify.main(argv)
    except SystemExit as stop:  # argparse's own
        code = stop.code
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "error: " in line]
    assert code == 2 and len(lines) == 1 and "Traceback" not in said.err, said.err
    assert "epoch" not in said.out
    return lines[0]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data": "no/such/file"}, ["no/such/file"]),
        ({"data": None}, ["--data", "--init-from"]),
        ({"text": "good"}, ["a classifier and --text"]),
        ({"val": "no/such/file"}, ["no/such/file"]),
        ({"init_from": "no/such/model"}, ["no/such/model", "Hugging Face"]),
        ({"init_from": FIXTURES / "llama"}, ["model_type 'llama'", "bert"]),
        ({"init_from": FIXTURES / "bert-classifier"}, ["entailment", "['fine', 'poor']"]),
        ({"init_from": FIXTURES / "bert-model"}, ["bert-model"]),  # has no tokenizer
        ({"epochs": 0}, ["--epochs 0"]),
        ({"batch_size": -1}, ["--batch-size -1"]),
        ({"lr": "nan"}, ["--lr nan"]),
        ({"lr": 0}, ["--lr 0"]),
        ({"seed": 10**23}, ["--seed 1000", "2^63"]),
        ({"layer_decay": 2.6}, ["--layer-decay 2.6", "at most 1"]),
        ({"unfreeze": "some"}, ["gradual"]),
    ],
)
def test_mistakes_in_flags_are_named(changes, words, labelled, encoder, tmp_path, capsys):
    data, out = write_examples(tmp_path / "data.jsonl", labelled[:30]), tmp_path / "run"
    error = refused(capsys, flags(**dict(data=data, init_from=encoder, out=out) | changes))
    assert all(word in error for word in words), error
    assert not out.exists()


@pytest.mark.parametrize(
    "lines, words",
    [
        ("", ["0 examples", "at least two"]),
        ('{"text": "good", "label": "a"}\n\n{"text": "bad"}\n', ["line 3", '{"text": a string, "label": a']),
        ('{"text": "good", "label": "a"}\ngood\n', ["line 2", "'good"]),
        ('["good", "a"]\n', ["line 1"]),
        ('{"text": "good", "label": 0.5}\n', ["line 1", "a string or a whole number"]),
        ('{"text": ["good"], "label": "a"}\n', ["line 1", "a string"]),
        ('{"text": "good", "label": "a"}\n{"text": "bad", "label": "a"}\n', ["every text", "'a'"]),
        (b'{"text": "\xff", "label": "a"}\n', ["line 1", "byte 10 (0xff) is not UTF-8"]),
        ('{"text": "good", "label": "a"}\n{"text": "bad", "label": "b"}\n', ["each of another label"]),
        (
            '{"text": "good", "label": "a"}\n' * 2 + '{"text": "%s", "label": "b"}\n' % ("good " * 60),
            ["--cut"],
        ),
    ],
    ids=[
        "empty",
        "no label",
        "no JSON",
        "no object",
        "number",
        "list",
        "one label",
        "no UTF-8",
        "alone",
        "long",
    ],
)
def test_mistakes_in_data_are_named(lines, words, encoder, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    error = refused(capsys, flags(data, encoder, tmp_path / "run"))
    assert all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_gzip_is_named(labelled, encoder, tmp_path, capsys):
    whole = gzip.compress(write_examples(tmp_path / "data.jsonl", labelled).read_bytes())
    for raw in (b"text", whole[: len(whole) // 2]):
        (tmp_path / "data.jsonl.gz").write_bytes(raw)
        error = refused(capsys, flags(tmp_path / "data.jsonl.gz", encoder, tmp_path / "run"))
        assert "data.jsonl.gz: cannot be read" in error


def test_columns_of_a_table_may_be_named(labelled, encoder, tmp_path):
    rows = "".join(f"{i},{text},{label}\n" for i, (text, label) in enumerate(labelled[:40]))
    (tmp_path / "data.csv").write_text("id,sentence,is\n" + rows)
    argv = flags(tmp_path / "data.csv", encoder, tmp_path / "run", epochs=1)
    assert classify.main([*argv, "--text-field", "sentence", "--label-field", "is"]) == 0
    assert Classifier.from_pretrained(tmp_path / "run" / "model").labels == ["fine", "poor"]


def test_columns_that_are_not_there_are_named(labelled, encoder, tmp_path, capsys):
    (tmp_path / "data.csv").write_text("id,text,is\n1,good,fine\n")
    error = refused(capsys, flags(tmp_path / "data.csv", encoder, tmp_path / "run"))
    assert "no field 'label', it has 'text', 'is'" in error or "it has 'id', 'text', 'is'" in error
    assert "--label-field" in error


def test_the_default_rate_is_berts_at_berts_size_and_rises_for_smaller_models(labelled, encoder, tmp_path):
    def rate(config):
        with torch.device("meta"):
            return classify.default_rate(Classifier(config, ["a", "b"], "bert"))

    assert rate(bert.SIZES["bert-base"]) == pytest.approx(5e-5, rel=0.01)
    assert rate(bert.SIZES["albert-base"]) == pytest.approx(5e-5, rel=0.01)  # its one layer runs twelve times
    assert rate(bert.SIZES["bert-large"]) == pytest.approx(2.3e-5, rel=0.05)  # 2e-5 in the paper
    assert 8e-4 < rate(bert.SIZES["tiny"]) < 1.2e-3
    data = write_examples(tmp_path / "data.jsonl", labelled[:30])
    assert classify.main(flags(data, encoder, tmp_path / "run", lr=None, epochs=1)) == 0
    model = Classifier.from_pretrained(tmp_path / "run" / "model")
    assert (
        f"peak learning rate {classify.default_rate(model):.2g}" in (tmp_path / "run/report.txt").read_text()
    )


def test_a_held_out_label_that_training_lacks_is_named(labelled, encoder, tmp_path, capsys):
    data = write_examples(tmp_path / "data.jsonl", labelled[:30])
    val = write_examples(tmp_path / "val.jsonl", [*labelled[:3], ("so so", "middling")])
    error = refused(capsys, flags(data, encoder, tmp_path / "run", val=val))
    assert str(val) in error and "'middling'" in error and "fine, poor" in error


def test_texts_too_long_can_be_cut(labelled, encoder, tmp_path):
    long = [(text + " the film" * 50, label) for text, label in labelled[:10]]
    data = write_examples(tmp_path / "data.jsonl", long)
    assert classify.main(flags(data, encoder, tmp_path / "run", epochs=1, cut=True)) == 0


def test_a_model_is_never_overwritten(labelled, encoder, tmp_path, capsys):
    (tmp_path / "run" / "model").mkdir(parents=True)
    data = write_examples(tmp_path / "data.jsonl", labelled[:30])
    assert "name another directory" in refused(capsys, flags(data, encoder, tmp_path / "run"))
    blocked = data / "run"  # below a file
    assert str(blocked) in refused(capsys, flags(data, encoder, blocked))


def test_a_tokenizer_of_another_model_is_refused(labelled, encoder, tmp_path, capsys):
    data = write_examples(tmp_path / "data.jsonl", labelled[:30])
    copy = copy_of(encoder, tmp_path / "copy")
    train_bpe([], 257).save(copy)
    assert "[CLS]" in refused(capsys, flags(data, copy, tmp_path / "run"))
    tokenizer = Tokenizer.load(encoder)
    tokenizer.with_special_tokens({"unk_token": "[UNK]"}).save(copy)
    assert "do not belong together" in refused(capsys, flags(data, copy, tmp_path / "run"))


def test_a_gradient_that_is_not_finite_ends_the_run(labelled, encoder, tmp_path, capsys):
    model = BERT(fitted(SMALL, Tokenizer.load(encoder)))
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "copy")
    Tokenizer.load(encoder).save(tmp_path / "copy")
    data = write_examples(tmp_path / "data.jsonl", labelled[:30])
    error = refused(capsys, flags(data, tmp_path / "copy", tmp_path / "run"))
    assert "not finite" in error and not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    "argv", [["no/such/model", "--text", "good"], ["no/such/model"], ["--text", "good"], []]
)
def test_mistakes_in_asking_are_named(argv, encoder, capsys):
    refused(capsys, argv)
    assert "no classifier" in refused(capsys, [str(encoder), "--text", "good"])
