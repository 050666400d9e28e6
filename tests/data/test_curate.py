"""Curating: every document is kept or counted with its reason; a killed command goes on to the same bytes."""

import json
import os
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import run_command

from data import curate, parts, selection
from data import quality_classifier as quality
from formats import atomic


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """Return a folder with two sources in several parts, and a classifier that tells them apart."""
    monkeypatch.setattr(parts, "PART_BYTES", 3000)
    monkeypatch.chdir(tmp_path)
    generator, texts = random.Random(0), {}
    for source, first in (("wiki", "a"), ("web", "b")):
        texts[source] = [
            " ".join(f"{generator.choice(first + 'cd')}{generator.choice('xyz')}" for _ in range(30 + i % 7))
            for i in range(40)
        ]
        lines = [json.dumps({"id": f"{source} {i}", "text": text}) for i, text in enumerate(texts[source])]
        if source == "web":
            lines[5] = "{broken"
        Path(f"{source}.jsonl").write_text("\n".join(lines) + "\n")
    x = quality.features(texts["wiki"] + texts["web"], n_features=1 << 10)
    labels = np.repeat([1.0, 0.0], [40, 40])
    quality.fit(x, labels, 1e-4, n_features=1 << 10).save(Path("quality"))
    return tmp_path


SOURCES = ["wiki=wiki.jsonl", "web=web.jsonl"]
ALL = [
    *SOURCES,
    "--keep-rejected",
    "--stage",
    "classifier=quality",
    "pareto=2",
    "--stage",
    "random",
    "top=0.75",
]
ALL += ["--mix", "wiki=0.5", "web=0.5", "--bytes", "9e3"]


