"""The plan as a command: ways of giving a budget, what is printed, and what is refused."""

import json
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

import plan_report
from chinchilla import LAWS, Law
from plan import DEVICES, make_plan

ROOT = Path(__file__).parent.parent
BESIROGLU = LAWS["besiroglu"].law


def arguments(*argv):
    parser = ArgumentParser()
    plan_report.add_arguments(parser)
    return parser.parse_args(argv)


def test_budgets():
    assert plan_report.budget(arguments("1e22")) == (1e22, None)
    assert plan_report.budget(arguments("--params", "7b", "--tokens", "2t")) == (8.4e22, (7e9, 2e12))
    C, run = plan_report.budget(arguments("--params", "7b", "--law", "hoffmann1"))
    assert LAWS["hoffmann1"].law.optimal(C)[0] == pytest.approx(7e9) and run is None
    C, _ = plan_report.budget(arguments("--tokens", "1t"))
    assert BESIROGLU.optimal(C)[1] == pytest.approx(1e12)
    flops, _ = plan_report.budget(arguments("--gpus", "8", "--gpu", "a100", "--days", "3", "--mfu", "0.5"))
    assert flops == pytest.approx(8 * 312e12 * 0.5 * 3 * 86400)


@pytest.mark.parametrize(
    "argv, told",
    [
        ([], "no budget: give FLOPs"),
        (["--gpus", "8"], "--gpus alone"),
        (["1e22", "--params", "7b"], "each is a budget of its own"),
        (["1e22", "--gpus", "8", "--days", "3"], "each is a budget of its own"),
        (["--tokens", "1t", "--gpus", "8", "--days", "3"], "each is a budget of its own"),
        (["--days", "3"], "of how many GPUs"),
        (["--days", "-3", "--gpus", "8"], "days -3: expected a number above 0"),
        (["--days", "nan", "--gpus", "8"], "days nan"),
        (["--days", "3", "--gpus", "0"], "gpus 0"),
        (["1e22", "--mfu", "40"], "mfu 40: expected a share"),
        (["--days", "3", "--gpus", "8", "--mfu", "0"], "mfu 0: expected a share"),
        (["1e22", "--price", "-1"], "price -1"),
        (["1e22", "--seed", "-1"], "seed -1"),
        (["1e60"], "compute 1e+60: expected 1 to 1e50 FLOPs"),
        (["1e22", "--law", "chinchila"], "law chinchila: unknown; there are besiroglu, hoffmann1"),
        (["--params", "7b", "--law", "none"], "law none: unknown"),
        (["1e22", "--gpu", "h1000"], "gpu h1000: unknown; there are v100, a100"),
        (["--days", "3", "--gpus", "8", "--gpu", "tpu"], "gpu tpu: unknown"),
        (["1e22", "--law", "kaplan", "--inference-tokens", "2t"], "kaplan predicts no loss"),
    ],
)
def test_what_cannot_be_planned_is_refused(argv, told):
    with pytest.raises(ValueError) as error:
        plan_report.main(arguments(*argv))
    assert told in str(error.value)


def test_numbers_are_short():
    told = {7.2e9: "7.2B", 1.3e12: "1.3T", 5.76e23: "5.76e23", 1e22: "1e22", 4.25: "4.25", None: "-"}
    assert [plan_report.cell(x) for x in told] == list(told.values())


def test_report_and_json(tmp_path, capsys):
    path = tmp_path / "plan.json"
    flags = "1e24 --inference-tokens 2t --unique-tokens 25b --price 2.5 --json".split()
    assert plan_report.main(arguments(*flags, str(path))) == 0
    out = capsys.readouterr().out
    for text in ("1e24 FLOPs", "besiroglu *", "arXiv 2001.08361", "D/N", "t CO2", "warning: law besiroglu"):
        assert text in out
    assert max(len(line) for line in out.splitlines()) <= 110
    made = json.loads(path.read_text())
    assert made["repeated"]["unlimited"]["N"] > made["repeated"]["limited"]["N"]
    assert made["repeated"]["limited"]["worth"] < made["repeated"]["limited"]["D"]
    assert made["inference"]["N"] < made["laws"]["besiroglu"]["N"]
    devices = made["hardware"]["devices"]
    assert devices["h100"]["price"] == 2.5 and devices["a100"]["price"] == DEVICES["a100"].price
    assert devices["mi300x"]["dollars"] is None
    assert made["flops"]["exact"] < made["flops"]["as_printed"]


def test_a_run_is_judged(capsys):
    assert plan_report.main(arguments("--params", "7b", "--tokens", "2t")) == 0
    out = capsys.readouterr().out
    assert "Your run" in out and "% fewer" in out


@pytest.mark.parametrize("C", [1, 1e12, 1e50])
@pytest.mark.parametrize("law", LAWS)
def test_absurd_budgets_are_planned_and_warned_of(C, law):
    served = 1e12 if isinstance(LAWS[law].law, Law) else None
    made = make_plan(C, law, unique_tokens=1e9, inference_tokens=served)
    json.dumps(made, allow_nan=False)
    assert made["warnings"] and plan_report.report(made)


def test_the_command_ends_in_one_line_and_code_2():
    command = [sys.executable, "chinchilla.py", "plan", "1e22", "--params", "7b"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: a number of FLOPs and --params") and done.stderr.count("\n") == 1
