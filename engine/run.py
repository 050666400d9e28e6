"""A run: everything that is settled before its first step.

    check     flags, device, the directory in --out, the checkpoint of --resume
    load      the concept's files, the data, the configuration
    build     the model, its adapter or frozen parts, the module that is trained
    start     the shards of each rank, optimizers, the state of a checkpoint

`prepare` does all of it, so that whatever can fail fails before any work that costs time. What it returns, a
`Run`, holds the state of a training in progress; engine/checkpoint.py saves and restores it.
"""

import argparse
import copy
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from data.rows import Dataset
from engine import checkpoint, contract, cpu, optim, parallel, trainable
from engine.averages import Averages
from engine.batches import Batches
from engine.device import choose_device
from engine.options import FREE_ON_EXTEND, FREE_ON_RESUME, check_arguments, fill_defaults, fill_intervals
from engine.settings import adapter_fields, check_set, task_settings, with_fields
from engine.trainable import count


class Interrupted(Exception):
    """SIGINT or SIGTERM reached some rank. Raised on every rank so that all stop at the same step."""

    def __init__(self, number: int):
        self.number = number


class Sizes(NamedTuple):
    """Numbers of parameters."""

    n_params: int  # in all
    n_active: int  # that the forward pass of one token uses, without an adapter's
    n_trained: int  # that learn


@dataclass
class Run:
    """A training in progress."""

    args: argparse.Namespace
    concept: contract.Concept
    settings: Any  # the task's Config
    adapter_config: Any  # the adapter's Config, None without one
    base_fingerprint: str | None  # of the frozen model that the checkpoint leaves out, if there is one
    sizes: Sizes
    dataset: Dataset
    batches: Batches
    model: nn.Module  # this rank's shards of it
    unsharded: nn.Module | None  # all of it, to show and to save, on rank 0
    objective: parallel.Objective
    synced_module: nn.Module  # the one that exchanges gradients between ranks, see parallel.distribute
    loss: Callable  # the objective as training calls it: perhaps compiled, perhaps by DDP
    optimizers: list[torch.optim.Optimizer]
    flags: dict[str, str]  # as they were typed, for --resume to compare
    lock: FileLock | None = None
    step: int = 0  # updates made
    seconds: float = 0.0  # spent on them
    skipped: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))  # in all, in a row
    signal: int = 0  # the number of the last signal received, 0 for none
    averages: Averages | None = field(init=False)  # of the weights; None without --ema

    def __post_init__(self):
        self.averages = Averages(self.model, self.args.ema) if self.args.ema else None

    @property
    def n_skipped(self) -> int:
        """Return how many updates were left out because the gradient was not finite."""
        return int(self.skipped[0])

    @property
    def n_skipped_in_a_row(self) -> int:
        """Return how many of the latest updates were left out, without one made in between."""
        return int(self.skipped[1])

    @property
    def units_per_step(self) -> float:
        """Return how many tokens, or other units of the data set such as images, one update reads."""
        per_row = self.dataset.units_per_row or self.args.seq_len
        return self.args.batch_size * self.args.grad_accum * per_row

    @property
    def flops_per_token(self) -> int:
        """Return the FLOPs of training on one token, or image: without gradients of frozen weights, and with
        both passes of --sam-rho."""
        what = (self.concept, self.model, self.settings, self.adapter_config)
        return trainable.flops_per_token(*what, self.args.seq_len) * (1 + bool(self.args.sam_rho))

    @property
    def is_first(self) -> bool:
        """Return whether this is rank 0, which writes and prints."""
        return parallel.rank() == 0

    def autocast(self) -> torch.autocast:
        """Return the context of --dtype bfloat16: weights stay float32, matrix products are in bfloat16.

        FSDP casts by itself.
        """
        enabled = self.args.dtype == "bfloat16" and self.args.parallel != "fsdp"
        return torch.autocast(self.args.device, dtype=torch.bfloat16, enabled=enabled)

    def averaged(self) -> AbstractContextManager:
        """Return the context in which the model has its averaged weights, where --ema keeps them."""
        return nullcontext() if self.averages is None else self.averages.in_place()

    def steps(self) -> Iterator[int]:
        """Yield the numbers of the steps that are left; raise Interrupted on all ranks after a signal."""
        while self.step < self.args.steps:
            number = parallel.max_over_ranks_async(self.signal)  # exchanged while the step is computed
            yield self.step
            if number():
                raise Interrupted(number())

    def count_step(self, finite: Tensor) -> None:
        """Count an update, as one left out where finite is False, without waiting for the device."""
        self.step += 1
        self.skipped += ~finite
        self.skipped[1] *= ~finite

    def is_due(self, every: int) -> bool:
        """Return whether this step is a multiple of `every`, or the last one."""
        return self.step % every == 0 or self.step == self.args.steps

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights that a checkpoint holds: all, or with an adapter those that its base lacks."""
        task, adapter = self.concept.task, self.concept.adapter
        if adapter is None:
            return self.model.state_dict()
        return adapter.state(self.model) | trainable.beside(self.model, task.unwrap(self.model))

    def save_model(self, directory: Path) -> None:
        """Write the unsharded model, or its adapter in PEFT's layout, and the tokenizer."""
        task, adapter = self.concept.task, self.concept.adapter
        if adapter is None:
            task.save(self.unsharded, self.dataset, directory)
        else:
            of_base = (self.adapter_config, self.concept.base, self.base_fingerprint)
            adapter.save_pretrained(task.unwrap(self.unsharded), directory, *of_base)
        task.save_tokenizer(self.dataset, directory)

    def close(self) -> None:
        """Stop the thread and release the lock on the run directory."""
        self.batches.close()
        if self.lock is not None:
            self.lock.release()


