"""Scenes: drawn pictures of two objects, with a caption in words, and questions with their answers.

    "a small green ring left of a large cyan cross"        8 colours x 6 shapes x 2 sizes, 4 relations
    colour     What colour is the ring?                                             green
    shape      What shape is the green object?                                      ring
    size       Is the green ring small or large?                                    small
    relation   Where is the green ring from the cyan cross?                         left

The two objects of a scene differ in colour and in shape, so either of these names an object. The objects do
not overlap, and are further apart along the axis of their relation than along the other. Of the 48 pairs of a
colour and a shape 8 are held out; every colour and every shape occurs in other pairs, too. There are three
parts:

    train     neither object is of a held-out pair
    val       the same, other scenes
    unseen    both objects are of held-out pairs

A scene and its picture are functions of the part and of the scene's number alone.

    python -m data.scenes              draw some into scenes.png, and print their captions and questions

Shapes: n pictures.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats import command

SIZE = 32  # pixels, both ways
COLOURS = {  # red, green, blue
    "red": (214, 38, 38), "green": (44, 160, 60), "blue": (48, 76, 220), "yellow": (232, 212, 56),
    "cyan": (64, 204, 214), "purple": (150, 60, 180), "orange": (240, 134, 28), "white": (240, 240, 240),
}  # fmt: skip
SHAPES = ("bar", "square", "triangle", "diamond", "cross", "ring")
RADII = {"small": 3.5, "large": 6.0}  # pixels from the middle of an object to its edge
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # steps in x and y
ANSWERS = {"left of": "left", "right of": "right", "above": "above", "below": "below"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
HELD_OUT = frozenset((colour, SHAPES[i % len(SHAPES)]) for i, colour in enumerate(COLOURS))
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT)
PARTS = {"train": PAIRS, "val": PAIRS, "unseen": tuple(sorted(HELD_OUT))}
KINDS = ("colour", "shape", "size", "relation")  # of questions
Y, X = np.mgrid[:SIZE, :SIZE].astype(np.float32)


class Thing(NamedTuple):
    """An object: a key of COLOURS, one of SHAPES, a key of RADII."""

    colour: str
    shape: str
    size: str


class Scene(NamedTuple):
    """Two objects, and the relation of the first to the second, a key of RELATIONS."""

    first: Thing
    relation: str
    second: Thing


class Question(NamedTuple):
    """A question about a scene, its kind, one of KINDS, and its answer, one word."""

    kind: str
    text: str
    answer: str


def compose(number: int, part: str) -> tuple[Scene, np.random.Generator]:
    """Return scene `number` of a part, a key of PARTS, and the generator that draws its picture."""
    rng = np.random.default_rng((number, list(PARTS).index(part)))
    pairs = PARTS[part]
    first = pairs[rng.integers(len(pairs))]
    others = [pair for pair in pairs if pair[0] != first[0] and pair[1] != first[1]]
    second = others[rng.integers(len(others))]
    sizes = [list(RADII)[i] for i in rng.integers(len(RADII), size=2)]
    relation = list(RELATIONS)[rng.integers(len(RELATIONS))]
    return Scene(Thing(*first, sizes[0]), relation, Thing(*second, sizes[1])), rng


def caption(scene: Scene) -> str:
    """Return a scene in words: "a small green ring left of a large cyan cross"."""
    first, second = (f"a {thing.size} {thing.colour} {thing.shape}" for thing in (scene.first, scene.second))
    return f"{first} {scene.relation} {second}"


def with_colours_swapped(scene: Scene) -> Scene:
    """Return the scene with the colours of its objects exchanged. Its caption has the same words."""
    first, second = scene.first, scene.second
    return Scene(first._replace(colour=second.colour), scene.relation, second._replace(colour=first.colour))


def with_relation_reversed(scene: Scene) -> Scene:
    """Return the scene with its first object on the other side of the second."""
    return scene._replace(relation=OPPOSITE[scene.relation])


def from_the_other(scene: Scene) -> Scene:
    """Return the same scene, described from its second object."""
    return Scene(scene.second, OPPOSITE[scene.relation], scene.first)


def questions(scene: Scene) -> list[Question]:
    """Return the questions about a scene: one of each of KINDS about each object."""
    found = []
    for first, relation, second in (scene, from_the_other(scene)):
        one, other = (f"the {thing.colour} {thing.shape}" for thing in (first, second))
        where = f"Where is {one} from {other}?"
        found += [
            Question("colour", f"What colour is the {first.shape}?", first.colour),
            Question("shape", f"What shape is the {first.colour} object?", first.shape),
            Question("size", f"Is {one} small or large?", first.size),
            Question("relation", where, ANSWERS[relation]),
        ]
    return found


def covers(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Return True for each pixel that a shape covers. dx, dy: from the middle of the shape to the pixels."""
    if shape == "bar":
        return (abs(dx) <= radius) & (abs(dy) <= 0.4 * radius)
    if shape == "ring":
        square = dx**2 + dy**2
        return (square <= radius**2) & (square > (0.55 * radius) ** 2)
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) <= 0.85 * radius
    if shape == "diamond":
        return abs(dx) + 0.6 * abs(dy) <= 0.65 * radius
    if shape == "cross":
        return (np.minimum(abs(dx), abs(dy)) <= 0.25 * radius) & (np.maximum(abs(dx), abs(dy)) <= radius)
    return (abs(dx) <= (dy + radius) / 2) & (dy <= 0.8 * radius)  # a triangle with its tip above


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Return a picture of a scene, uint8 (3, SIZE, SIZE), with places and shades that rng draws."""
    # The ground is grey with grain.
    image = np.empty((3, SIZE, SIZE), np.float32)
    image[:] = rng.uniform(30, 80) + rng.normal(0, 4, (3, SIZE, SIZE))

    # Draw the middles of the objects: along the axis of the relation so far apart that they do not overlap,
    # along the other axis at most half as far, and both objects inside of the picture.
    radii = [RADII[thing.size] for thing in (scene.first, scene.second)]
    apart = rng.uniform(sum(radii) + 1, SIZE - 2 - sum(radii))
    aside = rng.uniform(-0.5, 0.5) * apart
    step = np.array(RELATIONS[scene.relation])
    difference = step * apart + step[::-1] * aside  # from the second to the first, in x and y
    low = np.maximum(radii[1], radii[0] - difference) + 0.5
    high = SIZE - 1.5 - np.maximum(radii[1], radii[0] + difference)
    second = rng.uniform(low, high)

    # Paint both objects in their colours, each with a shade of its own, and with grain.
    for thing, radius, (x, y) in zip(scene[::2], radii, (second + difference, second), strict=True):
        where = covers(thing.shape, X - x, Y - y, radius)
        shade = np.array(COLOURS[thing.colour])[:, None] * rng.uniform(0.9, 1.05)
        image[:, where] = shade + rng.normal(0, 4, (3, int(where.sum())))
    return image.clip(0, 255).round().astype(np.uint8)


def pictures(n: int, part: str) -> tuple[np.ndarray, list[Scene]]:
    """Return the pictures of the first n scenes of a part, uint8 (n, 3, SIZE, SIZE), and the scenes."""
    composed = [compose(number, part) for number in range(n)]
    drawn = np.empty((n, 3, SIZE, SIZE), np.uint8)
    for place, (scene, rng) in zip(drawn, composed, strict=True):
        place[:] = draw(scene, rng)
    return drawn, [scene for scene, _ in composed]


def main(argv: list[str] | None = None) -> None:
    from PIL import Image

    parser = command.Parser(description="Draw some scenes, and print their captions and questions.")
    add = parser.add_argument
    add("part", nargs="?", choices=list(PARTS), default="train", help="which scenes (default %(default)s)")
    add("-n", type=int, default=8, help="how many (default %(default)s)")
    out = "file of the pictures side by side (default %(default)s)"
    add("--out", type=command.path, default=Path("scenes.png"), help=out)
    args = parser.parse_args(argv)
    if args.n < 1:
        raise ValueError(f"-n {args.n}: expected at least 1")
    drawn, scenes = pictures(args.n, args.part)
    row = drawn.transpose(2, 0, 3, 1).reshape(SIZE, -1, 3)  # side by side
    Image.fromarray(row).resize((4 * row.shape[1], 4 * SIZE), Image.Resampling.NEAREST).save(args.out)
    for scene in scenes:
        print(caption(scene))
        for question in questions(scene)[:4]:
            print(f"    {question.text} {question.answer}")


if __name__ == "__main__":
    command.run(main)
