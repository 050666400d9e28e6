"""Talk to an instruction-tuned model at the terminal, as `python lora.py runs/lora --chat` does."""

from argparse import Namespace

import torch
from torch import nn

from data.tokenizer import Tokenizer
from formats.chat_template import end_id, prompt_tokens
from generate import end_tokens, print_stream


def answer(model: nn.Module, tokenizer: Tokenizer, messages: list[dict], args: Namespace) -> str:
    """Print the answer that follows the messages as it is generated, and return it.

    messages: as in formats/chat_template.py. args: max_new_tokens, temperature, top_p and seed, flags of
    lora.py.
    """
    prompt, stop = prompt_tokens(messages, tokenizer), [end_id(tokenizer), *end_tokens(model, tokenizer)]
    options = {"temperature": args.temperature, "top_p": args.top_p, "stop": stop}
    generator = torch.Generator(model.model.norm.weight.device).manual_seed(args.seed)
    steps = model.stream([prompt], args.max_new_tokens, generator=generator, **options)
    return print_stream(steps, tokenizer, stop)


def begin(args: Namespace) -> list[dict]:
    """Return the messages before all questions: the system's message args.system, if there is one."""
    return [{"role": "system", "content": args.system}] if args.system else []


def talk(model: nn.Module, tokenizer: Tokenizer, args: Namespace) -> None:
    """Question and answer in turns, until the end of input.

    The oldest turns are dropped when all of them and an answer would be longer than the model reads.
    """
    print("Ask something; an empty line starts anew, Ctrl-D ends.")
    turns = []
    while True:
        try:
            question = input("> ")
        except EOFError:
            print()
            return
        if not question.strip():
            turns = []
            continue
        turns.append({"role": "user", "content": question})
        room = model.config.max_seq_len - args.max_new_tokens
        while len(turns) > 1 and len(prompt_tokens(begin(args) + turns, tokenizer)) > room:
            turns = turns[2:]
        try:
            reply = answer(model, tokenizer, begin(args) + turns, args)
        except ValueError as error:  # a question that is too long by itself
            print(f"error: {error}")
            turns.pop()
            continue
        turns.append({"role": "assistant", "content": reply})
