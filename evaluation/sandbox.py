"""Sandbox: run a program that a model wrote, and test it, without trusting anything that it prints.

    verdict = passed  <=>  a nonce (a random number that is drawn for this run alone) comes out of the
                           process of the tests, which writes it behind the last assertion

Scoring generated code (Codex and HumanEval, Chen et al. 2021, arXiv:2107.03374, section 2) means executing
programs that nobody has read. A program may be wrong, may never end, or may do what makes a test look passed:
call `sys.exit(0)`, print "passed", replace `AssertionError`. So a run has two processes (see jail.py). Both
have limits on time and memory, an empty folder as home, and cannot write a file, start a process, send a
signal or open a socket. One executes the program and answers calls of its function. The other executes the
tests on these answers, and it alone has the nonce. A program that ends early, hangs or returns nonsense has
not passed.

    check(Task("def double(x): return 2 * x", "assert double(2) == 4", "double"))    Verdict(passed=True, ...)

    python -m evaluation.sandbox                   a few programs, and what this machine cannot enforce
    python -m evaluation.sandbox HumanEval.jsonl   its own solutions, all of which must pass, and empty ones

Not covered: a program may read the files that the user may read, and use a core for its CPU time. If the user
is root, these are the files that the user `nobody` may read, or, where Python itself is not among them, those
that root owns. A fault of the kernel is a way out, as in every sandbox without a virtual machine.
"""

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from formats import command

JAIL = Path(__file__).with_name("jail.py")  # what both processes run


class Verdict(NamedTuple):
    """The outcome of a run."""

    passed: bool
    reason: str  # "passed", or what failed
    lacking: tuple[str, ...] = ()  # protections that the system lacks, in words


@dataclass(frozen=True)
class Limits:
    """Limits of each of the two processes."""

    cpu_seconds: int = 5  # of CPU time, since a program may wait long on a busy machine
    wall_seconds: float = 60.0  # of the whole run, since a program that sleeps takes no CPU time
    memory: int = 1 << 29  # bytes of address space


class Task(NamedTuple):
    """A program, and the code that tests one of its functions by assertions."""

    program: str
    tests: str
    entry_point: str  # the function's name, by which the tests call it
    setup: str = ""  # executed before the tests, in their process; skipped if it is no complete Python


def start(task: dict, pipes: Sequence[tuple[int, str]], home: str, limits: Limits) -> subprocess.Popen:
    """Start jail.py with a task on its standard input, as JSON, and return the process.

    pipes: (file descriptor, "r" or "w") of the ends of pipes that it gets. home: its folder.
    """
    # Some Pythons need the paths of the dynamic linker; no other variable is passed on.
    env = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-X", "utf8", str(JAIL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[number for number, _ in pipes],
        env=env | {"HOME": home, "LANG": "C.UTF-8"},
        cwd=home,
        start_new_session=True,
    )
    task = task | {"pipes": pipes, "cpu_seconds": limits.cpu_seconds, "memory": limits.memory}
    with contextlib.suppress(BrokenPipeError):  # the process has ended already, which the verdict shows
        process.stdin.write(json.dumps(task).encode())
        process.stdin.close()
    return process


