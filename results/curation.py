"""Does clean text make a better model? A small GPT learns from dirty, cleaned and chosen text.

    python -m results.curation --out results/curation.json          15 minutes of one core

The dirt is that of results/dirty_text.py: exact and near copies, a licence at the head of half of the
modules, junk and test items, planted in 160 modules of Python's library, each cut to 6,000 characters. A
model of 320,000 parameters reads the same number of tokens of

    clean               the modules without dirt: what cleaning can reach at best
    dirty               the modules with dirt
    dirty, less         a random part of the dirty documents, of as many bytes as cleaning leaves
    cleaned             what data/clean.py leaves of them: it removes by rules, copies, near copies, repeated
                        substrings and test items

and of half of the dirty documents:

    random half         chosen at random
    perplexity half     those that a model trained on the dirty text predicts best
    Ask-LLM half        those for which this model most likely answers "yes", when asked if a text is good
    classifier half     those that look most like 40 other clean modules, to a linear classifier

The three scores are those of data/curate.py (perplexity, ask_llm, classifier).

The measure is bits per byte of another 40 modules without dirt, which are held out, for three seeds. All runs
have one tokenizer, learned from the 40 modules of the classifier, and one learning rate. A smaller text is
read more often: the number of epochs is beside each figure. Runs that have ended are in the file, and the
same command continues after an interruption.
"""

import argparse
import json
import math
import random
import statistics
import time
from argparse import Namespace
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import torch

import data.text
from data import clean, curate, quality_classifier
from data.corpus import stdlib_files
from data.rows import Loader, in_order
from data.tokenizer import get_tokenizer
from engine.optim import make_optimizers, set_learning_rate
from evaluation.small_runs import mean_and_range
from formats import command
from formats.atomic import replace_directory
from formats.figures import load_pyplot, save_figure
from gpt import GPT, Config, make_batch
from results import dirty_text
from results.keep import Ended

LONGEST = 6000  # characters of a module
VOCABULARY, SEQ_LEN, BATCH, RATE, WARMUP = 1024, 128, 16, 4e-3, 20
SETTINGS = ("steps", "texts", "longest")  # that a file's runs must share
SIZE = {"n_layers": 2, "n_heads": 4, "d_model": 96, "d_ff": 256, "qk_norm": True}
CLEANING = ("clean", "dirty", "dirty, less", "cleaned")
JUDGED = {  # the score and the rule of data/curate.py
    "Ask-LLM half": ("ask_llm", "top=0.5"),
    "perplexity half": ("perplexity", "lowest=0.5"),
    "classifier half": ("classifier", "top=0.5"),
}
CHOOSING = ("random half", *JUDGED)
JUDGE_SEED, JUDGE_STEPS, JUDGE_CONTEXT = 1000, 300, 512

Record = dict


