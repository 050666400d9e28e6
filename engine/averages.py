"""Averages: a slow copy of the weights, which is evaluated and saved in their place (--ema).

    a <- d a + (1 - d) w          after each update, for each weight w that learns

An exponential moving average reaches back about 1 / (1 - d) updates. It takes out the noise of the last ones,
as a falling learning rate does, and it is how diffusion models are sampled (Ho et al. 2020, appendix B; the
idea: Polyak and Juditsky 1992). Training itself does not read it, so the loss of the training batches stays
what it is without.

    d = min(decay, (1 + t) / (10 + t))          t: updates so far

so that a short run does not average over its random start: at first the average reaches back a ninth of the
run (TensorFlow's ExponentialMovingAverage). An update that is left out, because its gradient is not finite,
leaves the average as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engine import parallel


class Averages:
    """The averages of the weights of a model that learn: of those that this rank holds."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.tensors = {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self, finite: Tensor, step: int) -> None:
        """Average in the weights after update number `step`, unless `finite`, a bool () on their device, is
        False. The host does not wait for the device."""
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
        """Exchange the averages and the weights, in their places: other modules hold these tensors, too."""
        for module in self.model.modules():
            if hasattr(module, "reshard"):  # FSDP's, which may still hold gathered weights
                module.reshard()
        for average, w in self.pairs():
            before = w.clone()
            w.copy_(average)
            average.copy_(before)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each average and its weight, of sharded ones this rank's shards."""
        for name, average in self.tensors.items():
            yield parallel.local(average), parallel.local(self.weights[name])
