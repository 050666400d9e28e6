"""Generation: draw one token after another from a language model.

    x_t ~ p(. | x_1 ... x_{t-1}),    p = softmax(logits / temperature), cut down to its likely part

The prompts pass through the model once and fill its cache of keys and values; each further token then costs a
pass over that token alone. It works with any model that has `new_cache(lengths, max_len, static)`,
`hidden(tokens, cache=)` and `logits(hidden)`, as in gpt.py.

Ways to cut: top-k (Fan et al. 2018), top-p or nucleus (Holtzman et al. 2020), min-p (Nguyen et al. 2024);
repetition penalty (Keskar et al. 2019, section 4.1).

    python generate.py runs/gpt/model --prompt "def "     any decoder: GPT, mixture of experts, adapted

Shapes: B rows, T tokens, S slots of the cache, G key/value heads, K head width, V vocabulary.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from formats import command
from formats.command import print_sizes
from kernels import few_rows


def likely(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Return the probabilities (B, V) of logits (B, V), temperature > 0, after the cuts k, p and min-p."""
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(dim=-1)
        # Drop a token if those before it already reach top_p; the first is always kept.
        beyond = p.cumsum(dim=-1) - p >= top_p
        logits = logits.masked_fill(beyond.scatter(1, index, beyond), -torch.inf)
    if min_p is not None:
        p = logits.softmax(dim=-1)
        logits = logits.masked_fill(p < min_p * p.amax(dim=-1, keepdim=True), -torch.inf)
    return logits.softmax(dim=-1)


def sample(logits: Tensor, temperature: float, generator: torch.Generator | None = None, **cuts) -> Tensor:
    """Draw one token per row, int64 (B, 1), from logits (B, V); cuts: arguments of `likely`.

    A temperature so small that logits would overflow takes the likeliest token, as 0 does. Raises ValueError
    for logits that are not finite.
    """
    check_finite(logits)
    if temperature < 1e-30:
        return logits.argmax(dim=-1, keepdim=True)
    return few_rows.draw(likely(logits, temperature, **cuts), generator)


def check_finite(logits: Tensor) -> None:
    """Raise ValueError for logits that are not finite."""
    if not torch.stack(logits.aminmax()).isfinite().all():
        raise ValueError("generate: the model's logits are not finite; its weights may be damaged")


