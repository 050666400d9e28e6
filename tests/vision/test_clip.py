"""CLIP and SigLIP against transformers (recorded), closed forms of the losses, two ranks, and small runs."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import run_command
from forks import Forked
from PIL import Image
from safetensors.torch import load_file
from small_vit import TOLERANCE, assert_gradients
from torch.utils.flop_counter import FlopCounterMode

from data import captions
from data.tokenizer import get_tokenizer
from engine import optim, parallel
from formats.open_model import open_model
from vision import clip
from vision.clip import CLIP, SIZES, Config

FIXTURES = Path(__file__).parents[1] / "fixtures"
SMALL = Config(
    *(2, 2, 16, 24, 1, 2, 12, 20, 8), image_size=8, patch_size=4, n_channels=1, vocab_size=11, max_seq_len=6,
    eos_token_id=10, mean=(0.5,), std=(0.5,), kernels="reference",
)  # fmt: skip
SIGLIP = replace(SMALL, layout="siglip", objective="sigmoid", d_joint=16, mlp="gelu_tanh")
KINDS = {"clip": SMALL, "siglip": SIGLIP}


def small(config=SMALL):
    torch.manual_seed(0)
    model = CLIP(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("logit_"):
                p.add_(0.1 * torch.randn_like(p))
    return model


def batch_of(n=4):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 10, (n, 6), generator=generator)
    tokens[:, 4:] = 10
    return {"images": torch.rand(n, 1, 8, 8, generator=generator), "tokens": tokens}


# --- against transformers


@pytest.mark.parametrize("name", ["clip", "siglip", "largest"])
def test_logits_loss_and_gradients_are_those_of_transformers(name, tmp_path):
    folder = FIXTURES / ("siglip" if name == "siglip" else "clip")
    expected = load_file(folder / "expected.safetensors")
    pixels, tokens = expected["pixels"], expected["tokens"]
    if name == "largest":  # of the ids, which an old file means by this id
        folder = shutil.copytree(folder, tmp_path / "m")
        hf = json.loads((folder / "config.json").read_text())
        hf["text_config"]["eos_token_id"] = 2
        (folder / "config.json").write_text(json.dumps(hf))
        expected = {k.removeprefix("largest."): t for k, t in expected.items() if k.startswith("largest.")}
    model = open_model(folder)
    assert type(model) is CLIP and model.config.read_largest == (name == "largest")
    torch.testing.assert_close(model(pixels, tokens), expected["logits"], **TOLERANCE)
    loss, _ = model.compare(model.encode_images(pixels), model.encode_texts(tokens))
    torch.testing.assert_close(loss, expected["loss"], **TOLERANCE)
    loss.backward()
    expected["gradient.logit_scale"] = expected["gradient.logit_scale"].reshape(1)
    assert_gradients(model, {k: t for k, t in expected.items() if not k.startswith("largest.")})


def test_both_ways_of_reading_a_text_differ_in_the_fixture():
    expected = load_file(FIXTURES / "clip" / "expected.safetensors")
    assert (expected["logits"] - expected["largest.logits"]).abs().max() > 0.01


@pytest.mark.parametrize(
    "size, n_params, of_vision",  # [C] of the reference; Radford et al. 2021, Zhai et al. 2023
    [
        ("b-32", 151_277_313, 87_849_216),
        ("b-16", 149_620_737, 86_192_640),
        ("l-14", 427_616_513, 303_966_208),
        ("l-14-336", 427_944_193, 304_293_888),
        ("h-14", 986_109_441, 632_076_800),
        ("g-14", 1_366_678_273, 1_012_645_632),
        ("big-g-14", 2_539_567_105, 1_844_907_264),
        ("siglip-b-16", 203_155_970, 92_884_224),
    ],
)
def test_published_sizes_have_the_published_numbers_of_parameters(size, n_params, of_vision):
    with torch.device("meta"):
        model = CLIP(SIZES[size])
    assert sum(p.numel() for p in model.parameters()) == n_params
    projection = [*model.visual_projection.parameters()] if size != "siglip-b-16" else []
    tower = [*model.vision_model.parameters(), *projection]
    assert sum(p.numel() for p in tower) == of_vision


def test_flops_are_those_of_the_matrix_products():
    model = small()
    with FlopCounterMode(display=False) as counter:
        model.encode_images(torch.rand(4, 1, 8, 8)).sum().backward()
        model.encode_texts(batch_of()["tokens"]).sum().backward()
    first = 4 * 2 * 16 * 16 * 4  # backward needs no gradient of the images
    assert 4 * model.flops_per_token(6) - first == counter.get_total_flops()


# --- files


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_saved_model_is_read_back_to_the_bit_and_opened_by_transformers(name, tmp_path):
    from transformers import AutoModel, CLIPModel, SiglipModel

    model = small(KINDS[name]).eval()
    model.save_pretrained(tmp_path)
    again = open_model(tmp_path, kernels="reference")
    assert again.config == replace(model.config, eos_token_id=again.config.eos_token_id)
    assert name == "siglip" or again.config.eos_token_id == 10
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], w) for key, w in model.state_dict().items())

    theirs = AutoModel.from_pretrained(tmp_path).eval()
    assert type(theirs) is {"clip": CLIPModel, "siglip": SiglipModel}[name]
    batch = batch_of()
    pixels = model.normalized(batch["images"])
    done = theirs(input_ids=batch["tokens"], pixel_values=pixels, return_loss=True)
    torch.testing.assert_close(done.logits_per_image, model(pixels, batch["tokens"]), **TOLERANCE)
    torch.testing.assert_close(done.loss, model.loss(batch)[0], **TOLERANCE)
    preprocessor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert preprocessor["image_mean"] == [0.5] and preprocessor["crop_size"] == {"height": 8, "width": 8}


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_pixels_are_normalised_as_a_processor_that_transformers_5_saved_does(name, tmp_path):
    """It writes one file for the images and the tokenizer, which comes first where there is an older one."""
    import transformers

    folder = shutil.copytree(FIXTURES / name, tmp_path / "m")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1], "image_std": [0.1]}')
    assert open_model(folder).config.mean == (0.1,)
    kind = {"clip": "CLIP", "siglip": "Siglip"}[name]
    get_tokenizer("bytes").save(tmp_path)
    parts = {"tokenizer": transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)}
    statistics = {"image_mean": [0.2, 0.3, 0.4], "image_std": [0.5, 0.6, 0.7]}
    parts["image_processor"] = getattr(transformers, f"{kind}ImageProcessor")(**statistics)
    getattr(transformers, f"{kind}Processor")(**parts).save_pretrained(folder)
    config = open_model(folder).config
    assert (config.mean, config.std) == ((0.2, 0.3, 0.4), (0.5, 0.6, 0.7))

    path = folder / "processor_config.json"
    path.write_text(json.dumps({"image_processor": 3}))
    with pytest.raises(ValueError, match=r"processor_config\.json: image_processor 3: expected an object"):
        open_model(folder)


@pytest.mark.parametrize(
    "changes", [{"objective": "sigmoid"}, {"eos_token_id": 2}, {"layout": "siglip", "d_joint": 16}]
)
def test_what_no_class_of_transformers_has_is_saved_in_our_own_layout(changes, tmp_path):
    model = small(replace(SMALL, **changes))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["plinth.vision.clip"]
    again = open_model(tmp_path)
    assert replace(again.config, kernels="reference") == model.config
    batch = batch_of()
    batch["tokens"][:, 4:] = model.config.eos_token_id
    torch.testing.assert_close(again.loss(batch)[0], model.loss(batch)[0])


def test_the_settings_of_towers_in_old_files_go_first_and_unequal_ones_are_refused(tmp_path):
    folder = shutil.copytree(FIXTURES / "clip", tmp_path / "m")
    hf = json.loads((folder / "config.json").read_text())

    def write(**changes):
        (folder / "config.json").write_text(json.dumps(hf | changes))

    text = hf["text_config"]
    write(text_config=text | {"hidden_size": 99}, text_config_dict={"hidden_size": 12})
    assert CLIP.from_pretrained(folder).config.text_width == 12
    write(text_config=text | {"hidden_act": "gelu"})
    with pytest.raises(ValueError, match="mlp gelu of the text tower, quick_gelu of the image tower"):
        CLIP.from_pretrained(folder)
    write(text_config=None, vision_config=None)  # the defaults of transformers, which are B/32's
    with pytest.raises(ValueError, match=r"layers|shape"):
        CLIP.from_pretrained(folder)
    write(rope=True)
    with pytest.raises(ValueError, match="rope True is not implemented"):
        CLIP.from_pretrained(folder)
    with pytest.raises(ValueError, match="d_joint 8: expected d_model 16"):
        replace(SMALL, layout="siglip")
    with pytest.raises(ValueError, match="eos_token_id 11: expected less than 11"):
        replace(SMALL, eos_token_id=11)


# --- the losses


def test_the_losses_have_their_closed_forms():
    model, sigmoid = small(), small(SIGLIP)
    equal, apart = torch.ones(4, 8) / math.sqrt(8), torch.eye(4, 8)
    # Equal vectors: one of B at random.
    assert model.compare(equal, equal)[0].item() == pytest.approx(math.log(4), abs=1e-6)
    # A perfect match, all others at right angles: ln(1 + (B - 1) e^-a).
    model.logit_scale.data.fill_(math.log(3))
    loss, found = model.compare(apart, apart)
    assert loss.item() == pytest.approx(math.log(1 + 3 * math.exp(-3)), abs=1e-6) and found == 1
    # SigLIP: all at right angles before training, and a perfect match.
    value = sigmoid.compare(apart[:2], apart[2:])[0].item()
    assert value == pytest.approx(math.log1p(math.exp(10)) + math.log1p(math.exp(-10)), abs=1e-5)
    value = sigmoid.compare(apart, apart)[0].item()
    assert value == pytest.approx(math.log(2) + 3 * math.log1p(math.exp(-10)), abs=1e-6)


def test_the_temperature_is_held_after_the_step_and_has_no_decay():
    model, free = small(), small(SIGLIP)
    for value, held in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        for one, expected in ((model, held), (free, value)):
            one.logit_scale.data.fill_(value)
            clip.after_step(one, torch.tensor(True))
            assert one.logit_scale.item() == pytest.approx(expected)
    # Outside of the bounds its gradient is that of the loss, not zero.
    model.logit_scale.data.fill_(9.0)
    model.loss(batch_of())[0].backward()
    assert model.logit_scale.grad.abs().item() > 1e-3
    scalars = {"logit_scale", "logit_bias"}
    for name, p in free.named_parameters():
        assert not (name in scalars and optim.decays(name, p))


def test_autocast_leaves_the_similarities_alone():
    model, batch = small(), batch_of()
    x, y = model.encode_images(batch["images"]), model.encode_texts(batch["tokens"])
    expected = model.compare(x, y)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model.compare(x, y)[0], expected)


def train_on(rank: int, n: int, name: str, shards: bool, out: str) -> int:
    """Write the mean gradient of n ranks, each with its part of one batch, and the mean of their losses."""
    if n > 1:
        group = {"init_method": f"file://{out}/group-{name}-{shards}", "rank": rank, "world_size": n}
        dist.init_process_group("gloo", **group)
    model = small(KINDS[name])
    if shards:
        from argparse import Namespace

        objective = parallel.Objective(model, clip.Model.loss)
        parallel.shard(objective, Namespace(device="cpu", dtype="float32"))
        compute = objective
    else:
        compute = model.loss
    batch = batch_of()
    loss, metrics = compute(clip.split(batch, rank, n) if n > 1 else batch)
    loss.backward()
    mean = {key: parallel.unshard(p.grad) for key, p in model.named_parameters()}
    if not shards:
        mean = {key: parallel.all_reduce_sum(g) / n for key, g in mean.items()}
    mean["loss"] = parallel.all_reduce_sum(loss.detach()) / n
    mean["found"] = parallel.all_reduce_sum(metrics["found"]) / n
    # The temperature is held on every rank, also where it has no part of it.
    model.logit_scale.data.fill_(9.0)
    clip.after_step(model, torch.tensor(True))
    mean["held"] = parallel.unshard(model.logit_scale.detach())
    if rank == 0:
        torch.save(mean, f"{out}/{name}-{n}-{shards}.pt")
    if n > 1:
        dist.destroy_process_group()
    return 0


@pytest.mark.parametrize("name, shards", [("clip", False), ("siglip", False), ("clip", True)])
def test_two_ranks_compute_the_loss_and_the_gradients_of_one(name, shards, tmp_path):
    ranks = [Forked(train_on, rank, 2, name, shards, str(tmp_path)) for rank in range(2)]
    train_on(0, 1, name, False, str(tmp_path))
    for rank in ranks:
        assert rank.end() == 0, rank.said()
    one, two = (torch.load(tmp_path / f"{name}-{end}.pt") for end in ("1-False", f"2-{shards}"))
    assert one.keys() == two.keys() and one["loss"] > 0.5 and len(one) > 40
    for key, expected in one.items():
        torch.testing.assert_close(two[key], expected, rtol=1e-4, atol=1e-6, msg=key)


# --- the task


@pytest.fixture
def few_scenes(monkeypatch):
    """Let the scenes be 24 to learn from and 2 x 4 held out."""
    monkeypatch.setattr(captions, "N_SCENES", 24)
    monkeypatch.setattr(captions, "N_HELD_OUT", 4)


def train(out, *flags, code=0):
    """Run train.py with a model of two layers, and return what ended."""
    small = ["n_layers=1", "d_model=32", "d_ff=32", "text_layers=1", "text_width=32", "text_ff=32"]
    flags = [*flags, "--cache", out.parent / "cache", "--log-every", "1"]
    if not {"--init-from", "--set"} & set(map(str, flags)):
        flags += ["--set", *small, "d_joint=16", "warp=0"]
    ended = run_command("train.py", "--model", "clip", *flags, "--out", out)
    assert ended.code == code, ended.err
    return ended


def rows_of(out, *keys):
    """Return these values of each row of a run's metrics."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [[row.get(key) for key in keys] for row in rows]


