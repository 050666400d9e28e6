"""A run: all that is settled before its first step, and all that --resume finds again.

`prepare` makes one from the flags; whatever can fail fails there. `host_batches` gives the data of a step, a
function of (seed, step) alone. `save` and `resume` are each other's inverse.
"""

import argparse
import ast
import contextlib
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

import data.text
from data.tokenizer import Tokenizer
from data.wordpiece import WordPiece
from engine import checkpoint, cpu, optim, parallel
from engine.contract import find
from engine.options import FREE_ON_RESUME, check_arguments, choose_device
from formats import atomic

LOGS = ("metrics.jsonl", "samples.txt")


class Concept(Protocol):
    """What a model file offers to be trained: a module with these names."""

    # Of Config, the first by default; .fitted(tokenizer, seq_len) and .changed(field=value) give others.
    SIZES: dict[str, Any]
    Model: type[nn.Module]  # Model(config); .loss(batch) -> (loss, metrics); .flops_per_token(seq_len);
    #                         .save_pretrained(directory); .from_pretrained(directory); .config;
    #                         .after_step(finite), if there is one, after each update of the weights, which
    #                         was left out where the Tensor finite is False;
    #                         .lr_factor(name) and .decays(name, parameter), if there are, for engine/optim.py;
    #                         .base_fingerprint, if there is one, of frozen weights that are not saved

    STEPS: int  # by default: about five minutes on two CPU cores for the first of SIZES
    LEARNING_RATE: float  # by default: times optim.default_learning_rate; or Config's .learning_rate
    SPECIAL_TOKENS: dict[str, str]  # role: token, which the tokenizer must have for this model

    def make_batch(
        self, tokens: Tensor, config: Any, generator: torch.Generator, tokenizer: Tokenizer | WordPiece
    ) -> dict[str, Tensor]: ...

    def show(
        self, model: nn.Module, tokenizer: Tokenizer | WordPiece, held_out: Tensor, directory: Path
    ) -> str: ...  # pictures go to directory

    # If it has these: prepare_data(config, args) -> data.Dataset, where it learns from more than plain text;
    # save_tokenizer(tokenizer, directory), where more than the tokenizer belongs to it; part_of(batch, i, n),
    # the i-th of n equal parts of a batch, where that is more than a part of each tensor's rows.


@dataclass
class Run:
    args: argparse.Namespace
    concept: Concept
    model: nn.Module  # this process's part of it
    whole: nn.Module | None  # all of it, to show and to save, on the first process
    engine: nn.Module  # see parallel.prepare
    loss_of: Callable  # model.loss, as it is to be called in training
    dataset: data.text.Dataset
    loader: data.text.Loader
    optimizers: list[torch.optim.Optimizer]
    flags: dict[str, str]  # as they were at the start, for --resume to compare
    lock: FileLock | None = None
    step: int = 0  # updates made
    seconds: float = 0.0  # spent on them
    skipped: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64))  # see `update`
    signal: int = 0  # the number of the one that has come in
    worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))  # reads ahead
    ahead: Future | None = None  # the batches of the step that comes next

    @property
    def n_skipped(self) -> int:
        """Updates left out because the gradient was not finite."""
        return int(self.skipped[0])

    @property
    def n_skipped_in_a_row(self) -> int:
        """The last ones of them, if nothing came in between."""
        return int(self.skipped[1])

    @property
    def tokens_per_step(self) -> int:
        return self.args.batch_size * self.args.grad_accum * self.args.seq_len

    @property
    def is_first(self) -> bool:
        return parallel.rank() == 0

    def close(self) -> None:
        """Give the directory back, to be written by others."""
        self.worker.shutdown()
        if self.lock is not None:
            self.lock.release()


