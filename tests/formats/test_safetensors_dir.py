"""The helpers that all families of models share: names, files."""

import errno
import json

import pytest
import torch
from safetensors import SafetensorError

from formats import safetensors_dir
from formats.json_file import read_json, write_json
from formats.safetensors_dir import (
    inverse,
    read_tensors,
    read_weights,
    rename,
    write,
    write_tensors,
)


def test_names_are_replaced_at_their_beginning_or_after_a_dot():
    table = {"h.": "layers.", ".ln.": ".norm.", "layers.0.": "first."}
    assert rename("h.0.ln.h.ln.weight", table) == "first.norm.h.ln.weight"
    assert rename("graph.h.weight", table) == "graph.h.weight"
    assert rename(rename("h.1.ln.bias", table), inverse(table)) == "h.1.ln.bias"


def test_json_is_written_whole_and_read_with_clear_errors(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"é": [1]})
    assert path.read_bytes() == '{\n  "é": [\n    1\n  ]\n}\n'.encode() and read_json(path) == {"é": [1]}
    with pytest.raises(TypeError):
        write_json(path, {"é": {1}})
    assert read_json(path) == {"é": [1]} and list(tmp_path.iterdir()) == [path]
    for content, message in (("{", "not JSON"), ("[" * 100_000, "not JSON"), ("[]", "found a list")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_json(path)
    with pytest.raises(ValueError, match=r"nowhere: no such file; expected a thing"):
        read_json(tmp_path / "nowhere", "a thing")


def test_weights_are_written_and_read(tmp_path):
    weights = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.zeros(2, dtype=torch.bfloat16)}
    hf = {"architectures": ["X"]}
    write(tmp_path / "deep" / "er", hf, weights)
    read = read_weights(tmp_path / "deep" / "er")
    assert read.keys() == weights.keys() and all(torch.equal(read[name], w) for name, w in weights.items())
    assert read_json(tmp_path / "deep" / "er" / "config.json") == hf | {"torch_dtype": "float32"}
    assert hf == {"architectures": ["X"]}
    with pytest.raises(ValueError, match=r"c is torch\.int64: expected floating-point weights"):
        write(tmp_path, hf, {"c": torch.zeros(2, dtype=torch.int64)})

    write_tensors(tmp_path / "t.safetensors", weights, {"of": "me"})
    assert read_tensors(tmp_path / "t.safetensors")[1] == {"format": "pt", "of": "me"}


def test_an_index_names_files_of_its_own_directory_only(tmp_path):
    index = {"weight_map": {"a": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected a file in the same directory"):
        read_weights(tmp_path)


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"a": torch.ones(3)})

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors_dir, "save_file", full)
    with pytest.raises(OSError, match="the disk is full") as error:
        write_tensors(path, {"a": torch.zeros(3)})
    assert error.value.filename == str(path) and error.value.errno == errno.ENOSPC
    assert read_tensors(path)[0]["a"].tolist() == [1, 1, 1]
    assert list(tmp_path.iterdir()) == [path]
