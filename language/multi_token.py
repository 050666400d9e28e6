"""Multi-token prediction: at every position a decoder predicts not only the next token, but n tokens.

    parallel      n heads read the states z of one trunk. A head is one layer; all share the final norm and
                  the matrix W:  p(t_{i+k}) = softmax(W norm(layer_k(z_i)))        k = 1 ... n
                  The last layer of the decoder is head 1 (Gloeckle et al. 2024, section 2)
    sequential    module k joins the state of the module before it with the embedding of the token k places
                  later:  h^k_i = block_k(W_k [norm(E(t_{i+k})) ; norm(h^{k-1}_i)])        k = 1 ... n - 1
                  p(t_{i+k+1}) = softmax(W norm_k(h^k_i));  h^0 is the state after the decoder's last layer
                  (DeepSeek-V3 2024, section 2.2). The embedding comes first, as in the published weights

    loss = loss of the next token + weight * (sum over heads, or mean over modules, of the further losses)

Without the further heads or modules this is exactly gpt.py's decoder, and ordinary generation leaves them
out. With n = 4, models of 7 billion parameters wrote better programs, and those below one billion worse ones
(Gloeckle et al. 2024, section 3.1). The heads are also a draft for speculative.py, at little cost.

Parallel heads are trained in turn: the activations and logits of one head are freed before the next begins,
so that training needs the memory of one head. Names inside a module are those of DeepSeek-V3's checkpoint.

    python -m language.multi_token                                          the sizes
    python train.py --model multi_token                                     train parallel heads
    python train.py --model multi_token --set modules=sequential n_future=2 future_weight=0.3
    python -m language.multi_token runs/multi_token/model --prompt "def "   continue a text by its own guesses

Shapes: B rows, T tokens, D model width, V vocabulary, L layers, n tokens predicted at a position.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import gpt
from data.rows import Dataset
from engine import contract
from formats import command, native
from formats.config_values import check_values
from generate import KVCache, print_sizes
from gpt import GPT, Norm
from kernels import few_rows, linear_cross_entropy
from language import speculative
from language.rewinding import Rewindable, Rewinding
from language.speculative import Proposal


@dataclass(frozen=True)
class Config(gpt.Config):
    """The fields of gpt.py's Config, and those of the tokens beyond the next one."""

    n_future: int = 4  # n, tokens predicted at a position; 1: the next alone
    modules: str = "parallel"  # or "sequential"
    future_weight: float = 1.0  # of the further losses; DeepSeek-V3: 0.3, towards the end of training 0.1

    def __post_init__(self):
        super().__post_init__()
        check_values(self, modules=("parallel", "sequential"))
        if self.n_future < 1:
            raise ValueError(f"n_future {self.n_future}: expected at least 1, the next token alone")

    @property
    def with_further_layers(self) -> gpt.Config:
        """Return the Config of a gpt.py decoder that also has the layers of the further heads or modules."""
        values = {field.name: getattr(self, field.name) for field in fields(gpt.Config)}
        return gpt.Config(**values | {"n_layers": self.n_layers + self.n_future - 1})

    @property
    def n_matmul_params(self) -> int:
        """Return the number of weights in all matrices that a token is multiplied by in training; the head
        counts once for each token that is predicted."""
        joined = 2 * self.d_model**2 if self.modules == "sequential" else 0
        of_head = self.vocab_size * self.d_model + joined
        return self.with_further_layers.n_matmul_params + (self.n_future - 1) * of_head

    def flops_per_token(self, seq_len: int) -> int:
        """Return the matmul FLOPs of training on one token: those of gpt.py and of the further heads."""
        deeper = self.with_further_layers
        return deeper.flops_per_token(seq_len) + 6 * (self.n_matmul_params - deeper.n_matmul_params)


SIZES = {
    # gpt.py's tiny, with three further heads.
    "tiny": Config(4, 4, 128, 352, 4096, 256, n_kv_heads=2, qk_norm=True),
}


class InTurn(torch.autograd.Function):
    """A weighted sum of the losses of heads that read the same z. Gradients are computed in the forward pass,
    head by head. Only their sums are kept for the backward pass, and no activations of any head."""

    @staticmethod
    def forward(
        ctx, losses: list[Callable], weights: list[float], learn: bool, z: Tensor, *parameters: Tensor
    ):
        """Return the weighted sum, and the losses (n,), which have no gradient. losses: functions of z;
        learn: whether to compute gradients with respect to z and the parameters."""
        values, sums = [], [torch.zeros_like(x) for x in (z, *parameters)] if learn else []
        for loss, weight in zip(losses, weights, strict=True):
            with torch.set_grad_enabled(learn):
                x = z.detach().requires_grad_(learn)
                value = loss(x)
                weighted = weight * value
            values.append(value.detach())
            if learn:
                found = torch.autograd.grad(weighted, (x, *parameters), allow_unused=True)
                for total, gradient in zip(sums, found, strict=True):
                    if gradient is not None:
                        total += gradient
        ctx.save_for_backward(*sums)
        values = torch.stack(values)
        ctx.mark_non_differentiable(values)
        return sum(weight * value for weight, value in zip(weights, values, strict=True)), values

    @staticmethod
    def backward(ctx, factor: Tensor, _):
        return None, None, None, *(factor * total for total in ctx.saved_tensors)


