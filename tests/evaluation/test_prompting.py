"""Formats and orders: the same questions in other clothes, and measures that follow a known reader."""

import json
from types import SimpleNamespace

import pytest
from conftest import run_command

from data.tokenizer import get_tokenizer
from evaluation import prompting
from evaluation.prompting import FORMATS, few_shots
from evaluation.small_runs import small_gpt


def test_formats_and_orders_change_nothing_but_form_and_order():
    for question in few_shots(4, 20, 0):
        for form, template in FORMATS.items():
            lines = [template.format(x=x, y=y) for x, y in question.examples]
            item = question.item(form, 0)
            assert item.context == "".join(lines) + template.format(x=question.name, y="").rstrip()
            assert item.choices == question.labels and item.delimiter == " "
            other = question.item(form, 3).context
            assert all(other.count(line) == item.context.count(line) for line in lines)
        assert question.item("arrow", 2).context.splitlines()[-2].endswith(question.last_label(2))
    assert len({few_shots(4, 20, seed)[0].name for seed in range(5)}) > 1
    orders = {question.item("arrow", order).context for order in range(8)}
    assert len(orders) > 3


def test_random_labels_are_drawn_and_the_question_stays():
    questions = few_shots(4, 200, 0)
    same = total = 0
    for question in questions:
        item, drawn = question.item("arrow", 0), question.item("arrow", 0, random_labels=True)
        assert drawn.gold == item.gold and drawn.context.splitlines()[-1] == item.context.splitlines()[-1]
        pairs = [*zip(item.context.splitlines()[:-1], drawn.context.splitlines()[:-1], strict=True)]
        assert all(a.split()[0] == b.split()[0] for a, b in pairs)
        same, total = same + sum(a == b for a, b in pairs), total + len(pairs)
    assert 0.4 < same / total < 0.6


def test_the_share_of_changed_answers_is_a_mean_over_pairs():
    assert prompting.changed([[0, 1, 0, 1]] * 3) == 0
    assert prompting.changed([[0, 0], [0, 1], [1, 1]]) == pytest.approx((0.5 + 1 + 0.5) / 3)


def test_a_reader_that_repeats_the_last_label_is_found_out(monkeypatch):
    def repeat(model, tokenizer, items, alone):
        found = []
        for item in items:
            words = item.context.replace(":", " ").split()
            last = [word for word in words if word in item.choices][-1]
            found.append(SimpleNamespace(picks={"acc": item.choices.index(last)}))
        return found

    monkeypatch.setattr(prompting, "answer_items", repeat)
    questions = few_shots(4, 60, 0)
    figures = prompting.measure(None, None, questions, 6)
    assert figures["last label"] == 1 and figures["changed by format"] == 0
    assert 0.3 < figures["changed by order"] < 0.7 and figures["formats"].keys() == FORMATS.keys()
    assert len(figures["orders"]) == 6 and figures["orders"][0] == figures["formats"]["arrow"]
    printed = prompting.table([figures, figures], 60)
    assert "best less worst of 6 formats 0.000" in printed and "last label" in printed


def test_the_command_measures_a_model_and_refuses_mistakes_in_a_line(tmp_path):
    tokenizer = get_tokenizer("bytes")
    small_gpt(tokenizer.n_vocab, 128, 0, width=32).save_pretrained(tmp_path / "gpt")
    tokenizer.save(tmp_path / "gpt")
    command, out = ("-m", "evaluation.prompting", str(tmp_path / "gpt")), tmp_path / "new" / "few.json"
    ended = run_command(*command, "--questions", "4", "--orders", "2", "--seeds", "2", "--out", str(out))
    assert ended.code == 0 and "best less worst of 2 orders" in ended.out, ended.err
    rows = json.loads(out.read_text())["rows"]
    assert [row["seed"] for row in rows] == [0, 1] and rows[0]["formats"].keys() == FORMATS.keys()
    for words, error in (
        (("--shots", "0"), "error: --shots 0: expected at least 1"),
        (("--shots", "999"), "error: 999 solved lines: expected at most"),
        (("--out", str(tmp_path)), f"--out: {tmp_path} is a folder; expected the name of a file to write"),
    ):
        ended = run_command("-m", "evaluation.prompting", "no-model", *words)  # refused before it is opened
        assert ended.code == 2 and error in ended.err
