"""Tests of data/preferences.py: the formats that are read, the ids of a pair, and what is left out."""

import json
from collections import Counter

import numpy as np
import pytest

from data import preferences
from data.preferences import Preference, to_preference
from data.tokenizer import get_tokenizer
from formats.chat_template import end_id, prompt_tokens

BYTES = get_tokenizer("bytes")
ASKED = [{"role": "user", "content": "2+2?"}]
PAIR = Preference(ASKED, ("4", "5"))


def said(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


RECORDS = {
    "text": {"prompt": "2+2?", "chosen": "4", "rejected": "5", "other": 1},
    "a question": {"question": "2+2?", "chosen": "4", "rejected": "5"},
    "answers as messages": {
        "prompt": said("2+2?"),
        "chosen": said("", "4")[1:],
        "rejected": said("", "5")[1:],
    },
    "one message": {"prompt": "2+2?", "chosen": said("", "4")[1], "rejected": said("", "5")[1]},
    "the prompt repeated": {"prompt": "2+2?", "chosen": said("2+2?", "4"), "rejected": said("2+2?", "5")},
    "no prompt of its own": {"chosen": said("2+2?", "4"), "rejected": said("2+2?", "5")},
    "instructions": {"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "2+2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    },
    "transcripts": {
        "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4",
        "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5",
    },
    "a transcript as the prompt": {
        "prompt": "\n\nHuman: 2+2?\n\nAssistant:",
        "chosen": "4",
        "rejected": "5",
    },
    "a transcript as the prompt, repeated": {
        "prompt": "\n\nHuman: 2+2?\n\nAssistant:",
        "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4",
        "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5",
    },
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_pair_is_read_in_each_format(name):
    assert to_preference(RECORDS[name]) == PAIR


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "2+2?", "completion": "4", "label": True},
        {"prompt": said("2+2?"), "completion": said("", "4")[1:], "label": 1},
        {"messages": said("2+2?", "4"), "label": "true"},
    ],
)
def test_a_labelled_answer_is_read_in_each_format(record):
    assert to_preference(record) == Preference(ASKED, ("4",), True)
    assert to_preference(record | {"label": False}).label is False


def test_the_shared_turns_of_two_transcripts_are_the_prompt():
    head = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 2+2?\n\nAssistant:"
    found = to_preference({"chosen": f"{head} 4", "rejected": f"{head} 5"})
    assert found == Preference(said("Hi", "Hello", "2+2?"), ("4", "5"))


@pytest.mark.parametrize("name", RECORDS)
def test_the_system_field_of_a_record_begins_its_prompt(name):
    system = {"role": "system", "content": "Be brief."}
    found = to_preference(RECORDS[name] | {"system": "Be brief."})
    assert found == PAIR._replace(prompt=[system, *ASKED])
    assert (
        to_preference(RECORDS[name] | {"system": ""})
        == to_preference(RECORDS[name] | {"system": None})
        == PAIR
    )


def test_a_system_message_in_the_prompt_goes_before_the_system_field():
    prompt = [{"role": "system", "content": "Own."}, *ASKED]
    record = {"prompt": prompt, "chosen": "4", "rejected": "5", "system": "Other."}
    assert to_preference(record).prompt == prompt


@pytest.mark.parametrize(
    "record, problem",
    [
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5", "system": 3}, "system 3: expected a text"),
        ({"prompt": "2+2?", "chosen": "4"}, "no field 'rejected', it has 'prompt', 'chosen'"),
        ({"prompt": "2+2?", "completion": "4", "label": "maybe"}, "label 'maybe': expected true or false"),
        ({"chosen": "4", "rejected": "5"}, "expected a transcript"),
        ({"chosen": said("a", "4"), "rejected": said("b", "5")}, "differ before their last message"),
        ({"prompt": "2+2?", "chosen": 4, "rejected": "5"}, "expected {\"prompt\", \"chosen\""),
        ({"chosen": said("a", 4), "rejected": said("a", "5")}, "assistant: 4: expected a string"),
        ([1], "expected {\"prompt\", \"chosen\""),
        ({"chosen": [], "rejected": []}, "chosen: no messages; expected {\"prompt\""),
        ({"instruction": ["a"], "input": "b", "chosen": "4", "rejected": "5"}, "['a'], input 'b': "),
    ],
)  # fmt: skip
def test_a_record_of_no_known_form_is_refused(record, problem):
    with pytest.raises(ValueError) as error:
        to_preference(record)
    assert problem in str(error.value)


