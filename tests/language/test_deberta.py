"""DeBERTa against transformers and plain formulas (recorded), published figures, and identities."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_command
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import bert
import train
from data.tokenizer import get_tokenizer, train_bpe
from formats.open_model import open_model
from language import deberta, masking
from language.deberta import SIZES, V1, Config, DeBERTa, buckets, rows_of_distances, skew
from language.encoder_inference import embed, fill_mask, pack
from language.masking import SPECIAL_TOKENS

FIXTURES = Path(__file__).parents[1] / "fixtures"
RECORDED = ["deberta-v1", "deberta-v2", "deberta-v3", "deberta-released", "deberta-released-v2"]
SMALL = Config(2, 4, 16, 24, 61, 24, max_distance=24, n_buckets=8)
VARIANTS = {
    "v1": V1,
    "v1 with one term": {**V1, "c2p": False, "max_distance": 5},
    "v2 with a convolution": {"conv_width": 3},
    "v2 with its own keys": {"share_keys": False, "n_buckets": None, "absolute": "none", "p2c": False},
    "v3": {"absolute": "none"},
    "positions in the input": {"absolute": "input", "n_segments": 2},
    "a head of its own": {"absolute": "none", "tie_embeddings": False},
    "no head": {"mlm_head": False, "absolute": "none"},
}
TEXT = "".join(f"The {i}th thing, and some_name = f({i}) of it\n" for i in range(200))


def small(**changes):
    """Return a random model whose outputs depend visibly on every weight."""
    torch.manual_seed(0)
    model = DeBERTa(replace(SMALL, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def recorded(name):
    """Return the model, what was recorded, which tokens are real, and the rows packed without padding."""
    expected = load_file(FIXTURES / name / "expected.safetensors")
    kept = torch.arange(expected["tokens"].shape[1]) < expected["lengths"][:, None]
    rows = [row[mask].tolist() for row, mask in zip(expected["tokens"], kept, strict=True)]
    tokens, cu_seqlens = pack(rows)
    return open_model(FIXTURES / name).eval(), expected, kept, {"tokens": tokens, "cu_seqlens": cu_seqlens}


def tokens_of(B=2, T=17):
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(1))


# --- parity


@pytest.mark.parametrize("name", RECORDED)
def test_hidden_states_logits_loss_and_gradients_are_the_recorded_ones(name):
    """Padded rows of three lengths there, packed end to end here; those of the decoder in float64 there."""
    model, expected, kept, packed = recorded(name)
    tolerance = max(1e-5, 5 * expected.get("logits64_error", torch.tensor(0.0)).item())
    assert type(model) is DeBERTa and model.config.has_decoder == name.startswith("deberta-released")
    assert (model.hidden(**packed)[0] - expected["hidden"][kept]).abs().max() < 1e-5
    assert (model(**packed)[0] - expected["logits"][kept]).abs().max() < tolerance

    labels = expected["labels"][kept]
    positions = (labels >= 0).nonzero().flatten()
    loss, _ = masking.loss(
        model, {**packed, "positions": positions[None], "targets": labels[positions][None]}
    )
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    loss.backward()
    ours, checked = {name: p.grad for name, p in model.named_parameters()}, 0
    for key in (key for key in expected if key.startswith("gradients.")):
        for name, theirs in of_ours(key.removeprefix("gradients."), expected[key], model.config.n_heads):
            assert (ours[name] - theirs).abs().max() < 2e-5 * max(1, theirs.abs().max()), name
            checked += 1
    assert checked >= 3


def of_ours(name, gradient, H):
    """Yield our parameters' names, and the recorded gradient of each."""
    if name.endswith("in_proj.weight"):
        for i, part in enumerate(("query", "key", "value")):
            rows = [head.chunk(3)[i] for head in gradient.chunk(H)]
            yield name.replace("in_proj", f"{part}_proj"), torch.cat(rows)
    else:
        yield name.replace("pos_q_proj", "pos_query_proj"), gradient


