"""Benchmark files in the forms in which they are published, and examples in front of questions."""

import gzip
import json

import numpy
import pytest

from evaluation import published
from evaluation.generation import Question
from evaluation.multiple_choice import Item
from evaluation.published import read, with_examples

# Name of a file: (its content, kind, the first item or a part of it).
FILES = {
    "hellaswag_val.jsonl": (
        {
            "ind": 24,
            "activity_label": "Roof",
            "ctx_a": "A man sits [title] here.",
            "ctx_b": "he",
            "ctx": "",
            "endings": ["is [x] using  wrap.", "rips"],
            "label": 1,
        },
        "choice",
        Item("Roof: A man sits. here. He", ("is using wrap.", "rips"), 1),
    ),
    "ARC-Easy-Test.jsonl": (
        {
            "id": "M",
            "question": {
                "stem": "Why?",
                "choices": [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}],
            },
            "answerKey": "2",
        },
        "choice",
        Item("Question: Why?\nAnswer:", ("a", "b"), 1),
    ),
    "arc.jsonl": (
        {
            "id": "M",
            "question": "Why?",
            "choices": {"text": ["a", "b"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        "choice",
        Item("Question: Why?\nAnswer:", ("a", "b"), 0),
    ),
    "mmlu.json": (
        {"question": "Two?", "subject": "college_maths", "choices": ["1", "2"], "answer": 1},
        "choice",
        Item(
            "Two?\nA. 1\nB. 2\nAnswer:",
            ("A", "B"),
            1,
            about="The following are multiple choice questions (with answers) about college maths.",
        ),
    ),
    "lambada_test.jsonl": ({"text": "He took the key"}, "word", Item("He took the", ("key",), 0)),
    "gsm8k.jsonl": (
        {"question": "1 + 1?", "answer": "2\n#### 2"},
        "question",
        Question("Question: 1 + 1?\nAnswer:", "2\n#### 2"),
    ),
    "own.jsonl": (
        {"context": "a ", "choices": ["b", "c"], "answer": 1},
        "choice",
        Item("a ", ("b", "c"), 1, ""),
    ),
    "asked.jsonl": ({"prompt": "1 + 1 =", "answer": "2"}, "question", Question("1 + 1 =", "2")),
    "number.jsonl": ({"prompt": "1 + 1 =", "answer": 2}, "question", Question("1 + 1 =", "2")),
    "book.jsonl": ({"text": "A text."}, "text", "A text."),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_known_by_its_fields_and_read_by_them(name, tmp_path):
    record, kind, expected = FILES[name]
    (tmp_path / name).write_text(json.dumps(record) + "\n")
    task = read(str(tmp_path / name))
    assert task.kind == kind and task.items == [expected]


def test_a_path_behind_a_format_may_have_a_colon(tmp_path):
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b/c.jsonl").write_text('{"text": "He took the key"}\n')
    assert read(f"lambada:{tmp_path / 'a:b/c.jsonl'}").kind == "word"
    assert read(str(tmp_path / "a:b/c.jsonl")).kind == "text"


def test_answers_with_and_without_a_number_are_not_mixed(tmp_path):
    rows = [{"question": "1 + 1?", "answer": answer} for answer in ("2\n#### 2", "two")]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"line 2.* answer 'two' has no number behind ####; expected one in"):
        read(str(tmp_path / "q.jsonl"))


def test_mmlu_s_tables_without_a_header_are_read_from_the_first_row_on(tmp_path):
    (tmp_path / "us_history_test.csv").write_text('"Who, then?",a,b,c,d,C\nAnd?,1,2,3,4,A\n')
    items = read(str(tmp_path / "us_history_test.csv")).items
    assert items[0].context == "Who, then?\nA. a\nB. b\nC. c\nD. d\nAnswer:" and items[0].gold == 2
    assert len(items) == 2 and items[1].about.endswith("about us history.")
    texts = read(f"mmlu_texts:{tmp_path / 'us_history_test.csv'}").items
    assert texts[0].choices == ("a", "b", "c", "d") and texts[0].gold == 2


def test_a_list_in_a_csv_cell_is_read_as_python_or_numpy_prints_it(tmp_path):
    for cell in ("""['it''s', "a, b"]""", """['its' "a, b"]"""):
        assert published.listed(cell)[-1] == "a, b" and len(published.listed(cell)) >= 2
    texts = ['it\'s "x"', "two\nlines", r"a\d", "it's", "é"]
    assert published.listed(str(texts)) == published.listed(str(numpy.array(texts))) == texts
    (tmp_path / "m.csv").write_text("question,choices,answer\nTwo?,\"['1' '2']\",1\n")
    assert read(str(tmp_path / "m.csv")).items[0].choices == ("A", "B")


def test_human_eval_is_read_from_gzip_and_parquet_and_plain_text_is_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    record = {
        "task_id": "x/0",
        "prompt": "def f():\n",
        "entry_point": "f",
        "canonical_solution": "",
        "test": "",
    }
    (tmp_path / "h.jsonl.gz").write_bytes(gzip.compress(json.dumps(record).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "h.parquet")
    for name in ("h.jsonl.gz", "h.parquet"):
        assert read(str(tmp_path / name)) == published.TaskFile(f"humaneval:{name}", "program", [record])
    (tmp_path / "book.txt").write_text("One.")
    assert read(str(tmp_path / "book.txt")).items == ["One."]


@pytest.mark.parametrize(
    "name, record, problem",
    [
        ("missing.jsonl", None, "no such file; expected a file, stdlib, or FORMAT:FILE"),
        ("x.jsonl", {"premise": "a"}, r"fields \['premise'\]; expected those of one of: hellaswag"),
        (
            "arc.jsonl",
            {"question": "a", "choices": {"text": ["b"], "label": ["A"]}, "answerKey": "E"},
            "line 1.*'E'",
        ),
        (
            "m.jsonl",
            {"question": "a", "choices": ["b"], "answer": None},
            "line 1.*expected the fields .* of mmlu",
        ),
        ("m.jsonl", {"question": "a", "choices": ["b", "c"], "answer": ""}, "line 1.*: ''; expected"),
        ("m.jsonl", {"question": "a", "choices": ["b", "c"], "answer": "C"}, "line 1.*answer 2 of 2 choices"),
        ("o.jsonl", {"context": "a", "choices": ["b", "c"], "answer": -1}, "line 1.*answer -1 of 2 choices"),
        ("o.jsonl", {"context": "a", "choices": ["b", ""], "answer": 0}, "line 1.*empty choice"),
        ("m.jsonl", {"question": "a", "choices": list("abcdefghijkl"), "answer": 3}, "line 1.*12 choices"),
        ("text.jsonl", {"text": ""}, "line 1.*an empty text"),
        ("q.jsonl", {"prompt": "a", "answer": None}, "line 1.*answer None"),
        ("text.jsonl", {"text": None}, "line 1.*text None"),
    ],
)
def test_other_files_are_refused_by_name_and_record(name, record, problem, tmp_path):
    if record:
        (tmp_path / name).write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=problem):
        read(str(tmp_path / name))


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("book.txt", b"", "book.txt: no text in it"),
        ("book.txt", "süß".encode("latin-1"), "book.txt: byte 1 .* is not UTF-8"),
        ("book.csv", "text\nsüß\n".encode("latin-1"), "book.csv: byte 6 .* is not UTF-8"),
    ],
)
def test_files_without_text_are_refused_by_name(name, content, problem, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        read(str(tmp_path / name))


def test_a_byte_order_mark_is_no_text_and_a_cell_may_be_long(tmp_path):
    (tmp_path / "book.txt").write_text("\ufeffOne.", encoding="utf-8")
    assert read(str(tmp_path / "book.txt")).items == ["One."]
    (tmp_path / "book.csv").write_text("text\n" + "a" * 200_000 + "\n")
    assert read(str(tmp_path / "book.csv")).items == ["a" * 200_000]


def test_examples_are_solved_stand_in_front_and_never_hold_the_question_itself():
    items = [Item(f"Q{i}", ("a", "b"), i % 2, about="About.") for i in range(5)]
    task = published.TaskFile("t", "choice", items)
    assert with_examples(task, [], 0).items[1].context == "About.\n\nQ1"
    assert with_examples(task, items, 2).items[1].context == "About.\n\nQ0 a\n\nQ2 a\n\nQ1"
    drawn = [with_examples(task, items, 3, seed).items for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(x.context.count(f"Q{i}") == 1 for i, x in enumerate(drawn[0]))
    with pytest.raises(ValueError, match="--shots 5: there are 4 examples"):
        with_examples(task, items, 5)
    with pytest.raises(ValueError, match="expected 0"):
        with_examples(published.TaskFile("t", "text", ["a"]), ["a"], 1)
    questions = published.TaskFile("t", "question", [Question("1 =", "1"), Question("2 =", "2")])
    assert with_examples(questions, questions.items, 1).items[0].prompt == "2 = 2\n\n1 ="


def test_the_demonstration_shows_what_a_model_sees(tmp_path, capsys):
    record = FILES["hellaswag_val.jsonl"][0]
    (tmp_path / "h.jsonl").write_text(json.dumps(record) + "\n")
    published.main([str(tmp_path / "h.jsonl")])
    assert "Roof: A man sits. here. He\n  - is using wrap.\n  * rips\n" in capsys.readouterr().out
