"""Training: what a run computes, what it leaves, and which mistakes end it before its first step."""

import argparse
import itertools
import json
import math
import re
import shutil
import time

import pytest
import torch
from conftest import ROOT, SHARD
from safetensors.torch import load_file
from small_gpt import SMALL, flags, forked, prepared, refused, rows, same_run
from torch.utils._python_dispatch import TorchDispatchMode

import gpt
import train
from data.tokenizer import Tokenizer
from engine import cpu, device, optim
from kernels import backend

# --- what a run is


@pytest.mark.usefixtures("rendered")
def test_a_run_learns_and_leaves_everything_behind(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(flags(text, out, steps=60, eval_every=20, lr=0.003)) == 0
    said = capsys.readouterr().out
    for part in (
        "parameters",
        "tokens per parameter (Chinchilla: 20)",
        "FLOPs",
        "60 steps of 32 tokens",
        "min from",
    ):
        assert part in said
    evaluations = [row for row in rows(out) if "val_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 20, 40, 60]
    assert evaluations[-1]["val_loss"] < 0.7 * evaluations[0]["val_loss"]
    last = evaluations[-1]
    assert last["perplexity"] == pytest.approx(math.exp(last["val_loss"]))
    steps = [row for row in rows(out) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 61))
    assert [row["tokens"] for row in steps] == list(range(32, 32 * 61, 32))
    assert steps[0].keys() >= {"step", "tokens", "loss", "lr", "grad_norm", "mfu"}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "samples.txt").read_text().count("=== step") == 4
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint", "checkpoint.previous", "lock", "loss.png", "metrics.jsonl", "model", "report.html",
        "run.json", "samples.txt",
    ]  # fmt: skip


def test_bits_per_byte_is_the_code_length_of_the_held_out_text(text, tmp_path):
    out = tmp_path / "run"
    train.main(flags(text, out, tokenizer="bpe:300"))
    row = next(row for row in reversed(rows(out)) if "val_loss" in row)
    model, tokenizer = gpt.GPT.from_pretrained(out / "model"), Tokenizer.load(out / "model")
    whole = text.read_bytes()
    held_out = whole[-(int(len(whole) / 20)) :].partition(b"\n")[2]
    tokens = torch.tensor([tokenizer.eot_id, *tokenizer.encode(held_out.decode())])
    nats = 0.0
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start : start + 17]
        nats += torch.nn.functional.cross_entropy(
            model(window[None, :-1])[0], window[1:], reduction="sum"
        ).item()
    assert row["val_loss"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(held_out), rel=1e-5)


