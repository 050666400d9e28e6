"""Cleaning: from raw text to documents that are worth training on, and an account of all that is removed.

    python -m data.clean crawl/*.jsonl.gz --out cleaned --preset fineweb --keep-rejected

reads documents from files, folders and globs as `--data` of train.py does, and sends them through the stages
of data/cleaning_stages.py. The result is in

    cleaned/part-00000.jsonl ...     the records as they came in, with the text that is left of them
    cleaned/report.json              documents and bytes before and after each stage, and by reason
    cleaned/rejected/                with --keep-rejected: what was removed, its stage, its reason, and the
                                     document or test item that it resembles
    cleaned/items.jsonl              with --against: each test item, and what the documents hold of it

In every stage, documents and bytes before it are those after it plus those that the reasons count. The same
input and flags give the same bytes, also after a `kill -9`, on several processes and on a Ray cluster:
started again, the command goes on with the part of the stage at which it was stopped. Memory holds a part of
the text (16 MB), some 300 bytes for each document, and for `substrings` at most a gigabyte of hashes.

    python -m data.clean texts/ --out cleaned --preset code --stages rules exact near substrings
    python -m data.clean crawl.parquet --out cleaned --html --repair --format jsonl.zst --workers 8
    python -m data.clean web.jsonl --out cleaned --against test.jsonl --contaminated report
"""

import argparse
import importlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from data import cleaning_stages, near_duplicates, parts
from data.cleaning_stages import DECIDE, GLOBAL, PACKAGES, Counts, Settings
from data.corpus import Files, find_files
from data.decontaminate import read_items
from data.parts import Documents, n_parts, part, read_lines, write_lines
from data.quality_rules import PRESETS
from data.records import RECORDS, decode, open_utf8, read_records, refuse, suffix_of, text_in, zstandard_for
from formats import command
from formats.atomic import replace_directory
from formats.json_file import read_json, write_json
from formats.progress import progress_bar

ORDER = ("repair", "html", "rules", "exact", "lines", "near", "substrings", "decontaminate")
DEFAULT = ("rules", "exact", "near")


def rows_in(files: Files, text_field: str) -> Iterator[tuple[dict, str | None]]:
    """Yield (row, None) for each document of the files, and (row, reason) for what cannot be used.

    In the record of a row the text field is None, so that the text, when it is put back, keeps its place
    among the fields.
    """
    for name, path in files:
        bad: list[str] = []
        if suffix_of(path) in RECORDS:
            records = read_records(path, name, bad.append)
        else:
            with open_utf8(path, name, bad.append) as file:
                text = decode(file.read(), name, 0, bad.append)
            records = [] if text is None else [(name, {"source": name, text_field: text})]
        for place, record in records:
            text = text_in(record, text_field, place, bad.append)
            yield from unreadable(bad)
            if text is not None:
                row = {"place": place, "text": text, "record": record | {text_field: None}}
                yield row, None if text.strip() else "empty"
        yield from unreadable(bad)


def unreadable(problems: list[str]) -> Iterator[tuple[dict, str]]:
    """Yield a row and its reason for each problem of reading, and empty the list."""
    for problem in problems:
        yield {"place": problem, "text": "", "record": {}}, "unreadable"
    problems.clear()


def read_all(rows: Iterable[tuple[dict, str | None]], folder: Path, rejected: Path | None) -> dict:
    """Write rows, as `rows_in` yields them, into parts, except those that are there. Return their counts."""
    number, kept, gone, counts, size = 0, [], [], Counts(), 0

    def end_part() -> None:
        nonlocal number, size, counts
        if not parts.counts_of(folder, number).exists():
            write_lines(part(folder, number), kept)
            if gone and rejected is not None:
                write_lines(rejected / f"read-{number:05}.jsonl", gone)
            write_json(parts.counts_of(folder, number), counts.as_dict())
        number, size, counts = number + 1, 0, Counts()
        kept.clear()
        gone.clear()

    folder.mkdir(exist_ok=True)
    for row, reason in progress_bar(rows, "read", unit="doc"):
        out = [] if reason is None else [{"stage": "read", "reason": reason, **row}]
        counts.add(row["text"], row["text"] if reason is None else None, out)
        gone += out
        if reason is None:
            kept.append(row)
        size += len(row["text"]) + 100
        if size >= parts.PART_BYTES:
            end_part()
    if size:
        end_part()
    return cleaning_stages.read_counts(folder, n_parts(folder))


