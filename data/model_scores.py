"""Scores of documents by language models: perplexity, and the answer to Ask-LLM's question.

    perplexity(x) = exp(-mean_i log p(x_i | x_<i))
    Ask-LLM(x) = p("yes" | PROMPT with x)

Under a model that was trained on good text, the perplexity of similar text is low, and that of noise is high
(CCNet, Wenzek et al. 2019, arXiv:1911.00359; there the model is of 5-grams of Wikipedia). It is low too for
text that repeats itself. So keep the documents of low or middle perplexity (`head`, `middle` of
data/selection.py), and read some from both ends.

Ask-LLM (Sachdeva et al. 2024, arXiv:2402.09668, section 3.1 and figure 3) puts the text x into a PROMPT,
which asks whether x is worth training on. The score is the probability that the answer begins with the first
token of "yes", out of the whole vocabulary. The paper's models are Flan-T5 of 60M to 11B parameters; a model
that has not learned to follow instructions cannot be expected to answer the question.

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
TOKENS_PER_PASS = 4096  # in the windows of a document that pass through a decoder as one batch


@lru_cache(1)
def judge_in(directory: Path) -> tuple[nn.Module, Any]:
    """Return the model in a directory, on the GPU if there is one, and its tokenizer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return open_model(directory).to(device).eval(), get_tokenizer(str(directory))


def is_decoder(model: nn.Module) -> bool:
    """Return whether a model has the cache of a decoder that generates text."""
    return hasattr(model, "new_cache")


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether a model reads a text and writes an answer, as T5 does."""
    return hasattr(model, "encode") and hasattr(model, "decode")


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters."""
    return next(model.parameters()).device


@torch.no_grad()
def perplexity(model: nn.Module, tokenizer: Any, text: str) -> float:
    """Return the perplexity of a text per token under a decoder; NaN for a text without tokens.

    The text is cut into windows of max_seq_len tokens. The first begins with the tokens that the tokenizer
    puts in front of a text, or else with the one that separates documents, as in training, and each further
    one with the last token of the window before. So each token is predicted once, from those before it in its
    window. Values above e^700 are returned as e^700.
    """
    # Whole windows make batches, and the rest is one of its own.
    begin = tokenizer.begin_ids or [tokenizer.eot_id]
    tokens = torch.tensor([*begin, *tokenizer.encode(text)], device=device_of(model))
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
    """Return the first token of an answer that follows the prompt, which ends with a line break."""
    before = tokenizer.encode(PROMPT)
    both = tokenizer.encode(PROMPT + answer)
    if both[: len(before)] == before and len(both) > len(before):
        return both[len(before)]
    return tokenizer.encode(answer)[0]  # of a tokenizer that adds an end token, or drops line breaks


def ask_tokens(tokenizer: Any, text: str, room: int) -> list[int]:
    """Return the tokens of the prompt with a text, which is cut at its end so that there are at most `room`.

    Raises ValueError if the prompt alone does not fit.
    """
    # Try fewer and fewer tokens of the text: next to the prompt it may be encoded by more tokens than alone.
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
    """Return the probability that the first token of a model's answer to the PROMPT with a text is that of
    "yes".

    The prompt begins with the tokens that the tokenizer puts in front of any text, such as Llama's <s>. A
    text that is too long is cut at its end. Raises ValueError if the prompt alone is too long.
    """
    yes, begin = answer_token(tokenizer), tokenizer.begin_ids
    prompt = ask_tokens(tokenizer, text, model.config.max_seq_len - len(begin))
    tokens = torch.tensor([[*begin, *prompt]], device=device_of(model))
    return first_probabilities(model, tokens)[yes].item()


def first_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the probabilities (V,), float64, of the next token of a decoder after tokens (1, T), or of the
    first token that an encoder-decoder writes after reading them."""
    if is_encoder_decoder(model):
        end = tokens.new_tensor([[model.config.eos_token_id]])
        inputs = tokens if tokens[0, -1] == end else torch.cat((tokens, end), 1)
        return model(inputs, end)[0, 0].double().softmax(0)  # the first target does not depend on targets
    return model(tokens)[0, -1].double().softmax(0)


def check(directory: Path, what: str) -> None:
    """Raise ValueError unless a directory holds a model that can give a score: "perplexity" or "ask_llm"."""
    model, tokenizer = judge_in(directory)
    allowed = is_decoder(model) or (what == "ask_llm" and is_encoder_decoder(model))
    if not allowed:
        kinds = "a decoder" if what == "perplexity" else "a decoder or an encoder-decoder"
        raise ValueError(f"--stage {what}={directory}: expected {kinds}, found {type(model).__name__}")
    if what == "ask_llm":
        ask_tokens(tokenizer, "", model.config.max_seq_len - len(tokenizer.begin_ids))


def scores(what: str, directory: Path, texts: Iterable[str]) -> Iterator[float]:
    """Yield the score of each text by the model in a directory. what: "perplexity" or "ask_llm"."""
    model, tokenizer = judge_in(directory)
    score = {"perplexity": perplexity, "ask_llm": ask}[what]
    for text in texts:
        yield score(model, tokenizer, text)
