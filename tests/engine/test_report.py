"""The page of a run, from files that the tests write: nothing is trained."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from written_runs import START, Page, append_row, make_run, n_points, step_row

from engine import report
from engine.charts import POINTS, Curve, chart, settled, thinned, ticks

# These are the tests of the pictures.
pytestmark = pytest.mark.usefixtures("rendered")


def written(directory: Path) -> Page:
    report.write(directory)
    assert not (directory / "report.html.new").exists()
    return Page(directory / "report.html")


def test_the_page_has_figures_settings_and_samples_escaped(tmp_path):
    page = written(make_run(tmp_path / "a"))
    for text in (
        "gpt tiny", "3,420,160 parameters, step 40 of 1,000, 4k tokens, 16 s of training, 0 updates skipped",
        "3.2517", "bits per byte", "n_layers", "<rms>", "--data 'a<b>.txt'", "from step 0", "3.11.7",
        "Loss (nats per token)", "Learning rate", "Gradient norm",
    ):  # fmt: skip
        assert text in page.text, text
    assert "MFU" not in page.text  # None: a device whose peak is not known
    assert page.text.count("sample <b>&amp; no.") == 11 and page.text.count("=== not a heading") == 11
    assert "Sample at step 40, validation loss 3.5\nsample <b>&amp; no. 40 é\n" in page.text
    assert page.tags.count("details") == 10 + 1  # the earlier samples, and the start
    assert page.tags.count("b") == 5 + 4  # the bold ones are titles and values of curves, none from a sample


def test_the_page_of_an_adapter_names_its_base(tmp_path):
    flags = START["flags"] | {"model": "lora", "size": None, "base": "runs/gpt/model"}
    page = written(make_run(tmp_path / "a", start=START | {"flags": flags}))
    assert "lora runs/gpt/model" in page.text


def test_curves_have_a_point_for_each_row(tmp_path):
    page = written(make_run(tmp_path / "a"))
    training, validation, *others = page.paths["line"]
    assert n_points(training) == 40 and n_points(validation) == 11 and len(page.paths["dot"]) == 11
    assert [n_points(path) for path in others] == [
        40,
        40,
        40,
    ]  # learning rate, gradient norm, tokens per second
    assert "band" not in page.paths
    x = [int(u) for u in re.findall(r"[ML](\d+) ", training)]
    # 1 % of the width is left free on the right.
    assert x == [round(2000 * step / 40 / 1.01) for step in range(1, 41)]


def test_a_long_run_is_thinned_but_keeps_its_spikes_and_its_end(tmp_path):
    directory = make_run(tmp_path / "a", n_steps=4000)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["step"] == 3000 and "loss" in row:
            row["loss"] = 7.0
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = written(directory)
    assert n_points(page.paths["line"][0]) == POINTS and n_points(page.paths["band"][0]) == 2 * POINTS
    heights = [int(v) for v in re.findall(r"[ML]\d+ (-?\d+)", page.paths["band"][0])]
    # There along the least and back along the largest; at three quarters of the run, near the top (0).
    assert heights[2 * POINTS - 1 - 299] < 100 < min(heights[2 * POINTS - 1 - 290 : 2 * POINTS - 1 - 100])
    assert heights[299] > 800
    assert (directory / "report.html").stat().st_size < 100_000
    assert "step 4,000 of 1,000" in page.text


def test_very_many_rows_are_read_sparsely_with_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROWS", 100)
    steps, evaluations = report.read_rows(make_run(tmp_path / "a", n_steps=1000))
    assert len(evaluations) == 11 and 80 <= len(steps) <= 100
    assert steps[-1]["step"] == 1000 and len(set(np.diff([row["step"] for row in steps]))) == 1


def test_half_a_line_at_the_end_is_left_out(tmp_path):
    directory = make_run(tmp_path / "a")
    whole = (directory / "metrics.jsonl").read_text()
    for half in ('{"step": 41, "tok', '{"step": 41, "loss": 3.1', '{"step": 41, "val_loss": 3.', "{"):
        (directory / "metrics.jsonl").write_text(whole + half)
        page = written(directory)
        assert "step 40 of" in page.text and n_points(page.paths["line"][0]) == 40
    report.draw_loss(directory)
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_value_that_is_not_finite_only_interrupts_the_curve(tmp_path):
    directory = make_run(tmp_path / "a")
    append_row(directory, step_row(41, math.nan, grad_norm=math.inf, skipped=1))
    append_row(directory, step_row(42, 3.0, skipped=1))
    page = written(directory)
    assert page.paths["line"][0].count("M") == 2 and n_points(page.paths["line"][0]) == 41
    assert "1 updates skipped" in page.text
    report.draw_loss(directory)
    append_row(directory, step_row(43, math.nan, grad_norm=math.nan, skipped=2))
    append_row(directory, {"step": 43, "tokens": 4300, "val_loss": math.nan, "perplexity": math.nan})
    page = written(directory)
    assert "not finite" in page.text and "lowest 3.2517 at step 40" in page.text
    report.draw_loss(directory)


@pytest.mark.filterwarnings("error")
def test_a_run_with_no_finite_number_has_a_page(tmp_path):
    directory = make_run(tmp_path / "a", offset=math.nan, grad_norm=math.nan)
    (directory / "metrics.jsonl").write_text(json.dumps(step_row(1, math.nan, grad_norm=math.inf)) + "\n")
    page = written(directory)
    assert "Loss" not in page.text and "Learning rate" in page.text


def test_other_metrics_of_a_model_are_drawn_too(tmp_path):
    directory = make_run(tmp_path / "a", accuracy=0.25, mfu=0.4)
    append_row(
        directory, {"step": 40, "tokens": 4000, "val_loss": 3.3, "val_accuracy": 0.2, "val_mlm_loss": 3.1}
    )
    page = written(directory)
    assert "Accuracy" in page.text and "MFU" in page.text and "40.0%" in page.text
    assert "validation accuracy" in page.text
    assert "nats" not in page.text  # a sum of two losses


def test_a_figure_has_one_format_and_its_reference_beside_it(tmp_path):
    start = START | {"references": {"aux_loss": "2 at perfect balance"}, "flops_per_token": 1000}
    start |= {"data": "a book, 900 tokens", "guess": "the most frequent token is right for 9.1 %"}
    directory = make_run(tmp_path / "a", start=start, aux_loss=3.025, accuracy=0.2579)
    last = {"step": 40, "tokens": 4000, "val_loss": 3.3, "val_accuracy": 0.2579, "val_aux_loss": 3.025}
    append_row(directory, last)
    text = written(directory).text
    assert "Aux loss (2 at perfect balance)" in text and text.count("2 at perfect balance") == 2
    assert text.count("25.8%") >= 3 and "0.2579" not in text and "0.258" not in text
    assert "3.0250" in text and "3.025 " not in text
    assert "4k tokens, 4M FLOPs" in text
    assert "Data: a book, 900 tokens." in text
    assert "A trivial guess: the most frequent token is right for 9.1 %." in text


def test_what_a_chart_cuts_off_is_noted(tmp_path):
    page = written(make_run(tmp_path / "a"))
    assert "not shown: up to 8" in page.text  # the loss at the start
    append_row(tmp_path / "a", step_row(41, 3.0, grad_norm=600.0))
    assert "not shown: up to 600" in written(tmp_path / "a").text


def test_without_run_json_and_samples_those_parts_are_left_out(tmp_path):
    directory = make_run(tmp_path / "older", start=None)
    (directory / "samples.txt").unlink()
    page = written(directory)
    assert "older" in page.text and "step 40," in page.text and "3.2517" in page.text
    for text in ("Sample", "Flags", "Model", "Started", "parameters"):
        assert text not in page.text


def test_before_the_first_step_there_is_a_page(tmp_path):
    directory = make_run(tmp_path / "a")
    first = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    (directory / "metrics.jsonl").write_text(first)
    page = written(directory)
    assert "step 0 of 1,000" in page.text and len(page.paths["dot"]) == 1
    (directory / "metrics.jsonl").write_text("")
    (directory / "samples.txt").write_text("")
    assert "step 0 of 1,000" in written(directory).text


def test_some_of_many_samples_are_shown(tmp_path):
    directory = make_run(tmp_path / "a")
    lines = "".join(f"=== step {i}, validation loss 3\nno. {i}.\n\n" for i in range(100))
    (directory / "samples.txt").write_text(lines)
    text = written(directory).text
    assert "no. 99." in text and "no. 98." in text and "no. 0." in text
    assert text.count("no. ") == report.SAMPLES + 1 and "20 of 99 earlier ones" in text


def test_a_resume_appends_a_start_and_a_new_run_replaces_them(tmp_path):
    for step, resumed in ((0, False), (0, True), (200, True)):
        start = START | {"step": step, "flags": START["flags"] | {"out": Path("x")}}
        report.record_start(tmp_path, start, resumed)
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 0, 200] and starts[0]["flags"]["out"] == "x"
    report.record_start(tmp_path, START, False)
    assert report.read_starts(tmp_path) == [START]
    (tmp_path / "run.json").write_text('{"starts": [')
    assert report.read_starts(tmp_path) == []
    report.record_start(tmp_path, START | {"step": 5}, True)
    assert [start["step"] for start in report.read_starts(tmp_path)] == [5]


def test_environment_is_plain_json():
    found = report.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["processes"] == 1 and found["threads"] >= 1 and found["cpu"]
    assert found["torch"].startswith("2.") and "python" in found and "numpy" in found


def test_a_run_is_described_before_it_starts():
    described = dict(model="gpt tiny", data="stdlib, 900 tokens", guess="right for 9 %", n_params=2000)
    described |= dict(n_active=2000, n_trained=2000, steps=1300, units_per_step=2048, epochs=0.5, step=40)
    described |= dict(flops=1.5e15, device="float32 on cpu", minutes=4.61)
    assert report.describe_run(**described) == [
        "model  gpt tiny, 2,000 parameters",
        "data   stdlib, 900 tokens",
        "guess  right for 9 %",
        "run    1,300 steps of 2,048 tokens: 2,662,400, 0.50 epochs",
        "cost   1.50e+15 FLOPs, 1331.20 tokens per parameter (Chinchilla: 20)",
        "here   float32 on cpu, about 4.6 min from step 40",
    ]
    *_, run, cost, _ = report.describe_run(**described | {"unit": "images"})
    assert "2,048 images: 2,662,400" in run and cost.endswith("1331.20 images per parameter")
    model, *_ = report.describe_run(**described | {"n_active": 500})
    assert model.endswith("2,000 parameters, 500 of them active")
    model, _, run, cost, _ = report.describe_run(**described | {"n_trained": 20, "guess": None})
    assert model.endswith(", 20 of them trained (1.00%)") and cost == "cost   1.50e+15 FLOPs"


def test_thinned_keeps_mean_least_and_largest():
    y = np.arange(10.0 * POINTS)
    y[25] = math.nan
    y[30:40] = math.nan
    x, mean, least, largest = thinned(np.arange(10.0 * POINTS), y)
    assert len(x) == POINTS and x[0] == 9 and x[-1] == 10 * POINTS - 1
    assert (mean[0], least[0], largest[0]) == (4.5, 0, 9)
    assert (mean[2], least[2], largest[2]) == (220 / 9, 20, 29)  # 20 to 29 without 25
    assert np.isnan([mean[3], least[3], largest[3]]).all()
    few = np.array([1.0, math.nan, 3.0])
    for same in thinned(np.arange(3.0), few)[1:]:
        np.testing.assert_array_equal(same, few)


@pytest.mark.parametrize("ends", [(0, 1), (2.501, 2.509), (-3, 1e9), (1e-7, 3e-7), (3.4, 6.5), (0, 19.99)])
def test_ticks_are_few_and_round(ends):
    marks = ticks(*ends)
    assert 2 <= len(marks) <= 7 and ends[0] - 1e-9 <= marks[0] and marks[-1] <= ends[1]
    step = marks[1] - marks[0]
    assert round(step / 10.0 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


def test_the_fall_from_chance_does_not_set_the_axis_but_a_later_rise_does():
    x = np.arange(101.0)
    y = np.where(x < 5, 10.0, 3.0)
    assert settled([Curve("", "", x, y)]) == 3.0
    y[60] = 9.0
    assert settled([Curve("", "", x, y), Curve("", "", x[:0], y[:0])]) == 9.0
    assert settled([Curve("", "", x, np.full(101, math.nan))]) is None


def test_a_chart_without_finite_points_is_nothing_and_constants_have_an_axis():
    x = np.arange(3.0)
    assert chart("t", [Curve("a", "red", x, np.full(3, math.nan))]) == ""
    for value in (0.0, 5.0, -2.0):
        for low in (math.inf, 0.0):
            html = chart("t", [Curve("a", "red", 0 * x, np.full(3, value))], low=low)
            assert "nan" not in html and html.count('class="y"') >= 1
