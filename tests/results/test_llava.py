"""The figures of LLaVA: those of other seeds in the file stay, those of other scenes are refused."""

import json

import pytest

from results import llava


def test_a_call_for_one_seed_keeps_the_figures_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(llava, "figures_of", lambda work, name, seed, steps, n: {"loss": seed})
    out = tmp_path / "out.json"
    for seed in ("0", "1"):
        llava.main(["--seeds", seed, "--out", str(out)])
    found = json.loads(out.read_text())
    assert [found[name] for name in llava.RUNS] == 3 * [{"0": {"loss": 0}, "1": {"loss": 1}}]
    with pytest.raises(ValueError, match="holds figures of --scenes 250"):
        llava.main(["--scenes", "3", "--out", str(out)])
