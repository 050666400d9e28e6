"""The rules of the house: where files lie, who imports whom, how long a file may be, how a docstring begins.

A test collects every offender before it fails, one per line. Imports inside functions count like those at the
top of a file; imports by name (importlib) do not count.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

from engine.contract import FOLDERS

ROOT = Path(__file__).parents[1]
TOP_CONCEPTS = ("gpt", "generate", "bert", "moe", "lora", "chinchilla")
SUPPORT = ("data", "engine", "formats")
TOP_FILES = {"README.md", "LICENSE", "requirements.txt", "pyproject.toml", "train.py", ".gitignore", ".ci"}
TOP_FILES |= {f"{name}.py" for name in TOP_CONCEPTS}
TOP_FOLDERS = {*SUPPORT, "kernels", "docs", "results", "tests"}  # and FOLDERS, as soon as they hold a file

# A folder may import itself and these. The concepts and train.py have the rules of `may_import`.
MAY_IMPORT = {
    "kernels": (),
    "formats": ("kernels",),
    "data": ("formats",),
    "engine": ("data", "formats", "kernels"),
    "train": (*SUPPORT, "kernels"),
}
# The files in FOLDERS that hold the rest of a concept at the top.
REST_OF = {
    "gpt": {"attention_variants.longer_context"},
    "moe": {"language.routing", "language.expert_usage"},
    "lora": {"posttraining.adapters", "posttraining.adapter_costs", "posttraining.nf4"},
    "chinchilla": {"scaling.huber_fit", "scaling.points"},
}
# The files in FOLDERS that are made of concepts of other folders. Classifiers pack their texts as inference
# does, a defence against injected instructions is DPO, and linear attention goes back to its earlier states.
MADE_OF = {
    "language.rewinding": {"attention_variants.linear"},
    "posttraining.classify": {"language.encoder_inference"},
    "evaluation.glue": {"language.encoder_inference"},
    "evaluation.injection": {"posttraining.dpo"},
}

MAX_LINES = {"concept": 400, "other": 450, "train": 250, "moe": 430}
MAX_FUNCTION_LINES = 60
MAX_FILES_OF_GPT = 14  # that `import gpt` loads, itself included
MAX_FILES_OF_TRAIN = 24  # that `import train` loads, itself included
OPENINGS = {"Of", "What", "Whether", "Which", "As", "With", "Where", "How"}


@cache
def files() -> list[Path]:
    """Return the paths, relative to the root, of all files that git tracks."""
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a clone of the repository")
    return [Path(name) for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


@cache
def modules() -> dict[str, Path]:
    """Return the path of each module by its dotted name; that of a package is its __init__.py."""
    paths = [path for path in files() if path.suffix == ".py"]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def code() -> dict[str, Path]:
    """Return the modules that are neither tests nor scripts of results/."""
    return {name: path for name, path in modules().items() if top(name) not in ("tests", "results")}


def top(name: str) -> str:
    return name.partition(".")[0]


def is_concept(name: str) -> bool:
    """Return True for a concept at the top and for a file of FOLDERS (not for its __init__.py)."""
    return name in TOP_CONCEPTS or (top(name) in FOLDERS and name not in FOLDERS)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


@cache
def imports(name: str) -> set[str]:
    """Return the modules of this project that a module imports, anywhere in its file."""
    found = set()
    for node in ast.walk(tree(modules()[name])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import; write the folder's name"
            # `from data import corpus` imports a file, `from data.corpus import PUBLIC` a name of a file.
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & modules().keys()
            found |= inner if len(inner) == len(node.names) else {node.module, *inner}
    return found & modules().keys() - {name}


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Return the nodes that the edges lead to from start; start itself only where it is on a circle."""
    found, waiting = set(), [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def report(offenders: Iterable[str]) -> None:
    """Fail with one line per offender, if there are any."""
    if offenders := sorted(offenders):
        pytest.fail("\n" + "\n".join(offenders), pytrace=False)


def may_import(importer: str, imported: str) -> bool:
    ours, theirs = top(importer), top(imported)
    if theirs in ("tests", "results"):
        return False
    if ours == theirs:
        return True
    if ours in MAY_IMPORT:
        return theirs in MAY_IMPORT[ours]
    if ours in TOP_CONCEPTS:
        return theirs in (*TOP_CONCEPTS, "kernels", "data", "formats") or imported in REST_OF.get(ours, ())
    # What is left is in FOLDERS. scaling/sweep.py makes its runs by train.py.
    return theirs in (*TOP_CONCEPTS, *SUPPORT, "kernels", "train") or imported in MADE_OF.get(importer, ())


def test_the_top_level_is_the_table_of_contents():
    names = {path.parts[0] for path in files()}
    expected = TOP_FILES | TOP_FOLDERS
    report([f"unexpected {name}" for name in names - expected - set(FOLDERS)])
    report([f"missing {name}" for name in expected - names])


def test_files_import_only_what_they_may():
    pairs = [(name, other) for name in code() for other in imports(name)]
    report(f"{name} imports {other}" for name, other in pairs if not may_import(name, other))


def test_a_concept_at_the_top_builds_on_at_most_one_other():
    others = {name: (imports(name) & set(TOP_CONCEPTS)) - {"generate"} for name in TOP_CONCEPTS}
    report(f"{name} imports {', '.join(sorted(found))}" for name, found in others.items() if len(found) > 1)


def test_no_circle_of_files():
    graph = {name: imports(name) & code().keys() for name in code()}
    circles = {frozenset(n for n in reachable(graph, name) if name in reachable(graph, n)) for name in graph}
    report(f"circle: {', '.join(sorted(circle))}" for circle in circles if circle)


def test_no_circle_of_folders():
    folders = {top(name) for name, path in code().items() if len(path.parts) > 1}
    edges = {(top(name), top(other)) for name in code() for other in imports(name)}
    graph = {folder: {b for a, b in edges if a == folder != b and b in folders} for folder in folders}
    report(
        f"{folder} imports itself by way of others"
        for folder in folders
        if folder in reachable(graph, folder)
    )


def test_no_file_is_longer_than_a_reader_can_hold():
    offenders = []
    for name, path in code().items():
        kind = name if name in MAX_LINES else "concept" if is_concept(name) else "other"
        n_lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        if n_lines > MAX_LINES[kind]:
            offenders.append(f"{path}: {n_lines} lines, at most {MAX_LINES[kind]}")
    report(offenders)


def test_no_function_is_longer_than_a_screen():
    offenders = []
    for path in code().values():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                n_lines = node.end_lineno - node.lineno + 1
                if n_lines > MAX_FUNCTION_LINES:
                    offenders.append(f"{path}:{node.lineno} {node.name}: {n_lines} lines")
    report(offenders)


# Commands that end otherwise: a run outlives the reader of its output; kernels, and the inside of the
# sandbox, import nothing of ours.
OTHER_ENDS = {
    "train": "command.use_streams(outlive_reader=True)",
    "kernels.bench.__main__": "sys.exit(main())",
    "evaluation.jail": "main()",
    "gpt": "run(GPT, SIZES)",  # of generate.py
    "bert": "importlib.import_module('language.encoder_inference').main()",
}


def test_every_command_ends_as_the_others_do():
    offenders = []
    for name, path in code().items():
        for node in tree(path).body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
                ending = ast.unparse(node.body[0])
                calls = ast.unparse(tree(path)) if ending in ("main()", "run()") else ending
                expected = OTHER_ENDS.get(name, "command.run(")
                if expected not in calls:
                    offenders.append(f"{path}: {ending}; expected {expected}")
    report(offenders)


def test_a_path_on_the_command_line_is_not_empty():
    # Path("") is the working folder. `command.path` refuses it; kernels import nothing of ours.
    offenders = []
    for path in code().values():
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        found = [i for i, line in enumerate(lines, 1) if "type=Path" in line and path.parts[0] != "kernels"]
        offenders += [f"{path}:{i}: type=Path; write type=command.path" for i in found]
    report(offenders)


def test_every_flag_has_a_help_that_names_its_default():
    offenders = []
    for path in code().values():
        assigned = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Assign)]
        named = {ast.unparse(node.targets[0]): ast.unparse(node.value) for node in assigned}
        for node in ast.walk(tree(path)):
            function = node.func if isinstance(node, ast.Call) else None
            is_flag = getattr(function, "attr", getattr(function, "id", "")) in ("add", "add_argument")
            if not is_flag or not node.args or not isinstance(getattr(node.args[0], "value", None), str):
                continue
            # A help may be the name of a text, which is on a line before.
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            where, text = f"{path}:{node.lineno} {node.args[0].value}", given.get("help")
            text = named.get(text, text)
            if text is None or text.lstrip("f'\"").startswith(("default", "of ")):
                offenders.append(f"{where}: help {text}; expected what the flag does, and its unit")
            elif given.get("default", "None") not in ("None", "[]", "''", "False") and "default" not in text:
                offenders.append(f"{where}: help {text}; expected (default ...) too")
    report(offenders)


