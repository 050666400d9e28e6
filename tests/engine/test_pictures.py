"""The pictures of a run: what is drawn, kept for each step, and put into the page."""

import numpy as np
import pytest
import torch
from PIL import Image
from written_runs import START, Page, make_run

from engine import checkpoint, pictures, report


def test_a_grid_shows_each_pixel_as_a_square_with_its_text_below(tmp_path):
    grey = torch.tensor([[[0.0, 1.0], [0.5, 2.0]]])  # above 1: cut off
    colour = torch.stack([torch.ones(2, 2), torch.zeros(2, 2), torch.zeros(2, 2)])
    pictures.save(tmp_path, [[grey, colour], [grey, grey]])
    drawn = np.asarray(Image.open(tmp_path / "picture.png"))
    assert drawn.shape == (2 * 70 + 6, 2 * 70 + 6, 3)
    squares = drawn[6:70, 6:70].reshape(2, 32, 2, 32, 3)
    assert (squares == squares[:, :1, :, :1]).all() and squares[:, 0, :, 0, 0].tolist() == [
        [0, 255],
        [128, 255],
    ]
    assert (drawn[10, 80] == (255, 0, 0)).all()

    pictures.save(tmp_path, [[grey]], [["é"]], [["#c00000"]])
    labelled = np.asarray(Image.open(tmp_path / "picture.png")).astype(int)
    below = labelled[70:]
    assert labelled.shape[0] == 6 + 70 + 18 and (below[..., 0] - below[..., 1] > 100).any()


def test_the_label_of_a_row_is_to_its_left(tmp_path):
    image = torch.ones(1, 2, 2)
    pictures.save(tmp_path, [[image], [image]])
    without = np.asarray(Image.open(tmp_path / "picture.png"))
    pictures.save(tmp_path, [[image], [image]], labels=("real", ""))
    drawn = np.asarray(Image.open(tmp_path / "picture.png"))
    left = drawn.shape[1] - without.shape[1]
    assert left > 20 and (drawn[:, left + 6 :] == without[:, 6:]).all()
    assert (drawn[6:70, : left + 6] < 100).any() and (drawn[76:, : left + 6] > 200).all()


def test_the_picture_of_each_evaluation_is_kept_and_inside_the_page(tmp_path):
    out = make_run(tmp_path / "a", start=START | {"unit": "images", "loss": "squared error"})
    text = (out / "metrics.jsonl").read_text().replace('"tokens', '"images')
    (out / "metrics.jsonl").write_text(text)
    for step in (0, 40):
        pictures.save(out, [[torch.full((1, 2, 2), step / 40)]])
        report.keep_picture(out, step)
    report.write(out)
    page = Page(out / "report.html")
    assert page.tags.count("img") == 2
    assert "4k images" in page.text and "Images per second" in page.text and "images per second" in page.text
    assert "Loss (squared error)" in page.text and "tokens" not in page.text

    report.draw_loss(out)
    checkpoint.clear_logs(out)
    assert not (out / "pictures").exists() and not (out / "picture.png").exists()
    make_run(tmp_path / "b")
    report.write(tmp_path / "b")
    assert "img" not in Page(tmp_path / "b" / "report.html").tags


@pytest.mark.parametrize("heading", ["step 7, validation loss 1.0", "no step"])
def test_a_step_without_a_picture_has_none(tmp_path, heading):
    assert report.picture(tmp_path, heading) == ""
