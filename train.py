"""Train any of the models: `python train.py --model gpt`.

    for step in range(steps):
        gradient of the mean loss over batch_size x grad_accum sequences, clipped to norm grad_clip
        optimizer step at learning_rate(step)

The loop stands in `train` below. It knows a model only through the Concept protocol, so each model file
stays readable on its own. Everything random is a function of (seed, step): a run that is killed and resumed
computes, on a CPU to the bit, what it would have computed in one go. A run leaves behind, in --out:

    model/           Hugging Face layout: opens with AutoModelForCausalLM and AutoTokenizer (adapters: PEFT)
    checkpoint/      what --resume needs; checkpoint.previous/ is the one before
    metrics.jsonl    one object per logged step and per evaluation
    loss.png         training and validation loss over tokens
    samples.txt      what the model had to show at each evaluation; moe.py also draws experts.png
"""

import argparse
import ast
import ctypes
import importlib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import corpus
import data
from kernels.backend import choose as choose_backend
from optim import default_learning_rate, learning_rate, make_optimizers
from tokenizer import Tokenizer
from wordpiece import WordPiece


class Concept(Protocol):
    """What a model file offers to be trained: a module with these names."""

    # Of Config, the first by default; .fitted(tokenizer, seq_len) and .changed(field=value) give others.
    SIZES: dict[str, Any]
    Model: type[nn.Module]  # Model(config); .loss(batch) -> (loss, metrics); .flops_per_token(seq_len);
    #                         .save_pretrained(directory); .from_pretrained(directory); .config;
    #                         .after_step(), if there is one, after each update of the weights;
    #                         .lr_factor(name) and .decays(name, parameter), if there are, for optim.py;
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
    # save_tokenizer(tokenizer, directory), where more than the tokenizer belongs to it.


MODELS = ("gpt", "bert", "electra", "moe", "lora")

# Dense bf16 matmul peak in FLOP/s, by the name that CUDA gives the device. An unknown device shows no MFU
# rather than a guess.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,  # NVIDIA HGX B200 data sheet (half of "with sparsity", here and below)
    "NVIDIA H200": 989e12,  # NVIDIA H200 data sheet
    "NVIDIA H100 80GB HBM3": 989e12,  # NVIDIA H100 data sheet, SXM
    "NVIDIA H100 NVL": 835e12,  # NVIDIA H100 NVL data sheet
    "NVIDIA H100 PCIe": 756e12,  # NVIDIA H100 data sheet
    "NVIDIA A100-SXM4-80GB": 312e12,  # NVIDIA A100 data sheet
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,  # NVIDIA L40S data sheet
    "NVIDIA L4": 121e12,  # NVIDIA L4 data sheet
    "NVIDIA GeForce RTX 4090": 165.2e12,  # NVIDIA Ada whitepaper, appendix A, float32 accumulation
    "NVIDIA GeForce RTX 3090": 71e12,  # NVIDIA GA102 whitepaper, table 9, float32 accumulation
    "AMD Instinct MI300X": 1307e12,  # AMD Instinct MI300X data sheet
}

