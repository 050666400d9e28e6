"""Plans of --dry-run for images and sounds, against the bytes of real tensors and the peak of real steps."""

from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from kept import kept_by_forward

import train
from engine import contract
from engine.memory import estimate
from engine.optim import make_optimizers, step_optimizers
from engine.options import parse_arguments
from vision import igpt, mae, spectrogram, vit

WIDE = {"n_layers": 2, "n_heads": 4, "d_model": 64, "d_ff": 128}
IMAGE_MODEL = vit.Config(**WIDE, image_size=32, patch_size=4, n_channels=3, n_classes=10)
GREYS = tuple((x,) for x in torch.linspace(-1, 1, 8).tolist())
CONFIGS = {
    "classify_images": IMAGE_MODEL,
    "mae": IMAGE_MODEL,
    "maskfeat": IMAGE_MODEL,
    "simclr": IMAGE_MODEL,
    "igpt": replace(igpt.SIZES["tiny"], palette=GREYS),
    "classify_sounds": spectrogram.SIZES["tiny"],
}
MODELS = {vit.Config: "vit", igpt.Config: "igpt", spectrogram.Config: "spectrogram"}


def flags(**changes) -> Namespace:
    args = dict(batch_size=8, grad_accum=1, seq_len=1, dtype="float32", optimizer="adamw", parallel="none")
    args |= dict(checkpoint_activations=False, kernels="auto", lr=1e-3, weight_decay=0.1, device="cpu")
    return Namespace(**args | dict(ema=None, sam_rho=0.0) | changes)


def made(task, args):
    """Return the module that a task trains, a batch, its loss, and the plan for both."""
    config = CONFIGS[task]
    args.seq_len = config.max_seq_len
    concept = contract.resolve(
        Namespace(model=MODELS[type(config)], task=task, adapter=None, base=None, init_from=None, train="all",
                  data=None, size=None)
    )  # fmt: skip
    settings = concept.task.settings(config)
    module = concept.task.wrap(concept.model_file.Model(config), settings)

    # Rows of random numbers.
    rng, rows = np.random.default_rng(0), []
    for i in range(args.batch_size):
        common = {"label": np.array(i % 6), "augment": np.array(True)}
        if task == "classify_sounds":
            n = config.n_samples
            sound = rng.integers(-3000, 3000, n, np.int16, endpoint=True)
            rows.append({"sound": sound, "length": np.array(n), **common})
        else:
            image = rng.integers(0, 256, (config.n_channels, *config.size), np.uint8)
            rows.append({"image": image, **common})
    palette = igpt.Palette(GREYS)
    batch = concept.task.make_batch(rows, settings, torch.Generator().manual_seed(0), palette)

    given = {"loss_bytes": concept.task.loss_bytes, "tokens_per_row": concept.task.tokens_per_row}
    given["mlp_bytes"] = concept.model_file.mlp_bytes
    given = {name: function for name, function in given.items() if function is not None}
    plan = estimate(module, args, config=settings, **given)
    return module, batch, lambda: concept.task.loss(module, batch)[0], plan


def run_whole_layers(layers, x, n=None, run_layers=vit.run_layers):
    """Return the output of all layers, of which the last, too, computes all tokens."""
    return run_layers(layers, x)[:, :n]


@pytest.fixture
def compute_all_tokens(monkeypatch):
    """Let the last layer compute what it otherwise leaves out, since a plan counts it."""
    monkeypatch.setattr(vit, "run_layers", run_whole_layers)
    monkeypatch.setattr(mae, "run_layers", run_whole_layers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("task", CONFIGS)
def test_a_plan_counts_what_autograd_keeps_and_the_batch(as_on_a_gpu, compute_all_tokens, task, dtype):
    module, batch, loss, plan = made(task, flags(dtype=dtype))
    kept = kept_by_forward(loss, module, batch.values(), dtype)
    planned = sum(plan.parts.get(name, (0,))[0] for name in ("activations", "gradients", "inputs"))
    assert planned == pytest.approx(kept, rel=0.03)


@pytest.mark.parametrize("task", ["classify_images", "mae", "maskfeat", "simclr", "classify_sounds"])
def test_a_plan_is_the_peak_of_a_step(as_on_a_gpu, compute_all_tokens, peak_memory, task):
    args = flags()

    def two_steps():  # the first makes the optimizer's states
        module, batch, loss, _ = made(task, args)
        optimizers = make_optimizers(module, args)
        for _ in range(2):
            loss().backward()
            step_optimizers(optimizers, torch.tensor(True))
            module.zero_grad(set_to_none=True)

    assert made(task, args)[3].total == pytest.approx(peak_memory(two_steps), rel=0.1)


@pytest.mark.parametrize("task", ["classify_images", "mae", "simclr", "classify_sounds"])
def test_the_last_layer_keeps_less_where_it_leaves_tokens_out(as_on_a_gpu, task):
    module, batch, loss, plan = made(task, flags())
    kept = kept_by_forward(loss, module, batch.values())
    planned = sum(plan.parts.get(name, (0,))[0] for name in ("activations", "gradients", "inputs"))
    assert 0.6 * planned < kept < 0.97 * planned


@pytest.mark.parametrize(
    "model, tokens, work",
    [
        ("vit", "128 x 17 tokens", "4.62e+07 FLOPs for each image"),
        ("mae", "128 x 17 and 65 tokens", "for each image"),
        ("simclr", "256 x 34 tokens", "for each image"),
        ("maskfeat", "128 x 17 tokens", "for each image"),
        ("igpt", "32 x 144 tokens", "for each token"),
        ("spectrogram", "64 x 47 tokens", "second of sound"),
    ],
)
def test_a_dry_run_prints_the_tokens_of_an_image_its_parameters_and_its_flops(model, tokens, work, capsys):
    assert train.main(["--model", model, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"GPU 1 of 1, {tokens} at once" in out and work in out.splitlines()[-1]
    concept = contract.resolve(parse_arguments(["--model", model]))
    module = concept.model_file.Model(concept.model_file.SIZES[concept.task.SIZE or "tiny"])
    module = concept.task.wrap(module, concept.task.settings(module.config))
    n = sum(p.numel() for p in module.parameters())
    assert f"\nmodel      {n:,} parameters, " in out


def test_a_dry_run_of_convolutions_is_refused_by_name(capsys):
    assert train.main(["--model", "colorize", "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: --dry-run: plans layers of tokens, and colorize has others"
    )
