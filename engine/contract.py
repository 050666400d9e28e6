"""The contract: everything that the trainer reads in a concept's file.

Three questions, three flags. Each concept's file answers one of them, or several:

    --model    which architecture?          SIZES, Model and the functions of `ModelFile`
    --task     what is it trained to do?    make_batch and the functions of `Task`
    --adapter  which weights learn?         ADAPTERS and the functions of `Adapter`

`find` looks the file up by its name, so a new concept is one new file and nothing else. For a name that a
file leaves out there is a default below: next-token prediction on text, a loss that is a method of the model,
all weights learning. The docstring of a default says what such a function is for and, after a colon, what the
default does. Where a task is the default of a model, a function in the model's file replaces that in the
task's file.
"""

import importlib
import importlib.util
import re
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from data.rows import Dataset, Row
from engine import optim, parallel

ROOT = Path(__file__).parents[1]
FOLDERS = ("language", "attention_variants", "posttraining", "vision", "scaling", "evaluation")
# A line that defines one of these names in a file's text, so that no file is imported to look for them.
OFFER = re.compile(r"^(?:class |def )?(Model|SIZES|ADAPTERS|make_batch)\b", re.M)


def find(name: str, flag: str = "--model") -> ModuleType:
    """Import the concept's file `name`.py: at the top, in FOLDERS, or anywhere on Python's path.

    Raises ValueError where there is none that offers a model, a task or an adapter.
    """
    if name.isidentifier():
        for folder in (ROOT, *map(ROOT.joinpath, FOLDERS)):
            if offers(folder / f"{name}.py"):
                package = "" if folder == ROOT else f"{folder.name}."
                return importlib.import_module(package + name)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin and offers(Path(spec.origin)):
            return importlib.import_module(name)
    raise ValueError(f"{flag} {name}: expected a concept's file, one of {', '.join(names())}")


def offers(path: Path) -> set[str]:
    """Return what a file offers, some of Model, ADAPTERS and make_batch, by its text alone."""
    if path.suffix != ".py" or not path.is_file():
        return set()
    found = set(OFFER.findall(path.read_text("utf-8")))
    if not {"Model", "SIZES"} <= found:  # a model is trained in one of its sizes
        found -= {"Model"}
    return found - {"SIZES"}


def names(what: str = "") -> list[str]:
    """Return the names of all concepts' files, or of those that offer `what`, as `offers` names it."""
    paths = [path for folder in ("", *FOLDERS) for path in sorted((ROOT / folder).glob("*.py"))]
    return [path.stem for path in paths if (what in offers(path) if what else offers(path))]


# --- the defaults of a model's file


def fit(config: Any, dataset: Dataset, seq_len: int) -> Any:
    """Return the config for this data: its vocabulary, the ids of its special tokens, rows of seq_len."""
    wanted: dict[str, Any] = {"max_seq_len": seq_len}
    if dataset.tokenizer is not None:
        wanted |= {"vocab_size": dataset.tokenizer.n_vocab, "eos_token_id": dataset.tokenizer.eot_id}
    known = {field.name for field in fields(config)}
    return replace(config, **{name: value for name, value in wanted.items() if name in known})


def after_step(model: nn.Module, finite: Tensor) -> None:
    """Do nothing after an update of the weights (finite: False where the update was left out)."""


def n_active_params(model: nn.Module) -> int:
    """Return how many parameters the forward pass of one token uses: all of them."""
    return sum(p.numel() for p in model.parameters())


def references(config: Any) -> dict[str, str]:
    """Return {metric: a value to compare it with, in words}, such as the value at chance: for no metric."""
    return {}


def separate_head(model: nn.Module) -> None:
    """Give the model a head of its own if that is the embedding matrix: nothing, since it has one already."""


def recomputation(block: nn.Module) -> AbstractContextManager:
    """Return the context in which --checkpoint-activations computes a block a second time: an empty one."""
    return nullcontext()


