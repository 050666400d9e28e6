"""Talk to an instruction-tuned model at the terminal, as `python lora.py runs/lora --chat` does."""

from argparse import Namespace

import torch

import gpt
from data.tokenizer import Tokenizer
from posttraining import instruct


def answer(model: gpt.GPT, tokenizer: Tokenizer, messages: list[dict], args: Namespace) -> str:
    """Print the answer that follows the messages (see posttraining/instruct.py) as it comes, and return it.

    args: max_new_tokens, temperature, top_p and seed, as lora.py's flags.
    """
    prompt = instruct.prompt_tokens(messages, tokenizer)
    stop = instruct.end_id(tokenizer)
    options = {"temperature": args.temperature, "top_p": args.top_p, "stop": stop}
    generator = torch.Generator(model.model.norm.weight.device).manual_seed(args.seed)
    steps = model.stream([prompt], args.max_new_tokens, generator=generator, **options)
    return gpt.print_as_it_comes(steps, tokenizer, stop)


def begin(args: Namespace) -> list[dict]:
    """What stands before all questions: args.system, if there is one."""
    return [{"role": "system", "content": args.system}] if args.system else []


def talk(model: gpt.GPT, tokenizer: Tokenizer, args: Namespace) -> None:
    """Question and answer in turns, until the end of input. The oldest turns are forgotten once all of them
    and an answer are more than the model reads."""
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
        while len(turns) > 1 and len(instruct.prompt_tokens(begin(args) + turns, tokenizer)) > room:
            turns = turns[2:]
        try:
            said = answer(model, tokenizer, begin(args) + turns, args)
        except ValueError as error:  # a question that is too long by itself
            print(f"error: {error}")
            turns.pop()
            continue
        turns.append({"role": "assistant", "content": said})
