"""All comparisons of speed, one after the other on one machine.

    python -m results.one_sitting --out results/one_sitting.json --nanogpt nanoGPT   an hour
    python -m results.one_sitting --out results/one_sitting.json --names rl_speed    one of them
    python -m results.one_sitting --out results/one_sitting.json --table             print the file as a table

Each script of SCRIPTS runs by itself and writes its file into --work; what is there already is not measured
again. --out gets the ratios, and keeps those of other scripts that are in it; a file of another machine is
refused. A script that needs a package that is not installed names it and is left out. Nothing else should run
on the machine.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from engine import cpu
from formats import command
from formats.json_file import read_json, write_json
from results.in_turn import shown

SCRIPTS = (
    "decode_speed", "expert_speed", "encoder_speed", "t5_speed", "adapter_speed", "scoring_speed",
    "parallel_speed", "vision_speed", "sampling_speed", "clip_speed", "rl_speed", "word2vec_speed",
    "minhash_speed", "fit_speed", "train_speed",
)  # fmt: skip
ABOUT = {"command", "cpu", "torch", "capability", "python", "numpy", "scipy", "same"}  # names of no row


def ratios(found: object, place: str = "") -> Iterator[dict]:
    """Yield {"what", "ratio", "ratio_min", "ratio_max"} of everything in a file of figures that has a ratio,
    but for the side that the others are compared with, whose ratio is 1. Where a script has no range, the two
    last are None."""
    if isinstance(found, list):
        for part in found:
            yield from ratios(part, place)
    elif isinstance(found, dict) and "ratio" not in found:
        for name, part in found.items():
            yield from ratios(part, name if isinstance(part, dict) else place)
    elif isinstance(found, dict):
        least, most = found.get("range") or (found.get("ratio_min"), found.get("ratio_max"))
        texts = [value for name, value in found.items() if isinstance(value, str) and name not in ABOUT]
        # Labels such as "compiled": true, without which two rows would have one name.
        settings = [name for name, value in found.items() if value is True and name not in ABOUT]
        counts = [f"{name} {found[name]}" for name in ("batch", "experts") if name in found]
        if not least == most == 1:
            what = ", ".join(filter(None, (place, *texts, *settings, *counts)))
            yield {"what": what, "ratio": found["ratio"], "ratio_min": least, "ratio_max": most}


def in_a_table(scripts: dict[str, list[dict]]) -> str:
    """Return the ratios of all scripts as a table of Markdown."""
    lines = ["| script | what | ratio |", "|---|---|---|"]
    for name, rows in scripts.items():
        for row in rows:
            ratio = f"{row['ratio']:.2f}x" if row["ratio_min"] is None else shown(row)
            lines.append(f"| `{name}` | {row['what']} | {ratio} |")
    return "\n".join(lines)


def measure(name: str, work: Path, flags: list[str]) -> list[dict]:
    """Run a script of results/, if its file is not in the folder `work`; return its `ratios`. If it fails,
    print why, and return none."""
    path = work / f"{name}.json"
    if not path.exists():
        print(f"{name} ...", file=sys.stderr, flush=True)
        call = [sys.executable, "-m", f"results.{name}", *flags, "--out", str(path)]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: {(done.stderr.strip() or 'no message').splitlines()[-1]}", file=sys.stderr)
            return []
    return list(ratios(read_json(path, "a file of figures")))


def known(path: Path, about: dict) -> dict[str, list[dict]]:
    """Return the ratios that a file holds, by script. Raises ValueError if the file is of another script, or
    has another value than `about` of one of its names, such as "cpu"."""
    found = read_json(path, "a file of ratios")
    if "scripts" not in found:
        raise ValueError(f"{path} holds no 'scripts': it is of another script; name another file")
    for name, here in about.items():
        if found.get(name) != here:
            raise ValueError(
                f"{path} holds ratios made with {name} {found.get(name)!r}, and this call has {here!r}: name "
                "another file"
            )
    return found["scripts"]


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=command.new_file, required=True, help="file for the ratios, which ends in .json")
    add("--work", type=command.path, default=Path("runs/sitting"), help="their files (default %(default)s)")
    add("--names", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), help="scripts (default: all)")
    add("--nanogpt", type=command.path, help="a clone of nanoGPT; without it train_speed is left out")
    add("--table", action="store_true", help="measure nothing, and print what the file holds as a table")
    args = parser.parse_args(argv)
    if args.table:
        print(in_a_table(known(args.out, {})))
        return
    about = {"cpu": cpu.name(), "cores": os.cpu_count(), "torch": torch.__version__}
    scripts = known(args.out, about) if args.out.exists() else {}
    args.work.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        if name == "train_speed" and args.nanogpt is None:
            print("train_speed: left out, because it needs --nanogpt", file=sys.stderr)
            continue
        rows = measure(name, args.work, [str(args.nanogpt)] if name == "train_speed" else [])
        if rows:
            scripts[name] = rows
            write_json(args.out, about | {"scripts": scripts})
    print(in_a_table(scripts))


if __name__ == "__main__":
    command.run(main)
