"""The flags of train.py: their defaults, and checks of values that make no sense together.

Every flag is part of what a run computes, except those in FREE_ON_RESUME: --resume compares the others with
those of the run that it continues. Three of the free ones are checked in other ways: --steps is the end of
the learning-rate schedule, see `checkpoint.continue_schedule`; --batch-size and --grad-accum decide which
rows one make_batch reads together, and must keep their product. The flags in BY_CONTENT name files, which may
move, so the content of the files is compared instead.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from engine import contract, optim, parallel, trainable, watch
from formats import command

# These change no number that a run computes.
NO_EFFECT = {
    "out", "resume", "watch", "compare", "cache", "log_every", "save_every", "eval_every", "keep_best",
    "keep_models",
}  # fmt: skip
# A checkpoint has hashes of the text and its tokenizer, and the configuration of the model.
BY_CONTENT = {"data", "val", "text_field", "bad_text", "tokenizer", "init_from", "base"}
# A resumed run may change the flags of both sets, and these.
FREE_ON_RESUME = NO_EFFECT | BY_CONTENT | {
    "steps", "device", "compile", "kernels", "parallel", "checkpoint_activations", "batch_size", "grad_accum",
    "extend", "patience",
}  # fmt: skip
# A run with --extend may have these of its own too, for its second schedule.
FREE_ON_EXTEND = FREE_ON_RESUME | {"lr", "warmup", "schedule"}
# --NAME VALUE is short for --set NAME=VALUE, for the models that have such a field.
SHORT = {
    "stage": "1: the projector alone learns, 2: the language model too (--model llava; default 2)",
    "tower": "directory of a CLIP whose image tower a new llava gets (default: one trained on scenes first)",
    "images": "folder of the images that the conversations in --data name (--model llava)",
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the flags of train.py; exit with code 2 and one line for a flag that does not exist."""
    parser = command.Parser(
        description="Train a model from scratch, or further.",
        epilog="Examples: train.py --model gpt | train.py --model gpt --data book.txt --out runs/book | "
        "train.py --model gpt --resume | torchrun --nproc_per_node=8 train.py --model gpt --parallel ddp | "
        "train.py --compare runs/a runs/b",
    )
    add_what(parser.add_argument_group("what is trained"))
    add_data(parser.add_argument_group("on what"))
    add_how(parser.add_argument_group("how it is trained"))
    add_where(parser.add_argument_group("where and how fast"))
    add_output(parser.add_argument_group("what comes out"))
    add_measurements(parser.add_argument_group("instead of a run"))
    args = parser.parse_args(argv)
    args.set += [f"{name}={getattr(args, name)}" for name in SHORT if getattr(args, name) is not None]
    if not args.compare and args.model is None:
        parser.error(f"--model is missing: expected one of {', '.join(contract.names())}")
    args.out = args.out or Path("runs") / (args.model or "compare")
    return args


def add_what(group) -> None:
    add = group.add_argument
    add(
        "--model",
        type=command.filled,
        help=f"the concept's file, always needed: {', '.join(contract.names())}",
    )
    add("--size", help="a size in the model's file, see `python gpt.py` (default: the task's, or the first)")
    add(
        "--task",
        help="what the model is trained to do, a file's name such as masking or instruct (default: its own)",
    )
    add(
        "--adapter",
        metavar="NAME",
        help="freeze the model in --init-from and train an adapter: lora, dora, ia3 ... (`python lora.py`)",
    )
    add(
        "--train",
        default="all",
        metavar="WHAT",
        help="which weights learn without an adapter: all, head, or last:N blocks (default all)",
    )
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="other values for fields of the Config of model, task or adapter, as n_layers=6 mask_rate=0.3",
    )
    for name, text in SHORT.items():
        add(f"--{name}", type=command.filled, metavar="VALUE", help=f"{text}; short for --set {name}=VALUE")
    add("--init-from", type=command.filled, metavar="DIR", help="start from this checkpoint, or this adapter")
    add(
        "--base",
        type=command.filled,
        metavar="DIR",
        help="--model lora --base DIR is short for the model in DIR with an adapter",
    )
    add("--document-mask", action="store_true", help="keep attention inside each document")


def add_data(group) -> None:
    from data.corpus import PUBLIC

    add = group.add_argument
    add(
        "--data",
        type=command.filled,
        metavar="WHAT",
        help="stdlib (this Python's own source text, the default of most tasks), a file, folder or glob of "
        ".txt .md .py .jsonl .json .csv .tsv .parquet, also .gz, a URL, or one of: "
        f"{', '.join(PUBLIC)}; for --task instruct conversations: stdlib (questions about it), or a file of "
        "records, see data/conversations.py; for dpo and reward preferences, see data/preferences.py; for "
        "vit, mae and igpt images: glyphs, or a folder, see data/images.py; for clip images with captions: "
        "glyphs, scenes, or a file, see data/captions.py; for llava conversations about images: scenes, or a "
        "file with --images FOLDER; for spectrogram sounds: notes, or a folder, see data/sounds.py",
    )
    add(
        "--val",
        type=command.filled,
        metavar="WHAT",
        help="held-out text, conversations, images or sounds, as for --data (default: a share of --data)",
    )
    add(
        "--text-field",
        default="text",
        metavar="NAME",
        help="the field that holds the text in .jsonl, .json, .csv, .tsv, .parquet (default %(default)s)",
    )
    add(
        "--tokenizer",
        type=command.filled,
        metavar="WHAT",
        help="bpe:N learns N tokens from the corpus, bytes, a tiktoken encoding such as gpt2, or a directory "
        "with tokenizer.json (default bpe:4096, or the tokenizer in --init-from or --base)",
    )
    add(
        "--bad-text",
        choices=("refuse", "skip"),
        default="refuse",
        help="what to do with a file or record that is no text, or no image (default refuse)",
    )


