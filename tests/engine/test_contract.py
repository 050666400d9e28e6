"""A concept is one file: what a new task and a new model need, and what is refused."""

import json
import sys

import pytest
from conftest import run_command

import gpt
import train as train_py
from engine import checkpoint, contract
from formats.open_model import open_model

# Read a text backwards: a task for any decoder.
TASK = """
import gpt
from engine.contract import load_text

MODEL = "gpt"
STEPS = 4


def load_data(args, config):
    return load_text(args, config)


def make_batch(rows, config, generator, tokenizer):
    return gpt.make_batch([{"tokens": row["tokens"][::-1].copy()} for row in rows], config, generator)


def show(model, dataset, out):
    return f"backwards: {dataset.tokenizer.decode(dataset.val.tokens[:5].tolist())}"
"""

# A recurrent language model that no Hugging Face class describes.
MODEL = """
from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from formats import native

TASK = "gpt"


@dataclass(frozen=True)
class Config:
    d_model: int
    vocab_size: int = 300
    max_seq_len: int = 64
    eos_token_id: int = 0


class Model(nn.Module):
    save_pretrained = native.save
    from_pretrained = classmethod(lambda cls, directory, *, kernels="auto": native.load(directory, kernels))

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.gru = nn.GRU(config.d_model, config.d_model, batch_first=True)
        self.head = nn.Linear(config.d_model, config.vocab_size)

    def loss(self, batch):
        logits = self.head(self.gru(self.embed(batch["tokens"]))[0])
        return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()), {}

    def flops_per_token(self, seq_len):
        return 6 * sum(p.numel() for p in self.parameters())


def show(model, dataset, out):
    return "nothing yet"


SIZES = {"tiny": Config(16)}
"""