@dataclass(frozen=True)
class ModelFile:
    """The names in a model's file. A value here stands for a name that is left out."""

    name: str  # of the module
    Model: type[nn.Module]  # Model(config); .config; .loss; .flops_per_token; save_ and from_pretrained
    SIZES: dict[str, Any]  # name: Config; the first is the default
    TASK: str = ""  # the default task; "": the one in this file
    KIND: str = "decoder"  # what it computes: a task fits the models of one kind, see `check_fit`
    fit: Callable[[Any, Dataset, int], Any] = fit
    after_step: Callable[[nn.Module, Tensor], None] = after_step
    n_active_params: Callable[[nn.Module], int] = n_active_params
    references: Callable[[Any], dict[str, str]] = references
    separate_head: Callable[[nn.Module], None] = separate_head
    recomputation: Callable[[nn.Module], AbstractContextManager] = recomputation
    width_factors: Callable[[str, float], tuple[float, float]] = optim.width_factors
    mlp_bytes: Callable[..., tuple[int, int]] | None = None  # for --dry-run; None: engine/activations.py's


# --- the defaults of a task's file


def settings(config: Any) -> Any:
    """Return the task's own Config for a model of this config: the model's, for a task without settings."""
    return config


def load_text(args: Namespace, config: Any) -> Dataset:
    """Return windows of --seq-len tokens of the text that --data names.

    One process of each machine tokenises, and the others wait for it, for parallel.TIMEOUT at most. So a
    large corpus is better prepared before the run, by `python -m data.text`.
    """
    from data import text

    return text.as_rows(load_corpus(args), args.seq_len)


def load_corpus(args: Namespace):
    """Return the data.text.Corpus that --data names, tokenised by one process of each machine."""
    from data import text

    corpus = None
    with parallel.one_per_machine_first() as is_first:
        if is_first:
            options = {"val": args.val, "text_field": args.text_field, "bad_text": args.bad_text}
            corpus = text.prepare(args.data, args.tokenizer, args.cache, **options)
    name = parallel.broadcast(corpus and corpus.name)
    return corpus or text.reopen(args.cache, name, args.tokenizer)


def start_model(args: Namespace) -> str | None:
    """Return the directory of the model to start from where --init-from is left out: none, a new model."""
    return None


def wrap(model: nn.Module, config: Any) -> nn.Module:
    """Return the module that is trained: the model itself."""
    return model


def unwrap(module: nn.Module) -> nn.Module:
    """Return the model in the module that is trained: the module itself."""
    return module


def restore(module: nn.Module, directory: str) -> None:
    """Copy into the module that `wrap` has made those of its weights beside the model's that the directory of
    --init-from holds: none."""


def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the model's own loss of a batch, and metrics: means over its targets, by name."""
    return model.loss(batch)


def count(batch: dict[str, Tensor]) -> int:
    """Return the weight of a batch in a mean over several: its targets from 0 on, or else its rows."""
    if "targets" in batch:
        return int((batch["targets"] >= 0).sum())
    return len(next(iter(batch.values())))


def split(batch: dict[str, Tensor], i: int, n: int) -> dict[str, Tensor]:
    """Return the i-th of n equal parts of a batch: that part of each tensor's rows."""
    return {name: t.chunk(n)[i] for name, t in batch.items()}


def show(model: nn.Module, dataset: Dataset, out: Path) -> str:
    """Return a text for samples.txt at an evaluation, perhaps with a picture written to out: an empty one."""
    return ""


def save(model: nn.Module, dataset: Dataset, directory: Path) -> None:
    """Write the model to a directory: by its save_pretrained."""
    model.save_pretrained(directory)


def save_tokenizer(dataset: Dataset, directory: Path) -> None:
    """Write the files that belong beside the weights: those of the tokenizer, if there is one."""
    if dataset.tokenizer is not None:
        dataset.tokenizer.save(directory)


def flops_per_token(model: nn.Module, config: Any, seq_len: int) -> int:
    """Return the FLOPs of training on one token, forward and backward, if all weights learn: the model's."""
    return model.flops_per_token(seq_len)