class KVCache:
    """Keys and values of the tokens so far, so that each new token costs one step instead of a whole pass.

    Preallocated as (B, S, G, K) per layer. One pass over the prompts fills it; each later pass adds one
    token. A layer with a window keeps only what the window can see: position p is in slot p mod S, a ring
    buffer (Mistral 7B, Jiang et al. 2023, section 2), which attention may read in any order because keys
    carry their position in themselves. Rows may differ in length: a row's keys fill its slots from the left.
    """

    def __init__(self, config, lengths: list[int], max_len: int, like: Tensor):
        """Allocate a cache.

        config: of a model, as in gpt.py; lengths: of the prompts, one per row; max_len: tokens to hold; like:
        a tensor whose device and dtype to use.
        """
        self.lengths = list(lengths)
        self.filled = False
        self.slots = [min(max_len, config.layer_window(layer) or max_len) for layer in range(config.n_layers)]
        B, G, K = len(lengths), config.G, config.K
        # The slots of one head lie behind each other, as attention reads them.
        self.keys = [like.new_zeros(B, G, S, K).transpose(1, 2) for S in self.slots]
        self.values = [like.new_zeros(B, G, S, K).transpose(1, 2) for S in self.slots]

    def positions(self, T: int, device: torch.device) -> Tensor:
        """Return the positions of the next T tokens: (1, T) for the prompts, later (B, 1) or (1, 1)."""
        if not self.filled:
            return torch.arange(T, device=device)[None]
        rows = self.lengths[:1] if self.uniform else self.lengths
        return torch.tensor(rows, device=device)[:, None]

    @property
    def uniform(self) -> bool:
        """Return whether all rows have the same length."""
        return min(self.lengths) == max(self.lengths)

    def store(self, layer: int, k: Tensor, v: Tensor, mask: dict) -> tuple[Tensor, Tensor, dict]:
        """Store a layer's new keys and values (B, T, G, K), and return those to attend to, and the mask.

        The prompts attend to themselves, under the mask given. Afterwards a token attends to all that its row
        of the cache holds, which is just what it may see.
        """
        if not self.filled:
            self.fill(layer, k, v)
            return k, v, mask
        k, v, seqlens_k = self.append(layer, k, v)
        return k, v, {"seqlens_k": seqlens_k}

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the keys and values (B, T, G, K) of the prompts, right-padded to T, in their dtype."""
        S = self.slots[layer]
        slot = torch.arange(S, device=k.device)
        last = torch.tensor(self.lengths, device=k.device)[:, None] - 1  # (B, 1)
        # A slot gets the latest of the positions that map to it. Below 0 it stays unused, and is never seen.
        position = slot + (last - slot).div(S, rounding_mode="floor") * S  # (B, S)
        position = position.clamp(min=0)[..., None, None].expand(-1, -1, *k.shape[2:])
        for new, stored in ((k, self.keys), (v, self.values)):
            stored[layer] = torch.gather(new, 1, position, out=stored[layer].to(new.dtype))

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store one token's (B, 1, G, K); return all keys and values, and their number where rows differ."""
        S, keys, values = self.slots[layer], self.keys[layer], self.values[layer]
        n = min(max(self.lengths) + 1, S)
        if self.uniform:
            slot = self.lengths[0] % S
            keys[:, slot], values[:, slot] = k[:, 0], v[:, 0]
            return keys[:, :n], values[:, :n], None
        lengths = torch.tensor(self.lengths, device=k.device)
        rows = torch.arange(len(self.lengths), device=k.device)
        keys[rows, lengths % S], values[rows, lengths % S] = k[:, 0], v[:, 0]
        return keys[:, :n], values[:, :n], (lengths + 1).clamp(max=S)

    def advance(self) -> None:
        """Count the tokens of a pass, to be called after each. The first pass is of the prompts."""
        if self.filled:
            self.lengths = [n + 1 for n in self.lengths]
        self.filled = True


def in_place(*tensors: Tensor) -> None:
    """Mark tensors that a compiled step changes.

    A CUDA graph copies all other inputs before each step, and could not change them.
    """
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor, guard=False)


class StaticKVCache(KVCache):
    """The same cache in shapes that never change, so that one compiled graph serves every step.

    The lengths are on the device, and each step attends to all slots, with those not yet filled masked.
    """

    def __init__(self, config, lengths: list[int], max_len: int, like: Tensor):
        super().__init__(config, lengths, max_len, like)
        self.seqlens = torch.tensor(lengths, device=like.device)
        in_place(self.seqlens)

    def positions(self, T: int, device: torch.device) -> Tensor:
        return self.seqlens[:, None] if self.filled else super().positions(T, device)

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        super().fill(layer, k, v)
        in_place(self.keys[layer], self.values[layer])

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        S, keys, values = self.slots[layer], self.keys[layer], self.values[layer]
        rows = torch.arange(k.shape[0], device=k.device)
        keys[rows, self.seqlens % S], values[rows, self.seqlens % S] = k[:, 0], v[:, 0]
        return keys, values, (self.seqlens + 1).clamp(max=S)

    def advance(self) -> None:
        if self.filled:
            self.seqlens += 1
        self.filled = True


def _check(model, prompts, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty) -> None:
    """Raise ValueError for a prompt or an option of `stream` that is out of range."""
    vocab_size = model.config.vocab_size
    if not prompts or not all(prompts):
        raise ValueError("generate: an empty prompt; start from one token at least, such as end of text")
    unknown = [token for row in prompts for token in row if not 0 <= token < vocab_size]
    if unknown:
        raise ValueError(f"generate: token {unknown[0]} in a prompt: expected 0 to {vocab_size - 1}")
    longest, context = max(map(len, prompts)), model.config.max_seq_len
    if max_new_tokens < 0 or (model.config.positions == "learned" and longest + max_new_tokens > context):
        raise ValueError(
            f"generate: {longest} prompt tokens, {max_new_tokens} new ones: the model has {context} positions"
        )
    ranges = {
        "temperature": (temperature, temperature >= 0, "at least 0"),
        "top_k": (top_k, top_k is None or top_k >= 1, "at least 1"),
        "top_p": (top_p, top_p is None or 0 < top_p <= 1, "above 0, at most 1"),
        "min_p": (min_p, min_p is None or 0 <= min_p <= 1, "from 0 to 1"),
        "repetition_penalty": (repetition_penalty, repetition_penalty > 0, "above 0"),
    }
    for name, (value, valid, expected) in ranges.items():
        if not valid:
            raise ValueError(f"generate: {name} {value}: expected {expected}")