def modules(n: int) -> tuple[list[str], list[str], list[str]]:
    """Return the texts of n modules to plant dirt in, of n / 4 that are held out, and of n / 4 others.

    Raises ValueError if the library has too few modules.
    """
    texts = [Path(path).read_text(encoding="utf-8")[:LONGEST] for _, path in stdlib_files()]
    texts = [text for text in texts if len(text) > 1000]
    rest = [text for i, text in enumerate(texts) if i % 8 not in (0, 4)]
    held_out, others = texts[::8], texts[4::8]
    most = min(len(rest), 4 * len(held_out), 4 * len(others))
    if not 4 <= n <= most:
        raise ValueError(
            f"--texts {n}: expected 4 to {most}, of the {len(texts)} modules of Python's library"
        )
    return rest[:n], held_out[: n // 4], others[: n // 4]


def write(path: Path, records: list[Record]) -> Path:
    """Write records to path, unless it holds them: clean.py and curate.py continue where a file is
    unchanged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path) -> list[Record]:
    """Return the records in the parts of a folder that clean.py or curate.py has written."""
    paths = sorted(folder.glob("part-*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def n_bytes(records: list[Record]) -> int:
    """Return the bytes of the texts, in UTF-8."""
    return sum(len(record["text"].encode()) for record in records)


class Texts:
    """The documents of all arms, made in a folder when they are needed. An arm is one of the texts above."""

    def __init__(self, folder: Path, n: int):
        self.folder = folder
        planted, held_out, others = modules(n)
        self.clean = [{"label": "clean", "text": text} for text in planted]
        self.dirty, items = dirty_text.plant(planted, seed=0)
        self.paths = {
            name: write(folder / f"{name}.jsonl", rows)
            for name, rows in (
                ("dirty", self.dirty),
                ("items", items),
                ("held_out", [{"text": text} for text in held_out]),
                ("others", [{"text": text} for text in others]),
            )
        }
        with redirect_stdout(None):
            corpus = data.text.prepare(str(self.paths["others"]), f"bpe:{VOCABULARY}", folder / "cache")
        self.tokenizer = folder / "tokenizer"
        corpus.tokenizer.save(self.tokenizer)

    def arm(self, name: str, seed: int) -> list[Record]:
        """Return the documents that the runs of an arm read. seed: for the arms that are chosen at random."""
        generator = random.Random(seed)
        if name in ("clean", "dirty"):
            return getattr(self, name)
        if name == "random half":
            return generator.sample(self.dirty, len(self.dirty) // 2)
        if name == "dirty, less":
            room, less = n_bytes(self.arm("cleaned", 0)), []
            for record in generator.sample(self.dirty, len(self.dirty)):
                if n_bytes([*less, record]) <= room:
                    less.append(record)
            return less
        if name == "cleaned":
            flags = ["--preset", "code", "--stages", "rules", "exact", "near", "substrings"]
            return self.made_by(clean, "cleaned", [*flags, "--against", str(self.paths["items"])])
        if name in JUDGED:
            score, rule = JUDGED[name]
            return self.made_by(curate, score, ["--stage", f"{score}={self.judge(score)}", rule])
        raise ValueError(f"arm {name!r}: expected one of {', '.join((*CLEANING, *CHOOSING))}")

    def judge(self, score: str) -> Path:
        """Return the folder of what scores the documents: the classifier, or a model trained on dirty
        text."""
        folder = self.folder / ("judge of quality" if score == "classifier" else "judge")
        if score == "classifier" and not folder.exists():
            flags = ["--good", str(self.paths["others"]), "--other", str(self.paths["dirty"])]
            with redirect_stdout(None):
                quality_classifier.main([*flags, "--out", str(folder)])
        elif not folder.exists():
            model, _ = train(self.dirty, self, JUDGE_SEED, JUDGE_STEPS, JUDGE_CONTEXT)
            with replace_directory(folder) as new:
                model.save_pretrained(new)
                get_tokenizer(str(self.tokenizer)).save(new)
        return folder

    def made_by(self, module, name: str, flags: list[str]) -> list[Record]:
        """Return the dirty documents that a module's command leaves, run with these flags."""
        out = self.folder / name
        with redirect_stdout(None):
            module.main([str(self.paths["dirty"]), "--out", str(out), "--keep-rejected", *flags])
        return [record for record in read(out) if "text" in record]


def train(
    records: list[Record], texts: Texts, seed: int, steps: int, context: int = SEQ_LEN
) -> tuple[GPT, dict]:
    """Return a model trained on documents, in rows of `context` tokens, and the figures of the run.

    A step has BATCH x SEQ_LEN tokens for every context.
    """
    path = write(texts.folder / "arm.jsonl", records)
    with redirect_stdout(None):
        cache, held_out = texts.folder / "cache", str(texts.paths["held_out"])
        corpus = data.text.prepare(str(path), str(texts.tokenizer), cache, val=held_out)
    dataset = data.text.as_rows(corpus, context)
    torch.manual_seed(seed)
    model = GPT(Config(**SIZE, vocab_size=corpus.tokenizer.n_vocab, max_seq_len=context))
    schedule = Namespace(lr=RATE, warmup=WARMUP, schedule="cosine", schedule_from=0, steps=steps)
    optimizers = make_optimizers(model, Namespace(optimizer="adamw", lr=RATE, weight_decay=0.1, device="cpu"))
    n_rows = BATCH * SEQ_LEN // context
    loader, start = Loader(dataset.train, seed), time.process_time()
    for step in range(steps):
        set_learning_rate(optimizers, step, schedule)
        loss, _ = model.loss(make_batch(loader.read(step * n_rows, n_rows), model.config, None))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    n_tokens = len(corpus.train.tokens)
    return model, {
        "documents": len(records),
        "bytes": n_bytes(records),
        "tokens": n_tokens,
        "epochs": steps * BATCH * SEQ_LEN / n_tokens,
        "bits_per_byte": bits_per_byte(model, dataset.val),
        "cpu_seconds": time.process_time() - start,
    }


@torch.no_grad()
def bits_per_byte(model: GPT, held_out) -> float:
    """Return the bits that the model needs per byte of the held-out text."""
    total = 0.0
    for rows in in_order(held_out, 64):
        batch = make_batch(rows, model.config, None)
        total += model.loss(batch)[0].item() * batch["targets"].numel()
    return total / math.log(2) / held_out.n_bytes


def table(runs: list[Record]) -> str:
    """Return a table of Markdown with a line for each text: the mean of its seeds, and their range."""
    lines = ["| text | documents | tokens in it | epochs | bits per byte |", "|---|---|---|---|---|"]
    for name in (*CLEANING, *CHOOSING):
        of = [run for run in runs if run["arm"] == name]
        if of:
            first, figures = of[0], mean_and_range([run["bits_per_byte"] for run in of], ".3f")
            sizes = f"{first['documents']} | {first['tokens']:,} | {first['epochs']:.1f}"
            lines.append(f"| {name} | {sizes} | {figures} |")
    return "\n".join(lines)


def plot(runs: list[Record], path: Path) -> None:
    """Draw a dot for each seed and a bar for their mean, and what each text is made of."""
    pyplot = load_pyplot()
    names = [name for name in (*CLEANING, *CHOOSING) if any(run["arm"] == name for run in runs)][::-1]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained", sharey=True)
    for y, name in enumerate(names):
        values = [run["bits_per_byte"] for run in runs if run["arm"] == name]
        left.plot(values, [y] * len(values), "o", color="C0", alpha=0.5)
        left.plot(statistics.mean(values), y, "|", color="C0", markersize=16)
    left.set_yticks(range(len(names)), names)
    left.set(xlabel="bits per byte of clean held-out modules")
    left.grid(alpha=0.3)
    made_of = {name: next(run["labels"] for run in runs if run["arm"] == name) for name in names}
    begin = dict.fromkeys(names, 0.0)
    kinds = ("clean", "licence", "item", "exact copy", "near copy", "junk")
    for kind in kinds:
        sizes = [sum(n for label, n in made_of[name].items() if label.startswith(kind)) for name in names]
        right.barh(range(len(names)), [n / 1e6 for n in sizes], left=list(begin.values()), label=kind)
        begin = {name: begin[name] + n / 1e6 for name, n in zip(names, sizes, strict=True)}
    right.set(xlabel="MB by the label of the document")
    right.legend(fontsize=8, loc="lower right")
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    arms = [*CLEANING, *CHOOSING]
    add("--arms", nargs="+", choices=arms, default=arms, help="texts to train on (default all)")
    add(
        "--texts",
        type=command.count,
        default=160,
        help="modules that dirt is planted in (default %(default)s)",
    )
    add(
        "--steps",
        type=command.count,
        default=400,
        help="steps of a run, of 2,048 tokens each (default %(default)s)",
    )
    add("--seeds", type=command.count, default=3, help="runs of each text (default %(default)s)")
    cache = Path("cache/curation")
    add("--cache", type=command.path, default=cache, help="folder for the texts (default %(default)s)")
    add("--out", type=command.new_file, required=True, help="file for the figures, JSON; a plot is beside it")
    args = parser.parse_args(argv)
    about = {"steps": args.steps, "texts": args.texts, "longest": LONGEST}
    kept = Ended(args.out, about, rows="runs", same=SETTINGS)
    texts = Texts(args.cache / f"{args.texts} texts", args.texts)  # the judges are of these texts
    for seed in range(args.seeds):
        for name in args.arms:
            if kept.has(arm=name, seed=seed):
                continue
            records = texts.arm(name, seed)
            labels = Counter()
            for record in records:
                labels[record["label"]] += n_bytes([record])
            _, found = train(records, texts, seed, args.steps)
            kept.add({"arm": name, "seed": seed} | found | {"labels": dict(labels)})
            seconds = found["cpu_seconds"]
            print(f"{name:16} seed {seed}: {found['bits_per_byte']:.3f}, {seconds:.0f} s", flush=True)
    print(table(kept.rows))
    plot(kept.rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    command.run(main)
