"""Writing with an encoder-decoder: one token after another, greedy, sampled, or by beam search.

The encoder reads the input once, and the keys and values of cross attention are computed once, for all layers
of the decoder. Then the decoder, with a cache, writes as any language model does: the sampling of generate.py
works unchanged, with the start token as the prompt.

Beam search keeps the n most probable beginnings of an output instead of one. An output y that has ended, with
T tokens including the end token, has the score

    score(y) = log p(y | x) / T^a           a = 0 prefers short outputs, a = 1 compares means per token

which is Hugging Face's length penalty; Wu et al. (2016, section 7) divide by ((5 + T) / 6)^a instead. The
search of a row ends once n outputs have ended and the best beginning, scored by the same formula, is not
better than the worst of them; with early_stopping as soon as n have ended. `Rules` forbid or force tokens.

    python -m language.t5 runs/t5/model --text "def <extra_id_0>(self):" --beams 4

Shapes: B rows, n beams, S input tokens, T output tokens, D model width, V vocabulary.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import generate as decoding
from formats import command
from language.span_corruption import SENTINELS, restore


class Decoder(nn.Module):
    """The decoder of a model, with the encoded inputs: it has the methods that generate.py calls."""

    def __init__(self, model: nn.Module, inputs: Sequence[Sequence[int]], times: int = 1):
        """Encode inputs, B lists of tokens. Each is repeated `times` times, once for each beam.

        Raises ValueError for an empty input or an unknown token.
        """
        super().__init__()
        self.model, self.config = model, model.config.decoder
        check_inputs(inputs, self.config.vocab_size)
        lengths, S = [len(row) for row in inputs], max(map(len, inputs))
        device, padding = model.shared.weight.device, [self.config.pad_token_id]
        tokens = torch.tensor([[*row, *padding * (S - len(row))] for row in inputs], device=device)  # (B, S)
        ends = torch.tensor(lengths, device=device) if min(lengths) < S else None  # (B,)
        cross = model.cross(model.encode(tokens, ends))

        # Buffers, so that the copy of this module in kernels/few_rows.py shares them.
        self.register_buffer("bias", None)  # of positions in self attention, for the length of `new_cache`
        self.register_buffer("lengths", None if ends is None else ends.repeat_interleave(times, 0))
        for i, (k, v) in enumerate(cross):
            self.register_buffer(f"keys_{i}", k.repeat_interleave(times, 0))
            self.register_buffer(f"values_{i}", v.repeat_interleave(times, 0))

    def new_cache(self, lengths: list[int], max_len: int, static: bool = False) -> decoding.KVCache:
        """Return an empty cache for beginnings of these lengths, of max_len tokens in all."""
        self.bias = self.model.decoder.bias(reach=max_len)
        kind = decoding.StaticKVCache if static else decoding.KVCache
        return kind(self.config, lengths, max_len, like=self.model.shared.weight)

    def hidden(self, tokens: Tensor, *, cache: decoding.KVCache) -> Tensor:
        """Return the hidden states (B, T, D) of the next tokens (B, T), and add them to the cache."""
        layers = range(self.config.n_layers)
        cross = [(getattr(self, f"keys_{i}"), getattr(self, f"values_{i}")) for i in layers]
        hidden = self.model.decode(tokens, cross, self.lengths, cache, self.bias)
        cache.advance()
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., D)."""
        return self.model.logits(hidden)