@pytest.mark.parametrize("name", ["deberta-released", "deberta-released-v2"])
def test_published_files_lose_their_mask_decoder_in_transformers(name, tmp_path):
    """Without the positions, as transformers saves them, the same head reads the encoder's states."""
    model, expected, kept, packed = recorded(name)
    assert (expected["without_decoder"] - expected["logits"])[kept].abs().max() > 1
    transformers = pytest.importorskip("transformers")
    kind = (
        transformers.DebertaForMaskedLM if name == "deberta-released" else transformers.DebertaV2ForMaskedLM
    )
    theirs = kind.from_pretrained(FIXTURES / name, legacy=False)
    theirs.save_pretrained(tmp_path)
    again = open_model(tmp_path).eval()
    assert not again.config.has_decoder and model.config.has_decoder
    assert (again(**packed)[0] - expected["without_decoder"][kept]).abs().max() < 1e-5


def test_masks_are_filled_with_what_the_decoder_predicts(tmp_path):
    """The probabilities of `fill_mask` are those of the recorded logits; the command prints its own."""
    model, expected, _, _ = recorded("deberta-released")
    row = expected["tokens"][0].tolist()

    class Numbers:
        """A tokenizer of texts of numbers, in which one token of the row is the mask."""

        roles, n_vocab, cls_id, sep_id, mask_id = {"mask_token": "MASK"}, 41, row[0], row[-1], row[5]
        encode = staticmethod(lambda text, allowed_special: list(map(int, text.split())))
        decode = staticmethod(lambda ids: str(ids[0]))

    found = fill_mask(model, Numbers, " ".join(map(str, row[1:-1])), k=41)
    places = [i for i, token in enumerate(row) if token == row[5]]
    assert len(found) == len(places) > 0
    for best, place in zip(found, places, strict=True):
        p, tokens = expected["logits"][0, place].double().softmax(-1).sort(descending=True)
        assert [token for token, _ in best] == list(map(str, tokens.tolist()))
        assert [p for _, p in best] == pytest.approx(p.tolist(), abs=1e-6)

    words = train_bpe([TEXT], 300).with_special_tokens(SPECIAL_TOKENS)
    saved = small(vocab_size=words.n_vocab)
    saved.save_pretrained(tmp_path)
    words.save(tmp_path)
    done = run_command("-m", "language.deberta", tmp_path, "--text", "a[MASK]b", "--k", "2")
    best = fill_mask(saved, words, "a[MASK]b", k=2)[0]
    assert done.out == "   ".join(f"{token!r} {p:.1%}" for token, p in best) + "\n"
    done = run_command("-m", "language.deberta", tmp_path, "--text", "ab")
    assert (done.code, done.err.count("\n")) == (2, 1) and "error: no [MASK] in 'ab'" in done.err


# --- published figures


PUBLISHED = {  # of the encoder without positions, which it does not read
    "base": 138_601_728, "large": 405_163_008, "xlarge": 757_804_032, "v2-xlarge": 884_593_152,
    "v2-xxlarge": 1_564_549_632, "v3-xsmall": 70_682_112, "v3-small": 141_304_320, "v3-base": 183_831_552,
    "v3-large": 434_012_160, "mdeberta-v3-base": 278_218_752,
}  # fmt: skip


def test_the_command_prints_the_sizes_with_their_published_numbers_of_parameters():
    lines = run_command("-m", "language.deberta").out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(SIZES) == ["tiny", *PUBLISHED]
    for line, (name, count) in zip(lines[1:], PUBLISHED.items(), strict=True):
        assert line.split()[1] == f"{count + 512 * SIZES[name].d_model:,}", name


def test_buckets_are_those_of_the_published_code():
    found = dict(zip(range(-600, 601), buckets(torch.arange(-600, 601), 256, 512).tolist(), strict=True))
    expected = {0: 0, 127: 127, 128: 128, 130: 130, 200: 169, 300: 207, 400: 233, 511: 255}
    assert {r: found[r] for r in expected} == expected
    assert all(found[-r] == -found[r] for r in found)
    rows = rows_of_distances(600, SIZES["v3-base"])
    assert (
        rows[0] == rows[60] == 511 and rows[600] == 256 and rows[-1] == 0
    )  # the distances 600, 540, 0, -599
    assert (rows.diff() <= 0).all()


