"""Stages of cleaning: each decides for every document whether it stays, and how much of its text.

    stage           a document is rejected, or shortened, if                           looks at
    repair          (mends characters that were decoded wrongly; needs ftfy)           one document
    html            there is no main text in the page (needs trafilatura)              one document
    rules           a rule of the preset does not hold (data/quality_rules.py)         one document
    exact           an earlier one has the same text                                   all documents
    lines           a line of it is in many documents: all but the first lose it       all documents
    near            it is alike to an earlier one that stays (data/near_duplicates.py) all documents
    substrings      50 words of it have come before (data/exact_substrings.py)         all documents
    decontaminate   it holds an item of a test (data/decontaminate.py)                 all documents

They run in this order. The documents are on disk in parts (data/parts.py). A stage that looks at all
documents works in three steps: `summarise_part` writes a summary of a part, a function of DECIDE makes the
decisions from the summaries of all parts, and `apply_part` carries them out in a part. The first and the last
step read one part only, so several processes or machines share them. No file is ever half-written.

A decision is {} (the document stays), {"reason": ..., "like": ...} (it is rejected; like: the place of the
document or test item that it resembles), or {"cuts": [(start, end)...], "reason": ...} (these bytes of its
UTF-8 text are removed).
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from data import decontaminate, exact_substrings, near_duplicates, quality_rules
from data.parts import Documents, counts_of, part, read_lines, write_lines
from data.records import refuse
from formats.atomic import replace_file
from formats.json_file import write_json

LOCAL = ("repair", "html", "rules")
GLOBAL = ("exact", "lines", "near", "substrings", "decontaminate")
PACKAGES = {"repair": "ftfy", "html": "trafilatura"}
SETS_IN_MEMORY = 512  # documents whose shingles or text are kept, as others may be compared with them

Decision = dict[str, Any]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """The settings of the stages, which are flags of data/clean.py."""

    preset: str = "fineweb"  # of quality_rules.PRESETS
    similarity: float = near_duplicates.SIMILARITY  # J from which on two documents are alike
    bands: int = near_duplicates.BANDS
    rows: int = near_duplicates.ROWS
    shingle: int = near_duplicates.SHINGLE  # words
    words: int = exact_substrings.WORDS  # of the shortest repeated substring
    line_copies: int = 10  # documents that share a line, from which on it is cut
    against: tuple[str, ...] = ()  # files of test items for `decontaminate`
    item_fields: tuple[str, ...] = ()  # their fields of text; () means all
    contaminated: str = "remove"  # or "report"
    keep_rejected: bool = False  # write what is removed to a folder
    memory: int = field(default=exact_substrings.MEMORY, compare=False)  # bytes of hashes sorted at a time


# One document.


def judge(stage: str, settings: Settings, text: str) -> tuple[str, str | None]:
    """Return what a stage that looks at one document leaves of its text, and the reason to reject it."""
    if stage == "repair":
        import ftfy

        return ftfy.fix_text(text), None
    if stage == "html":
        import trafilatura

        found = trafilatura.extract(text, favor_precision=True)
        return (found, None) if found else (text, "html: no main text")
    return quality_rules.apply(quality_rules.PRESETS[settings.preset], text)


# All documents: the summaries of a part.


@lru_cache(1)
def search_for(settings: Settings) -> tuple[decontaminate.Search, list[decontaminate.Item]]:
    """Return the test items, and the search for them."""
    fields = list(settings.item_fields)
    items = [
        item for path in settings.against for item in decontaminate.read_items(Path(path), fields, refuse)
    ]
    return decontaminate.Search(items), items


@lru_cache(1)
def signatures_of(bands: int, rows: int) -> near_duplicates.Signatures:
    """Return the functions that make signatures, which hold a buffer and so are made once."""
    return near_duplicates.Signatures(bands, rows)


def summary(stage: str, settings: Settings, texts: Iterator[str]) -> Arrays:
    """Return what a stage that looks at all documents keeps of the n documents of a part, by name.

    exact: digests (n, 2) uint64. near: bands (n, b) uint64. lines, k in all: hashes (k,) uint64, the number
    of the document of each (k,), places (k, 2) in bytes. decontaminate: grams, the runs of words that test
    items have too, uint64, and how many of them each document has, lengths (n,). substrings: nothing.
    """
    if stage == "exact":
        digests = b"".join(blake2b(text.encode(), digest_size=16).digest() for text in texts)
        return {"digests": np.frombuffer(digests, np.uint64).reshape(-1, 2)}
    if stage == "near":
        signatures = signatures_of(settings.bands, settings.rows)
        bands = [signatures.in_bands(near_duplicates.shingles(text, settings.shingle)) for text in texts]
        return {"bands": np.array(bands, np.uint64).reshape(-1, settings.bands)}
    if stage == "lines":
        rows = [
            (hashes, np.full(len(hashes), i), np.array(places, np.int64).reshape(-1, 2))
            for i, text in enumerate(texts)
            for hashes, places in [exact_substrings.lines(text.encode())]
        ]
        empty = (np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros((0, 2), np.int64))
        columns = zip(empty, *rows, strict=True)
        return dict(zip(("hashes", "documents", "places"), map(np.concatenate, columns), strict=True))
    if stage == "decontaminate":
        search = search_for(settings)[0]
        found = [search.found_in(text) for text in texts]
        lengths = np.array([len(grams) for grams in found], np.int64)
        return {"grams": np.concatenate([np.zeros(0, np.uint64), *found]), "lengths": lengths}
    return {}


# All documents: each function of DECIDE yields the decisions, one for each document, in order.


def decide_exact(documents: Documents, summaries: list[Arrays], settings: Settings) -> Iterator[Decision]:
    """Reject every document whose digest an earlier one has."""
    digests = np.concatenate([one["digests"] for one in summaries])
    _, first, inverse = np.unique(
        np.ascontiguousarray(digests).view("V16").ravel(), return_index=True, return_inverse=True
    )
    for i, source in enumerate(first[inverse.ravel()].tolist()):
        yield {} if i == source else {"reason": "exact duplicate", "like": documents[source]["place"]}


def decide_near(documents: Documents, summaries: list[Arrays], settings: Settings) -> Iterator[Decision]:
    """Reject every document that is alike to an earlier one that stays."""
    bands = np.concatenate([one["bands"] for one in summaries])

    @lru_cache(SETS_IN_MEMORY)
    def shingles_of(i: int) -> np.ndarray:
        return near_duplicates.shingles(documents[i]["text"], settings.shingle)

    next_one = 0
    for alike in near_duplicates.find(bands, shingles_of, settings.similarity):
        yield from ({} for _ in range(next_one, alike.text))
        place = documents[alike.representative]["place"]
        yield {"reason": "near duplicate", "like": place, "similarity": round(alike.similarity, 4)}
        next_one = alike.text + 1
    yield from ({} for _ in range(next_one, len(documents)))


def decide_lines(documents: Documents, summaries: list[Arrays], settings: Settings) -> Iterator[Decision]:
    """Cut the lines that are in many documents, in all but the first of these."""

    def once_each() -> Iterator[np.ndarray]:
        for one in summaries:
            # A line that a document has several times counts once.
            pairs = np.unique(np.stack([one["documents"].astype(np.uint64), one["hashes"]], 1), axis=0)
            yield pairs[:, 1]

    total = sum(len(one["hashes"]) for one in summaries)
    many = exact_substrings.repeated_hashes(once_each, total, settings.line_copies, settings.memory)
    is_new = np.ones(len(many), bool)
    for number, one in enumerate(summaries):
        # Find the lines of this part that are in many documents.
        place_of, found = np.searchsorted(many, one["hashes"]), []
        if len(many):
            found = np.flatnonzero(many[np.minimum(place_of, len(many) - 1)] == one["hashes"])

        # The first document that has a line keeps it, each time that it has it.
        cuts: dict[int, list] = {}
        owner: dict[int, int] = {}
        for i in found:
            document, line = int(one["documents"][i]), int(place_of[i])
            if is_new[line]:
                is_new[line] = False
                owner[line] = document
            elif owner.get(line) != document:
                cuts.setdefault(document, []).append(one["places"][i].tolist())
        for document in range(documents.first[number + 1] - documents.first[number]):
            yield {"cuts": cuts[document], "reason": "repeated line"} if document in cuts else {}


def decide_substrings(
    documents: Documents, summaries: list[Arrays], settings: Settings
) -> Iterator[Decision]:
    """Cut the substrings that have come before."""

    def hashes() -> Iterator[np.ndarray]:
        for row in documents.in_order():
            yield exact_substrings.windows(np.frombuffer(row["text"].encode(), np.uint8), settings.words)[2]

    n_total = sum(map(len, hashes()))
    repeated = exact_substrings.repeated_hashes(hashes, n_total, 2, settings.memory)

    @lru_cache(SETS_IN_MEMORY)
    def raw_of(i: int) -> bytes:
        return documents[i]["text"].encode()

    repeats = exact_substrings.Repeats(repeated, raw_of, settings.words)
    for i, row in enumerate(documents.in_order()):
        cuts = repeats.cuts(i, row["text"].encode())
        yield {"cuts": cuts, "reason": "repeated substring"} if cuts else {}


def grams_of(summaries: list[Arrays]) -> Iterator[np.ndarray]:
    """Yield the hashes, uint64, of the runs of words of test items that are in each document."""
    for one in summaries:
        yield from np.split(one["grams"], np.cumsum(one["lengths"])[:-1]) if len(one["lengths"]) else ()


def decide_decontaminate(
    documents: Documents, summaries: list[Arrays], settings: Settings
) -> Iterator[Decision]:
    """Reject the documents that hold a run of words of a test item, unless they are only to be reported."""
    items = search_for(settings)[1]
    item_of = {gram: item.place for item in reversed(items) for gram in item.grams.tolist()}
    common = decontaminate.common(grams_of(summaries))
    for grams in grams_of(summaries):
        rare = [gram for gram in grams.tolist() if gram not in common]
        is_rejected = rare and settings.contaminated == "remove"
        yield {"reason": "holds a test item", "like": item_of[rare[0]]} if is_rejected else {}


def items_report(summaries: list[Arrays], settings: Settings) -> list[dict]:
    """Return a row for each test item: whether it is in the documents, before any is removed."""
    common = decontaminate.common(grams_of(summaries))
    found = {gram for grams in grams_of(summaries) for gram in grams.tolist()} - common
    return [item.report(found) for item in search_for(settings)[1]]


DECIDE = {
    "exact": decide_exact,
    "lines": decide_lines,
    "near": decide_near,
    "substrings": decide_substrings,
    "decontaminate": decide_decontaminate,
}


# Files: functions that are called for each part, by its number.


def summary_file(folder: Path, number: int) -> Path:
    return folder / f"summary-{number:05}.npz"


def decisions_file(folder: Path, number: int) -> Path:
    return folder / "decisions" / f"{number:05}.jsonl"


def summarise_part(stage: str, settings: Settings, before: Path, after: Path, number: int) -> None:
    """Write the summary of a part, unless it is there."""
    path = summary_file(after, number)
    if not path.exists():
        arrays = summary(stage, settings, (row["text"] for row in read_lines(part(before, number))))
        with replace_file(path) as new, open(new, "wb") as file:
            np.savez(file, **arrays)


def read_summaries(folder: Path, n: int) -> list[Arrays]:
    found = []
    for number in range(n):
        with np.load(summary_file(folder, number), allow_pickle=False) as arrays:
            found.append(dict(arrays))
    return found


def apply_part(
    stage: str, settings: Settings, before: Path, after: Path, rejected: Path, number: int
) -> None:
    """Write what a stage leaves of a part, what it rejects, and the counts, unless they are there."""
    if counts_of(after, number).exists():
        return
    rows = read_lines(part(before, number))
    if stage in LOCAL:
        outcomes = map(partial(judge_row, stage, settings), rows)
    else:
        outcomes = map(carry_out, rows, read_lines(decisions_file(after, number)))
    kept, gone, counts = [], [], Counts()
    for row, left, out in outcomes:
        counts.add(row["text"], left, out)
        if left is not None:
            kept.append(row | {"text": left})
        gone += [{"stage": stage, "place": row["place"], **one, "record": row["record"]} for one in out]
    write_lines(part(after, number), kept)
    if gone and settings.keep_rejected:
        write_lines(rejected / f"{stage}-{number:05}.jsonl", gone)
    write_json(counts_of(after, number), counts.as_dict())


def judge_row(stage: str, settings: Settings, row: dict) -> tuple[dict, str | None, list[dict]]:
    """Return a document, the text that a stage of LOCAL leaves of it, and a list of what the stage removes.

    The text is None for a document that is rejected. Each item of the list has a "reason" and a "text".
    """
    text, reason = judge(stage, settings, row["text"])
    if reason is None and not text.strip():
        reason = f"{stage}: nothing is left"
    if reason is not None:
        return row, None, [{"reason": reason, "text": row["text"]}]
    return row, text, []


def carry_out(row: dict, decision: Decision) -> tuple[dict, str | None, list[dict]]:
    """Return the same as `judge_row` for a stage of GLOBAL, from its decision about the document."""
    if not decision:
        return row, row["text"], []
    if "cuts" not in decision:
        return row, None, [decision | {"text": row["text"]}]
    raw = row["text"].encode()
    left = exact_substrings.cut(raw, decision["cuts"]).decode()
    if not left.strip():
        return row, None, [{"reason": f"nothing but {decision['reason']}s", "text": row["text"]}]
    pieces = [raw[start:end].decode() for start, end in decision["cuts"]]
    return row, left, [{"reason": decision["reason"], "text": piece} for piece in pieces]


class Counts:
    """Documents and bytes before and after a stage; for each reason, documents rejected and shortened, and
    the bytes that they lose."""

    def __init__(self):
        self.before, self.after = Counter(), Counter()
        self.reasons: dict[str, Counter] = {}

    def add(self, text: str, left: str | None, out: list[dict]) -> None:
        """Count a document. left: what is left of its text, None if it is rejected. out: what was removed."""
        n_before, n_after = len(text.encode()), 0 if left is None else len(left.encode())
        self.before.update(documents=1, bytes=n_before)
        if left is not None:
            self.after.update(documents=1, bytes=n_after)
        if n_before != n_after or left is None:
            reason = out[0]["reason"] if out else "changed by the stage"
            kind = "rejected" if left is None else "shortened"
            self.reasons.setdefault(reason, Counter()).update({kind: 1, "bytes": n_before - n_after})

    def merge(self, other: dict) -> None:
        self.before.update(other["before"])
        self.after.update(other["after"])
        for reason, counter in other["reasons"].items():
            self.reasons.setdefault(reason, Counter()).update(counter)

    def as_dict(self) -> dict:
        names = ("rejected", "shortened", "bytes")
        reasons = {r: {name: c[name] for name in names} for r, c in sorted(self.reasons.items())}
        before, after = (
            {name: c[name] for name in ("documents", "bytes")} for c in (self.before, self.after)
        )
        return {"before": before, "after": after, "reasons": reasons}


def read_counts(folder: Path, n: int) -> dict:
    """Return the sum of the counts of all parts."""
    total = Counts()
    for number in range(n):
        total.merge(json.loads(counts_of(folder, number).read_text(encoding="utf-8")))
    return total.as_dict()
