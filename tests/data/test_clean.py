"""Cleaning: everything that leaves is counted, and a command that is killed goes on to the same bytes."""

import gzip
import importlib.util
import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
from conftest import run_command

from data import clean, parts
from data.parts import write_records
from formats import atomic


def words(generator: random.Random, n: int) -> str:
    return " ".join(
        f"{generator.choice('abcdefgh')}{generator.choice('ijklmnop')}{generator.randrange(400)}"
        for _ in range(n)
    )


@pytest.fixture
def crawl(tmp_path, monkeypatch) -> Path:
    """Return a file of 60 records in several parts: copies, near copies, shared passages, lines and dirt."""
    monkeypatch.setattr(parts, "PART_BYTES", 12_000)
    monkeypatch.chdir(tmp_path)
    generator, records = random.Random(0), []
    menu = "home products about us contact and a search field"
    for i in range(60):
        text = words(generator, generator.randrange(60, 150))
        old = records[generator.randrange(len(records))]["text"] if i > 4 else ""
        if i % 10 == 5:
            text = old
        elif i % 10 == 6:
            text = old.replace(" ", " new ", 1)
        elif i % 10 == 7:
            text += " " + " ".join(old.split()[:55])
        if i % 3 == 0:
            text = f"{menu}\n{text}"
        records.append({"id": i, "text": text, "meta": {"tags": ["x", str(i)], "score": i / 7}})
    records[30]["text"], records[31]["text"] = "", " \n"
    lines = [json.dumps(record) for record in records]
    lines[40], lines[41] = "{broken", '{"id": 41}'
    path = tmp_path / "crawl.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


ALL = ["--preset", "none", "--stages", "exact", "lines", "near", "substrings", "--keep-rejected"]


def contents(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()
    }


def rows_of(folder: Path) -> list[dict]:
    return [
        json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()
    ]


def test_every_document_and_byte_is_kept_or_counted_with_its_reason(crawl, capsys):
    clean.main([str(crawl), "--out", "out", *ALL])
    report = json.loads(Path("out/report.json").read_text())["stages"]
    assert list(report) == ["read", "exact", "lines", "near", "substrings"]
    previous = None
    for stage in report.values():
        for unit, kind in (("documents", "rejected"), ("bytes", "bytes")):
            gone = sum(reason[kind] for reason in stage["reasons"].values())
            assert stage["before"][unit] - gone == stage["after"][unit]
        assert previous in (None, stage["before"])
        previous = stage["after"]
    reasons = {reason: row for stage in report.values() for reason, row in stage["reasons"].items()}
    assert reasons["unreadable"]["rejected"] == 2 and reasons["empty"]["rejected"] == 2
    assert reasons["exact duplicate"]["rejected"] >= 3 and reasons["near duplicate"]["rejected"] >= 3
    assert reasons["repeated line"]["shortened"] >= 15 and reasons["repeated substring"]["shortened"] >= 2

    # What stays are the records as they came, with their fields in order; what leaves names what it is like.
    kept, rejected = rows_of(Path("out")), rows_of(Path("out/rejected"))
    source = {row["id"]: row for row in map(json.loads, crawl.read_text().splitlines()[:40])}
    assert len(kept) == report["substrings"]["after"]["documents"]
    for row in kept:
        if row["id"] in source:
            assert list(row) == ["id", "text", "meta"] and row["meta"] == source[row["id"]]["meta"]
    assert sum(len(row["text"].encode()) for row in kept) == report["substrings"]["after"]["bytes"]
    near = [row for row in rejected if row["reason"] == "near duplicate"]
    assert near and all("crawl.jsonl, line" in row["like"] and row["similarity"] >= 0.75 for row in near)
    assert any("{broken" in row["place"] for row in rejected)
    assert "near duplicate" in capsys.readouterr().out

    # Started again, it prints the same report and writes nothing.
    before = contents(Path("out"))
    clean.main([str(crawl), "--out", "out", *ALL])
    assert contents(Path("out")) == before