@pytest.mark.parametrize("n, longest", [(256, 512), (8, 22), (32, 128), (64, 128), (6, 40)])
def test_buckets_are_those_of_transformers(n, longest):
    modeling = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
    r = torch.arange(1 - longest, longest)
    theirs = modeling.make_log_bucket_position(r, n, longest).long()
    assert torch.equal(buckets(r, n, longest), theirs)


# --- identities


def test_skew_reads_each_row_from_another_column_on():
    for T in (1, 2, 5):
        x = torch.arange(3 * T * 2 * T).view(3, T, 2 * T)
        y = skew(x)
        assert y.shape == (3, T, T) and y.data_ptr() >= x.data_ptr()
        assert all(y[b, i, j] == x[b, i, T + j - i] for b in range(3) for i in range(T) for j in range(T))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, V1, {"c2p": False}, {"share_keys": False, "p2c": False}])
def test_attention_is_its_formula_with_a_vector_for_every_pair(changes):
    model = small(**changes).double()
    own, config, T = model.deberta.encoder.layer[0].attention.self, model.config, 20
    x, z = torch.randn(2, 2, T, 16, dtype=torch.float64)
    s = config.n_buckets or config.max_distance
    table = torch.randn(2 * s, 16, dtype=torch.float64)
    r = torch.arange(T)[:, None] - torch.arange(T)
    pairs = table[(buckets(r, config.n_buckets, config.max_distance) + s).clamp(0, 2 * s - 1)]  # (T, T, D)

    def heads(y):
        return y.unflatten(-1, (4, 4))

    q, k, v = heads(own.query_proj(z)), heads(own.key_proj(x)), heads(own.value_proj(x))
    scores = torch.einsum("bihk,bjhk->bhij", q, k)
    if config.c2p:
        keys = heads((own.pos_key_proj or own.key_proj)(pairs))
        scores = scores + torch.einsum("bihk,ijhk->bhij", q, keys)
    if config.p2c:
        queries = heads((own.pos_query_proj or own.query_proj)(pairs))
        scores = scores + torch.einsum("bjhk,ijhk->bhij", k, queries)
    weights = (scores / math.sqrt((1 + config.c2p + config.p2c) * 4)).softmax(-1)
    expected = torch.einsum("bhij,bjhk->bihk", weights, v).flatten(2)
    found = own(z, x, table[rows_of_distances(T, config)], None)
    assert (found - expected).abs().max() < 1e-12


@torch.no_grad()
def test_without_distances_it_is_bert_with_another_scale():
    """With a table of zeros, and queries times sqrt(1 / 3), each layer is one of bert.py."""
    model = small(**V1, absolute="input").double()
    model.deberta.encoder.rel_embeddings.weight.zero_()
    for layer in model.deberta.encoder.layer:
        layer.attention.self.pos_query_proj.bias.zero_()
    fields = {"n_segments": 0, "pooler": False, "norm_eps": 1e-7, "kernels": "reference"}
    plain = bert.BERT(bert.Config(2, 4, 16, 24, 61, 24, **fields)).double()
    theirs = {}
    for name, p in plain.named_parameters():
        source = name.replace("bert.", "deberta.", 1)
        for part in ("query", "key", "value"):
            source = source.replace(f"self.{part}.", f"self.{part}_proj.")
        ours = model.state_dict().get(source, torch.zeros_like(p))
        theirs[name] = ours / math.sqrt(3) if ".query." in name else ours
    plain.load_state_dict(theirs)
    assert (plain(tokens_of()) - model(tokens_of())).abs().max() < 1e-12


