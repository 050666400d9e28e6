"""Does further pretraining on the text of a domain (DAPT), or of a task (TAPT), help a small encoder?

    python -m results.adaptation --data FOLDER --general books.jsonl.gz --out results/adaptation.json

The question of "Don't Stop Pretraining" (Gururangan et al. 2020, arXiv:2004.10964). An encoder of bert.py is
pretrained on general text, by masking. It then learns further, by the same objective and with the same number
of updates in every arm, from

    general text        the same text: the control for more training
    wrong domain        news
    DAPT                sentences about films, of reviews and plots: those of both tasks, and more reviews
    TAPT                the training sentences of the task without labels, in more epochs
    other task's TAPT   those of the other task
    DAPT, then TAPT     one after the other, with twice as many updates

or from nothing (`no adaptation`). Last it is fine-tuned on a few labelled examples of a task: in every arm on
the same examples, in the same order, with the same number of updates. Two baselines are the same encoder
without any pretraining, and naive Bayes. The tasks are

    sst2                is a sentence of a review for or against the film? 1,821 test sentences
    subj                is a sentence from a review, or from a plot? 2,000 test sentences

All arms start from one pretrained encoder, and each adapts it --adaptations times. A seed draws the labelled
examples and decides the fine-tuning, which starts from adaptation number seed mod --adaptations. Measured are
the accuracy on the test sentences, and the nats per masked token of held-out text: of the general text (what
is forgotten), of news, and of both tasks. All texts are brought to one form, small letters with a space
between words and marks, or the domains would differ by their form, too. No text to learn from has 40 letters
in a row in common with a held-out sentence of either task.

--data holds sst2_train, sst2_dev, sst2_test, mr and subj (.txt.gz, a line is "LABEL TEXT"), and
ag_news_test7600.csv.gz. --general is text as for --data of train.py. Runs in --work and figures in --out that
exist already are not made again."""

import argparse
import csv
import gzip
import json
import random
import re
import statistics
import time
from argparse import Namespace
from collections.abc import Iterable
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from bert import BERT
from data.corpus import documents, find_files
from data.tokenizer import get_tokenizer
from formats import command
from formats.atomic import replace_directory, replace_file
from formats.figures import load_pyplot, save_figure
from language import masking
from posttraining import classify, naive_bayes
from results.keep import Ended
from results.training_runs import trained

LABELLED = ("sst2_train", "sst2_dev", "sst2_test", "mr", "subj")
NEWS = "ag_news_test7600.csv.gz"
ENCODER = ("n_layers=2", "mask_rate=0.3")  # of `--size tiny`; 0.3 learns faster than 0.15, see docs/bert.md
VOCABULARY, SEQ_LEN, BATCH = 4096, 64, 16
GENERAL_BYTES, PIECE = 8_000_000, 2000  # of general text, cut into pieces of so many characters
RUN = 40  # letters in a row that a text may not have in common with a held-out sentence
SUBJ_TEST = 2000  # sentences, drawn at random, since this data set has no split of its own
GENERAL_HELD_OUT, NEWS_HELD_OUT, TASK_HELD_OUT = 60, 400, 800  # texts that are held out for the loss
HELD_OUT_ROWS = 256  # the most rows of SEQ_LEN tokens that the loss is measured on
EPOCHS, FINE_TUNING_BATCH = 6, 16
ARMS = {  # the texts to learn from after pretraining, in turn
    "no adaptation": (),
    "general text": ("general",),
    "wrong domain": ("news",),
    "DAPT": ("films",),
    "TAPT": ("own",),
    "other task's TAPT": ("other",),
    "DAPT, then TAPT": ("films", "own"),
}
BASELINES = ("naive Bayes", "no pretraining")
SETTINGS = ("labels", "pretraining_steps", "adaptation_steps", "adaptations", "rate", "general")

Labelled = list[tuple[str, str]]  # (text, label)


class Task(NamedTuple):
    pool: Labelled  # to draw examples with labels from; without labels, the text of TAPT
    held_out: list[str]  # text for the loss
    test: Labelled


