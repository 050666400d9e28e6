"""GLUE: nine tasks of language understanding for a classifier of texts and of pairs (Wang et al. 2018,
arXiv:1804.07461).

    accuracy   share of right labels
    F1         2 TP / (2 TP + FP + FN)                                          of label 1
    Matthews   (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN))
    Pearson    cov(x, y) / (std(x) std(y))
    Spearman   the same of the ranks of x and y, where equal values share their mean rank

TP is the number of true positives, the texts with label 1 for which the model answers 1; FP, FN and TN are
those of false positives, false negatives and true negatives. Where a denominator is 0, such as that of
Matthews if all answers are equal, the figure is 0. The score of GLUE is the mean over its tasks; two metrics
of a task are averaged first, and MNLI's two sets (matched, mismatched) count as one task.

    python -m evaluation runs/classify/model --tasks SST-2/dev.tsv       a file of the published archive
    python -m evaluation runs/classify/model --tasks mrpc:val.parquet    or any file, with its task's name
    python -m evaluation.glue                          the tasks, and the metrics of answers without a model

Shapes: n texts of a batch, C labels.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.records import read_records, refuse
from formats import command
from formats.progress import progress_bar
from language.encoder_inference import pack

# --- metrics, of predicted and true labels or numbers


def accuracy(predicted: Sequence, true: Sequence) -> float:
    """Return the share of equal labels."""
    return sum(p == t for p, t in zip(predicted, true, strict=True)) / len(true)


def counts(predicted: Sequence, true: Sequence, positive: str = "1") -> tuple[int, int, int, int]:
    """Return the numbers of true positives, false positives, false negatives and true negatives."""
    pairs = [(p == positive, t == positive) for p, t in zip(predicted, true, strict=True)]
    return tuple(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False)))


def f1(predicted: Sequence, true: Sequence) -> float:
    """Return F1 of label "1"."""
    tp, fp, fn, _ = counts(predicted, true)
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def matthews(predicted: Sequence, true: Sequence) -> float:
    """Return Matthews' correlation of two lists of labels "0" and "1"."""
    tp, fp, fn, tn = counts(predicted, true)
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / root if root else 0.0


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Pearson's correlation of two lists of numbers, 0 if all numbers of a list are equal."""
    x, y = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    if x.min() == x.max() or y.min() == y.max():
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return ((x / x.norm()) @ (y / y.norm())).item()


