"""RETRO: its equation written out, causality, its cache, and what a retrofitted model keeps of its base."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_gpt import flags, prepared, refused
from torch.utils.flop_counter import FlopCounterMode

import gpt
import train
from formats.open_model import open_model
from generate import generate
from language import retro, retro_rows
from language.retrieval import Index

M, K = 4, 2  # tokens of a chunk, neighbours
CONFIG = retro.Config(
    3, 4, 32, 48, 50, 24, n_kv_heads=2, qk_norm=True, chunk=M, n_neighbours=K, retrieval_layers=(1, 2)
)


def shaken(config=CONFIG, seed=0):
    """Return a model in float64 whose outputs depend on every weight."""
    torch.manual_seed(seed)
    model = retro.Retro(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def inputs(B=2, T=22, seed=1):
    """Return tokens (B, T), and neighbours of their chunks."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(50, (B, T), generator=generator)
    return tokens, torch.randint(50, (B, T // M, K, 2 * M), generator=generator)


@pytest.fixture(scope="module")
def index():
    """Return an index of a random text of few words, in which each chunk finds neighbours."""
    return Index.build(np.random.default_rng(0).integers(3, size=900), M, 49)


def attend(layer, x, context, at, context_at):
    """Attention of one query x (D,) over context (S, D), head by head, with rotations by complex numbers."""
    H, G, width = 4, 2, 8

    def turned(vector, place):
        angles = place * 10_000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
        pairs = torch.complex(vector[: width // 2], vector[width // 2 :])
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((pairs.real, pairs.imag))

    def normalised(vector, norm):
        return norm.weight * vector / (vector.square().mean() + 1e-6).sqrt()

    q, heads = layer.q_proj.weight @ x, []
    for h in range(H):
        g = h // (H // G)
        rows = slice(g * width, (g + 1) * width)
        query = turned(normalised(q[h * width : (h + 1) * width], layer.q_norm), at)
        keys = [normalised(layer.k_proj.weight[rows] @ c, layer.k_norm) for c in context]
        keys = [turned(key, p) for key, p in zip(keys, context_at, strict=True)]
        p = torch.softmax(torch.stack([query @ key for key in keys]) / math.sqrt(width), 0)
        heads.append(sum(p_i * (layer.v_proj.weight[rows] @ c) for p_i, c in zip(p, context, strict=True)))
    return layer.o_proj.weight @ torch.cat(heads)


@torch.no_grad()
def test_chunked_cross_attention_is_the_equation():
    """Token by token, counted from 1 as in the paper: u m ... u m + m - 1 attend to E_u."""
    model, T = shaken(), 22
    block = model.model.layers[1]
    x = torch.randn(1, T, 32, dtype=torch.float64)
    encoded = torch.randn(1, T // M, K * 2 * M, 32, dtype=torch.float64)
    found = block.chunked(x, encoded, 1 - M)[0]
    for i in range(1, T + 1):
        u = i // M
        if u == 0:
            assert (found[i - 1] == 0).all()
            continue
        # The last token of chunk u is the last of the neighbour's first half, too.
        expected = attend(
            block.cross_attn, x[0, i - 1], encoded[0, u - 1], i - u * M + M - 1, list(range(2 * M)) * K
        )
        torch.testing.assert_close(found[i - 1], expected, rtol=1e-6, atol=1e-6)  # angles are float32


@torch.no_grad()
def test_the_encoder_reads_each_neighbour_alone_and_its_own_chunk():
    model = shaken()
    tokens, neighbours = inputs(B=1)
    embedded = model.model.embed_tokens(neighbours)
    states = torch.randn(1, 5, M, 32, dtype=torch.float64)
    encoded = model.encoder(embedded, states).view(5, K, 2 * M, 32)
    for change in ("neighbour", "states"):
        other, at = embedded.clone(), states.clone()
        if change == "neighbour":
            other[0, 2, 1, 0] += 1.0
        else:
            at[0, 2, 3] += 1.0
        moved = (model.encoder(other, at).view(5, K, 2 * M, 32) - encoded).abs().amax(-1) > 1e-9
        expected = torch.zeros_like(moved)
        expected[2, 1 if change == "neighbour" else slice(None)] = True
        assert torch.equal(moved, expected), change


@torch.no_grad()
def test_neighbours_of_a_chunk_reach_no_token_before_its_last():
    model = shaken()
    tokens, neighbours = inputs()
    before = model(tokens, neighbours=neighbours)
    for u in range(1, tokens.shape[1] // M + 1):
        other = neighbours.clone()
        other[:, u - 1] = (other[:, u - 1] + 1) % 50
        moved = (model(tokens, neighbours=other) - before).abs().amax((0, 2))
        assert (moved[: u * M - 1] == 0).all(), u
        # The last token of the chunk and the m - 1 behind it attend to them.
        assert (moved[u * M - 1 : u * M + M - 1] > 1e-9).all(), u


@torch.no_grad()
def test_a_token_reaches_no_earlier_one_also_through_what_is_retrieved(index):
    model = shaken()
    tokens = inputs()[0] % 3

    def logits(tokens):
        chunks = tokens[:, : tokens.shape[1] // M * M].reshape(len(tokens), -1, M).numpy()
        found = np.stack([[index.neighbours(chunk, K) for chunk in row] for row in chunks])
        return model(tokens, neighbours=torch.from_numpy(found)), found

    before, found = logits(tokens)
    changed = 0
    for i in range(tokens.shape[1]):
        other = tokens.clone()
        other[:, i] = (other[:, i] + 1) % 3
        after, retrieved = logits(other)
        moved = (after - before).abs().amax((0, 2))
        assert (moved[:i] == 0).all() and moved[i] > 1e-9, i
        changed += (retrieved != found).any()
    assert changed > 15  # what is retrieved did change


@torch.no_grad()
def test_the_order_of_neighbours_is_irrelevant():
    model = shaken()
    tokens, neighbours = inputs()
    torch.testing.assert_close(
        model(tokens, neighbours=neighbours.flip(2)), model(tokens, neighbours=neighbours), rtol=0, atol=1e-12
    )


@torch.no_grad()
@pytest.mark.parametrize("n_prompt", [1, 3, 4, 5, 9])
def test_generation_with_a_cache_is_the_full_pass(n_prompt, index):
    model, T = shaken(), 20
    tokens = inputs(T=T)[0] % 3
    model.index = index
    chunks = tokens.reshape(2, -1, M).numpy()
    found = torch.from_numpy(np.stack([[index.neighbours(c, K) for c in row] for row in chunks]))
    expected = model.hidden(tokens, neighbours=found)

    cache = model.new_cache([n_prompt] * 2, T)
    parts = [model.hidden(tokens[:, :n_prompt], cache=cache)]
    parts += [model.hidden(tokens[:, i : i + 1], cache=cache) for i in range(n_prompt, T)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-12)


def test_text_is_generated_greedily_as_by_full_passes(index):
    model = shaken().float().eval()
    model.index = index
    prompt = [0, 1, 2, 0, 1, 1]
    new = generate(model, [prompt], 40, temperature=0.0)[0]  # long enough for the rearranged copy
    text = list(prompt)
    for _ in range(40):
        tokens = torch.tensor([text])
        chunks = tokens[:, : len(text) // M * M].reshape(1, -1, M).numpy()
        found = torch.from_numpy(np.stack([[index.neighbours(c, K) for c in row] for row in chunks]))
        with torch.no_grad():
            text.append(model(tokens, neighbours=found)[0, -1].argmax().item())
    assert text[len(prompt) :] == new
    with pytest.raises(ValueError, match="one length"):
        model.new_cache([3, 4], 9)
    with pytest.raises(ValueError, match="not compiled"):
        model.new_cache([3], 9, static=True)


def test_without_retrieval_a_retrofitted_model_is_its_base_to_the_bit(tmp_path):
    torch.manual_seed(0)
    base = gpt.GPT(gpt.Config(4, 4, 32, 48, 50, 96, n_kv_heads=2, qk_norm=True))
    base.save_pretrained(tmp_path / "base")
    model = retro.Retro.from_pretrained(tmp_path / "base")
    assert model.config.retrofit and model.config.retrieval_layers == (1, 3) and model.config.chunk == 64
    tokens = torch.randint(50, (2, 96))
    neighbours = torch.randint(50, (2, 1, 2, 128))
    with torch.no_grad():
        assert torch.equal(model(tokens), base(tokens))
        assert torch.equal(model(tokens, neighbours=neighbours), base(tokens))  # at the start
        assert generate(model, [[1, 2]], 5, temperature=0.0) == generate(base, [[1, 2]], 5, temperature=0.0)
        for name, p in model.named_parameters():
            if ".cross_" in name or name.startswith("encoder."):
                p.add_(torch.randn_like(p))
        assert torch.equal(model(tokens), base(tokens))
        assert not torch.equal(model(tokens, neighbours=neighbours), base(tokens))
    learning = {name for name, p in retro.wrap(model, model.config).named_parameters() if p.requires_grad}
    assert learning == set(model.state_dict()) - set(base.state_dict())
    # What --train has frozen stays so.
    model.encoder.norm.weight.requires_grad_(False)
    assert not retro.wrap(model, replace(model.config, retrofit=False)).encoder.norm.weight.requires_grad


@pytest.mark.parametrize("changes", [{}, {"mlp": "gelu"}, {"encoder_layers": 1, "retrieval_layers": (0, 2)}])
def test_flops_are_those_of_the_products(changes):
    config = replace(CONFIG, kernels="reference", max_seq_len=64, chunk=16, **changes)
    model, T = retro.Retro(config), 64
    tokens = torch.randint(50, (2, T))
    neighbours = torch.randint(50, (2, T // 16, K, 32))
    # Without retrieval it is gpt.py's, whose causal mask the counter does not see.
    totals = []
    for given in (None, neighbours):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens, neighbours=given)
        totals.append(counter.get_total_flops())
    more = config.flops_per_token(T) - gpt.Config.flops_per_token(config, T)
    assert more == pytest.approx(3 * (totals[1] - totals[0]) / (2 * T), rel=1e-3)


# --- its rows


def few_facts(monkeypatch):
    monkeypatch.setattr(retro_rows, "N_FACTS", 320)
    monkeypatch.setattr(retro_rows, "N_HELD_OUT", 64)


def test_a_row_of_facts_asks_at_the_end_of_a_chunk_and_predicts_values_alone(monkeypatch):
    few_facts(monkeypatch)
    dataset = retro_rows.load_facts(64, 16, 2)
    decode, known = dataset.tokenizer.decode, dict(retro_rows.draw_facts(384))
    asked = {"train": set(), "val": set()}
    for name, rows in (("train", dataset.train), ("val", dataset.val)):
        for i in range(len(rows)):
            row = rows[i]
            chunks = [decode(chunk) for chunk in row["tokens"][:-1].reshape(4, 16).tolist()]
            keys = [chunk[6:12] for chunk in chunks]
            assert chunks[0] == f"----.\n{keys[0]} is "
            for u in range(3):
                assert chunks[u + 1].startswith(known[keys[u]] + ".\n")
                # The line that states it is found first.
                assert f"{keys[u]} is {known[keys[u]]}.\n" in decode(row["neighbours"][u, 0].tolist())
            targets = row["targets"].tolist()
            assert decode([t for t in targets if t >= 0]) == "".join(known[key] for key in keys[:3])
            assert [i % 16 for i, t in enumerate(targets) if t >= 0] == [15, 0, 1, 2] * 3
            asked[name].update(keys)
    assert len(asked["train"]) == 320 and not asked["train"] & asked["val"]


def test_a_run_of_facts_is_saved_opened_and_shown(text, tmp_path, monkeypatch):
    few_facts(monkeypatch)
    options = dict(model="retro", data="facts", tokenizer=None, seq_len=64, batch_size=4)
    assert train.main(flags(text, tmp_path / "run", **options)) == 0
    model = open_model(tmp_path / "run" / "model")
    assert isinstance(model, retro.Retro) and isinstance(model.index.tokens, np.memmap)
    assert "facts never seen in training" in (tmp_path / "run" / "samples.txt").read_text()
    # Generation retrieves from the text beside the weights.
    dataset = retro_rows.load_facts(64, 16, model.config.n_neighbours)
    prompt = dataset.val[0]["tokens"][:16].tolist()
    cache = model.new_cache([16], 20)
    with torch.no_grad():
        hidden = model.hidden(torch.tensor([prompt]), cache=cache)
        given = torch.from_numpy(dataset.val[0]["neighbours"][None, :1])
        expected = model.hidden(torch.tensor([prompt]), neighbours=given)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-6)


def test_recomputed_activations_give_the_same_gradient(text, tmp_path, monkeypatch):
    few_facts(monkeypatch)
    options = dict(model="retro", data="facts", tokenizer=None, seq_len=64, batch_size=4)
    norms = []
    for more in ({}, {"checkpoint_activations": True}):
        run = prepared(text, tmp_path / str(len(norms)), **options, **more)
        norms.append([train.update(run).norm.item() for _ in range(3)])
        run.close()
    assert norms[0] == norms[1]


@pytest.fixture
def documents(tmp_path):
    """Return a folder of texts, each of which repeats lines of others."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(12):
        lines = [f"the line {(i * 3 + j) % 17} of all is number {(i * 3 + j) % 17 * 37}\n" for j in range(12)]
        (folder / f"{i:02}.txt").write_text("".join(lines))
    return folder


def test_a_base_is_retrofitted_on_text_and_stays_as_it_is(documents, tmp_path):
    base = dict(seq_len=64, steps=3)
    assert train.main(flags(documents, tmp_path / "gpt", **base)) == 0
    options = dict(
        model="retro", init_from=tmp_path / "gpt" / "model", tokenizer=None, seq_len=64, batch_size=2, steps=4
    )
    argv = [*flags(documents, tmp_path / "run", **options), "--set", "chunk=16"]
    assert train.main(argv) == 0
    before, after = open_model(tmp_path / "gpt" / "model"), open_model(tmp_path / "run" / "model")
    state = after.state_dict()
    assert all(torch.equal(w, state[name]) for name, w in before.state_dict().items())
    assert after.model.layers[1].cross_attn.o_proj.weight.abs().max() > 0
    tokens = torch.randint(256, (1, 40))
    with torch.no_grad():
        assert torch.equal(before(tokens), after(tokens))
    assert "--- a neighbour" in (tmp_path / "run" / "samples.txt").read_text()


def test_text_never_retrieves_from_its_own_document(documents, tmp_path):
    run = prepared(documents, tmp_path / "run", model="retro", data=documents, size="text", seq_len=64)
    rows, m = run.dataset.train, 32
    eot = run.dataset.tokenizer.eot_id
    document = np.cumsum(np.asarray(rows.index.tokens) == eot)
    n_found = 0
    for c, row in enumerate(np.asarray(rows.found)):
        own = set(document[c * m : c * m + m].tolist())
        for n in row[row >= 0]:
            assert not own & set(document[n * m : n * m + 2 * m].tolist())
            n_found += 1
    assert n_found > 50
    row = rows[3]
    chunk = row["tokens"][32:64]
    assert (np.isin(row["neighbours"][1, 0, :32], chunk)).mean() > 0.5
    run.close()


def test_a_row_longer_than_the_text_is_refused_before_neighbours_are_found(documents, tmp_path, capsys):
    for path in sorted(documents.iterdir())[3:]:
        path.unlink()
    for path in documents.iterdir():
        path.write_text(path.read_text()[:140])
    options = dict(model="retro", data=documents, size="text", seq_len=256, cache=tmp_path / "cache")
    error = refused(capsys, flags(documents, tmp_path / "run", **options))
    assert "--seq-len 256: val has" in error and not list((tmp_path / "cache").glob("*-index"))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"seq_len": 40}, "--seq-len 40: expected a multiple of 16"),
        ({"document_mask": True, "seq_len": 64}, "--document-mask: neighbours belong to chunks"),
        ({"seq_len": 64, "set": "chunk=8"}, "chunk 8: expected at least 16"),
        ({"seq_len": 64, "set": "n_neighbours=0"}, "n_neighbours 0: expected at least 1"),
    ],
)
def test_mistakes_are_named(changes, words, text, tmp_path, capsys, monkeypatch):
    few_facts(monkeypatch)
    error = refused(
        capsys, flags(text, tmp_path / "run", model="retro", data="facts", tokenizer=None, **changes)
    )
    assert words in error


def test_one_document_and_neighbours_of_another_shape_are_refused(text, tmp_path, capsys):
    error = refused(capsys, flags(text, tmp_path / "run", model="retro", data=text, size="text", seq_len=64))
    assert "one document; neighbours come from other documents" in error
    model, (tokens, neighbours) = shaken(), inputs()
    with pytest.raises(ValueError, match=r"neighbours \(2, 4, 2, 8\): expected \(2, 5, k, 8\)"):
        model(tokens, neighbours=neighbours[:, 1:])
    with pytest.raises(ValueError, match="retrieval_layers"):
        replace(CONFIG, retrieval_layers=(2, 1))
