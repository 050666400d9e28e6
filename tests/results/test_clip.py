"""The figures of CLIP's runs: those of other parts and seeds stay in the file."""

import json

from results import clip


def test_a_call_for_one_part_keeps_the_figures_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "figures_of", lambda work, part, name, seed: {"loss": float(seed)})
    out = tmp_path / "clip.json"
    clip.main(["--seeds", "0", "1", "--out", str(out)])
    clip.main(["--parts", "objectives", "--seeds", "0", "--out", str(out)])
    clip.main(["--parts", "glyphs", "--seeds", "2", "--out", str(out)])
    figures = json.loads(out.read_text())
    assert figures["glyphs, clip"] == {"0": {"loss": 0.0}, "1": {"loss": 1.0}, "2": {"loss": 2.0}}
    assert figures["scenes, clip"].keys() == {"0", "1"} and "objectives, adamw" in figures
