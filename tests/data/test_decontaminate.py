"""Decontamination: items are found whole, inside other text, and if short; common phrases are not."""

import json

import pytest

from data import decontaminate
from data.decontaminate import as_item
from data.records import refuse

LONG = (
    "Which river flows through the old town before it reaches the harbour and the grey sea beyond the hills?"
)
SHORT = "What is the capital of Elbonia?"


def found(item: str, text: str) -> bool:
    return bool(len(decontaminate.Search([as_item("i", item)]).found_in(text)))


def test_an_item_is_found_verbatim_inside_other_text_and_in_other_case_and_punctuation():
    for item in (LONG, SHORT):
        for text in (
            item,
            f"Before. {item} After it.",
            item.upper().replace("?", "!!"),
            item.replace(" ", "\n"),
        ):
            assert found(item, text), (item, text)
    assert found(LONG, "Once upon a time: " + " ".join(LONG.split()[:13]))  # a run of 13 words is enough
    assert not found(LONG, " ".join(LONG.split()[:12]))


def test_a_short_item_needs_all_of_its_words_and_one_of_three_words_is_not_searched():
    assert not found(SHORT, "What is the capital of Freedonia?")
    assert (
        not found("Yes or no?", "Yes or no?")
        and as_item("i", "Yes or no?").report(set())["contaminated"] is None
    )


def test_items_of_all_lengths_are_searched_at_once_and_reported():
    items = [
        as_item("long", LONG),
        as_item("short", SHORT),
        as_item("other", "Who wrote the song of the lark?"),
    ]
    search = decontaminate.Search(items)
    hits = set(search.found_in(f"{SHORT} {LONG}").tolist())
    rows = [item.report(hits) for item in items]
    assert [row["contaminated"] for row in rows] == [True, True, False]
    assert rows[0] == {"item": "long", "words": 19, "n_grams": 7, "found": 7, "contaminated": True}
    assert decontaminate.Search([]).found_in(LONG).size == 0


def test_a_phrase_in_many_documents_is_common():
    search = decontaminate.Search([as_item("i", SHORT)])
    hits = [search.found_in(f"{i} {SHORT}") for i in range(11)]
    assert decontaminate.common(hits) == set(hits[0].tolist()) and not decontaminate.common(hits[:10])


def test_items_are_read_from_chosen_fields_or_from_all_strings_of_a_record(tmp_path):
    path = tmp_path / "items.jsonl"
    record = {"question": SHORT, "choices": ["Alpha", "Beta"], "answer": 1}
    path.write_text(json.dumps(record) + "\n")
    assert decontaminate.read_items(path, [], refuse)[0].n_words == 8
    assert decontaminate.read_items(path, ["question"], refuse)[0].n_words == 6
    with pytest.raises(ValueError, match=r"line 1.*no field 'text'.*--item-fields"):
        decontaminate.read_items(path, ["text"], refuse)
    path.write_text("")
    with pytest.raises(ValueError, match="no test items"):
        decontaminate.read_items(path, [], refuse)
    with pytest.raises(ValueError, match="expected a file of test items"):
        decontaminate.read_items(tmp_path / "items.txt", [], refuse)