# A resumed run may change these; every other flag is part of what the run computes.
FREE_ON_RESUME = {
    "resume", "out", "cache", "steps", "device", "compile", "kernels", "eval_every", "save_every",
    "log_every",
}  # fmt: skip
LOGS = ("metrics.jsonl", "samples.txt")
MAX_SKIPPED = 5  # steps in a row with a non-finite loss or gradient before the run gives up


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a language model from scratch, or further.",
        epilog="Examples: train.py --model gpt | train.py --model gpt --data book.txt --out runs/book | "
        "train.py --model gpt --resume",
    )
    what = parser.add_argument_group("what is trained")
    what.add_argument("--model", required=True, help=f"the model file: {', '.join(MODELS)}")
    what.add_argument(
        "--size",
        help="a size, or for lora a method, that the model file names, see `python gpt.py` (default: "
        "its first)",
    )
    what.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="other values for fields of the model file's Config, such as n_layers=6 or mask_rate=0.3",
    )
    what.add_argument("--init-from", metavar="DIR", help="start from this checkpoint in Hugging Face layout")
    what.add_argument("--base", metavar="DIR", help="the checkpoint that --model lora adapts")
    what.add_argument(
        "--data",
        default="stdlib",
        metavar="WHAT",
        help="stdlib (this Python's own source text, the default), a file, folder or glob of .txt .md .py "
        f".jsonl, also .gz, a URL, or one of: {', '.join(corpus.PUBLIC)}; for --model lora conversations: "
        "stdlib (questions about it), or a .jsonl or .json, see instruct.py",
    )
    what.add_argument(
        "--tokenizer",
        metavar="WHAT",
        help="bpe:N learns N tokens from the corpus, bytes, a tiktoken encoding such as gpt2, or a directory "
        "with tokenizer.json (default bpe:4096, or the tokenizer in --init-from or --base)",
    )
    what.add_argument(
        "--bad-text", choices=("refuse", "skip"), default="refuse", help="text that is not UTF-8"
    )
    what.add_argument("--document-mask", action="store_true", help="keep attention inside each document")

    how = parser.add_argument_group("how it is trained")
    how.add_argument("--steps", type=int, help="optimizer updates (default: five minutes of the tiny size)")
    how.add_argument("--batch-size", type=int, default=8, metavar="SEQUENCES", help="default %(default)s")
    how.add_argument("--grad-accum", type=int, default=1, metavar="N", help="batches per update (default 1)")
    how.add_argument("--seq-len", type=int, metavar="T", help="tokens (default: what the model was made for)")
    how.add_argument(
        "--optimizer", choices=("adamw", "muon"), default="adamw", help="muon: for matrices only"
    )
    how.add_argument("--lr", type=float, help="peak learning rate (default: by the model's size)")
    how.add_argument(
        "--warmup", type=int, metavar="STEPS", help="default: a twentieth of --steps, at most 1000"
    )
    how.add_argument("--schedule", choices=("cosine", "wsd", "constant"), default="cosine")
    how.add_argument("--weight-decay", type=float, default=0.1, help="of matrices (default %(default)s)")
    how.add_argument(
        "--grad-clip", type=float, default=1.0, help="largest gradient norm, 0 for none (default 1)"
    )
    how.add_argument("--seed", type=int, default=0)

    where = parser.add_argument_group("where and how fast")
    where.add_argument("--device", choices=("cpu", "cuda", "mps"), help="default: a GPU if there is one")
    where.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32"
    )
    where.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU)"
    )
    where.add_argument("--kernels", choices=("auto", "triton", "torch", "reference"), default="auto")

    out = parser.add_argument_group("what comes out")
    out.add_argument("--out", type=Path, metavar="DIR", help="default runs/MODEL")
    out.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    out.add_argument("--eval-every", type=int, metavar="STEPS", help="default: eight times in a run")
    out.add_argument("--save-every", type=int, metavar="STEPS", help="default: as often as evaluation")
    out.add_argument("--log-every", type=int, metavar="STEPS", default=10, help="default %(default)s")
    out.add_argument(
        "--cache", type=Path, metavar="DIR", default=Path("cache"), help="of tokens (default cache)"
    )
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / args.model
    if args.size is None and args.init_from is None and args.model in MODELS:
        args.size = next(iter(importlib.import_module(args.model).SIZES))
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other flags; ValueError for values that make no sense."""
    if args.model not in MODELS:
        raise ValueError(f"--model {args.model}: expected one of {', '.join(MODELS)}")
    for flag in ("steps", "batch_size", "grad_accum", "seq_len", "eval_every", "save_every", "log_every"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: expected at least 1")
    for flag in ("lr", "warmup", "weight_decay", "grad_clip", "seed"):
        value = getattr(args, flag)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: expected at least 0")
    if args.seed >= 1 << 31:
        raise ValueError(
            f"--seed {args.seed}: expected less than {1 << 31}"
        )  # the rest of 64 bits counts batches
    concept = importlib.import_module(args.model)
    if args.init_from and (args.size or args.base):
        given = f"--size {args.size}" if args.size else f"--base {args.base}"
        raise ValueError(f"{given} and --init-from cannot go together: the checkpoint decides this")
    if args.base and args.model != "lora":
        raise ValueError(f"--base {args.base}: only --model lora adapts a model; did you mean --init-from?")
    if args.model == "lora" and not (args.base or args.init_from):
        raise ValueError("--model lora needs --base DIR, the model to adapt, such as runs/gpt/model")
    args.steps = args.steps or concept.STEPS
    args.eval_every = args.eval_every or math.ceil(args.steps / 8)
    args.save_every = args.save_every or args.eval_every
    if args.warmup is None:
        args.warmup = min(1000, args.steps // 20)
    args.tokenizer = args.tokenizer or args.init_from or args.base or "bpe:4096"

    if args.device is None:
        args.device = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[args.device]:
        raise ValueError(
            f"--device {args.device}: there is none here; leave the flag out to use what there is"
        )
    if args.dtype is None:
        args.dtype = "bfloat16" if args.device == "cuda" and has_bfloat16("cuda") else "float32"
    if args.dtype == "bfloat16" and not has_bfloat16(args.device):
        raise ValueError(
            f"--dtype bfloat16: this {args.device} has no bfloat16 arithmetic; use --dtype float32"
        )
    choose_backend(f"--kernels {args.kernels}", args.kernels, torch.empty(0, device=args.device))
    if args.compile is None:
        args.compile = args.device == "cuda"


def has_bfloat16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16; PyTorch's emulation of it is slower than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu" and platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@dataclass
class Run:
    args: argparse.Namespace
    concept: Concept
    model: nn.Module
    dataset: data.Dataset
    loader: data.Loader
    optimizers: list[torch.optim.Optimizer]
    flags: dict[str, str]  # as they were at the start, for --resume to compare
    loss_of: Callable  # model.loss, compiled if asked for
    step: int = 0  # updates made
    seconds: float = 0.0  # spent on them
    n_skipped: int = 0  # updates left out because a gradient was not finite
    n_skipped_in_a_row: int = 0  # the last ones


def prepare(args: argparse.Namespace) -> Run:
    """Everything that can fail, before any work that costs: ValueError says what is wrong and what to do."""
    flags = {flag: str(value) for flag, value in vars(args).items()}  # before they get derived defaults
    check_arguments(args)
    saved = load_checkpoint(args, flags) if args.resume else None
    if saved is None and (args.out / "checkpoint").exists():
        raise ValueError(
            f"--out {args.out}: there is a run in it; add --resume to go on, or name another directory"
        )
    concept = importlib.import_module(args.model)
    torch.manual_seed(args.seed)
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
    check_writable(args.out)

    if hasattr(concept, "prepare_data"):
        dataset = concept.prepare_data(config, args)
    else:
        dataset = data.prepare(args.data, args.tokenizer, args.cache, bad_text=args.bad_text)
    loader = data.Loader(dataset.train.tokens, args.seq_len, args.seed)
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
    needed = 4 * n_trained * 10
    if free < needed:
        raise ValueError(
            f"--out {args.out}: {free / 1e9:.1f} GB free on its disk, {needed / 1e9:.1f} GB needed"
        )
    if args.lr is None:
        factor = getattr(model.config, "learning_rate", None) or concept.LEARNING_RATE
        args.lr = factor * default_learning_rate(n_active)
    model.to(args.device)
    # The module itself stays as it is: what is saved must not carry the names that compiling adds.
    loss_of = torch.compile(model.loss) if args.compile else model.loss
    run = Run(args, concept, model, dataset, loader, make_optimizers(model, args), flags, loss_of)
    micro_batch(run, 0, 0)  # ValueError if the objective cannot be asked of such rows
    if saved is not None:
        resume(run, *saved)
    else:
        with tempfile.TemporaryDirectory(dir=args.out) as aside:
            model.save_pretrained(aside)  # ValueError for a model that no architecture describes
        for log in LOGS:
            (args.out / log).write_text("")
    return run


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


def check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written to ({error.strerror})") from None


def load_checkpoint(args: argparse.Namespace, flags: dict[str, str]) -> tuple[dict, dict, dict]:
    def warn(problem: str) -> None:
        print(f"warning: {problem}; trying the checkpoint before it", file=sys.stderr)

    saved = checkpoint.load(args.out, warn)
    state = saved[2]
    for flag in flags.keys() - FREE_ON_RESUME:
        now = flags[flag]
        before = state["flags"].get(flag, now)  # a run older than the flag did without it
        if before != now:
            raise ValueError(
                f"--resume: the run in {args.out} was started with --{flag.replace('_', '-')} {before}, not "
                f"{now}; its command was: {state['command']}"
            )
    return saved


def resume(run: Run, weights: dict, tensors: dict, state: dict) -> None:
    if state.get("base") != getattr(run.model, "base_fingerprint", None):
        raise ValueError(
            f"--resume: the weights in --base {run.args.base} have changed since the run was started"
        )
    if state["dataset"] != run.dataset.name:
        raise ValueError(
            f"--resume: the text of --data {run.args.data} has changed since the run was started"
        )
    run.model.load_state_dict(weights)
    for optimizer, saved in zip(run.optimizers, tensors["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    torch.set_rng_state(tensors["rng"])
    run.step, run.seconds, run.n_skipped = state["step"], state["seconds"], state["skipped"]
    # What was logged after the checkpoint will be computed and logged again.
    for name, size in state["logs"].items():
        os.truncate(run.args.out / name, size)


def save(run: Run) -> None:
    """Write checkpoint/ and model/, each whole or not at all."""
    out = run.args.out
    for log in LOGS:
        checkpoint.sync(out / log)
    tensors = {"optimizers": [o.state_dict() for o in run.optimizers], "rng": torch.get_rng_state()}
    state = {"step": run.step, "seconds": run.seconds, "skipped": run.n_skipped, "dataset": run.dataset.name}
    state |= {"flags": run.flags, "command": shlex.join(["python", *sys.argv])}
    state |= {"base": getattr(run.model, "base_fingerprint", None)}
    state |= {"logs": {log: (out / log).stat().st_size for log in LOGS}}
    checkpoint.save(out, run.model.state_dict(), tensors, state)
    with checkpoint.replace_directory(out / "model") as new:
        run.model.save_pretrained(new)
        if hasattr(run.concept, "save_tokenizer"):
            run.concept.save_tokenizer(run.dataset.tokenizer, new)
        else:
            run.dataset.tokenizer.save(new)


def micro_batch(run: Run, step: int, micro: int) -> dict[str, Tensor]:
    args = run.args
    index = step * args.grad_accum + micro
    tokens = run.loader.batch(index * args.batch_size, args.batch_size)
    return to_batch(run, tokens, torch.Generator().manual_seed((args.seed << 32) + index))


def to_batch(run: Run, tokens: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    batch = run.concept.make_batch(tokens, run.model.config, generator, run.dataset.tokenizer)
    if run.args.document_mask and "cu_seqlens" not in batch:
        if "pair_labels" in batch:
            raise ValueError("--document-mask parts what a pair objective joins: leave out one of them")
        ends = data.cu_seqlens(batch["tokens"], run.dataset.tokenizer.eot_id)
        batch = {name: t.reshape(1, -1) for name, t in batch.items()} | {"cu_seqlens": ends}
    return {name: t.to(run.args.device, non_blocking=True) for name, t in batch.items()}


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16")


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """Mean loss and other metrics over the whole held-out text, always the same draws whatever the training
    has drawn."""
    run.model.eval()
    sums, n_targets = Counter(), 0
    tokens, T, B = run.dataset.val.tokens, run.args.seq_len, run.args.batch_size
    for i, rows in enumerate(data.held_out_batches(tokens, T, B)):
        if run.concept.SPECIAL_TOKENS and rows.shape[1] <= T:
            continue  # the end of the text: special tokens might leave it no room
        batch = to_batch(run, rows, torch.Generator().manual_seed(i))
        # The last rows have another shape, for which nothing should be compiled again.
        whole = rows.shape == (B, T + 1)
        with autocast(run.args):
            loss, metrics = (run.loss_of if whole else run.model.loss)(batch)
        n = int(metrics.pop("targets"))
        if n == 0:
            continue  # nothing was masked in these rows, and the mean of nothing is NaN
        n_targets += n
        for name, mean in {"loss": loss, **metrics}.items():
            sums[f"val_{name}"] += n * mean.double().item()
    run.model.train()
    result = {name: total / n_targets for name, total in sums.items()}
    # Of the tokens alone, where something else is asked too.
    result["perplexity"] = math.exp(min(result.get("val_mlm_loss", result["val_loss"]), 700))
    if n_targets == len(tokens) - 1:  # every byte was predicted, so the sum is a code length for the text
        result["bits_per_byte"] = sums["val_loss"] / math.log(2) / run.dataset.val.n_bytes
    return result


def update(run: Run) -> tuple[Tensor, Tensor, float, dict[str, Tensor]]:
    """One step of the optimizers, left out if the loss or its gradient is not finite. Returns the loss, the
    gradient's norm before clipping, the learning rate and the other metrics of the last micro-batch."""
    args, model = run.args, run.model
    lr = learning_rate(run.step, args)
    for group in (group for optimizer in run.optimizers for group in optimizer.param_groups):
        group["lr"] = lr * group.get("lr_factor", 1.0)  # runs older than it have none
    loss = torch.zeros((), device=args.device)
    batches = [micro_batch(run, run.step, micro) for micro in range(args.grad_accum)]
    # Of the targets, which some batches may have more of: the mean is that of one large batch.
    shares = torch.stack([(batch["targets"] >= 0).sum() for batch in batches]).float()
    for batch, share in zip(batches, shares / shares.sum(), strict=True):
        with autocast(args):
            micro_loss, metrics = run.loss_of(batch)
        (micro_loss * share).backward()
        loss += micro_loss.detach() * share
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
    finite = bool(torch.isfinite(loss + norm))
    if finite:
        for optimizer in run.optimizers:
            optimizer.step()
        if hasattr(model, "after_step"):
            model.after_step()
    model.zero_grad(set_to_none=True)
    run.step += 1
    run.n_skipped += not finite
    run.n_skipped_in_a_row = 0 if finite else run.n_skipped_in_a_row + 1
    return loss, norm, lr, metrics


