"""Hostile programs: each verdict is right, and nothing is left behind, as root and as a user."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from evaluation import jail, published, sandbox
from evaluation.sandbox import Limits, Task, Verdict, check_all

ROOT = Path(__file__).parents[2]
TESTS = "assert f(2) == 4\nassert f(3) == 6"
RIGHT = "def f(x): return 2 * x"
QUICK = Limits(cpu_seconds=1, wall_seconds=8, memory=1 << 28)

SECTIONS = (ROOT / "tests/fixtures/hostile_programs.txt").read_text().split("\n=== ")[1:]
# Name: (does it pass?, the program).
HOSTILE = {}
for section in SECTIONS:
    title, _, program = section.partition("\n")
    name, _, mark = title.rpartition(": ")
    HOSTILE[name] = (mark == "passes", program)
RUN = """
import json, sys
from pathlib import Path
from evaluation import sandbox
tasks, limits, jail = json.load(sys.stdin)
sandbox.JAIL = Path(jail)
print(json.dumps(sandbox.check_all([sandbox.Task(*task) for task in tasks], sandbox.Limits(**limits), 4)))
"""


def python_for_users() -> str | None:
    """Return a Python that a user other than root may run."""
    for path in (sys.executable, "/usr/local/bin/python3", "/usr/bin/python3"):
        test = [path, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        try:
            if subprocess.run(test, user=12345, capture_output=True).returncode == 0:
                return path
        except OSError:
            continue
    return None


def verdicts_as_user(tasks: list[Task]) -> list[Verdict]:
    """Return the verdicts of a process without root's rights."""
    python = python_for_users()
    if python is None or not os.access(ROOT, os.R_OK):
        pytest.skip("needs a Python that users other than root may run")
    done = subprocess.run(
        [python, "-c", RUN],
        input=json.dumps([tasks, dataclasses.asdict(QUICK), str(sandbox.JAIL)]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        user=12345,
        group=12345,
        extra_groups=[],
        env={},
    )
    if "PermissionError" in done.stderr:
        pytest.skip("users other than root may not read the project")
    assert done.returncode == 0, done.stderr
    return [Verdict(*verdict) for verdict in json.loads(done.stdout)]


def processes_of(path: Path) -> list[str]:
    """Return the processes whose command line holds a path."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(path).encode() in (folder / "cmdline").read_bytes():
                found.append(folder.name)
        except OSError:
            continue
    return found


@pytest.fixture
def public_folder():
    """Return a folder that every user may read."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.parametrize("user", ["of the tests", "without rights"])
def test_hostile_programs_get_the_right_verdict_and_leave_nothing(user, public_folder, monkeypatch):
    if user == "without rights" and os.getuid() != 0:
        pytest.skip("the tests run as a user already")
    # Everybody may write to the folder, so that only the sandbox keeps the programs from it.
    outside = public_folder / "outside"
    outside.mkdir()
    outside.chmod(0o777)
    (outside / "kept").write_text("text")
    (outside / "kept").chmod(0o666)
    monkeypatch.setattr(sandbox, "JAIL", public_folder / "jail.py")
    shutil.copy(jail.__file__, sandbox.JAIL)

    with socket.create_server(("127.0.0.1", 0)) as server:
        places = {"OUTSIDE": outside, "PORT": server.getsockname()[1], "PARENT": os.getpid()}
        tasks = []
        for _, program in HOSTILE.values():
            for place, value in places.items():
                program = program.replace(place, str(value))
            tasks.append(Task(program, TESTS, "f"))
        tasks.append(Task(RIGHT, TESTS, "f"))
        verdicts = check_all(tasks, QUICK, 4) if user == "of the tests" else verdicts_as_user(tasks)
        server.setblocking(False)
        connected = True
        try:
            server.accept()
        except BlockingIOError:
            connected = False

    assert verdicts[-1].passed
    expected = {name: is_right for name, (is_right, _) in HOSTILE.items()}
    assert len(HOSTILE) >= 25
    assert {n: v.passed for n, v in zip(HOSTILE, verdicts[:-1], strict=True)} == expected, verdicts
    if verdicts[-1].lacking:
        pytest.skip(f"not enforced by this system: {verdicts[-1].lacking}")
    assert not connected and not processes_of(sandbox.JAIL)
    assert [path.name for path in outside.iterdir()] == ["kept"]
    assert (outside / "kept").read_text() == "text"
    assert not [folder for folder in ("/tmp", "/dev/shm") if (Path(folder) / "planted").exists()]


# Two problems in the form of HumanEval. The second one's tests use a function of its prompt.
PROBLEMS = [
    {
        "task_id": "own/0",
        "prompt": 'def double(x):\n    """Return 2 x."""\n',
        "entry_point": "double",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate([1]) == [1, 1]\n",
    },
    {
        "task_id": "own/1",
        "prompt": "def shifted(text):\n    return ''.join(chr(ord(c) + 1) for c in text)\n\n\n"
        'def unshifted(text):\n    """Undo shifted."""\n',
        "entry_point": "unshifted",
        "canonical_solution": "    return ''.join(chr(ord(c) - 1) for c in text)\n",
        "test": "def check(candidate):\n    assert candidate(shifted('abc')) == 'abc'\n",
    },
]


def test_own_solutions_pass_and_empty_ones_fail(tmp_path, capsys):
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, PROBLEMS)))
    sandbox.main([str(tmp_path / "problems.jsonl")])
    assert [line[:30].rstrip() for line in capsys.readouterr().out.splitlines()[-2:]] == [
        "own solutions    2 of 2 pass",
        "`pass`           0 of 2 pass",
    ]


def test_a_record_without_a_field_of_humaneval_is_refused_by_its_place(tmp_path):
    records = [PROBLEMS[0], PROBLEMS[1] | {"entry_point": None}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, records)))
    for check in (sandbox.check_solutions, lambda path: published.read(str(path))):
        with pytest.raises(ValueError, match=r"p.jsonl, line 2.*field entry_point: expected a text, found"):
            check(tmp_path / "p.jsonl")


def test_a_program_cannot_change_what_the_tests_take_from_the_prompt():
    cheat = "    return text\n\ndef shifted(text): return text\n"
    assert not sandbox.check(sandbox.human_eval_task(PROBLEMS[1], cheat)).passed


VALUES = [
    None,
    True,
    3,
    -(10**30),
    2.5,
    float("inf"),
    "ä\n",
    b"x",
    1j,
    [1, (2, {3}), {"a": [()]}],
    frozenset({1}),
]


def test_plain_values_pass_between_the_processes_unchanged_and_others_are_refused():
    for value in VALUES:
        returned = jail.decode(json.loads(json.dumps(jail.encode(value))))
        assert returned == value and type(returned) is type(value)
    with pytest.raises(TypeError, match="object: expected a plain value"):
        jail.encode([object()])


def test_an_exception_of_the_program_reaches_the_tests_as_its_own_kind():
    program = "def f(x):\n    raise ValueError(f'not {x}')"
    tests = "try: f(2)\nexcept ValueError as error: assert str(error) == 'not 2'\nelse: assert False"
    assert sandbox.check(Task(program, tests, "f")).passed
