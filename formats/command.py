"""Commands: how every file of the house that can be run behaves in a shell.

    if __name__ == "__main__":
        command.run(main)

A user's mistake (ValueError, OSError) ends in one line `error: ...` and exit code 2. Ctrl-C ends quietly,
with 130. Where the reader of the output has left, as in `python gpt.py | head -1`, a command ends without a
word. Characters that the encoding of the terminal lacks are printed as question marks.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser of flags whose errors are one line, without the list of all flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def filled(text: str) -> str:
    """Return the value of a flag. Raises ArgumentTypeError if it is empty, as an unset shell variable is."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a value, found an empty one (an unset shell variable?)")
    return text


def path(text: str) -> Path:
    """Return the path in a flag. Raises ArgumentTypeError if it is empty: Path("") is the working folder."""
    return Path(filled(text))


def new_file(text: str) -> Path:
    """Return the path in a flag of a file to write. Raises ArgumentTypeError if it is empty or a folder's."""
    found = path(text)
    if found.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; expected the name of a file to write")
    return found


def count(text: str) -> int:
    """Return the whole number in a flag. Raises ArgumentTypeError if it is none, or less than 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least 1")
    return number


def run(main: Callable[[], int | None]) -> None:
    """Call main, and exit with its code as `exit_code` finds it, unless that is 0."""
    use_streams()
    code = exit_code(main)
    # What main printed is written at the latest now, so that errors do not show when the interpreter ends.
    code = exit_code(sys.stdout.flush) or code
    if code:
        sys.exit(code)


def exit_code(main: Callable[[], int | None]) -> int:
    """Return what main returns (None is 0). An error that it raises is printed, and gives its exit code."""
    try:
        return main() or 0
    except SystemExit as end:  # of argparse
        return int(end.code or 0)
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def use_streams(outlive_reader: bool = False) -> None:
    """Make standard output and error such that any text can be printed to them, whoever reads it.

    Where the reader has left, writing to standard output raises BrokenPipeError once, or with outlive_reader
    never. Characters that the encoding lacks become question marks. A stream that is closed (`2>&-`) is
    replaced by one that discards. Streams that a program has set itself, such as a test's, stay as they are.
    """
    # A file opened later must not get the number of a closed stream: libraries write their warnings to 2.
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for name, number, title in (("stdout", 1, "standard output"), ("stderr", 2, "standard error")):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is original and stream.isatty():
            stream.reconfigure(errors="replace")
        elif stream is original:
            stream.flush()
            raw = io.BufferedWriter(Output(number, title, quiet=outlive_reader or number == 2))
            settings = {"encoding": stream.encoding, "line_buffering": stream.line_buffering}
            setattr(sys, name, io.TextIOWrapper(raw, errors="replace", **settings))


class Output(io.FileIO):
    """The file of standard output or error, which discards what is written after a first error.

    The error (the reader has left, the disk is full) is raised once, or never if quiet.
    """

    def __init__(self, number: int, title: str, quiet: bool):
        super().__init__(number, "wb", closefd=False)
        self.title, self.quiet, self.works = title, quiet, True

    def write(self, data) -> int:
        if self.works:
            try:
                return super().write(data)
            except OSError as error:
                self.works = False
                if not self.quiet:
                    raise OSError(error.errno, error.strerror, self.title) from None
        return len(data)


def print_sizes(kind: type, sizes: dict) -> None:
    """Print the number of parameters, the shape and the FLOPs per token in training of each size.

    kind: a model class; sizes: its Configs by name, with n_layers, d_model, max_seq_len, flops_per_token.
    """
    import torch  # here, since not every command needs it

    print(f"{'size':12} {'parameters':>15} {'layers':>6} {'width':>6} {'context':>8} {'FLOPs/token':>12}")
    for name, c in sizes.items():
        with torch.device("meta"):
            n_params = sum(p.numel() for p in kind(c).parameters())
        flops = c.flops_per_token(c.max_seq_len)
        print(f"{name:12} {n_params:15,} {c.n_layers:6} {c.d_model:6} {c.max_seq_len:8} {flops:12.3e}")
