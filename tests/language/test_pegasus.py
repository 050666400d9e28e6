"""PEGASUS' gap sentences: chosen by ROUGE-1 with the rest of the document, and written by a model."""

import re

import pytest
import torch

import train
from data.docstrings import Summarised
from language import pegasus
from language.overlap import rouge_1
from language.pegasus import MASK, Config, gap_pair, gap_sentences, scores, sentences_of, trivial

TEXT = "Dogs run. It rained all day. Dogs run in the wet grass. Nobody came. The grass is green."


def test_a_sentence_is_scored_by_rouge_with_all_others():
    sentences = [*sentences_of(TEXT), "Dogs run."]  # a sentence that comes twice counts in the rest
    for i, score in enumerate(scores(sentences)):
        rest = " ".join(sentences[:i] + sentences[i + 1 :])
        assert score == pytest.approx(rouge_1(sentences[i], rest))


def test_the_best_third_are_the_gaps_in_the_order_of_the_document():
    assert gap_sentences(sentences_of(TEXT), 0.4) == [0, 2]
    assert gap_sentences(sentences_of(TEXT), 0.01) == [2]  # at least one


def test_the_example_of_the_header_has_the_gap_that_it_shows():
    document, *pair = re.findall(r"^    (?:document|input|target) +(.*)$", pegasus.__doc__, re.MULTILINE)
    assert list(gap_pair(sentences_of(document), torch.Generator(), Config(keep_rate=0.0))) == pair


def test_input_and_target_restore_the_document():
    sentences = sentences_of(TEXT)
    source, target = gap_pair(sentences, torch.Generator().manual_seed(0), Config(0.4, keep_rate=0.0))
    assert source == f"{MASK} It rained all day. {MASK} Nobody came. The grass is green."
    assert target == "Dogs run. Dogs run in the wet grass."


def test_one_of_ten_gaps_stays_in_the_input_but_is_in_the_target():
    draws, n_masks = torch.Generator().manual_seed(0), 0
    for _ in range(500):
        source, target = gap_pair(sentences_of(TEXT), draws, Config(0.4))
        n_masks += source.count(MASK)
        assert target == "Dogs run. Dogs run in the wet grass."
    assert 870 < n_masks < 930  # of 1,000


def test_the_trivial_summary_is_the_name_or_the_lead():
    assert trivial(f"{MASK} def is_symbolicLink(path):\n    return 1") == "is symbolic Link"
    assert trivial(f"{MASK} It rained. Nobody came.") == "It rained."


@pytest.mark.parametrize(
    "changes, message", [({"gap_rate": 1.1}, "gap_rate 1.1"), ({"keep_rate": -1}, "keep_rate -1")]
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_the_demonstration_marks_the_gaps(capsys):
    pegasus.main()
    assert "0.44 gap  Dogs run in the wet grass." in capsys.readouterr().out


SMALL = "--model t5 --task pegasus --tokenizer bytes --seq-len 90 --steps 2 --eval-every 2 --batch-size 2"
SIZES = "--set n_layers=1 d_model=16 d_ff=16 n_heads=2 d_head=8"


def test_the_command_writes_gaps_of_documents_and_summaries_of_functions(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    functions = [Summarised("f", f"def is_f{i}():\n    return 1", "It is.") for i in range(9)]
    monkeypatch.setattr(pegasus, "stdlib_functions", lambda: (functions[:6], functions[6:]))
    assert train.main(f"{SMALL} {SIZES} --out functions".split()) == 0
    assert "ROUGE-1" in (tmp_path / "functions" / "samples.txt").read_text()
    assert "def is_f6():" in (tmp_path / "functions" / "samples.txt").read_text()

    (tmp_path / "texts").mkdir()
    for i in range(4):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"{TEXT} Number {i}.")
    assert train.main(f"{SMALL} {SIZES} gap_rate=0.5 --data texts --out documents".split()) == 0
    assert "the first sentence" in (tmp_path / "documents" / "samples.txt").read_text()

    (tmp_path / "one.txt").write_text("Nothing. Here.")
    assert train.main(f"{SMALL} {SIZES} --data one.txt --out none".split()) == 2
    assert "error: --data one.txt: 0 documents of 3 sentences or more" in capsys.readouterr().err
