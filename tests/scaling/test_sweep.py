import itertools
import json
import math
import multiprocessing
import re
import time
from argparse import ArgumentParser
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import chinchilla
from formats.quantities import short
from scaling import sweep, sweep_report, sweep_runs
from scaling.points import read_points

SMALL = sweep.Design((16, 32, 48, 64, 80, 96), 1, 16, 32, 2, 5, 0.0043)


class Inline:
    """A pool that computes at once, in this process."""

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future

    def map(self, function, *rows):
        return map(function, *rows)


@pytest.fixture
def inline(monkeypatch):
    @contextmanager
    def workers(n):
        done = SimpleNamespace(value=0.0, get_lock=nullcontext)
        monkeypatch.setattr(sweep_runs, "flops_done", done)
        yield Inline(), done

    monkeypatch.setattr(sweep_runs, "workers", workers)
    monkeypatch.setitem(sweep.DESIGNS, "cpu", SMALL)
    monkeypatch.setattr(sweep_report, "RESAMPLES", 100)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    words = np.random.default_rng(0).choice(["the ", "cat ", "sees ", "all ", "a ", "mat.\n"], 4000)
    path.write_text("".join(words))
    return path


def arguments(text, tmp_path, *more):
    parser = ArgumentParser()
    sweep.add_arguments(parser)
    given = ["--data", text, "--cache", tmp_path / "cache", "--out", tmp_path / "out", "--device", "cpu"]
    return parser.parse_args([str(word) for word in (*given, *more)])


def test_points_are_sqrt_2_apart_and_their_windows_do_not_overlap():
    points = sweep.points_of(5000, 100)
    assert points[-1] == 5000 and points[0] >= 100 > points[0] / math.sqrt(2) - 1
    for before, after in itertools.pairwise(points):
        assert after / before == pytest.approx(math.sqrt(2), rel=0.01)
        assert (1 - sweep_runs.WINDOW) * after > before
    assert sweep.points_of(99, 100) == [] and sweep.points_of(2000, 1000) == [1000, 1414, 2000]


