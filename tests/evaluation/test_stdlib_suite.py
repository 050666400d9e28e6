"""The default tasks: held-out modules only, the same questions each time, none easy without a model."""

import ast

from data.text import prepare
from evaluation import stdlib_suite
from evaluation.multiple_choice import Item
from evaluation.stdlib_suite import dull_baselines, held_out_modules, suite


def test_questions_are_the_same_each_time_and_come_from_modules_that_training_holds_out(tmp_path):
    first, again = ({task.name: task for task in suite(40)} for _ in range(2))
    assert first == again and suite(40, seed=1)[0] != first["next_line"]
    assert [len(first[name].items) for name in ("next_line", "name", "purpose", "k_shot_4")] == [40] * 4

    held_out = "\n".join(text for _, text in held_out_modules())
    assert all(item.context in held_out for item in first["next_line"].items + first["name"].items)
    corpus = prepare("stdlib", "bytes", tmp_path, notify=lambda line: None)
    n_bytes = len(held_out.encode()) + 1
    assert abs(len(corpus.val.tokens) - n_bytes) < 100  # they lead each document by a token


def test_the_right_line_follows_the_context_and_the_others_are_as_long():
    held_out = "\n".join(text for _, text in held_out_modules())
    for item in suite(40)[0].items:
        gold = item.choices[item.gold]
        assert item.context + gold in held_out and item.context.count("\n") == stdlib_suite.N_LINES
        assert all(abs(len(choice) - len(gold)) <= len(gold) // 10 for choice in item.choices)
        assert len(set(item.choices)) == 4


def test_the_names_to_choose_from_occur_equally_often_in_the_context():
    for item in suite(40)[1].items:
        words = stdlib_suite.re.findall(r"[A-Za-z_]\w{3,}", item.context[: item.context.rindex("\n")])
        assert len({words.count(choice) for choice in item.choices}) == 1 and words.count(item.choices[0]) > 0


def test_k_shot_items_hold_k_solved_lines_with_two_symbols_and_no_repetition():
    for task in suite(20):
        if task.name.startswith("k_shot"):
            k = int(task.name.removeprefix("k_shot_"))
            for item in task.items:
                *solved, last = item.context.splitlines()
                names = [line.partition(" -> ")[0] for line in solved] + [last.removesuffix(" ->")]
                assert len(solved) == k and len(set(names)) == k + 1
                assert {line.rpartition(" ")[2] for line in solved} <= set(item.choices)
                if k >= 4:  # the symbol of the last line is that of the other names of its kind
                    kind = names[-1] in stdlib_suite.EXCEPTIONS
                    same = [line for line in solved if (line.split()[0] in stdlib_suite.EXCEPTIONS) == kind]
                    assert all(line.endswith(f" -> {item.choices[item.gold]}") for line in same) and same


def test_no_rule_without_a_model_is_far_above_chance_on_the_tasks_of_choices():
    for task in suite(200):
        if task.kind == "choice":
            most = 0.5 if len(task.items[0].choices) == 4 else 0.65
            assert max(dull_baselines(task.items).values()) < most, task.name


def test_letters_and_texts_are_the_same_questions_and_solutions_are_python():
    tasks = {task.name: task.items for task in suite(30)}
    for text, letter in zip(tasks["purpose"], tasks["purpose_letters"], strict=True):
        assert text.gold == letter.gold and text.choices[text.gold] in letter.context
        assert isinstance(letter, Item) and letter.choices == ("A", "B", "C", "D")
    for record in tasks["programs"]:
        ast.parse(record["prompt"] + record["canonical_solution"] + record["test"])


def test_the_demonstration_shows_one_question_of_each_task(capsys):
    stdlib_suite.main([])
    assert capsys.readouterr().out.count("\n--- ") == 11
