"""What train.py can be told: its flags, their defaults, and which of them make no sense.

Every flag is part of what a run computes, but for those in FREE_ON_RESUME; --resume checks that it goes on
with the computation that was begun. Of the free ones --steps is the schedule's end, and --batch-size with
--grad-accum, whose product must stay, decides what is masked together in bert.py and language/electra.py.
"""

import argparse
import math
import platform
from pathlib import Path

import torch

from data import corpus
from engine import parallel, watch
from engine.contract import find
from kernels.backend import choose as choose_backend

MODELS = ("gpt", "bert", "electra", "moe", "lora")

# These change nothing of what a run computes.
NO_EFFECT = {"out", "resume", "watch", "compare", "cache", "log_every", "save_every", "eval_every"}
# A resumed run may change those and these.
FREE_ON_RESUME = NO_EFFECT | {
    "steps", "device", "compile", "kernels", "parallel", "checkpoint_activations", "batch_size", "grad_accum",
}  # fmt: skip


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a language model from scratch, or further.",
        epilog="Examples: train.py --model gpt | train.py --model gpt --data book.txt --out runs/book | "
        "train.py --model gpt --resume | torchrun --nproc_per_node=8 train.py --model gpt --parallel ddp | "
        "train.py --compare runs/a runs/b",
    )
    what = parser.add_argument_group("what is trained")
    what.add_argument("--model", help=f"the model file, always needed: {', '.join(MODELS)}")
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
        "stdlib (questions about it), or a .jsonl or .json, see posttraining/instruct.py",
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
    how.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="SEQUENCES",
        help="of all processes together (default %(default)s)",
    )
    how.add_argument("--grad-accum", type=int, default=1, metavar="N", help="batches per update (default 1)")
    how.add_argument("--seq-len", type=int, metavar="T", help="tokens (default: what the model was made for)")
    how.add_argument(
        "--optimizer", choices=("adamw", "muon"), default="adamw", help="muon: for matrices only"
    )
    how.add_argument("--lr", type=float, help="peak learning rate (default: by the model's size)")
    how.add_argument(
        "--mup",
        type=int,
        metavar="WIDTH",
        help="--lr was found for this d_model, all else in proportion: carry it over (muP, see engine/optim.py)",
    )
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
    where.add_argument(
        "--parallel",
        choices=("none", "ddp", "fsdp"),
        default="none",
        help="how torchrun's processes share the model: each holds all of it, or a part (see engine/parallel.py)",
    )
    where.add_argument(
        "--checkpoint-activations",
        action="store_true",
        help="keep only what goes into each block and compute the rest again: less memory, a third more work",
    )

    measure = parser.add_argument_group("instead of a run")
    measure.add_argument(
        "--dry-run",
        type=int,
        nargs="?",
        const=1,
        metavar="N",
        help="how much memory each of N processes (default 1) needs, part by part (see engine/memory.py)",
    )
    measure.add_argument(
        "--benchmark", action="store_true", help="50 steps: tokens per second, MFU, memory, time lost"
    )
    measure.add_argument(
        "--profile", action="store_true", help="some steps traced, and what costs the most in them"
    )
    measure.add_argument(
        "--compare", type=Path, nargs="+", metavar="DIR", help="draw runs over each other, and stop"
    )

    out = parser.add_argument_group("what comes out")
    out.add_argument("--out", type=Path, metavar="DIR", help="default runs/MODEL")
    out.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    out.add_argument("--eval-every", type=int, metavar="STEPS", help="default: eight times in a run")
    out.add_argument("--save-every", type=int, metavar="STEPS", help="default: as often as evaluation")
    out.add_argument("--log-every", type=int, metavar="STEPS", default=10, help="default %(default)s")
    out.add_argument(
        "--cache", type=Path, metavar="DIR", default=Path("cache"), help="of tokens (default cache)"
    )
    out.add_argument(
        "--watch",
        nargs="+",
        default=[],
        metavar="WHERE",
        help="show the curves there too: tensorboard, wandb",
    )
    args = parser.parse_args(argv)
    if args.compare:
        return args
    if args.model not in MODELS:
        parser.error(f"--model {args.model or 'is missing'}: expected one of {', '.join(MODELS)}")
    args.out = args.out or Path("runs") / args.model
    if args.size is None and args.init_from is None:
        args.size = next(iter(find(args.model).SIZES))
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other flags; ValueError for values that make no sense."""
    positive = "steps batch_size grad_accum seq_len eval_every save_every log_every mup dry_run"
    for flag in positive.split():
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: expected at least 1")
    for flag in ("lr", "warmup", "weight_decay", "grad_clip", "seed"):
        value = getattr(args, flag)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: expected at least 0")
    if args.seed >= 1 << 31:  # the rest of 64 bits counts batches
        raise ValueError(f"--seed {args.seed}: expected less than {1 << 31}")
    if args.mup and args.lr is None:
        raise ValueError(f"--mup {args.mup}: needs --lr, the learning rate that was found at this width")
    concept = find(args.model)
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

    n = parallel.n_processes()
    if args.batch_size % n:
        raise ValueError(f"--batch-size {args.batch_size}: expected a multiple of the {n} processes")
    watch.check(args.watch)


def choose_device(args: argparse.Namespace) -> None:
    """Settle --device, --dtype and --compile; ValueError for what this machine does not have."""
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
    if args.parallel != "none" and args.device == "mps":
        raise ValueError(f"--parallel {args.parallel}: not on mps; add --device cpu")
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
