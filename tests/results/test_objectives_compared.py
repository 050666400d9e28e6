"""The comparison of objectives continues after an interruption."""

from argparse import Namespace
from types import SimpleNamespace

import pytest

from results import objectives_compared


def test_runs_that_have_ended_are_kept_and_do_not_run_again(tmp_path, monkeypatch):
    jobs = [
        Namespace(architecture=name, objective="LM", rate=0.1, seed=0, budget=1.0, tuning=1)
        for name in ("prefix LM", "causal LM", "shared stacks")
    ]
    ran = []

    def run(job):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(job.architecture)
        return vars(job) | {"gaps": len(ran) / 3}

    pool = SimpleNamespace(imap_unordered=map)
    monkeypatch.setattr(objectives_compared, "run", run)
    with pytest.raises(KeyboardInterrupt):
        objectives_compared.run_all(pool, jobs, tmp_path / "ended.json")
    monkeypatch.setattr(
        objectives_compared, "run", lambda job: ran.append(job.architecture) or vars(job) | {"gaps": 1.0}
    )
    results = objectives_compared.run_all(pool, jobs, tmp_path / "ended.json")
    assert ran == ["prefix LM", "causal LM", "shared stacks"]
    assert [row["gaps"] for row in results] == [1 / 3, 2 / 3, 1.0]
