"""Averages: moving averages of the weights, which are evaluated and saved in their place (--ema).

    a <- d a + (1 - d) w          after each update, for the average a of each weight w that learns; d: decay

Such an exponential moving average reaches back about 1 / (1 - d) updates. It takes out the noise of the last
updates, as a falling learning rate does. Diffusion models are sampled with it (Ho et al. 2020, appendix B);
the idea is that of Polyak and Juditsky (1992). Training does not read the averages, so they do not change its
loss. The decay rises to that of --ema:

    d = min(decay, (1 + t) / (10 + t))          t: updates so far

At first the average reaches back over a ninth of the updates so far, so that in a short run it forgets the
random start (TensorFlow's ExponentialMovingAverage). An update that is left out, because its gradient is not
finite, leaves the average as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engine import parallel


class Averages:
    """The averages of a model's weights that learn. Of a sharded weight, a rank holds those of its shard."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.tensors = {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self, finite: Tensor, step: int) -> None:
        """Move the averages towards the weights after update number `step`.

        finite: bool (), on the device of the weights; where it is False the averages stay as they are. The
        host does not wait for the device.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        share = (1 - decay) * finite
        for average, w in self.pairs():
            average.lerp_(w, share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the averages as its weights, and afterwards its own ones again, to the bit."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the values of averages and weights in place: other modules hold these tensors too."""
        for module in self.model.modules():
            if hasattr(module, "reshard"):  # FSDP's, which may still hold gathered weights
                module.reshard()
        for average, w in self.pairs():
            before = w.clone()
            w.copy_(average)
            average.copy_(before)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each average and its weight; of sharded ones the shards of this rank."""
        for name, average in self.tensors.items():
            yield parallel.local(average), parallel.local(self.weights[name])
