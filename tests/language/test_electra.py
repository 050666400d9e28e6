"""ELECTRA against transformers (recorded and run), against its loss written out, and through train.py."""

import json
import math
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import SHARD, copy_of
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import train
from bert import BERT
from data.tokenizer import get_tokenizer, train_bpe
from language import electra
from language.electra import SIZES, Config, Electra, detect, draw, make_batch, show
from language.encoder_inference import pack
from language.masking import SPECIAL_TOKENS

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parents[1] / "fixtures"
# With generators that project the shared embeddings, as does the discriminator or not, and one that need not.
SMALL = Config(2, 4, 32, 48, vocab_size=300, max_seq_len=32, d_embedding=24, generator_size=0.5)
VARIANTS = {
    "both project": {},
    "the generator projects": {"d_embedding": 32},
    "the discriminator projects": {"d_embedding": 16},
    "of one size": {"generator_size": 1.0},
}
TEXT = "".join(f"The {i}th thing, and some_name = f({i}) of it\n" for i in range(200))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([TEXT], 296).with_special_tokens(SPECIAL_TOKENS)


def small(**changes):
    """A random model whose outputs depend visibly on every weight."""
    torch.manual_seed(0)
    model = Electra(replace(SMALL, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def batch_of(tokenizer, n_rows=4, **changes):
    tokens = torch.randint(290, (n_rows, 33), generator=torch.Generator().manual_seed(5))
    return make_batch(rows_of(tokens), replace(SMALL, **changes), torch.Generator().manual_seed(1), tokenizer)


def rows_of(tokens):
    """Rows as a data set has them."""
    return [{"tokens": row.numpy()} for row in tokens]


def held_out(tokenizer, text):
    """A data set whose held-out text is these tokens."""
    return SimpleNamespace(tokenizer=tokenizer, val=SimpleNamespace(tokens=text.numpy()))


def recorded(name):
    """Return what transformers computes, which of it is no padding, and the rows packed without padding."""
    expected = load_file(FIXTURES / name / "expected.safetensors")
    kept = torch.arange(expected["tokens"].shape[1]) < expected["lengths"][:, None]
    rows = [row[mask].tolist() for row, mask in zip(expected["tokens"], kept, strict=True)]
    tokens, cu_seqlens = pack(rows)
    return (
        expected,
        kept,
        {"tokens": tokens, "segments": expected["segments"][kept][None], "cu_seqlens": cu_seqlens},
    )


def tolerance(expected, name):
    """Return 1e-5, or five times the reference's own float32 noise where that is larger."""
    return max(1e-5, 5 * expected[f"{name}64_error"].item())


def recorded_pair(directory):
    """The two fixtures as one checkpoint: the discriminator is given the embeddings of the generator."""
    shutil.copytree(FIXTURES / "electra-discriminator", directory)
    shutil.copytree(FIXTURES / "electra-generator", directory / "generator")
    weights, generator = (
        load_file(path / "model.safetensors") for path in (directory, directory / "generator")
    )
    weights |= {name: w for name, w in generator.items() if name.startswith("electra.embeddings.")}
    save_file(weights, directory / "model.safetensors")
    return directory


# --- parity with transformers


def test_the_discriminator_equals_transformers():
    """Padded rows of three lengths there, packed end to end here."""
    model = Electra.from_pretrained(FIXTURES / "electra-discriminator").eval()
    expected, kept, packed = recorded("electra-discriminator")
    with torch.no_grad():
        hidden, logits = model.discriminator.hidden(**packed)[0], model(**packed)[0]
    assert (hidden - expected["hidden"][kept]).abs().max() < tolerance(expected, "hidden")
    assert (logits - expected["rtd_logits"][kept]).abs().max() < tolerance(expected, "rtd_logits")
    loss = F.binary_cross_entropy_with_logits(logits, expected["rtd_labels"][kept].float())
    assert loss.item() == pytest.approx(expected["rtd_loss"].item(), rel=1e-5)


def test_a_saved_generator_equals_transformers(tmp_path):
    model = Electra.from_pretrained(recorded_pair(tmp_path / "pair"))
    model.save_pretrained(tmp_path / "saved")
    generator = BERT.from_pretrained(tmp_path / "saved" / "generator").eval()
    expected, kept, packed = recorded("electra-generator")
    with torch.no_grad():
        hidden = generator.hidden(**packed)
        logits = generator.logits(hidden)[0]
        guessed = model.guess(packed["tokens"], torch.arange(len(logits)), packed["cu_seqlens"])
        del packed["segments"]
        assert torch.equal(guessed, generator(**packed)[0])
    assert (hidden[0] - expected["hidden"][kept]).abs().max() < tolerance(expected, "hidden")
    assert (logits - expected["logits"][kept]).abs().max() < tolerance(expected, "logits")


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_opens_what_we_save(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small(**VARIANTS[name])
    model.save_pretrained(tmp_path)
    tokens = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = {
            tmp_path: (transformers.ElectraForPreTraining, model(tokens)),
            tmp_path / "generator": (
                transformers.ElectraForMaskedLM,
                model.guess(tokens, torch.arange(48).view(2, 24)),
            ),
        }
        for directory, (architecture, logits) in ours.items():
            theirs, info = architecture.from_pretrained(directory, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
            # weights of order one give logits of order ten: ten times the tolerance of logits of order one
            assert (theirs.eval()(tokens).logits - logits).abs().max() < 1e-4
    if name == "the generator projects":
        auto = transformers.AutoModelForPreTraining.from_pretrained(tmp_path)
        assert isinstance(auto, transformers.ElectraForPreTraining)


# --- saving and loading


@pytest.mark.parametrize("name", VARIANTS)
def test_saving_and_loading_returns_the_same_model_to_train_further(name, tmp_path, tokenizer):
    model, batch = small(**VARIANTS[name]), batch_of(tokenizer)
    model.save_pretrained(tmp_path)
    again = Electra.from_pretrained(tmp_path)
    assert again.config == model.config
    for m in (model, again):
        m.loss(batch)[0].backward()
        torch.optim.AdamW(m.parameters(), lr=0.01).step()
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_embeddings_are_kept_once(tmp_path):
    """Files in safetensors format refuse tensors that share memory."""
    weights = small().state_dict()
    assert sum(w.shape == (300, 24) for w in weights.values()) == 1
    assert len({w.untyped_storage().data_ptr() for w in weights.values()}) == len(weights)
    save_file(weights, tmp_path / "weights.safetensors")


def test_a_discriminator_alone_detects_but_says_what_training_lacks(tmp_path, tokenizer):
    whole, batch = small(), batch_of(tokenizer)
    whole.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "generator")
    alone = Electra.from_pretrained(tmp_path).eval()
    row = [tokenizer.cls_id, 5, 7, 200, tokenizer.sep_id]
    assert detect(alone, row) == detect(whole, row)
    for fails in (
        lambda: alone.loss(batch),
        lambda: show(alone, held_out(tokenizer, torch.arange(20)), tmp_path),
        lambda: make_batch(rows_of(torch.randint(290, (2, 33))), alone.config, torch.Generator(), tokenizer),
    ):
        with pytest.raises(ValueError, match=r"without a generator/.*--set generator_size"):
            fails()
    assert alone.flops_per_token(16) < whole.flops_per_token(16)
    alone.save_pretrained(tmp_path / "again")
    assert Electra.from_pretrained(tmp_path / "again").config == alone.config
    assert not (tmp_path / "again" / "generator").exists()


def test_two_that_were_not_trained_together_are_refused(tmp_path):
    directory = recorded_pair(tmp_path / "pair")
    path = directory / "generator" / "config.json"
    hf = json.loads(path.read_text())
    for changes, message in (
        ({"num_hidden_layers": 3}, "n_layers 3, not the 2 that"),
        ({"intermediate_size": 30}, "d_ff 30, not the 28 that"),
        ({"num_attention_heads": 6}, "n_heads 6, not the 3 that"),
    ):
        path.write_text(json.dumps(hf | changes))
        with pytest.raises(ValueError, match=f"generator: {message}"):
            Electra.from_pretrained(directory)
    path.write_text(json.dumps(hf))
    weights = load_file(directory / "model.safetensors")
    weights["electra.embeddings.position_embeddings.weight"][3, 1] += 0.001
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"position_embeddings\.weight is not .* not trained together"):
        Electra.from_pretrained(directory)


@pytest.mark.parametrize(
    "name, message",
    [
        ("electra-generator", "no discriminator_predictions; expected an ElectraForPreTraining"),
        ("bert-pretraining", "no discriminator_predictions; expected an ElectraForPreTraining"),
        ("llama", "model_type 'llama'"),
        ("nowhere", "no such file"),
    ],
)
def test_other_checkpoints_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        Electra.from_pretrained(FIXTURES / name)


# --- sizes, cost, initialisation

PUBLISHED = {  # ElectraForPreTraining and ElectraForMaskedLM, as counted in transformers
    "electra-small": (13_549_057, 4_620_026),
    "electra-base": (109_483_009, 33_740_602),
    "electra-large": (335_142_913, 51_295_290),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_the_published_ones(size):
    with torch.device("meta"):
        model = Electra(SIZES[size])
    both = sum(p.numel() for p in model.parameters())
    discriminator = sum(p.numel() for p in model.discriminator.parameters())
    shared = sum(p.numel() for p in model.discriminator.embeddings.parameters())
    generator = both - discriminator + shared
    assert (discriminator, generator) == PUBLISHED.get(size, (discriminator, generator))


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_counts_are_those_of_transformers(size):
    transformers = pytest.importorskip("transformers")
    # Table 6 of the paper, the generator's as a share of the discriminator's.
    heads, width, inner, embedding, layers, share = {
        "electra-small": (4, 256, 1024, 128, 12, 4),
        "electra-base": (12, 768, 3072, 768, 12, 3),
        "electra-large": (16, 1024, 4096, 1024, 24, 4),
    }[size]
    counts = []
    for architecture, k in (
        (transformers.ElectraForPreTraining, 1),
        (transformers.ElectraForMaskedLM, share),
    ):
        hf = transformers.ElectraConfig(
            num_hidden_layers=layers,
            num_attention_heads=heads // k,
            hidden_size=width // k,
            intermediate_size=inner // k,
            embedding_size=embedding,
        )
        with torch.device("meta"):
            counts.append(sum(p.numel() for p in architecture(hf).parameters()))
    assert tuple(counts) == PUBLISHED[size]
    assert SIZES[size].mask_rate == (0.25 if size == "electra-large" else 0.15)


@pytest.mark.parametrize("name", VARIANTS)
def test_flops_formula_counts_the_matrix_products(name, tokenizer):
    """All that run are counted, since every token attends to every other."""
    model, T = small(kernels="reference", **VARIANTS[name]), 32
    with FlopCounterMode(display=False) as counter:
        model.loss(batch_of(tokenizer, n_rows=3))[0].backward()
    # What is not per token is divided by T and rounded down, once a layer and once for the head.
    assert model.flops_per_token(T) == pytest.approx(counter.get_total_flops() / (3 * T), abs=8)


def test_loss_at_the_start_is_that_of_guessing(tokenizer):
    torch.manual_seed(0)
    model = Electra(SMALL)
    loss, metrics = model.loss(batch_of(tokenizer, n_rows=8))
    assert metrics["mlm_loss"].item() == pytest.approx(math.log(300), abs=0.1)
    assert metrics["rtd_loss"].item() == pytest.approx(math.log(2), abs=0.1)
    assert loss.item() == pytest.approx(metrics["mlm_loss"].item() + 50 * metrics["rtd_loss"].item())
    head = model.discriminator.discriminator_predictions
    alike = model.discriminator.bert.encoder.layer[0].attention.output.dense.weight
    assert head.dense.weight.std().item() == pytest.approx(alike.std().item(), rel=0.1)
    assert not head.dense.bias.any() and not head.dense_prediction.bias.any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"generator_size": 1.5}, "generator_size 1.5"),
        ({"mask_rate": 0.0}, "mask_rate 0.0"),
        ({"masking": "letter"}, "masking 'letter'"),
        ({"n_heads": 5}, "multiple of n_heads 5"),
    ],
)
def test_impossible_configs_say_why(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"positions": "rope"}, "positions 'rope': an ELECTRA has 'learned'"),
        ({"mlp": "geglu"}, "mlp 'geglu'"),
        ({"pair": "nsp", "pooler": True}, "pooler True: an ELECTRA has False"),
        ({"window": 5}, "window 5"),
        ({"n_segments": 0}, "n_segments 0"),
    ],
)
def test_what_no_checkpoint_can_hold_is_trained_but_not_saved(changes, message, tokenizer, tmp_path):
    model = small(**changes)
    assert model.loss(batch_of(tokenizer))[0].isfinite()
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_would_be_read_wrongly_is_refused(tmp_path):
    """The head of transformers' discriminator has the activation of the layers; ours is GELU."""
    copy_of(FIXTURES / "electra-discriminator", tmp_path / "copy", hidden_act="gelu_new")
    with pytest.raises(ValueError, match="mlp 'gelu_tanh': an ELECTRA has 'gelu'"):
        Electra.from_pretrained(tmp_path / "copy")