def contents(out: str) -> dict[str, bytes]:
    paths = [path for path in sorted(Path(out).rglob("*")) if path.is_file()]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def rows_of(folder: str) -> list[dict]:
    paths = sorted(Path(folder).glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def source_of(row: dict) -> str:
    return row["id"].split()[0]


def test_every_document_is_kept_or_counted_by_reason_and_source(corpus, capsys):
    curate.main([*ALL, "--out", "out"])
    report = json.loads(Path("out/report.json").read_text())["stages"]
    assert list(report) == ["read", "1-classifier", "2-random", "mix"]
    previous = None
    for stage in report.values():
        for unit, kind in (("documents", "rejected"), ("bytes", "bytes")):
            gone = sum(reason[kind] for reason in stage["reasons"].values())
            assert stage["before"][unit] - gone == stage["after"][unit]
            assert sum(source[unit] for source in stage["sources"].values()) == stage["after"][unit]
        assert previous in (None, stage["before"])
        previous = stage["after"]
    assert report["read"]["sources"]["wiki"]["documents"] == 40
    assert report["read"]["sources"]["web"]["documents"] == 39
    assert report["2-random"]["after"]["documents"] == round(
        0.75 * report["1-classifier"]["after"]["documents"]
    )

    # What is written is the mixture, and each rejected document has its reason and its score.
    kept, rejected = rows_of("out"), rows_of("out/rejected")
    times = Counter(row["id"] for row in kept)
    for name in ("wiki", "web"):
        drawn, size = report["mix"]["mixture"][name], report["2-random"]["sources"][name]
        assert sum(n for key, n in times.items() if key.startswith(name)) == drawn["documents"]
        assert 4500 <= drawn["bytes"] < 4500 + 200 and drawn["epochs"] == drawn["bytes"] / size["bytes"]
        of_it = [n for key, n in times.items() if key.startswith(name)]
        assert max(of_it) <= int(drawn["epochs"]) + 1
    by_stage = Counter(row["stage"] for row in rejected)
    assert by_stage["read"] == 1 and by_stage["1-classifier"] > 5 and by_stage["2-random"] > 5
    assert all(row["reason"] for row in rejected)
    assert all("1-classifier" in row["scores"] for row in rejected if row["stage"] != "read")
    printed = capsys.readouterr().out
    assert "epochs" in printed and "not drawn" in printed and Path("out/composition.png").exists()

    # Started again, it prints the same and writes nothing.
    before = contents("out")
    curate.main([*ALL, "--out", "out"])
    assert contents("out") == before and capsys.readouterr().out == printed


def test_the_scores_and_the_choice_are_those_of_the_functions(corpus):
    curate.main([*SOURCES, "--out", "out", "--stage", "classifier=quality", "pareto=9", "--keep-scores"])
    lines = Path("wiki.jsonl").read_text().splitlines() + Path("web.jsonl").read_text().splitlines()
    texts = [json.loads(line) for line in lines if line != "{broken"]
    scores = quality.Classifier.load(Path("quality")).scores(row["text"] for row in texts)
    stays = selection.kept("pareto=9", scores, selection.draws((row["text"] for row in texts), 0))
    kept = rows_of("out")
    assert [row["id"] for row in kept] == [row["id"] for row, one in zip(texts, stays, strict=True) if one]
    assert np.allclose([row["scores"]["1-classifier"] for row in kept], scores[stays], rtol=0, atol=1e-15)
    # The classifier was fitted on these: more of the good source stays than of the other.
    sources = Counter(map(source_of, kept))
    assert sources["wiki"] > 3 * sources["web"]


def killed_at(argv: list[str], n: int) -> int:
    """Run the command in another process that dies at the n-th file it writes, and return its exit code."""
    pid = os.fork()
    if pid == 0:
        sync, count = atomic.sync, iter(range(1, 10_000))
        atomic.sync = lambda path: os._exit(9) if next(count) == n else sync(path)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        curate.main(argv)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_file_it_goes_on_to_the_same_bytes(corpus):
    curate.main([*ALL, "--out", "whole"])
    expected = contents("whole")
    n, deaths = 1, 0
    while killed_at([*ALL, "--out", "cut"], n) == 9:
        deaths += 1
        killed_at([*ALL, "--out", "cut"], 3)  # and soon once more
        curate.main([*ALL, "--out", "cut"])
        assert contents("cut") == expected, n
        shutil.rmtree("cut")
        n += 8
    assert deaths >= 4


def test_several_processes_write_the_same_bytes(corpus):
    curate.main([*ALL, "--out", "one"])
    curate.main([*ALL, "--out", "two", "--workers", "2"])
    assert contents("one") == contents("two")


def test_a_ray_cluster_of_two_workers_writes_the_same_bytes(corpus, ray, monkeypatch):
    curate.main([*ALL, "--out", "one"])
    on_ray = [*ALL, "--out", "two", "--workers", "2", "--engine", "ray"]
    monkeypatch.setattr(quality.Classifier, "scores", None)  # scores come from the processes of the cluster
    with monkeypatch.context() as patch:  # interrupted between the scores and the decision, it goes on
        patch.setattr(selection, "kept", None)
        with pytest.raises(TypeError):
            curate.main(on_ray)
    assert len(list(Path("two", "work", "1-classifier").glob("scores-*.npz"))) > 2
    curate.main(on_ray)
    assert contents("one") == contents("two")
    assert ray.cluster_resources()["CPU"] == 2


def test_models_give_scores(corpus):
    from data.tokenizer import get_tokenizer  # here, since the others need no PyTorch
    from gpt import GPT, Config

    tokenizer = get_tokenizer("bytes")
    GPT(Config(1, 2, 16, 16, tokenizer.n_vocab, 512, eos_token_id=256)).save_pretrained("model")
    tokenizer.save(Path("model"))
    few = Path("web.jsonl").read_text().splitlines()[:4]
    Path("few.jsonl").write_text("\n".join(few) + "\n")
    flags = ["--stage", "perplexity=model", "lowest=0.75", "--stage", "ask_llm=model", "top=0.67"]
    curate.main(["few.jsonl", "--out", "out", *flags, "--keep-scores", "--format", "jsonl.gz"])
    curate.main(["out/part-*.jsonl.gz", "--out", "again", "--stage", "random", "top=1"])
    kept = rows_of("again")
    assert len(kept) == 2
    for row in kept:
        assert 200 < row["scores"]["1-perplexity"] < 300  # of 257 tokens, by a model that has learned nothing
        assert 1 / 400 < row["scores"]["2-ask_llm"] < 1 / 150


def refused(*argv: str) -> str:
    ended = run_command("-m", "data.curate", *argv)
    assert ended.code == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    return ended.err


def test_mistakes_are_one_line_before_any_work(corpus):
    shared = [*SOURCES, "--out", "o"]
    assert "--stage fame: expected one of classifier=DIR" in refused(*shared, "--stage", "fame", "top=0.1")
    assert "--stage classifier: expected" in refused(*shared, "--stage", "classifier", "top=0.1")
    assert "rule 'best': expected pareto" in refused(*shared, "--stage", "random", "best")
    assert "scores from 0 to 1" in refused(*shared, "--stage", "perplexity=quality", "pareto=9")
    assert "wiki.jsonl: no classifier" in refused(*shared, "--stage", "classifier=wiki.jsonl", "top=0.5")
    assert "no weight for web" in refused(*shared, "--mix", "wiki=1")
    assert "expected one of them" in refused(*shared, "--mix", "wiki=1", "web=1", "--temperature", "0.5")
    assert "--temperature 2: expected" in refused(*shared, "--temperature", "2")
    assert "--bytes is of a mixture" in refused(*shared, "--bytes", "10")
    assert "--workers 0: expected at least 1" in refused(*shared, "--workers", "0")
    assert "input nowhere: no such file" in refused("wiki=nowhere", "--out", "o")
    assert "input =web.jsonl: expected NAME=WHAT" in refused("=web.jsonl", "--out", "o")
    assert not Path("o").exists()
    # A rule that leaves nothing, and a folder that was made with other flags.
    assert "no document stays; the scores are from" in refused(
        *shared, "--stage", "classifier=quality", "least=2"
    )
    assert "was made with other stages" in refused(*shared, "--stage", "random", "top=0.5")
