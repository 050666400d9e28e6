"""Curating: choose the documents that are worth training on by scores, and mix sources by weights.

    python -m data.curate wiki=wiki.jsonl "web=crawl/*.jsonl.gz" --out curated \\
        --stage classifier=quality pareto=9 --stage perplexity=runs/gpt/model head \\
        --mix wiki=0.3 web=0.7 --bytes 1e9 --keep-rejected

reads documents of sources, each with a name, as data/clean.py does, and sends them through the stages in the
order of the flags. A stage is a score and a rule (data/selection.py) that decides by it which documents stay:

    classifier=DIR      p(good) by data/quality_classifier.py
    perplexity=MODEL    of the text under a decoder, data/model_scores.py
    ask_llm=MODEL       p("yes") of a language model that is asked about the text, data/model_scores.py
    random              a number drawn for each document; with top=SHARE the control for the other scores

Then, with --mix or --temperature, documents are drawn from the sources by weights (data/mixture.py). The
folder --out holds part-00000.jsonl ..., report.json and rejected/, as after data/clean.py, and
composition.png, a picture of the bytes of each source after each stage. Every document that leaves is
counted, the same input and flags give the same bytes, also with several processes or on a Ray cluster, and an
interrupted command continues where it was. Memory holds a part of the text, and a few numbers for each
document."""

import argparse
import shutil
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data import clean, mixture, parts, selection
from data.cleaning_stages import Counts, read_counts
from data.corpus import Files, find_files
from data.parts import Documents, n_parts, part, read_lines, write_lines
from data.quality_classifier import Classifier
from formats import command
from formats.atomic import replace_file
from formats.figures import load_pyplot, save_figure
from formats.json_file import write_json
from formats.progress import progress_bar

SCORES = ("classifier", "perplexity", "ask_llm", "random")

Stage = tuple[str, str, str]  # the score, the directory of its model ("" for none), the rule


def parse_stage(words: list[str]) -> Stage:
    """Return a stage of two words such as "ask_llm=runs/gpt/model" and "top=0.5". Raises ValueError."""
    score, _, directory = words[0].partition("=")
    if score not in SCORES or bool(directory) == (score == "random"):
        expected = ", ".join(f"{name}=DIR" if name != "random" else name for name in SCORES)
        raise ValueError(f"--stage {words[0]}: expected one of {expected}")
    try:
        name, _ = selection.parse(words[1])
    except ValueError as error:
        raise ValueError(f"--stage {' '.join(words)}: {error}") from None
    if name == "pareto" and score == "perplexity":
        raise ValueError(f"--stage {' '.join(words)}: Pareto's rule is for scores from 0 to 1")
    return score, directory, words[1]


def find_sources(words: list[str]) -> dict[str, Files]:
    """Return the files of each source from words NAME=WHAT, or WHAT alone, which is then the name too.

    WHAT is as --data of train.py. A name may come several times. A file that several words name belongs to
    the source of the first one. Raises ValueError for an empty name, and for WHAT without files.
    """
    sources: dict[str, Files] = {}
    seen: set[Path] = set()
    for word in words:
        name, equals, what = word.partition("=")
        if not equals or Path(word).exists() or "/" in name:
            name, what = word, word
        if not name:
            raise ValueError(f"input {word}: expected NAME=WHAT, with the name of a source before the =")
        files = find_files(what, Path("cache"), print, flag="input")
        new = {path.resolve(): (file, path) for file, path in files if path.resolve() not in seen}
        seen |= new.keys()
        sources.setdefault(name, []).extend(new.values())
    return sources


def rows_of(sources: dict[str, Files], text_field: str) -> Iterator[tuple[dict, str | None]]:
    """Yield (row, reason) as `clean.rows_in` does, with "source" in the row, the name of its source."""
    for name, files in sources.items():
        for row, reason in clean.rows_in(files, text_field):
            yield row | {"source": name}, reason


# A stage: the scores of each part, a decision about all documents, what stays of each part.


def score_part(stage: Stage, seed: int, before: Path, after: Path, number: int) -> None:
    """Write the scores and the draws of the documents of a part, unless the file is there already."""
    path = after / f"scores-{number:05}.npz"
    if path.exists():
        return
    score, directory, _ = stage
    texts = [row["text"] for row in read_lines(part(before, number))]
    draws = selection.draws(texts, seed)
    if score == "random":
        found = draws
    elif score == "classifier":
        found = Classifier.load(Path(directory)).scores(texts)
    else:
        from data import model_scores  # which loads PyTorch, and every file of formats/

        bar = progress_bar(texts, f"{score}, part {number}", unit="doc", leave=False, position=0)
        found = np.fromiter(model_scores.scores(score, Path(directory), bar), np.float64, len(texts))
    with replace_file(path) as new, open(new, "wb") as file:
        np.savez(file, scores=found, draws=draws)