def test_text_files_are_read_and_written_as_utf8():
    # Without an encoding it is that of the system, which on Windows is another one.
    offenders = []
    for name, path in modules().items():
        for node in ast.walk(tree(path)) if top(name) != "tests" else ():
            if not isinstance(node, ast.Call):
                continue
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            arguments = [ast.unparse(argument) for argument in node.args]
            keywords = {keyword.arg for keyword in node.keywords}
            n_before = {"read_text": 0, "write_text": 1}.get(function)
            if n_before is not None:
                missing = len(arguments) <= n_before and "encoding" not in keywords
            else:
                is_open = ast.unparse(node.func) in ("open", "gzip.open") or function == "fdopen"
                is_binary = any(re.fullmatch(r"'[rwax]?[+]?b[+]?'", text) for text in arguments[1:])
                missing = is_open and not is_binary and "encoding" not in keywords
            if missing:
                offenders.append(f"{path}:{node.lineno}: {ast.unparse(node)[:60]}")
    report(offenders)


def test_no_file_has_the_name_of_a_standard_library_module():
    # `python vision/ast.py` would put its own folder first on the path, and break `import inspect`.
    report(str(path) for path in modules().values() if path.stem in sys.stdlib_module_names)


def test_every_folder_of_code_says_what_it_holds():
    offenders = []
    for folder in {path.parent for path in code().values()} - {Path()}:
        path = folder / "__init__.py"
        if path not in modules().values():
            offenders.append(f"{path}: missing")
        elif not ast.get_docstring(tree(path)):
            offenders.append(f"{path}: no docstring")
    report(offenders)


