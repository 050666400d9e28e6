"""Models in our own layout: saved and loaded as they were, or refused by a message that names the reason."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from formats import native
from formats.open_model import concept_of, open_model

CONCEPT = """
from dataclasses import dataclass

import torch
from torch import nn

from formats import native


@dataclass(frozen=True)
class Inner:
    d_model: int = 4
    shape: tuple[int, ...] = (1, 2)
    kernels: str = "auto"


@dataclass(frozen=True)
class Config:
    inner: Inner = Inner()
    other: Inner | None = None
    widths: tuple[int, ...] = (4, 6)
    pairs: tuple[tuple[str, float], ...] = (("a", 0.5),)
    scaling: dict | None = None
    names: object = None
    kernels: str = "auto"


SIZES = {"tiny": Config()}


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(5, config.inner.d_model)
        self.layers = nn.ModuleList(nn.Linear(config.inner.d_model, width) for width in config.widths)
        self.norm = nn.BatchNorm1d(config.inner.d_model)
        self.head = nn.Linear(config.inner.d_model, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    from_pretrained = classmethod(lambda cls, directory, *, kernels="auto": native.load(directory, kernels))
    save_pretrained = native.save
"""


@pytest.fixture
def concept(tmp_path, monkeypatch):
    """A concept file in the current directory, imported."""
    (tmp_path / "small_concept.py").write_text(CONCEPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__("small_concept")
    del sys.modules["small_concept"]


def edit(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_model_comes_back_as_it_was(concept, tmp_path):
    config = replace(
        concept.SIZES["tiny"],
        inner=concept.Inner(shape=(3,), kernels="reference"),
        other=concept.Inner(2),
        widths=(3, 2, 1),
        scaling={"type": "linear", "factors": (1.0, 2.0)},
        kernels="triton",
    )
    model = concept.Model(config).to(torch.bfloat16)
    model.norm.num_batches_tracked += 7
    model.save_pretrained(tmp_path / "out" / "model")
    drawn = torch.get_rng_state()
    for again in (
        concept.Model.from_pretrained(tmp_path / "out" / "model", kernels="torch"),
        open_model(tmp_path / "out" / "model", kernels="torch"),
    ):
        inner, other = (replace(c, kernels="torch") for c in (config.inner, config.other))
        assert again.config == replace(config, inner=inner, other=other, kernels="torch")
        for (name, w), (name_again, w_again) in zip(
            model.state_dict().items(), again.state_dict().items(), strict=True
        ):
            assert name == name_again and w.dtype == w_again.dtype and torch.equal(w, w_again)
        assert again.head.weight is again.embed.weight
        assert again.table.tolist() == [0, 1, 2]
    assert torch.equal(torch.get_rng_state(), drawn)
    assert concept_of(tmp_path / "out" / "model") == "small_concept"


def test_the_files_are_readable_by_others(concept, tmp_path):
    native.save(concept.Model(concept.SIZES["tiny"]), tmp_path / "model")
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert content["architectures"] == ["plinth.small_concept"] and content["torch_dtype"] == "float32"
    assert content["config"]["widths"] == [4, 6] and content["config"]["kernels"] == "auto"
    names = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert "embed.weight" in names and "head.weight" not in names


@pytest.mark.parametrize("names", [["a"], {1: 2}, {"a", "b"}])
def test_a_config_that_json_would_change_is_refused(concept, tmp_path, names):
    model = concept.Model(replace(concept.SIZES["tiny"], names=names))
    with pytest.raises(ValueError, match=r"small_concept: .*JSON"):
        native.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_parameters_in_whole_numbers_are_refused(concept, tmp_path):
    model = concept.Model(concept.SIZES["tiny"])
    model.packed = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"packed is torch\.uint8"):
        native.save(model, tmp_path / "model")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["plinth.no_such_concept"]}, "plinth.no_such_concept.*expected 'plinth.' and"),
        ({"architectures": ["plinth.json"]}, "expected 'plinth.' and the name of a concept file"),
        ({"architectures": ["plinth.."]}, "expected 'plinth.' and"),
        ({"architectures": ["plinth.formats.native.x"]}, "expected 'plinth.' and"),
        ({"architectures": ["plinth.formats.atomic"]}, "formats.atomic has no Model and SIZES"),
        ({"config": {"depth": 3}}, r"config\.json: small_concept\.Config has no field 'depth'"),
        ({"config": {"inner": {"depth": 3}}}, r"small_concept\.Inner has no field 'depth'"),
        ({"config": {"widths": [4, 6, 8]}}, r"layers\.2\.bias is missing"),
        ({"config": {"widths": [4, 7]}}, r"layers\.1\.bias has shape \(6,\), config\.json says \(7,\)"),
        ({"config": {"widths": "4"}}, r"config\.json: "),
        ({"config": [4, 6]}, r"config\.json: config \[4, 6\]: expected an object"),
        ({"config": {"inner": {"widths": -1}}}, r"config\.json: "),
    ],
)
def test_what_does_not_fit_is_named(concept, tmp_path, changes, message):
    native.save(concept.Model(concept.SIZES["tiny"]), tmp_path / "model")
    edit(tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=message) as raised:
        native.load(tmp_path / "model")
    assert "\n" not in str(raised.value)


def test_a_model_of_another_concept_is_refused_and_one_that_extends_it_is_not(concept, tmp_path):
    from vision.vae import VAE

    native.save(concept.Model(concept.SIZES["tiny"]), tmp_path / "model")
    with pytest.raises(ValueError, match=r"a model of small_concept; expected one of vision\.vae"):
        VAE.from_pretrained(tmp_path / "model")
    assert native.load(tmp_path / "model", kind=torch.nn.Module) is not None