def read_scores(folder: Path, n: int) -> list[dict[str, np.ndarray]]:
    """Return for each of n parts {"scores", "draws"}, float64, as `score_part` wrote them."""
    found = []
    for number in range(n):
        with np.load(folder / f"scores-{number:05}.npz", allow_pickle=False) as arrays:
            found.append(dict(arrays))
    return found


def choose_part(
    name: str,
    rule: str,
    before: Path,
    after: Path,
    rejected: Path | None,
    number: int,
    kept: np.ndarray,
) -> None:
    """Write the documents of a part that stay, those that do not, and the counts, unless these are there.

    name: of the stage. kept: (n,) bool, which documents of the part stay. rejected: the folder for the
    others, None to leave them out.
    """
    if parts.counts_of(after, number).exists():
        return
    with np.load(after / f"scores-{number:05}.npz", allow_pickle=False) as arrays:
        scores = arrays["scores"].tolist()
    stay, gone, counts = [], [], Counts()
    for row, score, stays in zip(read_lines(part(before, number)), scores, kept, strict=True):
        row["scores"] = row.get("scores", {}) | {name: score if np.isfinite(score) else None}
        out = [] if stays else [{"stage": name, "reason": selection.reason(rule, score)} | row]
        counts.add(row["text"], row["text"] if stays else None, out)
        gone += out
        stay += [row] if stays else []
    write_lines(part(after, number), stay)
    if gone and rejected is not None:
        write_lines(rejected / f"{name}-{number:05}.jsonl", gone)
    write_json(parts.counts_of(after, number), counts.as_dict())


def run_stage(
    name: str, stage: Stage, seed: int, before: Path, after: Path, rejected: Path | None, engine: tuple
) -> dict:
    """Return the counts of a stage, which reads the parts in one folder and writes them to another.

    engine: one of parts.ENGINES, and the number of processes, which compute the scores. Raises ValueError if
    no document stays.
    """
    n, rule = n_parts(before), stage[2]
    after.mkdir(exist_ok=True)
    parts.each(partial(score_part, stage, seed, before, after), n, f"{name}: score", *engine)
    found = read_scores(after, n)
    sizes = np.cumsum([len(one["scores"]) for one in found])
    scores = np.concatenate([one["scores"] for one in found])
    kept = selection.kept(rule, scores, np.concatenate([one["draws"] for one in found]))
    if not kept.any():
        finite = scores[np.isfinite(scores)]
        span = f"from {finite.min():.4g} to {finite.max():.4g}" if len(finite) else "not finite"
        raise ValueError(f"--stage {stage[0]} {rule}: no document stays; the scores are {span}")
    for number, some in enumerate(np.split(kept, sizes[:-1])):
        choose_part(name, rule, before, after, rejected, number, some)
    return read_counts(after, n)


def mix(
    before: Path, after: Path, names: list[str], weights, alpha: float, budget: int | None, seed: int
) -> dict:
    """Write the parts of a mixture, and return its counts.

    weights: by source, with the sum 1; None for those in proportion to size^alpha. budget: bytes of the
    mixture; None for as many as there are.
    """
    # Find the source and the size of each document, and draw.
    documents = Documents(before)
    source_of, sizes = np.zeros(len(documents), np.int64), np.zeros(len(documents), np.int64)
    for i, row in enumerate(progress_bar(documents.in_order(), "mix: read", total=len(documents))):
        source_of[i], sizes[i] = names.index(row["source"]), len(row["text"].encode())
    of_each = np.bincount(source_of, sizes, minlength=len(names)).astype(np.int64).tolist()
    weights = weights or mixture.by_temperature(dict(zip(names, of_each, strict=True)), alpha)
    drawn = mixture.draw(source_of, sizes, names, weights, budget or int(sizes.sum()), seed)

    # Write the documents in the order that was drawn.
    after.mkdir(exist_ok=True)
    number, rows, size = 0, [], 0
    for i in progress_bar(drawn.order.tolist(), "mix: write", unit="doc"):
        rows.append(documents[i])
        size += len(rows[-1]["text"]) + 100
        if size >= parts.PART_BYTES:
            write_lines(part(after, number), rows)
            number, rows, size = number + 1, [], 0
    write_lines(part(after, number), rows)

    # A document that is not drawn is a loss. Each further copy of one that is drawn again is a negative loss,
    # so that the bytes before less all losses are the bytes after.
    times = np.bincount(drawn.order, minlength=len(documents))
    again = np.maximum(times - 1, 0)
    lost = {"rejected": int((times == 0).sum()), "shortened": 0, "bytes": int(sizes[times == 0].sum())}
    more = {"rejected": -int(again.sum()), "shortened": 0, "bytes": -int((again * sizes).sum())}
    once = np.ones_like(times)
    total = [{"documents": int(n.sum()), "bytes": int((n * sizes).sum())} for n in (once, times)]
    reasons = {"not drawn": lost, "read again": more}
    return {"before": total[0], "after": total[1], "reasons": reasons, "mixture": drawn.sources}


