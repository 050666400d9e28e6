"""Visual instruction tuning: vision/llava.py learns to answer questions about images.

    loss = -mean over the tokens t_j of answers of log p(t_j | t_1 ... t_{j-1}, image)

There are two stages (LLaVA, Liu et al. 2023, arXiv 2304.08485, section 4.2). The image tower is frozen in
both:

    --stage 1    the projector alone learns, on images with captions, without questions
    --stage 2    the projector and the language model learn, on conversations (the default)

Stage 1 needs a trained language model: `--set language=DIR` names a decoder that was trained here, or a
published one. Stage 2 continues from --init-from, or begins with a new model, as the default run does.

A conversation becomes tokens piece by piece, each token with its label (formats/chat_template.py): the
answers and the tokens that end them are learned, and the system's message, the questions and the image are
not. A row holds one conversation, with an image or without. It is cut at --seq-len tokens, but never within
an image.

By default the conversations are about drawn scenes (data/scenes.py), and the tower is that of a CLIP that was
trained on captions of such scenes. If --tower names none, the run first trains this CLIP, which takes some
minutes, and keeps it below --cache. Three controls show what the images and the tower are worth: each
evaluation also measures the model with features of zero ("blind"); `--set blind=True` trains a model whose
first projection is zero and frozen, so that it reads nothing of its images; and `--tower random` draws the
tower at random.

    python train.py --model llava                                       scenes: colours, shapes, sizes, places
    python train.py --model llava --tower CLIP --set language=LLM --stage 1 --data captions.jsonl --images DIR
    python train.py --model llava --init-from runs/llava/model --data chats.jsonl --images DIR --out runs/two
    python -m vision.visual_questions runs/llava/model                  how often it is right about new scenes

Shapes: B rows of T tokens, C channels, H x W pixels.
"""

import hashlib
import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.image_conversations import IGNORED, FileTalks, SceneTalks, TalkRows, Writing, read_seen
from data.rows import Dataset, Row, frequency_loss, stack
from data.text import bad_texts, bpe_size
from data.tokenizer import Tokenizer, get_tokenizer, train_bpe
from engine import trainable
from engine.settings import field_names, with_fields
from formats.chat_template import IMAGE, ImageTokens, pieces, save_chat_template
from formats.config_values import check_values
from vision import first_stage
from vision.clip import loss_bytes  # noqa: F401  engine/contract.py finds it here; it refuses --dry-run
from vision.llava import Config, with_tower
from vision.visual_questions import COLUMNS, as_table, draw, scores

MODEL, DATA = "llava", "scenes"
OPTIMIZER, BATCH_SIZE, STEPS = "muon", 64, 1000
LOSS = "nats per token"
HELD_OUT = 1 / 10  # share of a file's conversations
N_SCENES = 16_000  # to learn from
N_HELD_OUT = 256  # scenes of the held-out loss, with one question each; their pairs are those learned from
N_GUESSED = 1000  # conversations of each part that the trivial guess reads
N_SHOWN = 16  # scenes of each held-out part whose questions are answered at an evaluation
DEFAULT_TOKENIZER = "bpe:4096"  # the value that engine/options.py fills in where --tokenizer is left out
CLIP_STEPS = 400  # updates of the CLIP whose tower the default run gets


@dataclass(frozen=True)
class Settings:
    stage: int = 2  # 1: the projector alone learns, on captions; 2: the language model, too
    images: str = ""  # the folder of the images that --data names
    blind: bool = False  # the control that reads nothing of its images

    def __post_init__(self):
        check_values(self, stage=(1, 2))


def settings(config: Config) -> Settings:
    """Return the settings of the two stages."""
    return Settings()


# --- the data of a run


@dataclass
class TalkDataset(Dataset):
    """Conversations about images."""

    tower: str = ""  # directory of the CLIP whose tower a new model gets, or "random"