@torch.no_grad()
def test_few_distances_in_buckets_are_one_row_per_distance():
    """Up to half the number of buckets, v2 counts distances as v1 does."""
    few, many = small(n_buckets=16).double(), small(n_buckets=None, max_distance=16).double()
    many.load_state_dict(few.state_dict())
    short, long = tokens_of(T=9), tokens_of(T=20)
    assert (few(short) - many(short)).abs().max() < 1e-12
    assert (few(long) - many(long)).abs().max() > 1e-3


@torch.no_grad()
def test_one_step_of_the_mask_decoder_without_positions_is_the_last_layer():
    model = small(n_layers=3).double()
    model.deberta.embeddings.position_embeddings.weight.zero_()
    before = small(n_layers=2, absolute="none", mlm_head=False).double()
    before.load_state_dict({name: w for name, w in model.state_dict().items() if name in before.state_dict()})
    x, last = before.hidden(tokens_of()), model.deberta.encoder.layer[-1]
    encoder = model.deberta.encoder
    distances = encoder.LayerNorm(encoder.rel_embeddings.weight)[rows_of_distances(17, model.config)]
    one = last(x, x, distances, None)
    assert (one - model.hidden(tokens_of())).abs().max() < 1e-12
    assert (last(one, x, distances, None) - model.head_input(tokens_of())).abs().max() < 1e-12


@torch.no_grad()
def test_positions_enter_in_the_mask_decoder_alone():
    model, tokens = small(), tokens_of()
    hidden, read = model.hidden(tokens), model.head_input(tokens)
    model.deberta.embeddings.position_embeddings.weight.add_(1 + torch.randn(24, 16))
    assert torch.equal(model.hidden(tokens), hidden)
    assert (model.head_input(tokens) - read).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "no head"])
def test_a_text_reads_the_same_alone_and_among_others(name):
    model = small(**VARIANTS[name])
    rows = [tokens_of(1, n)[0].tolist() for n in (5, 1, 19)]
    tokens, cu_seqlens = pack(rows)
    packed = model(tokens, cu_seqlens=cu_seqlens)[0]
    alone = torch.cat([model(torch.tensor([row]))[0] for row in rows])
    torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-5)


def test_no_tensor_has_a_vector_for_every_pair_of_tokens():
    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes = [t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.most = max(self.most, *sizes, 0)
            return out

    model, B, H, T = small(max_seq_len=64, n_heads=2), 2, 2, 64
    with Largest() as largest:
        model.head_input(tokens_of(B, T)).sum().backward()
    assert largest.most == B * H * T * 2 * T < T * T * 16  # one number for each query and distance


# --- cost, initialisation, settings


@pytest.mark.parametrize("changes", [{}, V1, {"conv_width": 3, "absolute": "none"}, {"p2c": False}])
def test_flops_formula_counts_the_matrix_products(changes):
    """All that PyTorch counts, but for the projections of the table, once a layer and batch."""
    model, B, T, n = small(**changes), 3, 20, 5
    config, positions = model.config, torch.arange(3 * 5).view(3, 5)
    with FlopCounterMode(display=False) as counter:
        model.logits(model.head_input(tokens_of(B, T)).flatten(0, 1)[positions]).sum().backward()
    projections = (config.n_layers + config.has_decoder) * (config.c2p + config.p2c)
    of_table = 6 * projections * 2 * T * 16 * 16
    counted = (counter.get_total_flops() - of_table) / (B * T)
    assert model.flops_per_token(T, n) == pytest.approx(counted, rel=2e-3 if config.norm_table else 2e-2)
    everywhere = model.flops_per_token(T, n) + 6 * (T - n) * (16 + 61) * 16 // T
    assert model.flops_per_token(T) == pytest.approx(everywhere, abs=2)


def test_initialisation():
    torch.manual_seed(0)
    for name, p in DeBERTa(replace(SIZES["tiny"], conv_width=3)).named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        elif p.ndim == 1:
            assert (p == 1).all()
        else:
            expected = 0.02 if "embeddings." in name else 0.02 * math.sqrt(768 / 128)
            assert p.std().item() == pytest.approx(expected, rel=0.05), name
    model = small()
    model.temperature = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="parameter temperature: no rule"):
        model.initialize()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_heads": 3}, "d_model 16 is not a multiple of n_heads 3"),
        ({"n_buckets": 48}, "n_buckets 48: expected 2 to 45, or None"),
        ({"n_buckets": 1}, "n_buckets 1: expected 2 to"),
        ({"conv_width": 4}, "conv_width 4: expected an odd number of tokens, or 0"),
        ({"c2p": False, "p2c": False}, "c2p False and p2c False: no term has a distance"),
        ({"original": True}, "original True: needs n_buckets None"),
        ({"tie_embeddings": False}, "tie_embeddings False needs absolute 'input' or 'none'"),
        ({"absolute": "output"}, "absolute 'output': expected decoder or input or none"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)
    assert replace(SMALL, n_buckets=45).n_buckets == 45