def composition(folder: Path) -> dict[str, dict[str, int]]:
    """Return {"documents", "bytes"} by source, of the documents in the parts of a folder."""
    found: dict[str, Counter] = {}
    for number in range(n_parts(folder)):
        for row in read_lines(part(folder, number)):
            found.setdefault(row["source"], Counter()).update(documents=1, bytes=len(row["text"].encode()))
    return {name: dict(counter) for name, counter in found.items()}


def curate(
    sources: dict[str, Files], stages: list[Stage], weights: dict | None, args: argparse.Namespace
) -> dict:
    """Send the documents of the sources through the stages, mix them, write all results, and return the
    report. weights: of --mix, None without it."""
    rejected = args.out / "rejected" if args.keep_rejected else None
    if rejected is not None:
        rejected.mkdir(exist_ok=True)
    names = [f"{i}-{score}" for i, (score, _, _) in enumerate(stages, 1)]
    by_name, files = dict(zip(names, stages, strict=True)), [file for one in sources.values() for file in one]
    is_mixed = weights is not None or args.temperature is not None

    def run(name: str, before: Path, after: Path) -> dict:
        if name == "read":
            counts = clean.read_all(rows_of(sources, args.text_field), after, rejected)
            clean.check_some(counts, files, args.text_field)
        elif name == "mix":
            alpha = 1.0 if args.temperature is None else args.temperature
            counts = mix(before, after, list(sources), weights, alpha, args.bytes, args.seed)
        else:
            engine = (args.engine, args.workers)
            counts = run_stage(name, by_name[name], args.seed, before, after, rejected, engine)
        return counts | {"sources": composition(after)}

    done, last = clean.through(["read", *names, *["mix"] * is_mixed], args.out / "work", run)
    if args.keep_scores:
        keep_scores(last)
    clean.write_parts(last, args.out, args.text_field, args.format)
    report = {"stages": done}
    draw(report, list(sources), args.out / "composition.png")
    write_json(args.out / "report.json", report)
    shutil.rmtree(args.out / "work")
    return report


def keep_scores(folder: Path) -> None:
    """Put the scores of the documents in the parts of a folder into the field "scores" of their records."""
    for number in range(n_parts(folder)):
        rows = [row | {"record": row["record"] | {"scores": row.get("scores", {})}}
                for row in read_lines(part(folder, number))]  # fmt: skip
        write_lines(part(folder, number), rows)


# What is printed and drawn.


def table(report: dict, names: list[str]) -> str:
    """Return the report as lines: what left, the bytes and share of each source by stage, and the epochs."""
    stages, width = report["stages"], max(12, *map(len, names)) + 2
    lines = [clean.table(report), "", f"{'MB after':14}" + "".join(f"{name:>{width}}" for name in names)]
    for stage, counts in stages.items():
        total = max(1, sum(source["bytes"] for source in counts["sources"].values()))
        sizes = [counts["sources"].get(name, {"bytes": 0})["bytes"] for name in names]
        cells = [f"{size / 1e6:.2f} {size / total:5.1%}" for size in sizes]
        lines.append(f"{stage:14}" + "".join(f"{cell:>{width}}" for cell in cells))
    if "mix" in stages:
        epochs = {name: stages["mix"]["mixture"][name]["epochs"] for name in names}
        lines.append(f"{'epochs':14}" + "".join(f"{epochs[name]:>{width}.2f}" for name in names))
        if many := [name for name in names if epochs[name] > mixture.MOST_EPOCHS]:
            lines.append(f"{', '.join(many)}: read more than {mixture.MOST_EPOCHS} times, which adds little")
    return "\n".join(lines)