def prepare(args: argparse.Namespace) -> Run:
    """Everything that can fail, before any work that costs: ValueError says what is wrong and what to do."""
    flags = {flag: str(value) for flag, value in vars(args).items()}  # before they get derived defaults
    check_arguments(args)
    choose_device(args)
    if args.device == "cpu":
        cpu.multiply_by_onednn()
    lock = open_directory(args.out) if parallel.rank() == 0 else None
    parallel.barrier()
    saved = find_checkpoint(args, flags) if args.resume else None
    if not args.out.is_dir():
        raise ValueError(f"--out {args.out}: expected a directory that all machines share")
    if saved is None and any((args.out / name).exists() for name in ("checkpoint", "checkpoint.previous")):
        raise ValueError(
            f"--out {args.out}: there is a run in it; add --resume to go on, or name another directory"
        )
    concept = find(args.model)
    torch.manual_seed(args.seed)
    pretrained, config = configured(concept, args)
    dataset = read_data(concept, config, args)
    loader = data.text.Loader(dataset.train.tokens, args.seq_len, args.seed)
    dataset.tokenizer = dataset.tokenizer.with_special_tokens(concept.SPECIAL_TOKENS)
    n_vocab = dataset.tokenizer.n_vocab
    if pretrained is None:
        model = concept.Model(config.fitted(dataset.tokenizer, args.seq_len))
    elif n_vocab > config.vocab_size:
        raise ValueError(
            f"--tokenizer {args.tokenizer}: {n_vocab} tokens, the checkpoint knows {config.vocab_size}"
        )
    else:
        model = pretrained
        if args.set:
            model = concept.Model(config)
            start_from(model, pretrained, args.set)
    n_held_out = len(dataset.val.tokens)
    if concept.SPECIAL_TOKENS and n_held_out <= args.seq_len:
        raise ValueError(
            f"--seq-len {args.seq_len}: the held-out text has only {n_held_out} tokens; give more text"
        )
    _, n_active, n_trained = count_parameters(model)
    free = shutil.disk_usage(args.out).free
    # Three checkpoints of weights and two moments while one is replaced, and model/.
    needed = 4 * n_trained * (3 * 3 + 1)
    keeps = not (args.benchmark or args.profile)
    if keeps and free < needed:
        raise ValueError(
            f"--out {args.out}: {free / 1e9:.1f} GB free on its disk, {needed / 1e9:.1f} GB needed"
        )
    if args.lr is None:
        factor = getattr(model.config, "learning_rate", None) or concept.LEARNING_RATE
        args.lr = factor * optim.default_learning_rate(n_active)
    if args.mup and pretrained is None:
        optim.transfer_width(model, args.mup, width_factors(concept))
    if saved is None and keeps and parallel.rank() == 0:
        with tempfile.TemporaryDirectory(dir=args.out) as aside:
            model.save_pretrained(aside)  # ValueError for a model that no architecture describes
    if getattr(model.config, "pooler", False) and model.config.pair == "none":
        model.bert.pooler.requires_grad_(False)  # nothing asks for it, and ddp would wait for its gradient
    engine, loss_of, whole = parallel.prepare(model, args)
    rules = {rule: getattr(model, rule) for rule in ("lr_factor", "decays") if hasattr(model, rule)}
    optimizers = optim.make_optimizers(model, args, width_factors=width_factors(concept), **rules)
    run = Run(args, concept, model, whole, engine, loss_of, dataset, loader, optimizers, flags, lock)
    run.skipped = run.skipped.to(args.device)
    if saved is not None:
        resume(run, *saved)
    run.ahead = run.worker.submit(host_batches, run, run.step)
    run.ahead.result()  # ValueError if the objective cannot be asked of such rows
    if saved is None and run.is_first:
        for log in LOGS:
            (args.out / log).write_text("")
    return run


def width_factors(concept: Concept) -> Callable:
    """Return the concept's rules of width transfer, or those of a concept without them."""
    return getattr(concept, "width_factors", optim.width_factors)


def configured(concept: Concept, args: argparse.Namespace) -> tuple[nn.Module | None, Any]:
    """The model in --init-from, if it is given, and the Config that --size or it and --set make."""
    if args.init_from:
        pretrained = concept.Model.from_pretrained(args.init_from, kernels=args.kernels).float()
        config = with_fields(pretrained.config, args.set)
    elif args.size in concept.SIZES:
        pretrained = None
        of_base = {"base": args.base} if args.base else {}
        config = with_fields(replace(concept.SIZES[args.size], kernels=args.kernels, **of_base), args.set)
    else:
        raise ValueError(f"--size {args.size}: expected one of {', '.join(concept.SIZES)}")
    args.seq_len = args.seq_len or config.max_seq_len
    if args.seq_len > config.max_seq_len:
        raise ValueError(f"--seq-len {args.seq_len}: this model reads at most {config.max_seq_len} tokens")
    return pretrained, config


def planned_model(args: argparse.Namespace) -> nn.Module:
    """The model that would be trained, without memory for its weights, for engine/memory.py; --model lora's base has
    some. Its vocabulary is that of --size, not of --tokenizer, and --dtype what a GPU would be given."""
    check_arguments(args)
    args.dtype = args.dtype or "bfloat16"
    concept = find(args.model)
    pretrained, config = configured(concept, args)
    if pretrained is not None:
        return pretrained
    with torch.device("cpu" if args.base else "meta"):
        return concept.Model(config)