def load_data(args: Namespace, config: Config) -> TalkDataset:
    """Return conversations about images, to learn from and held out, see the header.

    Raises ValueError for flags that do not fit together, and for files that cannot be read.
    """
    given = with_fields(Settings(), args.set, set(field_names(Settings())))
    check(args, config, given)
    tower = ""
    if not args.init_from:
        tower = config.tower or default_tower(args)
        config = with_tower(config, tower)

    # Read or draw the conversations. The tokenizer may be learned from those to learn from.
    if args.data == "scenes":
        parts = {"train": N_SCENES}, {"val": N_HELD_OUT}
        train, val = (SceneTalks(part, given.stage == 1, every="train" in part) for part in parts)
    else:
        train, val = from_files(args, given.images)
    tokenizer = choose_tokenizer(args, config, train, given.stage)
    vision = config.vision
    shape = (vision.n_channels, vision.image_size, vision.image_size)
    image = ImageTokens(tokenizer.special_tokens[IMAGE], config.n_image_tokens)
    writing = Writing(tokenizer, image, given.stage, args.seq_len, shape)
    train, val = (within(part, writing) for part in (train, val))

    # The fingerprint covers the rows: of drawn scenes their number, of files each conversation.
    content = hashlib.sha256(f"{args.data if args.data == 'scenes' else ''} {writing.fingerprint}".encode())
    for part in (train, val):
        content.update(f"{len(part)}".encode())
        for messages, name in part if isinstance(part, FileTalks) else ():
            place = name and name.relative_to(given.images)
            content.update(f"{json.dumps(messages)} {place}".encode())
    kind = "captions" if given.stage == 1 else "conversations"
    summary = f"{len(train):,} {kind} to train on, {len(val):,} held out, {image.n} tokens an image"
    rows = TalkRows(train, writing), TalkRows(val, writing)
    name = f"seen-{content.hexdigest()[:16]}"
    return TalkDataset(
        name, tokenizer, *rows, summary, guess=guess(*rows), unit="images", units_per_row=1, tower=tower
    )


def guess(train: TalkRows, val: TalkRows) -> str:
    """Return one line: the loss on held-out answers by the frequencies of tokens in answers to learn from. Of
    each part at most N_GUESSED conversations are read."""
    answers = []
    for part in (train, val):
        chosen = np.linspace(0, len(part) - 1, min(len(part), N_GUESSED)).astype(int)
        targets = np.concatenate([part.writing.row(part.rows[i].messages)["targets"] for i in chosen])
        answers.append(targets[targets != IGNORED])
    counts = np.bincount(answers[0], minlength=train.writing.tokenizer.n_vocab)
    return f"by frequency a token of an answer has {frequency_loss(counts, answers[1]):.2f} nats"


def check(args: Namespace, config: Config, given: Settings) -> None:
    """Raise ValueError for flags that do not fit together."""
    if args.document_mask:
        raise ValueError("--document-mask: a row is one conversation; leave it out")
    if given.stage == 1 and not (config.language or args.init_from):
        needed = "the projector alone learns, so the language model must have been trained"
        raise ValueError(f"--stage 1: {needed}; name its directory by --set language=DIR")
    if given.blind and (args.adapter or args.base):
        raise ValueError("--set blind=True: makes the projector zero, which an adapter's files do not hold")
    if args.init_from and (config.tower or config.language):
        name = "tower" if config.tower else "language"
        raise ValueError(f"--set {name}={getattr(config, name)}: the model in --init-from has its own")
    if args.data == "scenes":
        if given.images or args.val:
            raise ValueError("--images and --val: scenes are drawn, and some held out; leave both out")
    elif not given.images:
        raise ValueError(f"--data {args.data}: name the folder of its images, --images FOLDER")
    elif not (args.init_from or config.tower):
        raise ValueError(f"--data {args.data}: name the directory of a CLIP, whose tower it is, --tower DIR")


def default_tower(args: Namespace) -> str:
    """Return the directory of a CLIP that has learned captions of scenes. It is trained first if it is not
    yet below --cache."""
    what = "a CLIP learns captions of scenes"
    return first_stage.trained(args, "clip", "scenes", CLIP_STEPS, what, "--tower DIR")


def from_files(args: Namespace, images: str) -> tuple[FileTalks, FileTalks]:
    """Return the conversations to learn from and those held out: those of --data and --val, or without --val
    nine tenths of --data and the rest, the same for every seed. images: the folder of the images."""
    found = []
    for flag, name in (("--data", args.data), ("--val", args.val)):
        if name is not None:
            with bad_texts(f"{flag} {name}", args.bad_text, print) as on_bad:
                found.append(FileTalks(read_seen(Path(name), Path(images), on_bad)))
    if len(found) == 2:
        return found[0], found[1]
    if len(found[0]) < 2:
        raise ValueError(f"--data {args.data}: one conversation; expected two at least, as one is held out")
    order = np.random.default_rng(0).permutation(len(found[0]))
    n = max(1, int(len(order) * HELD_OUT))
    return tuple(FileTalks(found[0][i] for i in sorted(part)) for part in (order[n:], order[:n]))


