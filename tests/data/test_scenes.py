"""Scenes: the picture shows what its caption says, and some pairs of colour and shape are held out."""

import re
from collections import Counter

import numpy as np
import pytest

from data import scenes
from data.scenes import Scene, Thing


def places(image: np.ndarray, scene: Scene) -> list[np.ndarray]:
    """Return the middle (x, y) of the pixels nearest in colour to each object, far from the background."""
    found = []
    for thing in (scene.first, scene.second):
        distances = {
            name: np.linalg.norm(image.transpose(1, 2, 0) - np.array(rgb), axis=2)
            for name, rgb in scenes.COLOURS.items()
        }
        nearest = np.array(list(distances.values())).argmin(0) == list(distances).index(thing.colour)
        rows, columns = np.nonzero(nearest & (distances[thing.colour] < 60))
        found.append(np.array([columns.mean(), rows.mean()]))
    return found


@pytest.mark.parametrize("part", scenes.PARTS)
def test_the_picture_shows_the_objects_in_the_relation_that_the_caption_names(part):
    pictures, found = scenes.pictures(60, part)
    assert pictures.shape == (60, 3, 32, 32) and pictures.dtype == np.uint8
    for image, scene in zip(pictures, found, strict=True):
        first, second = places(image, scene)
        dx, dy = first - second
        axis = max((dx, 0), (0, dy), key=lambda step: sum(map(abs, step)))
        assert np.sign(axis).tolist() == list(scenes.RELATIONS[scene.relation]), scenes.caption(scene)


def test_a_large_object_covers_more_than_a_small_one_and_no_shape_looks_like_another():
    masks = {
        (shape, size): scenes.covers(shape, scenes.X - 15.5, scenes.Y - 15.5, radius)
        for shape in scenes.SHAPES
        for size, radius in scenes.RADII.items()
    }
    for shape in scenes.SHAPES:
        assert masks[shape, "large"].sum() > 2 * masks[shape, "small"].sum()
        for other in scenes.SHAPES:
            both = (masks[shape, "small"] & masks[other, "small"]).sum()
            either = (masks[shape, "small"] | masks[other, "small"]).sum()
            assert shape == other or both < 0.8 * either, (shape, other)


def test_held_out_pairs_are_in_the_unseen_part_alone_and_their_colours_and_shapes_are_known():
    assert len(scenes.HELD_OUT) == 8
    for part in scenes.PARTS:
        things = [thing for i in range(300) for thing in scenes.compose(i, part)[0][::2]]
        pairs = {(thing.colour, thing.shape) for thing in things}
        expected = 8 if part == "unseen" else 40
        assert len(pairs) == expected and (pairs <= scenes.HELD_OUT) == (part == "unseen")
        assert {colour for colour, _ in pairs} == set(scenes.COLOURS)
        assert {shape for _, shape in pairs} == set(scenes.SHAPES)


def test_scenes_are_functions_of_their_number_and_nearly_all_captions_differ():
    pictures, found = scenes.pictures(2000, "train")
    assert len(set(map(scenes.caption, found))) > 1800
    assert all(scene.first.colour != scene.second.colour for scene in found)
    assert all(scene.first.shape != scene.second.shape for scene in found)
    again, rng = scenes.compose(7, "train")
    assert again == found[7] and np.array_equal(scenes.draw(again, rng), pictures[7])
    assert {scenes.compose(i, "val")[0] for i in range(20)} != set(found[:20])


def test_captions_and_questions_of_a_scene_are_sentences_with_one_answer():
    scene = Scene(Thing("green", "ring", "small"), "left of", Thing("cyan", "cross", "large"))
    assert scenes.caption(scene) == "a small green ring left of a large cyan cross"
    swapped = "a small cyan ring left of a large green cross"
    assert scenes.caption(scenes.with_colours_swapped(scene)) == swapped
    assert scenes.caption(scenes.with_relation_reversed(scene)).split(" ")[4:6] == ["right", "of"]
    same = "a large cyan cross right of a small green ring"
    assert scenes.caption(scenes.from_the_other(scene)) == same

    asked = scenes.questions(scene)
    assert Counter(question.kind for question in asked) == dict.fromkeys(scenes.KINDS, 2)
    answers = {question.text: question.answer for question in asked}
    assert len(answers) == 8
    assert answers["What colour is the cross?"] == "cyan"
    assert answers["What shape is the green object?"] == "ring"
    assert answers["Is the cyan cross small or large?"] == "large"
    where = "Where is the cyan cross from the green ring?"
    assert answers[where] == "right"


def test_the_command_draws_scenes_and_prints_their_questions(tmp_path, capsys):
    scenes.main(["unseen", "-n", "2", "--out", str(tmp_path / "some.png")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and re.match(r"a (small|large) ", lines[0])
    assert (tmp_path / "some.png").is_file()
    with pytest.raises(ValueError, match="-n 0: expected at least 1"):
        scenes.main(["-n", "0"])