# --- the objective


def test_all_that_is_chosen_is_masked(tokenizer):
    batch = batch_of(tokenizer, mask_rate=0.3)
    assert batch["targets"].shape == batch["uniform"].shape == (4, 9)  # 30 percent of 30
    assert ((batch["uniform"] >= 0) & (batch["uniform"] < 1)).all()
    flat = batch["tokens"].flatten()
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[batch["positions"].flatten()] = True
    assert torch.equal(flat == tokenizer.mask_id, chosen)
    again = batch_of(tokenizer, mask_rate=0.3)
    assert batch.keys() == again.keys() and all(torch.equal(batch[key], again[key]) for key in batch)


def test_drawn_tokens_follow_the_softmax():
    logits = torch.tensor([0.3, -1.0, 2.0, -torch.inf, 0.0])
    p, N = logits.softmax(-1), 100_000
    # Numbers evenly spread: every token's share is its probability, to one number at either of its ends.
    counts = draw(logits.expand(N, 5), (torch.arange(N) + 0.5) / N).bincount(minlength=5)
    assert (counts - N * p).abs().max() <= 1
    # Numbers at random: five standard errors, which one seed in 300,000 would exceed for one of four tokens.
    uniform = torch.rand(N, generator=torch.Generator().manual_seed(0))
    counts = draw(logits.expand(N, 5), uniform).bincount(minlength=5)
    assert ((counts - N * p).abs() <= 5 * (N * p * (1 - p)).sqrt()).all()
    assert counts[3] == 0