def add_how(group) -> None:
    add = group.add_argument
    add("--steps", type=int, help="optimizer updates (default: five minutes of the tiny size)")
    add(
        "--batch-size",
        type=int,
        metavar="ROWS",
        help="sequences or images per batch, of all processes together (default: 8 sequences, 128 images)",
    )
    add("--grad-accum", type=int, default=1, metavar="N", help="batches that one update adds up (default 1)")
    add(
        "--seq-len",
        type=int,
        metavar="T",
        help="tokens of a sequence (default: the longest that the model reads)",
    )
    add_optimizer(add)
    add("--lr", type=float, help="peak learning rate (default: by the model's size)")
    add(
        "--mup",
        type=int,
        metavar="WIDTH",
        help="--lr was found for this d_model, all else in proportion: transfer it (muP, engine/optim.py)",
    )
    add(
        "--warmup",
        type=int,
        metavar="STEPS",
        help="updates up to the peak learning rate (default: a twentieth of --steps, at most 1000)",
    )
    add(
        "--schedule",
        choices=("cosine", "wsd", "constant"),
        help="the learning rate after warm-up: a cosine, first constant (wsd), or constant (default cosine)",
    )
    add(
        "--weight-decay",
        type=float,
        default=0.1,
        help="share of a matrix that one update subtracts, times the learning rate (default %(default)s)",
    )
    add(
        "--ema",
        type=float,
        metavar="DECAY",
        help="evaluate and save an exponential moving average of the weights, of which an update keeps this "
        "share, as 0.999; 0: the weights themselves (default: the task's, most have 0)",
    )
    add("--grad-clip", type=float, default=1.0, help="largest gradient norm, 0 for none (default 1)")
    add("--seed", type=int, default=0, help="start of all random numbers (default 0)")


def add_optimizer(add: Callable) -> None:
    add(
        "--optimizer",
        choices=("adamw", "muon", "sam"),
        help="AdamW, or Muon for the matrices and AdamW for the rest (default: muon for images, else adamw); "
        f"sam is short for --optimizer adamw --sam-rho {optim.SAM_RHO}",
    )
    add(
        "--sam-rho",
        type=float,
        metavar="RADIUS",
        help="step by the gradient at the worst point within this distance of the weights, in two passes "
        f"(SAM, engine/optim.py); 0: at the weights (default 0, with --optimizer sam {optim.SAM_RHO})",
    )


def add_where(group) -> None:
    add = group.add_argument
    add(
        "--device",
        choices=("cpu", "cuda", "mps"),
        help="where the run computes (default: a GPU if there is one)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of products; weights stay in float32 (default: bfloat16 on a GPU, else float32)",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the model by torch.compile (default: on a GPU only)",
    )
    add(
        "--kernels",
        choices=("auto", "triton", "torch", "reference"),
        default="auto",
        help="which code of kernels/ runs, see kernels/backend.py (default auto: the fastest)",
    )
    add(
        "--parallel",
        choices=("none", "ddp", "fsdp"),
        default="none",
        help="how the processes of torchrun share the model: each has all of it (ddp), or a shard "
        "(fsdp); see engine/parallel.py (default none)",
    )
    add(
        "--checkpoint-activations",
        action="store_true",
        help="keep only the input of each block and compute the rest again: less memory, a third more work",
    )


def add_output(group) -> None:
    add = group.add_argument
    add("--out", type=command.path, metavar="DIR", help="folder of the run (default runs/MODEL)")
    add("--resume", action="store_true", help="continue from the checkpoint in --out, to the same last step")
    add(
        "--extend",
        type=int,
        metavar="STEPS",
        help="continue the finished run in --out by so many steps, with a second warm-up and schedule",
    )
    add("--keep-best", action="store_true", help="keep the model of the lowest validation loss in best/ too")
    add("--keep-models", type=int, metavar="N", help="keep the models of the last N saves in models/ too")
    add("--patience", type=int, metavar="N", help="stop after N evaluations in a row without a lower loss")
    add(
        "--eval-every",
        type=int,
        metavar="STEPS",
        help="updates from one evaluation to the next (default: an eighth of the run)",
    )
    add(
        "--save-every",
        type=int,
        metavar="STEPS",
        help="updates from one checkpoint to the next (default: as --eval-every)",
    )
    add(
        "--log-every",
        type=int,
        metavar="STEPS",
        default=10,
        help="updates from one logged row to the next (default %(default)s)",
    )
    add(
        "--cache",
        type=command.path,
        metavar="DIR",
        default=Path("cache"),
        help="folder for tokenised text and decoded images (default cache)",
    )
    add("--watch", nargs="+", default=[], metavar="WHERE", help="curves also in: tensorboard, wandb")


