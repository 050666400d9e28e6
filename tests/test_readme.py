"""The commands and the Python of README.md, docs/ and kernels/README.md run as they stand, only made small.

A page runs in a folder of its own, from top to bottom, in this process: that is much faster than a process
for each command, and finds the same mistakes. Blocks marked `console` are for other programs and do not run.
A block of Python that begins with a docstring is a concept's file, saved under the name in its first line.
"""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from conftest import run_command
from PIL import Image

import gpt
from data import notes
from data.tokenizer import get_tokenizer
from evaluation import stdlib_suite
from vision import visual_instruct

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")), "kernels/README.md"]
PAGES = [page for page in PAGES if (ROOT / page).exists()]

SMALL = "--seq-len 32 --batch-size 2 --eval-every 50 --tokenizer bytes"
# What the pages take as given: each model once, after three steps.
GIVEN = [
    "python train.py --model gpt",
    "python train.py --model bert",
    "python train.py --model moe",
    "python train.py --model lora --base runs/gpt/model",
]
# Long measurements, and programs that need a GPU or a compiler: their own tests run them smaller.
LONG = re.compile(
    r"chinchilla\.py sweep|-m kernels\.bench|-m results\.|nanoGPT"
    # Which ask for words of the library.
    r"|language\.analogies .*--(near|solve)"
    # Which train another model first, or a judge of what is drawn.
    r"|latent_diffusion|image_embeddings|embedding_to_image|--model (prior|unclip|dit|ddpm)"
    r"|vision\.(ddpm|frechet|unclip runs)"
)
INSTEAD = {  # in blocks of Python
    "Qwen3-0.6B": "runs/gpt/model",
    '"stdlib"': '"book.txt"',
    '"bpe:4096"': '"bytes"',
}
ON_THE_CHAIN = {"dpo", "online_dpo", "reward", "ppo"}
EXPECTED = {
    "# Gopher's budget": "72.2B parameters, 1.33T tokens"
}  # comment in a block: how its output begins


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Return the language, the content and the block of plain text right behind it, if any, of each block."""
    text = (ROOT / page).read_text()
    return re.findall(r"^```(\w+)\n(.*?)^```$(?:\n\n```\n(.*?)^```$)?", text, re.S | re.M)


def small(command: list[str], n_steps: int) -> list[str]:
    """Return the arguments of a train.py, made small: few steps of the smallest size on little text."""
    if {"--help", "--compare", "--dry-run"} & set(command):
        return command
    data = "questions.jsonl" if {"lora", "instruct"} & set(command) else "book.txt"
    for task, pairs in (("translate", "dates.tsv"), ("pegasus", "documents")):
        data = pairs if task in command else data
    if "clip" in command:
        tiny = "n_layers=1 d_model=32 d_ff=32 text_layers=1 text_width=32 text_ff=32"
        data = [] if "--data" in command else ["--data", "photos"]
        return [*command, *data, "--set", *tiny.split(), "--batch-size", "8", "--steps", str(n_steps)]
    if "llava" in command:
        tower = [] if {"--tower", "--init-from"} & set(command) else ["--tower", "random"]
        ours = {"language=runs/gpt/model": "language=language", "runs/clip/model": "random"}
        command = [ours.get(word, word) for word in command]
        return [*command, *tower, "--batch-size", "4", "--steps", str(n_steps), "--eval-every", "50"]
    if {
        "vit",
        "mae",
        "maskfeat",
        "simclr",
        "colorize",
        "autoencoder_kl",
        "vae",
        "flow",
        "gan",
        "energy",
    } & set(command):
        data = []
        if "--data" not in command:
            command = [word.replace("n_classes=62", "n_classes=2") for word in command]
            data = ["--data", "photos"]
        return [*command, *data, "--batch-size", "8", "--steps", str(n_steps), "--eval-every", "50"]
    for model, examples in (("igpt", "photos"), ("spectrogram", "clips")):
        if model in command:
            data = [] if "--data" in command else ["--data", examples]
            return [*command, *data, "--batch-size", "4", "--steps", str(n_steps), "--eval-every", "50"]
    if "retro" in command:
        text = ["--data", "texts", "--tokenizer", "bytes"] if "--data" in command else []
        text += ["--set", "chunk=16"] if text else []
        return [*command, *text, "--seq-len", "32", "--batch-size", "2", "--steps", str(n_steps)]
    if ON_THE_CHAIN & set(command):
        if "--init-from" not in command:  # by default they have data and a small model of their own
            return [*command, "--batch-size", "16", "--steps", str(n_steps)]
        data = "pairs.jsonl"
    size = [] if {"--init-from", "--base"} & set(command) else ["--size", "tiny"]
    steps = ["--steps", str(n_steps)]
    if "--extend" in command:
        steps, command[command.index("--extend") + 1] = [], "2"
    elif "--resume" in command:  # to the end that the run has
        steps = []
    return [*command, *shlex.split(SMALL), "--data", data, *steps, *size]


def run(command: str, n_steps: int) -> str:
    """Run a line `python FILE ...` or `python -m MODULE ...` in this process, and return what it prints."""
    _, *words = shlex.split(command.replace("bpe:4096", "bytes"), comments=True)
    as_module = words[0] == "-m"
    name, *arguments = words[as_module:]
    if name == "train.py":
        arguments = small(arguments, n_steps)
    if name == "vision.visual_questions":
        arguments[arguments.index("-n") + 1] = "1"
    if name in ("language.word2vec", "language.ppmi"):
        arguments += ["--data", "book.txt", "--d-model", "4"]
    if name == "evaluation.probe":
        arguments += ["--data", "photos"]
    ended = run_command(*["-m"] * as_module, name, *arguments)
    assert ended.code == 0, f"{command}: exit code {ended.code}\n{ended.out[-1000:]}{ended.err[-2000:]}"
    return ended.out


def run_python(block: str) -> str:
    """Run a block of Python, and return what it prints."""
    for published, ours in INSTEAD.items():
        block = block.replace(published, ours)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(block, "block", "exec"), {"__name__": "block"})
    return out.getvalue()


def is_installed(block: str) -> bool:
    """Return whether all packages are there that a block imports."""
    names = re.findall(r"^(?:from|import) (\w+)", block, re.M)
    return all(importlib.util.find_spec(name) for name in names)


def fill(folder: Path) -> None:
    """Write the texts that the pages name into a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "own.txt").write_text("Text to hold out, of one's own.\n" * 30)
    (folder / "book.txt").write_text("It was a bright cold day in April.\n" * 300)
    reviews = [{"text": f"{word} {i}", "label": word} for word in ("good", "bad") for i in range(20)]
    (folder / "reviews.jsonl").write_text("\n".join(map(json.dumps, reviews)))
    dates = [f"{i}.7.1987\t1987-07-{i}\n" for i in range(10, 31)]
    (folder / "dates.tsv").write_text("".join(dates))
    (folder / "documents").mkdir(exist_ok=True)
    for i in range(4):
        (folder / "documents" / f"{i}.txt").write_text(f"Dogs run. Dogs eat. {i} came.")
    (folder / "texts").mkdir(exist_ok=True)
    for i in range(20):
        (folder / "texts" / f"{i}.txt").write_text(f"Dogs run, and {i} cats sleep under the old tree.\n" * 3)
    pairs = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    for kind, level in (("cats", 60), ("dogs", 200)):
        (folder / "photos" / kind).mkdir(parents=True, exist_ok=True)
        for i in range(6):
            Image.new("RGB", (20, 16), (level, level + i, 3 * i)).save(folder / "photos" / kind / f"{i}.png")
    names = [f"{kind}/{i}.png" for kind in ("cats", "dogs") for i in range(6)]
    records = [json.dumps({"image": name, "caption": f"a photo of {name}"}) for name in names]
    (folder / "photos" / "metadata.jsonl").write_text("\n".join(records))
    for kind, note in (("cats", 60), ("dogs", 50)):
        (folder / "clips" / kind).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            sound = notes.render(notes.Note("saw", "major", note, i), 8000, 16_000)
            notes.write_wav(folder / "clips" / kind / f"{i}.wav", sound, 16_000)
    for name in ("mnist", "cifar-10-batches-bin"):
        (folder / name).mkdir(exist_ok=True)
    for part in ("train", "t10k"):
        header = bytes([0, 0, 8, 3]) + struct.pack(">3I", 10, 28, 28)
        (folder / "mnist" / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(range(10)) * 784)
        labels = bytes([0, 0, 8, 1]) + struct.pack(">I", 10) + bytes(range(10))
        (folder / "mnist" / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        records = b"".join(bytes([i]) + bytes([20 * i]) * 3072 for i in range(10))
        (folder / "cifar-10-batches-bin" / name).write_bytes(records)
    captions = [{"image": f"cats/{i}.png", "caption": f"Cat {i}."} for i in range(4)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    chats = [{"image": f"cats/{i}.png", "question": "<image> What?", "answer": "A cat."} for i in range(4)]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    gpt.GPT(gpt.Config(1, 2, 16, 16, 257, 96, eos_token_id=256)).save_pretrained(folder / "language")
    get_tokenizer("bytes").save(folder / "language")
    questions = [{"question": f"{i}?", "answer": f"{i}"} for i in range(40)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Return a folder with the runs that pages name without making them."""
    folder = tmp_path_factory.mktemp("given")
    fill(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in GIVEN:
            run(command, 3)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_and_the_python_of_a_page_run(page, given, tmp_path, monkeypatch):
    # A page begins with the texts and the trained models, but not with their checkpoints.
    fill(tmp_path)
    for model in given.glob("runs/*/model"):
        shutil.copytree(model, tmp_path / model.relative_to(given))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(stdlib_suite, "TEXT_BYTES", 2000)
    for name in ("N_SCENES", "N_HELD_OUT", "N_SHOWN"):
        monkeypatch.setattr(visual_instruct, name, 4)

    for language, content, output in blocks(page):
        if language == "sh":
            lines = content.replace("\\\n", " ").splitlines()
            for line in (line for line in lines if re.match(r"python (-m )?\w", line)):
                if LONG.search(line) or "-m pytest" in line:
                    continue
                printed = run(line, 2)
                assert printed.strip() or re.search("--prompt|--chat|vision.llava runs", line), line
        elif language == "python" and content.startswith('"""'):
            name = re.match(r'"""(\w+)', content)[1].lower()
            (tmp_path / f"{name}.py").write_text(content)
        elif language == "python" and is_installed(content):
            printed = run_python(content)
            assert not output or printed == output
            begins = [begin for comment, begin in EXPECTED.items() if comment in content]
            assert all(printed.startswith(begin) for begin in begins), printed

    if page == "README.md":
        parts = {"run.json", "checkpoint", "loss.png", "metrics.jsonl", "model", "report.html", "samples.txt"}
        assert parts <= {path.name for path in (tmp_path / "runs" / "gpt").iterdir()}
        assert all(f"`{part}" in (ROOT / page).read_text() for part in parts)


def test_the_readme_can_be_read_in_ten_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


@pytest.mark.parametrize("page", [*PAGES, "results/README.md"])
def test_every_file_that_a_page_links_to_exists(page):
    links = re.findall(r"\]\(([^)#:\s]+)[#)]", (ROOT / page).read_text())
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


@pytest.mark.parametrize("page", [*PAGES, "results/README.md"])
def test_every_table_of_a_page_has_a_heading_and_rows_of_its_width(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.S | re.M)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        heading, *rows = table.splitlines()
        widths = {len(re.findall(r"(?<!\\)\|", re.sub("`[^`]*`", "", row))) for row in (heading, *rows)}
        assert rows and re.fullmatch(r"[|:\- ]+", rows[0]) and len(widths) == 1, heading


def test_runs_of_different_commands_have_folders_of_their_own():
    """Else one who follows a second page is told that there is a run in the folder."""
    runs: dict[str, set] = {}
    for page in PAGES:
        shell = (content for language, content, _ in blocks(page) if language == "sh")
        for line in "".join(shell).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if {"train.py", "--out"} <= set(words) and not {"--resume", "--extend"} & set(words):
                runs.setdefault(words[words.index("--out") + 1], set()).add(tuple(words))
    assert len(runs) > 20 and not [commands for commands in runs.values() if len(commands) > 1]


def test_the_readme_names_every_page():
    text = (ROOT / "README.md").read_text()
    assert not [page for page in [*PAGES[1:], "results/README.md"] if page not in text]


def test_every_file_of_results_is_named_where_its_command_is():
    try:
        done = subprocess.run(
            ["git", "ls-files", "results"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a clone of the repository")
    text = (ROOT / "results" / "README.md").read_text()
    names = {line.removeprefix("results/") for line in done.stdout.splitlines()} - {
        "README.md",
        "__init__.py",
    }
    assert not sorted(name for name in names if name not in text)
