"""Planted dirt: what is planted is labelled, and the stages find it as they promise."""

import os
from pathlib import Path

from results import dirty_text


def test_the_stages_find_planted_dirt_and_take_nothing_clean():
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    texts = [path.read_text(encoding="utf-8")[:3000] for path in modules if path.stat().st_size > 3000][:72]
    found = dirty_text.measure(texts, seed=0)
    planted, taken, near = found["planted"], found["taken"], found["near"]
    assert planted["exact copy"] == 6 and planted["near copy"] == 12 and planted["licence"] == 36
    # Whole modules that hold test items or are copies go, all of them, and nothing that is clean.
    assert taken["exact"]["exact copy"] == 6 and set(taken["exact"]) <= {"exact copy", "near copy"}  # of J 1
    assert taken["decontaminate"] == {"item, 30 words": 2, "item, 6 words": 2}
    assert not any(stage.get("clean") or stage.get("licence") for stage in taken.values())
    assert taken["rules"]["junk, base64"] == planted["junk, base64"]
    assert (
        abs(near["found of these"] - near["expected"]) <= 3 * near["sigma"] and near["found below .75"] == 0
    )
    assert found["cut"]["licences"] == found["cut"]["of"] == 35
