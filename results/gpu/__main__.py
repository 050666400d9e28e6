"""Measure everything on this GPU within a number of minutes, the most important first.

    python -m results.gpu --plan                        what is measured, in how many seconds; needs no GPU
    python -m results.gpu --rehearse                    run it all here at toy sizes, on the CPU
    python -m results.gpu --minutes 7 --out FOLDER      measure, from where FOLDER or results/gpu/ stopped
    python -m results.gpu tests tuning --minutes 4 --out FOLDER      only these steps
    python -m results.gpu --table FOLDER                the tables of what was measured

Each step runs in a process of its own, and each measurement has a limit, so that one that fails or hangs
costs only its own time. FOLDER/rows.json has a row for every measurement, FOLDER/log.txt all that the steps
print, and FOLDER/tuned.json the configurations of the kernels to keep (for kernels/tuned.json). A measurement
that failed is repeated by the next call. Exit code 0; 1 if a measurement failed; 2 after a mistake of the
user.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

from formats import command
from formats.atomic import replace_file
from results.gpu import measure, rows, table
from results.gpu.steps import FULL, TOY, Measurement, steps

STARTUP = 10  # seconds until a process has imported everything and set up the GPU
RESERVE = 10  # seconds left at the end for the tables, and for a process that must be ended
NEED_DATA = ("training", "learning", "more training")  # steps that wait for the tokenised corpus
HERE = Path(__file__).parent


class Session:
    """One call of the command: its flags, where it writes, when it began, and until when it may run."""

    def __init__(self, args: argparse.Namespace, work: Path):
        self.args, self.out, self.work = args, args.out, work
        self.began, self.until = rows.now(), time.time() + 60 * args.minutes - RESERVE
        self.flags = ["--work", str(work), *["--toy"] * args.rehearse]
        self.environment = dict(os.environ)
        if args.rehearse:
            # torch.compile would take a minute per program on a CPU: functions run as they are written.
            self.environment |= {"TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self.log = open(self.out / "log.txt", "a+", encoding="utf-8")  # noqa: SIM115

    def start(self, *command: str, **environment: str) -> subprocess.Popen:
        """Start a Python module in a process group of its own, so that `end` ends its children too."""
        return subprocess.Popen(
            [sys.executable, "-m", *command, *self.flags],
            cwd=rows.ROOT, env=self.environment | environment, stdout=self.log, stderr=self.log,
            start_new_session=True,
        )  # fmt: skip

    def remaining(self, step: str, measurements: list[Measurement]) -> list[Measurement]:
        """Return what is left to do of a step's measurements, see rows.remaining."""
        return rows.remaining(measurements, step, self.out, self.began, self.args.again)

    def fits(self, measurements: list[Measurement]) -> bool:
        """Return True if there is time for one of the measurements in a new process."""
        return any(time.time() + STARTUP + item.seconds <= self.until for item in measurements)


