"""Scores of documents by language models: perplexity, and the answer to the question of Ask-LLM.

    perplexity(x) = exp(-mean_i log p(x_i | x_<i))
    Ask-LLM(x) = p("yes" | PROMPT with x)

Perplexity under a model of good text is low for text that is like it, and low too for text that repeats
itself; it is high for noise (CCNet, Wenzek et al. 2019, arXiv:1911.00359, with 5-grams of Wikipedia as the
model). So keep the head or the middle, and look at what is in both tails.

Ask-LLM (Sachdeva et al. 2024, arXiv:2402.09668, section 3.1 and figure 3) asks an instruction-tuned model
whether the text is worth training on, and takes the probability of the first token of "yes", over the whole
vocabulary. The paper's judges are Flan-T5 of 60M to 11B parameters. A small model that has not learned to
follow instructions answers this question no better than chance.

A model is any directory that formats/open_model.py opens: a decoder, or for Ask-LLM also an
encoder-decoder."""

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.tokenizer import get_tokenizer
from formats.open_model import open_model

PROMPT = """###
{}
###

Does the previous paragraph demarcated within ### and ### contain informative signal for pre-training \
a large-language model? An informative datapoint should be well-formatted, contain some usable knowledge of \
the world, and strictly NOT have any harmful, racist, sexist, etc. content.

OPTIONS:
- yes
- no
"""
ANSWER = "yes"
TOKENS_PER_PASS = 4096  # of the windows of one document that go through a decoder together


@lru_cache(1)
def judge_in(directory: Path) -> tuple[nn.Module, Any]:
    """Return the model in a directory, on the GPU if there is one, and its tokenizer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return open_model(directory).to(device).eval(), get_tokenizer(str(directory))


def is_decoder(model: nn.Module) -> bool:
    return hasattr(model, "new_cache")


def is_encoder_decoder(model: nn.Module) -> bool:
    return hasattr(model, "encode") and hasattr(model, "decode")


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def perplexity(model: nn.Module, tokenizer: Any, text: str) -> float:
    """Return the perplexity of a text per token under a decoder; NaN for a text without tokens.

    The text is read in windows of max_seq_len tokens side by side, the first of which begins with the token
    that separates documents, as in training. Each token is predicted once, from those
    before it in its window.
    """
    tokens = torch.tensor([tokenizer.eot_id, *tokenizer.encode(text)], device=device_of(model))
    n, T = len(tokens) - 1, model.config.max_seq_len
    if n == 0:
        return math.nan
    whole = [tokens[start : start + T + 1] for start in range(0, n - T + 1, T)]
    rest = tokens[len(whole) * T :]
    at_once = max(1, TOKENS_PER_PASS // T)
    passes = [torch.stack(whole[i : i + at_once]) for i in range(0, len(whole), at_once)]
    passes += [rest[None]] if len(rest) > 1 else []
    total = 0.0
    for windows in passes:  # (B, T + 1)
        logits = model(windows[:, :-1]).flatten(0, 1).double()
        total += F.cross_entropy(logits, windows[:, 1:].flatten(), reduction="sum").item()
    return math.exp(min(total / n, 700))


def answer_token(tokenizer: Any, answer: str = ANSWER) -> int:
    """Return the first token of an answer behind the prompt, which ends with a line break."""
    before = tokenizer.encode(PROMPT)
    both = tokenizer.encode(PROMPT + answer)
    if both[: len(before)] == before and len(both) > len(before):
        return both[len(before)]
    return tokenizer.encode(answer)[0]  # a tokenizer that adds an end, or knows no line breaks


def ask_tokens(tokenizer: Any, text: str, room: int) -> list[int]:
    """Return the tokens of the prompt with a text, of which as much is there as `room` tokens hold.

    Raises ValueError if the prompt alone does not fit.
    """
    # Find how much of the text fits: tokens at its end may merge with those of the prompt.
    tokens = tokenizer.encode(PROMPT.format(text))
    if len(tokens) <= room:
        return tokens
    frame = len(tokenizer.encode(PROMPT.format("")))
    ids = tokenizer.encode(text)
    for n in range(min(len(ids), room - frame), -1, -1):
        tokens = tokenizer.encode(PROMPT.format(tokenizer.decode(ids[:n])))
        if len(tokens) <= room:
            return tokens
    raise ValueError(
        f"Ask-LLM: the prompt alone has {frame} tokens, the model reads {room}; name a judge that reads more"
    )


@torch.no_grad()
def ask(model: nn.Module, tokenizer: Any, text: str) -> float:
    """Return the probability that a model's answer to Ask-LLM's question about a text begins with "yes".

    A text that is too long is cut at its end. Raises ValueError if the prompt alone is too long.
    """
    yes = answer_token(tokenizer)
    tokens = torch.tensor([ask_tokens(tokenizer, text, model.config.max_seq_len)], device=device_of(model))
    return first_probabilities(model, tokens)[yes].item()


def first_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return (V,) float64, the probabilities of the token that follows tokens (1, T), or answers them."""
    if is_encoder_decoder(model):
        end = tokens.new_tensor([[model.config.eos_token_id]])
        inputs = tokens if tokens[0, -1] == end else torch.cat((tokens, end), 1)
        return model(inputs, end)[0, 0].double().softmax(0)  # the first target is predicted from none
    return model(tokens)[0, -1].double().softmax(0)


def check(directory: Path, what: str) -> None:
    """Raise ValueError unless a directory holds a model that can give a score: "perplexity" or "ask_llm"."""
    model, tokenizer = judge_in(directory)
    allowed = is_decoder(model) or (what == "ask_llm" and is_encoder_decoder(model))
    if not allowed:
        kinds = "a decoder" if what == "perplexity" else "a decoder or an encoder-decoder"
        raise ValueError(f"--stage {what}={directory}: expected {kinds}, found {type(model).__name__}")
    if what == "ask_llm":
        ask_tokens(tokenizer, "", model.config.max_seq_len)


def scores(what: str, directory: Path, texts: Iterable[str]) -> Iterator[float]:
    """Yield the score of each text by the model in a directory. what: "perplexity" or "ask_llm"."""
    model, tokenizer = judge_in(directory)
    score = {"perplexity": perplexity, "ask_llm": ask}[what]
    for text in texts:
        yield score(model, tokenizer, text)
