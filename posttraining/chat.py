"""Talk to an instruction-tuned model at the terminal, as `python lora.py runs/lora --chat` does.

With `--image FILE` a model that reads images (vision/llava.py) answers about an image, which stands in front
of the first question: `python lora.py runs/llava --chat --image photo.png`.
"""

from argparse import Namespace
from collections import Counter

import torch
from torch import Tensor, nn

from data.images import decode
from data.tokenizer import Tokenizer
from formats.chat_template import IMAGE, end_id, prompt_tokens
from generate import end_tokens, print_stream


def look_at(model: nn.Module, args: Namespace) -> Tensor | None:
    """Return the image args.image (1, C, H, W) as the model reads it; None without one.

    Raises ValueError for a model that reads no images, and for a file that is no image.
    """
    if args.image is None:
        return None
    if not hasattr(model.config, "image_tokens"):
        raise ValueError(f"--image {args.image}: this model reads text alone; leave out --image")
    vision = model.config.vision
    shape = (vision.n_channels, vision.image_size, vision.image_size)
    pixels = torch.from_numpy(decode(args.image, shape, Counter(), border=True))[None].float() / 255
    return model.normalized(pixels.to(next(model.parameters()).device))


def tokens_of(
    messages: list[dict], model: nn.Module, tokenizer: Tokenizer, image: Tensor | None
) -> list[int]:
    """Return the tokens in front of the answer to messages, with those of the image, if any, in front of the
    first question."""
    if image is None:
        return prompt_tokens(messages, tokenizer)
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    question = messages[first] | {"content": f"{IMAGE}\n{messages[first]['content']}"}
    messages = [*messages[:first], question, *messages[first + 1 :]]
    return prompt_tokens(messages, tokenizer, model.config.image_tokens)


def answer(
    model: nn.Module,
    tokenizer: Tokenizer,
    messages: list[dict],
    args: Namespace,
    image: Tensor | None = None,
) -> str:
    """Print the answer that follows the messages as it is generated, and return it.

    messages: as in formats/chat_template.py. args: max_new_tokens, temperature, top_p and seed, flags of
    lora.py. image: from `look_at`.
    """
    prompt = tokens_of(messages, model, tokenizer, image)
    stop = [end_id(tokenizer), *end_tokens(model, tokenizer)]
    options = {"temperature": args.temperature, "top_p": args.top_p, "stop": stop}
    options |= {} if image is None else {"images": image}
    generator = torch.Generator(next(model.parameters()).device).manual_seed(args.seed)
    steps = model.stream([prompt], args.max_new_tokens, generator=generator, **options)
    return print_stream(steps, tokenizer, stop)


def begin(args: Namespace) -> list[dict]:
    """Return the messages before all questions: the system's message args.system, if there is one."""
    return [{"role": "system", "content": args.system}] if args.system else []


def talk(model: nn.Module, tokenizer: Tokenizer, args: Namespace) -> None:
    """Read a question and print its answer, in turns, until the end of input.

    The oldest turns are dropped when all of them and an answer would be longer than the model reads.
    """
    image = look_at(model, args)
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
        while len(turns) > 1 and len(tokens_of(begin(args) + turns, model, tokenizer, image)) > room:
            turns = turns[2:]
        try:
            reply = answer(model, tokenizer, begin(args) + turns, args, image)
        except ValueError as error:  # a question that is too long by itself
            print(f"error: {error}")
            turns.pop()
            continue
        turns.append({"role": "assistant", "content": reply})
