"""The command that measures everything on a GPU: one failure costs one row, time is kept, nothing is lost.

Without a GPU the whole command runs as a rehearsal, and steps that fail, die and hang take the place of the
real ones.
"""

import json
import os
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from forks import Forked

from results.gpu import __main__ as command
from results.gpu import measure, rows, table
from results.gpu.steps import FULL, TOY, Measurement, steps

NO_GPU = not torch.cuda.is_available()
# A program in the place of `python -m results.gpu.measure`, with steps of its own.
UNRULY = """
import os, time
from results.gpu import measure, rows, steps
def fails():
    raise ArithmeticError("one is not two")
def hangs():
    time.sleep(60)
def dies():
    print("last words", flush=True)
    os._exit(3)
item = lambda name, call: steps.Measurement(name, 0.1, call)
steps.steps = lambda sizes, work: {"unruly": [item("good", lambda: {"x": 1.0}), item("fails", fails),
    item("dies", dies), item("hangs", hangs), item("last", lambda: {"x": 2.0})]}
measure.limit = lambda seconds: 1
measure.main()
"""


def row(step, name, **figures):
    return {"step": step, "name": name, "device": rows.device(), "time": rows.now(), "failed": None} | figures


def session(tmp_path, *flags):
    args = command.parse([*flags, "--rehearse", "--minutes", "5", "--out", str(tmp_path)])
    return command.Session(args, tmp_path)


# --- the whole command


class Step:
    """A step in a forked process, with those parts of subprocess.Popen that the command uses."""

    def __init__(self, log, argv):
        self.forked = Forked(measure_into, log, argv)
        self.process, self.pid = self.forked.process, self.forked.process.pid

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.is_alive():
            raise subprocess.TimeoutExpired("a step", timeout)
        return self.process.exitcode


def measure_into(log, argv):
    """Run results/gpu/measure.py as a process of its own in a rehearsal. All output goes to a file."""
    os.setsid()
    torch._dynamo.config.disable = True  # by TORCHDYNAMO_DISABLE, which is read before a fork
    for output in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), output)
    measure.main(argv)


@pytest.fixture
def forked_steps(monkeypatch):
    """Fork all steps but the first one, which shows that a new Python process can run a step."""
    start = command.Session.start

    def fork_or_start(session, *words, **environment):
        module, *argv = words
        if module != "results.gpu.measure" or argv[0] == "limits":
            return start(session, *words, **environment)
        return Step(session.log.name, [*argv, *session.flags])

    monkeypatch.setattr(command.Session, "start", fork_or_start)


@pytest.mark.skipif(not NO_GPU, reason="stands in for a GPU")
def test_the_rehearsal_runs_every_step(forked_steps, tmp_path, capsys):
    assert command.main(["--rehearse", "--minutes", "20", "--out", str(tmp_path)]) == 0, (
        tmp_path / "log.txt"
    ).read_text()[-5000:]
    measured = rows.read(tmp_path)
    plan = steps(TOY, tmp_path)
    assert [(r["step"], r["name"]) for r in measured] == [(s, item.name) for s in plan for item in plan[s]]
    for r in measured:
        assert r["failed"] is None and r["torch"] == torch.__version__ and r["device"] and r["commit"]
        assert r["seconds"] >= 0 and "python" in r["command"]
    by_name = {(r["step"], r["name"]): r for r in measured}
    training = by_name["training", "gpt, --kernels auto"]
    assert training["tokens_per_second"] > 0 and 0 <= training["idle"] < 1 and training["kernels"]
    for model in ("vit", "mae", "simclr", "clip"):
        of_images = by_name["more training", f"{model}, images"]
        assert of_images["unit"] == "images" and of_images["tokens_per_second"] > 0 and of_images["kernels"]
    assert by_name["learning", "muon"]["tokens"] == 2 * 2 * 16
    assert {r["side"] for r in by_name["decoding", "batch 2"]["results"]} == {
        "transformers", "plinth", "plinth, CUDA graphs"
    }  # fmt: skip
    assert by_name["decoding", "batch 2"]["same_tokens"]["plinth, CUDA graphs"] == 1  # in float32
    assert json.loads((tmp_path / "tuned.json").read_text())["interpreter"]["attention_forward"]["16"]
    said = capsys.readouterr().out
    assert "failed: nothing" in said and "left: nothing" in said and "at least  reached" in said
    assert "compiled ahead" in (tmp_path / "log.txt").read_text()