@dataclass(frozen=True)
class Task:
    """The names in a task's file. A value here stands for a name that is left out."""

    name: str  # of the module
    # make_batch(rows, settings, generator, tokenizer): a function of its arguments alone
    make_batch: Callable[[list[Row], Any, Any, Any], dict[str, Tensor]]
    settings: Callable[[Any], Any] = settings
    load_data: Callable[[Namespace, Any], Dataset] = load_text
    start_model: Callable[[Namespace], str | None] = start_model
    wrap: Callable[[nn.Module, Any], nn.Module] = wrap
    unwrap: Callable[[nn.Module], nn.Module] = unwrap
    restore: Callable[[nn.Module, str], None] = restore
    loss: Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]] = loss
    count: Callable[[dict[str, Tensor]], int] = count
    split: Callable[[dict[str, Tensor], int, int], dict[str, Tensor]] = split
    show: Callable[[nn.Module, Dataset, Path], str] = show
    save: Callable[[nn.Module, Dataset, Path], None] = save
    save_tokenizer: Callable[[Dataset, Path], None] = save_tokenizer
    flops_per_token: Callable[[nn.Module, Any, int], int] = flops_per_token
    # for --dry-run; None: engine/activations.py's
    tokens_per_row: Callable[[nn.Module, Any, int], list[int]] | None = None
    loss_bytes: Callable[..., dict[str, int]] | None = None
    # train(run, log), a loop of the task's own, with the contract of train.py's `train`; None: that one
    train: Callable[[Any, Any], None] | None = None
    DATA: str = "stdlib"  # the default of --data
    SIZE: str = ""  # the default of --size where the model has it; "": the model's first
    REFERENCE: bool = False  # the model of the start is kept beside the trained one: --resume compares it
    STEPS: int = 1000  # of the default run, about five minutes on two CPU cores
    LEARNING_RATE: float = 1.0  # times optim.default_learning_rate
    OPTIMIZER: str = "adamw"  # the default of --optimizer
    BETAS: tuple[float, float] = (0.9, 0.95)  # AdamW's, of the running means of gradients and their squares
    BATCH_SIZE: int = 8  # the default of --batch-size
    EMA: float = 0.0  # the default of --ema; 0: no averages
    LOSS: str = "nats per token"  # what the loss measures
    TOKEN_LOSS: str = "loss"  # the metric in nats per token, of which perplexity is computed; "": none


@dataclass(frozen=True)
class Adapter:
    """The names in an adapter's file, see lora.py: only those with a value here may be left out."""

    name: str  # of the module
    ADAPTERS: dict[str, Any]  # --adapter NAME: Config
    TASK_FOR: dict[str, str]  # {task of the base: task of `--model NAME --base DIR`}; others stay as they are
    prepare_base: Callable
    apply: Callable
    load_adapter: Callable
    state: Callable
    save_pretrained: Callable
    learning_rate: Callable
    lr_factor: Callable
    decays: Callable
    flops_per_token: Callable
    adapter_bytes: Callable[..., int] | None = None  # for --dry-run; None: engine/activations.py's
    STEPS: int = 1000  # of the default run


# --- from the flags to the files


@dataclass(frozen=True)
class Concept:
    """The answers to the three questions: the files that a run is made of, and an adapter's base."""

    model_file: ModelFile
    task: Task
    adapter: Adapter | None
    base: str | None  # the directory of the model that the adapter adapts


def resolve(args: Namespace) -> Concept:
    """Return the files that --model, --task, --adapter and --base name; ValueError where these do not fit.

    Fills in --data and --init-from where they are left out and the task names a default of its own.
    `--model lora --base DIR` is short for the model in DIR with --adapter lora.
    """
    file, base, task = find(args.model), args.init_from, args.task
    if not {"SIZES", "ADAPTERS"} & vars(file).keys():  # a task brings its model along
        if "MODEL" not in vars(file):
            raise ValueError(
                f"--model {args.model}: a task; name the model too, as --model gpt --task {args.model}"
            )
        if task not in (None, args.model):
            raise ValueError(f"--model {args.model} --task {task}: two tasks; expected a model and a task")
        file, task = find(file.MODEL), args.model

    # The adapter, and the model in its base if --model is the short form.
    adapter_file = find_adapter(args.adapter) if args.adapter else None
    if "ADAPTERS" in vars(file):
        check_short_form(args, file)
        adapter_file = adapter_file or file
        base = base_in(args.base or args.init_from)
        file = importlib.import_module(open_model().concept_of(base))
        task = task or adapter_file.TASK_FOR.get(read_task(file, None).name.rpartition(".")[2])
    elif args.base:
        raise ValueError(f"--base {args.base}: for --model lora; did you mean --init-from?")

    # The task, and its defaults of --data and --init-from.
    task = read_task(file, task)
    args.data = args.data or task.DATA
    if not base:
        base = args.init_from = task.start_model(args)
    if args.size and args.init_from:
        raise ValueError(f"--size {args.size}: this task starts from a trained model; leave out --size")
    if adapter_file is None:
        return Concept(read(ModelFile, file), task, None, None)

    if args.train != "all":
        raise ValueError(f"--train {args.train}: an adapter alone is trained, and the model stays as it is")
    if not base:
        raise ValueError(f"--adapter {args.adapter}: needs --init-from DIR, the model to adapt")
    return Concept(read(ModelFile, file), task, read(Adapter, adapter_file), base_in(base))