def run_stage(
    stage: str, settings: Settings, before: Path, after: Path, rejected: Path, engine: tuple
) -> dict:
    """Return the counts of a stage, which reads the parts in one folder and writes them to another."""
    n = n_parts(before)
    after.mkdir(exist_ok=True)
    if stage in GLOBAL and not (after / "decisions").exists():
        work = partial(cleaning_stages.summarise_part, stage, settings, before, after)
        parts.each(work, n, f"{stage}: read", *engine)
        documents, summaries = Documents(before), cleaning_stages.read_summaries(after, n)
        if stage == "decontaminate":
            rows = cleaning_stages.items_report(summaries, settings)
            write_lines(after / "items.jsonl", rows)
        decisions = DECIDE[stage](documents, summaries, settings)
        with replace_directory(after / "decisions") as new:
            for number in range(n):
                size = documents.first[number + 1] - documents.first[number]
                some = (next(decisions) for _ in range(size))
                write_lines(new / f"{number:05}.jsonl", progress_bar(some, f"{stage}: decide", total=size))
    work = partial(cleaning_stages.apply_part, stage, settings, before, after, rejected)
    parts.each(work, n, stage, *engine)
    return cleaning_stages.read_counts(after, n)


def clean(
    files: Files, out: Path, stages: list[str], settings: Settings, text_field: str, suffix: str, engine
) -> dict:
    """Send the documents of the files through the stages, and return the report.

    engine: the name of one of parts.ENGINES and the number of processes.
    """
    rejected = out / "rejected"
    if settings.keep_rejected:
        rejected.mkdir(exist_ok=True)

    def run(stage: str, before: Path, after: Path) -> dict:
        if stage != "read":
            return run_stage(stage, settings, before, after, rejected, engine)
        counts = read_all(rows_in(files, text_field), after, rejected if settings.keep_rejected else None)
        check_some(counts, files, text_field)
        return counts

    done, last = through(["read", *stages], out / "work", run)
    write_parts(last, out, text_field, suffix)
    items = last / "items.jsonl"
    if items.exists():
        items.replace(out / "items.jsonl")
    report = {"stages": done}
    write_json(out / "report.json", report)
    shutil.rmtree(out / "work")
    return report


def through(stages: list[str], work: Path, run: Callable[[str, Path, Path], dict]) -> tuple[dict, Path]:
    """Return the counts of each stage, and the folder with the parts that the last one left.

    run(stage, before, after) reads the parts in one folder, writes those in another and returns the counts.
    Each stage that is done has its counts in STAGE.json of the folder `work`, and then the documents of the
    one before are removed.
    """
    work.mkdir(parents=True, exist_ok=True)
    done: dict[str, dict] = {}
    before = work / stages[0]
    for stage in stages:
        path, after = work / f"{stage}.json", work / stage
        if not path.exists():
            write_json(path, run(stage, before, after))
        done[stage] = read_json(path)
        if before != after:
            shutil.rmtree(before, ignore_errors=True)
        before = after
    return done, before


def write_parts(folder: Path, out: Path, text_field: str, suffix: str) -> None:
    """Write the records of the documents in the parts of a folder, with their texts, to files in `out`."""
    for number in range(n_parts(folder)):
        rows = read_lines(part(folder, number))
        records = [row["record"] | {text_field: row["text"]} for row in rows]
        if records:
            parts.write_records(out / f"part-{number:05}.{suffix}", records)


def check_some(counts: dict, files: Files, text_field: str) -> None:
    """Raise ValueError naming the first problem if no document could be read."""
    if not counts["after"]["documents"]:
        row, reason = next(rows_in(files, text_field), ({"place": "no record"}, "empty"))
        raise ValueError(f"input: no text in {len(files)} files, the first is {reason}: {row['place']:.300}")


