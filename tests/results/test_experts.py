"""The study of experts: a second start repeats nothing, and other steps are refused."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from results import experts


def test_a_second_start_repeats_nothing_and_other_steps_are_refused(tmp_path, monkeypatch, capsys):
    ran = []

    def run(job):
        part, name, seed, steps, _ = job
        ran.append((part, name, seed, steps))
        last = {"loss": 4.0 + seed, "least": 0.5, "most": 2.0}
        return {"part": part, "name": name, "seed": seed, "curve": [last | {"flops": 1}], "last": last}

    pool = nullcontext(SimpleNamespace(imap=map))
    context = SimpleNamespace(Pool=lambda n_jobs: pool)
    monkeypatch.setattr(experts.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(experts.data.text, "prepare", lambda *_: None)
    monkeypatch.setattr(experts, "run", run)
    monkeypatch.setattr(experts, "plot", lambda results, path: None)
    out = tmp_path / "experts.json"
    flags = ["--seeds", "2", "--steps", "6", "--balance-steps", "5", "--out", str(out)]
    experts.main(flags)
    assert ran[0] == ("models", "dense", 0, 6) and ran[-1][0::3] == ("balance", 5) and len(ran) == 24
    assert "4.5000 (4.0000 to 5.0000)" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["results"]) == 24
    experts.main(flags)
    assert len(ran) == 24
    with pytest.raises(ValueError, match="made with steps 6, and this call has 7"):
        experts.main(["--steps", "7", *flags[4:]])