def test_the_plan_needs_no_gpu(capsys):
    assert command.main(["--plan"]) == 0
    said = capsys.readouterr().out
    plan = steps(FULL, Path())
    assert all(f"python -m results.gpu {step}\n" in said for step in plan)
    assert all(item.name in said for items in plan.values() for item in items)
    first = ["limits", "kernels", "training", "attention", "operations", "tests", "tuning"]
    assert list(plan)[:7] == first
    assert command.main(["tests", "--plan"]) == 0
    assert "python -m results.gpu limits" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--minutes", "7", "--out", "folder"], "there is no GPU"),
        (["everything", "--plan"], "step everything: expected one of limits, kernels"),
        (["--table", "missing"], "--table missing"),
    ],
)
def test_mistakes_are_one_line(argv, named, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(argv) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and named in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize(
    ("argv", "named"),
    [([], "--minutes None"), (["--minutes", "0.5"], "--minutes 0.5"), (["--minutes", "7"], "--out")],
)
def test_on_a_gpu_time_and_folder_are_needed(argv, named, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command.main(argv) == 2
    assert named in capsys.readouterr().err


# --- failures


def test_what_fails_dies_or_hangs_costs_only_its_own_row(tmp_path, monkeypatch):
    run = session(tmp_path)
    start = run.start
    program = tmp_path / "unruly.py"
    program.write_text(UNRULY)
    monkeypatch.setattr(run, "start", partial(instead, start, program))
    items = [Measurement(name, 0.1, dict) for name in ("good", "fails", "dies", "hangs", "last")]
    command.run_step(run, "unruly", items)

    measured = {r["name"]: r for r in rows.read(tmp_path)}
    assert list(measured) == ["good", "fails", "dies", "hangs", "last"]
    assert measured["good"]["x"] == 1 and measured["last"]["x"] == 2
    assert measured["good"]["failed"] is None is measured["last"]["failed"]
    assert measured["fails"]["failed"].endswith("ArithmeticError: one is not two")
    assert (
        measured["dies"]["failed"].startswith("the process ended with 3")
        and "last words" in measured["dies"]["failed"]
    )
    assert "hangs" in measured["hangs"]["failed"] or "Timeout" in measured["hangs"]["failed"]

    # A later call measures the failed ones again, and only these.
    run.began = "9999"
    assert [item.name for item in run.remaining("unruly", items)] == ["fails", "dies", "hangs"]


def instead(start, program, module, *flags):
    """Start the program with the flags of a module, by a `-m` of its own name."""
    return start(program.stem, *flags, PYTHONPATH=f"{program.parent}:{rows.ROOT}")


def test_a_process_that_cannot_begin_is_one_failed_row(tmp_path, monkeypatch):
    run = session(tmp_path)
    monkeypatch.setattr(run, "start", lambda module, *flags: command.Session.start(run, "no_such_module"))
    command.run_step(run, "limits", [Measurement("product", 0.1, dict)])
    (only,) = rows.read(tmp_path)
    assert only["name"] == "product" and "No module named no_such_module" in only["failed"]


# --- time and order


def test_nothing_begins_that_cannot_end(tmp_path, monkeypatch):
    run = session(tmp_path)
    monkeypatch.setattr(run, "start", lambda *_: pytest.fail("was started"))
    run.until = time.time() + command.STARTUP + 20
    long, short = Measurement("long", 30, dict), Measurement("short", 5, dict)
    assert run.fits([long, short]) and not run.fits([long])
    command.run_step(run, "attention", [long])
    assert rows.read(tmp_path) == []

    # Within a process a long measurement is left out, and a short one after it is made.
    monkeypatch.setattr("results.gpu.steps.steps", lambda sizes, work: {"attention": [long, short]})
    monkeypatch.setattr(measure, "rehearse_on_cpu", lambda: None)
    flags = ["--out", str(tmp_path), "--work", str(tmp_path), "--began", rows.now(), "--toy"]
    measure.main(["attention", *flags, "--until", str(time.time() + 20)])
    assert [r["name"] for r in rows.read(tmp_path)] == ["short"]


def test_rows_of_before_are_kept_and_failed_ones_come_last(tmp_path):
    items = [Measurement(name, 1, dict) for name in ("failed", "done", "new", "elsewhere")]
    old = {"time": "2026-01-01T00:00:00+00:00"}
    rows.add(tmp_path, row("s", "failed", **old) | {"failed": "boom"})
    rows.add(tmp_path, row("s", "done", **old))
    rows.add(tmp_path, row("s", "elsewhere", **old) | {"device": "another GPU"})
    names = lambda **options: [m.name for m in rows.remaining(items, "s", tmp_path, **options)]  # noqa: E731
    assert names(began="2026-02", again=False) == ["new", "elsewhere", "failed"]
    assert names(began="2026-02", again=True) == ["new", "elsewhere", "failed", "done"]
    assert names(began="2025-12", again=True) == ["new", "elsewhere"]  # the others were tried in this call
    rows.add(tmp_path, row("s", "done", x=2))
    assert len(rows.read(tmp_path)) == 3 and {r.get("x") for r in rows.read(tmp_path)} == {None, 2}


def test_wrong_results_are_no_measurement():
    assert measure.check_errors({"error": 4e-3, "grad_error": None})
    for error in (0.5, float("nan")):
        with pytest.raises(ArithmeticError, match="wrong results"):
            measure.check_errors({"error": error, "grad_error": 1e-3})


# --- tables


def test_the_simplest_within_three_percent_is_kept():
    def timed(key, **times):
        return [row("tuning", f"{key} {name}", operation="attention_forward", key=key, config=name, ms=ms)
                for name, ms in times.items()]  # fmt: skip

    measured = timed("64", plain=1.02, tma=1.0, persistent=0.995) + timed("128", plain=2.0, tma=1.5)
    measured.append(row("tuning", "128 broken") | {"failed": "boom"})
    assert table.winners(measured) == {"attention_forward": {"64": "plain", "128": "tma"}}


def test_tables_of_other_devices_are_apart_and_printing_them_writes_nothing(tmp_path, capsys):
    tuned = {"operation": "attention_forward", "key": "64", "unit": "TFLOP/s", "rate": 1.0}
    rows.add(tmp_path, row("tuning", "64: plain", config="plain", ms=2.0, **tuned))
    for name, ms in (("plain", 1.0), ("tma", 0.5)):
        rows.add(tmp_path, row("tuning", f"64: {name}", config=name, ms=ms, **tuned) | {"device": "a GPU"})
    assert command.main(["--table", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.split("\na GPU\n")
    assert rows.device() in first and "2.000 ms" in first and "0.500 ms" in second and "2.000" not in second
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]

    # The configurations to keep are chosen by the times of this device alone.
    assert table.winners(rows.of_device(tmp_path)) == {"attention_forward": {"64": "plain"}}


def test_the_configurations_of_another_device_stay_in_the_folder(tmp_path, monkeypatch):
    """As where a rehearsal writes into the folder of a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path, of_gpu = tmp_path / "tuned.json", {"sm_90": {"attention_forward": {"64": "128x64"}}}
    path.write_text(json.dumps(of_gpu))
    timed = {"operation": "attention_forward", "key": "16", "config": "128x128", "ms": 1.0}
    command.write_tuned(tmp_path, [row("tuning", "16: 128x128", **timed)])
    own = {"interpreter": {"attention_forward": {"16": "128x128"}}}
    assert json.loads(path.read_text()) == of_gpu | own


def test_the_aims_stand_beside_what_was_reached():
    def attention(which, plinth, flash, cudnn):
        times = {"plinth": plinth, "SDPA flash": flash, "SDPA cuDNN": cudnn}
        return [{"backend": name, "pass": which, "ms": ms} for name, ms in times.items()]

    measured = [
        row(
            "attention",
            table.LONGEST,
            results=attention("forward", 1, 1.4, 0.8) + attention("both", 1, 1.0, None),
        ),
        row(
            "operations",
            "RMSNorm, D 768",
            results=[{"backend": "plinth", "pass": "forward", "of_limit": 0.91}],
        ),
        row("training", "gpt, --kernels auto", tokens_per_second=600e3, mfu=0.52),
        row("training", "gpt, --kernels torch", tokens_per_second=500e3, mfu=0.43),
    ]
    reached = [line[75:88].split() for line in table.aims(measured).splitlines()[1:]]
    met, missed = "yes", "no"
    assert reached == [["1.40", met], ["0.80", missed], ["1.00", missed], ["0.91", met], [], ["0.52", met],
                       ["1.20", met]]  # fmt: skip
    assert all(not line[75:88].strip() for line in table.aims([]).splitlines()[1:])
    assert "FA2 335, cuDNN 539, FA3 616" in table.aims([])
    assert table.LONGEST in [item.name for item in steps(FULL, Path())["attention"]]


def test_metrics_of_a_profiler_are_read_from_its_csv():
    text = '==PROF== Connected\n"ID","Section Name","Metric Name","Metric Unit","Metric Value"\n'
    text += '"0","Speed Of Light","Duration","us","812.5"\n"0","Occupancy","","",""\n==PROF== Disconnected\n'
    assert measure.metrics_of(text) == {"Duration (us)": "812.5"}


def test_outcomes_of_tests_are_read_also_where_pytest_was_ended():
    alone = "tests/a.py::test_one[64-x y] PASSED   [ 5%]\ntests/a.py::test_two FAILED [ 9%]\n"
    shared = "[gw3] [ 12%] PASSED tests/b.py::test_three \n[gw1] [ 13%] SKIPPED tests/b.py::test_four[a b]\n"
    summary = "FAILED tests/a.py::test_two - AssertionError: 1\nFAILED tests/c.py::test_five - boom\n"
    assert measure.outcomes(alone + shared) == {
        "passed": 2, "skipped": 1, "n_failed": 1, "tests_that_failed": ["tests/a.py::test_two"]
    }  # fmt: skip
    assert measure.outcomes(alone + summary)["tests_that_failed"] == [
        "tests/a.py::test_two",
        "tests/c.py::test_five",
    ]
