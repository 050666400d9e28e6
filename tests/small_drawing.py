"""What the tests of models that draw images have in common: a folder of images, and a run that is killed."""

import signal

import numpy as np
import torch
from PIL import Image
from small_gpt import die_in, forked, same_run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import train


def folder_of_images(path, n):
    """Write n different colour images of 8 x 8 pixels."""
    path.mkdir()
    generator = np.random.default_rng(0)
    for i in range(n):
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.png")


def assert_resumed_equals_whole(model, tmp_path, *settings):
    """Kill a run of four updates while it saves the third time, resume it, and compare it with a run that
    was not killed: weights, the optimizer's states, averages, buffers, metrics and samples, to the bit."""
    folder_of_images(tmp_path / "photos", 12)
    flags = ["--model", model, "--data", str(tmp_path / "photos"), "--cache", str(tmp_path / "cache")]
    flags += [
        "--steps",
        "4",
        "--batch-size",
        "4",
        "--eval-every",
        "2",
        "--save-every",
        "1",
        "--log-every",
        "1",
    ]
    flags += ["--set", "image_size=(8,8)", *settings]
    killed, whole = ([*flags, "--out", str(tmp_path / name)] for name in ("killed", "whole"))
    process = forked(killed, prepare=die_in, arguments=("save", 3))
    assert process.end() == -signal.SIGKILL, process.said()
    assert train.main([*killed, "--resume"]) == 0
    assert train.main(whole) == 0
    assert same_run(tmp_path / "whole", tmp_path / "killed")


class Flops(TorchDispatchMode):
    """Count the FLOPs of matrix products and convolutions; torch's FlopCounterMode refuses autograd.grad."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def flops_of(call) -> int:
    """Return the FLOPs of a call."""
    with Flops() as counter:
        call()
    return counter.total


def doubled(model: torch.nn.Module, batch: dict) -> tuple[torch.nn.Module, dict]:
    """Return a model and a batch in float64."""
    return model.double(), {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}
