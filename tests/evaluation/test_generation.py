"""Generated answers: stop strings, GSM8K's two extractions, pass@k, and programs in the sandbox."""

import itertools
import json
from pathlib import Path

import pytest

from evaluation import __main__ as command
from evaluation import generation
from evaluation.generation import cut_at, pass_at_k, same_number, score_question, write, write_programs
from evaluation.multiple_choice import load
from evaluation.published import TaskFile
from evaluation.stdlib_suite import programs

FIXTURE = Path(__file__).parents[1] / "fixtures/harness"
GOLD = FIXTURE.with_name("gold_answers.jsonl")
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
PROMPTS = [
    "the key",
    "she looked for the dog and",
    "a",
    "It rained all day, and all night there was rain " * 9,
]


@pytest.fixture(scope="module")
def model():
    return load(FIXTURE)


def test_a_text_is_cut_at_the_earliest_stop_string():
    assert cut_at("one\nQuestion: two\n\nthree", ["\n\n", "Question:"]) == "one\n"
    assert cut_at("one", ["\n"]) == "one"
    with pytest.raises(TypeError, match="expected a list"):
        cut_at("text", "Question:")


def test_greedy_texts_are_the_same_in_batches_of_any_size(model):
    texts = [write(*model, PROMPTS, [], 20, batch_size=n) for n in (1, 3, 8)]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][3].n_cut > 0 and texts[0][0].n_cut == 0


def test_writing_ends_at_a_stop_string_inside_the_text(model):
    whole = write(*model, PROMPTS[:2], [], 20)
    stop = whole[0].text[3:6]
    stopped = write(*model, PROMPTS[:2], [stop], 20)
    assert [x.text for x in stopped] == [cut_at(x.text, [stop]) for x in whole]
    assert len(stopped[0].text) <= 3


def test_the_numbers_of_gsm8k_are_those_that_the_harness_finds():
    for text, (strict, flexible) in zip(*EXPECTED["gsm8k"].values(), strict=True):
        found = generation.strict_number(text), generation.flexible_number(text)
        assert found == tuple(None if x == "[invalid]" else x for x in (strict, flexible)), text


def test_numbers_are_compared_as_numbers():
    assert same_number("1,080", "1080") and same_number("$18.50.", "18.5") and same_number("-3", "-3.0")
    assert not same_number("5", "50") and not same_number(None, "5") and not same_number("1.2.3", "1")
    assert score_question("so 2 + 3\n#### 5\n\nQuestion ... #### 7", "2+3=<<2+3=5>>5\n#### 5") == {
        "strict": True,
        "flexible": False,
    }
    assert score_question(" 12\n", "12") == {"exact_match": True}


def test_in_gold_answers_of_every_form_both_rules_find_the_number(tmp_path, capsys):
    generation.main([str(GOLD)])
    assert capsys.readouterr().out == "answers 11  strict 11  flexible 11\n"
    answers = [json.loads(line)["answer"] for line in GOLD.read_text().splitlines()]
    numbers = ["7", "1080", "1250000", "-7", "-3000", "4.5", "18.51", "0", "2", "42", "42"]
    for answer, number in zip(answers, numbers, strict=True):
        assert score_question(answer, f"#### {number}") == {"strict": True, "flexible": True}, answer
        assert score_question(answer, f"#### {number}1") == {"strict": False, "flexible": False}, answer

    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "?", "answer": "7"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1.*expected the field `answer` with ####"):
        generation.main([str(bad)])
    bad.write_text("[1, 2]\n")
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1.*expected the field `answer` with ####"):
        generation.main([str(bad)])
    with pytest.raises(ValueError, match=r"missing.jsonl: no such directory"):
        generation.main([str(tmp_path / "missing.jsonl")])


def test_pass_at_k_is_the_share_of_all_draws_of_k_that_hold_a_passing_program():
    for n, c in ((1, 0), (1, 1), (5, 2), (6, 6)):
        for k in range(1, n + 1):
            draws = list(itertools.combinations(range(n), k))
            share = sum(min(draw) < c for draw in draws) / len(draws)
            assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)
    assert pass_at_k(200, 13, 10) == pytest.approx(0.497551, abs=1e-6)
    with pytest.raises(ValueError, match="1 <= k <= n"):
        pass_at_k(3, 1, 4)


def test_own_solutions_pass_and_programs_are_drawn_from_the_seed_alone(model):
    records = programs()[:2]
    right = [[record["canonical_solution"], "    pass\n"] for record in records]
    assert generation.count_passing(records, right) == [1, 1]
    first, again, alone = (write_programs(*model, records[:n], 2, 0.8) for n in (2, 2, 1))
    assert first == again and first[0] == alone[0] and first[0][0] != first[0][1]


@pytest.mark.parametrize("temperature, rows", [(0.0, [2, 1]), (0.8, [2, 1] * 3)])
def test_programs_are_written_in_batches_and_as_long_as_the_flags_allow(
    temperature, rows, model, monkeypatch
):
    batches = []
    monkeypatch.setattr(generation, "write_batch", lambda model, tokenizer, rows, stops, most, options: (
        batches.append((len(rows), most)) or ["    pass"] * len(rows)
    ))  # fmt: skip
    words = ["--samples", "3" if temperature else "1", "--temperature", str(temperature)]
    words += ["--max-new-tokens", "7", "--batch-size", "2"]
    args = command.parse_arguments(["model", *words])
    figures = command.program_figures(*model, TaskFile("p", "program", programs()[:3]), args)
    assert batches == [(n, 7) for n in rows] and figures[0].n == 3


def test_the_demonstration_finds_numbers(capsys):
    generation.main([str(FIXTURE)])
    printed = capsys.readouterr().out
    assert printed.count("strict ") == 3 and "k 5: 0.917" in printed
