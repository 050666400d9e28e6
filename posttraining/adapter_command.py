"""The command line of lora.py: talk to an adapted model, or merge its adapter into the weights.

    python lora.py runs/lora --chat                             talk to it
    python lora.py runs/lora --prompt "What does os.walk do?"   one answer
    python lora.py runs/lora --merge runs/merged                one ordinary model of base and adapter

The adapter may be one that PEFT has saved. --chat and --prompt also take a model that was trained without
one.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from data.tokenizer import Tokenizer, get_tokenizer
from data.wordpiece import WordPiece
from formats import chat_template, command, open_model
from posttraining import chat
from posttraining.merging import merge

CONFIGS = ("adapter_config.json", "config.json")  # of an adapter, and of a model


def open_adapted(directory: Path, base: str | None) -> tuple[nn.Module, Tokenizer | WordPiece]:
    """Return the model and the tokenizer of a run or of its model/: a base with its adapter, or a model that
    was trained without one. They are in full precision, on the GPU if there is one.

    base: the directory of the base, if it is not the one that the adapter names.
    """
    directory = directory / "model" if (directory / "model").is_dir() else directory
    if not any((directory / file).exists() for file in CONFIGS):
        expected = "expected a run of train.py or a directory with an adapter"
        raise ValueError(f"{directory}: has no adapter_config.json or config.json; {expected}")
    model = open_model.open_model(directory, base=base).float()
    if open_model.is_adapter(directory) and not (directory / "tokenizer.json").exists():
        directory = open_model.base_of(directory, base)  # PEFT saves no tokenizer with an adapter
    tokenizer = get_tokenizer(str(directory))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def is_encoder(tokenizer: Tokenizer | WordPiece) -> bool:
    """Return True for the tokenizer of an encoder, which has a mask token."""
    return "mask_token" in tokenizer.roles


def merge_into(directory: Path, model: nn.Module, tokenizer: Tokenizer | WordPiece) -> None:
    """Write base and adapter as one ordinary model, with its tokenizer and a decoder's chat template.

    Raises ValueError if there is a model or an adapter in directory, or if the model has no adapter.
    """
    if any((directory / file).exists() for file in CONFIGS):
        raise ValueError(f"--merge {directory}: there is a model in it; name another directory")
    merge(model)
    model.save_pretrained(directory)
    tokenizer.save(directory)
    if not is_encoder(tokenizer):
        chat_template.save_chat_template(tokenizer, directory)


def main(argv: list[str]) -> int:
    """Run the command line `argv`, and return the exit code."""
    parser = command.Parser(
        prog="lora.py", description="Ask an adapted model, or merge it; without arguments, list the methods."
    )
    add = parser.add_argument
    add("adapter", type=command.path, help="a run such as runs/lora, or a directory with an adapter")
    add(
        "--base",
        type=command.filled,
        metavar="DIR",
        help="the model that it adapts (default: the one that the adapter names)",
    )
    add("--chat", action="store_true", help="talk to it")
    add("--prompt", help="ask one question")
    add("--merge", type=command.path, metavar="DIR", help="write base and adapter as one ordinary model")
    add(
        "--image",
        type=command.path,
        help="an image to ask about, for a model that reads images (default: none)",
    )
    add("--system", help="a system message, which comes before all questions")
    add("--max-new-tokens", type=int, default=100, help="longest answer, in tokens (default %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default 0)")
    add(
        "--top-p",
        type=float,
        default=0.95,
        help="draw only from the likeliest tokens of this joint probability (default %(default)s)",
    )
    add("--seed", type=int, default=0, help="start of the random draws (default 0)")
    args = parser.parse_args(argv)
    return command.exit_code(lambda: do(args))


def do(args: argparse.Namespace) -> None:
    """Merge the adapter, chat, or answer one question."""
    if [args.chat, args.prompt is not None, args.merge is not None].count(True) != 1:
        raise ValueError(f"{args.adapter}: give one of --chat, --prompt and --merge, and only one")
    model, tokenizer = open_adapted(args.adapter, args.base)
    if args.merge is not None:
        merge_into(args.merge, model, tokenizer)
        print(f"model: {args.merge}")
    elif is_encoder(tokenizer):
        raise ValueError(f"{args.adapter}: an encoder gives no answers; --merge it and use bert.py")
    elif not hasattr(model, "stream"):
        kind = type(model).__name__
        raise ValueError(f"{args.adapter}: a {kind} gives no answers; expected a model that writes text")
    elif args.chat:
        chat.talk(model, tokenizer, args)
    else:
        question = {"role": "user", "content": args.prompt}
        chat.answer(model, tokenizer, [*chat.begin(args), question], args, chat.look_at(model, args))
