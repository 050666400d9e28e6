"""Which weights learn, and what a module has beside its model, also where FSDP has sharded both."""

import pytest
import small_t5
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from engine.trainable import beside, freeze


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


def test_the_last_block_of_an_encoder_decoder_learns_as_a_whole_and_embeddings_stay():
    model = small_t5.small(n_decoder_layers=2)
    freeze(model, "last:1")
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {name for name, _ in model.named_parameters() if name.startswith("decoder.block.1.")}
    assert learning == expected | {f"{stack}.final_layer_norm.weight" for stack in ("encoder", "decoder")}
    with pytest.raises(ValueError, match="this model has 4 blocks"):
        freeze(model, "last:5")
