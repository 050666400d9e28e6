"""The command plan: the ways to give a budget, what it prints, and what it refuses."""

import json
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

import chinchilla
from chinchilla import LAWS, Law
from scaling import plan_report
from scaling.hardware import DEVICES
from scaling.plan import make_plan

ROOT = Path(__file__).parents[2]
BESIROGLU = LAWS["besiroglu"].law


def arguments(*argv):
    parser = ArgumentParser()
    plan_report.add_arguments(parser)
    return parser.parse_args(argv)


def test_budgets():
    assert plan_report.read_budget(arguments("1e22")) == (1e22, None)
    assert plan_report.read_budget(arguments("--params", "7b", "--tokens", "2t")) == (8.4e22, (7e9, 2e12))
    C, run = plan_report.read_budget(arguments("--params", "7b", "--law", "hoffmann1"))
    assert LAWS["hoffmann1"].law.optimal(C)[0] == pytest.approx(7e9) and run is None
    C, _ = plan_report.read_budget(arguments("--tokens", "1t"))
    assert BESIROGLU.optimal(C)[1] == pytest.approx(1e12)
    flops, _ = plan_report.read_budget(
        arguments("--gpus", "8", "--gpu", "a100", "--days", "3", "--mfu", "0.5")
    )
    assert flops == pytest.approx(8 * 312e12 * 0.5 * 3 * 86400)


