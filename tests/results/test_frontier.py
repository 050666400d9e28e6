"""The study of the frontier: runs that are in the file are kept, and those of further methods are added."""

from contextlib import nullcontext
from types import SimpleNamespace

from results import frontier


def test_methods_are_added_to_the_file_and_the_table_has_the_order_of_methods(tmp_path, monkeypatch, capsys):
    ran, drawn = [], []

    def run(job):
        name, beta, seed, _ = job
        ran.append(name)
        return {"method": name, "beta": beta, "seed": seed, "reward": 3.0, "kl": 0.5, "share": 0.9}

    context = SimpleNamespace(Pool=lambda n_workers: nullcontext(SimpleNamespace(imap=map)))
    monkeypatch.setattr(frontier.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(frontier, "run", run)
    monkeypatch.setattr(frontier.frontier, "draw", lambda path, points: drawn.append(points))
    for methods in (["KTO"], ["KTO"], ["PPO"]):
        frontier.main(["--only", *methods, "--out", str(tmp_path / "frontier.json")])
    assert ran == ["KTO"] * 6 + ["PPO"] * 6
    assert [label for label, _, _ in drawn[-1]] == ["PPO, beta 1 and 0.5"] * 6 + ["KTO, beta 1 and 0.5"] * 6
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-4:]] == [
        ["PPO", "1"], ["PPO", "0.5"], ["KTO", "1"], ["KTO", "0.5"]
    ]  # fmt: skip