def read_data(concept: Concept, config: Any, args: argparse.Namespace) -> data.text.Dataset:
    """What --data names, tokenised; of plain text one process of each machine prepares it for all. They wait
    for parallel.TIMEOUT at most: much text is better prepared before, by data/text.py."""
    if hasattr(concept, "prepare_data"):
        with contextlib.redirect_stdout(sys.stdout if parallel.rank() == 0 else None):
            return concept.prepare_data(config, args)
    dataset = None
    with parallel.first_on_each_machine() as is_first:
        if is_first:
            dataset = data.text.prepare(args.data, args.tokenizer, args.cache, bad_text=args.bad_text)
    name = parallel.from_first(dataset and dataset.name)
    return dataset or data.text.reopen(args.cache, name, args.tokenizer)


def count_parameters(model: nn.Module) -> tuple[int, int, int]:
    """All of them; those that a token uses, which are not all in moe.py; those that learn, not all in
    lora.py."""
    n_params = getattr(model, "n_params", None) or sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return n_params, getattr(model.config, "n_active_params", n_params), n_trained


def with_fields(config: Any, changes: list[str]) -> Any:
    """The config with the values of --set; ValueError for a field it does not have or a value of no sense."""
    fields = {}
    for change in changes:
        field, equals, text = change.partition("=")
        if not equals or field not in config.__dataclass_fields__:
            known = ", ".join(config.__dataclass_fields__)
            raise ValueError(f"--set {change}: expected FIELD=VALUE with a field of {known}")
        if field in ("vocab_size", "max_seq_len", "eos_token_id", "pad_token_id", "kernels", "base"):
            raise ValueError(f"--set {change}: --tokenizer, --seq-len, --kernels and --base decide this")
        try:
            value = ast.literal_eval(text)  # a number, None, True, a tuple
        except (ValueError, SyntaxError):
            value = text
        now = getattr(config, field)
        alike = float | int if isinstance(now, float) else type(now)
        if now is not None and value is not None and not isinstance(value, alike):
            raise ValueError(f"--set {change}: expected a value such as {now!r}")
        fields[field] = value
    try:
        return config.changed(**fields) if fields else config
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"--set {' '.join(changes)}: {error}") from None


def start_from(model: nn.Module, pretrained: nn.Module, changes: list[str]) -> None:
    """Give model the pretrained weights; a head that --set has added keeps its random ones."""
    weights, places = pretrained.state_dict(), model.state_dict()
    for name, w in weights.items():
        if name not in places or places[name].shape != w.shape:
            raise ValueError(f"--set {' '.join(changes)}: leaves no place for the checkpoint's {name}")
    model.load_state_dict(weights, strict=False)


def open_directory(out: Path) -> FileLock:
    """The lock on a run's directory, which is made if there is none; ValueError if it cannot be had."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / "lock")  # the system's own, given back even by a process that is killed
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"--out {out}: another run is writing to it; wait, or name another directory"
        ) from None
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written to ({error.strerror})") from None
    return lock


def find_checkpoint(args: argparse.Namespace, flags: dict[str, str]) -> tuple[Path, dict]:
    """Where to resume from, and the state of the run then; ValueError if it was another run."""

    def warn(problem: str) -> None:
        print(f"warning: {problem}; trying the checkpoint before it", file=sys.stderr)

    directory, state = parallel.ask_first(lambda: checkpoint.newest(args.out, warn))
    for flag in flags.keys() - FREE_ON_RESUME:
        now = flags[flag]
        before = state["flags"].get(flag, now)  # a run older than the flag did without it
        if before != now:
            raise ValueError(
                f"--resume: the run in {args.out} was started with --{flag.replace('_', '-')} {before}, not "
                f"{now}; its command was: {state['command']}"
            )
    n_before, n_now = (int(f["batch_size"]) * int(f["grad_accum"]) for f in (state["flags"], flags))
    if n_before != n_now:
        raise ValueError(
            f"--resume: the run in {args.out} was started with {n_before} sequences in an update, not "
            f"{n_now}; --batch-size and --grad-accum may change, but not their product"
        )
    return directory, state


def resume(run: Run, directory: Path, state: dict) -> None:
    if state.get("base") != getattr(run.model, "base_fingerprint", None):
        raise ValueError(
            f"--resume: the weights in --base {run.args.base} have changed since the run was started"
        )
    if state["dataset"] != run.dataset.name:
        raise ValueError(
            f"--resume: the text of --data {run.args.data} has changed since the run was started"
        )
    # The optimizers make their state in the first step. It is made here as the checkpoint names it.
    saved = checkpoint.names(directory)
    for optimizer in run.optimizers:
        for name, p in named(run.model, optimizer):
            prefix = f"optimizer.{name}."
            for key in (full.removeprefix(prefix) for full in saved if full.startswith(prefix)):
                # AdamW counts its steps on the device if it is fused.
                device = p.device if optimizer.param_groups[0].get("fused") else "cpu"
                state_of = optimizer.state[p]
                state_of[key] = torch.zeros((), device=device) if key == "step" else torch.zeros_like(p)
    checkpoint.load(directory, tensors_of(run))
    run.step, run.seconds = state["step"], state["seconds"]
    run.skipped[0] = state["skipped"]
    # What was logged after the checkpoint will be computed and logged again.
    if run.is_first:
        for name, size in state["logs"].items():
            os.truncate(run.args.out / name, size)


def named(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    """The parameters of an optimizer, with their names in the model."""
    its_own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [(name, p) for name, p in model.named_parameters() if id(p) in its_own]


def tensors_of(run: Run) -> dict[str, Tensor]:
    """All that learning has changed, by name: this process's part of weights and optimizer states."""
    tensors = {f"model.{name}": w for name, w in run.model.state_dict().items()}
    for optimizer in run.optimizers:
        for name, p in named(run.model, optimizer):
            tensors |= {f"optimizer.{name}.{key}": t for key, t in optimizer.state[p].items()}
    return tensors


