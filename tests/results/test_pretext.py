"""The study of images without labels on stand-ins for its runs."""

import json
from types import SimpleNamespace

from results import pretext


def test_runs_with_other_flags_have_other_folders_and_rows_are_kept(tmp_path, monkeypatch):
    flags_of, folders = {}, []

    def run(out, seed, *flags):
        folders.append(out)
        assert flags_of.setdefault(out, flags) == flags
        return {"val_loss": 1.0, "val_accuracy": 0.5}

    monkeypatch.setattr(pretext, "run", run)
    monkeypatch.setattr(pretext, "prepare", lambda *_, **__: SimpleNamespace(train=None, val=None))
    encoder = SimpleNamespace(config=SimpleNamespace(size=(32, 32)))
    monkeypatch.setattr(pretext.probe, "encoder_in", lambda directory: encoder)
    monkeypatch.setattr(pretext.probe, "table", lambda *_: {"trained": (0.5, 0.5)})
    argv = ["--parts", "encoders", "ratio", "targets", "--seeds", "0"]
    argv += ["--out", str(tmp_path / "out.json"), "--work", str(tmp_path)]
    pretext.main(argv)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == len(pretext.ENCODERS) + len(pretext.RATIOS) + len(pretext.TARGETS)
    n = len(folders)
    pretext.main(argv)
    assert len(folders) == n