@torch.inference_mode()
def stream(
    model: nn.Module,
    tokens: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    compile: bool | str = False,
) -> Iterator[list[int | None]]:
    """Continue the prompts: yield one token per row and step, None for a row that has ended.

    tokens: (B, T) or B lists of token ids, which may differ in length. temperature 0 takes the likeliest
    token. top_k: draw from the k likeliest. top_p: from the fewest tokens that hold this probability
    together. min_p: from those at least min_p times as likely as the likeliest. repetition_penalty: see
    `penalise`. stop: token id or ids that end a row. generator: source of the draws, on the model's device.
    compile: the step of one token is compiled at its first use, which takes a while and pays for itself over
    many tokens; a string is the mode of torch.compile, and "reduce-overhead" launches a step on a GPU as one
    CUDA graph. On a CPU matrices are copied meanwhile, each at most once, and a model of large matrices is
    not compiled, because that would be slower: see kernels/few_rows.py.

    Raises ValueError for an empty prompt, a prompt that leaves no room for max_new_tokens, and options out
    of range.
    """
    prompts = tokens.tolist() if isinstance(tokens, Tensor) else [list(row) for row in tokens]
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty)
    stops = {stop} if isinstance(stop, int) else set(stop or ())
    compile = few_rows.gains_by_compiling(model) and compile
    hidden, cache = read_prompts(model, prompts, max_new_tokens, static=bool(compile))  # (B, D)
    mode = compile if isinstance(compile, str) else None
    faster = few_rows.arrange(model, len(prompts), max_new_tokens)
    step_hidden = torch.compile(faster.hidden, mode=mode) if compile else faster.hidden
    seen = None if repetition_penalty == 1.0 else tokens_in(prompts, model.config.vocab_size, hidden.device)

    ended = [False] * len(prompts)
    for step in range(max_new_tokens):
        # Draw a token for each row.
        logits = faster.logits(hidden).float()  # (B, V)
        if seen is not None:
            logits = penalise(logits, seen, repetition_penalty)
        token = sample(logits, temperature, generator, top_k=top_k, top_p=top_p, min_p=min_p)  # (B, 1)
        if seen is not None:
            seen.scatter_(1, token, True)

        # Rows that have ended go on in the batch, unseen.
        drawn = token.flatten().tolist()
        yield [None if end else t for end, t in zip(ended, drawn, strict=True)]
        ended = [end or t in stops for end, t in zip(ended, drawn, strict=True)]
        if all(ended) or step == max_new_tokens - 1:
            return
        hidden = step_hidden(token, cache=cache)[:, 0]


def read_prompts(
    model: nn.Module, prompts: list[list[int]], max_new_tokens: int, static: bool
) -> tuple[Tensor, KVCache]:
    """Return the hidden states (B, D) of the prompts' last tokens, and the cache filled with the prompts."""
    device = next(model.parameters()).device
    lengths = [len(row) for row in prompts]
    T = max(lengths)
    # Padding on the right is never seen: a causal model looks back, and the cache has each row's length.
    padded = torch.tensor([row + row[-1:] * (T - len(row)) for row in prompts], device=device)  # (B, T)
    unit = 128 if static else 1  # few different shapes, so that few are compiled
    capacity = math.ceil((T + max_new_tokens) / unit) * unit
    cache = model.new_cache(lengths, capacity, static=static)
    hidden = model.hidden(padded, cache=cache)  # (B, T, D)
    last = torch.tensor(lengths, device=device) - 1
    return hidden[torch.arange(len(prompts), device=device), last], cache


