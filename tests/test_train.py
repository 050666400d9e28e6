"""Training: what a run computes, what it leaves, and that neither a kill nor a mistake can spoil it."""

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SHARD, Beside
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import gpt
import train
from data.tokenizer import Tokenizer
from engine import device, optim
from kernels import backend

ROOT = Path(__file__).parent.parent
TIMES = ("seconds", "tokens_per_second")
SMALL = gpt.Config(2, 4, 32, 64, max_seq_len=64, n_kv_heads=2, qk_norm=True)


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A text to train on; beside it, "tiny" becomes small enough for a test."""
    monkeypatch.setitem(gpt.SIZES, "tiny", SMALL)
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of the text, {i * i % 97} and so on\n" for i in range(400)))
    return path


def flags(text, out, **changes):
    """A run small enough for a test: every flag can be changed, None leaves it out."""
    small = dict(
        model="gpt",
        data=text,
        tokenizer="bytes",
        steps=6,
        batch_size=2,
        seq_len=16,
        eval_every=3,
        log_every=1,
    )
    small |= dict(out=out, cache=text.parent / "cache") | changes
    argv = []
    for name, value in small.items():
        flag = f"--{name.replace('_', '-')}"
        if value is not None and value is not False:
            argv += [flag] if value is True else [flag, str(value)]
    return argv


def rows(out):
    """metrics.jsonl without the times, which differ from run to run."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def same_run(a, b):
    """Weights, metrics and samples are equal, to the bit."""
    for part in ("model/model.safetensors", SHARD):
        x, y = (load_file(out / part) for out in (a, b))
        assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    assert rows(a) == rows(b)
    assert (a / "samples.txt").read_text() == (b / "samples.txt").read_text()
    return True


def prepared(text, out, **changes):
    return train.prepare(train.parse_arguments(flags(text, out, **changes)))