def test_the_ids_of_a_prompt_are_those_from_which_a_model_generates():
    example = preferences.as_example(PAIR, BYTES)
    assert example.prompt.tolist() == prompt_tokens(ASKED, BYTES)
    assert [answer.tolist() for answer in example.answers] == [
        [*BYTES.encode(text), BYTES.eot_id] for text in "45"
    ]


def test_an_answer_that_changes_the_tokens_of_its_prompt_is_refused(monkeypatch):
    # As where a tokenizer merges the last character of the prompt with the first of the answer.
    def merging(messages, tokenizer):
        prompt = prompt_tokens(messages[:-1], tokenizer)
        return [*prompt[:-1], 65, tokenizer.eot_id], None

    monkeypatch.setattr(preferences, "render", merging)
    with pytest.raises(ValueError, match="'4': changes the tokens of its prompt"):
        preferences.as_example(PAIR, BYTES)


def test_an_answer_has_one_end_token_in_chatml_too():
    chatml = get_tokenizer("bytes")
    n = chatml.n_vocab
    chatml.special_tokens = chatml.special_tokens | {"<|im_start|>": n, "<|im_end|>": n + 1}
    example = preferences.as_example(PAIR, chatml)
    assert example.prompt.tolist() == prompt_tokens(ASKED, chatml)
    for answer, text in zip(example.answers, "45", strict=True):
        assert answer.tolist() == [*chatml.encode(text), end_id(chatml)]


def test_what_cannot_be_used_is_left_out_and_counted_and_nothing_is_cut():
    fits = Preference(said("2+2?"), ("four", "five"))
    n = len(preferences.as_example(fits, BYTES).prompt) + 5  # with the end token
    cases = [
        fits,
        Preference(said("2+2?"), ("four", "four")),
        Preference(said("2+2?"), ("four", " \n")),
        Preference(said("2+2?"), ("", "five")),
        Preference(said("2+2?"), ("four", "fiver")),
        Preference(said("x" * n), ("four", "five")),
    ]
    counts = Counter()
    (example,) = preferences.examples_in(cases, BYTES, n, counts)
    assert len(example.prompt) + len(example.answers[0]) == n
    assert counts == {
        "with two equal answers": 1,
        "with an empty answer": 2,
        f"longer than {n} tokens": 1,
        f"with a prompt that fills {n} tokens": 1,
    }


def test_a_row_has_answers_under_its_mask_and_padding_behind():
    pair = Preference(said("2+2?"), ("four", "5"))
    example = preferences.as_example(pair, BYTES)
    row = preferences.PreferenceRows([example])[0]
    n = len(example.prompt)
    assert row["tokens"].shape == row["mask"].shape == (2, n + 5)
    for tokens, mask, answer in zip(row["tokens"], row["mask"], example.answers, strict=True):
        assert tokens[:n].tolist() == example.prompt.tolist() and tokens[mask].tolist() == answer.tolist()
        assert mask.sum() == len(answer) and mask.argmax() == n


def test_a_mismatched_answer_belongs_to_another_prompt():
    examples = [
        preferences.as_example(Preference(said(question), (answer,), True), BYTES)
        for question, answer in (("a", "1"), ("a", "2"), ("b", "3"))
    ]
    found = [BYTES.decode(e.answers[1][:-1].tolist()) for e in preferences.mismatched(examples, 100)]
    assert found[:2] == ["3", "3"] and found[2] in ("1", "2")


@pytest.mark.parametrize(
    "n, counted", [(1, "none of the 0 others"), (2, "none of the 1 others fits into --seq-len 4")]
)
def test_an_answer_without_a_mismatched_one_is_refused(n, counted):
    pairs = [Preference(said(question), ("an answer",), True) for question in "ab"[:n]]
    with pytest.raises(ValueError, match=counted):
        preferences.mismatched([preferences.as_example(pair, BYTES) for pair in pairs], 4)


def test_with_one_prompt_each_answer_is_matched_once_and_never_with_itself():
    examples = [
        preferences.as_example(Preference(ASKED, (answer,), True), BYTES) for answer in ("1", "2", "3")
    ]
    found = [BYTES.decode(e.answers[1][:-1].tolist()) for e in preferences.mismatched(examples, 100)]
    assert sorted(found) == ["1", "2", "3"]
    assert all(own != other for own, other in zip(("1", "2", "3"), found, strict=True))


