"""The U-Net against diffusers (recorded), published sizes, conditions, and what files may say."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_vit import TOLERANCE, assert_gradients, assert_same_weights, shaken
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from formats import unet as formats_unet
from formats.diffusers import WEIGHTS
from formats.open_model import open_model
from vision import unet
from vision.convolutions import initialize
from vision.unet import Config, UNet

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = ("unet-plain", "unet-classes", "unet-text")
SMALL = Config((4, 8), (0, 1), 1, 1, 1, 8, n_classes=6, n_groups=2, kernels="reference")


def small(**changes):
    torch.manual_seed(0)
    return shaken(UNet(replace(SMALL, **changes)))


# --- against diffusers


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_those_of_diffusers(name):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    model = open_model(FIXTURES / name)
    assert type(model) is UNet and model.config.channels == (4, 8)
    output = model(expected["x"], expected["t"], expected.get("classes"), expected.get("text"))
    torch.testing.assert_close(output, expected["output"], **TOLERANCE)
    output.square().mean().backward()
    assert_gradients(model, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_written_model_has_the_files_that_diffusers_writes(tmp_path, name):
    open_model(FIXTURES / name).save_pretrained(tmp_path)
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path, FIXTURES / name))
    assert {key: theirs[key] for key in ours if not key.startswith("_d")} == {
        key: value for key, value in ours.items() if not key.startswith("_d")
    }
    assert_same_weights(tmp_path, FIXTURES / name, WEIGHTS)


def test_published_sizes_have_the_published_numbers_of_parameters(capsys):
    unet.main([])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert {line[0]: line[1] for line in lines[1:]} == {
        "ddpm-32": "35,746,307",
        "ddpm-256": "113,673,219",
        "stable-diffusion-1": "859,520,964",
    }


def test_old_names_of_attention_are_read(tmp_path):
    folder = shutil.copytree(FIXTURES / "unet-plain", tmp_path / "old")
    new = {new: old for old, new in formats_unet.OLD.items()}
    weights = load_file(folder / WEIGHTS)
    renamed = {}
    for name, w in weights.items():
        for after, before in new.items():
            name = name.replace(after, before)
        renamed[name] = w
    assert renamed.keys() != weights.keys()
    save_file(renamed, folder / WEIGHTS)
    again = open_model(folder).state_dict()
    assert all(torch.equal(w, again[name]) for name, w in weights.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet1DModel"}, "architecture 'UNet1DModel': expected"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "down_block_types .* is not implemented"),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "those of down_block_types, in reverse"),
        ({"resnet_time_scale_shift": "scale_shift"}, "'scale_shift' is not implemented"),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep' is not implemented"),
        ({"layers_per_block": 2}, "has shape"),
        ({"num_class_embeds": 3}, "class_embedding.weight is missing"),
        ({"block_out_channels": [4, 9]}, "expected multiples of"),
        ({"layers_per_block": 10**9}, "expected at most"),
        ({"sample_size": 9}, "image_size 9: expected a multiple of 2"),
        ({"norm_eps": "small"}, "norm_eps 'small': expected a number"),
        ({"block_out_channels": [4, "8"]}, "config.json"),
    ],
)  # fmt: skip
def test_what_a_file_may_not_say_is_named(tmp_path, change, message):
    folder = shutil.copytree(FIXTURES / "unet-plain", tmp_path / "copy")
    hf = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match=message):
        open_model(folder)


def test_heads_of_one_number_cannot_be_written_where_the_class_counts_their_width(tmp_path):
    with pytest.raises(ValueError, match="n_heads 2: UNet2DModel has heads of one width"):
        small(n_heads=2).save_pretrained(tmp_path)
    small(d_head=4).save_pretrained(tmp_path)
    assert open_model(tmp_path).config == replace(SMALL, d_head=4, kernels="auto")


# --- alone


def test_sines_stand_before_cosines_or_behind_them():
    t = torch.tensor([0, 500])
    # 1 / 10,000 is the last frequency with a shift of 1, and just above it without.
    of_ddpm = unet.time_embedding(t, 4, cos_first=False, freq_shift=1)
    angles = torch.tensor([500.0, 0.05])
    torch.testing.assert_close(of_ddpm[1], torch.cat((angles.sin(), angles.cos())))
    angles = torch.tensor([500.0, 5.0])
    torch.testing.assert_close(unet.time_embedding(t, 4)[1], torch.cat((angles.cos(), angles.sin())))
    assert of_ddpm[0].tolist() == [0, 0, 1, 1]


def test_a_new_model_predicts_zeros_and_each_of_its_weights_learns_soon():
    torch.manual_seed(0)
    model, x = UNet(SMALL), torch.randn(2, 1, 8, 8)
    t, classes = torch.tensor([5, 900]), torch.tensor([[1, 3], [5, -1]])
    assert not model(x, t, classes).any()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(4):  # zeros in the last layers hold back what is behind them
        optimizer.zero_grad()
        (model(x, t, classes) - x).square().mean().backward()
        optimizer.step()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_several_classes_are_summed_and_minus_one_is_none():
    model, x, t = small(), torch.randn(1, 1, 8, 8), torch.tensor([70])
    words, padded = model(x, t, torch.tensor([[2, 4]])), model(x, t, torch.tensor([[4, -1, 2]]))
    torch.testing.assert_close(words, padded)
    assert not torch.allclose(words, model(x, t, torch.tensor([2])))
    with torch.no_grad():
        model.class_embedding.weight[5] = model.class_embedding.weight[[2, 4]].sum(0)
    torch.testing.assert_close(words, model(x, t, torch.tensor([5])))


def test_vectors_of_classes_are_added_to_that_of_the_time_and_checked():
    model, x, t = small(class_vectors=True, n_classes=0), torch.randn(2, 1, 8, 8), torch.tensor([70, 3])
    vectors = torch.randn(2, 16)
    added = model.condition(t, vectors, torch.float32) - model.condition(t, 0 * vectors, torch.float32)
    torch.testing.assert_close(added, vectors)
    with pytest.raises(ValueError, match=r"none: expected vectors of \(2, 16\)"):
        model(x, t)
    with pytest.raises(ValueError, match=r"classes of \(2,\): expected vectors of \(2, 16\)"):
        model(x, t, torch.tensor([1, 2]))


def test_a_text_changes_the_prediction_and_a_missing_condition_is_named():
    model, x, t = small(d_text=6, n_classes=0), torch.randn(1, 1, 8, 8), torch.tensor([70])
    one, other = (model(x, t, text=torch.randn(1, 3, 6)) for _ in range(2))
    assert not torch.allclose(one, other)
    with pytest.raises(ValueError, match=r"states of a text: none; expected \(B, T, "):
        model(x, t)
    with pytest.raises(ValueError, match="6 classes: expected those of each image"):
        small()(x, t)
    with pytest.raises(ValueError, match="expected none"):
        small()(x, t, torch.tensor([1]), torch.randn(1, 3, 6))
    with pytest.raises(ValueError, match="expected multiples of 2"):
        small()(torch.randn(1, 1, 9, 8), t, torch.tensor([1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_text": 8, "d_head": 4}, "d_head 4: a U-Net that reads texts has n_heads"),
        ({"channels": (2, 4), "attention": (0, 0), "n_groups": 2}, "expected more than 2 at first"),
        ({"padding": 2}, "padding"),
        ({"class_vectors": True, "n_classes": 3}, "n_classes 3: classes are vectors here"),
    ],
)
def test_settings_that_would_be_left_out_or_give_no_number_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        unet.Config(**{"channels": (8, 16), "attention": (0, 1), "n_groups": 4} | changes)


def test_a_parameter_without_a_rule_of_initialisation_is_named():
    module = nn.Linear(2, 2)
    module.gain = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="parameter gain: no rule"):
        initialize(module)


def test_dropout_acts_in_training_alone():
    model, x, t = small(dropout=0.5), torch.randn(1, 1, 8, 8), torch.tensor([70])
    classes = torch.tensor([1])
    assert not torch.allclose(model(x, t, classes), model(x, t, classes))
    model.eval()
    assert torch.equal(model(x, t, classes), model(x, t, classes))


@pytest.mark.parametrize("changes", [{}, {"n_classes": 0, "d_text": 6, "n_heads": 2, "n_layers": 2}])
def test_the_flops_are_those_that_pytorch_counts(changes):
    model, x, t = small(**changes), torch.randn(1, 1, 8, 8), torch.tensor([70])
    condition = {"text": torch.randn(1, 5, 6)} if "d_text" in changes else {"classes": torch.tensor([1])}
    with FlopCounterMode(display=False) as counter:
        model(x, t, **condition)
    assert counter.get_total_flops() == 2 * unet.n_macs(model, 5)
    assert model.flops_per_token(1) == 6 * unet.n_macs(model)
