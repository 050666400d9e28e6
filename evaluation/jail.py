"""The processes of sandbox.py: each gives up its rights, then runs a program or its tests.

What such a process may do afterwards:

    files       open them for reading only; nothing is written, created, renamed or removed
    processes   start neither a process nor a thread; send no signal to any process
    network     open no socket
    memory, CPU time, open files          up to a limit: setrlimit(2)
    root        becomes the user `nobody`, or keeps none of root's capabilities

On Linux a filter of system calls (seccomp(2), mode filter) enforces the first three. It needs no rights, and
works in containers, too. It allows the calls of a program that only computes; every other call, those of
future kernels included, fails with PermissionError. A process cannot undo any of this.

sandbox.py starts two such processes with the same limits, which exchange lines of JSON through pipes:

    the program   is executed, then answers calls: {"call": f, ...} -> {"value": ...} or {"raise": ...}
    the tests     are executed, with a stand-in for the function that they test, which calls the program's
                  process. Behind the last assertion the tests' process writes the nonce, a random number that
                  no other process has

So the tests compare plain values (numbers, strings, lists ...) in a process that the program cannot reach.
Whatever a program does to its own interpreter (it may end it, patch it, or return an object that equals
everything) has no effect on the comparisons. This file imports only Python's library: it runs by its path,
without site-packages.
"""

import builtins
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from contextlib import suppress

LONGEST_LINE = 1 << 24  # characters of an answer
NOBODY = 65534  # the user and the group without rights

# --- the filter of system calls

# The architecture's number in a filter (linux/audit.h), and its column in CALLS.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1), "riscv64": (0xC00000F3, 1)}
# The numbers of the system calls that are allowed with any arguments: on x86-64, and on the architectures
# that share Linux's generic table. None where a call is missing.
CALLS = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66),
    "access": (21, None), "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216),
    "madvise": (28, 233), "dup": (32, 23), "nanosleep": (35, 101), "getpid": (39, 172), "exit": (60, 93),
    "uname": (63, 160), "getcwd": (79, 17), "readlink": (89, None), "gettimeofday": (96, 169),
    "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153),
    "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getppid": (110, 173), "sigaltstack": (131, 132), "gettid": (186, 178), "time": (201, None),
    "futex": (202, 98), "sched_getaffinity": (204, 123), "getdents64": (217, 61),
    "restart_syscall": (219, 128), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "newfstatat": (262, 79),
    "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73),
    "getrandom": (318, 278), "membarrier": (324, 283), "statx": (332, 291), "faccessat2": (439, 439),
}  # fmt: skip
OPEN, OPENAT, FCNTL = (2, None), (257, 56), (72, 25)  # calls that are allowed with some arguments only
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# The commands of fcntl that are allowed: duplicate a descriptor (0, 1030), read and write flags (1 to 4).
# F_SETOWN is not, since it makes a pipe send signals.
FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)

LOAD, EQUAL, HAS_BITS, RETURN = 0x20, 0x15, 0x45, 0x06  # operations of a filter (linux/filter.h)
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | 13, 0x80000000  # 13 is EACCES: "permission denied"
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # places in the record of a call (struct seccomp_data)


