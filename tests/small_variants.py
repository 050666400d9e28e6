"""What the tests of all attention variants share: figures of their page, causality, the cache."""

import json
import math
import re
from pathlib import Path

import torch
from small_gpt import flags, write_text
from torch import Tensor, nn

import train
from generate import KVCache

PAGE = Path(__file__).parents[1] / "docs" / "attention_variants.md"


def tokens_of(T: int, vocab_size: int = 61) -> Tensor:
    return torch.randint(vocab_size, (2, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
    """Return the model, changed so that its outputs depend visibly on every weight."""
    torch.manual_seed(1)
    for p in model.parameters():
        p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def costs(model: nn.Module, seq_len: int = 256) -> list[int]:
    """Return the figures of the page's table: parameters, FLOPs per token, bytes of a row's cache."""
    parts = vars(model.new_cache([1], seq_len))
    parts = [parts, *(vars(part) for part in parts.values() if isinstance(part, KVCache))]
    lists = [value for part in parts for value in part.values() if isinstance(value, list)]
    kept = {x.data_ptr(): x.nbytes for tensors in lists for x in tensors if isinstance(x, Tensor)}
    return [sum(p.numel() for p in model.parameters()), model.flops_per_token(seq_len), sum(kept.values())]


def documented_costs(name: str) -> list[int]:
    """Return the figures of the page's row for `--model NAME`."""
    row = re.search(rf"^\| `{name}` \|(.*)\|$", PAGE.read_text(), re.M)[1]
    return [int(figure.replace(",", "")) for figure in row.split("|")]


@torch.no_grad()
def first_changes(model: nn.Module, T: int, noise: float = 0.0) -> list[int]:
    """Return for every position of T tokens the first position whose logits change with its token, by more
    than noise: experts add up other tokens in another order."""
    tokens = tokens_of(T, model.config.vocab_size)[:1]
    before, found = model(tokens), []
    for i in range(T):
        changed = tokens.clone()
        changed[0, i] = (changed[0, i] + 1) % model.config.vocab_size
        differs = ((model(changed) - before).abs() > noise)[0].any(dim=-1)
        found.append(int(differs.nonzero()[0]))
    return found


@torch.no_grad()
def cache_error(model: nn.Module, T: int, n_prompt: int) -> float:
    """Return how far the logits of T tokens, of which all but the first n_prompt pass one by one, are from
    those of one pass."""
    tokens = tokens_of(T, model.config.vocab_size)
    cache = model.new_cache([n_prompt] * 2, T)
    steps = [model(tokens[:, :n_prompt], cache=cache)]
    steps += [model(tokens[:, i : i + 1], cache=cache) for i in range(n_prompt, T)]
    return (torch.cat(steps, dim=1) - model(tokens)).abs().max().item()


def trained(folder: Path, name: str, **changes) -> Path:
    """Train `--model NAME` for five steps, check that its loss falls, and return the model's directory."""
    text, out = write_text(folder / "text.txt"), folder / "run"
    assert train.main(flags(text, out, model=name, steps=5, **changes)) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))
    return out / "model"