class Module(gpt.Block):
    """One of DeepSeek-V3's modules: a block whose input joins a state and the embedding of a later token."""

    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        D = config.d_model
        self.enorm, self.hnorm = Norm(D, config, config.norm), Norm(D, config, config.norm)
        self.eh_proj = nn.Linear(2 * D, D, bias=False)
        self.shared_head = nn.ModuleDict({"norm": Norm(D, config, config.norm)})

    def forward(self, h: Tensor, embedded: Tensor, rotation, cache, cu_seqlens: Tensor | None) -> Tensor:
        """Return the module's states (B, T, D), from the states h and the embeddings, both (B, T, D)."""
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(h)), dim=-1))
        return super().forward(x, rotation, cache, cu_seqlens)


class Further(nn.ModuleList):
    """The further heads or modules. They are initialised by gpt.py's rules after its own layers, whose random
    draws so stay the same."""

    matrices, initialize = GPT.matrices, GPT.initialize

    def __init__(self, config: Config):
        kind = gpt.Block if config.modules == "parallel" else Module
        super().__init__(kind(config, config.n_layers + k) for k in range(config.n_future - 1))
        self.config = config
        self.initialize()


class MultiToken(GPT):
    """gpt.py's decoder with further heads, saved natively."""

    save_pretrained = native.save
    from_pretrained = classmethod(lambda cls, path, *, kernels="auto": native.load(path, kernels, cls))

    def __init__(self, config: Config):
        super().__init__(config)
        self.further = Further(config)

    def trunk(
        self, tokens: Tensor, *, cache: KVCache | None = None, cu_seqlens=None
    ) -> tuple[Tensor, tuple | None]:
        """Return z (B, T, D), the input of the last layer, and the rotation. As `GPT.hidden` up to there."""
        T, device = tokens.shape[1], tokens.device
        positions = torch.arange(T, device=device)[None] if cache is None else cache.positions(T, device)
        if cu_seqlens is not None:
            document = torch.bucketize(positions, cu_seqlens, right=True) - 1
            positions = positions - cu_seqlens[document]
        x = self.model.embed_tokens(tokens)
        if self.config.positions == "learned":
            x = x + self.model.embed_positions(positions)
        rotation = self.rotation(positions)
        for block in list(self.model.layers)[:-1]:
            x = block(x, rotation, cache, cu_seqlens)
        return x, rotation

    def nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the mean nats per target, a scalar, of normalised states (B, T, D) and targets (B, T)."""
        options = {"softcap": self.config.logit_softcap, "backend": self.config.kernels}
        return linear_cross_entropy(hidden, self.head_weight, targets, **options)[0]

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the header for a batch of gpt.py's task, and the nats per token of each place:
        "next_token", "token_2", ..."""
        tokens, targets, cu_seqlens = batch["tokens"], batch["targets"], batch.get("cu_seqlens")
        z, rotation = self.trunk(tokens, cu_seqlens=cu_seqlens)
        compute = self.in_parallel if self.config.modules == "parallel" else self.in_sequence
        total, losses = compute(z, rotation, tokens, targets, cu_seqlens)
        names = ["next_token", *(f"token_{k}" for k in range(2, self.config.n_future + 1))]
        return total, dict(zip(names, losses, strict=True))

    def in_parallel(self, z, rotation, tokens, targets, cu_seqlens) -> tuple[Tensor, list[Tensor]]:
        """Return the loss of the header, and the losses of all heads, which are computed in turn."""
        blocks, T = [self.model.layers[-1], *self.further], targets.shape[1]

        def loss_of(k: int) -> Callable[[Tensor], Tensor]:
            ahead = F.pad(targets[:, k:], (0, min(k, T)), value=-100)  # the targets k places later
            return lambda x: self.nats(self.model.norm(blocks[k](x, rotation, None, cu_seqlens)), ahead)

        losses = [loss_of(k) for k in range(len(blocks))]
        weights = [1.0] + [self.config.future_weight] * len(self.further)
        modules = [*blocks, self.model.norm]
        parameters = [self.head_weight, *(p for module in modules for p in module.parameters())]
        parameters = [p for p in parameters if p.requires_grad]
        learn = torch.is_grad_enabled() and (z.requires_grad or bool(parameters))
        total, values = InTurn.apply(losses, weights, learn, z, *parameters)
        return total, list(values)

    in_parallel._torchdynamo_disable = True  # a compiler cannot trace gradients in a forward pass

    def in_sequence(self, z, rotation, tokens, targets, cu_seqlens) -> tuple[Tensor, list[Tensor]]:
        """Return the loss of the header, and the losses of the decoder and of all modules. Raises ValueError
        for rows of fewer than n tokens, which leave a module without a position."""
        if (T := tokens.shape[1]) < self.config.n_future:
            raise ValueError(f"rows of {T} tokens: expected at least n_future {self.config.n_future}")
        h = self.model.layers[-1](z, rotation, None, cu_seqlens)
        losses = [self.nats(self.model.norm(h), targets)]
        embedded = self.model.embed_tokens(tokens)
        for k, module in enumerate(self.further, 1):
            # Position i reads the token at i + k, so that the last k positions are left out.
            n = T - k
            turns = None if rotation is None else tuple(x[:, :n] for x in rotation)
            ends = None if cu_seqlens is None else cu_seqlens.clamp(max=n)
            h = module(h[:, :n], embedded[:, k:], turns, None, ends)
            losses.append(self.nats(module.shared_head["norm"](h), targets[:, k:].contiguous()))
        further = sum(losses[1:]) / max(1, len(losses) - 1)
        return losses[0] + self.config.future_weight * further, [value.detach() for value in losses]