def add_measurements(group) -> None:
    add = group.add_argument
    add(
        "--dry-run",
        type=int,
        nargs="?",
        const=1,
        metavar="N",
        help="how much memory each of N GPUs (default 1) needs; none has to be here (see engine/memory.py)",
    )
    add("--benchmark", action="store_true", help="time 50 steps: tokens per second, MFU, memory, time lost")
    add("--profile", action="store_true", help="some steps traced, and what costs the most in them")
    add("--compare", type=command.path, nargs="+", metavar="DIR", help="draw runs over each other, and stop")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for a flag whose value makes no sense, alone or beside the others."""
    positive = "steps batch_size grad_accum seq_len eval_every save_every log_every mup dry_run "
    positive += "extend keep_models patience"
    for flag in positive.split():
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: expected at least 1")
    for flag in ("lr", "warmup", "weight_decay", "grad_clip", "sam_rho", "seed"):
        value = getattr(args, flag)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: expected at least 0, and a finite number")
    if args.seed >= 1 << 31:  # 32 bits of a batch's seed count the batches
        raise ValueError(f"--seed {args.seed}: expected less than {1 << 31}")
    if args.cache.is_file():
        raise ValueError(f"--cache {args.cache}: a file; expected a folder, or the name of a new one")
    if args.ema is not None and not 0 <= args.ema < 1:
        raise ValueError(f"--ema {args.ema}: expected 0, for none, or less than 1, such as 0.999")
    if args.mup and args.lr is None:
        raise ValueError(f"--mup {args.mup}: needs --lr, the learning rate that was found at this width")
    if args.init_from and (args.size or args.base):
        given = f"--size {args.size}" if args.size else f"--base {args.base}"
        raise ValueError(f"{given} and --init-from cannot go together: the checkpoint decides this")
    part, _ = trainable.parse(args.train)
    if part != "all" and args.adapter:
        raise ValueError(f"--train {args.train} and --adapter {args.adapter}: expected one of them")
    if args.dry_run and args.device in ("cpu", "mps"):  # whose kernels keep other tensors
        given = f"--device {args.device}"
        raise ValueError(f"{given}: --dry-run plans the memory of GPUs and needs none here; leave it out")
    if args.extend and args.steps:
        raise ValueError(f"--extend {args.extend} and --steps {args.steps}: expected one of them")
    watch.check(args.watch)


def fill_defaults(args: argparse.Namespace, concept: contract.Concept) -> None:
    """Fill in the flags whose defaults depend on what is trained. ValueError for one that does not fit."""
    if concept.task.train is not None and (args.benchmark or args.profile):
        flag = "--benchmark" if args.benchmark else "--profile"
        raise ValueError(f"{flag}: {concept.task.name} has a loop of its own, which it does not time")
    if concept.task.train is not None and args.ema:
        raise ValueError(f"--ema: {concept.task.name} has a loop of its own, which averages no weights")
    if concept.task.train is not None and (args.sam_rho or args.optimizer == "sam"):
        flag = "--sam-rho" if args.sam_rho else "--optimizer sam"
        raise ValueError(f"{flag}: {concept.task.name} has a loop of its own, which makes one pass")
    if args.size is None and not (args.init_from or args.base):
        sizes = concept.model_file.SIZES
        args.size = concept.task.SIZE if concept.task.SIZE in sizes else next(iter(sizes))
    args.steps = args.steps or (concept.adapter or concept.task).STEPS
    if args.sam_rho is None:
        args.sam_rho = optim.SAM_RHO if args.optimizer == "sam" else 0.0
    args.optimizer = "adamw" if args.optimizer == "sam" else args.optimizer or concept.task.OPTIMIZER
    args.batch_size = args.batch_size or concept.task.BATCH_SIZE
    args.ema = concept.task.EMA if args.ema is None else args.ema
    n = parallel.world_size()
    if args.batch_size % n:
        raise ValueError(f"--batch-size {args.batch_size}: expected a multiple of the {n} processes")
    args.schedule = args.schedule or (None if args.extend else "cosine")  # see checkpoint.continue_schedule
    args.schedule_from = 0  # the step at which the schedule of the learning rate begins
    args.tokenizer = args.tokenizer or concept.base or args.init_from or "bpe:4096"


def fill_intervals(args: argparse.Namespace) -> None:
    """Fill in the flags whose defaults depend on the number of steps."""
    n = args.steps - args.schedule_from
    args.eval_every = args.eval_every or math.ceil(n / 8)
    args.save_every = args.save_every or args.eval_every
    if args.warmup is None:
        args.warmup = min(1000, n // 20)
