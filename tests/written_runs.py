"""Runs written by hand, and the parser of the pages made of them, for test_report.py and test_compare.py."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

from engine import report

VOID = {"meta", "br", "hr", "img", "link", "input"}
START = {
    "step": 0,
    "command": "python train.py --model gpt --data 'a<b>.txt'",
    "flags": {"model": "gpt", "size": "tiny", "init_from": None, "steps": 1000, "lr": 0.001, "out": "runs/a"},
    "config": {"n_layers": 4, "norm": "<rms>"},
    "n_params": 3_420_160,
    "fingerprint": "text1-tokens1",
    "text": "text1",
    "task": "gpt",
    "environment": {"python": "3.11.7", "gpu": None},
}


class Page(HTMLParser):
    """Checks that every tag is closed and that nothing is loaded. Keeps text, paths and tags."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.text, self.paths, self.tags = [], "", {}, []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        assert tag not in ("script", "link", "iframe", "object")
        if tag == "img":  # a picture inside the page
            assert attributes.pop("src").startswith("data:image/png;base64,") and attributes["alt"]
        assert not {"src", "href", "srcset", "onload", "onclick"} & attributes.keys()
        if tag == "path":
            self.paths.setdefault(attributes["class"], []).append(attributes["d"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            assert "url(" not in data and "@import" not in data
        self.text += data


def n_points(path: str) -> int:
    return len(re.findall("[ML]", path))


def step_row(step: int, loss: float, **more) -> dict:
    row = {"step": step, "tokens": 100 * step, "loss": loss, "lr": 1e-3, "grad_norm": 0.5, "skipped": 0}
    return row | {"tokens_per_second": 250.0, "mfu": None, "seconds": 0.4 * step} | more


def make_run(
    directory: Path, n_steps: int = 40, offset: float = 0.0, start: dict | None = START, **more
) -> Path:
    """Write the files of a run: a row for each step, and ten evaluations."""
    directory.mkdir()
    every = n_steps // 10
    rows = [{"step": 0, "tokens": 0, "val_loss": 8.0, "perplexity": math.exp(8.0)}]
    for step in range(1, n_steps + 1):
        loss = offset + 3 + 5 * math.exp(-8 * step / n_steps)
        rows.append(step_row(step, loss, **more))
        if step % every == 0:
            evaluation = {"val_loss": loss + 0.25, "perplexity": math.exp(loss + 0.25), "bits_per_byte": 1.5}
            rows.append({"step": step, "tokens": 100 * step, **evaluation})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = "".join(
        f"=== step {step}, validation loss 3.5\nsample <b>&amp; no. {step} é\n\n=== not a heading\n\n"
        for step in range(0, n_steps + 1, every)
    )
    (directory / "samples.txt").write_text(lines, encoding="utf-8")
    if start is not None:
        report.record_start(directory, start, start["step"] > 0)
    return directory


def append_row(directory: Path, row: dict) -> None:
    with open(directory / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