def ranks(x: Sequence[float]) -> list[float]:
    """Return the rank of each value, 1 for the smallest; equal values get the mean of their ranks."""
    x = torch.tensor(x, dtype=torch.float64)
    _, group, sizes = x.unique(return_inverse=True, return_counts=True)
    last = sizes.cumsum(0)  # the largest rank of each group of equal values; last - sizes + 1 is the smallest
    return ((last - sizes + 1 + last) / 2)[group].tolist()


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's correlation of two lists of numbers, which is Pearson's of their ranks."""
    return pearson(ranks(x), ranks(y))


# --- the tasks


class GlueTask(NamedTuple):
    """A task: the columns of its texts and of its label, and its metrics."""

    texts: tuple[str, ...]
    label: str
    metrics: tuple[Callable[[Sequence, Sequence], float], ...]
    folder: str  # in the published archive
    names: tuple[str, ...] = ()  # of the labels; Hugging Face has 0, 1, 2 in their place


MNLI = ("entailment", "neutral", "contradiction")
RTE = ("entailment", "not_entailment")
TASKS = {
    "cola": GlueTask(("sentence",), "label", (matthews,), "CoLA"),
    "sst2": GlueTask(("sentence",), "label", (accuracy,), "SST-2"),
    "mrpc": GlueTask(("sentence1", "sentence2"), "label", (accuracy, f1), "MRPC"),
    "qqp": GlueTask(("question1", "question2"), "label", (accuracy, f1), "QQP"),
    "stsb": GlueTask(("sentence1", "sentence2"), "label", (pearson, spearman), "STS-B"),
    "mnli": GlueTask(("sentence1", "sentence2"), "label", (accuracy,), "MNLI", MNLI),
    "qnli": GlueTask(("question", "sentence"), "label", (accuracy,), "QNLI", RTE),
    "rte": GlueTask(("sentence1", "sentence2"), "label", (accuracy,), "RTE", RTE),
    "wnli": GlueTask(("sentence1", "sentence2"), "label", (accuracy,), "WNLI"),
}
# Other names of these columns, in the published archive and in Hugging Face's MNLI.
RENAMED = {
    "Quality": "label", "#1 String": "sentence1", "#2 String": "sentence2", "is_duplicate": "label",
    "score": "label", "gold_label": "label", "premise": "sentence1", "hypothesis": "sentence2",
}  # fmt: skip


class Example(NamedTuple):
    """One or two texts, and their label."""

    texts: tuple[str, ...]
    label: str


def task_of(path: Path) -> str | None:
    """Return the task that the folder of a file names, as in the published archive, else None."""
    folder = path.resolve().parent.name.lower()
    return next((name for name, task in TASKS.items() if folder in (name, task.folder.lower())), None)


def read_examples(path: Path, name: str) -> list[Example]:
    """Return the labelled examples of a file of task `name`.

    Raises ValueError for a file without examples and for a record without the texts or the label: the message
    names the file and the record.
    """
    task, examples = TASKS[name], []
    records = list(read_records(path, str(path), refuse))
    for place, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{place}: {record!r:.60}: expected an object with {', '.join(task.texts)}")
    if name == "cola" and records and "sentence" not in records[0][1]:
        records = headerless_cola(records)

    for place, record in records:
        record = {RENAMED.get(key, key): value for key, value in record.items()}
        missing = {*task.texts, task.label} - set(record)
        if missing:
            raise ValueError(f"{place}: no {', '.join(sorted(missing))}, which {task.folder} needs")
        # A label is the name where the task has names, else the number as text.
        label = str(record[task.label])
        if task.names and label.isdecimal() and int(label) < len(task.names):
            label = task.names[int(label)]
        if label in ("-1", "-"):
            raise ValueError(f"{place}: has no label, like the test sets of GLUE; score the dev set")
        examples.append(Example(tuple(str(record[key]) for key in task.texts), label))
    if not examples:
        raise ValueError(f"{path}: has no examples of {task.folder}")
    return examples


def headerless_cola(records: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """Return the records of the archive's CoLA file, whose first row is not the names of its columns.

    The columns are the source, the label, the mark of the sentence's author and the sentence.
    """
    names = ("source", "label", "mark", "sentence")
    rows = [(records[0][0], list(records[0][1]))]  # the first row was taken for the columns' names
    rows += [(place, list(record.values())) for place, record in records]
    return [(place, dict(zip(names, row, strict=False))) for place, row in rows]


# --- a classifier's answers


def token_row(tokenizer, texts: Sequence[str], model: nn.Module) -> tuple[list[int], list[int]]:
    """Return the token ids and the segment ids of [CLS] a [SEP], or of [CLS] a [SEP] b [SEP].

    RoBERTa has two [SEP] between a and b. Segment ids are 1 for b and the [SEP] behind it, if the model has
    segments, and else 0. If the texts are too long, the longer one loses its last token until they fit.
    """
    encoded, double = [tokenizer.encode(text) for text in texts], model.family == "roberta"
    n_special = 2 if len(texts) == 1 else 3 + double
    while sum(map(len, encoded)) > model.config.max_seq_len - n_special:
        max(encoded, key=len).pop()
    row = [tokenizer.cls_id, *encoded[0], tokenizer.sep_id]
    segments = [0] * len(row)
    for tokens in encoded[1:]:
        row += [*[tokenizer.sep_id] * double, *tokens, tokenizer.sep_id]
    second = int(model.config.n_segments > 1)
    return row, segments + [second] * (len(row) - len(segments))


@torch.no_grad()
def logits_of(model: nn.Module, tokenizer, examples: Sequence[Example], batch_size: int) -> Tensor:
    """Return the classifier's logits (len(examples), C), in float32 on the CPU.

    The texts of a batch are packed behind each other, without padding.
    """
    model.eval()
    device, found = next(model.parameters()).device, []
    for first in progress_bar(range(0, len(examples), batch_size), "classifying", leave=False):
        batch = examples[first : first + batch_size]
        rows, segments = zip(*(token_row(tokenizer, x.texts, model) for x in batch), strict=True)
        tokens, cu_seqlens = pack(rows, device)
        found.append(model(tokens, cu_seqlens, pack(segments, device)[0]).float().cpu())
    return torch.cat(found)


def evaluate(
    model: nn.Module, tokenizer, name: str, examples: Sequence[Example], batch_size: int = 16
) -> dict[str, float]:
    """Return {metric: value} of a classifier on the examples of the task `name`.

    For STS-B the classifier's labels must be numbers, and its answer is their mean, weighted by their
    probabilities. Raises ValueError if the classifier lacks a label of the examples.
    """
    task, true = TASKS[name], [example.label for example in examples]
    logits = logits_of(model, tokenizer, examples, batch_size)
    if name == "stsb":
        try:
            values = torch.tensor([float(label) for label in model.labels])
        except ValueError:
            raise ValueError(f"STS-B: labels {model.labels}; expected numbers, such as 0 to 5") from None
        predicted, true = (logits.softmax(-1) @ values).tolist(), [float(label) for label in true]
    else:
        unknown = sorted(set(true) - set(model.labels))
        if unknown:
            found = ", ".join(map(str, model.labels))
            raise ValueError(f"{task.folder}: label {unknown[0]!r}; the classifier has {found}")
        predicted = [model.labels[i] for i in logits.argmax(-1).tolist()]
    return {metric.__name__: metric(predicted, true) for metric in task.metrics}


def score(figures: dict[str, dict[str, float]]) -> float:
    """Return the score of GLUE: the mean over tasks of the mean over a task's metrics.

    figures: {task: {metric: value}}, with "mnli" and "mnli_mismatched" for MNLI's two sets. Raises ValueError
    if a task is missing.
    """
    missing = sorted(set(TASKS) - set(figures))
    if missing:
        raise ValueError(f"GLUE's score needs all nine tasks; missing {', '.join(missing)}")
    means = {name: sum(found.values()) / len(found) for name, found in figures.items()}
    if "mnli_mismatched" in means:
        means["mnli"] = (means["mnli"] + means.pop("mnli_mismatched")) / 2
    return sum(means.values()) / len(means)


def main(argv: list[str] | None = None) -> None:
    description = "Print the tasks of GLUE, and the figures of answers without a model."
    command.Parser(description=description).parse_args(argv)
    for name, task in TASKS.items():
        metrics = ", ".join(metric.__name__ for metric in task.metrics)
        print(f"{name:6} {task.folder:6} {' + '.join(task.texts):24} {metrics}")

    print("\nof 100 pairs, 68 of them equal as in MRPC:")
    true = ["1"] * 68 + ["0"] * 32
    answers = {"always 1": ["1"] * 100, "always 0": ["0"] * 100, "right": true, "1, 0, 1, 0": ["1", "0"] * 50}
    for name, predicted in answers.items():
        found = [f"{metric.__name__} {metric(predicted, true):.3f}" for metric in (accuracy, f1, matthews)]
        print(f"  {name:12} {'   '.join(found)}")


if __name__ == "__main__":
    command.run(main)