def end(process: subprocess.Popen) -> None:
    """End a process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_step(session: Session, step: str, measurements: list[Measurement]) -> None:
    """Run a step in a process. Where that ends early, another one goes on with what is left."""
    while session.fits(todo := session.remaining(step, measurements)):
        seen = session.log.seek(0, os.SEEK_END)
        args = session.args
        command = ["results.gpu.measure", step, "--out", str(session.out), "--began", session.began]
        command += ["--until", str(session.until), *["--again"] * args.again]
        command += ["--commit", args.commit] if args.commit else []
        process = session.start(*command)
        limit = 3 * STARTUP + sum(measure.limit(item.seconds) for item in todo)
        limit = min(limit, session.until + RESERVE / 2 - time.time())
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
        if code == 0:
            return

        # Write the reason into the row of the measurement that ended the process, or, if none has begun, of
        # the first.
        session.log.seek(seen)
        why = "ended by its limit" if code is None else f"ended with {code}"
        why = f"the process {why}\n{rows.last_lines(session.log.read())}"
        unfinished = [row for row in rows.read(session.out) if row["failed"] == rows.NOT_ENDED]
        if not unfinished and len(session.remaining(step, measurements)) == len(todo):
            unfinished = [rows.new(step, todo[0].name, args.commit)]
        for row in unfinished:
            rows.add(session.out, row | {"failed": why})


def run(args: argparse.Namespace) -> int:
    """Measure, write the configurations to keep, and print the tables. Return the exit code."""
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        session = Session(args, Path(work))
        plan = {name: items for name, items in steps(TOY if args.rehearse else FULL, session.work).items()
                if name in (args.steps or [name])}  # fmt: skip
        if not args.rehearse:
            # What earlier calls have measured on this device counts, too.
            known = [row for path in sorted(HERE.rglob("rows.json")) for row in rows.of_device(path.parent)]
            merged = {rows.key(row): row for row in [*known, *rows.read(args.out)]}
            rows.write(args.out, list(merged.values()))
        data = session.start("results.gpu.ahead", "data")
        kernels = session.start("results.gpu.ahead", "kernels", TRITON_INTERPRET="0")
        try:
            for name, items in plan.items():
                if name in NEED_DATA and session.remaining(name, items):
                    with suppress(subprocess.TimeoutExpired):
                        data.wait(max(0, session.until - time.time()))
                run_step(session, name, items)
                print(f"{time.strftime('%X')} {name}: {len(session.remaining(name, items))} left", flush=True)
            if args.rehearse:
                kernels.wait()
        except KeyboardInterrupt:
            print("interrupted; the rows so far are saved", file=sys.stderr)
        finally:
            end(data)
            end(kernels)
        left = [
            f"{name}: {item.name}" for name, items in plan.items() for item in session.remaining(name, items)
        ]
    measured = rows.of_device(args.out)
    write_tuned(args.out, measured)
    return report(measured, left)


def report(measured: list[dict], left: list[str]) -> int:
    """Print the tables of the rows, and what is left to measure. Return the exit code."""
    print("\n" + table.summary(measured, left))
    return 1 if any(row["failed"] for row in measured) else 0


def report_each_device(folder: Path) -> int:
    """Print the tables of the rows in a folder, for each device its own. Return the exit code."""
    measured, code = rows.read(folder), 0
    for device in dict.fromkeys(row["device"] for row in measured):
        print(f"\n{device}")
        code |= report([row for row in measured if row["device"] == device], [])
    return code


def write_tuned(out: Path, measured: list[dict]) -> None:
    """Write the configurations to keep for this device to tuned.json, if any were measured. Those of other
    devices stay in it."""
    if chosen := table.winners(measured):
        arch = (
            "sm_{}{}".format(*torch.cuda.get_device_capability())
            if torch.cuda.is_available()
            else "interpreter"
        )
        path = out / "tuned.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        with replace_file(path) as new:
            new.write_text(json.dumps(before | {arch: chosen}, indent=1) + "\n", encoding="utf-8")


def plan_text(names: list[str]) -> str:
    """Return the steps in order, with the expected seconds of each and the sum so far."""
    lines, total = [], 0
    for step, measurements in steps(FULL, Path("WORK")).items():
        if step not in (names or [step]):
            continue
        seconds = STARTUP + sum(item.seconds for item in measurements)
        total += seconds
        lines.append(f"{step:14} {seconds:4.0f} s, {total:5.0f} s so far: python -m results.gpu {step}")
        lines += [f"    {item.seconds:3.0f} s  {item.name}" for item in measurements]
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = command.Parser("python -m results.gpu", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("steps", nargs="*", metavar="STEP", help="only these, by the names that --plan prints (default: all)")
    add("--minutes", type=float, help="minutes that all may take (required; default of a rehearsal 10)")
    add("--out", type=command.path, metavar="FOLDER", help="folder for rows, log and tables (required)")
    add("--again", action="store_true", help="measure also what has been measured before")
    add("--commit", help="the commit that is measured, where the working tree is no clone")
    add("--plan", action="store_true", help="print the steps, and measure nothing")
    add("--rehearse", action="store_true", help="run all steps at toy sizes on the CPU")
    add("--table", type=command.path, metavar="FOLDER", help="print the tables of the rows in FOLDER")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that make no sense here."""
    known = list(steps(TOY, Path()))
    unknown = [name for name in args.steps if name not in known]
    if unknown:
        raise ValueError(f"step {unknown[0]}: expected one of {', '.join(known)}")
    if args.table and not (args.table / "rows.json").is_file():
        raise ValueError(f"--table {args.table}: there is no rows.json in it")
    if args.plan or args.table or args.rehearse:
        return
    if not torch.cuda.is_available():
        raise ValueError("there is no GPU to measure; --plan and --rehearse need none")
    if args.minutes is None or args.minutes <= 1:
        raise ValueError(f"--minutes {args.minutes}: expected more than 1, the time that it may take in all")
    if args.out is None:
        raise ValueError("--out is missing: expected a folder for the rows")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET is set, so nothing would be compiled; unset it")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return command.exit_code(lambda: do(args))


def do(args: argparse.Namespace) -> int:
    """Do what the flags name, and return the exit code. Raises ValueError for flags that make no sense."""
    check(args)
    if args.plan:
        print(plan_text(args.steps))
        return 0
    if args.table:
        return report_each_device(args.table)
    if not args.rehearse:
        return run(args)
    with tempfile.TemporaryDirectory() as aside:
        args.minutes, args.out = args.minutes or 10, args.out or Path(aside)
        return run(args)


if __name__ == "__main__":
    command.run(main)
