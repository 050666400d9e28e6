"""Files and directories that are replaced in one step, and their checksums."""

import json

import pytest

from formats.atomic import damage, replace_directory, write_checksums


def test_a_directory_is_replaced_whole_or_stays_as_it_is(tmp_path):
    home, before = tmp_path / "home", tmp_path / "before"
    for text in ("first", "second"):
        with replace_directory(home, previous=before) as new:
            (new / "inner").mkdir()
            (new / "inner" / "file").write_text(text)
    with pytest.raises(KeyError), replace_directory(home, previous=before) as new:
        (new / "file").write_text("third")
        raise KeyError
    assert [(path / "inner" / "file").read_text() for path in (home, before)] == ["second", "first"]
    assert sorted(tmp_path.iterdir()) == [before, home]


def test_a_file_that_is_missing_or_changed_is_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path)
    assert damage(tmp_path) is None
    (tmp_path / "b").write_text("c")
    assert damage(tmp_path) == f"{tmp_path / 'b'} is damaged (its checksum does not match)"
    (tmp_path / "b").unlink()
    assert damage(tmp_path) == f"{tmp_path / 'b'} is missing"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", json.dumps("text")])
def test_checksums_that_are_damaged_themselves_are_named(content, tmp_path):
    (tmp_path / "checksums.json").write_text(content)
    assert f"{tmp_path / 'checksums.json'} is" in damage(tmp_path)
