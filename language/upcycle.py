"""Upcycling: turn a dense model into a mixture of experts (Sparse Upcycling, Komatsuzaki et al. 2022).

    y = sum over the k best e of  w_e MLP_e(x)  =  MLP(x),      if MLP_e = MLP for every e and sum of w_e = 1

Every expert begins as a copy of the dense MLP, and the weights of a token's experts add up to 1, so the
mixture begins with the outputs of the dense model. The router is random, so in training the copies get
different tokens and become different.

    python -m language.upcycle runs/gpt/model --experts 8 --out runs/upcycled
    python train.py --model moe --init-from runs/upcycled --out runs/further
"""

from dataclasses import fields
from pathlib import Path

import torch

import gpt
from data.tokenizer import get_tokenizer
from formats import command
from gpt import GPT
from moe import Config, MoEGPT, n_active_params


@torch.no_grad()
def from_dense(model: GPT, n_experts: int, top_k: int = 2, dense_layers: tuple[int, ...] = ()) -> MoEGPT:
    """Return a mixture whose experts are copies of a dense model's MLPs, with the same outputs and dtype.

    dense_layers keep their MLP. Raises ValueError for an MLP that is not SwiGLU or has biases.
    """
    same = {field.name: getattr(model.config, field.name) for field in fields(gpt.Config)}
    config = Config(**same, n_experts=n_experts, top_k=top_k, dense_layers=dense_layers)
    sparse = MoEGPT(config).to(model.head_weight)

    # Put E copies of each MLP in its place, and beside them the router's new weights.
    weights = model.state_dict()
    for layer in set(range(config.n_layers)) - set(dense_layers):
        mlp = f"model.layers.{layer}.mlp."
        gate, up, down = (weights.pop(f"{mlp}{part}_proj.weight") for part in ("gate", "up", "down"))
        gate_up = torch.cat((gate, up))  # (2 F, D)
        weights[f"{mlp}experts.gate_up_proj.weight"] = gate_up.expand(n_experts, -1, -1)
        weights[f"{mlp}experts.down_proj.weight"] = down.expand(n_experts, -1, -1)
        weights[f"{mlp}gate.weight"] = sparse.model.layers[layer].mlp.gate.weight
    sparse.load_state_dict(weights)
    return sparse


def upcycle(directory: str, n_experts: int, out: Path) -> MoEGPT:
    """Write to out the mixture of the dense model in directory, with its tokenizer, and return it.

    Raises ValueError for fewer than 2 experts, and where out already has a model.
    """
    if n_experts < 2:
        raise ValueError(f"--experts {n_experts}: expected at least 2 experts")
    if (out / "config.json").exists():
        raise ValueError(f"--out {out}: there is a model in it; name another directory")
    dense, tokenizer = GPT.from_pretrained(directory), get_tokenizer(directory)
    sparse = from_dense(dense, n_experts)
    sparse.save_pretrained(out)
    tokenizer.save(out)
    return sparse


def main() -> None:
    parser = command.Parser(description="Turn a trained dense model into a mixture of experts.")
    parser.add_argument(
        "checkpoint", type=command.filled, metavar="DIR", help="the dense model, in Hugging Face layout"
    )
    parser.add_argument("--experts", type=int, default=8, metavar="N", help="experts of a layer (default 8)")
    parser.add_argument(
        "--out",
        type=command.path,
        default=Path("runs/upcycled"),
        help="where to write it (default runs/upcycled)",
    )
    args = parser.parse_args()
    sparse = upcycle(args.checkpoint, args.experts, args.out)
    n_params = sum(p.numel() for p in sparse.parameters())
    print(f"{args.out}: {n_params:,} parameters, {n_active_params(sparse):,} of them active")


if __name__ == "__main__":
    command.run(main)