@contextmanager
def signals(run: Run) -> Iterator[None]:
    """Store the number of SIGINT or SIGTERM in run.signal, so that the step is finished. A second SIGINT
    raises KeyboardInterrupt at once."""

    def note(number: int, _) -> None:
        run.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare(args: argparse.Namespace) -> Run:
    """Return the run that the flags describe, at its first step or, with --resume, where it was saved.

    Raises ValueError for everything that a user can mend, in one line that says what to do.
    """
    flags = {flag: str(value) for flag, value in vars(args).items()}  # before defaults are filled in
    concept = check(args)
    for flag in ("size", "batch_size", "optimizer", "sam_rho", "schedule"):  # with their defaults
        flags[flag] = str(getattr(args, flag))
    lock = open_directory(args.out) if parallel.rank() == 0 else None
    parallel.barrier()
    saved = find_checkpoint(args, flags)

    # The data, the model, and which of its weights learn.
    torch.manual_seed(args.seed)
    pretrained, config = configure(concept, args)
    dataset = load_data(concept, config, args)
    model = build(concept, config, pretrained, dataset, args)
    n_base, n_active = count(model.parameters())[0], concept.model_file.n_active_params(model)
    adapter_config, base_fingerprint = choose_weights(concept, model, args)
    set_rates(concept, model, n_active, pretrained is None, adapter_config, args)

    # The objective that the task makes of it, and its batches.
    settings = task_settings(concept, model.config, args.set)
    objective = wrap(concept, model, settings, args, is_new=saved is None)
    batches = Batches(args, concept.task, settings, dataset)
    n_params, n_trained = count(objective.model.parameters())
    if concept.adapter is not None:  # a base in 4 bits has no parameters any more
        n_params = n_base + n_trained
    sizes = Sizes(n_params, n_active, n_trained)

    # This rank's shards of all that training changes.
    synced_module, loss, unsharded = parallel.distribute(objective, args, concept.model_file.recomputation)
    run = Run(
        args=args,
        concept=concept,
        settings=settings,
        adapter_config=adapter_config,
        base_fingerprint=base_fingerprint,
        sizes=sizes,
        dataset=dataset,
        batches=batches,
        model=objective.model,
        unsharded=unsharded,
        objective=objective,
        synced_module=synced_module,
        loss=loss,
        optimizers=make_optimizers(concept, objective.model, adapter_config, args),
        flags=flags,
        lock=lock,
        skipped=torch.zeros(2, dtype=torch.int64, device=args.device),
    )
    if not (args.benchmark or args.profile):
        check_saving(run, is_new=saved is None)
    if saved is not None:
        checkpoint.resume(run, *saved)
    batches.start(run.step)
    if saved is None and run.is_first:
        checkpoint.clear_logs(args.out)
    return run


