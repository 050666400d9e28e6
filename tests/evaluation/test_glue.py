"""GLUE: the metrics beside scikit-learn and scipy, the files of the archive, and a classifier's answers."""

import json
import warnings
from pathlib import Path

import pytest
import scipy.stats
import torch

from evaluation import glue
from evaluation.glue import Example

FIXTURES = Path(__file__).parents[1] / "fixtures"
BY_SCIKIT_LEARN = json.loads((FIXTURES / "harness/expected.json").read_text())["glue"]


@pytest.mark.parametrize("case", BY_SCIKIT_LEARN, ids=lambda case: f"{len(case['true'])} labels")
def test_metrics_of_labels_are_those_of_scikit_learn_also_where_all_labels_are_equal(case):
    predicted, true = ([str(label) for label in case[key]] for key in ("predicted", "true"))
    for metric in (glue.accuracy, glue.f1, glue.matthews):
        assert metric(predicted, true) == pytest.approx(case[metric.__name__], abs=1e-12), metric.__name__


def test_correlations_are_those_of_scipy_and_0_where_it_has_none():
    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 10, 200):
        x = torch.randn(n, generator=generator).tolist()
        y = torch.randint(3, (n,), generator=generator).double().tolist()  # with ties
        y[0] = 3.0
        assert glue.pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic, abs=1e-12)
        assert glue.spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)
    with warnings.catch_warnings(action="ignore"):
        assert scipy.stats.pearsonr([1.0, 1.0], [1.0, 2.0]).statistic != 0  # nan
    assert glue.pearson([1.0, 1.0], [1.0, 2.0]) == glue.spearman([1.0, 2.0], [5.0, 5.0]) == 0.0
    assert glue.ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]


# A file of the archive each: folder, lines, the first example.
ARCHIVE = {
    "CoLA": ("gj04\t1\t\tThe rocks fell.\ngj04\t0\t*\tRocks the fell.\n", (("The rocks fell.",), "1")),
    "SST-2": ('sentence\tlabel\na "good film\t1\nbad\t0\n', (('a "good film',), "1")),
    "MRPC": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tOne.\tTwo.\n", (("One.", "Two."), "1")),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tA?\tB?\t0\n", (("A?", "B?"), "0")),
    "STS-B": ("index\tsentence1\tsentence2\tscore\n0\tA.\tB.\t2.500\n", (("A.", "B."), "2.500")),
    "MNLI": (
        "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tA.\tB.\tneutral\tentailment\n",
        (("A.", "B."), "entailment"),
    ),
    "QNLI": (
        "index\tquestion\tsentence\tlabel\n0\tA?\tB.\tnot_entailment\n",
        (("A?", "B."), "not_entailment"),
    ),
    "RTE": ("index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\t1\n", (("A.", "B."), "not_entailment")),
    "WNLI": ("index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\t1\n", (("A.", "B."), "1")),
}


@pytest.mark.parametrize("folder", ARCHIVE)
def test_the_files_of_the_archive_are_known_by_their_folder(folder, tmp_path):
    text, (texts, label) = ARCHIVE[folder]
    (tmp_path / folder).mkdir()
    path = tmp_path / folder / "dev.tsv"
    path.write_text(text)
    name = glue.task_of(path)
    assert glue.TASKS[name].folder == folder
    examples = glue.read_examples(path, name)
    assert examples[0] == Example(texts, label) and len(examples) == len(text.splitlines()) - (
        folder != "CoLA"
    )


def test_test_sets_without_labels_and_other_files_are_refused(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"sentence": "a", "label": -1}\n')
    with pytest.raises(ValueError, match="has no label"):
        glue.read_examples(tmp_path / "test.jsonl", "sst2")
    for content in ("[1]", '"text"'):
        (tmp_path / "list.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"line 1.*expected an object with sentence"):
            glue.read_examples(tmp_path / "list.jsonl", "cola")
    with pytest.raises(ValueError, match="no sentence1, sentence2, which RTE needs"):
        glue.read_examples(tmp_path / "test.jsonl", "rte")


def test_the_score_averages_metrics_of_a_task_first_and_counts_mnli_once():
    figures = {
        name: dict.fromkeys((m.__name__ for m in task.metrics), 0.5) for name, task in glue.TASKS.items()
    }
    figures["mrpc"] = {"accuracy": 1.0, "f1": 0.8}
    figures["mnli"], figures["mnli_mismatched"] = {"accuracy": 0.9}, {"accuracy": 0.7}
    assert glue.score(figures) == pytest.approx((7 * 0.5 + 0.9 + 0.8) / 9)
    with pytest.raises(ValueError, match="missing wnli"):
        glue.score({name: value for name, value in figures.items() if name != "wnli"})


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Return a small random BERT with two labels, its tokenizer and its directory."""
    import transformers

    from data.tokenizer import get_tokenizer

    directory = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    roles = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]"}
    tokenizer = get_tokenizer("bytes").with_special_tokens(roles)
    config = transformers.BertConfig(
        vocab_size=tokenizer.n_vocab, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=48, initializer_range=0.5,
    )  # fmt: skip
    theirs = transformers.BertForSequenceClassification(config).eval()
    theirs.save_pretrained(directory)
    tokenizer.save(directory)
    from formats.open_model import open_model

    return open_model(directory), tokenizer, directory, theirs


PAIRS = [Example((f"text {i}", "other " * (i % 9)), str(i % 2)) for i in range(12)]


def test_pairs_are_classified_as_by_transformers_with_segments_in_batches_of_any_size(classifier):
    model, tokenizer, _, theirs = classifier
    found = glue.logits_of(model, tokenizer, PAIRS, 5)
    # A batch of one row takes another way through attention: float32 with logits of about 4.
    assert torch.allclose(found, glue.logits_of(model, tokenizer, PAIRS, 1), atol=1e-5)
    for example, logits in zip(PAIRS, found, strict=True):
        row, segments = glue.token_row(tokenizer, example.texts, model)
        assert row.count(tokenizer.sep_id) == 2 and len(row) <= 48 and len(row) == len(segments)
        assert segments == sorted(segments) and segments[row.index(tokenizer.sep_id) + 1] == 1
        with torch.no_grad():
            expected = theirs(torch.tensor([row]), token_type_ids=torch.tensor([segments])).logits[0]
        assert torch.allclose(logits, expected, atol=1e-5)


def test_a_classifier_of_other_labels_is_refused(classifier):
    model, tokenizer, _, _ = classifier
    model.labels = ["0", "1"]
    figures = glue.evaluate(model, tokenizer, "mrpc", PAIRS)
    assert set(figures) == {"accuracy", "f1"} and 0 <= figures["accuracy"] <= 1
    numbers = [Example(x.texts, str(i / 3)) for i, x in enumerate(PAIRS)]
    assert set(glue.evaluate(model, tokenizer, "stsb", numbers)) == {"pearson", "spearman"}
    with pytest.raises(ValueError, match="label 'entailment'; the classifier has 0, 1"):
        glue.evaluate(model, tokenizer, "rte", [Example(("a", "b"), "entailment")])


def test_the_demonstration_shows_dull_answers(capsys):
    glue.main([])
    assert "always 1     accuracy 0.680   f1 0.810   matthews 0.000" in capsys.readouterr().out