@pytest.mark.parametrize(
    "argv, message",
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
        (["1e60"], "compute 1e+60: expected 1 to 1e+50 FLOPs"),
        (["1e22", "--law", "chinchila"], "law chinchila: unknown; there are besiroglu, hoffmann1"),
        (["--params", "7b", "--law", "none"], "law none: unknown"),
        (["1e22", "--gpu", "h1000"], "gpu h1000: unknown; there are v100, a100"),
        (["--days", "3", "--gpus", "8", "--gpu", "tpu"], "gpu tpu: unknown"),
        (["1e22", "--law", "kaplan", "--inference-tokens", "2t"], "inference tokens need a law of loss"),
        (["--params", "1e200"], "params 1e+200: expected a number above 0, from 1e-09 to 1e+50"),
        (["--params", "1e-300", "--tokens", "1t"], "params 1e-300"),
        (["1e22", "--unique-tokens", "1e-300"], "unique tokens 1e-300"),
        (["--params", "1e40"], "expected 1 to 1e+50 FLOPs"),
        (["--gpus", "1" * 400, "--days", "3"], "gpus 1e+308: expected a number above 0"),
        (["1e22", "--gpus", "1" * 400], "gpus 1e+308: expected a number above 0"),
        (["--gpus", "8", "--days", "1e308"], "days 1e+308"),
        (["1e22", "--mfu", "1e-320"], "mfu 9.99989e-321: expected a share"),
        (["1e22", "--json", "{tmp}/missing/plan.json"], "--json"),
        (["1e22", "--json", "{tmp}"], "expected a file name in a directory that exists"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_cannot_be_planned_is_refused(argv, message, tmp_path, capsys):
    with pytest.raises(ValueError) as error:
        plan_report.main(arguments(*(text.format(tmp=tmp_path) for text in argv)))
    assert message in str(error.value) and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "argv, message",
    [
        (["-1e22"], "-1e22: expected a positive number"),
        (["ten"], "'ten': expected a positive number"),
        (["7x"], "'7x': expected a positive number"),
        (["--params", "1e200"], "params 1e+200: expected a number above 0"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_mistakes_are_one_line(argv, message, capsys):
    assert chinchilla.main(["plan", *argv]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and message in error and error.count("\n") == 1 and out == ""


def test_numbers_are_short():
    texts = {7.2e9: "7.2B", 1.3e12: "1.3T", 5.76e23: "5.76e23", 1e22: "1e22", 4.25: "4.25", None: "-"}
    assert [plan_report.cell(x) for x in texts] == list(texts.values())


def test_no_share_is_minus_zero():
    texts = {-1e-9: "+0.0 %", 0.0: "+0.0 %", -0.25: "-25.0 %", 0.3: "+30.0 %", None: "-"}
    assert [plan_report.percent(x) for x in texts] == list(texts.values())


def test_times_and_energies_have_the_unit_that_suits_them():
    days = {1000: "2.74 years", 400: "400 days", 1.5: "36 h", 0.05: "72 min", 1 / 1440: "60 s"}
    days |= {1e-6: "86.4 ms", 1e-12: "< 2 ms"}
    assert [plan_report.in_units(x, plan_report.TIME, least=2) for x in days] == list(days.values())
    kwh = {2.5e6: "2.5 GWh", 1500: "1.5 MWh", 12: "12 kWh", 0.5: "500 Wh", 1e-9: "< 1 Wh"}
    assert [plan_report.in_units(x, plan_report.ENERGY) for x in kwh] == list(kwh.values())
    rent = {1.77e5: "$177k", 12.345: "$12.35", 0.5: "$0.50", 1e-9: "< 1 cent", None: "-"}
    assert [plan_report.dollars(x) for x in rent] == list(rent.values())


def test_report_and_json(tmp_path, capsys):
    path = tmp_path / "plan.json"
    flags = ["1e24", "--inference-tokens", "2t", "--unique-tokens", "25b", "--price", "2.5", "--json"]
    assert plan_report.main(arguments(*flags, str(path))) == 0
    out = capsys.readouterr().out
    for text in (
        "1e24 FLOPs", "besiroglu *", "arXiv 2001.08361", "D/N", "1.9 orders above", "warning: law besiroglu"
    ):  # fmt: skip
        assert text in out
    assert max(len(line) for line in out.splitlines()) <= 110
    made = json.loads(path.read_text())
    assert made["repeated"]["unlimited"]["N"] > made["repeated"]["limited"]["N"]
    assert made["repeated"]["limited"]["worth"] < made["repeated"]["limited"]["D"]
    assert made["inference"]["N"] < made["laws"]["besiroglu"]["N"]
    devices = made["hardware"]["devices"]
    assert devices["h100"]["price"] == 2.5 and devices["a100"]["price"] == DEVICES["a100"].price
    assert devices["mi300x"]["dollars"] is None
    assert "compare them within a law, not between laws" in " ".join(out.split())


def test_a_run_is_judged(capsys):
    assert plan_report.main(arguments("--params", "7b", "--tokens", "2t")) == 0
    out = capsys.readouterr().out
    assert "Your run" in out and "% fewer" in out and "about your N" in out
    in_short = " ".join(out.split()).split("In short: ")[1]
    assert in_short.startswith("7B on 2T tokens, 286 per parameter, take 8.4e22 FLOPs: 307 days on 8 h100")


def in_short(*argv):
    args = arguments(*argv)
    C, run = plan_report.read_budget(args)
    made = make_plan(
        C, run=run, inference_tokens=args.inference_tokens, unique_tokens=args.unique_tokens
    )  # fmt: skip
    return " ".join(plan_report.format_plan(made).split()).split("In short: ")[1]


def test_in_short_answers_what_was_requested():
    served = in_short("1e22", "--inference-tokens", "2t")
    assert served.startswith("to serve 2T tokens, by besiroglu, 3.9B on 616B tokens, 158 per parameter,")
    assert "takes 1.44e22 FLOPs, 44 % more than the budget of 1e22: 52.8 days on 8 h100 and $30.4k." in served
    assert "The budget is enough for 3B on 556B tokens, 185 per parameter, at a loss of 2.1664" in served
    unique = in_short("1e22", "--unique-tokens", "25b")
    assert unique.startswith("With 25B unique tokens") and "in 9.49 epochs: 36.6 days on 8 h100" in unique
    assert "The loss is 2.2221; with enough tokens it is 2.1880" in unique and "serve" not in unique
    assert "25T unique tokens are enough" in in_short("1e22", "--unique-tokens", "25t")
    both = in_short("1e22", "--inference-tokens", "2t", "--unique-tokens", "25b")
    assert "3.9B on 616B" in both and "9.49 epochs" in both and "The two answers are separate" in both
    run = in_short("--params", "7b", "--tokens", "2t", "--unique-tokens", "100b")
    assert "Your run sees 100B unique tokens 20 times, which are worth 1.19T new tokens." in run


def test_in_short_marks_what_is_extrapolated():
    assert "by besiroglu (extrapolated by 1.9 orders of magnitude), 1e24 FLOPs" in in_short("1e24")
    assert "extrapolated" not in in_short("1e22")


def test_names_may_have_capitals(capsys):
    assert plan_report.main(arguments("1e22", "--gpu", "H100", "--law", "Kaplan")) == 0
    out = capsys.readouterr().out
    assert "kaplan *" in out and "h100 *" in out


@pytest.mark.parametrize("C", [1, 1e12, 1e50])
@pytest.mark.parametrize("law", LAWS)
def test_absurd_budgets_are_planned_and_warned_of(C, law):
    served = 1e12 if isinstance(LAWS[law].law, Law) else None
    made = make_plan(C, law, unique_tokens=1e9, inference_tokens=served)
    json.dumps(made, allow_nan=False)
    assert made["laws"][law]["beyond"] > 0.05
    assert any("orders of magnitude" in warning for warning in made["warnings"])
    text = plan_report.format_plan(made)
    assert "-0.0" not in text and "0.0 orders" not in text


def test_the_command_ends_in_one_line_and_code_2():
    command = [sys.executable, "chinchilla.py", "plan", "1e22", "--params", "7b"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: a number of FLOPs and --params") and done.stderr.count("\n") == 1