def test_numbers_at_the_ends_draw_tokens_that_are_possible():
    torch.manual_seed(0)
    logits = torch.randn(64, 30522)  # the running sums end up to 8 units of the last place above or below 1
    logits[:, :3] = logits[:, -3:] = -torch.inf
    assert (draw(logits, torch.zeros(64)) == 3).all()
    last = draw(logits, torch.full((64,), 1 - 2**-24))  # the largest number that torch.rand gives
    assert (logits.gather(1, last[:, None]) > -torch.inf).all() and (last > 30522 - 100).all()
    certain = torch.full((2, 7), -torch.inf)
    certain[:, 4] = 0.0
    assert draw(certain, torch.tensor([0.0, 1 - 2**-24])).tolist() == [4, 4]
    assert draw(torch.full((1, 7), torch.nan), torch.tensor([0.5])).item() < 7
    assert draw(torch.zeros(0, 7), torch.zeros(0)).shape == (0,)


def test_loss_is_the_papers_written_out(tmp_path, tokenizer):
    """In float64, place by place, the last row with fewer masks than the others."""
    model, batch = small(), batch_of(tokenizer)
    kept = batch["positions"][3, -2:]
    batch["tokens"].view(-1)[kept] = batch["targets"][3, -2:]
    batch["positions"][3, -2:], batch["targets"][3, -2:] = 3 * 32, -100
    model.save_pretrained(tmp_path)
    generator = BERT.from_pretrained(tmp_path / "generator").double()
    discriminator = Electra.from_pretrained(tmp_path).double()

    text, original = batch["tokens"].clone(), batch["tokens"].clone()
    mlm, n_masked, right = 0.0, 0, 0
    with torch.no_grad():
        p = generator(batch["tokens"]).softmax(-1)
        for b in range(4):
            for position, target, u in zip(
                *(batch[k][b].tolist() for k in ("positions", "targets", "uniform")), strict=True
            ):
                if target == -100:
                    continue
                row, t = divmod(position, 32)
                assert row == b
                mlm -= math.log(p[b, t, target])
                n_masked += 1
                drawn, total = 0, p[b, t, 0].item()
                while total <= u:
                    drawn += 1
                    total += p[b, t, drawn].item()
                text[b, t], original[b, t] = drawn, target
                right += p[b, t].argmax().item() == target
        said = discriminator(text).sigmoid().flatten().tolist()
    replaced = (text != original).flatten().tolist()
    rtd = -sum(math.log(q if r else 1 - q) for q, r in zip(said, replaced, strict=True)) / len(said)

    loss, metrics = model.loss(batch)
    assert n_masked == 4 * 4 - 2
    assert loss.item() == pytest.approx(mlm / n_masked + 50 * rtd, rel=1e-5)
    assert metrics["mlm_loss"].item() == pytest.approx(mlm / n_masked, rel=1e-5)
    assert metrics["rtd_loss"].item() == pytest.approx(rtd, rel=1e-5)
    assert metrics["accuracy"].item() == pytest.approx(right / n_masked)
    assert metrics["replaced"].item() == pytest.approx(sum(replaced) / 128)
    judged = sum((q > 0.5) == r for q, r in zip(said, replaced, strict=True))
    assert metrics["rtd_accuracy"].item() == pytest.approx(judged / 128)