def draw(report: dict, names: list[str], path: Path) -> None:
    """Draw a bar for each stage, of the bytes of each source."""
    stages = report["stages"]
    figure, axes = load_pyplot().subplots(figsize=(8, 1.2 + 0.5 * len(stages)), layout="constrained")
    begin = np.zeros(len(stages))
    for name in names:
        found = [counts["sources"].get(name, {"bytes": 0})["bytes"] / 1e6 for counts in stages.values()]
        axes.barh(range(len(stages)), found, left=begin, label=name)
        begin += found
    axes.set_yticks(range(len(stages)), list(stages))
    axes.invert_yaxis()
    axes.set(xlabel="MB", title="what the corpus is made of, after each stage")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


# The command.


def parser() -> command.Parser:
    parser = command.Parser(description="Choose documents by scores, mix sources, and count what leaves.")
    add = parser.add_argument
    add(
        "input",
        nargs="+",
        type=command.filled,
        help="NAME=WHAT or WHAT for each source: a file, a folder, a glob or `stdlib`, as --data of train.py",
    )
    add("--out", type=command.path, required=True, help="folder for what stays, the report, and the work")
    add(
        "--stage",
        nargs=2,
        action="append",
        default=[],
        metavar=("SCORE", "RULE"),
        help="a score and the rule that decides by it, such as classifier=DIR pareto=9; may be given again",
    )
    add("--mix", nargs="+", metavar="NAME=WEIGHT", help="share of each source in the bytes that are read")
    add("--temperature", type=float, metavar="ALPHA", help="weights in proportion to size^ALPHA instead")
    add("--bytes", type=float, help="bytes of the mixture (default: as many as there are)")
    add("--seed", type=int, default=0, help="seed of all draws (default %(default)s)")
    add("--text-field", default="text", help="field of a record that holds the text (default %(default)s)")
    add("--format", choices=parts.FORMATS, default="jsonl", help="format of the files (default %(default)s)")
    add("--keep-rejected", action="store_true", help="write what leaves too, with its reason and scores")
    add("--keep-scores", action="store_true", help="write the scores of what stays, as a field `scores`")
    add("--workers", type=int, default=1, help="processes that compute scores (default %(default)s)")
    add(
        "--engine",
        choices=parts.ENGINES,
        default="local",
        help="this machine, or a Ray cluster that shares --out (default local)",
    )
    return parser


def check(args: argparse.Namespace, sources: dict[str, Files], stages: list[Stage]) -> dict | None:
    """Return the weights of --mix, None without it. Raises ValueError for flags that do not fit."""
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: expected at least 1")
    if not 0 <= args.seed < 1 << 63:
        raise ValueError(f"--seed {args.seed}: expected a number from 0 on")
    if args.mix is not None and args.temperature is not None:
        raise ValueError("--mix and --temperature: both give weights; expected one of them")
    if args.temperature is not None and not 0 <= args.temperature <= 1:
        raise ValueError(f"--temperature {args.temperature:g}: expected a number from 0 to 1")
    if args.bytes is not None:
        if args.mix is None and args.temperature is None:
            raise ValueError("--bytes is of a mixture: expected --mix or --temperature too")
        if not 1 <= args.bytes < 1 << 60:
            raise ValueError(f"--bytes {args.bytes:g}: expected at least 1")
        args.bytes = int(args.bytes)
    weights = None if args.mix is None else mixture.parse_weights(args.mix, list(sources))
    clean.check_packages(args.engine, args.format, [file for files in sources.values() for file in files])
    for score, directory, _ in stages:
        if score == "classifier":
            Classifier.load(Path(directory))
        elif score != "random":
            from data import model_scores

            model_scores.check(Path(directory), score)
    return weights


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    stages = [parse_stage(words) for words in args.stage]
    sources = find_sources(args.input)
    weights = check(args, sources, stages)

    # What the result depends on; the engine and the number of processes are no part of that.
    directories = [
        path for _, directory, _ in stages if directory for path in sorted(Path(directory).iterdir())
    ]
    files = [(name, path) for files in sources.values() for name, path in files]
    stats, models = clean.stamps(files), clean.stamps((str(path), path) for path in directories)
    flags = ("mix", "temperature", "bytes", "seed", "text_field", "format", "keep_rejected", "keep_scores")
    made_with = {"input": stats, "sources": list(sources), "stages": args.stage, "models": models}
    made_with |= {name: getattr(args, name) for name in flags}
    report = clean.made_once(args.out, made_with, partial(curate, sources, stages, weights, args))
    print(table(report, list(sources)))


if __name__ == "__main__":
    command.run(main)