def save(run: Run) -> None:
    """Write checkpoint/ and model/, each whole or not at all. OSError if there is no room for them."""
    out, state = run.args.out, {}
    if run.is_first:
        for log in LOGS:
            atomic.sync(out / log)
        state = {
            "step": run.step,
            "seconds": run.seconds,
            "skipped": run.n_skipped,
            "dataset": run.dataset.name,
        }
        state |= {"flags": run.flags, "command": command()}
        state |= {"base": getattr(run.model, "base_fingerprint", None)}
        state |= {"logs": {log: (out / log).stat().st_size for log in LOGS}}
    checkpoint.save(out, tensors_of(run), state)
    parallel.gather(run.model, run.whole)
    if run.is_first:
        with atomic.replace_directory(out / "model") as new:
            run.whole.save_pretrained(new)
            if hasattr(run.concept, "save_tokenizer"):
                run.concept.save_tokenizer(run.dataset.tokenizer, new)
            else:
                run.dataset.tokenizer.save(new)
    parallel.barrier()


def command() -> str:
    """As it was typed, but for what starts it."""
    return shlex.join(["python", *sys.argv])


def host_batches(run: Run, step: int) -> tuple[list[dict[str, Tensor]], list[float]]:
    """This process's part of the batches of an update, in the host's memory; and for each the share that its
    targets are of all targets in the update, so that the mean is that of one large batch."""
    args, i, n = run.args, parallel.rank(), parallel.n_processes()
    batches, n_targets, n_own = [], 0, []
    for index in range(step * args.grad_accum, (step + 1) * args.grad_accum):
        tokens = run.loader.batch(index * args.batch_size, args.batch_size)
        batch = whole_batch(run, tokens, (args.seed << 32) + index)
        n_targets += (batch["targets"] >= 0).sum().item()
        batches.append(as_asked(run, part_of(run, batch, i, n)))
        n_own.append((batches[-1]["targets"] >= 0).sum().item())
    return batches, [own / max(1, n_targets) for own in n_own]


def whole_batch(run: Run, tokens: Tensor, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return run.concept.make_batch(tokens, run.model.config, generator, run.dataset.tokenizer)


def part_of(run: Run, batch: dict[str, Tensor], i: int, n: int) -> dict[str, Tensor]:
    """The i-th of n equal parts of a batch."""
    if n == 1:
        return batch
    if hasattr(run.concept, "part_of"):
        return run.concept.part_of(batch, i, n)
    return {name: t.chunk(n)[i] for name, t in batch.items()}


def as_asked(run: Run, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch as --document-mask wants it, ready to be moved to the device."""
    if run.args.document_mask and "cu_seqlens" not in batch:
        if "pair_labels" in batch:
            raise ValueError("--document-mask parts what a pair objective joins: leave out one of them")
        ends = data.text.cu_seqlens(batch["tokens"], run.dataset.tokenizer.eot_id)
        batch = {name: t.reshape(1, -1) for name, t in batch.items()} | {"cu_seqlens": ends}
    # From pinned memory a GPU fetches for itself, while the host goes on.
    return {name: t.pin_memory() if run.args.device == "cuda" else t for name, t in batch.items()}


def next_batches(run: Run) -> tuple[list[dict[str, Tensor]], list[float]]:
    """`host_batches` of this step, and the order to prepare those of the next one meanwhile."""
    found = run.ahead.result()
    run.ahead = run.worker.submit(host_batches, run, run.step + 1)
    return found


def to_device(run: Run, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to(run.args.device, non_blocking=True) for name, t in batch.items()}
