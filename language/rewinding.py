"""A cache that can be cut back, for generation in which some tokens are removed again after a pass.

The cache of generate.py takes the prompts, and then one token per pass. This one takes any number of tokens
per pass, and can drop the last of them, in each row of a batch a different number. language/speculative.py
checks guesses with it, and drops those that are refused. `Rewindable` gives a decoder this cache.

Shapes: B rows, T tokens of a pass, S slots of the cache, D model width, V vocabulary, G key/value heads, K
head width.
"""

import torch
from torch import Tensor, nn

from attention_variants.linear import HybridCache
from generate import KVCache


class Rewinding(KVCache):
    """A cache of keys and values that takes several tokens in a pass, and can be cut back to fewer.

    A layer with a window keeps all keys here, and a mask hides those outside of the window. In KVCache's ring
    buffer new tokens overwrite old ones, which the window would need again after the cache is cut back.
    """

    def __init__(self, cache: KVCache, max_len: int, n_positions: int | None):
        """Replace an empty cache. max_len: tokens to hold. n_positions: how many learned positions the model
        has, None if its positions are not learned."""
        self.lengths, self.filled, self.n_positions, self.n_read = cache.lengths, False, n_positions, 0
        self.keys, self.slots = [full_length(x, max_len) for x in cache.keys], [max_len] * len(cache.keys)
        shared = cache.values is cache.keys  # as in latent attention
        self.values = self.keys if shared else [full_length(x, max_len) for x in cache.values]

    def positions(self, T: int, device: torch.device) -> Tensor:
        """Return the positions of the next T tokens: (1, T), or (B, T) where the rows differ in length."""
        self.n_read = T
        starts = [0] if not self.filled else self.lengths[:1] if self.uniform else self.lengths
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(T, device=device)
        # Guesses may lie beyond the last position. They are never part of the text, so any position will do.
        return positions if self.n_positions is None else positions.clamp(max=self.n_positions - 1)

    def store(self, layer: int, k: Tensor, v: Tensor, mask: dict) -> tuple[Tensor, Tensor, dict]:
        """Store a layer's new keys and values (B, T, G, K), and return those to attend to, and the mask with
        the number of keys of each row where rows differ."""
        if not self.filled:
            self.fill(layer, k, v)
            return k, v, mask
        (B, T), keys, values = k.shape[:2], self.keys[layer], self.values[layer]
        n = max(self.lengths) + T
        if self.uniform:
            keys[:, n - T : n], values[:, n - T : n] = k, v
            return keys[:, :n], values[:, :n], mask
        rows, lengths = torch.arange(B, device=k.device)[:, None], torch.tensor(self.lengths, device=k.device)
        slots = lengths[:, None] + torch.arange(T, device=k.device)  # (B, T)
        keys[rows, slots], values[rows, slots] = k, v
        return keys[:, :n], values[:, :n], mask | {"seqlens_k": lengths + T}

    def advance(self) -> None:
        """Count the tokens of a pass, to be called after each."""
        if self.filled:
            self.lengths = [n + self.n_read for n in self.lengths]
        self.filled = True

    def go_back(self, lengths: list[int]) -> None:
        """Cut each row back to its length. What lies behind stays in memory until it is overwritten."""
        self.lengths = list(lengths)


class RewindingStates(Rewinding):
    """The same for linear attention. A state cannot be cut back, so the state after each token is kept until
    the next call of `go_back`. The cache cannot go back beyond the place of the last call."""

    def __init__(self, cache: HybridCache, max_len: int, n_positions: int | None):
        super().__init__(cache, max_len, n_positions)
        self.current, self.start = cache, list(cache.lengths)
        # For each layer its states (B, H, K, K) after `start` tokens, after one more, ...
        self.history: dict[int, list[Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *decay) -> Tensor:
        """Return o (B, T, H, K) of the prompts, or of T tokens of each row, computed one after the other.
        decay: further arguments of `HybridCache.attend`."""
        states = self.current.states
        if not self.filled:
            o = self.current.attend(layer, q, k, v, *decay)
            self.history[layer] = [states[layer]]
            return o
        self.current.filled, outputs = True, []
        for t in range(q.shape[1]):
            outputs.append(self.current.attend(layer, *(x[:, t : t + 1] for x in (q, k, v)), *decay))
            self.history[layer].append(states[layer])
        return torch.cat(outputs, dim=1)

    def go_back(self, lengths: list[int]) -> None:
        """Cut each row back to its length, and take the states that the rows had there."""
        n = [max(0, length - start) for length, start in zip(lengths, self.start, strict=True)]
        for layer, states in self.history.items():
            state = torch.stack([states[i][row] for row, i in enumerate(n)])
            self.current.states[layer], self.history[layer] = state, [state]
        self.lengths, self.start = list(lengths), list(lengths)


def full_length(x: Tensor | None, max_len: int) -> Tensor | None:
    """Return the empty keys or values x (B, S, G, K) if S is max_len, else zeros of that length. A layer
    without keys has None, and keeps it."""
    if x is None:
        return None
    B, S, G, K = x.shape
    return x if max_len == S else x.new_zeros(B, G, max_len, K).transpose(1, 2)


class Rewindable(nn.Module):
    """A decoder with the functions that generate.py calls, whose caches are `Rewinding`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config = model, model.config

    def hidden(self, tokens: Tensor, *, cache: Rewinding) -> Tensor:
        """Return the hidden states (B, T, D) of the next tokens (B, T), and add them to the cache."""
        return self.model.hidden(tokens, cache=cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., D)."""
        return self.model.logits(hidden)

    def new_cache(self, lengths: list[int], max_len: int, static: bool = False) -> Rewinding:
        """Return an empty cache, never static. Raises ValueError for a model with another kind of cache."""
        cache = self.model.new_cache(lengths, max_len)
        learned = self.config.positions == "learned"
        options = max_len, self.config.max_seq_len if learned else None
        if type(cache) is HybridCache:
            return RewindingStates(cache, *options)
        if type(cache) is not KVCache:
            raise ValueError(
                f"speculative decoding: {type(self.model).__name__} keeps a {type(cache).__name__}, which "
                "cannot be cut back to fewer tokens; generate without a draft"
            )
        return Rewinding(cache, *options)
