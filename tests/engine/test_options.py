"""Any combination of flags begins a run, or ends in one line that says why, before anything is trained."""

import argparse
import contextlib
import io
import shutil
from dataclasses import dataclass

import fuzz
import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
from engine import options
from engine.settings import with_fields
from formats import command

FUZZ = fuzz.drawn(60, fuzz.PER_TEST_FIXTURES)
# Flags that do other work than a run, and --parallel, which makes a process group for good.
LEFT_OUT = {"help", "benchmark", "profile", "parallel"}
NUMBERS = ["0", "-1", "1", "2", "3", "0.5", "1e-3", "1e30", "nan", "-inf", "2.0", "x", "", " 4", "٣", "1_0"]
WORDS = ["x", "", "missing", "text.txt", "folder", "gpt", "bert", "moe", "masking", "denoising", "mae", "all"]
WORDS += ["head", "last:1", "last:x", "tiny", "huge", "bytes", "bpe:300", "bpe:-1", "bpe:x", "text", "\udce4"]
FIELDS = [
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "d_model",
    "d_ff",
    "vocab_size",
    "max_seq_len",
    "window",
    "norm",
]
FIELDS += [
    "norm_eps",
    "positions",
    "mlp",
    "bias",
    "qk_norm",
    "rope_scaling",
    "tie_embeddings",
    "nonsense",
    "",
]
SETTINGS = ["0", "-1", "1", "2", "3.5", "nan", "None", "True", "rms", "layer", "learned", "{}", "[1", "", "="]


def flags_of_train() -> list[argparse.Action]:
    """Return the flags that the parser of train.py knows."""
    found = []

    class Parsed(Exception):
        pass

    def parse(parser, argv):
        found.extend(parser._actions)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Parsed):
        patch.setattr(command.Parser, "parse_args", parse)
        options.parse_arguments([])
    return [action for action in found if action.dest not in LEFT_OUT]


FLAGS = flags_of_train()


@st.composite
def flag(draw) -> list[str]:
    """Draw a flag with as many values as it takes, or one more or less."""
    action = draw(st.sampled_from(FLAGS))
    if action.nargs == 0:
        return [action.option_strings[0]]
    if action.dest == "set":
        values = [f"{draw(st.sampled_from(FIELDS))}={draw(st.sampled_from(SETTINGS))}" for _ in range(2)]
    elif action.type in (int, float):
        values = [draw(st.sampled_from(NUMBERS))]
    else:
        values = [draw(st.sampled_from([*(action.choices or WORDS), "nonsense"]))]
    n = draw(st.sampled_from([1, 1, 1, 1, 1, 1, 0, 2]))
    return [action.option_strings[0], *values[:1] * (n > 0), *values[-1:] * (n > 1)]


@FUZZ
@given(flags=st.lists(flag(), min_size=1, max_size=3))
def test_any_flags_begin_a_run_or_are_refused_in_one_line(flags, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train_and_save", lambda run, log: 0)
    (tmp_path / "folder").mkdir(exist_ok=True)
    argv = ["--model", "gpt", "--data", "text.txt", "--tokenizer", "bytes", "--seq-len", "16", "--out", "run"]
    argv += [word for words in flags for word in words]
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = train.main(argv)
        except SystemExit as exit:
            code = exit.code
    lines = [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) in ((0, 0), (2, 1)), (argv, code, errors.getvalue())
    assert "Traceback" not in errors.getvalue() and "Errno" not in errors.getvalue()


def test_set_may_be_given_several_times():
    args = options.parse_arguments(
        ["--model", "gpt", "--set", "n_layers=3", "--set", "d_model=64", "n_heads=2"]
    )
    assert args.set == ["n_layers=3", "d_model=64", "n_heads=2"]


def test_a_text_may_look_like_a_number():
    @dataclass
    class Config:
        images: str = ""
        n: int = 1

    assert with_fields(Config(), ["images=2024", "n=3"]) == Config("2024", 3)
    with pytest.raises(ValueError, match="--set n=x: expected a value such as 1"):
        with_fields(Config(), ["n=x"])
