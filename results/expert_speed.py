"""How fast is moe.py's layer of experts beside the Mixtral block of transformers, with the same weights?

    python -m results.expert_speed --out results/expert_speed.json      (needs tests/requirements.txt)

Both sides compute forward and backward of one layer in float32, with gradients of the input and of all
weights: width 256, experts of width 512, 2,048 tokens, the 2 best of 8 experts or of 64. Their results are
compared before any timing, and they are measured in turn in one process.

transformers has several implementations of its experts: "eager", the block's own code, loops over them;
"grouped_mm", its default, sorts the tokens and calls PyTorch's grouped product. (A third copies a weight
matrix for every token, which here would take gigabytes.) A figure is the median over the rounds of their time
over ours, with the range.
"""

import os
from functools import partial

import torch
from torch import Tensor, nn

from engine import cpu
from formats import command
from moe import Config, MoE
from results.in_turn import arguments, in_milliseconds, measure_in_turn, seconds, shown, write_figures
from results.peers import require

D, D_EXPERT, TOKENS, TOP_K = 256, 512, 2048, 2
THEIRS = ("eager", "grouped_mm")


def forward_and_backward(layer: nn.Module, x: Tensor, dy: Tensor) -> float:
    """Return the seconds of a forward and a backward pass. x, dy: input and gradient of the output (B, T,
    D)."""
    elapsed = seconds(lambda: layer(x).backward(dy))
    layer.zero_grad(set_to_none=True)
    x.grad = None
    return elapsed


def sides(n_experts: int) -> dict[str, nn.Module]:
    """Return our layer and those of transformers, with the same weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    ours = MoE(Config(1, 4, D, D_EXPERT, n_experts=n_experts, top_k=TOP_K))
    for p in ours.parameters():
        nn.init.normal_(p, std=0.02)
    layers = {"plinth": ours}
    for way in THEIRS:
        config = MixtralConfig(
            hidden_size=D, intermediate_size=D_EXPERT, num_local_experts=n_experts, num_experts_per_tok=TOP_K
        )
        config._experts_implementation = way
        layers[way] = MixtralSparseMoeBlock(config)
        # transformers names the two stacks of the experts' matrices without .weight.
        stacks = ("experts.gate_up_proj.weight", "experts.down_proj.weight")
        weights = {
            name.removesuffix(".weight") if name in stacks else name: w
            for name, w in ours.state_dict().items()
        }
        layers[way].load_state_dict(weights)
    return layers


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, 11, argv)
    require("transformers")
    load, results = os.getloadavg()[0], []
    cpu.keep_memory()  # for both sides: it is a setting of the process
    torch.manual_seed(0)
    for n_experts in (8, 64):
        layers = sides(n_experts)
        x, dy = torch.randn(4, TOKENS // 4, D, requires_grad=True), torch.randn(4, TOKENS // 4, D)
        for layer in layers.values():
            torch.testing.assert_close(layer(x), layers["plinth"](x), atol=1e-5, rtol=1e-4)
        timed = {side: partial(forward_and_backward, layer, x, dy) for side, layer in layers.items()}
        times = measure_in_turn(timed, args.rounds, warm_up=2)
        for way in THEIRS:
            row = {"experts": n_experts, "beside": way} | in_milliseconds(times["plinth"], times[way])
            results.append(row)
            print(f"{n_experts} experts: plinth {row['ms']:.1f} ms, {way} {row['beside_ms']:.1f} ms: "
                  f"{shown(row)}", flush=True)  # fmt: skip
    if args.out:
        write_figures(args.out, "expert_speed", load, results)


if __name__ == "__main__":
    command.run(main)