# --- what a run is


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
    args = argparse.Namespace(steps=7, warmup=3, lr=0.001, schedule="cosine")
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
    args = argparse.Namespace(steps=102, warmup=2, lr=1.0, schedule=schedule)
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
        time.sleep(1.0)
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", slow)
    began = time.perf_counter()
    train.main(flags(text, tmp_path / "run", eval_every=1, save_every=6))
    elapsed = time.perf_counter() - began
    counted = [json.loads(line).get("seconds", 0) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert elapsed - max(counted) > 7.0  # seven evaluations slept that long


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
    assert start(flags(text, tmp_path / "compiled", steps=2, compile=True)).end() == 0
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
    small = gpt.Config(2, 4, 64, 128, max_seq_len=16, n_kv_heads=2, qk_norm=True)
    monkeypatch.setitem(gpt.SIZES, "tiny", small)
    text.write_text(text.read_text()[:3000])  # the interpreter is slow, and evaluation reads all of it
    losses = []
    for kernels in ("triton", "torch"):
        options = dict(steps=2, eval_every=2, kernels=kernels)
        assert train.main(flags(text, tmp_path / kernels, **options)) == 0
        losses.append([row.get("loss", row.get("val_loss")) for row in rows(tmp_path / kernels)])
    assert len(losses[0]) == 4  # before, two steps, after
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


# --- kill and resume


def start(argv, code="sys.exit(train.main(sys.argv[1:]))"):
    code = f"import sys, gpt, train; from gpt import Config; gpt.SIZES['tiny'] = {SMALL!r}\n{code}"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return Beside([sys.executable, "-c", code, *argv], env)


def wait_for(path, process, enough):
    deadline = time.monotonic() + 120
    while not (path.exists() and enough(path.read_text())):
        assert process.poll() is None, process.said()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_thousand_steps_with_two_kills_equal_an_uninterrupted_run(text, tmp_path):
    def run(out, **changes):
        options = dict(steps=2000, batch_size=1, eval_every=500, save_every=90, log_every=5, optimizer="muon")
        return flags(text, out, **options | changes)

    whole = start(run(tmp_path / "whole"))
    for kill_at in ("320", "1210"):
        process = start(run(tmp_path / "killed", resume=kill_at == "1210"))
        wait_for(
            tmp_path / "killed" / "metrics.jsonl", process, lambda log, at=kill_at: f'"step": {at}' in log
        )
        process.kill()
        process.wait()
    process = start(run(tmp_path / "killed", resume=True))
    assert process.end() == 0 and whole.end() == 0
    assert same_run(tmp_path / "whole", tmp_path / "killed")


KILLED_IN = """
import os, signal
from pathlib import Path
import torch.distributed.checkpoint as dcp
from formats import atomic

point, n = sys.argv[1].split(":")
owner = {"save": dcp, "rename": Path, "sync": atomic}[point]
original, calls = getattr(owner, point), []

def fatal(*args, **kwargs):
    if point == "save" or "/checkpoint" in str(args[0]):
        calls.append(1)
    if len(calls) == int(n):
        if point == "save":
            original(*args, **kwargs)
            for path in kwargs["storage_writer"].path.glob("shard-*"):
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(owner, point, fatal)
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("point", ["save:2", "sync:7", "rename:2", "rename:3", "rename:5"])
def test_kill_while_saving(point, text, tmp_path):
    """Half a file, between files, before and between the renames: the run ends as if nothing was."""
    out = tmp_path / "killed"
    options = dict(steps=12, eval_every=12, save_every=3)
    process = start([point, *flags(text, out, **options)], KILLED_IN)
    assert process.end() == -signal.SIGKILL, process.said()
    assert train.main(flags(text, tmp_path / "whole", **options)) == 0
    assert train.main(flags(text, out, resume=True, **options)) == 0
    assert same_run(tmp_path / "whole", out)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_ctrl_c_and_sigterm_save_and_nothing_is_lost(number, code, text, tmp_path):
    options = dict(steps=300, eval_every=300, save_every=300)
    process = start(flags(text, tmp_path / "run", **options))
    wait_for(tmp_path / "run" / "metrics.jsonl", process, lambda log: '"step": 5' in log)
    process.send_signal(number)
    assert process.end(60) == code
    assert "saved; go on with --resume" in process.said()
    step = json.loads((tmp_path / "run" / "checkpoint" / "state.json").read_text())["step"]
    assert 5 <= step < 300 and (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert train.main(flags(text, tmp_path / "run", resume=True, **options)) == 0
    assert train.main(flags(text, tmp_path / "whole", **options)) == 0
    assert same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("step, log_every", [(0, 1), (3, 1), (3, 5), (6, 1)])
def test_sigterm_does_not_wait_for_the_end_of_an_evaluation(step, log_every, text, tmp_path, monkeypatch):
    out, original, passes = tmp_path / "run", gpt.GPT.loss, []

    def loss(self, batch):
        passes.append(self.training)
        if not self.training and passes.count(True) == 3 + step and passes[-2]:  # three passes are timed
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(gpt.GPT, "loss", loss)
    assert train.main(flags(text, out, log_every=log_every)) == 0
    assert passes[-3]  # the evaluation ended with its second batch
    assert [row["step"] for row in rows(out) if "val_loss" in row] == list(range(0, step, 3))
    monkeypatch.setattr(gpt.GPT, "loss", original)
    assert train.main(flags(text, out, log_every=log_every, resume=True)) == 0
    assert train.main(flags(text, tmp_path / "whole", log_every=log_every)) == 0
    assert same_run(tmp_path / "whole", out)


def test_a_disk_that_fills_up_ends_the_run_and_loses_nothing(text, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        options = dict(steps=300, eval_every=300, save_every=50)
        process = start(flags(text, disk / "run", **options))
        wait_for(disk / "run" / "metrics.jsonl", process, lambda log: '"step": 60' in log)
        with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        assert process.end(60) == 1
        (error,) = re.findall("error: .*", process.said())
        assert "No space left" in error and "disk/run/checkpoint" in error
        (disk / "filler").unlink()
        assert train.main(flags(text, disk / "run", resume=True, **options)) == 0
        assert train.main(flags(text, tmp_path / "whole", **options)) == 0
        assert same_run(tmp_path / "whole", disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_runs_in_one_directory_are_refused(text, tmp_path, capsys):
    first = prepared(text, tmp_path / "run")
    assert "another run is writing to it" in refused(capsys, flags(text, tmp_path / "run"))
    assert "another run is writing to it" in refused(capsys, flags(text, tmp_path / "run", resume=True))
    first.close()
    assert train.main(flags(text, tmp_path / "run")) == 0


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
    """Counts how often the host wants to know a number that a device has."""

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
    assert asked.times == 2  # whether targets are in range, which only a CPU is asked, in each of two passes


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


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("name", [Path(SHARD).name, "state.json", "checksums.json"])
@pytest.mark.parametrize("harm", [flip, lambda path: path.write_bytes(path.read_bytes()[:-5])])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(name, harm, text, tmp_path, capsys):
    for run in ("whole", "harmed"):
        assert train.main(flags(text, tmp_path / run, save_every=2)) == 0
    harm(tmp_path / "harmed" / "checkpoint" / name)
    assert train.main(flags(text, tmp_path / "harmed", save_every=2, resume=True)) == 0
    warning = next(line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert str(tmp_path / "harmed" / "checkpoint") in warning
    assert name in warning or name == "checksums.json"  # a flipped checksum accuses the file it is of
    assert same_run(tmp_path / "whole", tmp_path / "harmed")
    for run in ("checkpoint", "checkpoint.previous"):
        harm(tmp_path / "harmed" / run / name)
    assert train.main(flags(text, tmp_path / "harmed", save_every=2, resume=True)) == 2
    assert "no checkpoint is whole" in capsys.readouterr().err


def test_a_longer_run_can_follow_a_finished_one(text, tmp_path):
    train.main(flags(text, tmp_path / "run", schedule="constant"))
    assert train.main(flags(text, tmp_path / "run", schedule="constant", steps=9, resume=True)) == 0
    train.main(flags(text, tmp_path / "whole", schedule="constant", steps=9))
    x, y = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("run", "whole"))
    assert all(torch.equal(x[name], y[name]) for name in x)


# --- mistakes


def refused(capsys, argv):
    """The one line a mistake gives; nothing else may be printed, and the exit code is 2."""
    try:
        code = train.main(argv)
    except SystemExit as stop:  # argparse's own
        code = stop.code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "error: " in line]
    assert code == 2 and len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": "gtp"}, ["--model gtp", "gpt"]),
        ({"model": None}, ["--model"]),
        ({"size": "huge"}, ["--size huge", "tiny", "llama3-8b"]),
        ({"data": "no/such/place"}, ["--data no/such/place", "stdlib"]),
        ({"tokenizer": "gpt-two"}, ["gpt-two", "bpe:4096"]),
        ({"tokenizer": "bpe:100"}, ["bpe:100", "257"]),
        ({"seq_len": 100_000}, ["--seq-len 100000", "at most 64"]),
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


def test_resuming_another_run_than_was_started_is_refused(text, tmp_path, capsys):
    assert train.main(flags(text, tmp_path / "run")) == 0
    for changes, word in (({"size": "10m"}, "--size tiny, not 10m"), ({"seq_len": 8}, "--seq-len 16, not 8")):
        error = refused(capsys, flags(text, tmp_path / "run", resume=True, **changes))
        assert word in error and "its command was" in error
    text.write_text(text.read_text().replace("line", "LINE"))
    assert "has changed" in refused(capsys, flags(text, tmp_path / "run", resume=True))


def test_a_run_resumes_after_its_files_have_moved(text, tmp_path, monkeypatch, capsys):
    """What is compared is the text, its tokenizer and the fields of --set, not how they are written."""
    options = ["--set", "rope_theta=5000", "norm_eps=1e-5"]
    assert train.main([*flags(text, tmp_path / "whole"), *options]) == 0
    assert train.main([*flags(text, tmp_path / "run", steps=3, schedule="constant"), *options]) == 0
    assert train.main([*flags(text, tmp_path / "same", schedule="constant"), *options]) == 0
    (tmp_path / "moved").mkdir()
    moved = text.rename(tmp_path / "moved" / "renamed.txt")
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    again = ["--set", "norm_eps=0.00001", "rope_theta=5000.0"]
    argv = flags(moved, tmp_path / "run", schedule="constant", resume=True, cache=cache)
    here = [*argv[:2], "--data", "moved", "--tokenizer", str(tmp_path / "whole" / "model"), *argv[6:], *again]
    assert train.main(here) == 0
    same_run(tmp_path / "same", tmp_path / "run")

    other = [*argv, "--set", "norm_eps=1e-5", "rope_theta=6000"]
    assert "was started with --set" in refused(capsys, other)
    assert "has changed" in refused(capsys, [*argv, *again, "--tokenizer", "bpe:300"])
    assert "has changed" in refused(capsys, [*argv, *again, "--val", str(tmp_path / "run" / "samples.txt")])


def test_a_model_that_has_moved_may_be_named_anew_and_another_one_not(text, tmp_path, capsys):
    assert train.main(flags(text, tmp_path / "base")) == 0
    model = tmp_path / "base" / "model"
    start = dict(init_from=model, tokenizer=None, schedule="constant")
    assert train.main(flags(text, tmp_path / "run", steps=3, **start)) == 0
    assert train.main(flags(text, tmp_path / "same", **start)) == 0
    start |= dict(init_from=model.rename(tmp_path / "moved"), resume=True)
    assert train.main(flags(text, tmp_path / "run", **start)) == 0
    same_run(tmp_path / "same", tmp_path / "run")
    config = tmp_path / "moved" / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))
    assert "has rope_theta 20000.0, the run was" in refused(capsys, flags(text, tmp_path / "run", **start))


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