def test_chosen_and_rejected_answers_are_matched_alike():
    # In the order of the data the next answer to another prompt would always be a chosen one.
    both = [Preference(said(f"{i}?"), ("yes", "no")) for i in range(100)]
    single = preferences.single_answers([preferences.as_example(pair, BYTES) for pair in both])
    found = [BYTES.decode(e.answers[1][:-1].tolist()) for e in preferences.mismatched(single, 100)]
    assert 85 <= found.count("yes") <= 115


def test_pairs_become_single_answers_good_and_bad():
    single = preferences.single_answers([preferences.as_example(PAIR, BYTES)])
    assert [(BYTES.decode(e.answers[0][:-1].tolist()), e.label) for e in single] == [
        ("4", True),
        ("5", False),
    ]


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def pairs(n, start=0):
    return [{"prompt": f"{i}?", "chosen": f"{i}.", "rejected": "no"} for i in range(start, start + n)]


def test_all_preferences_of_a_prompt_are_on_one_side_and_every_record_is_accounted_for(tmp_path):
    records = [p | {"rejected": word} for p in pairs(20) for word in ("no", "perhaps")]
    records += [records[0], {"prompt": "x", "chosen": "y", "rejected": "y"}]
    lines = []
    data = preferences.prepare(write(tmp_path / "p.jsonl", records), BYTES, 64, notify=lines.append)
    train, held = ({e.prompt.tobytes() for e in rows.rows} for rows in (data.train, data.val))
    assert not train & held and len(train) + len(held) == 20 and len(data.val) == 4
    assert lines == [
        "42 preferences read: 1 duplicates, 1 with two equal answers, 36 to train on, 4 held out"
    ]


def test_held_out_preferences_of_a_file_of_their_own_are_not_trained_on(tmp_path):
    data, val = write(tmp_path / "p.jsonl", pairs(10)), write(tmp_path / "v.jsonl", pairs(4, start=8))
    found = preferences.prepare(data, BYTES, 64, val=val, notify=lambda line: None)
    assert (len(found.train), len(found.val)) == (8, 4)


def test_the_fingerprint_changes_with_the_content(tmp_path):
    def fingerprint(records):
        return preferences.prepare(
            write(tmp_path / "p.jsonl", records), BYTES, 64, notify=lambda line: None
        ).fingerprint

    swapped = pairs(10)
    swapped[3]["chosen"], swapped[3]["rejected"] = swapped[3]["rejected"], swapped[3]["chosen"]
    assert fingerprint(pairs(10)) == fingerprint(pairs(10)) != fingerprint(swapped)


@pytest.mark.parametrize(
    "records, problem",
    [
        (pairs(1), "all preferences have one prompt; expected several, or others to hold out by --val"),
        ([*pairs(3), {"prompt": "a", "completion": "b", "label": True}], "pairs and labelled answers"),
        ([p | {"chosen": "no"} for p in pairs(5)], "nothing is left to train on or to hold out (5 with two"),
        ([{"text": "a"}], "no field 'chosen', it has 'text'"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused(tmp_path, records, problem):
    with pytest.raises(ValueError) as error:
        preferences.prepare(write(tmp_path / "p.jsonl", records), BYTES, 64, notify=lambda line: None)
    assert problem in str(error.value)


def test_a_record_of_no_known_form_is_left_out_with_bad_text_skip(tmp_path):
    path, lines = write(tmp_path / "p.jsonl", [*pairs(10), {"text": "a"}]), []
    found = preferences.prepare(path, BYTES, 64, bad_text="skip", notify=lines.append)
    assert len(found.train) + len(found.val) == 10
    assert lines[-1] == "11 preferences read: 1 of no known form, 9 to train on, 1 held out"


def test_the_command_shows_preferences_as_trained_on(tmp_path, capsys):
    preferences.main([write(tmp_path / "p.jsonl", pairs(10)), "-n", "1"])
    out = capsys.readouterr().out
    assert "9 to train on, 1 held out" in out and "rejected: »no<|endoftext|>«" in out


def test_the_command_refuses_numbers_below_one(tmp_path):
    for flags in (["-n", "0"], ["--seq-len", "-5"]):
        with pytest.raises(ValueError, match="expected at least 1 of each"):
            preferences.main([str(tmp_path / "none.jsonl"), *flags])


def test_a_row_of_two_lengths_is_read_again_as_it_was_written():
    rows = preferences.PreferenceRows([preferences.as_example(PAIR, BYTES)])
    rows.reference = np.array([[-1.0, -2.0]], np.float32)
    assert rows[0]["reference"].tolist() == [-1.0, -2.0]
