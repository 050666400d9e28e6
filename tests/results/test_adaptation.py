"""The study of adaptation: no held-out sentence is read, all arms have equal updates, ended runs are kept."""

import csv
import gzip
import json
import math
import random
from argparse import Namespace

import pytest
import torch

import bert
from bert import BERT, SIZES
from data.tokenizer import train_bpe
from results import adaptation

WORDS = ["a", "film", "of", "slow", "people", "who", "talk", "about", "love", "and", "war", "by", "night"]
# As SST-2 has it and as MR does; the second also with another sentence around it, in the wrong case.
LEAKS = (
    ("they wo n't sit still for a lesson in the history of spain", "they won't sit still for a lesson in the "
     "history of spain"),
    ("it 's a bore ( and not a short one ) from its first scene on",
     "Well . It's a bore -lrb- and not a short one -rrb- from its first scene on !"),
    ("a bore .", "a bore"),
)  # fmt: skip


def sentences(n: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=14)) + f" {seed}-{i} ." for i in range(n)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of small files in the layout of the published ones, and a general text beside it."""
    folder = tmp_path_factory.mktemp("texts")
    parts = {name: sentences(40, seed) for seed, name in enumerate(adaptation.LABELLED)}
    parts["sst2_test"] += [leak for leak, _ in LEAKS]
    parts["mr"] += [leak for _, leak in LEAKS] + parts["sst2_train"][:5] + ["a bore it is ."]
    for name, texts in parts.items():
        with gzip.open(folder / f"{name}.txt.gz", "wt", encoding="utf-8") as file:
            file.writelines(f"{i % 2} {text}\n" for i, text in enumerate(texts))
    with gzip.open(folder / adaptation.NEWS, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["3", "A title", text] for text in sentences(40, 9)])
    (folder / "general.txt").write_text("\n".join(sentences(400, 10)))
    return folder


@pytest.fixture
def texts(source, tmp_path, monkeypatch) -> adaptation.Texts:
    sizes = {"SUBJ_TEST": 10, "GENERAL_HELD_OUT": 5, "NEWS_HELD_OUT": 10, "VOCABULARY": 300, "SEQ_LEN": 24}
    for name, value in (sizes | {"PIECE": 200, "BATCH": 2, "EPOCHS": 1}).items():
        monkeypatch.setattr(adaptation, name, value)
    return adaptation.Texts(source, [str(source / "general.txt")], tmp_path / "work")


def read(path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_texts_of_different_files_have_one_form():
    for treebank, plain in (
        ("It ca n't be -lrb- n't it -rrb- ,", "it can't be (n't it),"),
        ("bob 's", "Bob's"),
    ):
        assert adaptation.plain(treebank) == adaptation.plain(plain)


def test_no_held_out_sentence_is_read(texts):
    held_out = [
        text for task in texts.tasks.values() for text in (*task.held_out, *(t for t, _ in task.test))
    ]
    assert len(held_out) == 40 + 43 + 10 + 10
    films = read(texts.train["films"])
    for path in texts.train.values():
        for text in read(path):
            assert not any(adaptation.letters_of(other) in adaptation.letters_of(text) for other in held_out
                           if len(other) > 20)  # fmt: skip
    assert texts.left_out == {"sst2": 0, "subj": 0, "mr": 3, "news": 0, "general": 0}
    # What only has the words of a short one stays, and of what is in several files there is one.
    assert "a bore it is ." in films
    assert len(films) == 40 + 30 + 40 + 1


def test_a_missing_file_is_named_before_anything_is_read(tmp_path, source):
    (tmp_path / "mr.txt.gz").write_bytes(b"not even gzip")
    with pytest.raises(ValueError, match=r"--data .*: no sst2_train\.txt\.gz, .*; expected sst2_train"):
        adaptation.Texts(tmp_path, [], tmp_path)


def test_every_arm_has_the_same_updates_and_starts_where_it_says(texts, tmp_path, monkeypatch):
    runs = {}

    def record(out, *flags):
        runs[out.name] = dict(zip(flags[::2], flags[1::2], strict=False))
        return out / "model"

    monkeypatch.setattr(adaptation, "trained", record)
    args = Namespace(
        work=tmp_path, pretraining_steps=9, adaptation_steps=4, adaptations=2, rate=0.5, labels=20
    )
    study = adaptation.Study(texts, args)
    for read_in_turn in adaptation.ARMS.values():
        study.adapted(
            tuple({"own": "sst2", "other": "subj"}.get(name, name) for name in read_in_turn), seed=3
        )
    assert list(runs) == ["base", "general-3", "news-3", "films-3", "sst2-3", "subj-3", "films-sst2-3"]
    assert runs["base"]["--steps"] == "9" and runs["base"]["--lr"] == "1.0"
    starts = {name: run["--init-from"] for name, run in runs.items() if name != "base"}
    assert starts.pop("films-sst2-3") == str(tmp_path / "films-3" / "model")
    assert set(starts.values()) == {str(tmp_path / "base" / "model")}
    for name in (*starts, "films-sst2-3"):
        assert (runs[name]["--steps"], runs[name]["--lr"], runs[name]["--seed"]) == ("4", "0.5", "3")
        assert runs[name]["--data"].endswith(f"/{name.split('-')[-2]}.jsonl")

    # A seed has one of the adaptations, and the places of the own and the other task are those of the task.
    monkeypatch.setattr(adaptation, "fine_tuned", lambda directory, *args: directory.parent.name)
    monkeypatch.setattr(study, "losses", lambda directory: {})
    for seed, (task, arm, name) in enumerate(
        (
            ("sst2", "DAPT", "films-0"),
            ("sst2", "TAPT", "sst2-1"),
            ("subj", "other task's TAPT", "sst2-0"),
            ("subj", "DAPT, then TAPT", "films-subj-1"),
            ("subj", "no adaptation", "base"),
        )
    ):
        row = study.row(task, arm, seed)
        assert (row["accuracy"], row["adaptation"]) == (name, seed % 2)

    # All arms of a seed have the same examples, which are none of the test.
    pool = texts.tasks["subj"].pool
    drawn = study.drawn("subj", 3)
    assert drawn == study.drawn("subj", 3) != study.drawn("subj", 4)
    assert len(set(drawn)) == 20 and set(drawn) <= set(pool)
    assert not set(pool) & set(texts.tasks["subj"].test)


def test_the_loss_of_an_encoder_that_knows_nothing_is_the_logarithm_of_the_vocabulary(texts, tmp_path):
    tokenizer = train_bpe(sentences(20, 1), 290).with_special_tokens(adaptation.masking.SPECIAL_TOKENS)
    config = bert.fit(SIZES["tiny"], Namespace(tokenizer=tokenizer), 24)
    model = BERT(config)
    with torch.no_grad():
        model.embedding_weight.zero_()  # and with it all logits but their bias
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    loss = adaptation.masked_loss(tmp_path, texts.val["sst2"])
    assert loss == pytest.approx(math.log(tokenizer.n_vocab), abs=1e-5)  # float32
    with torch.no_grad():
        model.cls.predictions.bias[tokenizer.mask_id] = 50.0  # which is never the answer
    model.save_pretrained(tmp_path)
    assert adaptation.masked_loss(tmp_path, texts.val["sst2"]) == pytest.approx(50, abs=1e-3)


def test_gains_are_paired_by_seed():
    arms = {"no adaptation": {0: 0.5, 1: 0.7}, "DAPT": {1: 0.6, 0: 0.5, 2: 0.9}}
    rows = [
        {"task": "subj", "arm": arm, "seed": seed, "accuracy": accuracy}
        for arm, found in arms.items()
        for seed, accuracy in found.items()
    ]
    assert adaptation.gains(rows, "subj", "DAPT") == pytest.approx([-0.1, 0.0])
    assert "| DAPT | 66.7 ± 20.8 | -5.0 ± 7.1 |" in adaptation.table(rows)
    alone = [row for row in rows if row["arm"] == "DAPT"]
    assert "| DAPT | 66.7 ± 20.8 |  |" in adaptation.table(alone)


def test_impossible_numbers_and_lines_say_why(source, texts, tmp_path):
    flags = ["--data", str(source), "--general", str(source / "general.txt"), "--work", str(tmp_path / "w")]
    flags += ["--out", str(tmp_path / "a.json")]
    for name in ("labels", "pretraining-steps", "adaptation-steps", "adaptations", "seeds"):
        with pytest.raises(ValueError, match=f"--{name} 0: expected at least 1"):
            adaptation.main([*flags, f"--{name}", "0"])
    with pytest.raises(ValueError, match="--labels 41: expected at most 40"):
        adaptation.main([*flags, "--labels", "41", "--tasks", "sst2"])
    with gzip.open(tmp_path / "lines.txt.gz", "wt") as file:
        file.write("1 a film\n0\n")
    with pytest.raises(ValueError, match=r"lines.txt.gz: a line is '0': expected LABEL TEXT"):
        adaptation.read_labelled(tmp_path / "lines.txt.gz")


@pytest.mark.usefixtures("rendered")
def test_runs_that_have_ended_do_not_run_again(source, texts, tmp_path, monkeypatch, capsys):
    flags = [
        "--data",
        str(source),
        "--general",
        str(source / "general.txt"),
        "--work",
        str(tmp_path / "runs"),
    ]
    flags += ["--out", str(tmp_path / "a.json"), "--tasks", "sst2", "--labels", "16", "--seeds", "1"]
    flags += ["--pretraining-steps", "1", "--adaptation-steps", "1"]
    flags += ["--arms", "naive Bayes", "no pretraining", "no adaptation", "TAPT"]
    adaptation.main(flags)
    first = json.loads((tmp_path / "a.json").read_text())
    assert [row["arm"] for row in first["rows"]] == flags[-4:]
    for row in first["rows"]:
        assert 0 < row["accuracy"] < 1
    losses = [row["loss"] for row in first["rows"][2:]]
    assert set(losses[0]) == {"general", "news", "sst2", "subj"} and losses[0] != losses[1]
    assert (tmp_path / "a.png").stat().st_size > 5000
    monkeypatch.setattr(adaptation.Study, "row", None)
    adaptation.main(flags)
    assert json.loads((tmp_path / "a.json").read_text()) == first
    assert "| sst2 | accuracy, % |" in capsys.readouterr().out