# --- its own guesses, for speculative.py


class WithFurther(Rewindable):
    """The decoder as speculative.py runs it. Each pass keeps the states from which the guesses are made."""

    def new_cache(self, lengths: list[int], max_len: int, static: bool = False) -> Rewinding:
        """Return an empty cache, with the layers of the further heads."""
        config = self.config.with_further_layers
        cache = KVCache(config, lengths, max_len, like=self.model.model.norm.weight)
        return Rewinding(cache, max_len, config.max_seq_len if config.positions == "learned" else None)

    def hidden(self, tokens: Tensor, *, cache: Rewinding) -> Tensor:
        """Return the hidden states (B, T, D) of the next tokens (B, T), and keep what `guesses` needs."""
        self.starts = list(cache.lengths) if cache.filled else [0] * len(tokens)
        model, self.cache = self.model, cache
        z, self.rotation = model.trunk(tokens, cache=cache)
        self.last = model.model.layers[-1](z, self.rotation, cache, None)
        if model.config.modules == "parallel":
            self.states = [block(z, self.rotation, cache, None) for block in model.further]
        cache.advance()
        return model.model.norm(self.last)

    def guesses(self, texts: list[list[int]], n: int) -> Tensor:
        """Return at most n normalised states of each row (B, up to n, D), which predict the tokens after the
        last one of each text. No pass has read that last token yet."""
        rows = torch.arange(len(texts), device=self.last.device)
        place = [len(text) - 2 - start for text, start in zip(texts, self.starts, strict=True)]
        if self.model.config.modules == "parallel":
            states = torch.stack([x[rows, place] for x in self.states[:n]], dim=1)
            return self.model.model.norm(states)
        module, T = self.model.further[0], self.last.shape[1]

        # The first module joins each state of the last pass with the token after it, which is known by now.
        # What it stores in the cache beyond the end of a text is overwritten by the next pass.
        found = [text[start + 1 : start + 1 + T] for text, start in zip(texts, self.starts, strict=True)]
        behind = torch.tensor([row + [0] * (T - len(row)) for row in found], device=self.last.device)
        lengths, self.cache.lengths = self.cache.lengths, self.starts
        h = module(self.last, self.model.model.embed_tokens(behind), self.rotation, self.cache, None)
        self.cache.lengths = lengths
        return module.shared_head["norm"](h[rows, place])[:, None]


class Heads:
    """The draft that a MultiToken is for itself: all further heads guess, or the first module, one token."""

    target = staticmethod(WithFurther)

    def __init__(self, model: MultiToken):
        """Raises ValueError for a model without further heads."""
        if not len(model.further):
            raise ValueError("n_future 1: the model predicts the next token alone, and so has no guesses")
        self.vocab_size = model.config.vocab_size

    def begin(self, prompts: list[list[int]], n_new: int, target: WithFurther) -> None:
        self.run = target

    def propose(self, texts: list[list[int]], n: int, law: Callable, generator: Generator | None) -> Proposal:
        q = law(self.run.logits(self.run.guesses(texts, n)))  # (B, g, V)
        tokens = few_rows.draw(q.flatten(0, 1), generator).view(q.shape[:2])
        return Proposal(tokens, q, torch.full_like(tokens[:, 0], tokens.shape[1]))


# --- for train.py: the task is gpt.py's

Model = MultiToken
KIND = "decoder"
TASK = "gpt"
TOKEN_LOSS = "next_token"
STEPS = 1000
separate_head = gpt.separate_head
show = gpt.show


def load_data(args: Namespace, config: Config) -> Dataset:
    """Return rows of the text that --data names. Raises ValueError for --parallel fsdp: the loss reads
    weights of the heads outside of their forward passes, where a rank has a shard of them."""
    if args.parallel == "fsdp":
        raise ValueError("--parallel fsdp: the loss needs all weights of the heads; expected none or ddp")
    return contract.load_text(args, config)


def main() -> None:
    """Print the sizes, or continue a text by the model's own guesses, beside its speed without."""
    from formats.open_model import check_concept

    args = speculative.parse_arguments()
    if args.checkpoint is None:
        return print_sizes(MultiToken, SIZES)
    if args.draft or args.lookup:
        return speculative.main()
    check_concept(args.checkpoint, MultiToken)
    model = speculative.open_decoder(args.checkpoint)
    speculative.compare(model, Heads(model), args)


if __name__ == "__main__":
    command.run(main)
