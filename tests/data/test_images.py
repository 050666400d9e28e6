"""Images from files of every kind: what is converted, counted, refused, and decoded once."""

import gzip
import json
import pickle
import shutil
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from data import images
from data.augment import Augmentation, augment, transforms
from data.rows import stack

SIZE = (8, 8)


@pytest.fixture
def folder(tmp_path):
    """Return a folder of two classes, each of ten images in its own brightness."""
    rng = np.random.default_rng(0)
    for name, level in (("cat", 60), ("dog", 200)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(10):
            pixels = (level + rng.integers(-20, 20, (12, 10, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{i}.png")
    return tmp_path / "set"


def prepare(folder, **options):
    """Return the data set of a folder, and the lines that are printed."""
    lines = []
    cache = folder.parent / "cache"
    return images.prepare(str(folder), SIZE, cache, notify=lines.append, **options), lines


def test_a_folder_for_each_class_is_decoded_once_to_a_memory_map(folder, monkeypatch):
    dataset, _ = prepare(folder)
    assert dataset.labels == ("cat", "dog") and dataset.unit == "images"
    assert len(dataset.train) == 18 and sorted(
        row["label"] for row in map(dataset.val.__getitem__, (0, 1))
    ) == [0, 1]
    row = dataset.train[0]
    assert row["image"].shape == (3, 8, 8) and row["image"].dtype == np.uint8 and row["augment"]
    assert abs(int(row["image"].mean()) - (60, 200)[row["label"]]) < 20 and not dataset.val[0]["augment"]
    assert isinstance(dataset.train.rows, np.memmap)

    # The second time nothing is decoded. A changed file is.
    monkeypatch.setattr(images, "decode", lambda *_: pytest.fail("decoded again"))
    assert prepare(folder)[0].fingerprint == dataset.fingerprint
    monkeypatch.undo()
    Image.new("RGB", (9, 9), "red").save(folder / "cat" / "0.png")
    assert prepare(folder)[0].fingerprint != dataset.fingerprint


def test_hidden_files_and_folders_are_passed_over_at_any_depth(folder):
    for hidden in ("cat/.ipynb_checkpoints", ".thumbnails", "dog/a/.b"):
        (folder / hidden).mkdir(parents=True)
        shutil.copy(folder / "cat" / "0.png", folder / hidden / "0-checkpoint.png")
    shutil.copy(folder / "cat" / "0.png", folder / "dog" / ".0.png")
    shutil.copy(folder / "cat" / "0.png", folder / "dog" / "a" / "0.png")
    dataset, _ = prepare(folder)
    assert len(dataset.train) + len(dataset.val) == 21


def test_a_damaged_cache_is_built_anew(folder):
    dataset, _ = prepare(folder)
    (home,) = (folder.parent / "cache").glob("images-*")
    content = bytearray((home / "train.bin").read_bytes())
    content[5] ^= 1
    (home / "train.bin").write_bytes(content)
    again, lines = prepare(folder)
    assert "train.bin is damaged" in lines[0] and again.fingerprint == dataset.fingerprint


def test_folders_named_train_and_val_are_the_parts_and_so_is_a_folder_in_val(folder, tmp_path):
    with pytest.raises(ValueError, match=r"--val .*: is part of .*; expected images of its own"):
        prepare(folder, val=str(folder))
    shutil.copytree(folder, tmp_path / "other")
    alone, _ = prepare(folder, val=str(tmp_path / "other"))
    assert len(alone.train) == len(alone.val) == 20
    (tmp_path / "both").mkdir()
    folder.rename(tmp_path / "both" / "train")
    (tmp_path / "both" / "val" / "bird").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "both" / "val" / "bird" / "a.png")
    with pytest.raises(ValueError, match="class 'bird': expected the classes of"):
        prepare(tmp_path / "both")
    (tmp_path / "both" / "val" / "bird").rename(tmp_path / "both" / "val" / "cat")
    (tmp_path / "both" / "val" / "dog").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "both" / "val" / "dog" / "a.png")
    assert len(prepare(tmp_path / "both")[0].val) == 2


def test_a_folder_train_is_a_part_if_it_is_alone_and_a_class_beside_other_classes(folder, tmp_path):
    (tmp_path / "alone").mkdir()
    shutil.copytree(folder, tmp_path / "alone" / "train")
    shutil.copytree(folder / "cat", tmp_path / "vehicles" / "train")
    shutil.copytree(folder / "dog", tmp_path / "vehicles" / "bus")
    shutil.copytree(tmp_path / "vehicles", tmp_path / "other")
    for name, val, labels, sizes in (
        ("alone", None, ("cat", "dog"), (18, 2)),
        ("alone", folder, ("cat", "dog"), (20, 20)),
        ("vehicles", None, ("bus", "train"), (18, 2)),
        ("vehicles", tmp_path / "other", ("bus", "train"), (20, 20)),
    ):
        dataset, _ = prepare(tmp_path / name, val=val and str(val))
        assert dataset.labels == labels and (len(dataset.train), len(dataset.val)) == sizes


@pytest.mark.parametrize("backwards", [False, True])
def test_of_several_folders_to_hold_out_val_is_used_in_whatever_order_they_are_listed(
    backwards, folder, tmp_path, monkeypatch
):
    (tmp_path / "all").mkdir()
    for part, n in (("test", 3), ("train", 2), ("val", 1)):
        (tmp_path / "all" / part / "cat").mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (9, 9)).save(tmp_path / "all" / part / "cat" / f"{i}.png")
    iterdir = type(folder).iterdir
    monkeypatch.setattr(type(folder), "iterdir", lambda path: sorted(iterdir(path), reverse=backwards))
    dataset, _ = prepare(tmp_path / "all")
    assert len(dataset.train) == 2 and len(dataset.val) == 1


def awkward(folder):
    """Write an image of each awkward kind to a folder of a class: its name and what its middle should be."""
    grey = np.full((9, 9), 40 * 257, np.uint16)
    Image.fromarray(grey).save(folder / "deep.png")
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(folder / "clear.png")
    Image.new("CMYK", (9, 9), (0, 255, 255, 0)).save(folder / "inks.jpg")
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("blue", "red")]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("L", (1, 1), 70).save(folder / "dot.png")
    turned = Image.new("RGB", (16, 8), "white")
    turned.paste("black", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees: black is above
    turned.save(folder / "turned.png", exif=exif)
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(folder / "palette.png")
    return {
        "deep.png": (40, 40, 40),
        "clear.png": (255, 255, 255),
        "inks.jpg": (255, 0, 0),
        "moving.gif": (0, 0, 255),
        "dot.png": (70, 70, 70),
        "palette.png": (10, 20, 30),
    }


def test_images_of_every_kind_are_converted_and_counted(tmp_path):
    (tmp_path / "set").mkdir()
    expected = awkward(tmp_path / "set")
    notes = images.Counter()
    for name, colour in expected.items():
        got = images.decode(tmp_path / "set" / name, (3, *SIZE), notes)
        assert np.abs(got[:, 4, 4].astype(int) - colour).max() <= 2, name
    turned = images.decode(tmp_path / "set" / "turned.png", (1, *SIZE), images.Counter())
    assert turned[0, 0].max() < 50 and turned[0, -1].min() > 200

    dataset, lines = prepare(tmp_path / "set")
    assert dataset.labels == () and dataset.val[0]["label"] == -1
    for note in ("1 animated", "1 transparent", "1 CMYK", "1 of 16 bits", "1 smaller than 8 x 8"):
        assert note in lines[0]


def test_a_file_that_cannot_be_read_is_refused_by_name_or_left_out(folder):
    whole = (folder / "dog" / "3.png").read_bytes()
    (folder / "dog" / "3.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (9, 9)).save(folder / "dog" / "4.jpg", format="EPS")  # for which Pillow starts a program
    with pytest.raises(ValueError, match=r"3\.png: damaged or cut off .*--bad-text skip"):
        prepare(folder)
    dataset, lines = prepare(folder, bad_images="skip")
    assert len(dataset.train) + len(dataset.val) == 19
    assert "3.png" in lines[0] and "4.jpg: not an image" in lines[1] and "2 left out" in lines[2]


def test_a_file_that_pillow_refuses_for_its_metadata_or_its_mode_is_named(folder):
    """A picture with a long text beside its pixels, as programs that draw by diffusion write, and a TIFF."""
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.new("RGB", (9, 9)).save(folder / "cat" / "long.png", pnginfo=text)
    with pytest.raises(ValueError, match=r"long\.png: .*save it anew, in RGB and without metadata"):
        prepare(folder)
    dataset, lines = prepare(folder, bad_images="skip")
    assert len(dataset.train) + len(dataset.val) == 20 and "long.png" in lines[0]
    Image.new("LAB", (9, 9)).save(folder / "lab.tif")
    with pytest.raises(ValueError, match=r"lab\.tif: conversion from LAB"):
        images.decode(folder / "lab.tif", (1, 8, 8), Counter())


def test_pillows_limit_against_bombs_is_kept(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # the images have 120 pixels
    with pytest.raises(ValueError, match=r"0\.png: .*at most 100 are read"):
        prepare(folder)


def test_what_is_no_set_of_images_is_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, words in (("nothing", "not found"), ("empty", "no images")):
        with pytest.raises(ValueError, match=words):
            prepare(tmp_path / name)
    with pytest.raises(ValueError, match="--data landscapes:x: not found"):
        images.prepare("landscapes:x", SIZE, tmp_path)
    with pytest.raises(ValueError, match="expected glyphs, glyphs:fonts"):
        images.prepare("glyphs:greek", SIZE, tmp_path)
    with pytest.raises(ValueError, match="has a held-out part of its own"):
        images.prepare("glyphs", SIZE, tmp_path, val="x")
    with pytest.raises(ValueError, match="images of 0 x 8 pixels: expected at least 1"):
        images.prepare("glyphs", (0, 8), tmp_path)
    with pytest.raises(ValueError, match=r"none.png: cannot be opened \(No such file or directory\)"):
        images.decode(tmp_path / "none.png", (3, *SIZE), images.Counter())
    (folder / "bird").mkdir()
    with pytest.raises(ValueError, match="bird: a class without images"):
        prepare(folder)
    Image.new("RGB", (9, 9)).save(folder / "loose.png")
    with pytest.raises(ValueError, match=r"has images \(loose.png"):
        prepare(folder)
    (tmp_path / "one").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "one" / "a.png")
    with pytest.raises(ValueError, match="no images are held out"):
        prepare(tmp_path / "one")


def write_idx(path, array):
    raw = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_mnist(folder, prefix="", suffix=""):
    """Write a set of 6 and 3 images of 7 x 7, and return its images to learn from."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", 6), ("t10k", 3)):
        pixels = rng.integers(0, 255, (n, 7, 7)).astype(np.uint8)
        write_idx(folder / f"{prefix}{part}-images-idx3-ubyte{suffix}", pixels)
        write_idx(folder / f"{prefix}{part}-labels-idx1-ubyte{suffix}", (np.arange(n) % 3).astype(np.uint8))
    return images.published_images.read_idx(folder / f"{prefix}train-images-idx3-ubyte{suffix}")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_as_published_gets_a_border_and_emnist_is_transposed(tmp_path, suffix):
    pixels = write_mnist(tmp_path / "mnist", suffix=suffix)
    dataset, _ = prepare(tmp_path / "mnist")
    assert dataset.labels == ("0", "1", "2") and len(dataset.train) == 6 and len(dataset.val) == 3
    assert np.array_equal(dataset.train[2]["image"][0, :7, :7], pixels[2])
    assert not dataset.train[2]["image"][0, 7].any()
    write_mnist(tmp_path / "emnist", "emnist-letters-", suffix)
    turned, _ = prepare(tmp_path / "emnist")
    assert np.array_equal(turned.train[2]["image"][0, :7, :7], pixels[2].T)
    colour, _ = prepare(tmp_path / "mnist", channels=3)
    assert np.array_equal(colour.train[2]["image"][2], dataset.train[2]["image"][0])
    large = images.prepare(str(tmp_path / "mnist"), (20, 24), tmp_path / "cache")
    assert large.train[0]["image"].shape == (1, 20, 24)


def test_a_damaged_idx_file_is_named(tmp_path):
    write_mnist(tmp_path / "mnist")
    path = tmp_path / "mnist" / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    for content, words in (
        (whole[:-1], "293 bytes, 294 promised"),
        (whole + b"x", "more bytes, 294 promised"),
        (b"\0\0\x0d\x03" + whole[4:], "expected an idx file of bytes"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "bytes promised; at most"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 6, 0, 7), r"\(6, 0, 7\): no images"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            prepare(tmp_path / "mnist")
    path.unlink()
    with pytest.raises(ValueError, match="train images: found none"):
        prepare(tmp_path / "mnist")


def write_cifar(folder, n_labels, label=3):
    """Write files of two images to learn from, and one held out; return the two records."""
    folder.mkdir()
    train, test = [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin"
    if n_labels == 2:
        train, test = ["train.bin"], "test.bin"
    records = np.random.default_rng(0).integers(0, 255, (2, n_labels + 3072)).astype(np.uint8)
    records[:, n_labels - 1] = (1, label)
    for name in train:
        records.tofile(folder / name)
    records[:1].tofile(folder / test)
    return records


@pytest.mark.parametrize("n_labels, n_classes", [(1, 10), (2, 100)])
def test_cifar_as_published_is_read(n_labels, n_classes, tmp_path):
    records = write_cifar(tmp_path / "cifar", n_labels)
    dataset = images.prepare(str(tmp_path / "cifar"), (32, 32), tmp_path / "cache")
    assert len(dataset.labels) == n_classes and [dataset.train[i]["label"] for i in (0, 1)] == [1, 3]
    pixels = records[1, n_labels:].reshape(3, 32, 32)
    assert np.array_equal(dataset.train[1]["image"], pixels)
    assert images.prepare(str(tmp_path / "cifar"), SIZE, tmp_path, channels=1).train[0]["image"].shape == (
        1,
        8,
        8,
    )


def test_a_pickle_a_wrong_label_and_a_cut_file_of_cifar_are_refused(tmp_path):
    write_cifar(tmp_path / "wrong", 1, label=12)
    with pytest.raises(ValueError, match="record 1 has label 12; expected 0 to 9"):
        prepare(tmp_path / "wrong")
    for name in ("data_batch_3.bin", "test_batch.bin"):
        write_cifar(tmp_path / name, 1)
        (tmp_path / name / name).unlink()
        with pytest.raises(ValueError, match=f"{name} is missing; expected all files"):
            prepare(tmp_path / name)
    (tmp_path / "wrong" / "data_batch_1.bin").write_bytes(bytes(3000))
    with pytest.raises(ValueError, match="3,000 bytes; expected records of 3,073"):
        prepare(tmp_path / "wrong")
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "data_batch_1").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="a pickle, which could run any code; expected the binary version"):
        prepare(tmp_path / "python")


def test_augmentation_is_a_function_of_the_generator_and_leaves_held_out_images_alone(folder):
    dataset, _ = prepare(folder)
    batch = stack([dataset.train[0], dataset.train[1], dataset.val[0]])
    pixels = batch["image"].float() / 255

    def views(seed, **settings):
        generator = torch.Generator().manual_seed(seed)
        return augment(pixels, batch["augment"], Augmentation(**settings), generator)

    first = views(0)
    assert torch.equal(first, views(0)) and not torch.equal(first, views(1))
    assert torch.equal(first[2], pixels[2]) and not torch.equal(first[0], pixels[0])
    assert first.min() >= 0 and first.max() <= 1
    assert torch.equal(views(0, warp=0.0), pixels)
    # Mirrored images are those turned around, each with probability one half.
    turned = torch.stack([views(seed, warp=0.0, mirror=True)[0] for seed in range(20)])
    is_same = ((turned - pixels[0]).abs().amax((1, 2, 3)) < 1e-5).sum()
    is_turned = ((turned - pixels[0].flip(-1)).abs().amax((1, 2, 3)) < 1e-5).sum()
    assert is_same + is_turned == 20 and 4 <= is_same <= 16


def test_a_warp_of_zero_is_the_identity_and_every_map_stays_within_its_limits():
    still = transforms(3, Augmentation(warp=0.0), torch.Generator().manual_seed(0))
    assert torch.equal(still, torch.eye(2, 3).expand(3, 2, 3))
    maps = transforms(500, Augmentation(), torch.Generator().manual_seed(0))
    determinants = torch.linalg.det(maps[:, :, :2])
    assert determinants.min() > 0.7 and determinants.max() < 1.4 and maps[:, :, 2].abs().max() <= 0.15


def test_no_draw_gives_a_mirrored_image_without_width(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, 0.5))
    maps = transforms(1, Augmentation(mirror=True), torch.Generator())
    assert torch.linalg.det(maps[:, :, :2]).abs().item() == 1


def test_the_command_prints_what_is_in_a_folder(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    images.main(["set", "--size", "8"])
    printed = capsys.readouterr().out
    assert "18 colour images of 8 x 8 to learn from, 2 held out, 2 classes" in printed and "9 dog" in printed
    manifest = json.loads(next((folder.parent / "cache").glob("images-*/manifest.json")).read_text())
    assert manifest["shape"] == [3, 8, 8] and manifest["labels"] == ["cat", "dog"]