def killed_at(argv: list[str], n: int, monkeypatch) -> int:
    """Run the command in another process that dies at the n-th file it writes, and return its exit code."""
    pid = os.fork()
    if pid == 0:
        sync, count = atomic.sync, iter(range(1, 10_000))
        atomic.sync = lambda path: os._exit(9) if next(count) == n else sync(path)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        clean.main(argv)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_file_it_goes_on_to_the_same_bytes(crawl, monkeypatch):
    argv = [str(crawl), *ALL]
    clean.main([*argv, "--out", "whole"])
    expected = contents(Path("whole"))
    n, deaths = 1, 0
    while killed_at([*argv, "--out", "cut"], n, monkeypatch) == 9:
        deaths += 1
        killed_at([*argv, "--out", "cut"], 3, monkeypatch)  # and soon once more
        clean.main([*argv, "--out", "cut"])
        assert contents(Path("cut")) == expected, n
        shutil.rmtree("cut")
        n += 7
    assert deaths >= 12


def test_several_processes_write_the_same_bytes(crawl):
    clean.main([str(crawl), "--out", "one", *ALL])
    clean.main([str(crawl), "--out", "two", *ALL, "--workers", "2"])
    assert contents(Path("one")) == contents(Path("two"))


def test_a_ray_cluster_of_two_workers_writes_the_same_bytes(crawl, ray, monkeypatch):
    clean.main([str(crawl), "--out", "one", *ALL])
    on_ray = [str(crawl), "--out", "two", *ALL, "--workers", "2", "--engine", "ray"]
    with monkeypatch.context() as patch:  # interrupted between two stages, it goes on
        patch.setitem(clean.cleaning_stages.DECIDE, "near", None)
        with pytest.raises(TypeError):
            clean.main(on_ray)
    clean.main(on_ray)
    assert contents(Path("one")) == contents(Path("two"))
    assert ray.cluster_resources()["CPU"] == 2


def test_work_on_a_ray_cluster_is_done_by_other_processes_and_its_errors_come_as_they_are(ray, tmp_path):
    def write_process(number: int) -> None:
        if number == 3:
            raise OSError(28, "No space left on device", f"part {number}")
        (tmp_path / str(number)).write_text(str(os.getpid()))

    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: 'part 3'$"):
        parts.each(write_process, 4, "write", "ray", 2)
    assert str(os.getpid()) not in [(tmp_path / str(i)).read_text() for i in range(3)]


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_parts_in_each_format_are_read_again_as_the_same_records(crawl, suffix):
    pytest.importorskip({"jsonl.zst": "zstandard", "parquet": "pyarrow"}.get(suffix, "gzip"))
    clean.main([str(crawl), "--out", "plain", "--preset", "none", "--stages", "exact"])
    clean.main([str(crawl), "--out", "packed", "--preset", "none", "--stages", "exact", "--format", suffix])
    clean.main([f"packed/part-*.{suffix}", "--out", "again", "--preset", "none", "--stages"])
    records = rows_of(Path("plain"))
    assert rows_of(Path("again")) == records and len(records) > 40


def test_lines_are_json_whatever_the_records_hold(tmp_path):
    text = "NaN is no number; é \ud800"
    row = {"text": text, "score": float("nan"), "meta": {"loss": [1.5, float("-inf")]}}
    write_records(tmp_path / "part.jsonl", [row])
    (line,) = (tmp_path / "part.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "text": text,
        "score": None,
        "meta": {"loss": [1.5, None]},
    }


