"""DDPM: its loss, times and dropped words, drawing by a known denoiser, words, and small runs."""

import json
import signal
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_gpt import die_in, forked, same_run
from torch import nn

import train as train_py
from data.rows import stack
from engine import contract
from formats import schedules
from formats.open_model import open_model
from vision import conditions, ddpm, judge, noise, unet
from vision.conditions import Words
from vision.ddpm import Config, Diffusion

WORDS = Words(("bar", "blue", "red", "ring"))


class Known(nn.Module):
    """A denoiser that returns x_0 of one grey by the first class; the last class stands for none."""

    def __init__(self, greys, size=4):
        super().__init__()
        self.greys = nn.Parameter(torch.tensor(greys))
        self.config = Namespace(n_channels=1, size=(size, size), n_classes=len(greys))
        self.read = []

    def forward(self, x, t, classes):
        self.read.append((t.tolist(), classes.tolist()))
        return self.greys[classes[:, 0]][:, None, None, None].expand_as(x)


def rows(n, train=True, width=2):
    tokens = np.full((n, width), -1)
    tokens[:, 0] = np.arange(n) % 4
    image = np.full((1, 4, 4), 51, np.uint8)
    return [{"image": image, "tokens": row, "augment": np.array(train)} for row in tokens]


def batch_of(config=None, n=8, train=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return ddpm.make_batch(rows(n, train), config or Config(), generator, WORDS)


# --- the objective


@pytest.mark.parametrize("target", noise.KINDS)
def test_the_loss_is_the_squared_error_of_the_target(target):
    config = Config(target=target, drop=0.0)
    batch = batch_of(config)
    module = Diffusion(Known([0.1, -0.3, 0.5, 0.2, 0.0]), config)
    grey = torch.tensor([0.1, -0.3, 0.5, 0.2]).repeat(2)[:, None, None, None]
    a = config.alpha_bar[batch["t"]].float()[:, None, None, None]
    x0 = torch.full_like(batch["noise"], 2 * 0.2 - 1)
    truth = {"x0": x0, "eps": batch["noise"], "v": a.sqrt() * batch["noise"] - (1 - a).sqrt() * x0}[target]
    expected = (grey - truth).square().mean()
    found, metrics = ddpm.loss(module, batch)
    torch.testing.assert_close(found, expected)
    assert metrics == {}


def test_a_batch_holds_all_times_evenly_and_many_hold_each():
    for seed in range(3):
        assert sorted(batch_of(Config(n_steps=8), n=8, seed=seed)["t"].tolist()) == list(range(8))
    times = torch.cat([batch_of(Config(n_steps=50), n=8, seed=seed)["t"] for seed in range(60)])
    assert sorted(set(times.tolist())) == list(range(50))  # 0 and 49 among them
    assert not torch.equal(batch_of(seed=1)["t"], batch_of(seed=2)["t"])
    again = batch_of(seed=1)
    assert all(torch.equal(tensor, again[name]) for name, tensor in batch_of(seed=1).items())


def test_a_tenth_of_the_images_to_learn_from_lose_all_of_their_words():
    batch = batch_of(n=4000)
    lost = (batch["classes"][:, 0] == WORDS.none) & (batch["classes"][:, 1] == -1)
    assert 0.08 < lost.float().mean() < 0.12
    kept = batch["classes"][~lost]
    assert torch.equal(kept, torch.from_numpy(stack(rows(4000))["tokens"].numpy())[~lost])
    held = batch_of(n=400, train=False)["classes"]
    assert not (held == WORDS.none).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "score"}, "target 'score': expected v or x0 or eps"),
        ({"drop": 1.0}, "drop 1.0: expected less than 1"),
        ({"target": "eps", "zero_terminal": True}, "expected target=v or target=x0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


# --- drawing


def test_what_is_drawn_is_what_the_denoiser_sees_and_guidance_goes_beyond_it():
    model = Known([0.2, -0.4, 0.0])
    module = Diffusion(model, Config(target="x0"))
    classes = torch.tensor([[0, -1], [1, -1]])
    for guidance, greys in ((1.0, (0.2, -0.4)), (2.0, (0.4, -0.8)), (4.0, (0.8, -1.0))):
        drawn = module.draw(classes, 2, guidance=guidance, steps=5)
        expected = torch.tensor(greys)[:, None, None, None].expand(2, 1, 4, 4)
        torch.testing.assert_close(2 * drawn - 1, expected)  # -1.6 is clipped to -1
    # Guided, both predictions are one batch; alone, the one without words is not computed.
    times, read = model.read[-1]
    assert times == [199] * 4 and read == [[0, -1], [1, -1], [2, -1], [2, -1]]
    assert model.read[0] == ([999, 999], [[0, -1], [1, -1]])


def test_drawing_is_the_same_from_the_same_seed():
    torch.manual_seed(0)
    model = unet.UNet(unet.Config((4, 8), (0, 1), 1, 1, 1, 8, n_groups=2))
    nn.init.normal_(model.conv_out.weight, std=0.1)
    module = Diffusion(model.eval(), Config())
    options = {"steps": 3, "eta": 1.0}
    one, same = (module.draw(None, 2, seed=4, **options) for _ in range(2))
    assert torch.equal(one, same) and not torch.equal(one, module.draw(None, 2, seed=5, **options))
    assert one.shape == (2, 1, 8, 8) and one.min() >= 0 and one.max() <= 1


# --- words and files


def test_words_are_numbered_each_once_and_unknown_ones_are_named():
    words = conditions.learned(["A red ring", "a blue-green ring, in red"])
    assert words.names == ("a", "blue-green", "in", "red", "ring") and words.none == 5 == words.n_vocab - 1
    assert words.encode("Ring RED ring") == [4, 3]
    assert words.table(["red", "a red ring", "violet"]).tolist() == [[3, -1, -1], [0, 3, 4], [5, -1, -1]]
    with pytest.raises(ValueError, match=r"word 'rings': none of the 5 .* near it: ring"):
        words.encode("red rings")
    with pytest.raises(ValueError, match="no word"):
        words.encode(" ,")
    classes = Words(("golden retriever", "tabby"), are_classes=True)
    assert classes.encode("golden retriever") == [0]
    with pytest.raises(ValueError, match="class 'retriever': none of the 2"):
        classes.encode("retriever")


def test_words_are_kept_in_a_file(tmp_path):
    WORDS.save(tmp_path)
    assert conditions.read_words(tmp_path) == WORDS
    assert conditions.read_words(tmp_path / "none") is None
    (tmp_path / conditions.FILE).write_text('{"names": [1]}')
    with pytest.raises(ValueError, match="expected a list of words"):
        conditions.read_words(tmp_path)


def arguments(tmp_path, data, **changes):
    options = {"data": str(data), "val": None, "cache": tmp_path / "cache", "bad_text": "refuse"}
    return Namespace(**options | {"init_from": None, "document_mask": False} | changes)


def folder_of_images(path, n):
    path.mkdir(parents=True)
    for i in range(n):
        Image.new("RGB", (8, 8), (20 * i, 90, 60)).save(path / f"{i}.png")


def test_folders_class_folders_and_captions_give_no_classes_or_words(tmp_path):
    config = unet.Config((4, 8), (0, 1), image_size=8, n_groups=2)
    folder_of_images(tmp_path / "flat", 10)
    plain = conditions.load(arguments(tmp_path, tmp_path / "flat"), config)
    assert plain.tokenizer is None and plain.train[0]["image"].shape == (3, 8, 8)
    assert unet.fit(config, plain, 1).n_classes == 0
    generator = torch.Generator().manual_seed(0)
    assert "classes" not in ddpm.make_batch([plain.train[0]], Config(), generator, None)

    for name in ("cat", "dog"):
        folder_of_images(tmp_path / "classes" / name, 10)
    classes = conditions.load(arguments(tmp_path, tmp_path / "classes"), config)
    assert classes.tokenizer == Words(("cat", "dog"), are_classes=True)
    assert unet.fit(config, classes, 1).n_classes == 3
    batch = ddpm.make_batch([classes.val[0], classes.val[1]], Config(), generator, classes.tokenizer)
    assert batch["classes"].tolist() == [[0], [1]]

    lines = [
        {"image": f"flat/{i}.png", "caption": f"a {'red' if i % 2 else 'blue'} square"} for i in range(10)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = conditions.load(arguments(tmp_path, tmp_path / "pairs.jsonl"), config)
    assert set(pairs.tokenizer.names) == {"a", "red", "blue", "square"}
    assert pairs.train[0]["tokens"].shape == (3,)
    assert judge.of(pairs) is None
    # A trained model keeps its words.
    WORDS.save(tmp_path)
    again = conditions.load(arguments(tmp_path, tmp_path / "pairs.jsonl", init_from=tmp_path), config)
    assert again.tokenizer == WORDS


def test_data_that_do_not_fit_a_trained_model_say_what_both_have(tmp_path):
    for name in ("classes/cat", "classes/dog"):
        folder_of_images(tmp_path / name, 3)
    (tmp_path / "pairs.jsonl").write_text('{"image": "classes/cat/0.png", "caption": "red"}\n' * 2)
    (tmp_path / "plain").mkdir()
    (tmp_path / "words").mkdir()
    Words(("red", "ring")).save(tmp_path / "words")
    for data, model, words in (
        ("classes", "words", "2 classes, cat, dog, but the model in .*words has learned 2 words, red, ring"),
        ("classes", "plain", "2 classes, cat, dog, but the model in .*plain has learned no classes"),
        (
            "pairs.jsonl",
            "plain",
            "captions, but the model in .*plain reads none; expected a folder of images",
        ),
    ):
        args = arguments(tmp_path, tmp_path / data, init_from=tmp_path / model)
        with pytest.raises(ValueError, match=words):
            conditions.load(args, unet.Config((4, 8), (0, 1), image_size=8, n_groups=2))


def test_schedules_are_written_and_read(tmp_path):
    for target, schedule, zero in (("v", "cosine", False), ("x0", "scaled_linear", True)):
        config = Config(target=target, schedule=schedule, zero_terminal=zero, n_steps=500)
        schedules.write(tmp_path, **config.process, pipeline=True)
        assert schedules.read(tmp_path) == config.process
    path = tmp_path / schedules.FILE
    for change, message in (
        ({"prediction_type": "flow"}, "prediction_type 'flow' is not implemented; expected v_prediction"),
        ({"beta_end": 0.5}, "beta_end 0.5: expected 0.024"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not implemented"),
        ({"num_train_timesteps": "many"}, "expected a whole number"),
        ({"beta_schedule": None}, "beta_schedule None is not implemented"),
        ({"beta_start": float("nan")}, "beta_start nan: expected 0.0017"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas is not implemented"),
    ):
        schedules.write(tmp_path, **config.process, pipeline=True)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=message):
            schedules.read(tmp_path)
    path.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}')
    with pytest.raises(ValueError, match="beta_schedule is missing; expected squaredcos_cap_v2"):
        schedules.read(tmp_path)


def test_a_model_of_another_schedule_or_target_is_refused(tmp_path):
    schedules.write(tmp_path, **Config().process, pipeline=False)
    ddpm.restore(Diffusion(Known([0.0]), Config()), str(tmp_path))
    with pytest.raises(ValueError, match=r"--set target=eps: the model in .* has target=x0; give that"):
        ddpm.restore(Diffusion(Known([0.0]), Config(target="eps")), str(tmp_path))
    ddpm.restore(Diffusion(Known([0.0]), Config(target="eps")), str(tmp_path / "none"))


# --- the judge


def test_a_judge_learns_to_recognise_pictures_and_disturbs_no_random_numbers():
    pictures = np.zeros((40, 1, 16, 16), np.uint8)
    pictures[::2, :, :8], pictures[1::2, :, 8:] = 255, 255  # the upper or the lower half
    answers = torch.arange(40) % 2
    questions = (judge.Question("half", 2, answers, answers[:6]),)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    opinion = judge.Opinion(judge.train(pictures, questions, 8), questions)
    assert torch.equal(torch.get_rng_state(), before)
    images = torch.from_numpy(pictures[:6]).float() / 255
    assert opinion.rights(images, range(6)) == {"half": 1.0}
    assert opinion.rights(images[:4], [1, 0, 3, 2]) == {"half": 0.0}


def test_a_picture_of_few_held_out_images_shows_each_once(monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(ddpm.pictures, "save", lambda out, rows, **_: shown.extend(rows))
    rows = [{"image": np.full((1, 4, 4), 51 * i, np.uint8), "label": np.array(0)} for i in range(5)]
    data = SimpleNamespace(train=rows, val=rows, tokenizer=WORDS, fingerprint="few")
    ddpm.show(SimpleNamespace(draw=lambda classes, n, guidance: torch.zeros(n, 1, 4, 4)), data, tmp_path)
    assert [round(5 * image.mean().item()) for image in shown[0]] == [0, 1, 2, 3, 4]


# --- runs


SAMPLER_STEPS = ddpm.SAMPLER_STEPS


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """Return a function that gives the flags of a small run in a folder, and hurry the judge."""
    monkeypatch.setattr(judge, "STEPS", 2)
    monkeypatch.setattr(ddpm, "SAMPLER_STEPS", 2)
    monkeypatch.setattr(ddpm, "MOST_DRAWN", 13)

    def of(name, **changes):
        options = {"steps": 4, "eval-every": 4, "save-every": 2, "batch-size": 8, "out": tmp_path / name}
        words = [
            "--model",
            "ddpm",
            "--cache",
            str(tmp_path / "cache"),
            "--set",
            "channels=(8,16)",
            "n_groups=4",
        ]
        words += ["attention=(0,1)", "image_size=8"]
        for flag, value in (options | changes).items():
            words += [f"--{flag}", *([str(value)] if value is not True else [])]
        return words

    return of


def test_a_run_leaves_a_picture_and_a_model_that_draws_by_words(flags, tmp_path, capsys):
    assert train_py.main(flags("run")) == 0
    out = tmp_path / "run"
    text = (out / "samples.txt").read_text()
    assert "real    character" in text and "w = 2   character" in text and "squared error" in text
    assert np.asarray(Image.open(out / "picture.png")).shape[2] == 3
    settings = json.loads((out / "model" / schedules.FILE).read_text())
    assert settings["prediction_type"] == "sample" and settings["beta_schedule"] == "squaredcos_cap_v2"
    model = open_model(out / "model")
    assert (
        type(model) is unet.UNet
        and model.config.n_classes == len(conditions.read_words(out / "model").names) + 1
    )
    ddpm.main([str(out / "model"), "--prompt", "bold serif latin small letter g", "--n", "2", "--steps", "2",
               "--out", str(tmp_path / "g.png")])  # fmt: skip
    assert Image.open(tmp_path / "g.png").size[0] > 100
    assert "g.png: 2 images of 2 steps" in capsys.readouterr().out
    for words, message in (
        (["--prompt", "bold sheriff"], "word 'sheriff': none of the"),
        (["--out", "g.jpg"], "expected a name that ends in .png"),
        (["--n", "0"], "expected at least 1 image"),
        (["--steps", "2000"], "2000 steps of a sampler: expected 1 to 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            ddpm.main([str(out / "model"), *words])


def test_killed_and_resumed_a_run_and_its_averages_are_equal_to_the_bit(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(ddpm, "SAMPLER_STEPS", SAMPLER_STEPS)  # as in the process that is killed
    folder_of_images(tmp_path / "photos", 12)
    options = {"data": tmp_path / "photos", "save-every": 1, "batch-size": 2}
    process = forked(flags("killed", **options), prepare=die_in, arguments=("save", 3))
    assert process.end() == -signal.SIGKILL, process.said()
    assert train_py.main(flags("killed", **options, resume=True)) == 0
    assert train_py.main(flags("whole", **options)) == 0
    assert same_run(tmp_path / "whole", tmp_path / "killed")
    assert "drawn from noise" in (tmp_path / "whole" / "samples.txt").read_text()


def test_the_defaults_of_the_task_are_averages_and_the_u_net():
    args = Namespace(
        model="ddpm", task=None, adapter=None, base=None, init_from=None, data=None, size=None, train="all"
    )
    concept = contract.resolve(args)
    assert concept.task.EMA == 0.999 and concept.model_file.name == "vision.unet" and args.data == "glyphs"


@pytest.mark.parametrize("kind, opens", [("unet", True), ("dit", False)])
def test_only_a_u_net_without_classes_is_named_as_a_pipeline_of_diffusers(kind, opens, tmp_path):
    from vision.dit import Config, DiT
    from vision.unet import SIZES, UNet

    model = DiT(Config(1, 2, 8, 2, 1, 1, 4, 0)) if kind == "dit" else UNet(SIZES["tiny"])
    ddpm.Diffusion(model, ddpm.Config()).save_pretrained(tmp_path)
    assert (tmp_path / "model_index.json").is_file() == opens
    assert ddpm.Diffusion.from_pretrained(tmp_path).settings.target == "x0"