def table(report: dict) -> str:
    """Return the report as lines: what comes in, what leaves for which reason, what is left."""
    stages = report["stages"]
    start = stages["read"]["before"]
    lines = [f"{'':44} {'documents':>10} {'shortened':>10} {'bytes':>14}"]
    lines.append(f"{'read':44} {start['documents']:10,} {'':10} {start['bytes']:14,}")
    for name, stage in stages.items():
        for reason, counts in sorted(stage["reasons"].items(), key=lambda pair: -pair[1]["bytes"]):
            what = f"  {name}: {reason.removeprefix(f'{name}: ')}"
            n, shortened = counts["rejected"], counts["shortened"]
            lines.append(f"{what:44.60} {-n:10,} {shortened:10,} {-counts['bytes']:14,}")
    end = stages[list(stages)[-1]]["after"]
    share = end["bytes"] / max(1, start["bytes"])
    lines.append(f"{'left':44} {end['documents']:10,} {'':10} {end['bytes']:14,}  ({share:.1%})")
    return "\n".join(lines)


def check(args: argparse.Namespace, stages: list[str], files: Files) -> None:
    """Raise ValueError for flags that do not fit, and for packages that are missing, before any work."""
    for name, least in (("bands", 1), ("rows", 1), ("shingle", 1), ("substring_words", 2), ("workers", 1)):
        if getattr(args, name) < least:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(args, name)}: expected at least {least}")
    if args.line_copies < 2:
        raise ValueError(f"--line-copies {args.line_copies}: expected at least 2 documents")
    if not 0 < args.similarity <= 1:
        raise ValueError(f"--similarity {args.similarity}: expected a number above 0, at most 1")
    for stage in stages:
        if package := PACKAGES.get(stage):
            try:
                importlib.import_module(package)
            except ImportError as error:
                # A package may be there and lack one that it needs, as trafilatura without lxml_html_clean.
                why = str(error).splitlines()[0]
                raise ValueError(f"--{stage} needs {package}: pip install {package} ({why})") from None
    check_packages(args.engine, args.format, files)
    for path in args.against:
        read_items(Path(path), args.item_fields, refuse)


def check_packages(engine: str, format: str, files: Files) -> None:
    """Raise ValueError for a missing package that the engine, the format to write or a file needs."""
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise ValueError("--engine ray needs Ray: pip install ray")
    needs_arrow = format == "parquet" or any(suffix_of(path) == ".parquet" for _, path in files)
    if needs_arrow and importlib.util.find_spec("pyarrow") is None:
        raise ValueError("parquet needs pyarrow: pip install pyarrow")
    for path in [*(path for _, path in files), Path(f"--format {format}")]:
        if path.suffix == ".zst":
            zstandard_for(path)


def stamps(files: Iterable[tuple[str, Path]]) -> list[list]:
    """Return the name, size and time of change of each file, by which `made_once` knows it again."""
    return [[name, path.stat().st_size, path.stat().st_mtime_ns] for name, path in files]


def made_once(out: Path, made_with: dict, make: Callable[[], dict]) -> dict:
    """Return the report of the finished result in the folder out, or of make(), which makes it there.

    made_with: the flags and files that the result depends on. Raises ValueError if out holds the result of
    others, or if another process is at work there.
    """
    made_with = json.loads(json.dumps(made_with))  # as it will be read: tuples become lists
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / "lock", timeout=1):
            if not begin(out, made_with):
                return make()
            shutil.rmtree(out / "work", ignore_errors=True)
            return read_json(out / "report.json")
    except Timeout:
        raise ValueError(f"--out {out}: another process is at work there; wait for it") from None


def begin(out: Path, made_with: dict) -> bool:
    """Return whether out holds the finished result of the same flags and files.

    In a new folder they are written to settings.json. Raises ValueError if out holds anything else.
    """
    path = out / "settings.json"
    if not path.exists():
        ours = ("lock", "settings.json.new")  # the second, where a process was killed as it wrote that file
        others = [entry.name for entry in out.iterdir() if entry.name not in ours]
        if others:
            raise ValueError(f"--out {out}: holds {others[0]} already; name a new folder")
        write_json(path, made_with)
    known = read_json(path)
    different = [name for name in made_with if known.get(name) != made_with[name]]
    if different:
        raise ValueError(
            f"--out {out}: was made with other {', '.join(different)}; remove it or name another folder"
        )
    return (out / "report.json").exists()


