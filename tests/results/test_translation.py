"""The study of translation on little: every row is written, and a second call measures nothing again."""

import json

import pytest

from results import translation


def test_all_rows_and_the_picture_are_written_once(tmp_path, monkeypatch, capsys, rendered):
    monkeypatch.setattr(translation, "SIZE", ["--batch-size", "4", "--set", "n_layers=1", "d_model=16"])
    monkeypatch.setattr(translation, "LONGEST", 4)
    words = ["eins", "zwei", "drei", "vier", "sechs"]
    lines = [f"{a} {b}\t{b} {a}\n" for a in words for b in words]
    for name, some in (("train", lines[:15]), ("val", lines[15:20]), ("test", lines[20:])):
        (tmp_path / f"{name}.tsv").write_text("".join(some), encoding="utf-8")
    argv = [x for name in ("train", "val", "test") for x in (f"--{name}", str(tmp_path / f"{name}.tsv"))]
    argv += ["--out", str(tmp_path / "out.json"), "--work", str(tmp_path / "work"), "--steps", "2"]
    translation.main(argv)
    found = (tmp_path / "out.json").read_text(encoding="utf-8")
    rows = json.loads(found)["rows"]
    assert [(row["model"], row.get("beams")) for row in rows] == [
        ("none", None),
        *((name, beams) for name in ("last step", "best step") for beams in (1, 4)),
    ]
    assert all(row["of"] == 5 for row in rows) and rows[0]["bleu"] == pytest.approx(
        bleu_of_copies(lines[20:])
    )
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"

    monkeypatch.setattr(translation, "score", None)  # to call it would be an error
    translation.main(argv)
    assert (tmp_path / "out.json").read_text(encoding="utf-8") == found


def bleu_of_copies(lines: list[str]) -> float:
    """Return sacreBLEU's figure of the sources as translations."""
    sacrebleu = pytest.importorskip("sacrebleu")
    sources, targets = zip(*(line.rstrip("\n").split("\t") for line in lines), strict=True)
    return sacrebleu.corpus_bleu(list(sources), [list(targets)]).score