def test_the_tests_mirror_the_tree():
    # tests/kernels/test_bench.py is of the package kernels/bench, test_machine_code.py of a file in it.
    names = {(top(name), name.rpartition(".")[2]) for name in modules()}
    tests = [path for path in files() if path.match("tests/**/test_*.py") or path.match("tests/test_*.py")]
    offenders = []
    for path in tests:
        name = path.stem.removeprefix("test_")
        folder = path.parts[1] if len(path.parts) > 2 else name
        if (folder, name) not in names and path.stem not in ("test_readme", "test_layout"):
            offenders.append(f"{path}: there is no {name}.py to be tested")
    report(offenders)


def test_a_docstring_stands_alone():
    offenders = []
    for path in modules().values():
        if path.parts[0] == "tests":
            continue
        for node in ast.walk(tree(path)):
            # The first line of a file is a title, and may be a noun phrase.
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = (ast.get_docstring(node) or "").partition("\n\n")[0]
                question = "?" in first.partition(".")[0]  # a question is a sentence
                if first and first.split()[0] in OPENINGS and not question:
                    offenders.append(f"{path}: {getattr(node, 'name', 'file')}: {first.splitlines()[0]}")
    report(offenders)


def loaded_by(name: str) -> list[str]:
    """Return our modules, without the __init__.py of packages, that `import name` loads in a new process."""
    program = f"import sys, {name}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = done.stdout.splitlines()[-1].split()
    return [name for name in loaded if name in modules() and modules()[name].name != "__init__.py"]


def test_import_gpt_loads_little_more_than_kernels():
    loaded = loaded_by("gpt")
    if len(loaded) > MAX_FILES_OF_GPT:
        report(f"import gpt loads {name}, of {len(loaded)} files" for name in loaded)


def test_import_train_loads_no_concept_and_few_files():
    loaded = loaded_by("train")
    report(f"import train loads {name}" for name in loaded if is_concept(name))
    if len(loaded) > MAX_FILES_OF_TRAIN:
        report(f"import train loads {name}, of {len(loaded)} files" for name in loaded)
