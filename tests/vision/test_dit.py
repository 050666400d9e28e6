"""DiT against diffusers (recorded), the published sizes, its start at zero, and its formula of FLOPs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_vit import TOLERANCE, assert_gradients, assert_same_weights, shaken
from torch.utils.flop_counter import FlopCounterMode

import train as train_py
from formats.diffusers import WEIGHTS
from formats.open_model import open_model
from vision import ddpm, judge
from vision.dit import SIZES, Config, DiT, n_macs

FOLDER = Path(__file__).parents[1] / "fixtures" / "dit"
SMALL = Config(2, 2, 8, 2, 3, 5, 6, 4, kernels="reference")


def small(**changes):
    torch.manual_seed(0)
    return shaken(DiT(replace(SMALL, **changes)))


# --- against diffusers


def test_outputs_and_gradients_are_those_of_diffusers():
    expected = load_file(FOLDER / "expected.safetensors")
    model = open_model(FOLDER)
    assert type(model) is DiT and model.config.n_classes == 5 and model.config.norm_eps == 1e-5
    output = model(expected["x"], expected["t"], expected["classes"])
    # Angles of times near 1,000 are rounded to 6e-5, by an exponential that differs from CPU to CPU. The
    # recorded outputs, up to 4.2, are 1.03e-5 from those of float64, and gradients of the embedder 8e-6.
    torch.testing.assert_close(output, expected["output"], rtol=0, atol=2e-5)
    loss = (output - expected["target"]).square().mean()
    torch.testing.assert_close(loss, expected["loss"], **TOLERANCE)
    loss.backward()
    # There each block has an embedder of its own: the gradient of one for all is the sum of theirs.
    gradients = {}
    for name, g in expected.items():
        if name.startswith("gradient."):
            block, found, own = name.removeprefix("gradient.").partition("norm1.emb.")
            key = f"gradient.emb.{own}" if found else f"gradient.{block}"
            gradients[key] = gradients[key] + g if key in gradients else g
    assert_gradients(model, gradients, atol=2e-5)


def test_a_written_model_has_the_same_files_as_diffusers_writes(tmp_path):
    open_model(FOLDER).save_pretrained(tmp_path)
    assert_same_weights(tmp_path, FOLDER, WEIGHTS)
    content, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path, FOLDER))
    left_out = {"dropout", "norm_num_groups", "upcast_attention"}  # which change nothing
    for key in theirs.keys() - left_out:
        assert key[:1] == "_" or content[key] == theirs[key], key


def test_a_model_without_classes_is_written_in_our_own_layout(tmp_path):
    model = small(n_classes=0)
    model.save_pretrained(tmp_path)
    x, t = torch.randn(2, 3, 6, 6), torch.tensor([1, 2])
    torch.testing.assert_close(open_model(tmp_path)(x, t), model(x, t))


def test_blocks_with_embedders_of_their_own_are_refused(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "m")
    weights = load_file(FOLDER / WEIGHTS)
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    weights[name][2, 3] += 1
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"{name} is not that of the first block; expected one embedder"):
        open_model(folder)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"activation_fn": "geglu"}, "activation_fn 'geglu' is not implemented"),
        ({"attention_head_dim": 5}, "d_model 10: expected a multiple of 4 and of 2 heads"),
        ({"num_layers": 3}, "transformer_blocks.2.* is missing"),
        (
            {"num_embeds_ada_norm": 9},
            r"embedding_table.weight has shape \(5, 12\), config.json says",
        ),
        ({"num_embeds_ada_norm": "many"}, "num_embeds_ada_norm 'many': expected a whole number"),
    ],
)
def test_what_cannot_be_read_is_named(change, words, tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=words):
        open_model(folder)


# Parameters of table 1's sizes, computed from the definition, and multiplications in 1e9, of a latent of 32
# x 32 (Peebles and Xie 2022, table 4; at 64 x 64: section 5.1).
PUBLISHED = {
    "s-2": (32_865_056, 6.06), "s-4": (32_920_448, 1.41), "s-8": (33_142_016, 0.36),
    "b-2": (130_315_808, 23.01), "b-4": (130_426_496, 5.56), "b-8": (130_869_248, 1.42),
    "l-2": (457_840_672, 80.71), "l-4": (457_988_224, 19.70), "l-8": (458_578_432, 5.01),
    "xl-2": (674_834_720, 118.64), "xl-4": (675_000_704, 29.05), "xl-8": (675_664_640, 7.39),
    "xl-2-512": (674_834_720, 524.60),
}  # fmt: skip


def test_the_published_sizes_have_their_parameters_and_multiplications():
    assert set(PUBLISHED) == set(SIZES) - {"tiny"}
    for name, (n_params, n_giga) in PUBLISHED.items():
        with torch.device("meta"):
            model = DiT(SIZES[name])
        assert sum(p.numel() for p in model.parameters()) == n_params, name
        assert n_macs(SIZES[name]) / 1e9 == pytest.approx(n_giga, rel=2e-3, abs=0.003), name
        if name == "xl-2":  # the number of the paper counts the fixed positions, too
            assert n_params + model.positions.numel() == 675_129_632


# --- the network


def test_a_new_model_returns_exactly_zero_and_its_blocks_are_the_identity():
    torch.manual_seed(0)
    model = DiT(SMALL)
    output = model(torch.randn(2, 3, 6, 6), torch.tensor([5, 900]), torch.tensor([0, 3]))
    assert output.shape == (2, 5, 6, 6) and output.eq(0).all()
    x = torch.randn(2, 9, 8)
    assert torch.equal(model.transformer_blocks[1](x, torch.randn(2, 8)), x)


def test_patches_are_read_channel_first_and_written_channel_last():
    model = small()
    with torch.no_grad():
        model.proj_out_1.weight.zero_(), model.proj_out_1.bias.zero_(), model.proj_out_2.weight.zero_()
        model.proj_out_2.bias.copy_(torch.arange(20.0))  # of a patch: row, column, channel
    output = model(torch.randn(1, 3, 6, 6), torch.tensor([3]), torch.tensor([1]))
    for channel in range(5):
        for row in range(6):
            for column in range(6):
                expected = (row % 2 * 2 + column % 2) * 5 + channel
                assert output[0, channel, row, column] == expected


def test_several_classes_are_summed_and_minus_one_is_left_out():
    model, t = small(), torch.tensor([4, 4])
    one = model.condition(t, torch.tensor([[2, -1], [-1, -1]]))
    torch.testing.assert_close(one[0], model.condition(t[:1], torch.tensor([2]))[0])
    rows = model.emb.class_embedder.embedding_table.weight
    torch.testing.assert_close(one[0] - one[1], rows[2])
    both = model.condition(t[:1], torch.tensor([[2, 3]]))
    torch.testing.assert_close(both[0], one[1] + rows[2] + rows[3])


def test_flops_are_those_of_the_matrix_products():
    model, B = small(), 3
    x, t = torch.randn(B, 3, 6, 6), torch.tensor([1, 2, 3])
    with FlopCounterMode(display=False) as counter:
        model(x, t, torch.tensor([0, 1, 2])).sum().backward()
    # Backward needs no gradient of the image, and none of the times' sines.
    first = 2 * B * (model.config.n_patches * model.pos_embed.proj.weight.numel() + 256 * 8)
    assert counter.get_total_flops() == B * model.flops_per_token() - first


def test_conditions_and_sizes_that_do_not_fit_are_refused():
    model, t = small(), torch.tensor([1])
    for arguments, words in (
        ((torch.randn(1, 3, 6, 6), t), "4 classes: expected those of each image"),
        ((torch.randn(1, 3, 8, 6), t, t), r"images of \(8, 6\): expected \(6, 6\)"),
        ((torch.randn(1, 3, 6, 6), t, t, torch.randn(1, 2, 8)), "a DiT reads no texts"),
    ):
        with pytest.raises(ValueError, match=words):
            model(*arguments)
    for changes, words in (
        ({"d_model": 10}, "d_model 10: expected a multiple of 4"),
        ({"image_size": 7}, "image_size 7: expected a multiple of 2"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(SMALL, **changes)


@pytest.mark.usefixtures("few_glyphs")
def test_the_task_of_ddpm_trains_it_and_its_model_opens_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judge, "STEPS", 2)
    monkeypatch.setattr(ddpm, "SAMPLER_STEPS", 2)
    flags = ["--steps", "2", "--batch-size", "4", "--set", "n_layers=1", "d_model=32", "--ema", "0.5"]
    assert train_py.main(["--model", "dit", *flags, "--out", str(tmp_path / "run")]) == 0
    assert "w = 2" in (tmp_path / "run" / "samples.txt").read_text()
    model = open_model(tmp_path / "run" / "model")
    assert type(model) is DiT and model.config.n_out == 1 and model.config.n_classes > 5