def test_parquet_has_the_fields_of_all_records(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [{"text": "one"}, {"text": "two", "url": "u"}, {"label": 1, "text": "three"}]
    write_records(tmp_path / "part.parquet", records)
    rows = parquet.read_table(tmp_path / "part.parquet").to_pylist()
    assert [{name: value for name, value in row.items() if value is not None} for row in rows] == records
    for values in (["text", [1]], [2**70], ["\ud800"]):
        with pytest.raises(ValueError, match="fields do not fit into columns"):
            write_records(tmp_path / "part.parquet", [{"a": value} for value in values])


def test_test_items_are_reported_and_the_documents_that_hold_them_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = random.Random(1)
    items = [words(generator, n) for n in (30, 7, 3)]
    texts = [words(generator, 80), f"{words(generator, 40)} {items[0]}", f"x {items[1]} y", items[2] * 3]
    Path("web.txt").write_text("nothing")
    Path("web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Path("test.jsonl").write_text("".join(json.dumps({"q": item, "label": 1}) + "\n" for item in items))
    shared = ["web.jsonl", "--preset", "none", "--stages", "--against", "test.jsonl"]
    clean.main([*shared, "--out", "removed", "--keep-rejected"])
    clean.main([*shared, "--out", "reported", "--contaminated", "report", "--item-fields", "q"])
    found = [row["contaminated"] for row in rows_of(Path("removed")) if "item" in row]
    assert found == [True, True, None]
    assert Path("removed/items.jsonl").read_text() == Path("reported/items.jsonl").read_text()
    assert [row["text"] for row in rows_of(Path("removed")) if "text" in row] == [texts[0], texts[3]]
    assert [row["text"] for row in rows_of(Path("reported")) if "text" in row] == texts
    Path("test.jsonl").write_text(json.dumps({"q": items[1]}) + "\n")  # the result is of the other items
    with pytest.raises(ValueError, match="--out removed: was made with other test items"):
        clean.main([*shared, "--out", "removed", "--keep-rejected"])
    assert {row["like"] for row in rows_of(Path("removed/rejected"))} == {
        "test.jsonl, line 1: byte 0",
        "test.jsonl, line 2: byte 198",
    }


def test_files_of_text_and_packed_files_are_documents_too_and_one_letter_passes_every_stage(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("a" * 1_000_000)
    Path("texts/b.txt").write_text("zwölf Wörter 🎉")
    with gzip.open("texts/c.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"text": "今天天气很好"}) + "\n" + json.dumps({"text": "yes"}) + "\n")
    clean.main(["texts", "--out", "out", *ALL])
    assert rows_of(Path("out"))[1:] == [
        {"source": "b.txt", "text": "zwölf Wörter 🎉"},
        {"text": "今天天气很好"},
        {"text": "yes"},
    ]
    assert rows_of(Path("out"))[0]["text"] == "a" * 1_000_000
    clean.main(["texts", "--out", "rules", "--preset", "code"])
    assert [row["source"] for row in rows_of(Path("rules")) if "source" in row] == ["b.txt"]


def refused(*argv: str) -> str:
    ended = run_command("-m", "data.clean", *argv)
    assert ended.code == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    return ended.err


def test_mistakes_are_one_line_before_any_work(crawl, monkeypatch):
    crawl = str(crawl)
    assert "--similarity 0.0: expected a number above 0" in refused(crawl, "--out", "o", "--similarity", "0")
    assert "--rows 0: expected at least 1" in refused(crawl, "--out", "o", "--rows", "0")
    with pytest.raises(SystemExit):  # such as a variable of the shell that is empty
        clean.main([crawl, "--out", "o", "--against"])
    assert "no field 'q'" in refused(crawl, "--out", "o", "--against", crawl, "--item-fields", "q")
    assert "input nowhere: no such file" in refused("nowhere", "--out", "o")
    assert "no field 'body'" in refused(crawl, "--out", "o", "--text-field", "body")
    shutil.rmtree("o")
    # Optional packages that are missing are refused by name.
    for package in ("ftfy", "trafilatura"):
        monkeypatch.setitem(sys.modules, package, None)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    assert "--html needs trafilatura: pip install trafilatura" in refused(crawl, "--out", "o", "--html")
    assert "--repair needs ftfy" in refused(crawl, "--out", "o", "--repair")
    assert "--engine ray needs Ray" in refused(crawl, "--out", "o", "--engine", "ray")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert ".zst needs zstandard" in refused(crawl, "--out", "o", "--format", "jsonl.zst")
    # A folder that holds something else stays as it is.
    clean.main([crawl, "--out", "o", "--preset", "none"])
    assert "was made with other settings" in refused(crawl, "--out", "o", "--preset", "code")
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    assert "holds notes.txt already" in refused(crawl, "--out", "mine")


def test_pages_and_wrong_characters_are_mended_by_libraries(tmp_path, monkeypatch):
    pytest.importorskip("trafilatura")
    pytest.importorskip("ftfy")
    monkeypatch.chdir(tmp_path)
    body = "".join(
        f"<p>The cafÃ© number {i} opens in the morning and has good bread to eat.</p>" for i in range(9)
    )
    page = f"<html><body><nav><a href='/'>Home</a></nav><article><h1>Bread</h1>{body}</article></body></html>"
    Path("web.jsonl").write_text(
        json.dumps({"text": page}) + "\n" + json.dumps({"text": "<html></html>"}) + "\n"
    )
    clean.main(["web.jsonl", "--out", "out", "--html", "--repair", "--preset", "none", "--keep-rejected"])
    (row,) = rows_of(Path("out"))
    assert "The café number 3" in row["text"] and "Home" not in row["text"] and "<p>" not in row["text"]
    assert [row["reason"] for row in rows_of(Path("out/rejected"))] == ["html: no main text"]
