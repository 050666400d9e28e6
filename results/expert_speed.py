"""Time moe.py's layer and the Mixtral block of transformers, in turn on this machine.

    python -m results.expert_speed --out results/expert_speed.json      needs pip install transformers

What is timed is forward and backward of one layer, with gradients of the input and of all weights: width 256,
experts of width 512, 2,048 tokens, the 2 best of 8 experts or of 64, float32, the same weights on both sides.
transformers has several implementations of its experts: "eager", the block's own code, loops over them;
"grouped_mm", its default, sorts the tokens and calls PyTorch's grouped product. (A third copies a weight
matrix for every token, which here would take gigabytes.) A figure is the median over the rounds of their time
over ours, with the range.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from engine import cpu
from moe import Config, MoE

D, D_EXPERT, TOKENS, TOP_K = 256, 512, 2048, 2
THEIRS = ("eager", "grouped_mm")


def seconds(layer: nn.Module, x: Tensor, dy: Tensor) -> float:
    """Return the time of one forward and backward pass."""
    began = time.perf_counter()
    layer(x).backward(dy)
    elapsed = time.perf_counter() - began
    layer.zero_grad(set_to_none=True)
    x.grad = None
    return elapsed


def sides(n_experts: int) -> dict[str, nn.Module]:
    """Return our layer and those of transformers, with the same weights."""
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
        # transformers has the two stacks as bare parameters.
        stacks = ("experts.gate_up_proj.weight", "experts.down_proj.weight")
        weights = {
            name.removesuffix(".weight") if name in stacks else name: w
            for name, w in ours.state_dict().items()
        }
        layers[way].load_state_dict(weights)
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=11, help="measurements of each side (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    cpu.keep_memory()  # for both sides
    torch.manual_seed(0)

    # Both sides must compute the same; then they are timed in turn.
    results = []
    for n_experts in (8, 64):
        layers = sides(n_experts)
        x, dy = torch.randn(4, TOKENS // 4, D, requires_grad=True), torch.randn(4, TOKENS // 4, D)
        for layer in layers.values():
            torch.testing.assert_close(layer(x), layers["plinth"](x), atol=1e-5, rtol=1e-4)
        times = {side: [] for side in layers}
        for i in range(args.rounds + 2):
            for side, layer in layers.items():
                elapsed = seconds(layer, x, dy)
                if i > 1:  # the first two are warm-up
                    times[side].append(elapsed)

        ours = times["plinth"]
        print(f"{n_experts} experts: plinth {1e3 * statistics.median(ours):.1f} ms", flush=True)
        for way in THEIRS:
            ratios = [b / a for a, b in zip(ours, times[way], strict=True)]
            row = {"experts": n_experts, "beside": way, "ms": 1e3 * statistics.median(ours)}
            row |= {"beside_ms": 1e3 * statistics.median(times[way]), "ratio": statistics.median(ratios)}
            results.append(row | {"ratio_min": min(ratios), "ratio_max": max(ratios)})
            print(f"  {way:10} {row['beside_ms']:8.1f} ms: {row['ratio']:.2f}x ", end="")
            print(f"({min(ratios):.2f} to {max(ratios):.2f})", flush=True)

    if args.out:
        machine = {"cpu": cpu.name(), "threads": torch.get_num_threads()}
        machine |= {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
        command = "python -m results.expert_speed --out results/expert_speed.json"
        args.out.write_text(
            json.dumps({"command": command, **machine, "results": results}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
