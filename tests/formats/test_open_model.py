"""Directories of every kind are opened by the concept file that reads them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from formats.open_model import concept_of, open_model
from posttraining import classify

FIXTURES = Path(__file__).parents[1] / "fixtures"
KINDS = {
    "gpt": ("gpt2", "llama", "llama-sharded", "mistral", "qwen2", "qwen3"),
    "moe": ("mixtral", "olmoe", "qwen3-moe", "dots1"),
    "bert": (
        "bert-mlm",
        "bert-model",
        "roberta-mlm",
        "albert-pretraining",
        "electra-generator",
        "modernbert-mlm",
    ),
    "attention_variants.local_global": ("gemma2", "gemma3"),
    "attention_variants.latent": ("deepseek-dense",),
    "attention_variants.deepseek": ("deepseek-v2", "deepseek-v3"),
    "language.electra": ("electra-discriminator",),
    "language.deberta": ("deberta-v1", "deberta-v3", "deberta-released", "deberta-released-v2"),
    "posttraining.classify": ("bert-classifier",),
}


@pytest.mark.parametrize("concept, name", [(concept, name) for concept in KINDS for name in KINDS[concept]])
def test_every_kind_is_opened_by_its_concept(concept, name, monkeypatch):
    monkeypatch.setattr(classify, "Model", classify.Classifier, raising=False)
    assert concept_of(FIXTURES / name) == concept
    model = open_model(FIXTURES / name, kernels="reference")
    assert type(model).__module__ == concept
    assert getattr(model.config, "kernels", "reference") == "reference"  # DeBERTa has no kernel


@pytest.mark.parametrize("name, base", [("llama-lora", "llama"), ("olmoe-experts", "olmoe")])
def test_an_adapter_is_opened_on_its_base(name, base, tmp_path):
    adapter = FIXTURES / "adapters" / name
    expected = load_file(adapter / "expected.safetensors")
    model = open_model(adapter, base=FIXTURES / base).eval()
    assert concept_of(adapter, base=FIXTURES / base) == type(model).__module__
    with torch.no_grad():
        logits = model(expected["tokens"])
        plain = open_model(FIXTURES / base).eval()(expected["tokens"])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, logits, atol=1e-3)

    copy = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((copy / "adapter_config.json").read_text())
    for named in (str(FIXTURES / base), "nowhere", None):
        config["base_model_name_or_path"] = named
        (copy / "adapter_config.json").write_text(json.dumps(config))
        if named == str(FIXTURES / base):
            with torch.no_grad():
                assert torch.equal(open_model(copy).eval()(expected["tokens"]), logits)
            continue
        with pytest.raises(
            ValueError, match=f"an adapter of '{named}', which is no directory here; .*--base"
        ):
            open_model(copy)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            {"architectures": ["MarianMTModel"]},
            "'MarianMTModel': expected one of GPT2",
        ),
        ({"architectures": ["DeepseekV32ForCausalLM"]}, "'DeepseekV32ForCausalLM': expected one of"),
        ({}, "'none': expected one of"),
        (
            {"architectures": ["plinth.os"]},
            "'plinth.os': expected 'plinth\\.' and the name of a concept file",
        ),
    ],
)
def test_an_unknown_architecture_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_text(json.dumps(content))
    for function in (open_model, concept_of):
        with pytest.raises(ValueError, match=message) as raised:
            function(tmp_path)
        assert str(tmp_path / "config.json") in str(raised.value) and "\n" not in str(raised.value)


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: no such file; expected a directory"):
        open_model(tmp_path / "nowhere")