def test_transformers_opens_the_model_directory(text, tmp_path):
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "run"
    train.main(flags(text, out, tokenizer="bpe:300"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    ours, tokenizer = gpt.GPT.from_pretrained(out / "model"), Tokenizer.load(out / "model")
    prompt = "line 7 of the text,\n\n  and söme 日本 more"
    ids = tokenizer.encode(prompt)
    assert their_tokenizer(prompt).input_ids == ids
    assert their_tokenizer.decode(ids) == prompt
    assert their_tokenizer.eos_token_id == theirs.config.eos_token_id == tokenizer.eot_id
    with torch.no_grad():
        difference = (ours(torch.tensor([ids])) - theirs(torch.tensor([ids])).logits).abs().max()
    assert difference < 1e-5


def test_steps_n_makes_n_updates_at_the_scheduled_rates(text, tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def counted(self, *args, **kwargs):
        rates.append({group["lr"] for group in self.param_groups})
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    train.main(flags(text, tmp_path / "run", steps=7, warmup=3, lr=0.001))
    args = argparse.Namespace(steps=7, warmup=3, lr=0.001, schedule="cosine", schedule_from=0)
    assert rates == [{optim.learning_rate(i, args)} for i in range(7)]


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("cosine", [0.5, 1.0, 1.0, 0.55, 0.1]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 0.0]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rate_at_its_corners(schedule, expected):
    args = argparse.Namespace(steps=102, warmup=2, lr=1.0, schedule=schedule, schedule_from=0)
    assert [optim.learning_rate(i, args) for i in (0, 1, 2, 52, 102)] == pytest.approx(expected)
    if schedule == "wsd":
        assert optim.learning_rate(92, args) == pytest.approx(0.5)


def test_gradient_accumulation_is_the_same_batch(text, tmp_path):
    """Four sequences at once or two by two: the same sequences, so the same loss up to float32 rounding."""
    train.main(flags(text, tmp_path / "a", batch_size=4))
    train.main(flags(text, tmp_path / "b", batch_size=2, grad_accum=2))
    a, b = rows(tmp_path / "a"), rows(tmp_path / "b")
    assert [row["tokens"] for row in a] == [row["tokens"] for row in b]
    for x, y in zip(a, b, strict=True):
        for key in x.keys() & {"loss", "val_loss", "grad_norm"}:
            assert x[key] == pytest.approx(y[key], rel=1e-3), (x, y)


def test_evaluating_and_logging_more_often_changes_nothing(text, tmp_path):
    train.main(flags(text, tmp_path / "a", eval_every=6, save_every=6))
    train.main(flags(text, tmp_path / "b", eval_every=1, save_every=2))
    x, y = (load_file(tmp_path / run / "model" / "model.safetensors") for run in "ab")
    assert all(torch.equal(x[name], y[name]) for name in x)
    losses = [[row["loss"] for row in rows(tmp_path / run) if "loss" in row] for run in "ab"]
    assert losses[0] == losses[1]


def test_evaluation_is_not_counted_as_step_time(text, tmp_path, monkeypatch):
    evaluate = train.evaluate

    def slow(*args):
        time.sleep(0.5)
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", slow)
    began = time.perf_counter()
    train.main(flags(text, tmp_path / "run", eval_every=1, save_every=6))
    elapsed = time.perf_counter() - began
    counted = [json.loads(line).get("seconds", 0) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert elapsed - max(counted) > 7 * 0.5  # seven evaluations slept that long


def test_every_parameter_is_in_one_group_and_only_matrices_decay(text, tmp_path):
    for optimizer in ("adamw", "muon"):
        run = prepared(text, tmp_path / optimizer, optimizer=optimizer, weight_decay=0.3)
        names = {id(p): name for name, p in run.model.named_parameters()}
        groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
        held = [id(p) for group in groups for p in group["params"]]
        assert sorted(held) == sorted(names)
        for group in groups:
            assert {p.ndim for p in group["params"]} in ({1}, {2})
            assert group["weight_decay"] == (0.3 if group["params"][0].ndim == 2 else 0.0)
    muon = {names[id(p)] for p in run.optimizers[1].param_groups[0]["params"]}
    assert muon == {name for name in names.values() if "_proj" in name}


@pytest.mark.parametrize("options", [{"optimizer": "muon"}, {"document_mask": True}, {"schedule": "wsd"}])
def test_options_train(options, text, tmp_path):
    assert train.main(flags(text, tmp_path / "run", steps=30, eval_every=30, lr=0.003, **options)) == 0
    first, last = (row["val_loss"] for row in rows(tmp_path / "run") if "val_loss" in row)
    assert last < 0.8 * first


@pytest.mark.skipif(not device.has_bfloat16("cpu"), reason="this CPU has no bfloat16 arithmetic")
def test_bfloat16_trains_as_float32_does(text, tmp_path):
    for dtype in ("float32", "bfloat16"):
        train.main(flags(text, tmp_path / dtype, steps=30, eval_every=30, lr=0.003, dtype=dtype))
    a, b = (rows(tmp_path / dtype)[-1]["val_loss"] for dtype in ("float32", "bfloat16"))
    assert a == pytest.approx(b, rel=0.02)  # eight bits of mantissa, thirty steps
    weights = load_file(tmp_path / "bfloat16" / "model" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_compiled_training_is_the_same_and_saves_the_plain_module(text, tmp_path):
    train.main(flags(text, tmp_path / "plain", steps=2))
    assert forked(flags(text, tmp_path / "compiled", steps=2, compile=True)).end() == 0
    x, y = (load_file(tmp_path / run / SHARD) for run in ("plain", "compiled"))
    assert x.keys() == y.keys()
    for a, b in zip(rows(tmp_path / "plain"), rows(tmp_path / "compiled"), strict=True):
        # fused operations round differently, and Adam's first steps magnify the smallest gradients
        assert [a[key] for key in ("loss", "val_loss") if key in a] == pytest.approx(
            [b[key] for key in ("loss", "val_loss") if key in b], rel=1e-4
        )


def test_training_goes_on_from_a_saved_model(text, tmp_path):
    train.main(flags(text, tmp_path / "a", steps=30, eval_every=30, lr=0.003))
    again = flags(text, tmp_path / "b", init_from=tmp_path / "a" / "model", tokenizer=None)
    assert train.main(again) == 0
    assert rows(tmp_path / "b")[0]["val_loss"] == pytest.approx(
        rows(tmp_path / "a")[-1]["val_loss"], rel=1e-5
    )


@pytest.mark.parametrize(
    "name, peak", [("NVIDIA H100 PCIe", 756e12), ("NVIDIA L4", 121e12), ("NVIDIA L40", None)]
)
def test_mfu_is_shown_for_known_devices_only(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert device.peak_flops("cuda") == peak
    assert device.peak_flops("cpu") is None


ADVICE = "slow: other processes use the cores"


def test_advice_about_crowded_cores_is_one_line_once(text, tmp_path, monkeypatch, capsys):
    times = []
    monkeypatch.setattr(cpu, "crowded", lambda *given: times.append(given) or ADVICE)
    assert train.main(flags(text, tmp_path / "run", steps=4, log_every=1, device="cpu")) == 0
    assert len(times) == 1 and all(seconds > 0 for seconds in times[0])
    assert capsys.readouterr().out.count(ADVICE) == 1


# --- a loss that does not stay finite


def spoil(monkeypatch, when):
    loss, calls = gpt.GPT.loss, []

    def spoiled(self, batch):
        value, metrics = loss(self, batch)
        calls.append(self.training)
        return value * (math.nan if self.training and when(sum(calls)) else 1), metrics

    monkeypatch.setattr(gpt.GPT, "loss", spoiled)


def test_a_step_that_is_not_finite_is_skipped_counted_and_shown(text, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, lambda n: n == 3 + 4)  # three passes estimate the time
    assert train.main(flags(text, tmp_path / "run")) == 0
    assert "step 4: loss nan" in capsys.readouterr().out
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["skipped"] for row in steps] == [0, 0, 0, 1, 1, 1]
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(w.isfinite().all() for w in weights.values())


def test_several_in_a_row_end_the_run_and_name_the_last_good_checkpoint(text, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, lambda n: n > 3 + 4)
    assert train.main(flags(text, tmp_path / "run", steps=50)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error.startswith("error: 5 steps in a row were not finite")
        and str(tmp_path / "run" / "checkpoint") in error
    )
    assert json.loads((tmp_path / "run" / "checkpoint" / "state.json").read_text())["step"] == 3


def test_triton_kernels_train_like_torchs_own(text, tmp_path, monkeypatch):
    small = gpt.Config(2, 2, 32, 64, max_seq_len=8, n_kv_heads=1, qk_norm=True)
    monkeypatch.setitem(gpt.SIZES, "tiny", small)
    # The interpreter is slow: an evaluation reads all held-out text, and a sample is as long as a row.
    text.write_text(text.read_text()[:1000])
    losses = []
    for kernels in ("triton", "torch"):
        options = dict(steps=2, eval_every=2, seq_len=8, kernels=kernels)
        assert train.main(flags(text, tmp_path / kernels, **options)) == 0
        losses.append([row.get("loss", row.get("val_loss")) for row in rows(tmp_path / kernels)])
    assert len(losses[0]) == 4  # before, two steps, after
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


# --- what changes nothing


def test_a_clock_that_jumps_changes_nothing(text, tmp_path, monkeypatch, capsys):
    now = itertools.cycle([1e9, 1e9 + 86_400, 0.0, 2e9])
    for clock in ("time.time", "tqdm.std.time"):
        monkeypatch.setattr(clock, lambda: next(now))
    assert train.main(flags(text, tmp_path / "jumping")) == 0
    lines = re.findall(r"^step \d+/6 .*", capsys.readouterr().err, re.M)
    monkeypatch.undo()
    monkeypatch.setitem(gpt.SIZES, "tiny", SMALL)
    assert train.main(flags(text, tmp_path / "steady")) == 0
    assert same_run(tmp_path / "jumping", tmp_path / "steady")
    steps = [json.loads(line) for line in (tmp_path / "jumping" / "metrics.jsonl").open()]
    seconds = [row["seconds"] for row in steps if "seconds" in row]
    assert seconds == sorted(seconds) and 0 < seconds[0] < 60
    assert all(row["tokens_per_second"] > 0 for row in steps if "seconds" in row)
    assert lines and not any("days" in line or " h left" in line for line in lines)  # bars: test_progress.py


@pytest.mark.parametrize("model", ["gpt", "bert", "moe"])
def test_activations_computed_again_are_the_same(model, text, tmp_path):
    train.main(flags(text, tmp_path / "kept", model=model))
    train.main(flags(text, tmp_path / "again", model=model, checkpoint_activations=True))
    assert same_run(tmp_path / "kept", tmp_path / "again")


class Asked(TorchDispatchMode):
    """Counts how often the host reads a number from the device, for which it would wait."""

    def __init__(self):
        super().__init__()
        self.times = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.times += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("model", ["gpt", "moe"])
def test_a_step_never_waits_for_the_device(model, optimizer, text, tmp_path):
    run = prepared(text, tmp_path / "run", model=model, optimizer=optimizer, grad_accum=2)
    train.update(run)
    with Asked() as asked:
        train.update(run)
    # On a CPU alone, the loss of each of two batches reads if targets are in range, and if any is ignored.
    assert asked.times == 4


@pytest.mark.parametrize("model", ["gpt", "bert", "moe"])
def test_the_loss_is_compiled_whole_and_once_for_training_once_for_evaluation(
    model, text, tmp_path, monkeypatch
):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: real(f, backend=backend, fullgraph=True))
    torch.compiler.reset()
    assert train.main(flags(text, tmp_path / "run", model=model, compile=True, batch_size=4)) == 0
    assert len(graphs) == 2


# --- mistakes


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": "gtp"}, ["--model gtp", "gpt"]),
        ({"model": None}, ["--model"]),
        ({"size": "huge"}, ["--size huge", "tiny", "llama3-8b"]),
        ({"data": "no/such/place"}, ["--data no/such/place", "stdlib"]),
        ({"tokenizer": "gpt-two"}, ["gpt-two", "bpe:4096"]),
        ({"tokenizer": "bpe:100"}, ["bpe:100", "257"]),
        ({"seq_len": 100_000}, ["--seq-len 100000", "at most 64", "give that or less"]),
        ({"seq_len": 1000}, ["--seq-len 1000", "at most 64", "or choose --size"]),
        ({"val": ""}, ["--val", "found an empty one"]),
        ({"cache": ""}, ["--cache", "found an empty one"]),
        ({"batch_size": 0}, ["--batch-size 0", "at least 1"]),
        ({"steps": -3}, ["--steps -3", "at least 1"]),
        ({"lr": "nan"}, ["--lr nan"]),
        ({"seed": -1}, ["--seed -1"]),
        ({"resume": True}, ["no checkpoint to resume from"]),
        ({"device": "cuda"}, ["--device cuda", "has none"]),
        ({"kernels": "triton", "device": "cpu"}, ["--kernels triton", "needs a GPU"]),
        ({"optimizer": "sgd"}, ["sgd", "adamw", "muon"]),
        ({"init_from": "no/such/model", "tokenizer": None}, ["no/such/model"]),
        ({"init_from": "x", "size": "tiny"}, ["--size tiny", "--init-from"]),
    ],
)
def test_mistakes_in_flags_are_named(changes, words, text, tmp_path, capsys, monkeypatch):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.chdir(tmp_path)
    error = refused(capsys, flags(text, tmp_path / "run", **changes))
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: path.write_bytes(b""), ["0 bytes of text"]),
        (
            lambda path: path.write_bytes(bytes(range(256)) * 9),
            ["byte 0 is NUL", "byte 128", "--bad-text skip"],
        ),
        (lambda path: path.mkdir(), ["no .txt"]),
    ],
    ids=["empty file", "binary data", "directory without text"],
)
def test_mistakes_in_data_are_named(make, words, text, tmp_path, capsys):
    path = tmp_path / "input"
    make(path)
    error = refused(capsys, flags(text, tmp_path / "run", data=path))
    assert str(path) in error and any(word in error for word in words), error


