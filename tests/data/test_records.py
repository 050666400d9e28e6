"""Files of records and of text: what is read from each form, and how what is not text is named.

The last tests draw files at random, N_EXAMPLES of each kind; FUZZ=5000 python -m pytest ... draws more.
"""

import csv
import gzip
import io
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import corpus, records
from data.conversations import read_conversations
from data.labelled import read_examples

TEXTS = ["one, two", 'he said "no"', "line\nbreak", "é中"]


def read(path, field="text"):
    return list(corpus.documents([(path.name, path)], pytest.fail, field))


def csv_of(texts, separator):
    cells = ['"' + text.replace('"', '""') + '"' for text in texts]
    rows = [f"{i}{separator}{cell}" for i, cell in enumerate(cells)]
    return f"id{separator}text\n" + "\n".join(rows) + "\n"


def lines_of(texts):
    return "\n".join(json.dumps({"text": text}) for text in texts) + "\n\n"


FORMS = {
    "x.jsonl": lines_of(TEXTS),
    "x.ndjson": lines_of(TEXTS),
    "x.json": json.dumps([{"text": text} for text in TEXTS], indent=1),
    "lines.json": lines_of(TEXTS),  # as C4 has it
    "x.csv": csv_of(TEXTS, ","),
    "x.tsv": csv_of(TEXTS, "\t"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", FORMS)
def test_each_form_gives_the_same_texts_in_each_encoding_packed_or_not(name, encoding, packed, tmp_path):
    raw = (("\ufeff" if encoding == "utf-16-be" else "") + FORMS[name]).encode(encoding)
    path = tmp_path / (name.upper() if encoding == "utf-16" else name)
    path = path.with_name(path.name + (".GZ" if encoding == "utf-16" else ".gz")) if packed else path
    path.write_bytes(gzip.compress(raw) if packed else raw)
    assert read(path) == TEXTS


def test_a_packed_file_is_known_by_its_first_bytes(tmp_path):
    (tmp_path / "x.txt").write_bytes(gzip.compress(b"text"))
    assert read(tmp_path / "x.txt") == ["text"]


def test_a_single_object_is_one_record(tmp_path):
    (tmp_path / "x.json").write_text('{\n "text": "one",\n "n": 1}\n')
    assert read(tmp_path / "x.json") == ["one"]


def test_parquet_is_read_by_a_named_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"body": TEXTS * 400, "n": range(len(TEXTS) * 400)})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet", "body") == TEXTS * 400
    said = []
    assert list(corpus.documents([("x.parquet", tmp_path / "x.parquet")], said.append)) == []
    assert (
        said[0] == "x.parquet, row 1: no field 'text', it has 'body', 'n'; name one of these by --text-field"
    )
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(50))
    with pytest.raises(ValueError, match=r"bad\.parquet: cannot be read as parquet"):
        read(tmp_path / "bad.parquet")


def test_without_pyarrow_an_error_names_it(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"x\.parquet: reading parquet needs pyarrow: pip install pyarrow"):
        read(tmp_path / "x.parquet")


def test_tables_without_quoting_keep_their_quotation_marks(tmp_path):
    rows = ['"Hello," he said', 'a lone " mark', '"', "plain"]
    (tmp_path / "x.tsv").write_text("text\tlabel\n" + "".join(f"{row}\t1\n" for row in rows))
    assert read(tmp_path / "x.tsv") == rows


def test_a_byte_order_mark_in_front_of_a_quoted_heading_is_no_part_of_it(tmp_path):
    for name, separator in (("x.csv", ","), ("x.tsv", "\t")):
        rows = f'"text, all"{separator}"n"\r\n"one, two"{separator}"1"\r\n'  # as pandas writes with QUOTE_ALL
        (tmp_path / name).write_bytes(rows.encode("utf-8-sig"))
        assert read(tmp_path / name, "text, all") == ["one, two"]


def test_a_long_cell_is_read(tmp_path):
    (tmp_path / "x.csv").write_text(f"text\n{'word ' * 100_000}\n")
    assert read(tmp_path / "x.csv") == ["word " * 100_000]


# What is not as the suffix promises: file, content, the problems that are named, the texts that are read.
BAD = [
    ("x.csv", b"title,body\na,b\n", ["line 2: no field 'text', it has 'title', 'body'; name one"], []),
    ("x.csv", b"text,text\na,b\n", ["line 1: two columns of the same name"], []),
    ("x.csv", b"text,n\na,b,1\nfine,2\nz\n", ["line 2: 3 cells, but 2 columns", "line 4: 1 cells"], ["fine"]),
    ("x.csv", b'text,n\nfine,1\n"open,2\nmore,3\n', ["line 3: unexpected end of data"], ["fine"]),
    ("x.csv", b"text\ncaf\xe9\nfine\n", ["line 2: 'text': character 3 is not valid"], ["fine"]),
    ("x.csv", b"text\na\0b\nfine\n", ["line 2: 'text': character 1 is NUL"], ["fine"]),
    (
        "x.json",
        b'[{"text": "fine"}, {"txt": 1}, "a", null]',
        ["item 2: no field", "item 3", "item 4"],
        ["fine"],
    ),
    ("x.json", b'{"text": "cut', ['x.json: \'{"text": "cut\' is not JSON'], []),
    ("x.json", b"[" * 200_000, ["is not JSON"], []),
    ("x.json", b"\x80", ["byte 0 (0x80) is not UTF-8"], []),
    (
        "x.jsonl",
        b'{"text": ["a"]}\n{"text": "fine"}',
        ["line 1: byte 0: 'text' is ['a']; expected a"],
        ["fine"],
    ),
    ("x.txt", "text".encode("utf-16-le"), ["byte 1 is NUL"], []),  # without a byte order mark
    ("x.txt", b"\xff\xfea", ["byte 2 is not UTF-16, which its byte order mark promises"], []),
    ("x.docx", b"PK\x03\x04\x00", ["NUL: binary data, not text (a zip archive, as .docx"], []),
    ("x.pdf", b"%PDF-1.4\n\xe2\xe3", ["(a PDF; convert it to text)"], []),
    ("x.txt.bz2", b"BZh9\x80", ["(compressed by bzip2"], []),
]