FILES = ("backwards", "recurrent")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in a folder on Python's path with the two files and a text."""
    (tmp_path / "backwards.py").write_text(TASK)
    (tmp_path / "recurrent.py").write_text(MODEL)
    (tmp_path / "text.txt").write_text("".join(f"line {i}, {i * i % 97} and so on\n" for i in range(200)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    # Other tests, of the page about adding a concept, import files of the same names.
    forget(*FILES)
    yield tmp_path
    forget(*FILES)


def forget(*names):
    """Let Python import these modules anew."""
    for name in names:
        sys.modules.pop(name, None)


def train(*flags, code=0):
    """Run train.py on the text in the working directory, and return what is on stderr."""
    small = "--data text.txt --tokenizer bytes --seq-len 16 --batch-size 2 --eval-every 2 --log-every 1"
    done = run_command("train.py", *flags, *small.split())
    assert done.code == code, done.err[-3000:]
    return done.err


def rows(run):
    """Return the step and the losses of each row of a run's metrics."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[row.get(key) for key in ("step", "loss", "val_loss", "grad_norm")] for row in found]


@pytest.mark.parametrize("name, size", [("backwards", "tiny"), ("recurrent", "tiny")])
def test_a_file_on_the_path_is_trained_resumed_evaluated_saved_and_opened(name, size, folder):
    small = ["--set", "n_layers=1", "d_model=32", "d_ff=32"] if name == "backwards" else []
    flags = ["--model", name, "--size", size, *small, "--schedule", "constant"]
    train(*flags, "--steps", "4", "--out", "whole")
    train(*flags, "--steps", "2", "--warmup", "0", "--out", "parts")
    train(*flags, "--steps", "4", "--warmup", "0", "--out", "parts", "--resume")
    assert rows(folder / "whole") == rows(folder / "parts") and len(rows(folder / "whole")) == 4 + 3
    shown = {"backwards": "backwards: ", "recurrent": "nothing yet"}[name]
    assert (folder / "whole" / "samples.txt").read_text().count(shown) == 3

    model = open_model(folder / "whole" / "model")
    assert type(model).__name__ == {"backwards": "GPT", "recurrent": "Model"}[name]


def test_a_task_takes_another_model_by_its_own_flag(folder):
    small = ["--set", "n_layers=1", "d_model=32", "d_ff=32"]
    train("--model", "gpt", "--task", "backwards", *small, "--steps", "2", "--out", "a")
    train("--model", "backwards", *small, "--steps", "2", "--out", "b")
    assert rows(folder / "a") == rows(folder / "b")


# A task with a loop of its own, data of its own, a model to start from, and a weight beside it.
LOOP = """
import torch
from torch import nn

import gpt
from engine.log import Failed

make_batch = gpt.make_batch
MODEL, DATA, REFERENCE, STEPS = "gpt", "text.txt", True, 2


class Beside(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config
        self.register_buffer("count", torch.zeros(()))


def start_model(args):
    return "start"


def wrap(model, settings):
    return Beside(model)


def unwrap(module):
    return module.model


def save(module, dataset, directory):
    module.model.save_pretrained(directory)


def flops_per_token(module, settings, seq_len):
    return 1


def train(run, log):
    for _ in run.steps():
        run.model.count += 1
        run.count_step(torch.tensor(True))
        print(f"step {run.step}, count {run.model.count:g}, {run.args.data}, {run.args.init_from}")
        if run.args.seed == 7:
            raise Failed("the reward function failed: KeyError")
    (run.args.out / "samples.txt").write_text("=== step 2\\nthe end")
"""


def test_a_task_may_bring_its_data_its_start_and_its_loop_and_state_beside_an_adapter(folder, capsys):
    (folder / "loop.py").write_text(LOOP)
    small = gpt.Config(1, 2, 16, 16, vocab_size=257, max_seq_len=16, eos_token_id=256)
    gpt.GPT(small).save_pretrained(folder / "start")
    argv = ["--model", "loop", "--tokenizer", "bytes", "--batch-size", "2", "--save-every", "1"]
    assert train_py.main([*argv, "--out", "run", "--adapter", "lora"]) == 0
    assert "step 2, count 2, text.txt, start" in capsys.readouterr().out
    names = checkpoint.names(folder / "run" / "checkpoint")
    assert "model.count" in names and all(".adapters." in name or name == "model.count" for name in names)
    assert (folder / "run" / "model" / "adapter_model.safetensors").exists()

    # The reference is compared on resuming, also without an adapter.
    assert train_py.main([*argv, "--out", "all"]) == 0
    gpt.GPT(small).save_pretrained(folder / "start")
    assert train_py.main([*argv, "--out", "all", "--resume"]) == 2
    assert "the weights in start have changed" in capsys.readouterr().err
    assert train_py.main([*argv, "--out", "failed", "--seed", "7"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the reward function failed: KeyError; nothing is saved yet")
    sys.modules.pop("loop", None)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model", "nothing"], ["--model nothing", "gpt", "moe", "masking"]),
        (["--model", "json"], ["--model json: expected a concept's file"]),
        (["--model", "gpt", "--task", "nothing"], ["--task nothing"]),
        (["--model", "gpt", "--task", "moe"], ["--task moe", "offers no task"]),
        (["--model", "gpt", "--task", "masking"], ["--task masking: gpt is no encoder", "like bert"]),
        (["--model", "bert", "--task", "translate"], ["bert is no encoder-decoder", "like t5"]),
        (["--model", "t5", "--task", "gpt"], ["--task gpt: t5 is no decoder", "like gpt"]),
        (["--model", "vit", "--task", "electra"], ["vit is no detector of replaced tokens"]),
        (["--model", "masking", "--task", "gpt"], ["--model masking --task gpt: two tasks"]),
        (["--model", "gpt", "--adapter", "nothing", "--init-from", "x"], ["--adapter nothing", "dora"]),
        (["--model", "gpt", "--adapter", "lora"], ["--adapter lora: needs --init-from DIR"]),
        (["--model", "gpt", "--train", "some"], ["--train some: expected all, head, or last:N"]),
        (["--model", "lora"], ["--model lora needs --base DIR"]),
        (["--model", "lora", "--base", "runs/gpt/model", "--size", "dora"], ["--model lora --adapter dora"]),
        (["--model", "lora", "--base", "B", "--size", "last"], ["--size last", "leave out --size"]),
        (["--model", "gpt", "--base", "B"], ["--base B", "--init-from"]),
        (["--model", "gpt", "--set", "colour=3"], ["--set colour=3", "n_layers"]),
        (["--model", "bert", "--set", "mask_rate=0"], ["mask_rate 0"]),
    ],
)
def test_what_makes_no_sense_is_one_line_with_code_2(flags, words):
    error = train(*flags, code=2)
    line = error.strip().splitlines()[-1]
    assert line.startswith(("error: ", "train.py: error: ")) and all(word in line for word in words), error
    assert "Traceback" not in error


def test_every_file_that_names_what_it_offers_can_be_found():
    models, adapters, tasks = (contract.names(what) for what in ("Model", "ADAPTERS", "make_batch"))
    assert {"gpt", "bert", "moe", "electra"} <= set(models) and adapters == ["lora"]
    assert {"gpt", "masking", "electra", "instruct"} <= set(tasks)
    for name in tasks:
        task = contract.read(contract.Task, contract.find(name))
        assert callable(task.make_batch) and task.count is not None