def filter_program(architecture: int, column: int) -> list[tuple[int, int, int, int]]:
    """Return the filter: instructions (operation, skip if true, skip if false, value) of linux/filter.h.

    architecture, column: of MACHINES. A comparison reads the number that was loaded last, and then skips the
    given number of instructions.
    """
    # End a process that calls by the numbers of another architecture, which would be other calls.
    program = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL)]

    # Allow these calls with any arguments.
    program += [(LOAD, 0, 0, NUMBER)]
    for numbers in CALLS.values():
        if numbers[column] is not None:
            program += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, ALLOW)]

    # Open files for reading only.
    for numbers, argument in ((OPEN, 1), (OPENAT, 2)):
        if numbers[column] is not None:
            program += [(EQUAL, 0, 4, numbers[column]), (LOAD, 0, 0, ARGUMENTS + 8 * argument)]
            program += [(HAS_BITS, 0, 1, WRITING), (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]

    # Refuse all other calls but fcntl, whose command is its second argument.
    program += [(EQUAL, 1, 0, FCNTL[column]), (RETURN, 0, 0, REFUSE), (LOAD, 0, 0, ARGUMENTS + 8)]
    for number in FCNTL_COMMANDS:
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    return [*program, (RETURN, 0, 0, REFUSE)]


class FilterProgram(ctypes.Structure):
    """The kernel's struct sock_fprog: a filter and the number of its instructions."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def filter_calls(libc: ctypes.CDLL) -> bool:
    """Refuse all system calls but those above, from now on; return whether this system is able to."""
    if not sys.platform.startswith("linux") or platform.machine() not in MACHINES:
        return False
    program = filter_program(*MACHINES[platform.machine()])
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    no_new_privs, set_seccomp, mode_filter = 38, 22, 2  # linux/prctl.h, linux/seccomp.h
    libc.prctl(no_new_privs, 1, 0, 0, 0)
    return libc.prctl(set_seccomp, mode_filter, ctypes.byref(FilterProgram(len(program), packed)), 0, 0) == 0


# --- what else is given up


def limit(cpu_seconds: int, memory: int) -> None:
    """Set the limits of the process: seconds of CPU time, bytes of address space, no file written, no new
    process, 64 open files. The kernel ends a process that reaches its CPU time."""
    limits = {"CPU": cpu_seconds, "AS": memory, "FSIZE": 0, "NPROC": 0, "CORE": 0, "NOFILE": 64}
    for name, value in limits.items():
        with suppress(OSError, ValueError):  # macOS does not limit address space
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def become_nobody() -> None:
    """Change from root to the user and the group without rights, for good."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def leave_root(libc: ctypes.CDLL) -> bool:
    """Become nobody if the user is root; return whether the process is then without root's capabilities.

    If nobody may not read Python's library, as below /root, the process stays root without capabilities.
    """
    if os.geteuid() != 0:
        return True
    # There is no way back from being nobody, so a child process tries it first.
    reader = os.fork()
    if reader == 0:
        readable = False
        try:
            become_nobody()
            readable = os.access(os.__file__, os.R_OK)
        finally:
            os._exit(not readable)
    if os.waitpid(reader, 0)[1] == 0:
        become_nobody()
        return True
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of capset(2); this process
    return sys.platform.startswith("linux") and libc.capset(header, (ctypes.c_uint32 * 6)()) == 0


def give_up(cpu_seconds: int, memory: int) -> list[str]:
    """Give up all rights that a program which only computes does not need; return what this system lacks."""
    libc, lacking = ctypes.CDLL(None, use_errno=True), []
    if not leave_root(libc):
        lacking.append("root stays root")
    if sys.platform.startswith("linux"):
        end_with_parent, dumpable = 1, 4
        libc.prctl(end_with_parent, signal.SIGKILL, 0, 0, 0)
        libc.prctl(dumpable, 0, 0, 0, 0)  # no process of the same user may read this one's memory
    limit(cpu_seconds, memory)
    if not filter_calls(libc):
        lacking.append("no filter of system calls: files, network and signals are as open as to the user")
    return lacking


# --- plain values, as JSON

KINDS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value):
    """Return a plain value in a form that JSON can hold: a container becomes {its kind: its items}.

    A value of a subclass becomes one of the plain class, and a bytearray becomes bytes. Raises TypeError for
    any other value.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    for name, kind in KINDS.items():
        if isinstance(value, kind):
            return {name: [encode(item) for item in kind.__iter__(value)]}
    raise TypeError(f"{type(value).__name__}: expected a plain value: number, string, list, dict ...")


def decode(value):
    """Return the plain value of which `encode` made this one.

    Raises ValueError, TypeError or KeyError for what `encode` does not return.
    """
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ValueError("a list outside of a container")
        return value
    ((kind, content),) = value.items()
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    return KINDS[kind](decode(item) for item in content)


# --- the two processes


def run_program(source: str, calls, answers) -> None:
    """Execute a program, write one message that it is loaded, and answer calls until there are no more.

    calls, answers: text files with a message in JSON on each line.
    """

    def write(message: dict) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    namespace = {"__name__": "program"}
    try:
        exec(compile(source, "program", "exec"), namespace)
    except Exception as error:
        write({"raise": [type(error).__name__, str(error)]})
        return
    write({"value": None})
    for line in calls:
        call = json.loads(line)
        try:
            if not callable(namespace.get(call["call"])):
                raise NameError(f"the program has no function {call['call']!r}")
            keywords = {name: decode(value) for name, value in call["keywords"].items()}
            value = namespace[call["call"]](*[decode(value) for value in call["args"]], **keywords)
            write({"value": encode(value)})
        except Exception as error:
            write({"raise": [type(error).__name__, str(error)]})


def read_answer(answers):
    """Return the next message of the program's process, {"value": ...}.

    If the program raised a built-in exception, an equal one is raised, and RuntimeError for any other. Raises
    EOFError if there is no answer.
    """
    line = answers.readline(LONGEST_LINE)
    if not line.endswith("\n"):
        raise EOFError("the program has ended, or its answer is too long")
    message = json.loads(line)
    if "raise" in message:
        name, text = message["raise"]
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            with suppress(TypeError):  # some, such as UnicodeDecodeError, need other arguments
                raise kind(str(text))
        raise RuntimeError(f"{name}: {text}")
    return message


def stand_in(name: str, calls, answers):
    """Return a function that calls the program's function of this name, in the program's process."""

    def function(*args, **keywords):
        call = {"call": name, "args": [encode(value) for value in args]}
        call["keywords"] = {key: encode(value) for key, value in keywords.items()}
        calls.write(json.dumps(call) + "\n")
        calls.flush()
        return decode(read_answer(answers)["value"])

    return function


def run_tests(task: dict, calls, answers, verdict) -> None:
    """Execute the tests, and write one line to the file `verdict`: the nonce, or what failed.

    task: "tests", "setup", "entry_point" and "nonce" of sandbox.py, and "lacking" of `give_up`.
    """
    result = {}
    try:
        read_answer(answers)  # the message that the program is loaded
        namespace = {"__name__": "tests"}
        with suppress(SyntaxError):  # a prompt may end in the middle of a function
            exec(compile(task["setup"], "setup", "exec"), namespace)
        namespace[task["entry_point"]] = stand_in(task["entry_point"], calls, answers)
        exec(compile(task["tests"], "tests", "exec"), namespace)
        result["nonce"] = task["nonce"]
    except Exception as error:
        result["failed"] = f"{type(error).__name__}: {error}".removesuffix(": ")[:300]
    verdict.write(json.dumps(result | {"lacking": task["lacking"]}) + "\n")
    verdict.flush()


def main() -> None:
    # Standard input holds the task, and is empty for the program.
    task = json.loads(sys.stdin.buffer.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.set_int_max_str_digits(0)  # integers of any length pass through JSON

    # Open all files that are needed later, while this is still allowed.
    files = [open(number, mode, encoding="utf-8") for number, mode in task["pipes"]]  # noqa: SIM115
    task["lacking"] = give_up(task["cpu_seconds"], task["memory"])
    if "program" in task:
        run_program(task["program"], *files)
    else:
        run_tests(task, *files)


if __name__ == "__main__":
    main()