@pytest.mark.usefixtures("rendered")
def test_a_sweep_ends_with_a_prediction_that_was_written_before_it_was_tested(
    inline, text, tmp_path, monkeypatch, capsys
):
    make_runs, predicted = sweep.make_runs, []

    def watched(runs, *rest):
        if len(runs) == 1:
            predicted.append(json.loads((tmp_path / "out" / "sweep.json").read_text())["prediction"])
        make_runs(runs, *rest)

    monkeypatch.setattr(sweep, "make_runs", watched)
    assert sweep.main(arguments(text, tmp_path, "--budget", "4e8")) == 0
    state = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert "measured" not in predicted[0] and predicted[0]["loss"] == state["prediction"]["loss"]

    runs = state["runs"]
    assert [run["width"] for run in runs] == list(SMALL.widths)
    tokens = SMALL.batch_size * SMALL.seq_len
    costs = [run["points"][-1] * tokens * run["flops_per_token"] for run in runs]
    assert max(costs[:-1]) <= 1.1 * 4e8  # numbers of updates are rounded
    assert costs[-1] == pytest.approx(sweep.BEYOND * 4e8, rel=0.05)
    N, D, L = read_points(tmp_path / "out" / "points.csv")
    assert len(N) == sum(len(run["points"]) for run in runs[:-1])
    assert N[0] * 6 == pytest.approx(runs[0]["flops_per_token"])
    law, prediction = chinchilla.fit(N, D, L).law, state["prediction"]
    assert law.loss(prediction["N"], prediction["D"]) == pytest.approx(prediction["loss"], rel=1e-3)
    last = json.loads((tmp_path / "out" / "width96" / "metrics.jsonl").read_text().splitlines()[-1])
    error = prediction["loss"] / last["val_loss"] - 1
    printed = capsys.readouterr().out
    assert prediction["error"] == pytest.approx(error) and f"{error:+.2%}" in printed
    # The table has both counts of a size; the pictures name the second.
    for run in runs:
        N = short(run["flops_per_token"] / 6)
        (row,) = (line.split() for line in printed.splitlines() if line.split()[:1] == [str(run["width"])])
        assert row[1] == f"{run['n_params']:,}" and row[3] == N
        assert sweep_report.label_of(run["width"], run["flops_per_token"] / 6) == f"{run['width']}, N {N}"
    # Every other exponent is a number from 0 to 1, or a reason.
    ways = state["law"]["other a"] | state["law"]["no other a"]
    assert len(ways) == 4 and all(0 < a < 1 for a in state["law"]["other a"].values())
    for name, reason in state["law"]["no other a"].items():
        assert f"{name}: none: {reason}" in printed
    for picture in ("sweep.png", "emergence.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 10_000

    # The same command once more trains nothing, and changes nothing.
    monkeypatch.setattr(sweep_runs, "update_run", None)
    assert sweep.main(arguments(text, tmp_path, "--budget", "4e8")) == 0
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == state
    assert "going on with: python " in capsys.readouterr().out
    with pytest.raises(ValueError, match="the sweep in it has seed 0, not 1"):
        sweep.main(arguments(text, tmp_path, "--budget", "4e8", "--seed", "1"))

    metrics = tmp_path / "out" / "width16" / "metrics.jsonl"
    whole, loss = metrics.read_text(), re.compile(r'"val_loss": [\d.]+')
    monkeypatch.setattr(sweep, "make_runs", lambda *_: None)
    without_loss = loss.sub('"other": 1', whole, count=1)
    not_finite = [loss.sub(f'"val_loss": {value}', whole, count=1) for value in ("NaN", "Infinity", "null")]
    for damaged, found in [(whole[:-5], ""), *((rest, "val_loss") for rest in (without_loss, *not_finite))]:
        metrics.write_text(damaged)
        with pytest.raises(ValueError, match=rf"width16/metrics.jsonl is damaged .*{found}.* remove"):
            sweep.main(arguments(text, tmp_path))
    (tmp_path / "out" / "sweep.json").write_text("[]")
    with pytest.raises(ValueError, match=r"sweep.json is damaged"):
        sweep.main(arguments(text, tmp_path))


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(inline, text, tmp_path, monkeypatch):
    flags = sweep.train_flags(SMALL, 16, arguments(text, tmp_path))
    points = [6, 9, 13]
    found = []
    for name in ("whole", "stopped"):
        flags[flags.index("--out") + 1] = str(tmp_path / name)
        with sweep_runs.workers(1):
            if name == "stopped":
                update, calls = sweep_runs.update_run, []

                def dies(run, update=update, calls=calls):
                    calls.append(1)
                    if len(calls) == 11:
                        raise KeyboardInterrupt
                    return update(run)

                monkeypatch.setattr(sweep_runs, "update_run", dies)
                with pytest.raises(KeyboardInterrupt):
                    sweep_runs.train_one(flags, points)
                assert len(calls) == 11
            sweep_runs.train_one(flags, points)
        found.append((tmp_path / name / "metrics.jsonl").read_text())
    assert found[0] == found[1] and len(found[0].splitlines()) == 3
    assert len(calls) == 11 + 13 - 9  # it resumed at the second point


def test_what_is_evaluated_is_the_mean_of_the_last_weights(inline, text, tmp_path, monkeypatch):
    flags = sweep.train_flags(SMALL, 16, arguments(text, tmp_path))
    update, weights, seen = sweep_runs.update_run, [], []

    def recording(run):
        result = update(run)
        weights.append([p.detach().double() for p in run.model.parameters()])
        return result

    monkeypatch.setattr(sweep_runs, "update_run", recording)
    monkeypatch.setattr(
        sweep_runs, "evaluate", lambda run, model, rows: seen.append(model) or {"val_loss": 1.0}
    )
    with sweep_runs.workers(1):
        sweep_runs.train_one(flags, [10])
    for p, *history in zip(seen[0].parameters(), *weights[8:], strict=True):
        assert torch.allclose(p.double(), torch.stack(history).mean(dim=0), atol=1e-7)


def test_loss_and_exact_matches_are_those_of_the_definition(inline, text, tmp_path):
    flags = sweep.train_flags(SMALL, 16, arguments(text, tmp_path))
    run = sweep_runs.build_run(flags, 1)
    rows = sweep_runs.held_out_rows(run)
    with torch.no_grad():
        logits = run.model(rows[:, :-1]).double()
    found = sweep_runs.evaluate(run, run.model, rows)
    log_p = logits.log_softmax(dim=-1).gather(2, rows[:, 1:, None])
    assert found["val_loss"] == pytest.approx(-log_p.mean().item(), rel=1e-5)
    right, repeats = logits.argmax(dim=-1) == rows[:, 1:], rows[:, 1:] == rows[:, :-1]
    assert found["accuracy"] == pytest.approx(right.double().mean().item())
    for k in (1, 2, 4):
        spans = [
            right[n, i : i + k].all()
            for n in range(len(rows))
            for i in range(32 - k + 1)
            if not repeats[n, i : i + k].any()
        ]
        assert found[f"exact_{k}"] == pytest.approx(sum(spans) / len(spans))


def test_time_is_shared_out_by_the_speeds_that_were_measured():
    speeds = [
        {"seconds": 0.01 * w / 16, "evaluation": 0.1, "flops_per_token": 400 * w * w} for w in SMALL.widths
    ]
    runs = sweep.plan_runs(SMALL, speeds, 10**6, 1e10)
    tokens = SMALL.batch_size * SMALL.seq_len
    for run in runs[:-1]:
        cost = run["points"][-1] * tokens * run["flops_per_token"]
        assert cost <= 1.005e10 and (cost > 0.995e10 or run["points"][-1] == 10**6 // tokens)
    assert runs[-1]["points"][-1] * tokens * runs[-1]["flops_per_token"] == pytest.approx(3e10, rel=0.01)
    assert sweep.minutes(runs, 1) > 1.5 * sweep.minutes(runs, 2)
    # Computed by hand: two workers get 5 + 2 and 4 + 3.
    assert sweep.makespan([2, 5, 3, 4], 2) == 7
    # With less compute a narrower model is predicted, from those that can be trained long enough.
    assert [run["width"] for run in sweep.plan_runs(SMALL, speeds, 10**6, 3e8)] == [16, 32, 48]
    assert sweep.plan_runs(SMALL, speeds, 10**6, 1e6) == []


@pytest.mark.parametrize("device", sweep.DESIGNS)
def test_the_standard_library_is_text_enough_for_a_law(device):
    design = sweep.DESIGNS[device]
    speeds = [{"flops_per_token": 50 * design.n_layers * width**2} for width in design.widths]
    runs = sweep.plan_runs(design, speeds, 9_000_000, 1e16)
    assert [run["width"] for run in runs] == list(design.widths)
    for width in design.widths:
        heads = width // design.d_head
        assert width % heads == 0 and width // heads % 2 == 0  # rotary positions need an even head width


def test_too_little_time_or_compute_is_an_error(inline, text, tmp_path, monkeypatch):
    # Minutes that no machine can do with are refused before anything is read or written.
    with pytest.raises(
        ValueError, match=r"--minutes 0\.5: expected at least 1, and about 4 on two CPU cores"
    ):
        sweep.main(arguments(text, tmp_path, "--minutes", "0.5"))
    assert not (tmp_path / "cache").exists()
    # What this machine needs is measured, in another directory.
    monkeypatch.setattr(sweep, "LEAST_MINUTES", 0)
    for flag, value, message in (("--budget", "1e6", "give more"), ("--minutes", "0.00001", "at least 1")):
        with pytest.raises(ValueError, match=f"{flag} .*{message}"):
            sweep.main(arguments(text, tmp_path, flag, value))
    assert not (tmp_path / "out").exists()
    for flag, value in (("--workers", "0"), ("--minutes", "nan"), ("--lr-factor", "0"), ("--seed", "-1")):
        with pytest.raises(ValueError, match=f"{flag} {value}"):
            sweep.main(arguments(text, tmp_path, flag, value))
    text.write_text(text.read_text()[:600])
    with pytest.raises(ValueError, match=r"tokens to train on, expected at least 640; give more text"):
        sweep.main(arguments(text, tmp_path))


@pytest.mark.parametrize(("failure", "code"), [(KeyboardInterrupt, 130), (BrokenProcessPool, 2)])
def test_an_interrupt_or_a_killed_run_ends_in_words(failure, code, text, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise failure

    monkeypatch.setattr(sweep, "begin_or_resume", fails)
    assert chinchilla.main(["sweep", "--out", str(tmp_path)]) == code
    assert "the same command goes on" in capsys.readouterr().err


def test_the_measure_makes_the_cliff(tmp_path, monkeypatch):
    """Where the share p of correct tokens grows slowly, the share of k in a row, p^k, rises steeply."""
    drawn = []
    monkeypatch.setattr(sweep_report, "save_figure", lambda figure, path: drawn.append(figure))
    p = np.linspace(0.5, 0.7, 9)
    rows = [{"C": 10.0**i, "loss": 3 - 0.1 * i} for i in range(9)]
    for row, share in zip(rows, p, strict=True):
        row |= {f"exact_{k}": share**k for k in sweep_report.SPANS}
    # This one is left out: another model beats it with less compute.
    rows.append(rows[-1] | {"C": 1e9, "loss": 2.9, "exact_8": 0.0})
    sweep_report.plot_emergence(rows, tmp_path / "x.png")
    smooth, sharp = drawn[0].axes
    assert smooth.lines[0].get_ydata() == pytest.approx(p)
    for i, k in enumerate(sweep_report.SPANS[1:]):
        for line in sharp.lines[2 * i : 2 * i + 2]:  # measured, and p^k
            assert line.get_ydata() == pytest.approx((p / p[-1]) ** k)


def test_a_worker_whose_parent_is_dead_stops(inline, text, tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(is_alive=lambda: False))

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(sweep_runs.os, "_exit", leave)
    with sweep_runs.workers(1), pytest.raises(SystemExit):
        sweep_runs.train_one(sweep.train_flags(SMALL, 16, arguments(text, tmp_path)), [10])


def test_a_loss_that_is_not_finite_ends_the_run_before_its_row_is_written(
    inline, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(sweep_runs, "predict", lambda run, model, tokens: model(tokens).float() * math.nan)
    flags = sweep.train_flags(SMALL, 16, arguments(text, tmp_path))
    with sweep_runs.workers(1), pytest.raises(ValueError, match="loss nan at step 2; lower --lr-factor"):
        sweep_runs.train_one(flags, [2])
    out = Path(flags[flags.index("--out") + 1])
    assert "val_loss" not in (out / "metrics.jsonl").read_text() and not (out / "checkpoint").exists()


def test_no_process_is_left_behind_by_an_error():
    with pytest.raises(ZeroDivisionError), sweep_runs.workers(1) as (pool, _):
        assert pool.submit(math.sqrt, 4.0).result() == 2.0
        pool.submit(time.sleep, 60)
        raise ZeroDivisionError
    deadline = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)  # wait until the pool's own thread has seen that the processes ended
    assert not multiprocessing.active_children()


def test_gradients_that_stay_non_finite_end_the_run(inline, text, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    with (
        sweep_runs.workers(1),
        pytest.raises(ValueError, match="no finite gradient at step 5; lower --lr-factor"),
    ):
        sweep_runs.train_one(sweep.train_flags(SMALL, 16, arguments(text, tmp_path)), [10])
