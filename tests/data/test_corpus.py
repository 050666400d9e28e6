"""Corpora: what is found, what is read from it, what is refused."""

import gzip

import pytest

from data import corpus

# --- the default corpus


def test_stdlib_is_five_megabytes_and_the_same_every_time():
    files = corpus.stdlib_files()
    assert files == corpus.stdlib_files() == sorted(files)
    assert sum(path.stat().st_size for _, path in files) >= 5_000_000
    names = [name for name, _ in files]
    assert "argparse" in names and "json.decoder" in names
    assert not [
        name for name in names if "test" in name.split(".") or name.startswith(("site-packages", "encodings"))
    ]


# --- reading


def test_each_kind_of_file_gives_its_documents(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "a.txt").write_text("one é")
    (folder / "b.md").write_bytes("\ufefftwo\r\n".encode())
    (folder / "deep" / "c.jsonl").write_text('{"text": "three"}\n\n{"text": "four", "id": 4}\n{"text": ""}\n')
    with gzip.open(folder / "deep" / "d.jsonl.gz", "wt") as file:
        file.write('{"text": "five"}\n')
    (folder / "empty.py").write_text("")
    (folder / ".git" / "hidden.txt").write_text("no")
    (folder / "picture.png").write_text("no")
    texts = ["one é", "two\r\n", "three", "four", "five"]

    def read(what):
        return list(corpus.documents(corpus.find_files(str(what), tmp_path), pytest.fail))

    assert read(folder) == texts
    assert read(folder / "**" / "*.jsonl*") == texts[2:]
    assert read(folder / "a.txt") == texts[:1]


# Half a surrogate pair, NUL, a number and a depth beyond what Python's parser takes, text that is no string.
UNSPEAKABLE = (
    b'{"text": "\\ud800"}\n{"text": "\\u0000"}\n{"n": '
    + b"9" * 5000
    + b"}\n"
    + b"[" * 100_000
    + b'\n{"text": 7}\n'
)


def test_bad_lines_of_jsonl_are_named_with_their_offset(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"txt": 1}\n{"text": "caf\xe9"}\nnot json\n' + UNSPEAKABLE)
    said = []
    assert list(corpus.documents([("x.jsonl", path)], said.append)) == ["fine"]
    assert "byte 17" in said[0] and "byte 41 (0xe9)" in said[1] and "byte 45" in said[2]
    assert len(said) == 3 + UNSPEAKABLE.count(b"\n")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("cut.txt.gz", gzip.compress(b"hello " * 1000, mtime=0)[:-9], "cannot be read"),
        ("folder", None, "no .txt"),
        ("missing.txt", None, "no such file"),
    ],
)
def test_missing_and_damaged_input_is_named(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif name == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match=message) as error:
        list(corpus.documents(corpus.find_files(str(path), tmp_path), pytest.fail))
    assert name in str(error.value)


def test_downloads_are_checked(tmp_path):
    source = tmp_path / "page.txt"
    source.write_text("some text\n" * 50)
    url = source.as_uri()
    assert corpus.download(url, None, tmp_path).read_text() == source.read_text()
    with pytest.raises(ValueError, match="SHA-256"):
        corpus.download(url, "0" * 64, tmp_path)
    with pytest.raises(ValueError, match="cannot be downloaded"):
        corpus.download((tmp_path / "nothing.txt").as_uri(), None, tmp_path)