def tokens_in(prompts: list[list[int]], vocab_size: int, device: torch.device) -> Tensor:
    """Return which tokens of the vocabulary each prompt contains: bool (B, V)."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[torch.tensor(prompt, device=device)] = True
    return seen


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits (B, V) in which those of seen tokens are divided by the penalty if positive, else
    multiplied (Keskar et al. 2019, section 4.1)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def generate(
    model: nn.Module, tokens: Tensor | Sequence[Sequence[int]], max_new_tokens: int, **options
) -> list[list[int]]:
    """Return the new tokens of each prompt, with its stop token if one was drawn; options as for `stream`."""
    new: list[list[int]] = [[] for _ in tokens]
    for step in stream(model, tokens, max_new_tokens, **options):
        for row, token in zip(new, step, strict=True):
            if token is not None:
                row.append(token)
    return new


# --- the command line of all decoders


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", nargs="?", type=command.filled, help="a model's directory; without it, the sizes")
    add("--prompt", default="", help="text to continue (default: start a new document)")
    add("--max-new-tokens", type=int, default=200, help="new tokens at most (default 200)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    add("--top-k", type=int, help="draw only from the k likeliest tokens (default: all)")
    add("--top-p", type=float, default=0.95, help="the likeliest that hold this probability (default 0.95)")
    add("--min-p", type=float, help="only from tokens at least this fraction as likely as the best")
    add("--repetition-penalty", type=float, default=1.0, help="divides logits of seen tokens (default 1)")
    add("--seed", type=int, default=0, help="start of the random draws (default 0)")
    add("--compile", action="store_true", help="compile the step of one token: slow at first, then faster")


def continue_text(model: nn.Module, args: argparse.Namespace) -> None:
    """Print the prompt and its continuation by the model in args.checkpoint, as it is generated, and on
    stderr the number of tokens per second."""
    from data.tokenizer import get_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = model.to(device).eval(), get_tokenizer(args.checkpoint)
    tokens = [*tokenizer.begin_ids, *tokenizer.encode(args.prompt)] or [tokenizer.eot_id]
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    options = {name: getattr(args, name) for name in names} | {"compile": args.compile}
    generator, stop = torch.Generator(device).manual_seed(args.seed), end_tokens(model, tokenizer)
    print(args.prompt, end="", flush=True)
    steps = model.stream([tokens], args.max_new_tokens, stop=stop, generator=generator, **options)
    began, taken = time.perf_counter(), []
    print_stream((taken.append(step) or step for step in steps), tokenizer, stop, tokens)
    rate = len(taken) / (time.perf_counter() - began)
    print(f"{len(taken)} tokens, {rate:.0f} tokens/s with the prompt", file=sys.stderr)


def end_tokens(model: nn.Module, tokenizer) -> list[int]:
    """Return the ids that end a text: those of the model's config, and the tokenizer's end of text."""
    ids = model.config.eos_token_id
    return [*(ids if isinstance(ids, tuple) else [] if ids is None else [ids]), tokenizer.eot_id]


def print_stream(steps: Iterator[list[int]], tokenizer, stop: Sequence[int], before=()) -> str:
    """Print the text that steps, from `stream`, add to one row of the tokens `before`, and return it."""
    new, printed, n_before = [], "", len(tokenizer.decode(before))
    for (token,) in steps:
        if token in stop:
            break
        new.append(token)
        text = tokenizer.decode([*before, *new])[n_before:]
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may span several tokens
            print(text[len(printed) :], end="", flush=True)
            printed = text
    print(flush=True)
    return printed


def run(kind: type[nn.Module] | None = None, sizes: dict | None = None) -> None:
    """Run the command line of a decoder's file: continue a text, or print the sizes.

    kind: the model class; None opens any checkpoint. sizes: its Configs by name. Exits with code 2 and one
    line for a mistake.
    """
    command.run(lambda: main(kind, sizes))


def main(kind: type[nn.Module] | None, sizes: dict | None) -> None:
    """Continue a text, or print the sizes; see `run`."""
    parser = command.Parser(description="Continue a text with a trained model, or print the sizes.")
    add_sampling_flags(parser)
    args = parser.parse_args()
    if args.checkpoint is None:
        if kind is None or sizes is None:
            raise ValueError("no checkpoint: name its directory, such as runs/gpt/model")
        print_sizes(kind, sizes)
    else:
        from formats.open_model import check_concept, open_model

        if kind is not None:
            check_concept(args.checkpoint, kind)
        continue_text(open_model(args.checkpoint), args)


if __name__ == "__main__":
    run()
