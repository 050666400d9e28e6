"""Visual questions: how often a model that reads images is right about drawn scenes, by kind of question.

    right about  seen pairs  blind  unseen pairs  blind  chance
    colour       ...

Each question about a scene (data/scenes.py) has one answer of one word. The scenes are new ones. "Seen pairs"
are scenes with those pairs of a colour and a shape that are in the scenes to learn from; "unseen pairs" are
held out of these. "Blind" is the same model with features of zero in the place of the image's. What can be
guessed from the text alone may be more than this, since the model has learned with other features: measure a
model that was trained blind, see vision/visual_instruct.py.

    python -m vision.visual_questions runs/llava/model

Shapes: n images, C channels, H x W pixels.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data import scenes
from data.image_conversations import SceneTalks, TalkRows, about, before_answer
from data.images import fitted
from data.tokenizer import Tokenizer, get_tokenizer
from engine import pictures
from formats import command
from formats.chat_template import IMAGE, end_id
from formats.json_file import write_json
from formats.open_model import open_model
from vision.classify_images import RIGHT, WRONG

BATCH = 64  # questions that are answered at once
COLUMNS, WIDE, LONGEST = 3, 320, 50  # of the picture: columns, pixels of an image, characters below it


@torch.no_grad()
def answers(
    model: nn.Module, tokenizer: Tokenizer, prompts: list[list[int]], images: Tensor, max_new_tokens: int = 8
) -> list[str]:
    """Return the model's answers to prompts, by the likeliest token at each step. prompts[i], a list of
    tokens, is about images[i], of images (n, C, H, W) with pixels in [0, 1]."""
    device, found = next(model.parameters()).device, []
    stop = end_id(tokenizer)
    for first in range(0, len(prompts), BATCH):
        part = slice(first, first + BATCH)
        normalized = model.normalized(images[part].to(device))
        for new in model.generate(prompts[part], max_new_tokens, images=normalized, temperature=0, stop=stop):
            found.append(tokenizer.decode(new[:-1] if new[-1:] == [stop] else new).strip())
    return found


def scores(model: nn.Module, tokenizer: Tokenizer, n: int, first: int = 0) -> dict[str, dict[str, float]]:
    """Return how often the model is right about n scenes of each held-out part, from number `first` on, by
    kind of question: {"colour": {"val": ..., "unseen": ..., "val, blind": ..., "unseen, blind": ...}}.

    "val" and "unseen" are the header's seen and unseen pairs.
    """
    found = {kind: {} for kind in scenes.KINDS}
    vision, was_blind = model.config.vision, model.blind
    for part in ("val", "unseen"):
        talks = SceneTalks({part: first + n}, captions=False)
        asked = [scenes.questions(scene) for scene in talks.scenes[first:]]
        flat = [question for of_scene in asked for question in of_scene]
        talk = [about(question.text, question.answer) for question in flat]
        image = model.config.image_tokens
        prompts = [before_answer(messages, tokenizer, image, stage=2) for messages in talk]
        size = (vision.image_size, vision.image_size)
        images = torch.from_numpy(fitted(talks.images[first:], size, vision.n_channels)).float() / 255
        images = images.repeat_interleave(len(asked[0]), dim=0)
        for name, blind in (("", was_blind), (", blind", True)):
            model.blind = blind
            texts = answers(model, tokenizer, prompts, images)
            for kind in scenes.KINDS:
                right = [text == q.answer for text, q in zip(texts, flat, strict=True) if q.kind == kind]
                found[kind][f"{part}{name}"] = sum(right) / len(right)
    model.blind = was_blind
    return found


def as_table(found: dict[str, dict[str, float]]) -> str:
    """Return the figures of `scores` as a table."""
    chance = {"colour": len(scenes.COLOURS), "shape": len(scenes.SHAPES), "size": 2, "relation": 4}
    lines = [
        f"{'right about':12} {'seen pairs':>11} {'blind':>6} {'unseen pairs':>13} {'blind':>6} {'chance':>7}"
    ]
    for kind, of in found.items():
        cells = f"{of['val']:11.1%} {of['val, blind']:6.1%} {of['unseen']:13.1%} {of['unseen, blind']:6.1%}"
        lines.append(f"{kind:12} {cells} {1 / chance[kind]:7.1%}")
    return "\n".join(lines)


def draw(model: nn.Module, tokenizer: Tokenizer, rows: TalkRows, n: int, out: Path) -> list[str]:
    """Draw the images of n evenly spaced rows with the first question of each and the model's answer, green
    where it is right. Return a line for each. Rows without an image are left out."""
    n = min(n, len(rows))
    chosen = [rows.rows[i * len(rows) // n] for i in range(n)]
    talks = [talk for talk in chosen if talk.image is not None]
    if not talks:
        return []
    pixels = [rows.rows.pixels(name, rows.writing.shape) for _, name in talks]
    images = torch.from_numpy(np.stack(pixels)).float() / 255
    writing = rows.writing
    of = (tokenizer, writing.image, writing.stage)
    texts = answers(model, tokenizer, [before_answer(talk.messages, *of) for talk in talks], images, 40)
    shown, colours = [], []
    for (messages, _), text in zip(talks, texts, strict=True):
        i = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        question, expected = messages[i - 1]["content"].replace(IMAGE, "").strip(), messages[i]["content"]
        shown.append((question if writing.stage == 2 else "", text, expected.strip()))
        colours.append(RIGHT if text == expected.strip() else WRONG)
    lines = [f"{q or 'caption:'} {text}" + f" (expected: {e})" * (text != e) for q, text, e in shown]

    # Enlarge the images, so that a line of text fits below each.
    factor = max(1, WIDE // images.shape[-1])
    large = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    labels = [f"{q} {text}"[:LONGEST] for q, text, _ in shown]
    grid = [range(i, min(i + COLUMNS, len(talks))) for i in range(0, len(talks), COLUMNS)]
    cells = ([[values[i] for i in line] for line in grid] for values in (large, labels, colours))
    pictures.save(out, *cells)
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description="Count how often a model is right about drawn scenes.")
    add = parser.add_argument
    add("checkpoint", type=command.path, help="directory of a model that has learned about scenes")
    add(
        "-n",
        type=int,
        default=250,
        help="scenes of each held-out part, 8 questions each (default %(default)s)",
    )
    add("--out", type=command.new_file, help="file for the figures, as JSON (default: they are only printed)")
    args = parser.parse_args(argv)
    if args.n < 1:
        raise ValueError(f"-n {args.n}: expected at least 1")
    tokenizer = get_tokenizer(str(args.checkpoint))
    if IMAGE not in tokenizer.special_tokens:
        raise ValueError(f"{args.checkpoint}: its tokenizer has no {IMAGE}; expected that of a LLaVA")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = open_model(args.checkpoint).float().to(device).eval()
    found = scores(model, tokenizer, args.n)
    print(as_table(found))
    if args.out:
        write_json(args.out, found, indent=1)


if __name__ == "__main__":
    command.run(main)