def test_a_text_that_is_too_long_and_a_head_that_is_missing_are_named():
    with pytest.raises(ValueError, match="a text of 25 tokens: this model reads at most 24"):
        small().hidden(tokens_of(1, 25))
    with pytest.raises(ValueError, match="no masked-language-model head"):
        small(**VARIANTS["no head"])(tokens_of())


# --- directories and runs


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_opens_what_we_save_and_so_do_we(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokens = small(**VARIANTS[name]), tokens_of()
    model.save_pretrained(tmp_path)
    again = open_model(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

    architecture = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    kind = getattr(transformers, architecture)
    theirs, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        states = theirs.eval()(tokens, output_hidden_states=True).hidden_states[-1]
        assert (states - model.hidden(tokens)).abs().max() < 1e-4
        if model.config.mlm_head:
            head = model if not model.config.has_decoder else again
            ours = head.logits(head.hidden(tokens))  # without the decoder, which transformers lacks
            assert (theirs(tokens).logits - ours).abs().max() < 1e-4


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Return the path of a text to train on; "tiny" becomes small enough for a test."""
    monkeypatch.setitem(deberta.SIZES, "tiny", replace(SMALL, max_distance=16))
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_a_run_by_default_masks_and_resumes_exactly(text, tmp_path, capsys):
    def flags(out, steps, *more):
        options = dict(model="deberta", data=text, tokenizer="bytes", steps=steps, batch_size=4, eval_every=2)
        options |= dict(seq_len=16, schedule="constant", warmup=0, out=out, cache=tmp_path / "cache")
        return [*(f"--{k.replace('_', '-')}={v}" for k, v in options.items()), *more]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train.main(flags(whole, 4)) == 0
    assert train.main(flags(cut, 2)) == 0
    assert train.main(flags(cut, 4, "--resume")) == 0
    a, b = (load_file(out / "model" / "model.safetensors") for out in (whole, cut))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert any(name.startswith("lm_predictions.") for name in a)
    assert "val_accuracy" in (whole / "metrics.jsonl").read_text()
    assert " guessed " in (whole / "samples.txt").read_text()

    # Documents that share a row, and what the run leaves: an encoder that makes vectors of texts.
    assert train.main(flags(tmp_path / "apart", 2, "--document-mask")) == 0
    model, words = open_model(whole / "model").eval(), get_tokenizer(str(whole / "model"))
    vectors = embed(model, words, ["one", "two three"])
    alone = model.hidden(torch.tensor([[words.cls_id, *words.encode("one"), words.sep_id]]))[0].mean(0)
    assert torch.allclose(vectors[0], nn.functional.normalize(alone, dim=0), atol=1e-5)
    capsys.readouterr()
    lora = ["--model=lora", f"--base={whole / 'model'}", "--seq-len=16", f"--data={text}"]
    assert train.main([*lora, f"--out={tmp_path / 'lora'}"]) == 2
    assert capsys.readouterr().err.endswith(
        "error: adapters of deberta are not implemented; expected bert, roberta, electra or modernbert\n"
    )
    assert train.main(flags(tmp_path / "x", 2, "--set", "n_buckets=99")) == 2
    assert "error: --set n_buckets=99: n_buckets 99: expected 2 to 29, or None" in capsys.readouterr().err