def test_what_the_generator_gets_right_counts_as_original(tokenizer):
    """The bias of its head makes it certain of one token, which is the target at some places."""
    model, batch = small(), batch_of(tokenizer)
    with torch.no_grad():
        model.generator.cls.predictions.bias[7] = 1e4
    batch["targets"][:] = 8
    assert model.loss(batch)[1]["replaced"].item() == 16 / 128
    batch["targets"][:2] = 7
    assert model.loss(batch)[1]["replaced"].item() == 8 / 128
    batch["targets"][:] = 7
    assert model.loss(batch)[1]["replaced"].item() == 0


def test_gradients_meet_in_the_embeddings_alone(tokenizer):
    batch, gradients = batch_of(tokenizer), {}
    for weight in (0.0, 50.0):
        model = small(rtd_weight=weight)
        model.loss(batch)[0].backward()
        gradients[weight] = {name: p.grad for name, p in model.named_parameters()}
    for name, with_both in gradients[50.0].items():
        of_generator = gradients[0.0][name]
        if name.startswith("generator."):
            assert torch.equal(with_both, of_generator) and with_both.any(), name
        elif name.startswith("discriminator.bert.embeddings."):
            assert of_generator.any() and not torch.allclose(with_both, of_generator), name
        else:
            # a bias on all keys alike changes no softmax
            assert not of_generator.any() and (with_both.any() or name.endswith("key.bias")), name
    # The generator's softmax reaches the embeddings of all tokens, the discriminator those that it reads.
    words = "discriminator.bert.embeddings.word_embeddings.weight"
    assert gradients[0.0][words].any(1).all()
    difference = (gradients[50.0][words] - gradients[0.0][words]).any(1)
    assert 0 < difference.sum() < 300