def test_a_run_learns_to_find_captions_and_leaves_a_model_that_names_and_searches(tmp_path, few_glyphs):
    ended = train(tmp_path / "run", "--steps", "40", "--eval-every", "40", "--batch-size", "9")
    assert "a guess finds a caption among 9 in 11.11%, with a loss of 2.197" in ended.out
    losses = [loss for (loss,) in rows_of(tmp_path / "run", "loss") if loss is not None]
    assert losses[0] > 1.5 and losses[-1] < 0.3
    text = (tmp_path / "run" / "samples.txt").read_text().rpartition("=== step")[2]
    for line in (
        "recall@1, image to text (chance 16.7%)",
        "zero-shot character (chance 33.3%)",
        "zero-shot both (chance 6.7%)",
        "  1 roman latin capital letter a",
    ):
        assert line in text
    assert (tmp_path / "run" / "picture.png").stat().st_size > 1000

    # It opens in transformers with its tokenizer, and here.
    from transformers import AutoTokenizer, CLIPModel

    directory = tmp_path / "run" / "model"
    model, theirs = open_model(directory), CLIPModel.from_pretrained(directory)
    ids = AutoTokenizer.from_pretrained(directory)("bold sans digit seven").input_ids
    tokens = torch.tensor([[*ids, model.config.eos_token_id]])
    pixels = model.normalized(torch.rand(1, 1, 32, 32))
    done = theirs(input_ids=tokens, pixel_values=pixels)
    torch.testing.assert_close(done.logits_per_image, model(pixels, tokens), **TOLERANCE)

    # Search a folder, and name what is in it.
    known = captions.glyph_parts("glyphs")[0]
    for i, kind in ((0, "A"), (1, "b"), (3, "A"), (4, "b")):
        (tmp_path / "images" / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(known.images[i][0]).save(tmp_path / "images" / kind / f"{i}.png")
    (tmp_path / "images" / "A" / "broken.png").write_bytes(b"no image")
    words = ["-m", "vision.clip", directory, "--images", tmp_path / "images"]
    done = run_command(*words, "--query", known.captions[4][0], "--top", "2")
    assert done.code == 0 and "skipped" in done.err and "broken.png: not an image" in done.err
    assert len(done.out.splitlines()) == 2 and done.out.splitlines()[0].endswith("4.png")
    prompts = ["--templates", "sans latin {}", "serif latin {}"]
    done = run_command(*words, "--labels", "capital letter a", "small letter b", *prompts)
    first = [line.partition(": ")[2].startswith("capital letter a") for line in done.out.splitlines()]
    assert first == [True, True, False, False]
    done = run_command(*words)
    assert "right (chance 50.0%)" in done.out and "A/0.png: " in done.out


def test_a_run_on_scenes_is_resumed_to_the_bit_and_trained_further(tmp_path, few_scenes):
    flags = ["--data", "scenes", "--batch-size", "8", "--schedule", "constant", "--warmup", "0"]
    flags += ["--save-every", "2", "--eval-every", "2"]
    ended = train(tmp_path / "whole", *flags, "--steps", "4")
    assert "24 images of 32 x 32 to learn from, 8 held out; 32 captions" in ended.out
    train(tmp_path / "parts", *flags, "--steps", "2")
    train(tmp_path / "parts", *flags, "--steps", "4", "--resume")
    keys = ("step", "loss", "val_loss", "scale")
    assert rows_of(tmp_path / "whole", *keys) == rows_of(tmp_path / "parts", *keys)
    text = (tmp_path / "whole" / "samples.txt").read_text()
    for name in ("recall@1, text to image, unseen pairs", "against colours swapped", "against relation"):
        assert name in text
    train(tmp_path / "more", *flags[:4], "--steps", "1", "--init-from", tmp_path / "whole" / "model")


def test_siglip_is_trained_too_and_pads_its_texts_to_their_full_length(tmp_path, few_glyphs):
    small = ["n_layers=1", "text_layers=1", "layout=siglip", "objective=sigmoid"]
    flags = ["--steps", "1", "--batch-size", "9", "--seq-len", "40", "--set", *small]
    # The smallest loss of equal logits: ln 9 + 8 ln (9 / 8).
    assert "with a loss of 3.139" in train(tmp_path / "run", *flags).out
    model = open_model(tmp_path / "run" / "model")
    assert model.config.layout == "siglip" and hasattr(model, "logit_bias")
    assert model.config.max_seq_len == 40  # to which a trained model pads texts, too

    # A trained model goes on with its own length, and shorter captions.
    args = clip.Namespace(document_mask=False, batch_size=9, init_from="run", data="glyphs", val=None)
    vars(args).update(cache=tmp_path, bad_text="refuse", tokenizer="bytes", seq_len=12)
    rows = clip.load_data(args, model.config).train.tokens
    assert rows.shape[1] == args.seq_len == 40 and (rows[:, 11:] == 256).all()


@pytest.mark.parametrize("n, objective", [(9, "sigmoid"), (9, "softmax"), (256, "sigmoid")])
def test_the_loss_of_a_guess_is_the_smallest_of_equal_logits(n, objective, tmp_path, few_glyphs):
    args = clip.Namespace(document_mask=False, batch_size=n, init_from=None, data="glyphs", val=None)
    vars(args).update(cache=tmp_path, bad_text="refuse", tokenizer="bytes", seq_len=40)
    config = replace(SMALL, image_size=32, patch_size=8, objective=objective)
    shown = float(clip.load_data(args, config).guess.rpartition(" ")[2])
    signs = 2 * torch.eye(n) - 1
    losses = []
    for logit in torch.linspace(-8, 2, 4001):
        row = -torch.nn.functional.logsigmoid(signs[0] * logit).sum()
        losses.append(row.item() if objective == "sigmoid" else math.log(n))
    assert shown == pytest.approx(min(losses), abs=1e-3)


def test_a_size_of_coloured_images_learns_from_grey_ones_too(few_glyphs):
    dataset = captions.as_dataset(captions.read("glyphs", (224, 224), Path()), get_tokenizer("bytes"), 77)
    config = clip.fit(SIZES["b-32"], dataset, 77)
    assert config.n_channels == 1 and config.max_seq_len == 77
    assert config.mean == (pytest.approx(0.449, abs=1e-3),) and len(config.std) == 1
    assert clip.fit(replace(SIZES["b-32"], n_channels=1, mean=(0.5,), std=(0.5,)), dataset, 9).mean == (0.5,)
    assert clip.fit(SIZES["siglip-b-16"], dataset, 40).max_seq_len == 40


def test_what_makes_no_sense_is_refused(tmp_path, few_glyphs):
    ended = train(tmp_path / "run", "--batch-size", "1", code=2)
    assert "--batch-size 1: expected at least 2" in ended.err
    ended = train(tmp_path / "run", "--document-mask", code=2)
    assert "--document-mask: captions are rows" in ended.err
    ended = train(tmp_path / "run", "--dry-run", "1", code=2)
    assert "--dry-run: not yet planned for images with texts" in ended.err
    small().save_pretrained(tmp_path / "m")
    for flags, words in (
        ([], "expected --images FOLDER"),
        (["--images", tmp_path / "nowhere"], "nowhere: no such folder; expected one that holds images"),
        (
            ["--images", tmp_path, "--query", "a", "--top", "0"],
            "--top: 0: expected a whole number of at least 1",
        ),
        (["--images", tmp_path / "m"], "no images; expected files of .png"),
        (["--images", tmp_path, "--labels", "a", "--templates", "x"], "expected {} in the place"),
    ):
        ended = run_command("-m", "vision.clip", tmp_path / "m", *flags)
        assert ended.code == 2 and words in ended.err
    assert "b-32           151,277,313" in run_command("-m", "vision.clip").out
    ended = run_command("-m", "vision.clip", "--images", tmp_path)
    assert ended.code == 2 and "no model: expected its directory" in ended.err