def choose_tokenizer(args: Namespace, config: Config, talks: Any, stage: int) -> Tokenizer:
    """Return the tokenizer that --tokenizer names, with a token for images. By default it is that of the
    model to start from, or else one that is learned from the conversations.

    Raises ValueError if --tokenizer asks to learn one, although language=DIR has its own.
    """
    n = bpe_size(args.tokenizer)  # the tokens of a tokenizer to learn, None for one that exists
    if n is not None and config.language and not args.init_from:
        if args.tokenizer != DEFAULT_TOKENIZER:
            learned = f"--tokenizer {args.tokenizer}: the model in language={config.language} has its own"
            raise ValueError(f"{learned}; leave out --tokenizer")
        tokenizer = get_tokenizer(config.language)
    elif n is not None:
        # Learn from the texts of 4,000 conversations, with the template's marks: more only takes time.
        order = np.random.default_rng(0).permutation(len(talks))[:4000]
        some = [talks[i].messages for i in order]
        plain = get_tokenizer("bytes")
        texts = ("".join(p for p, _ in pieces(talk, plain) if isinstance(p, str)) for talk in some)
        tokenizer = train_bpe([text.replace(IMAGE, "") for text in texts], n)
    else:
        tokenizer = get_tokenizer(args.tokenizer)
    return tokenizer if IMAGE in tokenizer.special_tokens else tokenizer.with_special_tokens({}, [IMAGE])


def within(talks: Any, writing: Writing) -> Any:
    """Return those conversations of a file that have a token of an answer in their first --seq-len tokens,
    and print how many were left out.

    Drawn scenes are returned as they are, and their first 200 are checked. Raises ValueError if one of these,
    or all conversations of a file, have no such token.
    """
    is_file = isinstance(talks, FileTalks)
    some = talks if is_file else [talks[i] for i in range(min(len(talks), 200))]
    kept = [talk for talk in some if (writing.row(talk[0])["targets"] != IGNORED).any()]
    if not kept or (not is_file and len(kept) < len(some)):
        n = writing.image.n
        raise ValueError(f"--seq-len {writing.seq_len}: too short: an image takes {n} tokens of a row")
    if len(kept) < len(some):
        left = f"{len(some) - len(kept):,} conversations left out"
        print(f"{left}: without an answer in their first {writing.seq_len} tokens")
    return FileTalks(kept) if is_file else talks


# --- the task


def wrap(model: nn.Module, config: Settings) -> nn.Module:
    """Return the model, in which those weights are frozen that the stage does not train.

    A blind model multiplies features by a zero matrix. For training this is the same as features of zero, and
    it remains when the model is saved. (`LLaVA.blind` makes features zero for an evaluation.)
    """
    model.vision_tower.requires_grad_(False)
    if config.stage == 1:
        model.language_model.requires_grad_(False)
    if config.blind:
        first = model.multi_modal_projector.linear_1.weight.requires_grad_(False)
        first.zero_()
    return model


def make_batch(
    rows: list[Row], config: Settings, generator: torch.Generator, tokenizer: Tokenizer
) -> dict[str, Tensor]:
    """Return "tokens" and "targets" (B, T), int64, where T is the length of the longest row, and "images"
    (B, C, H, W) with pixels in [0, 1]."""
    batch = stack(rows)
    T = int(batch["length"].max())
    pixels = batch["image"].float() / 255
    return {"tokens": batch["tokens"][:, :T], "targets": batch["targets"][:, :T], "images": pixels}


def flops_per_token(model: nn.Module, config: Settings, seq_len: int) -> int:
    """Return the FLOPs of training on a row of seq_len tokens with an image. The tower computes forward only,
    and a frozen language model computes no gradients of its weights."""
    language, frozen = model.language_model, trainable.frozen_flops
    tokens = seq_len * (language.flops_per_token(seq_len) - frozen(language))
    seen = 2 * model.config.tower_macs + 6 * model.config.projector_macs
    # The engine subtracts frozen(model) once for each unit, here an image. The language model's share is
    # subtracted above, for each token, and the tower's gradients were never added: so add frozen(model).
    return tokens + seen + frozen(model)


def save_tokenizer(dataset: Dataset, directory: Path) -> None:
    """Write the tokenizer and its template for conversations."""
    dataset.tokenizer.save(directory)
    save_chat_template(dataset.tokenizer, directory)


def show(model: nn.Module, dataset: Dataset, out: Path) -> str:
    """Draw held-out images with a question and the model's answer. Return, for scenes with questions, how
    often the model is right about each kind of question, and otherwise the answers."""
    rows = dataset.val
    lines = draw(model, dataset.tokenizer, rows, 3 * COLUMNS, out)
    if isinstance(rows.rows, SceneTalks) and not rows.rows.captions:
        return as_table(scores(model, dataset.tokenizer, N_SHOWN)) + "\n" + "\n".join(lines[:4])
    return "\n".join(lines)