def test_packed_rows_have_the_loss_of_rows_apart(tokenizer):
    """The layout is that of train.py --document-mask."""
    model, batch = small(), batch_of(tokenizer)
    packed = {name: t.reshape(1, -1) for name, t in batch.items()}
    packed["cu_seqlens"] = torch.arange(0, 129, 32, dtype=torch.int32)
    assert model.loss(packed)[0].item() == pytest.approx(model.loss(batch)[0].item(), rel=1e-5)


# --- use


def test_show_says_what_was_drawn_and_what_is_judged(tokenizer, tmp_path):
    model = small()
    text = torch.tensor(tokenizer.encode(TEXT[:400]))[:30]
    text[15] = tokenizer.eot_id  # no place for a mask
    with torch.no_grad():
        model.discriminator.discriminator_predictions.dense_prediction.bias.fill_(1e4)
        model.generator.cls.predictions.bias[text[5]] = 1e4
    kept, lines = show(model, held_out(tokenizer, text), tmp_path).split("\n\n")
    row = text.clone()
    row[25] = text[5]
    was, drawn = tokenizer.decode([int(text[25])]), tokenizer.decode([int(text[5])])
    assert was != drawn and kept == tokenizer.decode(row.tolist())
    lines = lines.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{drawn!r} drawn as it was ") and lines[0].endswith("judged replaced: 100%")
    assert lines[1].startswith(f"{was!r} replaced by {drawn!r} ")
    assert lines[2].startswith("28 of the 28 other tokens judged replaced: 'T") and lines[2].endswith(" ...")
    with torch.no_grad():
        model.discriminator.discriminator_predictions.dense_prediction.bias.fill_(-1e4)
    assert show(model, held_out(tokenizer, text), tmp_path).endswith(
        "\n0 of the 28 other tokens judged replaced"
    )
    assert show(model, held_out(tokenizer, text[:3]), tmp_path).endswith(
        "\n0 of the 3 other tokens judged replaced"
    )


def run(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["language/electra.py", *map(str, argv)])
    runpy.run_path(str(ROOT / "language/electra.py"), run_name="__main__")


def test_alone_it_prints_the_sizes(monkeypatch, capsys):
    run(monkeypatch)
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "size",
        "encoder",
        "in",
        "training",
        "layers",
        "width",
        "generator",
        "FLOPs/token",
    ]
    assert [line.split()[0] for line in lines] == list(SIZES)
    assert lines[1].split()[1:6] == ["13,483,008", "14,196,219", "12", "256", "64"]