@pytest.mark.parametrize("name, raw, problems, texts", BAD)
def test_what_is_no_text_is_named_with_its_place(name, raw, problems, texts, tmp_path):
    (tmp_path / name).write_bytes(raw)
    said = []
    assert list(corpus.documents([(name, tmp_path / name)], said.append)) == texts
    assert len(said) == len(problems)
    for line, problem in zip(said, problems, strict=True):
        assert line.startswith(name) and problem in line


def test_empty_files_have_no_records(tmp_path):
    for name in FORMS:
        for raw in (b"", b"\n\n", "\ufeff".encode(), "\ufeff\n".encode("utf-16")):
            (tmp_path / name).write_bytes(raw)
            assert read(tmp_path / name) == []


def test_records_know_their_suffix():
    assert records.suffix_of(Path("a/B.JSON.GZ")) == ".json"
    assert records.suffix_of(Path("a.b/readme.gz")) == ""
    assert list(records.json_lines(io.BytesIO(b"1\n\n2"), "x", pytest.fail)) == [
        ("x, line 1: byte 0", 1),
        ("x, line 3: byte 3", 2),
    ]


# --- files at random

N_EXAMPLES = int(os.environ.get("FUZZ", 60))
fuzz = settings(
    max_examples=N_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
)
NAMES = st.sampled_from([*FORMS, "x.parquet", "x.txt", "x.jsonl.gz", "x.csv.gz", "x.json.gz"])
STRINGS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=20)
# What a file of records is made of, and what breaks it.
SYNTAX = 'text label " "" , { } [ ] : null 1e999 -0 NaN é \\ \\ud800 "messages":[ {"role":"user"}'
RECORD = '{"text": "a", "label": "b", "question": "q", "answer": "a"}'
PIECES = st.sampled_from([*SYNTAX.split(), *"\t\n\r\0\ufeff", "\r\n", "9" * 5000, RECORD])
FIELDS = "text label messages role content conversations from value instruction input output prompt question"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*FIELDS.split(), "answer"]), inner, max_size=4)
    ),
    max_leaves=8,
)


def check_all_readers(path):
    """Each reader gives texts, or one ValueError that names the file: nothing else may happen."""
    problems = []
    for reader in (
        lambda: [*corpus.documents([(path.name, path)], problems.append)],
        lambda: [text for example in read_examples(path) for text in example],
        lambda: [message["content"] for talk in read_conversations(path) for message in talk],
        lambda: [
            message["content"] for talk in read_conversations(path, problems.append) for message in talk
        ],
    ):
        try:
            texts = reader()
        except ValueError as error:
            assert path.name in str(error) and "\n" not in path.name
        else:
            assert all("\0" not in text and text.encode() is not None for text in texts)
    assert all(problem.startswith((path.name, str(path))) for problem in problems)


@fuzz
@given(name=NAMES, raw=st.binary(max_size=60), packed=st.booleans())
def test_any_bytes_are_read_or_refused_by_name(name, raw, packed, tmp_path):
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw) if packed else raw)
    check_all_readers(path)


@fuzz
@given(
    name=NAMES, pieces=st.lists(PIECES, max_size=25), encoding=st.sampled_from(["utf-8", "utf-16", "utf-32"])
)
def test_any_syntax_is_read_or_refused_by_name(name, pieces, encoding, tmp_path):
    path = tmp_path / name
    path.write_bytes("".join(pieces).encode(encoding))
    check_all_readers(path)


@fuzz
@given(values=st.lists(JSON, max_size=3), as_lines=st.booleans())
def test_any_json_is_read_or_refused_by_name(values, as_lines, tmp_path):
    path = tmp_path / ("x.jsonl" if as_lines else "x.json")
    path.write_text("\n".join(map(json.dumps, values)) if as_lines else json.dumps(values))
    check_all_readers(path)


@fuzz
@given(
    texts=st.lists(STRINGS.filter(bool), max_size=6),
    form=st.sampled_from(["x.csv", "x.tsv", "x.json", "x.jsonl"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    packed=st.booleans(),
)
def test_what_was_written_is_what_is_read(texts, form, encoding, packed, tmp_path):
    if form.endswith("sv"):
        file = io.StringIO(newline="")
        writer = csv.writer(file, "excel-tab" if form == "x.tsv" else "excel", quoting=csv.QUOTE_ALL)
        writer.writerows([("id", "text"), *enumerate(texts)])
        content = file.getvalue()
    else:
        objects = [{"id": i, "text": text} for i, text in enumerate(texts)]
        lines = "\n".join(json.dumps(value, ensure_ascii=i % 2 == 0) for i, value in enumerate(objects))
        content = json.dumps(objects, ensure_ascii=False) if form == "x.json" else lines
    raw = content.encode(encoding)
    path = tmp_path / (form + ".gz" * packed)
    path.write_bytes(gzip.compress(raw) if packed else raw)
    assert read(path) == texts


@fuzz
@given(text=STRINGS.filter(bool), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_a_text_in_any_encoding_with_its_mark_is_read(text, encoding, tmp_path):
    (tmp_path / "x.txt").write_bytes(text.encode(encoding))
    assert read(tmp_path / "x.txt") == [text]
