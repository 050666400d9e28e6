"""Visual instruction tuning: what learns in each stage, and whole runs from the data to the answer."""

import json
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_gpt import refused
from torch.utils.flop_counter import FlopCounterMode

import gpt
import lora
import train
from data.image_conversations import SceneTalks
from data.tokenizer import get_tokenizer
from engine import contract, trainable
from formats.chat_template import prompt_tokens
from formats.open_model import open_model
from vision import first_stage, llava, visual_instruct, visual_questions
from vision.clip_towers import VisionConfig
from vision.llava import LLaVA
from vision.visual_instruct import Settings, make_batch

SMALL = llava.Config(
    VisionConfig(2, 2, 16, 24, image_size=32, patch_size=16),
    gpt.Config(2, 2, 16, 24, 300, 64, tie_embeddings=False),
    image_token=299,
)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Let the default run be a small one. Return a function that makes a run and returns its directory."""
    monkeypatch.setitem(llava.SIZES, "tiny", SMALL)
    for name, n in (("N_SCENES", 24), ("N_HELD_OUT", 3), ("N_SHOWN", 1)):
        monkeypatch.setattr(visual_instruct, name, n)

    def run(name, *flags):
        argv = [
            "--model",
            "llava",
            "--steps",
            "2",
            "--batch-size",
            "4",
            "--eval-every",
            "2",
            "--log-every",
            "1",
        ]
        argv += ["--out", tmp_path / name, "--cache", tmp_path / "cache", *flags]
        assert train.main([str(flag) for flag in argv]) == 0
        return tmp_path / name

    return run


def changed(before, after):
    """Return the parts of a model whose weights differ between two directories."""
    a, b = (load_file(directory / "model.safetensors") for directory in (before, after))
    return {
        name.partition(".")[0] for name in a if a[name].shape != b[name].shape or not a[name].equal(b[name])
    }


def test_a_run_about_scenes_shows_what_it_knows_beside_the_blind_model(small, capsys):
    out = small("scenes", "--tower", "random")
    samples = (out / "samples.txt").read_text()
    assert samples.count("right about") == 2 and samples.count("relation") >= 2
    assert (out / "picture.png").is_file() and "expected" in samples
    model, tokenizer = open_model(out / "model"), get_tokenizer(str(out / "model"))
    assert model.config.image_token == tokenizer.special_tokens["<image>"] < tokenizer.n_vocab
    assert model.config.n_image_tokens == 4
    assert "<|assistant|>" in (out / "model" / "chat_template.jinja").read_text()
    started = json.loads((out / "run.json").read_text())["starts"][0]
    assert started["unit"] == "images" and "4 tokens an image" in started["data"]

    # Ask it about an image, by both commands, and measure it.
    Image.new("RGB", (32, 32), "red").save(out / "red.png")
    capsys.readouterr()
    assert (
        lora.main([str(out), "--prompt", "What?", "--image", str(out / "red.png"), "--max-new-tokens", "4"])
        == 0
    )
    by_chat = capsys.readouterr().out
    visual_questions.main([str(out / "model"), "-n", "1", "--out", str(out / "scores.json")])
    assert "right about" in capsys.readouterr().out
    assert set(json.loads((out / "scores.json").read_text())) == {"colour", "shape", "size", "relation"}
    pixels = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    messages = [{"role": "user", "content": "<image>\nWhat?"}]
    asked = [prompt_tokens(messages, tokenizer, model.config.image_tokens)]
    assert visual_questions.answers(model.eval(), tokenizer, asked, pixels, 4)[0] == by_chat.strip()


def test_the_projector_learns_in_stage_1_and_the_language_model_too_in_stage_2(small, tmp_path, capsys):
    # A language model that has been trained, and conversations of files.
    tokenizer = get_tokenizer("bytes")
    language = gpt.GPT(replace(SMALL.text, vocab_size=257, eos_token_id=256, max_seq_len=96))
    language.save_pretrained(tmp_path / "gpt")
    tokenizer.save(tmp_path / "gpt")
    for i, colour in enumerate(("red", "blue", "green", "white")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{i}.png")
    captions, talks = tmp_path / "captions.jsonl", tmp_path / "talks.jsonl"
    captions.write_text(
        "".join(json.dumps({"image": f"{i}.png", "caption": f"{i}"}) + "\n" for i in range(4))
    )
    lines = [{"image": f"{i}.png", "question": "<image> Which?", "answer": f"{i}"} for i in range(4)]
    lines += [
        {"question": "1?", "answer": "one"},
        {"image": "0.png", "question": "<image> " + "x" * 99, "answer": "2"},
    ]
    talks.write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["--images", tmp_path, "--tower", "random"]

    first = small("one", "--data", captions, "--stage", "1", "--set", f"language={tmp_path / 'gpt'}", *files)
    stored = load_file(first / "model" / "model.safetensors")
    for name, w in language.state_dict().items():
        assert torch.equal(stored[f"language_model.{name}"][: len(w)], w)
    assert "caption" in (first / "samples.txt").read_text()
    assert get_tokenizer(str(first / "model")).n_vocab == 258

    start = ["--init-from", first / "model", "--seq-len", "80"]
    second = small("two", "--data", talks, "--images", tmp_path, *start)
    assert changed(first / "model", second / "model") == {"language_model", "multi_modal_projector"}
    again = small("again", "--data", captions, "--images", tmp_path, "--stage", "1", *start)
    assert changed(first / "model", again / "model") == {"multi_modal_projector"}
    data = json.loads((second / "run.json").read_text())["starts"][0]["data"]
    assert "4 conversations to train on, 1 held out" in data
    assert "1 conversations left out: without an answer in their first 80 tokens" in capsys.readouterr().out


def test_flops_are_those_of_the_products_of_each_stage():
    config = replace(SMALL, vision=replace(SMALL.vision, kernels="reference"))
    config = replace(config, text=replace(SMALL.text, kernels="reference"))
    T = 32
    tokens = torch.full((1, T), 1)
    tokens[:, 1:5] = config.image_token
    batch = {"tokens": tokens, "targets": tokens % 7, "images": torch.rand(1, 3, 32, 32)}
    for stage in (1, 2):
        model = visual_instruct.wrap(LLaVA(config), Settings(stage))
        with FlopCounterMode(display=False) as counter:
            model.loss(batch)[0].backward()
        flops = visual_instruct.flops_per_token(model, Settings(stage), T) - trainable.frozen_flops(model)
        masked = 12 * 2 * 2 * 8 * (T * T - T * (T + 1) // 2)
        assert counter.get_total_flops() == pytest.approx(flops + masked, rel=0.02), stage


def rows_of_two_colours(tokenizer):
    """Return rows with the same question about a red and a blue image, whose answers are the colours."""
    from data.image_conversations import Writing, about
    from formats.chat_template import ImageTokens

    writing = Writing(tokenizer, ImageTokens(SMALL.image_token, 4), 2, 64, (3, 32, 32))
    rows = []
    for i, answer in enumerate("rb"):
        pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
        pixels[2 * i] = 255
        rows.append(writing.row(about("Which?", answer)) | {"image": pixels.numpy()})
    return rows


def test_a_model_learns_what_only_the_image_tells_and_a_blind_one_cannot():
    tokenizer = get_tokenizer("bytes")
    batch = make_batch(rows_of_two_colours(tokenizer), Settings(), torch.Generator(), tokenizer)
    assert batch["tokens"].shape[1] < 64  # cut to the longest row
    losses = {}
    for blind in (False, True):
        torch.manual_seed(0)
        model = visual_instruct.wrap(LLaVA(SMALL), Settings(blind=blind))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            loss, _ = model.loss(batch)
            loss.backward()
            optimizer.step()
        losses[blind] = loss.item()
    assert losses[False] < 0.1
    assert losses[True] > 0.3  # ln 2 for a letter, and 0 for the end behind it


def test_a_model_trained_blind_is_that_of_features_of_zero_and_stays_blind_when_it_is_saved(tmp_path):
    tokenizer = get_tokenizer("bytes")
    batch = make_batch(rows_of_two_colours(tokenizer), Settings(), torch.Generator(), tokenizer)
    models, losses = {}, {}
    for way in ("switch", "weights"):
        torch.manual_seed(0)
        model = models[way] = visual_instruct.wrap(LLaVA(SMALL), Settings(blind=way == "weights"))
        model.blind = way == "switch"
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses[way] = []
        for _ in range(3):
            optimizer.zero_grad()
            loss, _ = model.loss(batch)
            loss.backward()
            optimizer.step()
            losses[way].append(loss.item())
    assert losses["switch"] == losses["weights"] and len(set(losses["switch"])) == 3

    models["weights"].save_pretrained(tmp_path)
    model = open_model(tmp_path).eval()
    images = torch.stack([torch.zeros(3, 32, 32), torch.rand(3, 32, 32)])
    logits = model(batch["tokens"][:1].expand(2, -1), model.normalized(images))
    assert not model.blind and torch.equal(logits[0], logits[1])
    args = Namespace(document_mask=False, adapter="lora", base=None)
    with pytest.raises(ValueError, match="blind=True: makes the projector zero, which an adapter's files"):
        visual_instruct.check(args, SMALL, Settings(blind=True))


def test_a_data_set_is_another_one_where_images_of_one_name_are_in_other_folders(tmp_path):
    names = []
    for i, (first, second) in enumerate((("a/0.png", "b/0.png"), ("b/0.png", "a/0.png"))):
        for name in (first, second):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (4, 4)).save(tmp_path / name)
        lines = [{"image": first, "caption": "one"}, {"image": second, "caption": "two"}]
        path = tmp_path / f"{i}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        args = Namespace(
            data=str(path), val=str(path), set=[f"images={tmp_path}"], tokenizer="bytes", seq_len=40
        )
        vars(args).update(document_mask=False, init_from=None, adapter=None, base=None, bad_text="refuse")
        dataset = visual_instruct.load_data(args, replace(SMALL, tower="random"))
        names.append(dataset.fingerprint)
    assert names[0] != names[1]

    # Of the 8 tokens in the answers, "o" and the end come twice, and each of the vocabulary once more.
    total = 8 + dataset.tokenizer.n_vocab
    nats = -np.log([3 / total, 2 / total]).mean()
    assert dataset.guess == f"by frequency a token of an answer has {nats:.2f} nats"


def test_parts_of_a_batch_have_its_loss_together():
    tokenizer = get_tokenizer("bytes")
    batch = make_batch(rows_of_two_colours(tokenizer), Settings(), torch.Generator(), tokenizer)
    task, model = contract.read_task(llava, None), LLaVA(SMALL)
    parts = [task.split(batch, i, 2) for i in range(2)]
    total = sum(model.loss(part)[0] * task.count(part) for part in parts) / task.count(batch)
    torch.testing.assert_close(total, model.loss(batch)[0])


def test_scores_count_right_answers_of_each_kind_and_the_blind_ones_apart(monkeypatch):
    model = SimpleNamespace(config=SMALL, blind=False)

    def oracle(model, tokenizer, prompts, images, max_new_tokens=8):
        assert len(images) == len(prompts) == 16
        answers = [talk.messages[1]["content"] for talk in current]
        return ["red"] * 16 if model.blind else answers

    class Recorded(SceneTalks):
        def __init__(self, parts, captions, every=True):
            super().__init__(parts, captions, every)
            current[:] = [self[i] for i in range(16)]

    current = []
    monkeypatch.setattr(visual_questions, "answers", oracle)
    monkeypatch.setattr(visual_questions, "SceneTalks", Recorded)
    found = visual_questions.scores(model, get_tokenizer("bytes"), 2)
    assert all(of["val"] == of["unseen"] == 1 for of in found.values()) and not model.blind
    assert found["size"]["val, blind"] == 0
    cells = visual_questions.as_table(found).splitlines()[1].split()
    assert [cells[0], cells[1], cells[3], cells[5]] == ["colour", "100.0%", "100.0%", "12.5%"]


def test_a_clip_is_trained_first_where_no_tower_is_named_and_once(monkeypatch, tmp_path, capsys):
    commands = []

    def record(command, env):
        assert "PATH" in env and not {"WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & env.keys()
        commands.append([str(word) for word in command])
        (tmp_path / "clip-scenes-400-3" / "checkpoint").mkdir(parents=True, exist_ok=True)
        state = tmp_path / "clip-scenes-400-3" / "checkpoint" / "state.json"
        state.write_text(json.dumps({"step": reached}))
        return SimpleNamespace(returncode=code)

    code, reached = 0, 399

    for name in ("WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(first_stage.subprocess, "run", record)
    args = Namespace(cache=tmp_path, seed=3, device="cpu", kernels="auto")
    monkeypatch.setattr(visual_instruct, "CLIP_STEPS", 400)
    with pytest.raises(ValueError, match="of the first stage, was stopped; start again"):  # by SIGTERM
        visual_instruct.default_tower(args)
    reached = 400
    assert visual_instruct.default_tower(args) == str(tmp_path / "clip-scenes-400-3" / "model")
    words = " ".join(commands[0])
    assert "train.py --model clip --data scenes --steps 400 --seed 3" in words and "--resume" not in words
    visual_instruct.default_tower(args)
    assert len(commands) == 2 and "first a CLIP learns" in capsys.readouterr().out
    (tmp_path / "clip-scenes-400-3" / "done").unlink()
    code = 1
    with pytest.raises(ValueError, match="of the first stage, has failed; name another by --tower DIR"):
        visual_instruct.default_tower(args)
    assert "--resume" in commands[1]


def test_mistakes_are_one_line(small, tmp_path, capsys):
    path = tmp_path / "talks.jsonl"
    path.write_text('{"question": "1?", "answer": "one"}\n{"question": "2?", "answer": "two"}\n')
    gpt.GPT(SMALL.text).save_pretrained(tmp_path / "gpt")
    learned = ["--set", f"language={tmp_path / 'gpt'}", "--tokenizer", "bpe:300", "--tower", "random"]
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text("")
    for flags, words in (
        (["--stage", "1"], "--stage 1: the projector alone learns, so the language model must have been"),
        (["--stage", "3"], "stage 3: expected 1 or 2"),
        (["--data", path], f"--data {path}: name the folder of its images, --images FOLDER"),
        (["--data", path, "--images", tmp_path], "name the directory of a CLIP"),
        (["--images", tmp_path, "--tower", "random"], "--images and --val: scenes are drawn"),
        (["--tower", "random", "--document-mask"], "--document-mask: a row is one conversation"),
        (["--tower", "random", "--seq-len", "20"], "--seq-len 20: too short: an image takes 4 tokens"),
        (["--tower", tmp_path / "none"], "none"),
        (learned, f"--tokenizer bpe:300: the model in language={tmp_path / 'gpt'} has its own; leave out"),
        (
            ["--data", path, "--val", nothing, "--images", tmp_path, "--tower", "random"],
            "has no conversations",
        ),
        (["--data", path, "--images", tmp_path / "no", "--tower", "random"], "no such folder"),
    ):
        argv = ["--model", "llava", "--steps", "1", "--cache", tmp_path, "--out", tmp_path / "out", *flags]
        assert words in refused(capsys, [str(flag) for flag in argv])
    other = refused(capsys, ["--model", "gpt", "--stage", "1", "--out", str(tmp_path / "gpt")])
    assert "--set stage=1: expected FIELD=VALUE" in other


def test_a_model_that_reads_text_alone_has_no_image(tmp_path, capsys):
    gpt.GPT(replace(SMALL.text, vocab_size=257, eos_token_id=256)).save_pretrained(tmp_path)
    get_tokenizer("bytes").save(tmp_path)
    assert lora.main([str(tmp_path), "--prompt", "What?", "--image", "x.png"]) == 2
    assert "error: --image x.png: this model reads text alone" in capsys.readouterr().err
