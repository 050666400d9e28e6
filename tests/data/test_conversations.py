"""Files of conversations, in every record format, and what is wrong in those that are refused."""

import gzip
import json

import pytest

from data.conversations import read_conversations

SYSTEM = {"role": "system", "content": "Be brief."}


def talk(*contents):
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


PLAIN = talk("q", "a")
SHAPES = [
    ({"instruction": "q", "output": "a"}, PLAIN),
    ({"instruction": "q", "input": "", "output": "a", "id": 7}, PLAIN),
    ({"instruction": "q", "input": "about", "output": "a"}, talk("q\n\nabout", "a")),
    ({"messages": [SYSTEM, *PLAIN]}, [SYSTEM, *PLAIN]),
    (
        {
            "conversations": [
                {"from": who, "value": text}
                for who, text in [("system", "Be brief."), ("human", "q"), ("gpt", "a")]
            ]
        },
        [SYSTEM, *PLAIN],
    ),
    ({"prompt": "q", "completion": "a"}, PLAIN),
    ({"prompt": "q", "response": "a"}, PLAIN),
    ({"question": "q", "answer": "a"}, PLAIN),
]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz", "x.json.gz"])
def test_every_shape_is_read(tmp_path, name):
    records = [record for record, _ in SHAPES]
    text = json.dumps(records, indent=1)
    if "jsonl" in name:
        text = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n"
    raw = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert read_conversations(tmp_path / name) == [expected for _, expected in SHAPES]


def test_columns_of_a_table_are_read(tmp_path):
    (tmp_path / "x.csv").write_text('id,prompt,response\n1,q,a\n2,"q, too","a\nb"\n', encoding="utf-16")
    assert read_conversations(tmp_path / "x.csv") == [PLAIN, talk("q, too", "a\nb")]


def test_what_is_no_conversation_may_be_left_out(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "q", "response": "a"}\nbad\n{"prompt": "q"}\n')
    said = []
    assert read_conversations(tmp_path / "x.jsonl", said.append) == [PLAIN] and len(said) == 2


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "a"}, 'expected {"messages"'),
        ({"instruction": "q", "instances": []}, 'expected {"messages"'),
        ({"instruction": "q", "input": 3, "output": "a"}, 'expected {"messages"'),
        (["q", "a"], 'expected {"messages"'),
        ("messages", 'expected {"messages"'),
        ({"messages": None}, 'expected {"messages"'),
        ({"messages": [{"role": "user"}]}, 'expected {"messages"'),
        ({"conversations": PLAIN}, 'expected {"messages"'),
        ({"messages": []}, "an assistant last"),
        ({"messages": [SYSTEM]}, "an assistant last"),
        ({"messages": PLAIN[:1]}, "an assistant last"),
        ({"messages": PLAIN[::-1]}, "an assistant last"),
        ({"messages": [*PLAIN, *PLAIN[:1]]}, "an assistant last"),
        ({"messages": [*PLAIN, SYSTEM]}, "an assistant last"),
        ({"messages": [{"role": "tool", "content": "x"}, *PLAIN]}, "roles tool, user"),
        ({"messages": []}, "roles (none): expected user, assistant"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "an assistant last"),
        ({"question": "q", "answer": " \n"}, "answer is empty"),
        ({"question": "q", "answer": 42}, "assistant: 42: expected a string"),
        ({"question": "\ud800", "answer": "a"}, "valid characters"),
    ],
)
def test_what_is_no_conversation_is_named(tmp_path, record, expected):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(SHAPES[0][0]) + "\n\n" + json.dumps(record))
    with pytest.raises(ValueError, match=r"x\.jsonl, line 3: ") as error:
        read_conversations(path)
    assert expected in str(error.value)
    path = tmp_path / "x.json"
    path.write_text(json.dumps([SHAPES[0][0], record]))
    with pytest.raises(ValueError, match=r"x\.json, item 2: "):
        read_conversations(path)


CUT = gzip.compress(b'{"question": "q", "answer": "a"}' * 99, mtime=0)[:-20]


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("x.jsonl", b'{"question": "q"', "x.jsonl, line 1: .* is not JSON"),
        ("x.json", b"[" * 200_000, "x.json: .* is not JSON"),
        ("x.json", b'{"data": [{"question": "q", "answer": "a"}]}', "x.json, item 1: .* expected {"),
        ("x.jsonl", b"\n\n", "has no conversations"),
        ("x.json", b"[]", "has no conversations"),
        ("x.jsonl", b"\xff\xfe", "has no conversations"),  # a byte order mark alone
        ("x.jsonl", b'{"question": "\xe9"}', r"x.jsonl, line 1: byte 14 \(0xe9\) is not UTF-8"),
        ("x.jsonl.gz", CUT, "cannot be read"),
        ("x.jsonl.gz", b"no gz", "cannot be read"),
        ("x.csv", b"question\nq\n", "x.csv, line 2: .* expected {"),
        ("x.txt", b"q,a", "expected a file of conversations: .jsonl"),
        ("x.jsonl", None, "cannot be read"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, raw, expected):
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=expected):
        read_conversations(tmp_path / name)