def wrap(concept: contract.Concept, model: nn.Module, settings, args, is_new: bool) -> parallel.Objective:
    """Return the task's objective around the model. If is_new, its further weights are read from --init-from,
    where that holds any."""
    objective = parallel.Objective(concept.task.wrap(model, settings), concept.task.loss)
    if args.init_from and is_new:
        with redirect_stdout(sys.stdout if parallel.rank() == 0 else None):
            concept.task.restore(objective.model, concept.base or args.init_from)
    return objective


def check(args: argparse.Namespace) -> contract.Concept:
    """Check the flags, fill in their defaults, and return the files they name."""
    check_arguments(args)
    concept = contract.resolve(args)
    fill_defaults(args, concept)
    choose_device(args)
    if args.device == "cpu":
        cpu.multiply_by_onednn()
    return concept


def open_directory(out: Path) -> FileLock:
    """Make the run's directory if there is none, and return a lock on it; ValueError if it is locked."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / "lock")  # the operating system's, released even if the process is killed
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"--out {out}: another run is writing to it; wait, or name another directory"
        ) from None
    except FileExistsError:
        raise ValueError(f"--out {out}: a file; expected a directory, or the name of a new one") from None
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written to ({error.strerror})") from None
    return lock


def find_checkpoint(args: argparse.Namespace, flags: dict[str, str]) -> tuple[Path, dict] | None:
    """Return the checkpoint to resume from, None for a new run. Fill in the number of steps, and the flags
    that depend on it.

    Raises ValueError where --out or the flags do not fit.
    """
    saved = None
    if args.resume or args.extend:
        saved = checkpoint.find(args.out, flags, FREE_ON_EXTEND if args.extend else FREE_ON_RESUME)
        checkpoint.continue_schedule(args, saved[1], flags)
    fill_intervals(args)
    if not args.out.is_dir():
        raise ValueError(f"--out {args.out}: expected a directory that all machines share")
    if saved is None and checkpoint.is_begun(args.out):
        raise ValueError(
            f"--out {args.out}: there is a run in it; add --resume to go on, or name another directory"
        )
    return saved


def configure(concept: contract.Concept, args: argparse.Namespace) -> tuple[nn.Module | None, Any]:
    """Return the pretrained model, None for a new one, and the model's Config with the values of --set."""
    file = concept.model_file
    directory = concept.base or args.init_from
    if directory:
        pretrained = file.Model.from_pretrained(directory, kernels=args.kernels)
        if concept.adapter is None:
            pretrained = pretrained.float()
        config = pretrained.config
    elif args.size in file.SIZES:
        from formats import native

        pretrained, config = None, native.with_kernels(file.SIZES[args.size], args.kernels)
    else:
        raise ValueError(f"--size {args.size}: expected one of {', '.join(file.SIZES)}")
    check_set(concept, config, args.set)
    config = with_fields(config, args.set)

    args.seq_len = args.seq_len or config.max_seq_len
    if args.seq_len > config.max_seq_len:
        larger = [f"--size {name}" for name, c in file.SIZES.items() if c.max_seq_len >= args.seq_len]
        other = larger[0] if larger and not directory else "a model that reads more"
        limit = f"this model reads at most {config.max_seq_len} tokens"
        raise ValueError(f"--seq-len {args.seq_len}: {limit}; give that or less, or choose {other}")
    return pretrained, config


def load_data(concept: contract.Concept, config: Any, args: argparse.Namespace) -> Dataset:
    """Return the task's data. What it prints is printed on rank 0 alone."""
    with redirect_stdout(sys.stdout if parallel.rank() == 0 else None):
        return concept.task.load_data(args, config)


def build(
    concept: contract.Concept,
    config: Any,
    pretrained: nn.Module | None,
    dataset: Dataset,
    args: argparse.Namespace,
) -> nn.Module:
    """Return a new model for this data, or the pretrained one, with the changes of --set."""
    if pretrained is None:
        return concept.model_file.Model(concept.model_file.fit(config, dataset, args.seq_len))
    n_vocab = dataset.tokenizer.n_vocab if dataset.tokenizer is not None else 0
    if n_vocab and n_vocab > config.vocab_size:
        raise ValueError(
            f"--tokenizer {args.tokenizer}: {n_vocab} tokens, the checkpoint has {config.vocab_size}; leave "
            "it out to use the checkpoint's own"
        )
    if config == pretrained.config:
        return pretrained
    model = concept.model_file.Model(config)
    start_from(model, pretrained.state_dict(), args.set)
    return model


