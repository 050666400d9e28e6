"""A small ViT, and what its tests and those of MAE compare alike."""

import torch
from safetensors.torch import load_file

from vision.vit import Config

SMALL = Config(2, 4, 32, 48, (8, 12), 4, 2, 5)
TOLERANCE = dict(rtol=1e-5, atol=5e-6)


def assert_gradients(model, expected, prefix="", atol=TOLERANCE["atol"]):
    """Compare the gradients of a model with recorded ones, whose names are those of its file. atol: beside
    TOLERANCE's relative one, of gradients that are at most 1."""
    recorded = {
        name.removeprefix("gradient."): g for name, g in expected.items() if name.startswith("gradient.")
    }
    own = {name.removeprefix(prefix): p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert own.keys() == recorded.keys() and len(own) > 30
    for name, gradient in recorded.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(
            own[name] / scale, gradient / scale, **TOLERANCE | {"atol": atol}, msg=name
        )


@torch.no_grad()
def shaken(model, by=0.2):
    """Return the model with noise added to all parameters, so that its outputs depend on every one."""
    for p in model.parameters():
        p.add_(by * torch.randn_like(p))
    return model


def assert_same_weights(written, stored, name):
    """Compare the files of weights of this name in two directories: the same names, and equal to the bit."""
    ours, theirs = load_file(written / name), load_file(stored / name)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
