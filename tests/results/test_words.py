"""The questions and pairs of results/words.py."""

import random

import pytest

from results import words


def test_questions_are_complete_if_the_last_file_is_there(tmp_path, monkeypatch):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "host, port"}]
    monkeypatch.setattr(words, "questions", lambda: [turns] * 96)
    write, written = words.write_lines, []

    def interrupted(path, records):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, records)

    monkeypatch.setattr(words, "write_lines", interrupted)
    with pytest.raises(KeyboardInterrupt):
        words.write_questions(tmp_path)
    assert not (tmp_path / "held_out.jsonl").exists()  # for which `stages` looks
    monkeypatch.setattr(words, "write_lines", write)
    words.write_questions(tmp_path)
    sizes = {part: len(words.read_lines(tmp_path / f"{part}.jsonl")) for part in set(words.PARTS)}
    assert sizes == {"tuning": 46, "rewards": 48, "held_out": 2}
    styles = {r["messages"][1]["content"] for r in words.read_lines(tmp_path / "tuning.jsonl")}
    assert styles == {"host, port", "The parameters are host, port.", "`host`, `port`"}


def test_a_mistake_changes_at_most_one_name_or_the_order():
    generator, names = random.Random(0), ["a", "b", "c"]
    for _ in range(200):
        found = words.corrupted(names, ["d"], generator)
        if len(found) == 3:
            n_changed = sum(x != y for x, y in zip(found, names, strict=True))
            assert n_changed <= 1 or (n_changed == 2 and sorted(found) == names)
        else:
            short, long = sorted((found, names), key=len)
            assert len(long) == len(short) + 1 and any(
                long[:i] + long[i + 1 :] == short for i in range(len(long))
            )