def test_a_text_is_judged_token_by_token_and_mistakes_are_named(monkeypatch, capsys, tmp_path, tokenizer):
    model = small(vocab_size=tokenizer.n_vocab)
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    run(monkeypatch, tmp_path, "--text", "The thing of it")
    ids = tokenizer.encode("The thing of it")
    judged = detect(model, [tokenizer.cls_id, *ids, tokenizer.sep_id])[1:-1]
    for line, i, p in zip(capsys.readouterr().out.splitlines(), ids, judged, strict=True):
        assert line.startswith(repr(tokenizer.decode([i]))) and f" {p:.1%} " in f"{line} "
        assert line.count("#") == round(40 * p)
    for argv, message in (
        ([tmp_path], "--text is missing"),
        ([tmp_path, "--text", "many words " * 50], "this model reads at most 30"),
        ([FIXTURES / "bert-mlm", "--text", "a"], "bert-mlm"),
        ([tmp_path / "generator", "--text", "a"], "generator"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and len(error.splitlines()) == 1
        assert error.startswith("error: ") and message in error


# --- train.py


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A text to train on; beside it, "tiny" becomes small enough for a test."""
    monkeypatch.setitem(electra.SIZES, "tiny", replace(SMALL, max_seq_len=16))
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def flags(text, out, **changes):
    small = dict(
        model="electra", data=text, tokenizer="bytes", steps=4, batch_size=4, eval_every=2, log_every=1
    )
    small |= dict(seq_len=16, schedule="constant", out=out, cache=text.parent / "cache") | changes
    return [
        part for name, value in small.items() if value for part in (f"--{name.replace('_', '-')}", str(value))
    ]


def rows(out):
    """metrics.jsonl without the times, which differ from run to run."""
    times = ("seconds", "tokens_per_second")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]


def test_a_run_trains_and_resumes_exactly(text, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main(flags(text, whole)) == 0
    assert train.main(flags(text, cut, steps=2)) == 0
    assert train.main([*flags(text, cut), "--resume"]) == 0
    for part in ("model/model.safetensors", "model/generator/model.safetensors", SHARD):
        a, b = (load_file(out / part) for out in (whole, cut))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert rows(whole) == rows(cut)
    assert (whole / "samples.txt").read_text() == (cut / "samples.txt").read_text()
    metrics = rows(whole)[-1]
    assert metrics.keys() >= {"val_loss", "val_accuracy", "val_mlm_loss", "val_rtd_loss", "val_rtd_accuracy"}
    parts = metrics["val_mlm_loss"] + 50 * metrics["val_rtd_loss"]
    assert metrics["val_loss"] == pytest.approx(parts, rel=1e-6)

    model, tokenizer = Electra.from_pretrained(whole / "model"), get_tokenizer(str(whole / "model"))
    assert model.config == replace(
        SMALL, vocab_size=tokenizer.n_vocab, max_seq_len=16, pad_token_id=tokenizer.pad_id
    )
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForPreTraining.from_pretrained(whole / "model").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(whole / "model")
    ids = tokenizer.encode("The 7th thing")
    assert their_tokenizer("The 7th thing", add_special_tokens=False).input_ids == ids
    with torch.no_grad():
        difference = (theirs(torch.tensor([ids])).logits - model(torch.tensor([ids]))).abs().max()
    assert difference < 1e-5


def test_training_goes_on_from_a_saved_model_but_needs_its_generator(text, tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    train.main(flags(text, a, steps=2))
    again = dict(init_from=a / "model", tokenizer=None, steps=1)
    assert train.main(flags(text, b, **again)) == 0
    assert rows(b)[0]["val_loss"] == pytest.approx(rows(a)[-1]["val_loss"], rel=1e-6)
    shutil.rmtree(a / "model" / "generator")
    capsys.readouterr()
    assert train.main(flags(text, tmp_path / "c", **again)) == 2
    assert "error: this model came without a generator/" in capsys.readouterr().err
    assert train.main([*flags(text, tmp_path / "d", **again), "--set", "generator_size=0.5"]) == 0
    discriminator = load_file(a / "model" / "model.safetensors")
    begun = Electra.from_pretrained(tmp_path / "d" / "model")
    assert (
        begun.config.generator_size == 0.5
        and discriminator.keys() == load_file(tmp_path / "d" / "model" / "model.safetensors").keys()
    )
