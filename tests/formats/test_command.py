"""How a command ends: by mistakes, Ctrl-C, a reader that has left, a full disk, characters it cannot print.

Each command is a process of its own, a small one.
"""

import subprocess
import sys

import pytest

from formats import command

PROGRAM = """
import sys
from formats import command

def many():
    for i in range(100_000):
        print("line", i)

def mistake():
    raise ValueError("size 中: expected another")

def interrupted():
    raise KeyboardInterrupt

def characters():
    print("café 中 \\udc80")

def survives():
    command.use_streams(outlive_reader=True)
    many()
    open(sys.argv[2], "w").close()

def first_file():
    file = open(sys.argv[2], "w")
    print("a warning", file=sys.stderr)
    assert file.fileno() > 2

def leaves():
    sys.exit("the figures differ")

def flags():
    parser = command.Parser(prog="it", description="one\\n" * 9999)
    parser.add_argument("--out", type=command.path)
    parser.parse_args(sys.argv[2:])

if sys.argv[1] == "survives":
    survives()
else:
    command.run(globals()[sys.argv[1]])
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("command") / "program.py"
    path.write_text(PROGRAM, encoding="utf-8")
    return path


def shell(program, line, **environment):
    """Run a line of bash in which $it is the program: (exit code of the program, stdout, stderr)."""
    line = line.replace("$it", f"{sys.executable} {program}")
    done = subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        env={**command.os.environ, **environment},
    )
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def test_a_mistake_is_one_line_and_exit_code_2(program):
    assert shell(program, "$it mistake") == (2, "", "error: size 中: expected another\n")


def test_the_text_of_an_exit_is_printed_with_exit_code_1(program):
    assert shell(program, "$it leaves") == (1, "", "the figures differ\n")


def test_ctrl_c_is_quiet(program):
    assert shell(program, "$it interrupted") == (130, "", "")


def test_a_reader_that_has_left_ends_a_command_without_a_word(program):
    assert shell(program, "$it many | head -1") == (0, "line 0\n", "")
    code, _, error = shell(program, "$it flags --help | head -1")
    assert (code, error) == (0, "")
    assert shell(program, "$it mistake 2>&1 | true")[::2] == (2, "")


def test_a_run_outlives_the_reader_of_its_output(program, tmp_path):
    assert shell(program, f"$it survives {tmp_path / 'end'} 2>&1 | head -1") == (0, "line 0\n", "")
    assert (tmp_path / "end").exists()


@pytest.mark.parametrize(
    "encoding, expected",
    [("ascii", b"caf? ? ?\n"), ("cp1252", b"caf\xe9 ? ?\n"), ("utf-8", "café 中 ?\n".encode())],
)
def test_characters_that_the_terminal_lacks_are_replaced(encoding, expected, program):
    code, out, error = shell(program, "$it characters", PYTHONIOENCODING=encoding)
    assert (code, out, error) == (0, expected.decode("utf-8", "replace"), "")
    assert shell(program, "$it mistake", PYTHONIOENCODING="ascii")[2] == "error: size ?: expected another\n"


def test_closed_streams_do_no_harm(program, tmp_path):
    assert shell(program, "$it mistake 2>&-") == (2, "", "")
    assert shell(program, "$it many >&-") == (0, "", "")
    assert shell(program, f"$it first_file {tmp_path / 'x'} <&- >&- 2>&-") == (0, "", "")
    assert (tmp_path / "x").read_text() == ""


@pytest.mark.skipif(not command.os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_the_output_is_named(program):
    code, _, error = shell(program, "$it many > /dev/full")
    assert code == 2 and error.startswith("error: ") and "standard output" in error and error.count("\n") == 1
    assert shell(program, "$it mistake 2> /dev/full") == (2, "", "")


def test_a_wrong_flag_is_one_line(program):
    assert shell(program, "$it flags --nope") == (
        2,
        "",
        "error: unrecognized arguments: --nope (see it --help)\n",
    )


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_value_of_a_path_is_refused(value, capsys):
    parser = command.Parser(prog="it")
    parser.add_argument("--out", type=command.path)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--out", value])
    assert stop.value.code == 2
    expected = "argument --out: expected a value, found an empty one (an unset shell variable?)"
    assert capsys.readouterr().err == f"error: {expected} (see it --help)\n"


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "two", ""])
def test_a_count_is_a_whole_number_of_at_least_1(text, capsys):
    parser = command.Parser()
    parser.add_argument("--rounds", type=command.count)
    assert parser.parse_args(["--rounds", "3"]).rounds == 3
    with pytest.raises(SystemExit):
        parser.parse_args([f"--rounds={text}"])
    assert f"{text}: expected a whole number of at least 1" in capsys.readouterr().err
