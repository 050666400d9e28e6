"""Images with captions in tar files: what makes a sample, ranges of shards, and what is refused."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from data.captions import read
from data.tar_images import find_shards


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(file, "png")
    return file.getvalue()


def write(path, members, link=None):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo("x.png")
            info.type, info.linkname = tarfile.SYMTYPE, link
            tar.addfile(info)


def read_all(data, cache, notify=lambda line: None, **options):
    """Return {the grey of an image: its captions} of both parts."""
    parts = read(str(data), (4, 4), cache, notify=notify, **options)
    pairs = [pair for part in parts for pair in zip(part.images, part.captions, strict=True)]
    return {int(image[0, 0, 0]): texts for image, texts in pairs}


def test_members_up_to_the_first_dot_are_one_sample_and_nothing_is_unpacked(tmp_path):
    one = {"d/a.jpg.PNG": b"", "a.png": png(10), "a.txt": b"ten\n", "d/a.json": b'{"caption": ["x", "y"]}'}
    one |= {"d/a.png": png(20), "a.cls": b"3", "b.seg.png": b"no image"}
    write(tmp_path / "s-08.tar", one, link="/etc/passwd")
    write(tmp_path / "s-09.tar", {"c.json": json.dumps({"text": "thirty"}).encode(), "c.png": png(30)})
    write(tmp_path / "s-10.tar", {"a.png": png(40), "a.txt": b"forty"})
    expected = {10: ("ten",), 20: ("x", "y"), 30: ("thirty",), 40: ("forty",)}
    before = set(tmp_path.iterdir())
    cache = tmp_path.parent / "cache-of-shards"
    for data in (tmp_path, tmp_path / "s-{08..10}.tar", tmp_path / "s-*.tar"):
        assert read_all(data, cache) == expected
    assert set(tmp_path.iterdir()) == before
    assert read_all(tmp_path / "s-{08..09}.tar", cache, val=str(tmp_path / "s-10.tar")) == expected


def test_webdataset_tars_are_found_by_range_in_order(tmp_path):
    for name in ("a-2-0.tar", "a-2-1.tar", "a-3-0.tar", "a-3-1.tar"):
        write(tmp_path / name, {})
    found = find_shards(str(tmp_path / "a-{2..3}-{0..1}.tar"), "--data")
    assert [path.name for path in found] == ["a-2-0.tar", "a-2-1.tar", "a-3-0.tar", "a-3-1.tar"]
    assert find_shards(str(tmp_path / "a-{2..2}-1.tar"), "--data") == [tmp_path / "a-2-1.tar"]
    for data, words in (
        ("a-{2..4}-0.tar", "a-4-0.tar is missing"),
        ("a-{3..2}-0.tar", "expected a rising range"),
        ("a-{0..99999999}.tar", "expected a rising range"),
        ("b-*.tar", "not found"),
    ):
        with pytest.raises(ValueError, match=words):
            find_shards(str(tmp_path / data), "--data")


@pytest.mark.parametrize(
    "members, words",
    [
        ({"a.png": png(1)}, "a.png: has no caption"),
        ({"a.png": png(1), "a.txt": b"\xff\xfe"}, "a.txt: 'utf-8' codec"),
        ({"a.png": png(1), "a.json": b"[1]"}, 'a.json: .*expected a "caption"'),
        ({"a.png": png(1), "a.json": b"{"}, "a.json: Expecting"),
        ({"a.png": png(1), "a.txt": b"x" * (1 << 21)}, "expected at most 1,048,576 of a caption"),
        ({"a.png": b"no image", "a.txt": b"x"}, "a.png: not an image"),
    ],
)
def test_a_sample_that_cannot_be_read_is_named_or_left_out(members, words, tmp_path):
    write(tmp_path / "s.tar", {**members, "b.png": png(2), "b.txt": b"b", "c.png": png(3), "c.txt": b"c"})
    with pytest.raises(ValueError, match=words):
        read_all(tmp_path / "s.tar", tmp_path / "cache")
    lines = []
    found = read_all(tmp_path / "s.tar", tmp_path / "cache", bad="skip", notify=lines.append)
    assert found == {2: ("b",), 3: ("c",)} and len([line for line in lines if "skipped: " in line]) == 1


def test_what_is_no_tar_file_is_refused(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"hello" * 1000)
    with pytest.raises(ValueError, match="not a tar file, or cut off"):
        read_all(tmp_path / "s.tar", tmp_path / "cache")
    write(tmp_path / "t.tar", {"a.png": png(1), "a.txt": b"a"})
    (tmp_path / "t.tar").write_bytes((tmp_path / "t.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"cut off|no images|damaged|has no caption"):
        read_all(tmp_path / "t.tar", tmp_path / "cache")
