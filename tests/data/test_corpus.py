"""Corpora: what is found, what is read from it, what is refused."""

import glob
import gzip
import os
from pathlib import Path

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


def names(what, cache, notify=pytest.fail):
    return [name for name, _ in corpus.find_files(str(what), cache, notify)]


def test_suffixes_in_capitals_are_text(tmp_path):
    for name in ("A.TXT", "b.Md", "c.JSONL.GZ"):
        (tmp_path / name).write_text("x")
    assert names(tmp_path, tmp_path) == ["A.TXT", "b.Md", "c.JSONL.GZ"]


def test_files_of_other_kinds_are_counted_and_a_way_to_read_them_is_named(tmp_path):
    for name in ("a.txt", "b.PNG", "c.png", "d.json", "LICENSE"):
        (tmp_path / name).write_text("x")
    said = []
    assert names(tmp_path, tmp_path, said.append) == ["a.txt"]
    assert said == [
        f"left out: 4 files in {tmp_path} that are not .txt, .md, .py, .jsonl "
        f"(2 .png, 1 .json, 1 no suffix); a glob reads them: '{tmp_path.as_posix()}/**/*.json'"
    ]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"no \.txt, .* there are 2 \.png, .*a glob reads them"):
        names(tmp_path, tmp_path)


@pytest.fixture
def linked(tmp_path):
    """A folder with links: to a folder elsewhere, to itself, to a file of its own, and in a circle of two."""
    (tmp_path / "mix" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("mix/b.txt", "mix/sub/c.txt", "elsewhere/z.txt"):
        (tmp_path / name).write_text(name)
    links = {"link": "../elsewhere", "loop": ".", "a.txt": "b.txt", "aaa": "sub", "sub/up": ".."}
    for name, target in links.items():
        (tmp_path / "mix" / name).symlink_to(target)
    (tmp_path / "elsewhere" / "back").symlink_to("../mix")
    return tmp_path / "mix"


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "**", "**/**/*.txt"])
def test_links_are_followed_and_each_real_file_comes_once(pattern, linked, tmp_path):
    found = corpus.find_files(str(linked / pattern), tmp_path)
    inside = [path.relative_to(linked).as_posix() for _, path in found]
    own = ["b.txt", "link/z.txt", "sub/c.txt"]  # not the names that are links
    assert inside == (own if pattern in ("", "**") else inside) and len(inside) == 3
    assert sorted(path.resolve().name for _, path in found) == ["b.txt", "c.txt", "z.txt"]


def test_names_of_files_that_are_read_already_are_counted(linked, tmp_path):
    said = []
    names(linked, tmp_path, said.append)
    assert said == ["left out: 1 of 4 names, links to files that are read"]


def test_a_folder_of_links_only_is_read(linked, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "one").symlink_to(linked)
    assert names(tmp_path / "links", tmp_path, print) == ["one/b.txt", "one/link/z.txt", "one/sub/c.txt"]


@pytest.mark.parametrize("name", ["gone.txt", "self.txt"])
def test_a_link_to_nothing_is_named(name, tmp_path):
    (tmp_path / name).symlink_to("nowhere" if name == "gone.txt" else name)
    with pytest.raises(ValueError, match=rf"{name}: a link to \S+, which does not exist"):
        names(tmp_path, tmp_path)


def test_a_pattern_finds_what_glob_finds(tmp_path, monkeypatch):
    for name in ("a.txt", "x/b.txt", "x/y/c.txt", "x/.hidden/d.txt", ".e.txt", "[z]/f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("t")
    monkeypatch.chdir(tmp_path)
    patterns = ["*.txt", "**/*.txt", "**", "x/**", "x/**/c.txt", "*/**/*.txt", "x**/*.txt", "**/y/*", ".*"]
    patterns += [str(tmp_path / pattern) for pattern in patterns]
    for pattern in patterns:
        expected = sorted(Path(p).as_posix() for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
        assert expected
        assert names(pattern, tmp_path) == expected, pattern


@pytest.mark.parametrize(
    "what, message",
    [
        ("", "'': expected a file"),
        ("pipe", "pipe: a pipe; expected a file"),
        (os.devnull, "a device; expected"),
    ],
)
def test_what_cannot_be_read_twice_is_refused(what, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(ValueError, match=f"--data {message}" if what != os.devnull else message):
        corpus.find_files(what, tmp_path)


def test_downloads_are_checked(tmp_path):
    source = tmp_path / "page.txt"
    source.write_text("some text\n" * 50)
    url = source.as_uri()
    assert corpus.download(url, None, tmp_path).read_text() == source.read_text()
    with pytest.raises(ValueError, match="SHA-256"):
        corpus.download(url, "0" * 64, tmp_path)
    with pytest.raises(ValueError, match=r"--data \S+: cannot be downloaded"):
        corpus.download((tmp_path / "nothing.txt").as_uri(), None, tmp_path)
    with pytest.raises(ValueError, match=r"--val http://\S+: cannot be downloaded"):
        corpus.find_files("http://127.0.0.1:9/text.txt", tmp_path, flag="--val")


@pytest.mark.parametrize("end", ["café.txt", "a b.txt", "x" * 300, "é" * 300, "?q=é"])
def test_a_url_of_any_characters_and_length_is_asked_for(end, tmp_path):
    with pytest.raises(ValueError, match=r"--data http://\S+.*: cannot be downloaded .*refused"):
        corpus.find_files(f"http://127.0.0.1:9/{end}", tmp_path)


def test_a_download_whose_url_is_not_ascii_arrives(tmp_path):
    source = tmp_path / "café 1.txt"
    source.write_text("some text\n")
    found = corpus.download(f"file://{source}", None, tmp_path)
    assert found.read_text() == "some text\n" and found.name.endswith("-café 1.txt")


def test_what_is_no_url_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"--data http://\[::1/x: not a URL"):
        corpus.find_files("http://[::1/x", tmp_path)
