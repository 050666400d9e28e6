"""DeBERTa v3: its loss written out, where gradients go, and what is saved and opened again."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import copy_of, rows_of, run_command
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import train
from data.tokenizer import get_tokenizer, train_bpe
from formats.open_model import open_model
from language import deberta_v3
from language.deberta import DeBERTa
from language.deberta_v3 import SIZES, Config, DeBERTaV3, make_batch
from language.electra import detect, draw, print_sizes
from language.masking import SPECIAL_TOKENS

SMALL = Config(4, 4, 16, 20, 300, 32, max_distance=32, n_buckets=8)
TEXT = "".join(f"The {i}th thing, and some_name = f({i}) of it\n" for i in range(200))
WORDS = "deberta.embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([TEXT], 296).with_special_tokens(SPECIAL_TOKENS)


def small(**changes):
    """Return a random model whose outputs depend visibly on every weight."""
    torch.manual_seed(0)
    model = DeBERTaV3(replace(SMALL, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def batch_of(tokenizer, **changes):
    tokens = torch.randint(290, (4, 33), generator=torch.Generator().manual_seed(5))
    return make_batch(rows_of(tokens), replace(SMALL, **changes), torch.Generator().manual_seed(1), tokenizer)


# --- the objective


@torch.no_grad()
def test_the_discriminator_judges_each_token_beside_the_first():
    model, tokens = small(), torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(2))
    found, head = model.discriminator, model.discriminator.discriminator_predictions
    h = found.hidden(tokens)
    expected = head.classifier(F.gelu(head.dense(head.LayerNorm(h + h[:, :1]))))[..., 0]
    torch.testing.assert_close(model(tokens), expected)
    assert model.generator.config.n_layers == 2 and model.generator.config.has_decoder
    assert not found.config.has_decoder and not any("position_embeddings" in n for n in found.state_dict())


def test_the_discriminator_begins_with_the_embeddings_of_the_generator():
    torch.manual_seed(0)
    model = DeBERTaV3(SMALL)
    assert (model.discriminator.deberta.embeddings.word_embeddings.weight == 0).all()
    assert torch.equal(model.discriminator.embedding_weight, model.generator.embedding_weight)
    own = DeBERTaV3(replace(SMALL, disentangled=False))
    assert own.discriminator.embedding_weight.std() > 0.01
    assert not torch.equal(own.discriminator.embedding_weight, own.generator.embedding_weight)


def test_loss_is_the_papers_written_out(tokenizer):
    model, batch = small(), batch_of(tokenizer)
    logits = model.generator(batch["tokens"]).flatten(0, 1)[batch["positions"]]
    mlm = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    filled, original = batch["tokens"].flatten().clone(), batch["tokens"].flatten().clone()
    filled[batch["positions"]] = draw(logits, batch["uniform"])
    original[batch["positions"]] = batch["targets"]
    judged = model.discriminator(filled.view(4, 32)).flatten()
    rtd = F.binary_cross_entropy_with_logits(judged, (filled != original).float())
    loss, metrics = model.loss(batch)
    assert 0 < metrics["replaced"] < 0.2
    assert metrics["mlm_loss"].item() == pytest.approx(mlm.item(), rel=1e-5)
    assert loss.item() == pytest.approx((mlm + 10 * rtd).item(), rel=1e-5)


@pytest.mark.parametrize("disentangled", [True, False])
def test_no_gradient_of_the_discriminator_reaches_the_generator(disentangled, tokenizer):
    batch, gradients = batch_of(tokenizer), {}
    for weight in (0.0, 10.0):
        model = small(rtd_weight=weight, disentangled=disentangled)
        model.loss(batch)[0].backward()
        gradients[weight] = {name: p.grad for name, p in model.named_parameters()}
    for name, with_both in gradients[10.0].items():
        if name.startswith("generator."):
            assert torch.equal(with_both, gradients[0.0][name]), name
        else:
            # a bias on all keys alike moves the scores of a query alike, but for the terms of distances
            assert not gradients[0.0][name].any() and with_both.any(), name
    assert gradients[10.0][f"generator.{WORDS}"].any(1).all()


def test_packed_rows_have_the_loss_of_rows_apart(tokenizer):
    """The layout is that of train.py --document-mask."""
    model, batch = small(), batch_of(tokenizer)
    packed = {name: t.reshape(1, -1) for name, t in batch.items()}
    packed["cu_seqlens"] = torch.arange(0, 129, 32, dtype=torch.int32)
    assert model.loss(packed)[0].item() == pytest.approx(model.loss(batch)[0].item(), rel=1e-5)


def test_flops_formula_counts_the_matrix_products(tokenizer):
    """All that PyTorch counts, but for the projections of the table, once a layer and batch."""
    model, batch = small(), batch_of(tokenizer)
    with FlopCounterMode(display=False) as counter:
        model.loss(batch)[0].backward()
    of_table = 6 * (4 + 3) * 2 * 2 * 32 * 16 * 16
    counted = (counter.get_total_flops() - of_table) / (4 * 32)
    assert model.flops_per_token(32) == pytest.approx(counted, rel=5e-3)


# --- directories


def test_saving_and_opening_returns_the_same_model(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    again = open_model(tmp_path)
    assert type(again) is DeBERTaV3 and again.config == model.config
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert (a - b).abs().max() <= (1e-6 if name == f"discriminator.{WORDS}" else 0), name
    tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(2))
    assert (model(tokens) - again(tokens)).abs().max() < 1e-4

    transformers = pytest.importorskip("transformers")
    encoder = transformers.AutoModel.from_pretrained(tmp_path).eval()
    theirs, info = transformers.DebertaV2ForMaskedLM.from_pretrained(
        tmp_path / "generator", output_loading_info=True
    )
    assert not info["missing_keys"]
    with torch.no_grad():
        difference = encoder(tokens).last_hidden_state - model.discriminator.hidden(tokens)
        assert difference.abs().max() < 1e-4
        logits = model.generator.logits(model.generator.hidden(tokens))  # theirs has no mask decoder
        assert (theirs.eval()(tokens).logits - logits).abs().max() < 1e-4


def test_a_published_discriminator_may_hold_another_head_and_positions(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "generator")
    extra = {
        name: w for name, w in saved_generator(model, tmp_path / "other").items() if "lm_predictions" in name
    }
    extra["deberta.embeddings.position_embeddings.weight"] = torch.randn(32, 16)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = open_model(tmp_path).eval()
    assert found.generator is None and found.config == replace(SMALL, generator_size=0.0)
    tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(2))
    assert torch.equal(found(tokens), DeBERTaV3.from_pretrained(tmp_path)(tokens))
    assert (found(tokens) - model(tokens)).abs().max() < 1e-4
    # The same file fills masks by the head of the generator that it holds, and is an encoder.
    filled = DeBERTa.from_pretrained(tmp_path)
    assert filled.config.has_decoder and filled(tokens).shape == (2, 20, 300)


def saved_generator(model, directory):
    model.generator.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def test_directories_of_other_kinds_are_refused(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weight; expected a discriminator of DeBERTa v3"):
        DeBERTaV3.from_pretrained(tmp_path / "generator")
    copy_of(tmp_path / "generator", tmp_path / "generator", max_relative_positions=30)
    with pytest.raises(ValueError, match="generator: max_distance 30, not the 32 that"):
        DeBERTaV3.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"generator_size": 1.5}, "generator_size 1.5: expected 0 to 1"),
        ({"mlm_head": True}, "mlm_head True or absolute 'decoder'"),
        ({"absolute": "decoder"}, "the generator has these"),
        ({"mask_rate": 1.0}, "mask_rate 1.0: expected between 0 and 1"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


# --- runs and the command


def test_a_run_trains_resumes_exactly_and_judges_a_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(deberta_v3.SIZES, "tiny", replace(SMALL, n_layers=2, max_distance=16))
    (tmp_path / "text.txt").write_text(TEXT)

    def flags(out, steps, *more):
        options = dict(
            model="deberta_v3", data=tmp_path / "text.txt", tokenizer="bytes", steps=steps, warmup=0
        )
        options |= dict(seq_len=16, batch_size=4, eval_every=2, schedule="constant", cache=tmp_path / "cache")
        return [*(f"--{k.replace('_', '-')}={v}" for k, v in options.items()), f"--out={out}", *more]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main(flags(whole, 4)) == 0
    assert train.main(flags(cut, 2)) == 0
    assert train.main(flags(cut, 4, "--resume")) == 0
    for part in ("model.safetensors", "generator/model.safetensors"):
        a, b = (load_file(out / "model" / part) for out in (whole, cut))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert "judged replaced" in (whole / "samples.txt").read_text()

    # A text is judged token by token; a mistake is one line.
    model = open_model(whole / "model").eval()
    done = run_command("-m", "language.deberta_v3", whole / "model", "--text", "of it")
    assert len(done.out.splitlines()) == 5 and done.out.count("%") == 5
    p = detect(model, [*judged_row(whole / "model")])[1]
    assert f" {p:.1%} " in f"{done.out.splitlines()[0]} "
    done = run_command("-m", "language.deberta_v3", whole / "model" / "generator", "--text", "of it")
    assert (done.code, done.err.count("\n")) == (2, 1) and "expected a discriminator" in done.err


def judged_row(directory):
    words = get_tokenizer(str(directory))
    return [words.cls_id, *words.encode("of it"), words.sep_id]


def test_the_published_sizes_are_those_of_the_encoder(capsys):
    assert list(SIZES)[1:] == ["v3-xsmall", "v3-small", "v3-base", "v3-large", "mdeberta-v3-base"]
    print_sizes(DeBERTaV3, {"v3-small": SIZES["v3-small"]})
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["v3-small", "141,304,320"]