def plain(text: str) -> str:
    """Return a text in small letters, with one space between words and marks.

    SST-2 has the form of the Penn Treebank, "ca n't" and "-lrb-", which is undone first.
    """
    text = text.lower().replace("-lrb-", "(").replace("-rrb-", ")")
    return " ".join(naive_bayes.split_words(re.sub(r"\s+(n't\b|'\w)", r"\1", text)))


def letters_of(text: str) -> str:
    """Return the letters and digits of a text, without what stands between them."""
    return re.sub(r"[\W_]", "", text)


def letter_runs(text: str) -> set[str]:
    """Return all runs of RUN letters or digits of a text, or all of them together if they are fewer."""
    letters = letters_of(text)
    return {letters[i : i + RUN] for i in range(max(1, len(letters) - RUN + 1))}


def read_labelled(path: Path) -> Labelled:
    """Return the (text, label) of a file whose lines are "LABEL TEXT"."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        parts = [line.partition(" ") for line in file if line.strip()]
    if without := [label for label, _, text in parts if not text.strip()]:
        raise ValueError(f"{path}: a line is {without[0].strip()!r}: expected LABEL TEXT")
    return [(plain(text), label) for label, _, text in parts]


def write(path: Path, texts: Iterable[str]) -> Path:
    """Write each text as a record of a .jsonl file, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as new:
        new.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def general_text(names: list[str], cache: Path) -> list[str]:
    """Return pieces of the documents that --general names, drawn at random up to GENERAL_BYTES."""
    files = [file for name in names for file in find_files(name, cache, print, flag="--general")]
    pieces = []
    for text in documents(files, on_bad_text=print):
        pieces += [plain(text[i : i + PIECE]) for i in range(0, len(text), PIECE)]
    random.Random(0).shuffle(pieces)
    n_bytes, n = 0, 0
    while n < len(pieces) and n_bytes < GENERAL_BYTES:
        n_bytes += len(pieces[n].encode())
        n += 1
    return [piece for piece in pieces[:n] if piece]


