"""Commands: how every file that can be run behaves in a shell.

    if __name__ == "__main__":
        command.run(main)

A user's mistake (ValueError, OSError) ends in one line `error: ...` and exit code 2. Ctrl-C prints nothing,
and the exit code is 130. Where the program that reads the output has ended, as in `python gpt.py | head -1`,
a command prints no error and its exit code is 0. Characters that the encoding of the terminal lacks are
printed as question marks.
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
    """Return the path that is the value of a flag.

    Raises ArgumentTypeError if the value is empty, since Path("") would be the working folder.
    """
    return Path(filled(text))


def new_file(text: str) -> Path:
    """Return the path of a file to write, the value of a flag. Raises ArgumentTypeError if it is empty or the
    path of a folder."""
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
    """Call main, and exit with the code that `exit_code` returns, unless that is 0."""
    use_streams()
    code = exit_code(main)
    # What main printed may still be in a buffer. It is written now, because an error while the interpreter
    # ends would be a traceback.
    code = exit_code(sys.stdout.flush) or code
    if code:
        sys.exit(code)


def exit_code(main: Callable[[], int | None]) -> int:
    """Return the exit code of a command: what main returns, where None is 0, or the code of an error.

    An error that main raises is printed on standard error, as is the text of `sys.exit("text")`.
    """
    try:
        return main() or 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1  # as Python does
        return int(end.code or 0)
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def use_streams(outlive_reader: bool = False) -> None:
    """Replace standard output and standard error by streams to which any text can be printed.

    Characters that the encoding lacks become question marks. Where the program that reads standard output has
    ended, writing to it raises BrokenPipeError once, or never with outlive_reader. A stream that is closed
    (`2>&-`) is replaced by one that discards what is written. Streams that a program has set itself, such as
    those of a test, stay as they are.
    """
    # The numbers of closed streams are taken: a file opened later could otherwise get the number 2, and the
    # warnings that libraries write there.
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

    The first error, such as a full disk or a reader that has ended, is raised, or with quiet discarded too.
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
    """Print a line for each size: parameters, layers, width, context, and FLOPs per token in training.

    kind: a model class. sizes: its Configs by name, each with n_layers, d_model, max_seq_len (tokens) and
    flops_per_token(seq_len).
    """
    import torch  # here, since not every command needs it

    print(f"{'size':12} {'parameters':>15} {'layers':>6} {'width':>6} {'context':>8} {'FLOPs/token':>12}")
    for name, c in sizes.items():
        with torch.device("meta"):
            n_params = sum(p.numel() for p in kind(c).parameters())
        flops = c.flops_per_token(c.max_seq_len)
        print(f"{name:12} {n_params:15,} {c.n_layers:6} {c.d_model:6} {c.max_seq_len:8} {flops:12.3e}")