def base_in(directory: str) -> str:
    """Return the directory of the model to adapt: this one, or if it holds an adapter, that of its base."""
    formats = open_model()
    return str(formats.base_of(directory, None)) if formats.is_adapter(directory) else directory


def open_model() -> ModuleType:
    """Return the module formats.open_model. It imports every format, so only runs with an adapter load it."""
    return importlib.import_module("formats.open_model")


def check_short_form(args: Namespace, file: ModuleType) -> None:
    """Raise ValueError for `--model lora` without a base, or with --size, which the base decides."""
    short = f"--model {args.model}"
    if args.size in vars(file)["ADAPTERS"]:
        raise ValueError(f"--size {args.size}: methods are named by --adapter: {short} --adapter {args.size}")
    if args.size:
        raise ValueError(f"--size {args.size}: the model in --base has its size; leave out --size")
    if not (args.base or args.init_from):
        raise ValueError(f"{short} needs --base DIR, the model to adapt, such as runs/gpt/model")


def read(kind: type, *files: ModuleType) -> Any:
    """Return a ModelFile, Task or Adapter from the names that files define; of a name in several files, that
    of the first."""
    found: dict[str, Any] = {}
    for file in reversed(files):
        found |= {field.name: vars(file)[field.name] for field in fields(kind) if field.name in vars(file)}
    found["name"] = files[-1].__name__
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.name not in found]
    if missing:
        needs = f"a {kind.__name__} needs {', '.join(missing)}"
        raise ValueError(f"{found['name']}: {needs}, see engine/contract.py")
    return kind(**found)


def read_task(model_file: ModuleType, name: str | None) -> Task:
    """Return the task of that name, or if it is None the default task, for a model of this file."""
    own = model_file.__name__.rpartition(".")[2]
    default = vars(model_file).get("TASK", own)
    if name in (None, default):
        files = [model_file] if default == own else [model_file, find(default, "--task")]
        flag = f"--model {own}"
    else:
        files, flag = [find(name, "--task")], f"--task {name}"
    if not any("make_batch" in vars(file) for file in files):
        raise ValueError(f"{flag}: {files[-1].__name__} offers no task: it has no make_batch")
    if name not in (None, default):
        check_fit(model_file, files[0])
    return read(Task, *files)


def check_fit(model_file: ModuleType, task_file: ModuleType) -> None:
    """Raise ValueError unless the model is of the kind that the task is for, see `ModelFile`.

    That is the kind of the model in the task's file, or of the one that it names as MODEL, or of gpt.py.
    """
    own, task = (file.__name__.rpartition(".")[2] for file in (model_file, task_file))
    its_model = task if "SIZES" in vars(task_file) else vars(task_file).get("MODEL", "gpt")
    kind, expected = (vars(file).get("KIND", "decoder") for file in (model_file, find(its_model)))
    if kind != expected:
        raise ValueError(f"--task {task}: {own} is no {expected}; name a model like {its_model}")


def find_adapter(name: str) -> ModuleType:
    """Return the file that offers the adapter of that name; ValueError where none does."""
    files = [find(file) for file in names("ADAPTERS")]
    for file in files:
        if name in file.ADAPTERS:
            return file
    raise ValueError(
        f"--adapter {name}: expected one of {', '.join(a for file in files for a in file.ADAPTERS)}"
    )