def start_from(model: nn.Module, weights: dict[str, Tensor], changes: list[str]) -> None:
    """Copy pretrained weights into a model. A head that --set has added, or given another size, keeps its
    initial weights."""
    places = model.state_dict()
    for name, w in list(weights.items()):
        is_head = name.rpartition(".")[0].endswith(optim.HEADS)
        if is_head and name in places and places[name].shape != w.shape:
            del weights[name]
            continue
        if name not in places or places[name].shape != w.shape:
            raise ValueError(f"--set {' '.join(changes)}: leaves no place for the checkpoint's {name}")
    model.load_state_dict(weights, strict=False)


def choose_weights(
    concept: contract.Concept, model: nn.Module, args: argparse.Namespace
) -> tuple[Any, str | None]:
    """Put in the adapter, and freeze all parameters but those that --adapter or --train names, in place.

    Returns the adapter's Config or None, and the fingerprint of the model at the start if a checkpoint leaves
    it out (an adapter's base, the reference of DPO), else None.
    """
    adapter = concept.adapter
    if adapter is None:
        if trainable.parse(args.train)[0] == "head":
            concept.model_file.separate_head(model)
        trainable.freeze(model, args.train)
        if not concept.task.REFERENCE:
            return None, None
        from formats import safetensors_dir

        return None, safetensors_dir.fingerprint(model)
    config = adapter_fields(concept, model.config, args)
    fingerprint = adapter.prepare_base(model, config)
    if not args.init_from or not contract.open_model().is_adapter(args.init_from):
        adapter.apply(model, config)
        return config, fingerprint

    # Train an adapter further, perhaps with other options, for which a new one takes over its weights.
    trained = copy.deepcopy(model) if args.set else model
    config = adapter.load_adapter(trained, args.init_from, base_fingerprint=fingerprint)
    if args.set:
        config = adapter_fields(concept, model.config, args, config)
        adapter.apply(model, config)
        start_from(model, adapter.state(trained), args.set)
    return config, fingerprint


def set_rates(
    concept: contract.Concept,
    model: nn.Module,
    n_active: int,
    is_new: bool,
    adapter_config: Any,
    args: argparse.Namespace,
) -> None:
    """Fill in --lr by the number of active parameters, and with --mup rescale the weights of a new model."""
    if args.lr is None:
        factor = concept.task.LEARNING_RATE * trainable.LEARNING_RATE[trainable.parse(args.train)[0]]
        if concept.adapter is not None:
            factor = concept.adapter.learning_rate(adapter_config)
        args.lr = factor * optim.default_learning_rate(n_active)
    if args.mup and is_new:
        optim.transfer_width(model, args.mup, concept.model_file.width_factors)


def make_optimizers(
    concept: contract.Concept, model: nn.Module, adapter_config: Any, args: argparse.Namespace
) -> list[torch.optim.Optimizer]:
    """Return the optimizers, with the betas of the task's file, and the rates and decays of the adapter's
    file if there is one."""
    rules = {"width_factors": concept.model_file.width_factors, "betas": concept.task.BETAS}
    if concept.adapter is not None:
        rules["lr_factor"] = partial(concept.adapter.lr_factor, adapter_config)
        rules["decays"] = partial(concept.adapter.decays, adapter_config)
    return optim.make_optimizers(model, args, **rules)


def check_saving(run: Run, is_new: bool) -> None:
    """Raise ValueError if the disk lacks the room for checkpoints, or if no format can hold a new model."""
    args, sizes, free = run.args, run.sizes, shutil.disk_usage(run.args.out).free
    # Three checkpoints while one is replaced, each of the weights, and of two moments and the average of each
    # weight that learns. Beside them model/, best/ and models/.
    saved = sizes.n_params if run.concept.adapter is None else sizes.n_trained
    models = saved * (1 + args.keep_best + (args.keep_models or 0))
    needed = 4 * (3 * (saved + (2 + bool(args.ema)) * sizes.n_trained) + models)
    if free < needed:
        raise ValueError(
            f"--out {args.out}: {free / 1e9:.1f} GB free on its disk, {needed / 1e9:.1f} GB needed"
        )
    if is_new and run.is_first:
        with tempfile.TemporaryDirectory(dir=args.out) as aside:
            run.save_model(Path(aside))