def test_bfloat16_without_the_hardware_is_refused(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(device, "has_bfloat16", lambda device: False)
    assert "--dtype float32" in refused(capsys, flags(text, tmp_path / "run", dtype="bfloat16"))


def test_an_out_that_cannot_be_written_is_named(text, tmp_path, capsys):
    blocked = text / "run"  # below a file
    assert f"--out {blocked}: cannot be written to" in refused(capsys, flags(text, blocked))


def test_a_full_disk_is_found_before_the_work(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    assert "GB free on its disk" in refused(capsys, flags(text, tmp_path / "run"))


def test_a_run_is_never_overwritten(text, tmp_path, capsys):
    assert train.main(flags(text, tmp_path / "run")) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "--resume" in refused(capsys, flags(text, tmp_path / "run"))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_checkpoint_with_a_feature_we_lack_is_named(text, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    hf = json.loads((ROOT / "tests" / "fixtures" / "llama" / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(hf | {"hidden_act": "relu"}))
    error = refused(capsys, flags(text, tmp_path / "run", init_from=model, tokenizer="bytes"))
    assert "hidden_act 'relu' is not implemented" in error


def test_help_reads_without_training(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for flag in (
        "--model",
        "--data",
        "--grad-accum",
        "--schedule",
        "--no-compile",
        "--kernels",
        "--init-from",
    ):
        assert flag in said