def train(run: Run) -> int:
    """The loop. Returns the exit code: 0 at the end, 130 if interrupted, 1 if the loss stays non-finite."""
    args, model = run.args, run.model
    tokens_per_step = args.batch_size * args.grad_accum * args.seq_len
    flops_per_token = model.flops_per_token(args.seq_len)
    peak = peak_flops(args.device)
    interrupted = []

    def interrupt(*_):
        interrupted.append(True)  # the step is finished first; a second Ctrl-C does not wait
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, interrupt)
    announce(run)
    bar = tqdm(total=args.steps, initial=run.step, unit="step", smoothing=0, dynamic_ncols=True)
    shown = {}
    if run.step == 0:
        shown["val"] = evaluate_and_show(run)
    logged_step, interval = run.step, 0.0
    while run.step < args.steps and not interrupted:
        began = time.perf_counter()
        loss, norm, lr, metrics = update(run)
        interval += time.perf_counter() - began

        if run.n_skipped_in_a_row:
            tqdm.write(f"step {run.step}: loss {loss.item()}, gradient norm {norm.item()}: update skipped")
        if run.n_skipped_in_a_row == MAX_SKIPPED:
            bar.close()
            where = args.out / "checkpoint"
            last = f"the last good state is in {where}" if where.is_dir() else "nothing was saved yet"
            print(
                f"error: {MAX_SKIPPED} steps in a row were not finite; try a lower --lr; {last}",
                file=sys.stderr,
            )
            return 1
        if run.step % args.log_every == 0 or run.step == args.steps:
            rate = (run.step - logged_step) * tokens_per_step / interval
            run.seconds += interval
            logged_step, interval = run.step, 0.0
            row = {"step": run.step, "tokens": run.step * tokens_per_step, "loss": loss.item(), "lr": lr}
            row |= {"grad_norm": norm.item(), "skipped": run.n_skipped, "tokens_per_second": rate}
            row |= {"mfu": rate * flops_per_token / peak if peak else None, "seconds": run.seconds}
            row |= {name: float(value) for name, value in metrics.items() if name != "targets"}
            append(args.out / "metrics.jsonl", json.dumps(row) + "\n")
            shown |= {"loss": f"{loss.item():.3f}", "tok/s": f"{rate:,.0f}"}
            shown |= {"mfu": f"{row['mfu']:.1%}"} if peak else {}
        bar.set_postfix(shown, refresh=False)
        bar.update()
        if run.step % args.eval_every == 0 or run.step == args.steps:
            shown["val"] = evaluate_and_show(run)
        if run.step % args.save_every == 0 and run.step < args.steps and not run.n_skipped_in_a_row:
            save(run)
    bar.close()
    save(run)
    if interrupted:
        print(f"interrupted at step {run.step} and saved; go on with --resume", file=sys.stderr)
        return 130
    print((args.out / "samples.txt").read_text().rpartition("=== ")[2])
    print(f"model: {args.out / 'model'}    loss curve: {args.out / 'loss.png'}")
    return 0