def parser() -> command.Parser:
    parser = command.Parser(description="Clean text for training, and count everything that leaves.")
    add = parser.add_argument
    add(
        "input",
        nargs="+",
        type=command.filled,
        help="files, folders, globs or `stdlib`, as --data of train.py",
    )
    add("--out", type=command.path, required=True, help="folder for what stays, the report, and the work")
    add("--preset", choices=tuple(PRESETS), default="fineweb", help="set of rules (default %(default)s)")
    known = [stage for stage in ORDER if stage not in PACKAGES and stage != "decontaminate"]
    add("--stages", nargs="*", choices=known, default=DEFAULT, help="stages (default rules exact near)")
    add("--repair", action="store_true", help="mend wrongly decoded characters first, with ftfy")
    add("--html", action="store_true", help="take the main text out of pages first, with trafilatura")
    add("--against", nargs="+", default=[], help="files of test items that the text must not hold")
    add(
        "--item-fields",
        nargs="+",
        default=[],
        help="fields of an item that are searched (all strings if not given)",
    )
    add(
        "--contaminated",
        choices=("remove", "report"),
        default="remove",
        help="remove documents that hold an item, or report the items (default %(default)s)",
    )
    add("--text-field", default="text", help="field of a record that holds the text (default %(default)s)")
    add(
        "--format",
        choices=parts.FORMATS,
        default="jsonl",
        help="format of the files that are written (default %(default)s)",
    )
    add("--keep-rejected", action="store_true", help="write what leaves too, with its reason")
    add_numbers(parser)
    add("--workers", type=int, default=1, help="processes (default %(default)s)")
    add(
        "--engine",
        choices=parts.ENGINES,
        default="local",
        help="this machine, or a Ray cluster that shares --out (default local)",
    )
    return parser


def add_numbers(parser: command.Parser) -> None:
    """Add the flags whose values are numbers of a stage."""
    add = parser.add_argument
    add(
        "--similarity",
        type=float,
        default=near_duplicates.SIMILARITY,
        help="Jaccard similarity of near duplicates (default %(default)s)",
    )
    add("--bands", type=int, default=near_duplicates.BANDS, help="bands of a signature (default %(default)s)")
    add("--rows", type=int, default=near_duplicates.ROWS, help="hashes in a band (default %(default)s)")
    add(
        "--shingle",
        type=int,
        default=near_duplicates.SHINGLE,
        help="words of a shingle (default %(default)s)",
    )
    add(
        "--substring-words",
        type=int,
        default=Settings.words,
        help="words of a repeated substring (default %(default)s)",
    )
    add(
        "--line-copies",
        type=int,
        default=Settings.line_copies,
        help="documents from which on a line is repeated (default %(default)s)",
    )


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    found = [file for name in args.input for file in find_files(name, Path("cache"), print, flag="input")]
    files = list({path.resolve(): (name, path) for name, path in found}.values())
    chosen = {*args.stages, *(name for name in PACKAGES if getattr(args, name))}
    stages = [stage for stage in ORDER if stage in chosen or (stage == "decontaminate" and args.against)]
    check(args, stages, files)
    settings = Settings(
        preset=args.preset,
        similarity=args.similarity,
        bands=args.bands,
        rows=args.rows,
        shingle=args.shingle,
        words=args.substring_words,
        line_copies=args.line_copies,
        against=tuple(args.against),
        item_fields=tuple(args.item_fields),
        contaminated=args.contaminated,
        keep_rejected=args.keep_rejected,
    )

    # What the result depends on; the engine and the number of processes are no part of that.
    stats = stamps(files)
    made_with = {"input": stats, "stages": stages, "text field": args.text_field, "format": args.format}
    made_with |= {"settings": {name: value for name, value in vars(settings).items() if name != "memory"}}
    if args.against:
        made_with["test items"] = stamps((name, Path(name)) for name in args.against)
    engine = (args.engine, args.workers)
    work = partial(clean, files, args.out, stages, settings, args.text_field, args.format, engine)
    report = made_once(args.out, made_with, work)
    print(table(report))


if __name__ == "__main__":
    command.run(main)
