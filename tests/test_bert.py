"""BERT and its relatives against transformers (recorded), published counts, and against themselves."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_command
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import bert
from bert import BERT, SIZES, Config
from data.tokenizer import train_bpe
from language import masking
from language.encoder_inference import pack
from language.masking import SPECIAL_TOKENS

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = [
    "bert-model", "bert-mlm", "bert-pretraining", "roberta-mlm", "albert-pretraining", "modernbert-mlm",
    "electra-generator",
]  # fmt: skip
SMALL = Config(2, 4, 32, 48, vocab_size=300, max_seq_len=32)
MODERN = replace(SMALL, **bert.MODERN)
VARIANTS = {
    "bert": {"pooler": False},
    "roberta": {"pooler": False, "n_segments": 1, "position_offset": 4, "pad_token_id": 3},
    "albert": {"d_embedding": 16, "share_layers": True, "mlp": "gelu_tanh", "pair": "sop"},
    "electra": {"d_embedding": 16, "pooler": False},
    "modern": bert.MODERN,
    "modern local": {**bert.MODERN, "window": 4, "n_layers": 4},
    "bert with pairs": {"pair": "nsp"},
    "bert without heads": {"mlm_head": False},
}
TEXT = "".join(f"The {i}th thing, and some_name = f({i}) of it\n" for i in range(200))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([TEXT], 296).with_special_tokens(SPECIAL_TOKENS)


def small(**changes):
    """A random model whose outputs depend visibly on every weight."""
    torch.manual_seed(0)
    model = BERT(replace(SMALL, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def recorded(name):
    """The model, what transformers computes, and the rows without their padding, packed."""
    model, expected = (
        BERT.from_pretrained(FIXTURES / name).eval(),
        load_file(FIXTURES / name / "expected.safetensors"),
    )
    lengths = expected["lengths"].tolist()
    tokens, cu_seqlens = pack([row[:n].tolist() for row, n in zip(expected["tokens"], lengths, strict=True)])
    kept = torch.arange(expected["tokens"].shape[1]) < expected["lengths"][:, None]
    return (
        model,
        expected,
        kept,
        {"tokens": tokens, "segments": expected["segments"][kept][None], "cu_seqlens": cu_seqlens},
    )


def tolerance(expected, name):
    """Return 1e-5, or five times the reference's own float32 noise where that is larger."""
    return max(1e-5, 5 * expected[f"{name}64_error"].item())


# --- parity with transformers


@pytest.mark.parametrize("name", RECORDED)
def test_hidden_states_and_logits_equal_transformers(name):
    """Padded rows of three lengths there, packed end to end here."""
    model, expected, kept, packed = recorded(name)
    with torch.no_grad():
        hidden = model.hidden(**packed)
        ours = {"hidden": hidden[0]}
        if model.config.mlm_head:
            ours["logits"] = model.logits(hidden)[0]
        if model.config.pooler:
            ours["pooled"] = model.pooled(hidden, packed["cu_seqlens"])
        if model.config.pair != "none":
            ours["pair_logits"] = model.cls.seq_relationship(ours["pooled"])
    compared = {key for key in ("hidden", "logits", "pooled", "pair_logits") if key in expected}
    assert compared == ours.keys()
    for key, value in ours.items():
        theirs = expected[key][kept] if key in ("hidden", "logits") else expected[key]
        assert (value - theirs).abs().max() < tolerance(expected, key), key


@pytest.mark.parametrize("name", [name for name in RECORDED if name != "bert-model"])
def test_losses_equal_transformers(name):
    model, expected, kept, packed = recorded(name)
    labels = expected["labels"][kept]
    positions = (labels >= 0).nonzero().flatten()
    batch = {**packed, "positions": positions[None], "targets": labels[positions][None]}
    wanted = expected["mlm_loss"]
    if model.config.pair != "none":
        batch["pair_labels"] = expected["pair_labels"]
        wanted = wanted + expected["pair_loss"]
    loss, metrics = masking.loss(model, batch)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    if model.config.pair != "none":
        assert metrics["mlm_loss"].item() == pytest.approx(expected["mlm_loss"].item(), rel=1e-5)


