"""Several processes compute what one does, save what any number of them can resume, and end together."""

import json
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SHARD, Beside
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import gpt
import train
from data.tokenizer import get_tokenizer
from engine import parallel
from engine.contract import find
from engine.device import has_bfloat16

ROOT = Path(__file__).parents[2]
MODELS, MODES = ("gpt", "bert", "moe", "lora"), ("ddp", "fsdp")
SMALL = dict(n_layers=2, n_heads=4, d_model=32, d_ff=48, max_seq_len=64)
# What each of torchrun's processes does: runs, one after the other, in the same group of processes.
WORKER = """
import json, sys
import test_parallel, train

test_parallel.make_small()
for argv, spoilt in json.loads(sys.argv[1]):
    with test_parallel.watched(argv[argv.index("--out") + 1], spoilt):
        code = train.main(argv)
    if code != 0:
        sys.exit(code)
"""


def make_small():
    for name in ("gpt", "bert", "moe"):
        sizes = find(name).SIZES
        fields = SMALL | ({"n_kv_heads": 2} if name != "bert" else {})
        fields |= {"n_experts": 6, "d_expert": 20, "bias_update_rate": 0.01} if name == "moe" else {}
        sizes["tiny"] = replace(sizes["tiny"], **fields)


@contextmanager
def watched(out, spoilt=None):
    """Write to out the gradients of the first and the third update, how often ddp has added gradients up, and
    how many graphs --compile has found, which are run as they are. spoilt: (process, update, how), see
    `spoil`."""
    made, step, ddp, reduced = [], train.step_optimizers, parallel.DistributedDataParallel, []
    graphs, compiler = [], torch.compile

    def as_it_is(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def counted(state, bucket):
        reduced.append(bucket.index())
        return allreduce_hook(None, bucket)

    class Counting(ddp):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_comm_hook(None, counted)

    def watching(optimizers, finite):
        made.append(1)
        params = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        gradients = {str(i): parallel.unshard(p.grad).clone() for i, p in enumerate(params)}
        if len(made) in (1, 3) and parallel.rank() == 0:
            save_file(gradients, Path(out) / f"gradients-{len(made)}.safetensors")
        step(optimizers, finite)

    train.step_optimizers, parallel.DistributedDataParallel = watching, Counting
    torch.compile = partial(compiler, backend=as_it_is)
    forget = spoil(*spoilt) if spoilt else None
    try:
        yield
    finally:
        train.step_optimizers, parallel.DistributedDataParallel, torch.compile = step, ddp, compiler
        if forget:
            forget()
        if parallel.rank() == 0:
            (Path(out) / "reduced").write_text(str(reduced.count(0)))
            (Path(out) / "graphs").write_text(str(len(graphs)))


def spoil(rank, update, how):
    """In one process and update: a NaN in the gradient, an exception, or SIGTERM in the evaluation after."""
    original, calls = gpt.GPT.loss, []

    def loss(self, batch):
        value, metrics = original(self, batch)
        calls.append(self.training)
        # After three passes that are timed, two in each update.
        now = parallel.rank() == rank and sum(calls) == 3 + 2 * update
        if now and how == "sigterm" and not self.training:
            os.kill(os.getpid(), signal.SIGTERM)
        now = now and self.training
        if now and how == "raise":
            raise RuntimeError("this process has had enough")
        return value * (float("nan") if now and how == "nan" else 1.0), metrics

    gpt.GPT.loss = loss
    return lambda: setattr(gpt.GPT, "loss", original)


def launch(folder, n, runs):
    """n processes that make runs, each of flags and whom to spoil; what they print is thrown away."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    path = ":".join(str(ROOT / folder) for folder in ("", "tests", "tests/engine"))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    (folder / "worker.py").write_text(WORKER)
    command += [str(folder / "worker.py"), json.dumps(runs)]
    return Beside(command, env)


def argv(folder, model, out, *more, steps):
    data = "questions.jsonl" if model == "lora" else "text.txt"
    flags = f"--model {model} --data {folder / data} --batch-size 8 --grad-accum 2 --lr 0.002 "
    flags += f"--steps {steps} --schedule constant --warmup 0 --eval-every 2 --log-every 1 "
    flags += (
        f"--seq-len 64 --base {folder / 'base'} " if model == "lora" else "--seq-len 16 --tokenizer bytes "
    )
    return [*flags.split(), "--cache", str(folder / "cache"), "--out", str(out), *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts, a base to adapt, and for each model a run of six updates in one process."""
    before = {name: find(name).SIZES["tiny"] for name in MODELS[:3]}
    make_small()
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "text.txt").write_text("".join(f"line {i}, {i * i % 97} and so on\n" for i in range(400)))
    records = [{"question": f"{i}?", "answer": "ab"} for i in range(60)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = get_tokenizer("bytes")
    torch.manual_seed(0)
    fields = {"vocab_size": tokenizer.n_vocab, "max_seq_len": 64, "eos_token_id": tokenizer.eot_id}
    gpt.GPT(replace(gpt.SIZES["tiny"], **fields)).save_pretrained(folder / "base")
    tokenizer.save(folder / "base")
    for model in MODELS:
        with watched(folder / f"{model}-one"):
            assert train.main(argv(folder, model, folder / f"{model}-one", steps=6)) == 0
    yield folder
    for name, config in before.items():
        find(name).SIZES["tiny"] = config


@pytest.fixture(scope="module")
def chain(folder):
    """Each model, ddp and fsdp: two updates by two processes, two more by four, and the last two by one."""
    names = [(model, mode) for model in MODELS for mode in MODES]
    for n, steps, more in ((2, 2, []), (4, 4, ["--resume"])):
        runs = []
        for model, mode in names:
            out = folder / f"{model}-{mode}"
            runs.append((argv(folder, model, out, "--parallel", mode, *more, steps=steps), None))
        if n == 2 and has_bfloat16("cpu"):
            less = ["--parallel", "fsdp", "--dtype", "bfloat16", "--checkpoint-activations"]
            runs.append((argv(folder, "gpt", folder / "gpt-less", *less, steps=2), None))
        process = launch(folder, n, runs)
        assert process.end() == 0, process.said()
        for model, mode in names:
            shutil.copytree(folder / f"{model}-{mode}", folder / f"{model}-{mode}-by-{n}")
    for model, mode in names:
        assert train.main(argv(folder, model, folder / f"{model}-{mode}", "--resume", steps=6)) == 0
    return folder


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


def assert_close(one, many, **tolerances):
    """Rows of two runs: those keys that a row has, each within its relative tolerance."""
    for a, b in zip(one, many, strict=True):
        assert (a["step"], a["tokens"], "loss" in a) == (b["step"], b["tokens"], "loss" in b)
        for key in a.keys() & tolerances.keys():
            assert a[key] == pytest.approx(b[key], rel=tolerances[key]), (key, a, b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS)
def test_two_then_four_then_one_process_are_the_run_of_one(model, mode, chain):
    one, many = rows(chain / f"{model}-one"), rows(chain / f"{model}-{mode}")
    kept = dict.fromkeys(("loss", "val_loss", "bits_per_byte", "accuracy", "max_load", "aux_loss"), 1e-5)
    assert_close(one, many, **kept, grad_norm=1e-4)
    shards = [len(list((chain / f"{model}-{mode}-by-{n}" / "checkpoint").glob("shard-*"))) for n in (2, 4)]
    assert shards == [2, 4]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_those_of_one_process(model, mode, chain):
    """Of the first update by two, and of the third, which is the first by four."""
    for n, update, tolerance in ((2, 1, 1e-5), (4, 3, 1e-3)):
        one = load_file(chain / f"{model}-one" / f"gradients-{update}.safetensors")
        many = load_file(chain / f"{model}-{mode}-by-{n}" / "gradients-1.safetensors")
        assert one.keys() == many.keys() and any((many[name] != g).any() for name, g in one.items())
        # Sums in another order: float32 rounds each term to 6e-8 of itself. Where a gradient is all but zero,
        # two steps of Adam make more of that.
        for name, g in one.items():
            assert (many[name] - g).norm() <= tolerance * g.norm() + 1e-7, (n, name)


@pytest.mark.skipif(not has_bfloat16("cpu"), reason="this CPU has no bfloat16 arithmetic")
def test_weights_put_together_in_bfloat16_learn_the_same(chain):
    one, less = (rows(chain / name) for name in ("gpt-one", "gpt-less"))
    for a, b in zip(one[: len(less)], less, strict=True):
        for key in a.keys() & {"loss", "val_loss"}:
            assert a[key] == pytest.approx(b[key], rel=0.01) and a[key] != b[key]  # 8 bits of mantissa
    weights = load_file(chain / "gpt-less" / "model" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


def test_compiled_and_computed_again_it_is_the_same(folder):
    runs = []
    for mode in MODES:
        more = ["--parallel", mode, "--compile", "--checkpoint-activations"]
        runs.append((argv(folder, "gpt", folder / f"compiled-{mode}", *more, steps=2), None))
    process = launch(folder, 2, runs)
    assert process.end() == 0, process.said()
    for mode in MODES:
        graphs = (folder / f"compiled-{mode}" / "graphs").read_text()
        assert int(graphs) == SMALL["n_layers"]  # a block is one, without breaks
        compiled = rows(folder / f"compiled-{mode}")
        one = rows(folder / "gpt-one")[: len(compiled)]
        assert_close(one, compiled, loss=1e-5, val_loss=1e-5, grad_norm=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_added_up_over_the_processes_once_in_an_update(model, chain):
    """Three passes are timed; then come two updates of two passes each."""
    assert (chain / f"{model}-ddp-by-2" / "reduced").read_text() == "5"


def test_a_damaged_shard_of_four_is_named_and_the_checkpoint_before_is_used(chain, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(chain / "gpt-fsdp", out)
    shard = next((out / "checkpoint.previous").glob("shard-*"))
    shutil.rmtree(out / "checkpoint")
    shutil.copytree(chain / "gpt-fsdp-by-4" / "checkpoint", out / "checkpoint")
    third = out / "checkpoint" / Path(SHARD).name.replace("00001-model", "00003-model")
    raw = bytearray(third.read_bytes())
    raw[-1] ^= 1
    third.write_bytes(raw)
    assert shard.is_file()
    assert train.main(argv(chain, "gpt", out, "--resume", steps=6)) == 0
    assert third.name in capsys.readouterr().err
    a, b = (load_file(run / "model" / "model.safetensors") for run in (chain / "gpt-fsdp", out))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_nan_in_one_process_leaves_the_update_out_in_all(folder):
    out = folder / "spoilt"
    runs = [(argv(folder, "gpt", out, "--parallel", "ddp", steps=3), (1, 2, "nan"))]
    process = launch(folder, 2, runs)
    assert process.end() == 0, process.said()
    steps = [row for row in rows(out) if "loss" in row]
    assert [row["skipped"] for row in steps] == [0, 1, 1]
    weights = load_file(out / "model" / "model.safetensors")
    assert all(w.isfinite().all() for w in weights.values())


def test_the_failure_of_one_process_ends_all_and_is_shown_once(folder):
    runs = [(argv(folder, "gpt", folder / "fails", "--parallel", "ddp", steps=400), (1, 5, "raise"))]
    process = launch(folder, 2, runs)
    assert process.end() != 0
    error = process.said()
    assert error.count("RuntimeError: this process has had enough") == 1 and "Connection closed" not in error


def test_a_mistake_is_told_once(folder):
    flags = argv(folder, "gpt", folder / "x", "--parallel", "ddp", "--size", "huge", steps=4)
    process = launch(folder, 2, [(flags, None)])
    assert process.end() != 0
    assert process.said().count("error: --size huge: expected one of tiny") == 1


@pytest.mark.parametrize("mode", MODES)
def test_sigterm_in_an_evaluation_of_one_process_ends_that_of_all(mode, folder):
    out = folder / f"told-{mode}"
    flags = argv(folder, "gpt", out, "--parallel", mode, steps=6)
    process = launch(folder, 2, [(flags, (1, 2, "sigterm"))])
    assert process.end() == 0, process.said()
    assert json.loads((out / "checkpoint" / "state.json").read_text())["step"] == 2
    assert [row["step"] for row in rows(out) if "val_loss" in row] == [0]
    assert train.main(argv(folder, "gpt", out, "--resume", steps=6)) == 0
    assert_close(rows(folder / "gpt-one"), rows(out), loss=1e-5, val_loss=1e-5)


def until(process, path, text):
    deadline = time.monotonic() + 200
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None, process.said()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def test_a_killed_process_and_then_sigterm_lose_nothing(folder):
    """kill -9 of the last process ends the others; resumed, that of the first one does; resumed, the cluster
    wants its machine back; resumed again, the run ends as one that was left alone, to the bit."""

    def start(out, *more):
        more = ["--parallel", "ddp", "--save-every", "20", "--eval-every", "300", *more]
        return launch(folder, 2, [(argv(folder, "gpt", folder / out, *more, steps=300), None)])

    log = folder / "killed" / "metrics.jsonl"
    for step, victim, more in ((50, -1, []), (100, 0, ["--resume"])):
        process = start("killed", *more)
        until(process, log, f'"step": {step},')
        os.kill(workers(process)[victim], signal.SIGKILL)
        # Of the first to notice, and torchrun's own.
        assert process.end(100) != 0 and process.said().count("Traceback") <= 2

    process = start("killed", "--resume")
    until(process, log, '"step": 150,')
    process.send_signal(signal.SIGTERM)
    process.end(100)
    state = json.loads((folder / "killed" / "checkpoint" / "state.json").read_text())
    assert 150 <= state["step"] < 300 and process.said().count("saved; go on with --resume") == 1

    left_alone, resumed = start("alone"), start("killed", "--resume")
    for process in (left_alone, resumed):
        assert process.end() == 0, process.said()
    a, b = (load_file(folder / run / "model" / "model.safetensors") for run in ("alone", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = ([row.get("loss") for row in rows(folder / run)] for run in ("alone", "killed"))
    assert a == b