def check_inputs(inputs: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise ValueError unless every input has tokens, and only those of the vocabulary."""
    if not len(inputs) or not all(len(row) for row in inputs):
        raise ValueError(
            "generate: an empty input; an encoder reads at least one token, such as the end token"
        )
    unknown = [int(token) for row in inputs for token in row if not 0 <= token < vocab_size]
    if unknown:
        raise ValueError(f"generate: token {unknown[0]} in an input: expected 0 to {vocab_size - 1}")


def as_lists(inputs: Tensor | Sequence[Sequence[int]]) -> list[list[int]]:
    return inputs.tolist() if isinstance(inputs, Tensor) else [list(row) for row in inputs]


def longest_output(model: nn.Module, n: int) -> int:
    """Return n, or the number of tokens that a model with absolute positions can write, if that is less."""
    config = model.config
    return min(n, config.max_seq_len) if config.positions == "absolute" else n


@torch.inference_mode()
def generate(
    model: nn.Module, inputs: Tensor | Sequence[Sequence[int]], max_new_tokens: int, **options
) -> list[list[int]]:
    """Return the output of each input, (B, S) or B lists of tokens, with the end token if it was reached.

    options: as for `generate.stream`: temperature (0 takes the likeliest token), top_k, generator ...
    Raises ValueError for an input or an option that is out of range.
    """
    rows = as_lists(inputs)
    options = {"stop": model.config.eos_token_id} | options
    start = [[model.config.start_token_id] for _ in rows]
    return decoding.generate(Decoder(model, rows), start, max_new_tokens, **options)


@dataclass(frozen=True)
class Rules:
    """Tokens that an output must or must not have at a place. The fields are named as in Hugging Face."""

    no_repeat_ngram_size: int = 0  # no sequence of so many tokens comes twice; 0: no such rule
    min_length: int = 0  # tokens before which no output ends, the start token included
    forced_bos_token_id: int | None = None  # the first token behind the start token
    forced_eos_token_id: int | None = None  # the last token of an output of max_new_tokens

    def apply(self, log_p: Tensor, rows: list[list[int]], eos: int, is_last: bool) -> None:
        """Set log-probabilities log_p (n, V) of the next token to -inf where it is forbidden, and to 0 where
        it is forced. rows: the n beginnings, of equal lengths, with their start tokens."""
        if len(rows[0]) < self.min_length:
            log_p[:, eos] = -torch.inf
        # Every token that followed an earlier occurrence of the last size - 1 tokens would repeat a sequence.
        size = self.no_repeat_ngram_size
        for row, beginning in enumerate(rows if size else ()):
            before = beginning[len(beginning) - size + 1 :]
            starts = range(len(beginning) - size + 1)
            banned = [beginning[i + size - 1] for i in starts if beginning[i : i + size - 1] == before]
            log_p[row, banned] = -torch.inf
        # A forced token is the only one; at the last place, that of the end wins.
        forced = self.forced_bos_token_id if len(rows[0]) == 1 else None
        if is_last and self.forced_eos_token_id is not None:
            forced = self.forced_eos_token_id
        if forced is not None:
            log_p.fill_(-torch.inf)
            log_p[:, forced] = 0.0


class Search:
    """The search for the output of one input: n beginnings, and at most n outputs that have ended."""

    def __init__(self, n_beams: int, length_penalty: float, eos: int, early_stopping: bool = False):
        self.n, self.length_penalty, self.eos = n_beams, length_penalty, eos
        self.early_stopping = early_stopping
        self.beams: list[list[int]] = [[] for _ in range(n_beams)]
        self.ended: list[tuple[float, list[int]]] = []  # (score, output), the best first
        self.done = False

    def step(self, log_p: list[float], origin: list[int], tokens: list[int], is_last: bool) -> list[int]:
        """Take the 2 n best continuations, the best first, and return the numbers of the n that go on.

        Continuation c is beam origin[c] with tokens[c] behind it; its log-probability is log_p[c]. One with
        an end token has ended if it is among the n best, and is dropped otherwise. In the last step all of
        the n best have ended.
        """
        outputs = [[*self.beams[i], token] for i, token in zip(origin, tokens, strict=True)]
        scores = [p / len(outputs[0]) ** self.length_penalty for p in log_p]
        if not self.done:
            new = [(scores[c], outputs[c]) for c in range(self.n) if is_last or tokens[c] == self.eos]
            self.ended = sorted(self.ended + new, key=lambda pair: -pair[0])[: self.n]
        going = [c for c in range(2 * self.n) if tokens[c] != self.eos][: self.n]
        self.beams = [outputs[c] for c in going]
        if len(self.ended) == self.n:
            self.done |= self.early_stopping or self.ended[-1][0] >= scores[going[0]]
        return going


@torch.inference_mode()
def beam_search(
    model: nn.Module,
    inputs: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    n_beams: int = 4,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    rules: Rules | None = None,
) -> list[list[int]]:
    """Return the best output found for each input, (B, S) or B lists of tokens; see the header.

    length_penalty: the exponent a. An output of max_new_tokens counts as ended. rules: None for no rules.
    Raises ValueError for an input or an option that is out of range.
    """
    rows, config, device = as_lists(inputs), model.config, model.shared.weight.device
    for name, value in (("n_beams", n_beams), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"beam_search: {name} {value}: expected at least 1")

    # The beams of a row are rows of the decoder. All begin with the start token, so all but the first get the
    # log-probability -1e9: otherwise the first step would choose each continuation n times.
    B, n, V = len(rows), n_beams, config.vocab_size
    decoder = Decoder(model, rows, times=n)
    cache = decoder.new_cache([1] * (B * n), max_new_tokens)
    searches = [Search(n, length_penalty, config.eos_token_id, early_stopping) for _ in rows]
    token = torch.full((B * n, 1), config.start_token_id, device=device)
    log_p = torch.full((B, n), -1e9, device=device)
    log_p[:, 0] = 0.0

    for step in range(max_new_tokens):
        # The 2 n best continuations. One of each beam has the end token, so at most n of them end, and at
        # least n can go on.
        logits = decoder.logits(decoder.hidden(token, cache=cache)[:, -1]).float()
        each, is_last = logits.log_softmax(-1), step == max_new_tokens - 1
        if rules is not None:
            beginnings = [[config.start_token_id, *beam] for search in searches for beam in search.beams]
            rules.apply(each, beginnings, config.eos_token_id, is_last)
        total = log_p[:, :, None] + each.view(B, n, V)
        log_p, index = total.flatten(1).topk(2 * n)  # (B, 2 n)
        columns = (log_p.tolist(), (index // V).tolist(), (index % V).tolist())
        going = [search.step(*row, is_last) for search, *row in zip(searches, *columns, strict=True)]
        if is_last or all(search.done for search in searches):
            break

        # Go on with the chosen continuations: a row of the cache is copied from the beam that it continues.
        picked = torch.tensor(going, device=device)  # (B, n)
        log_p, index = log_p.gather(1, picked), index.gather(1, picked)
        token = (index % V).view(-1, 1)
        origin = (index // V + n * torch.arange(B, device=device)[:, None]).flatten()
        cache.keys, cache.values = ([x[origin] for x in side] for side in (cache.keys, cache.values))
    return [search.ended[0][1] for search in searches]


# --- the command line


def main(kind: type[nn.Module], sizes: dict, argv: list[str] | None = None) -> None:
    """Print the output for a text by the model in a directory, or the sizes."""
    parser = argparse.ArgumentParser(description="Write the output for a text, or print the sizes.")
    add = parser.add_argument
    add("checkpoint", nargs="?", type=command.filled, help="a model's directory; without it, the sizes")
    add("--text", default="", help="the input; <extra_id_0> is a gap to fill")
    add("--max-new-tokens", type=int, default=100, help="tokens of the output at most (default 100)")
    add("--beams", type=int, default=1, help="beam search with so many beams (default 1: none)")
    add(
        "--length-penalty",
        type=float,
        help="0 prefers short outputs (default: the model's own, often 1; with --beams)",
    )
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    add("--seed", type=int, default=0, help="start of the random draws (default 0)")
    args = parser.parse_args(argv)
    if args.beams < 1:
        raise ValueError(f"--beams {args.beams}: expected at least 1")
    if args.checkpoint is None:
        print_sizes(kind, sizes)
        return

    from data.tokenizer import get_tokenizer
    from formats.open_model import check_concept

    check_concept(args.checkpoint, kind)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = kind.from_pretrained(args.checkpoint).to(device).eval(), get_tokenizer(args.checkpoint)
    begin = getattr(tokenizer, "begin_ids", [])  # BART's inputs begin with <s>
    row = [[*begin, *tokenizer.encode(args.text, allowed_special="all"), model.config.eos_token_id]]
    if args.beams > 1:
        penalty = {} if args.length_penalty is None else {"length_penalty": args.length_penalty}
        options = {"n_beams": args.beams} | penalty
        (output,) = model.beam_search(row, args.max_new_tokens, **options)
    else:
        generator = torch.Generator(device).manual_seed(args.seed)
        options = {"temperature": args.temperature, "generator": generator}
        (output,) = model.generate(row, args.max_new_tokens, **options)
    output = [token for token in output if token != model.config.eos_token_id]
    # A text with gaps is printed with what the model wrote for them; for any other input, what it wrote.
    known = {tokenizer.special_tokens[name] for name in SENTINELS if name in tokenizer.special_tokens}
    has_gaps = not known.isdisjoint(row[0])
    print(tokenizer.decode(restore(row[0][:-1], output, known) if has_gaps else output))


def print_sizes(kind: type[nn.Module], sizes: dict) -> None:
    """Print parameters, layers of both stacks, width, and the forward FLOPs of an example, of each size."""
    print(f"{'size':17} {'parameters':>15} {'layers':>8} {'width':>6} {'FLOPs of 512 + 114 tokens':>26}")
    for name, c in sizes.items():
        with torch.device("meta"):
            n_params = sum(p.numel() for p in kind(c).parameters())
        layers = f"{c.n_layers}+{c.decoder.n_layers}"
        print(f"{name:17} {n_params:15,} {layers:>8} {c.d_model:6} {c.flops(512, 114):26.3e}")
