"""Several processes compute what one does, save what any number of them can resume, and end together."""

import argparse
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import small_t5
import torch
import torch.distributed as dist
from conftest import SHARD
from ranks import SMALL, fork, forked_torchrun, make_small, torchrun, watched
from safetensors.torch import load_file

import gpt
import train
from data.tokenizer import get_tokenizer
from engine import parallel
from engine.contract import find
from engine.device import has_bfloat16

MODELS, MODES = ("gpt", "bert", "moe", "lora"), ("ddp", "fsdp")
NAMES = [(model, mode) for model in MODELS for mode in MODES]
LONG = 160  # updates of the run whose processes are killed


def argv(folder, model, out, *more, steps):
    """Return the flags of a run of a model on the data in a folder."""
    data = "questions.jsonl" if model == "lora" else "text.txt"
    flags = f"--model {model} --data {folder / data} --batch-size 8 --grad-accum 2 --lr 0.002 "
    flags += f"--steps {steps} --schedule constant --warmup 0 --eval-every 2 --log-every 1 "
    flags += (
        f"--seq-len 64 --base {folder / 'base'} " if model == "lora" else "--seq-len 16 --tokenizer bytes "
    )
    return [*flags.split(), "--cache", str(folder / "cache"), "--out", str(out), *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a folder with texts, a base to adapt, and for each model a run of six updates in one process."""
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


def end_of(processes):
    """Wait for forked ranks, check that all succeeded, and return what they wrote on stderr."""
    codes, said = [process.end() for process in processes], "".join(process.said() for process in processes)
    assert not any(codes), said
    return said


@pytest.fixture(scope="module")
def pair(folder):
    """Make the runs of two ranks, all in one process group, and return what is on stderr: two updates of each
    model with ddp and fsdp, which `chain` goes on with, and the runs of the tests below."""

    def run(out, *more, model="gpt", steps=2, spoilt=None, expected=0):
        runs.append((argv(folder, model, folder / out, "--parallel", *more, steps=steps), spoilt, expected))

    runs = []
    for model, mode in NAMES:
        run(f"{model}-{mode}", mode, model=model)
    if has_bfloat16("cpu"):
        run("gpt-less", "fsdp", "--dtype", "bfloat16", "--checkpoint-activations")
    for mode in MODES:
        run(f"compiled-{mode}", mode, "--compile", "--checkpoint-activations")
        run(f"told-{mode}", mode, steps=6, spoilt=(1, 2, "sigterm"))
        run(f"averaged-{mode}", mode, "--ema", "0.9", steps=4)
        run(f"sam-{mode}", mode, "--optimizer", "sam", "--grad-accum", "2", steps=4)
    run("spoilt", "ddp", steps=3, spoilt=(1, 2, "nan"))
    run("alone", "ddp", "--eval-every", str(LONG), "--save-every", "20", steps=LONG)
    run("mistaken", "ddp", "--size", "huge", expected=2)
    return end_of(fork(2, runs))


@pytest.fixture(scope="module")
def chain(folder, pair):
    """Each model, ddp and fsdp: two updates by two processes, two more by four, and the last two by one."""
    runs = []
    for model, mode in NAMES:
        shutil.copytree(folder / f"{model}-{mode}", folder / f"{model}-{mode}-by-2")
        flags = argv(folder, model, folder / f"{model}-{mode}", "--parallel", mode, "--resume", steps=4)
        runs.append((flags, None, 0))
    end_of(fork(4, runs))
    for model, mode in NAMES:
        shutil.copytree(folder / f"{model}-{mode}", folder / f"{model}-{mode}-by-4")
        assert train.main(argv(folder, model, folder / f"{model}-{mode}", "--resume", steps=6)) == 0
    return folder


def rows(out):
    """Return the rows of a run's metrics."""
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


def assert_close(one, many, **tolerances):
    """Compare the rows of two runs: each key that a row has, within its relative tolerance."""
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
@pytest.mark.usefixtures("pair")
def test_weights_gathered_in_bfloat16_learn_the_same(folder):
    one, less = (rows(folder / name) for name in ("gpt-one", "gpt-less"))
    for a, b in zip(one[: len(less)], less, strict=True):
        for key in a.keys() & {"loss", "val_loss"}:
            assert a[key] == pytest.approx(b[key], rel=0.01) and a[key] != b[key]  # 8 bits of mantissa
    weights = load_file(folder / "gpt-less" / "model" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


@pytest.mark.usefixtures("pair")
def test_compiled_and_computed_again_it_is_the_same(folder):
    for mode in MODES:
        graphs = (folder / f"compiled-{mode}" / "graphs").read_text()
        assert int(graphs) == SMALL["n_layers"]  # a block is one, without breaks
        compiled = rows(folder / f"compiled-{mode}")
        one = rows(folder / "gpt-one")[: len(compiled)]
        assert_close(one, compiled, loss=1e-5, val_loss=1e-5, grad_norm=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_reduced_once_in_an_update(model, chain):
    """Three passes are timed; then come two updates of two passes each."""
    assert (chain / f"{model}-ddp-by-2" / "reduced").read_text() == "5"


@pytest.mark.usefixtures("pair")
def test_the_averages_of_two_processes_are_those_of_one(folder):
    assert train.main(argv(folder, "gpt", folder / "averaged-one", "--ema", "0.9", steps=4)) == 0
    one, plain = rows(folder / "averaged-one"), rows(folder / "gpt-one")
    assert one[-1]["val_loss"] != plain[one.index(one[-1])]["val_loss"]
    weights = load_file(folder / "averaged-one" / "model" / "model.safetensors")
    for mode in MODES:
        assert_close(one, rows(folder / f"averaged-{mode}"), loss=1e-5, val_loss=1e-5, grad_norm=1e-4)
        many = load_file(folder / f"averaged-{mode}" / "model" / "model.safetensors")
        for name, w in weights.items():
            torch.testing.assert_close(many[name], w, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("pair")
def test_sam_of_two_processes_is_that_of_one(folder):
    more = ("--optimizer", "sam", "--grad-accum", "2")
    assert train.main(argv(folder, "gpt", folder / "sam-one", *more, steps=4)) == 0
    one = rows(folder / "sam-one")
    weights = load_file(folder / "sam-one" / "model" / "model.safetensors")
    for mode in MODES:
        assert_close(one, rows(folder / f"sam-{mode}"), loss=1e-5, val_loss=1e-5, grad_norm=1e-4)
        many = load_file(folder / f"sam-{mode}" / "model" / "model.safetensors")
        for name, w in weights.items():
            torch.testing.assert_close(many[name], w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["t5", "unet", "dit"])
def test_blocks_with_lists_in_them_are_sharded_as_a_whole(name):
    """A world of one rank, in which sharding changes nothing but the hooks that gather weights."""
    torch.manual_seed(0)
    if name == "t5":
        model, batch = small_t5.small(), {"tokens": torch.arange(12)[None], "targets": torch.arange(5)[None]}
    else:
        config = replace(find(name).SIZES["tiny"], n_classes=0)
        model, size = find(name).Model(config), config.image_size
        batch = {"x": torch.randn(1, config.n_channels, size, size), "t": torch.tensor([3])}
    objective = parallel.Objective(model, lambda model, batch: (model(**batch).square().mean(), {}))
    objective(batch)[0].backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel.shard(objective, argparse.Namespace(device="cpu", dtype="float32"))
        objective(batch)[0].backward()
        found = {n: parallel.unshard(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    finally:
        dist.destroy_process_group()
    assert found.keys() == expected.keys()
    for n, gradient in expected.items():
        torch.testing.assert_close(found[n], gradient, msg=n)


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


@pytest.mark.usefixtures("pair")
def test_a_nan_in_one_process_leaves_the_update_out_in_all(folder):
    out = folder / "spoilt"
    steps = [row for row in rows(out) if "loss" in row]
    assert [row["skipped"] for row in steps] == [0, 1, 1]
    weights = load_file(out / "model" / "model.safetensors")
    assert all(w.isfinite().all() for w in weights.values())


def test_the_failure_of_one_process_ends_all_and_is_shown_once(folder):
    flags = argv(folder, "gpt", folder / "fails", "--parallel", "ddp", steps=400)
    process = torchrun(flags, (1, 5, "raise"))
    assert process.end() != 0
    error = process.said()
    assert error.count("RuntimeError: this process has had enough") == 1 and "Connection closed" not in error


def test_a_mistake_is_printed_once_and_ends_every_rank_with_code_2(pair):
    assert pair.count("error: --size huge: expected one of tiny") == 1


@pytest.mark.usefixtures("pair")
@pytest.mark.parametrize("mode", MODES)
def test_sigterm_in_an_evaluation_of_one_process_ends_that_of_all(mode, folder):
    out = folder / f"told-{mode}"
    assert json.loads((out / "checkpoint" / "state.json").read_text())["step"] == 2
    assert [row["step"] for row in rows(out) if "val_loss" in row] == [0]
    assert train.main(argv(folder, "gpt", out, "--resume", steps=6)) == 0
    assert_close(rows(folder / "gpt-one"), rows(out), loss=1e-5, val_loss=1e-5)


def until(process, path, text):
    """Wait until a process has written a text to a file."""
    deadline = time.monotonic() + 400
    while not (path.exists() and text in path.read_text()):
        assert process.is_alive(), process.said()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers(pid):
    """Return the ids of the ranks of the torchrun with this id."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.usefixtures("pair")
def test_a_killed_process_and_then_sigterm_lose_nothing(folder):
    """kill -9 of the last rank ends the others; resumed, that of rank 0 does; resumed, torchrun gets SIGTERM;
    resumed again, the run ends as one that was left alone, to the bit."""

    def start(*more):
        more = ["--parallel", "ddp", "--save-every", "20", "--eval-every", str(LONG), *more]
        return forked_torchrun(argv(folder, "gpt", folder / "killed", *more, steps=LONG))

    log = folder / "killed" / "metrics.jsonl"
    for step, victim, more in ((30, -1, []), (50, 0, ["--resume"])):
        process = start(*more)
        until(process, log, f'"step": {step},')
        os.kill(workers(process.process.pid)[victim], signal.SIGKILL)
        # Of the first to notice, and torchrun's own. Its log has them a second time, behind the date. An
        # exception in the course of another has a second traceback for the same failure.
        code, said = process.end(), process.said()
        chained = said.count("\nDuring handling of the above") + said.count("\nThe above exception was")
        assert code != 0 and said.count("\nTraceback") - chained <= 2, said

    process = start("--resume")
    until(process, log, '"step": 70,')
    process.send_signal(signal.SIGTERM)
    process.end()
    state = json.loads((folder / "killed" / "checkpoint" / "state.json").read_text())
    assert 70 <= state["step"] < LONG and process.said().count("saved; go on with --resume") == 1

    process = start("--resume")
    assert process.end() == 0, process.said()
    a, b = (load_file(folder / run / "model" / "model.safetensors") for run in ("alone", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = ([row.get("loss") for row in rows(folder / run)] for run in ("alone", "killed"))
    assert a == b