def read_news(path: Path) -> list[str]:
    """Return the texts of AG News: a title and a description, without the label."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return [plain(" ".join(row[1:]).replace("\\", " ")) for row in csv.reader(file)]


class Texts:
    """The tasks, and all texts to learn from and held out, as files in a folder."""

    def __init__(self, source: Path, general: list[str], folder: Path):
        """Raise ValueError, before anything is read, if a file is missing in source."""
        wanted = [*(f"{name}.txt.gz" for name in LABELLED), NEWS]
        missing = [name for name in wanted if not (source / name).is_file()]
        if missing:
            raise ValueError(f"--data {source}: no {', '.join(missing)}; expected {', '.join(wanted)}")
        read = {name: read_labelled(source / f"{name}.txt.gz") for name in LABELLED}
        random.Random(0).shuffle(read["subj"])
        subj_test, subj_rest = read["subj"][:SUBJ_TEST], read["subj"][SUBJ_TEST:]

        # The tasks: nothing is read that resembles their held-out sentences.
        held_out = (*read["sst2_dev"], *read["sst2_test"], *subj_test)
        self.held_out_runs = set().union(*(letter_runs(text) for text, _ in held_out))
        self.left_out = {}
        pools = {"sst2": self.allowed("sst2", read["sst2_train"]), "subj": self.allowed("subj", subj_rest)}
        splits = {"sst2": (read["sst2_dev"], read["sst2_test"]), "subj": (subj_test, subj_test)}
        self.tasks = {
            name: Task(pools[name], [text for text, _ in dev[:TASK_HELD_OUT]], test)
            for name, (dev, test) in splits.items()
        }

        # The other texts. Of a sentence that is in several files, one stays.
        films = (*pools["sst2"], *pools["subj"], *self.allowed("mr", read["mr"]))
        films = list({letters_of(text): text for text, _ in films}.values())
        random.Random(0).shuffle(films)
        news = [text for text, _ in self.allowed("news", [(text, "") for text in read_news(source / NEWS)])]
        prose = general_text(general, folder)
        prose = [text for text, _ in self.allowed("general", [(text, "") for text in prose])]

        # What is read, and what is held out for the loss.
        train = {"general": prose[GENERAL_HELD_OUT:], "news": news[NEWS_HELD_OUT:], "films": films}
        val = {"general": prose[:GENERAL_HELD_OUT], "news": news[:NEWS_HELD_OUT]}
        train |= {name: [text for text, _ in task.pool] for name, task in self.tasks.items()}
        val |= {name: task.held_out for name, task in self.tasks.items()}
        self.train = {name: write(folder / f"{name}.jsonl", texts) for name, texts in train.items()}
        self.val = {name: write(folder / f"{name}-held-out.jsonl", texts) for name, texts in val.items()}
        self.n_bytes = {name: sum(len(text.encode()) for text in texts) for name, texts in train.items()}

    def allowed(self, name: str, texts: Labelled) -> Labelled:
        """Return the texts without those that have a run of letters of a held-out sentence; count these."""
        kept = [pair for pair in texts if self.held_out_runs.isdisjoint(letter_runs(pair[0]))]
        self.left_out[name] = len(texts) - len(kept)
        return kept


class Study:
    """The models, made when they are needed, and what is measured of them."""

    def __init__(self, texts: Texts, args: Namespace):
        self.texts, self.args, self.work = texts, args, args.work
        self.measured: dict[Path, dict[str, float]] = {}

    def flags(self, text: str, held_out: str, steps: int) -> list[str]:
        """Return the flags of train.py for a number of updates on a text."""
        shape = ["--seq-len", SEQ_LEN, "--batch-size", BATCH, "--steps", steps, "--eval-every", steps]
        files = ["--data", self.texts.train[text], "--val", self.texts.val[held_out]]
        where = ["--cache", self.work / "cache", "--device", "cpu"]
        return [str(word) for word in ("--model", "bert", *files, *shape, *where)]

    def base(self) -> Path:
        """Return the folder of the encoder that has learned from general text."""
        flags = self.flags("general", "general", self.args.pretraining_steps)
        flags += ["--tokenizer", f"bpe:{VOCABULARY}", "--lr", str(2 * self.args.rate), "--set", *ENCODER]
        return trained(self.work / "base", *flags)

    def adapted(self, read: tuple[str, ...], seed: int) -> Path:
        """Return the folder of the encoder after it has learned from the texts `read`, in turn.

        Each time the learning rate rises anew, to half of the peak of pretraining, and falls to a twentieth.
        """
        if not read:
            return self.base()
        before = self.adapted(read[:-1], seed)
        held_out = "sst2" if read[-1] == "films" else read[-1]
        flags = [*self.flags(read[-1], held_out, self.args.adaptation_steps), "--init-from", str(before)]
        flags += ["--lr", str(self.args.rate), "--seed", str(seed), "--set", ENCODER[-1]]
        return trained(self.work / f"{'-'.join(read)}-{seed}", *flags)

    def untrained(self, seed: int) -> Path:
        """Return the folder of an encoder of the same sizes with random weights."""
        folder, base = self.work / f"untrained-{seed}", self.base()
        if not folder.exists():
            torch.manual_seed(seed)
            with replace_directory(folder) as new:
                BERT(BERT.from_pretrained(base).config).save_pretrained(new)
                get_tokenizer(str(base)).save(new)
        return folder

    def losses(self, directory: Path) -> dict[str, float]:
        """Return the nats per masked token of each held-out text, with the same masks for all models."""
        if directory not in self.measured:
            texts = self.texts.val.items()
            self.measured[directory] = {name: masked_loss(directory, path) for name, path in texts}
        return self.measured[directory]

    def drawn(self, task: str, seed: int) -> Labelled:
        """Return the examples with labels that belong to a seed."""
        return random.Random(seed).sample(self.texts.tasks[task].pool, self.args.labels)

    def row(self, task: str, arm: str, seed: int) -> dict:
        """Return what is measured of an arm."""
        examples, test = self.drawn(task, seed), self.texts.tasks[task].test
        if arm == "naive Bayes":
            return {"accuracy": naive_bayes.accuracy(examples, test)}
        if arm == "no pretraining":
            return {"accuracy": fine_tuned(self.untrained(seed), examples, test, seed, self.work)}
        names = {"own": task, "other": next(name for name in self.texts.tasks if name != task)}
        adaptation = seed % self.args.adaptations
        directory = self.adapted(tuple(names.get(text, text) for text in ARMS[arm]), adaptation)
        accuracy = fine_tuned(directory, examples, test, seed, self.work)
        return {"adaptation": adaptation, "accuracy": accuracy, "loss": self.losses(directory)}


@torch.no_grad()
def masked_loss(directory: Path, held_out: Path) -> float:
    """Return the mean nats per masked token of an encoder on a text, with 15 % masked, always the same."""
    model, tokenizer = BERT.from_pretrained(directory), get_tokenizer(str(directory))
    texts = [json.loads(line)["text"] for line in held_out.read_text(encoding="utf-8").splitlines()]
    tokens = torch.tensor([i for text in texts for i in (tokenizer.eot_id, *tokenizer.encode(text))])
    windows = tokens.unfold(0, SEQ_LEN + 1, SEQ_LEN)[:HELD_OUT_ROWS]
    generator, total, n_targets = torch.Generator().manual_seed(0), 0.0, 0
    for part in windows.split(64):
        rows = [{"tokens": window.numpy()} for window in part]
        batch = masking.make_batch(rows, masking.Config(), generator, tokenizer)
        n = int((batch["targets"] >= 0).sum())
        total += masking.loss(model, batch)[0].item() * n
        n_targets += n
    return total / n_targets


def fine_tuned(directory: Path, examples: Labelled, test: Labelled, seed: int, work: Path) -> float:
    """Return the accuracy on the test of the encoder in directory, fine-tuned on the examples."""
    torch.manual_seed(seed)
    labels = sorted({label for _, label in test})
    model, tokenizer = classify.load(str(directory), labels)

    def rows(part: Labelled) -> list[tuple[list[int], int]]:
        tokens = [classify.token_row(tokenizer, text, model.config, True) for text, _ in part]
        return [(row, labels.index(label)) for row, (_, label) in zip(tokens, part, strict=True)]

    flags = {"lr": classify.default_rate(model), "layer_decay": 1.0, "unfreeze": "all", "out": work}
    flags |= {"epochs": EPOCHS, "batch_size": FINE_TUNING_BATCH, "seed": seed}
    with redirect_stdout(None):
        # The second rows are scored after every epoch, which changes nothing here, so a few are enough.
        classify.train(model, rows(examples), rows(examples[:16]), Namespace(**flags))
    predicted = classify.predict(model, rows(test), 64).tolist()
    return statistics.mean(labels[i] == label for i, (_, label) in zip(predicted, test, strict=True))


def spread(values: list[float], sign: str = "") -> str:
    """Return mean and standard deviation in percent, the latter of two values and more, or "" of none."""
    if not values:
        return ""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):{sign}.1f}{deviation}"


def gains(rows: list[dict], task: str, arm: str) -> list[float]:
    """Return, for each seed, the accuracy minus that of the same seed without adaptation."""
    arms = by_arm(rows, task)
    without = {row["seed"]: row["accuracy"] for row in arms.get("no adaptation", [])}
    return [row["accuracy"] - without[row["seed"]] for row in arms.get(arm, []) if row["seed"] in without]


def by_arm(rows: list[dict], task: str) -> dict[str, list[dict]]:
    """Return the rows of each arm that has any, in the order of the arms."""
    of_task = [row for row in rows if row["task"] == task]
    arms = {arm: [row for row in of_task if row["arm"] == arm] for arm in (*BASELINES, *ARMS)}
    return {arm: its_rows for arm, its_rows in arms.items() if its_rows}


def mean_losses(rows: list[dict]) -> dict[str, float]:
    """Return the mean loss on each held-out text over the rows of an arm, {} for an arm without losses."""
    return {text: statistics.mean(row["loss"][text] for row in rows) for text in rows[0].get("loss", {})}


def table(rows: list[dict]) -> str:
    """Return the rows of the table of each task: accuracy, gain, and the loss on each held-out text."""
    lines, texts = [], ("general", "news", "sst2", "subj")
    for task in dict.fromkeys(row["task"] for row in rows):
        lines += [f"| {task} | accuracy, % | gain, paired by seed | {' | '.join(texts)} |", "|---" * 7 + "|"]
        for arm, its_rows in by_arm(rows, task).items():
            gain = spread(gains(rows, task, arm), "+") if ARMS.get(arm) else ""
            losses = [f"{loss:.3f}" for loss in mean_losses(its_rows).values()] or [""] * len(texts)
            accuracy = spread([row["accuracy"] for row in its_rows])
            lines.append(f"| {arm} | {accuracy} | {gain} | {' | '.join(losses)} |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Draw for each task the accuracy of each seed and their mean, and the loss on each held-out text."""
    pyplot = load_pyplot()
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    size = (5.5 * len(tasks), 7)
    figure, axes = pyplot.subplots(2, len(tasks), figsize=size, layout="constrained", squeeze=False)
    for (top, bottom), task in zip(axes.T, tasks, strict=True):
        arms = dict(reversed(by_arm(rows, task).items()))
        for y, its_rows in enumerate(arms.values()):
            values = [100 * row["accuracy"] for row in its_rows]
            top.plot(values, [y] * len(values), "o", color="C0", alpha=0.4)
            top.plot(statistics.mean(values), y, "|", color="black", markersize=18)
        top.set(xlabel=f"{task}: accuracy on the test, %")
        losses = {arm: mean_losses(its_rows) for arm, its_rows in arms.items() if "loss" in its_rows[0]}
        for i, text in enumerate(next(iter(losses.values()), {})):
            means = [loss[text] for loss in losses.values()]
            bottom.plot(means, range(len(means)), "os^D"[i], label=text, alpha=0.8)
        bottom.set(xlabel=f"{task}: nats per masked token of held-out text")
        for axis, names in ((top, arms), (bottom, losses)):
            axis.set_yticks(range(len(names)), names)
            axis.grid(alpha=0.3)
    figure.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    arms, raw = [*BASELINES, *ARMS], argparse.RawDescriptionHelpFormatter
    parser = command.Parser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--data", type=command.path, required=True, help="folder of the labelled texts, see above")
    add("--general", nargs="+", default=["stdlib"], help="text to pretrain on (default %(default)s)")
    add("--tasks", nargs="+", choices=("sst2", "subj"), default=["sst2", "subj"], help="tasks (default all)")
    add("--arms", nargs="+", choices=arms, default=arms, help="arms (default all)")
    add("--labels", type=int, default=500, help="labelled examples (default %(default)s)")
    add("--pretraining-steps", type=int, default=3600, help="of 1,024 tokens each (default %(default)s)")
    add("--adaptation-steps", type=int, default=300, help="steps on each text (default %(default)s)")
    add("--rate", type=float, default=1e-3, help="peak learning rate of adaptation (default %(default)s)")
    add("--adaptations", type=int, default=2, help="adaptations of each arm (default %(default)s)")
    add("--seeds", type=int, default=5, help="fine-tunings of each arm (default %(default)s)")
    add("--work", type=command.path, default=Path("runs/adaptation"), help="runs (default %(default)s)")
    add("--out", type=command.new_file, required=True, help="file for the figures, JSON; a plot is beside it")
    args = parser.parse_args(argv)
    for name in ("labels", "pretraining_steps", "adaptation_steps", "adaptations", "seeds"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")

    texts = Texts(args.data, args.general, args.work)
    if args.labels > (most := min(len(texts.tasks[task].pool) for task in args.tasks)):
        raise ValueError(f"--labels {args.labels}: expected at most {most}, the sentences to draw from")
    about = {name: getattr(args, name) for name in SETTINGS[:-1]}
    about |= {"general": [Path(name).name for name in args.general]}
    about |= {"bytes": texts.n_bytes, "left out as in a test": texts.left_out}
    kept, study = Ended(args.out, about, same=SETTINGS), Study(texts, args)
    for task, seed, arm in product(args.tasks, range(args.seeds), args.arms):
        if not kept.has(task=task, arm=arm, seed=seed):
            start = time.process_time()
            found = study.row(task, arm, seed)
            seconds = time.process_time() - start
            kept.add({"task": task, "arm": arm, "seed": seed} | found | {"cpu_seconds": seconds})
            print(f"{task} {arm:18} seed {seed}: {found['accuracy']:.1%}, {seconds:.0f} s", flush=True)
    print(table(kept.rows))
    plot(kept.rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    command.run(main)