def append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def evaluate_and_show(run: Run) -> str:
    args, out = run.args, run.args.out
    result = evaluate(run)
    tokens = run.step * args.batch_size * args.grad_accum * args.seq_len
    append(out / "metrics.jsonl", json.dumps({"step": run.step, "tokens": tokens, **result}) + "\n")
    held_out = torch.from_numpy(run.dataset.val.tokens[: 16 * args.seq_len].astype("int64"))
    sample = run.concept.show(run.model.eval(), run.dataset.tokenizer, held_out, out)
    run.model.train()
    heading = f"=== step {run.step}, validation loss {result['val_loss']:.4f}"
    shown = f"{result['val_loss']:.3f}"
    if "val_accuracy" in result:
        heading += f", accuracy {result['val_accuracy']:.1%}"
        shown += f", {result['val_accuracy']:.1%} right"
    append(out / "samples.txt", f"{heading}\n{sample}\n\n")
    plot(out)
    return shown


def announce(run: Run) -> None:
    """Say what will be trained and how long it will take, by timing a forward and backward pass."""
    args, model, train, val = run.args, run.model, run.dataset.train.tokens, run.dataset.val.tokens
    passes = []
    with torch.random.fork_rng():
        for _ in range(3):  # the first ones warm up, or compile
            began = time.perf_counter()
            with autocast(args):
                loss, _ = run.loss_of(micro_batch(run, run.step, 0))
            loss.backward()
            loss.item()
            passes.append(time.perf_counter() - began)
    model.zero_grad(set_to_none=True)
    n_params, n_active, n_trained = count_parameters(model)
    tokens_per_step = args.batch_size * args.grad_accum * args.seq_len
    n_tokens = args.steps * tokens_per_step
    n_flops = n_tokens * model.flops_per_token(args.seq_len)
    left = args.steps - run.step
    evaluations = (left // args.eval_every + 1) * len(val) / (args.batch_size * args.seq_len)
    minutes = min(passes) * (left * args.grad_accum + evaluations / 3) / 60  # forward alone: a third
    part = f", {n_active:,} of them active" if n_active < n_params else ""
    if n_trained < n_params:
        part = f", {n_trained:,} of them trained ({n_trained / n_params:.2%})"
    print(f"model  {args.model} {args.init_from or args.size}, {n_params:,} parameters{part}")
    print(f"text   {args.data}, {len(train):,} tokens to train on, {len(val):,} held out")
    epochs = n_tokens / len(train)
    if not hasattr(run.concept, "prepare_data"):
        best = np.bincount(train[: 1 << 24]).argmax()
        print(f"guess  the most frequent token is right for {np.mean(val == best):.2%} of the held out")
    print(f"run    {args.steps:,} steps of {tokens_per_step:,} tokens: {n_tokens:,}, {epochs:.2f} epochs")
    per_parameter = f", {n_tokens / n_params:.2f} tokens per parameter (Chinchilla: 20)"
    print(f"cost   {n_flops:.2e} FLOPs{per_parameter if n_trained == n_params else ''}")
    print(f"here   {args.dtype} on {args.device}, about {minutes:.1f} min from step {run.step}", flush=True)


def peak_flops(device: str) -> float | None:
    return PEAK_FLOPS.get(torch.cuda.get_device_name()) if device == "cuda" else None


def plot(out: Path) -> None:
    """loss.png: training and validation loss over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for key, style, label in (("loss", "-", "training"), ("val_loss", "o-", "validation")):
        points = [(row["tokens"], row[key]) for row in rows if key in row]
        axes.plot(
            *zip(*points, strict=True) if points else ((), ()),
            style,
            label=label,
            markersize=4,
            linewidth=1.2,
        )
    axes.xaxis.set_major_formatter(EngFormatter())
    several = any("val_mlm_loss" in row for row in rows)  # losses added up, not nats of a token
    axes.set(xlabel="tokens", ylabel="loss" if several else "loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with checkpoint.replace_file(out / "loss.png") as new:
        figure.savefig(new, dpi=120, format="png")
    pyplot.close(figure)


def keep_freed_memory() -> None:
    """Have glibc keep large blocks that are freed: every step allocates the same activations again, and would
    otherwise pay a page fault for each 4 kB of them."""
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, largest = -1, -3, 2**31 - 1
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, largest)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU; the CPU has none
    try:
        run = prepare(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        return train(run)
    finally:
        signal.signal(signal.SIGINT, on_interrupt)


if __name__ == "__main__":
    sys.exit(main())