@pytest.mark.parametrize("name", RECORDED)
def test_saving_and_loading_returns_the_same_model(name, tmp_path):
    model, _, _, packed = recorded(name)
    model.save_pretrained(tmp_path)
    again = BERT.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    assert torch.equal(again.hidden(**packed), model.hidden(**packed))
    theirs = json.loads((FIXTURES / name / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == theirs["architectures"]


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_opens_what_we_save(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small(**VARIANTS[name])
    model.save_pretrained(tmp_path)
    architecture = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    theirs, info = getattr(transformers, architecture).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.randint(4, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if model.config.mlm_head:
            out = theirs.eval()(tokens)
            ours, logits = model(tokens), out.get("logits", out.get("prediction_logits"))
        else:
            ours, logits = model.hidden(tokens), theirs.eval()(tokens).last_hidden_state
    # weights of order one give logits of order ten: ten times the parity tolerance of logits of order one
    assert (ours - logits).abs().max() < 1e-4


def test_modernbert_of_transformers_4_means_the_same(tmp_path):
    (tmp_path / "config.json").write_text((FIXTURES / "modernbert-mlm" / "config_v4.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(
        (FIXTURES / "modernbert-mlm" / "model.safetensors").read_bytes()
    )
    assert BERT.from_pretrained(tmp_path).config == recorded("modernbert-mlm")[0].config


def test_the_first_bert_files_load(tmp_path):
    """They call a norm's weight and bias gamma and beta, carry positions, and say BertForMaskedLM."""
    directory = FIXTURES / "bert-pretraining"
    old = {"bert.embeddings.position_ids": torch.arange(64)[None]}
    for name, w in load_file(directory / "model.safetensors").items():
        old[
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        ] = w
    save_file(old, tmp_path / "model.safetensors")
    hf = json.loads((directory / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    model, _, _, packed = recorded("bert-pretraining")
    assert torch.equal(BERT.from_pretrained(tmp_path).hidden(**packed), model.hidden(**packed))


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("bert-mlm", {"model_type": "xlnet"}, "model_type 'xlnet': expected one of bert, roberta"),
        ("bert-mlm", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("bert-mlm", {"position_embedding_type": "relative_key"}, "relative_key"),
        ("bert-mlm", {"num_hidden_layers": 5}, "is missing"),
        ("bert-mlm", {"num_hidden_layers": 1}, "no place"),
        ("bert-mlm", {"intermediate_size": 41}, "shape"),
        ("bert-mlm", {"num_attention_heads": 5}, "multiple of n_heads 5"),
        ("bert-mlm", {"hidden_size": None}, "hidden_size missing"),
        ("bert-mlm", {"unheard_of": 1}, "unheard_of 1 is not implemented"),
        ("albert-pretraining", {"num_hidden_groups": 2}, "num_hidden_groups 2"),
        ("modernbert-mlm", {"norm_bias": True}, "norm_bias True"),
        ("modernbert-mlm", {"layer_types": ["sliding_attention"] * 4}, "every k-th layer"),
        ("modernbert-mlm", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "yarn"),
    ],
)
def test_config_features_we_lack_are_named(name, changes, message, tmp_path):
    hf = json.loads((FIXTURES / name / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(hf))
    (tmp_path / "model.safetensors").write_bytes((FIXTURES / name / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=message):
        BERT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_norm": True},
        {"mlp": "geglu"},
        {"n_segments": 0},
        {"window": 4},
        {"share_layers": True},
        {"position_offset": 3, "pooler": False},
    ],
)
def test_a_model_no_architecture_describes_is_refused_before_anything_is_written(changes, tmp_path):
    with pytest.raises(ValueError, match="no Hugging Face architecture"):
        small(**changes).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# --- sizes, cost, initialisation

PUBLISHED = {  # of the encoder with its pooler, as counted in transformers' BertModel, AlbertModel ...
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "roberta-base": 124_055_040,  # RobertaForMaskedLM has no pooler; with one it is 124,645,632
    "albert-base": 11_683_584,
    "modern-base": 149_014_272,
}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_the_published_ones(size):
    with torch.device("meta"):
        model = BERT(SIZES[size])
    encoder = sum(p.numel() for p in model.bert.parameters())
    assert encoder == PUBLISHED.get(size, encoder)


@pytest.mark.parametrize("changes", [{}, {"pair": "nsp"}, {**bert.MODERN, "window": 5}, VARIANTS["albert"]])
def test_flops_formula_counts_the_matrix_products(changes):
    """PyTorch counts the products that run; it cannot see that masked scores need none: added here."""
    model, T, n = small(kernels="reference", **changes), 32, 5
    tokens, positions = torch.randint(300, (3, T)), torch.arange(3 * n).view(3, n)
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden(tokens)
        loss = model.logits(hidden.flatten(0, 1)[positions]).sum()
        if model.config.pair != "none":
            loss = loss + model.cls.seq_relationship(model.pooled(hidden)).sum()
        loss.backward()
    without_masked = counter.get_total_flops() / (3 * T) - masked_scores(model, T)
    assert model.flops_per_token(T, n) == pytest.approx(without_masked, rel=1e-3)
    everywhere = model.flops_per_token(T, n) + 6 * (T - n) * (32 + 300) * model.config.E // T
    assert model.flops_per_token(T) == pytest.approx(everywhere, abs=2)


def masked_scores(model, T):
    """FLOPs per token of attention's products at places that the window hides."""
    masked = 0
    for layer in range(model.config.n_layers):
        w = model.config.layer_window(layer) or T
        seen = sum(abs(i - j) < w for i in range(T) for j in range(T)) / T
        masked += 12 * model.config.d_model * (T - seen)
    return masked


def test_initialisation():
    torch.manual_seed(0)
    for size in ("tiny", "tiny-bert"):
        config = SIZES[size]
        for name, p in BERT(config).named_parameters():
            if name.endswith("bias"):
                assert (p == 0).all()
            elif p.ndim == 1:
                assert (p == 1).all()
            else:
                expected = 0.02 if "embeddings" in name else 0.02 * math.sqrt(768 / 128)
                expected /= math.sqrt(2 * 4) if config.pre_norm and "output.dense" in name else 1
                assert p.std().item() == pytest.approx(expected, rel=0.05), name


def test_a_parameter_without_a_rule_of_initialisation_is_refused():
    model = small()
    model.extra = torch.nn.Parameter(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match="parameter extra: no rule"):
        bert.initialize(model, model.config)


# --- what the model computes


@pytest.mark.parametrize("name", VARIANTS)
def test_a_text_reads_the_same_alone_and_among_others(name):
    model = small(**VARIANTS[name])
    rows = [torch.randint(300, (n,)).tolist() for n in (5, 1, 19)]
    tokens, cu_seqlens = pack(rows)
    packed = model.hidden(tokens, cu_seqlens=cu_seqlens)[0]
    alone = torch.cat([model.hidden(torch.tensor([row]))[0] for row in rows])
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-5)


def test_a_text_that_is_too_long_is_refused():
    model = small()
    with pytest.raises(ValueError, match="33 tokens: this model reads at most 32"):
        model.hidden(torch.zeros(1, 33, dtype=torch.int64))
    with pytest.raises(ValueError, match="33 tokens: this model reads at most 32"):
        model.hidden(*pack([[1] * 33, [1]])[:1], cu_seqlens=torch.tensor([0, 33, 34]))


def test_kernel_backends_agree():
    tokens = torch.randint(300, (2, 20))
    for changes in ({}, {**bert.MODERN, "window": 5}):
        reference = small(kernels="reference", **changes)(tokens)
        torch.testing.assert_close(small(kernels="torch", **changes)(tokens), reference, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mlp": "relu"}, "relu"),
        ({"n_heads": 3}, "multiple"),
        ({"pair": "nsp", "pooler": False}, "pooler"),
        ({"n_layers": 0}, "n_layers 0: expected at least 1"),
        ({"window": 0}, "window 0"),
        ({"positions": "rope", "n_heads": 32}, "heads of width 1"),
        ({"share_layers": True, "pre_norm": True}, "share_layers"),
    ],
)
def test_impossible_configs_say_why(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_an_embedding_width_that_is_left_out_follows_the_models():
    assert SMALL.d_embedding is None and SMALL.E == 32
    assert replace(SMALL, d_model=64).E == 64
    assert replace(SMALL, d_embedding=16, d_model=64).E == 16


def test_a_config_is_fitted_to_the_data(tokenizer):
    dataset = SimpleNamespace(tokenizer=tokenizer)
    fitted = bert.fit(SIZES["tiny"], dataset, 64)
    assert (fitted.vocab_size, fitted.max_seq_len, fitted.pad_token_id) == (300, 64, tokenizer.pad_id)
    # RoBERTa's positions begin after the id of padding, or at 0 where that is another id.
    at = replace(SMALL, pooler=False, position_offset=tokenizer.pad_id + 1)
    assert bert.fit(at, dataset, 64).position_offset == tokenizer.pad_id + 1
    assert bert.fit(SIZES["roberta-base"], dataset, 64).position_offset == 0


# --- the command


def test_the_command(tokenizer, tmp_path):
    assert "109,482,240" in run_command("bert.py").out
    small().save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    assert run_command("bert.py", tmp_path, "--text", "The [MASK] of it", "--k", "2").out.count("%") == 2
    failed = run_command("bert.py", tmp_path, "--text", "no mask")
    assert failed.code == 2 and failed.err.startswith("error: no [MASK]")
