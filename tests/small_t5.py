"""Small models of language/t5.py for tests: recorded ones, and random ones."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from language.t5 import T5, Config

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = Config(2, 4, 32, 40, vocab_size=61, d_head=6, n_decoder_layers=3, n_buckets=8, max_distance=16)
V11 = {"mlp": "geglu", "tie_embeddings": False, "scale_head": False}
OLD = {"original": True, "n_decoder_layers": 2, "d_head": 8}


def recorded(name):
    """Return the model in a fixture, and what transformers computes from it."""
    expected = load_file(FIXTURES / name.removesuffix("-v5") / "expected.safetensors")
    return T5.from_pretrained(FIXTURES / name).eval(), expected


def small(**changes):
    """Return a random model whose outputs depend visibly on every weight."""
    torch.manual_seed(0)
    model = T5(replace(SMALL, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model
