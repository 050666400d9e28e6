"""A cache that goes back: generation in which tokens are read first, and taken back if they do not stay.

The cache of generate.py reads the prompts, and then one token after another. This one reads any number of
tokens in a pass, and forgets the last of them, in each row of a batch as many as it must. `Rewindable` gives
it to a decoder: language/speculative.py needs it to check guesses.

Shapes: B rows, T tokens of a pass, S slots of the cache, D model width, V vocabulary, G key/value heads, K
head width.
"""

import torch
from torch import Tensor, nn

from attention_variants.linear import HybridCache
from generate import KVCache


class Rewinding(KVCache):
    """A cache of keys and values that reads several tokens in a pass, and can be cut back to fewer.

    A layer with a window keeps all keys, and a mask hides the far ones: a ring would have lost those that
    come back into sight.
    """

    def __init__(self, cache: KVCache, max_len: int, n_positions: int | None):
        """Take the place of a new cache. max_len: tokens to hold; n_positions: of the model, None: any."""
        self.lengths, self.filled, self.n_positions, self.n_read = cache.lengths, False, n_positions, 0
        self.keys, self.slots = [whole(x, max_len) for x in cache.keys], [max_len] * len(cache.keys)
        shared = cache.values is cache.keys  # as in latent attention
        self.values = self.keys if shared else [whole(x, max_len) for x in cache.values]

    def positions(self, T: int, device: torch.device) -> Tensor:
        """Return the positions of the next T tokens: (1, T), or (B, T) where the rows differ in length."""
        self.n_read = T
        starts = [0] if not self.filled else self.lengths[:1] if self.uniform else self.lengths
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(T, device=device)
        # Drafts behind the last token that fits are refused later; until then they need some position.
        return positions if self.n_positions is None else positions.clamp(max=self.n_positions - 1)

    def store(self, layer: int, k: Tensor, v: Tensor, mask: dict) -> tuple[Tensor, Tensor, dict]:
        """Store a layer's new keys and values (B, T, G, K), and return those to attend to, and the mask."""
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
        """Forget what lies behind these lengths, one per row: it is overwritten later."""
        self.lengths = list(lengths)


class RewindingStates(Rewinding):
    """The same of linear attention, whose states cannot be cut: the state after each token is kept until the
    cache goes back, which is possible to the last place where it went back to, and no further."""

    def __init__(self, cache: HybridCache, max_len: int, n_positions: int | None):
        super().__init__(cache, max_len, n_positions)
        self.current, self.start = cache, list(cache.lengths)
        self.history: dict[int, list[Tensor]] = {}  # of each layer, from the start on: (B, H, K, K)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *decay) -> Tensor:
        """Return o (B, T, H, K) of the prompts, or of T tokens of each row, one after the other."""
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
        """Take the states that the rows had at these lengths."""
        n = [max(0, length - start) for length, start in zip(lengths, self.start, strict=True)]
        for layer, states in self.history.items():
            state = torch.stack([states[i][row] for row, i in enumerate(n)])
            self.current.states[layer], self.history[layer] = state, [state]
        self.lengths, self.start = list(lengths), list(lengths)


def whole(x: Tensor | None, max_len: int) -> Tensor | None:
    """Return keys or values (B, S, G, K) if S is max_len, else zeros of that length; None for None."""
    if x is None:
        return None
    B, S, G, K = x.shape
    return x if max_len == S else x.new_zeros(B, G, max_len, K).transpose(1, 2)


class Rewindable(nn.Module):
    """A decoder as generate.py needs it, whose caches are `Rewinding`."""

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
        """Return an empty cache. Raises ValueError for a model with a cache of another kind."""
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