def stop(process: subprocess.Popen) -> float:
    """Kill a process with its process group, and return the seconds of CPU time that it took."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


def read_line(number: int, seconds: float) -> str | None:
    """Return the first line that comes out of a pipe.

    number: the file descriptor. Returns "" if the pipe is closed before the line ends, and None if the line
    has not ended after these seconds. A line of more than 64 KiB, which jail.py does not write, is cut.
    """
    deadline, line = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(number, selectors.EVENT_READ)
        while b"\n" not in line and len(line) < 1 << 16:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return None
            block = os.read(number, 4096)
            if not block:
                return ""
            line += block
    return line.decode("utf-8", "replace")


def check(task: Task, limits: Limits = Limits()) -> Verdict:
    """Run a program and its tests in two new processes with limits, and return the verdict.

    Raises ValueError on a system without fork and resource limits (Windows).
    """
    if os.name != "posix":
        raise ValueError("sandbox: programs run only on Linux or macOS; this system has no resource limits")
    nonce = secrets.token_hex(16)

    # A pipe is (the end to read, the end to write). This process keeps only the end to read the verdict.
    calls, answers, verdict = os.pipe(), os.pipe(), os.pipe()
    of_program = ((calls[0], "r"), (answers[1], "w"))
    of_tests = ((calls[1], "w"), (answers[0], "r"), (verdict[1], "w"))
    with (
        tempfile.TemporaryDirectory() as home,
        contextlib.ExitStack() as ours,
        contextlib.ExitStack() as theirs,
    ):
        os.chmod(home, 0o555)
        ours.callback(os.close, verdict[0])
        for number, _ in (*of_program, *of_tests):
            theirs.callback(os.close, number)

        # Start both processes. Then close their ends here, so that a pipe is closed as soon as they end.
        program = {"program": task.program}
        tests = {"tests": task.tests, "setup": task.setup, "entry_point": task.entry_point, "nonce": nonce}
        running = []
        try:
            for content, pipes in ((program, of_program), (tests, of_tests)):
                running.append(start(content, pipes, home, limits))
            theirs.close()
            line = read_line(verdict[0], limits.wall_seconds)
        finally:
            seconds = max([stop(process) for process in running], default=0.0)
    return judge(line, nonce, seconds, limits)


def judge(line: str | None, nonce: str, seconds: float, limits: Limits) -> Verdict:
    """Return the verdict.

    line: what `read_line` returned from the tests' process; nonce: the number that it has if the program
    passed; seconds: the CPU time of the slower process.
    """
    if line is None:
        return Verdict(False, f"timeout: more than {limits.wall_seconds} seconds")
    result = {}
    with contextlib.suppress(ValueError):
        result = json.loads(line)
    lacking = tuple(result.get("lacking", ()))
    if secrets.compare_digest(str(result.get("nonce")), nonce):
        return Verdict(True, "passed", lacking)
    # The kernel ends a process at its limit of CPU time, but the time that it reports may be a little less.
    if seconds > limits.cpu_seconds - 0.1:
        return Verdict(False, f"timeout: more than {limits.cpu_seconds} seconds of CPU time", lacking)
    return Verdict(False, str(result.get("failed", "the tests have not ended")), lacking)


def check_all(tasks: Sequence[Task], limits: Limits = Limits(), workers: int | None = None) -> list[Verdict]:
    """Return the verdict of each task. workers: tasks that run at the same time (default: one per core)."""
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda task: check(task, limits), tasks))


def lacking() -> tuple[str, ...]:
    """Return the protections that this system lacks, in words; on Linux there are none.

    Raises ValueError if a right program does not pass.
    """
    verdict = check(Task("def one(): return 1", "assert one() == 1", "one"))
    if not verdict.passed:
        raise ValueError(f"sandbox: a right program does not pass on this machine: {verdict.reason}")
    return verdict.lacking


def human_eval_record(record: dict) -> dict:
    """Return the record if it has HumanEval's form. Raises ValueError if a field is missing or is no text."""
    for name in ("prompt", "entry_point", "canonical_solution", "test"):
        if not isinstance(record.get(name), str):
            raise ValueError(f"field {name}: expected a text, found {record.get(name)!r}")
    return record


def human_eval_task(record: dict, completion: str) -> Task:
    """Return the task of a HumanEval record: its prompt with a completion is the program.

    The prompt may define functions that the tests use, so it is the setup of the tests, too.
    """
    tests = f"{record['test']}\ncheck({record['entry_point']})"
    return Task(record["prompt"] + completion, tests, record["entry_point"], record["prompt"])


def check_solutions(path: Path) -> None:
    """Print how many of the solutions in a file of HumanEval pass, which should be all, and how many
    functions with the body `pass` do.

    Raises ValueError, which names the place, for a record that is not in HumanEval's form.
    """
    from data.records import read_records, refuse

    records = []
    for place, record in read_records(path, str(path), refuse):
        try:
            records.append(human_eval_record(record))
        except (ValueError, AttributeError) as error:  # a record may be no object
            raise ValueError(f"{place}: {error}; expected a record of HumanEval") from None
    for name, body in (("own solutions", None), ("`pass`", "    pass\n")):
        bodies = [record["canonical_solution"] if body is None else body for record in records]
        verdicts = check_all(list(map(human_eval_task, records, bodies)))
        print(f"{name:16} {sum(verdict.passed for verdict in verdicts)} of {len(records)} pass")
        for record, verdict in zip(records, verdicts, strict=True):
            if verdict.passed != (body is None):
                print(f"  {record.get('task_id', record['entry_point'])}: {verdict.reason}")


EXAMPLES = {
    "right": "def double(x): return 2 * x",
    "wrong": "def double(x): return x * x + x",
    "ends at once": "import sys; sys.exit(0)",
    "replaces AssertionError": "import builtins; builtins.AssertionError = Warning\ndef double(x): return 0",
    "equals everything": "class Any:\n    def __eq__(self, x): return True\ndef double(x): return Any()",
    "never ends": "def double(x):\n    while True: pass",
    "removes files": "import os\ndef double(x): os.remove(os.__file__)",
    "starts a process": "import os\ndef double(x): os.system('true'); os.fork(); return 2 * x",
}


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Run programs in the sandbox, and print the verdicts.")
    parser.add_argument(
        "file", nargs="?", type=command.path, help="HumanEval.jsonl, to check its own solutions"
    )
    args = parser.parse_args(argv)
    for protection in lacking():
        print(f"not enforced on this machine: {protection}")
    if args.file:
        check_solutions(args.file)
        return
    tests = "assert double(3) == 6 and double(2) == 4"
    tasks = [Task(program, tests, "double") for program in EXAMPLES.values()]
    for name, verdict in zip(EXAMPLES, check_all(tasks, Limits(cpu_seconds=1)), strict=True):
        print(f"{name:24} {'passed' if verdict.passed else 'failed':8}{verdict.reason}")


if __name__ == "__main__":
    command.run(main)
