"""What a module has beside its model, also where FSDP has sharded both."""

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from engine.trainable import beside


class Scored(nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.score = nn.Linear(4, 4), nn.Linear(4, 1)
        self.register_buffer("mean", self.score.weight.detach().mean())


@pytest.mark.parametrize("sharded", [False, True])
def test_the_head_beside_a_model_is_found_in_one_process_and_in_shards(sharded):
    # A world of one rank; the addresses of its DTensors are all 0.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = Scored()
        if sharded:
            fully_shard(module)
        found = beside(module, module.model)
        assert found.keys() == {"score.weight", "score.bias", "mean"}
        assert not any(tensor.requires_grad for tensor in found.values())
        assert beside(module.model, module.model) == {}
    finally:
        dist.destroy_process_group()
