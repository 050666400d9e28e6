"""The comparison of kinds of attention: tasks, measures, equal FLOPs, and that ended runs are kept."""

import json
import math

import pytest
import torch
from torch import Generator, nn

import data.text
from results import attention_compared
from results.attention_compared import GROUPS, KINDS, cache_bytes, make_model, make_needles

LETTERS = attention_compared.LETTERS


@pytest.fixture
def small(monkeypatch):
    """Rows of 32 tokens, and tests of few rows."""
    changed = dict(T=32, GROUPS=(0, 8, 32), N_HELD_OUT=3, VOCABULARY=300)
    changed |= dict(LENGTHS=(24, 48), NEEDLE_TOKENS=256, N_TEST=2)
    for name, value in changed.items():
        monkeypatch.setattr(attention_compared, name, value)


@pytest.fixture
def dataset(tmp_path, small):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} is {i**3 % 997} and {'x' * (i % 7)} too\n" for i in range(1500)))
    corpus = data.text.prepare(str(path), "bpe:300", tmp_path / "cache", notify=lambda _: None)
    return data.text.as_rows(corpus, 32, only_whole=True)


class Reader(nn.Module):
    """Gives the token that `next_token` (a function of a row and a place in it) names the logit 30."""

    def __init__(self, next_token, vocab_size: int):
        super().__init__()
        self.next_token, self.vocab_size = next_token, vocab_size

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, self.vocab_size)
        for b, row in enumerate(tokens.tolist()):
            for i in range(len(row)):
                if (token := self.next_token(row, i)) is not None:
                    logits[b, i, token] = 30
        return logits

    def hidden(self, tokens):
        return self(tokens)

    def logits(self, hidden):
        return hidden


@pytest.mark.parametrize(("length", "n_keys"), [(16, 4), (33, 2), (40, 16)])
def test_a_row_has_one_key_and_its_answer_behind_every_place_but_the_last(length, n_keys):
    batch, seen = make_needles(200, length, n_keys, Generator().manual_seed(0)), set()
    for row, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
        places = [i for i, token in enumerate(row) if token >= LETTERS]
        assert len(places) == n_keys and places[-1] == length - 1
        answer = row[places[0] + 1]
        assert answer < LETTERS and {row[i] for i in places} == {row[-1]}
        assert all(row[i + 1] == answer for i in places[:-1])
        assert {i: y for i, y in enumerate(targets) if y != -100} == dict.fromkeys(places[1:], answer)
        seen.add(places[0])
    if n_keys == 2:
        assert seen == set(range(length - 2))  # any depth


def test_a_model_that_looks_the_key_up_answers_every_row_and_one_that_guesses_one_in_32(monkeypatch):
    def look_up(row, i):
        return row[row.index(row[i]) + 1] if row[i] in row[:i] else None

    monkeypatch.setattr(attention_compared, "N_TEST", 320)
    assert attention_compared.found(Reader(look_up, 64), 24) == 1
    guess = attention_compared.found(Reader(lambda row, i: 7, 64), 24)
    assert guess == pytest.approx(1 / 32, abs=4 * math.sqrt(1 / 32 / 320))  # four standard deviations


def test_losses_are_those_of_models_whose_losses_are_known(dataset):
    rows = [dataset.val[i * len(dataset.val) // 3]["tokens"].tolist() for i in range(3)]
    n_bytes = sum(len(dataset.tokenizer.decode(row[1:]).encode()) for row in rows)

    # Equal logits: log V nats at every token.
    measured = attention_compared.losses(Reader(lambda row, i: None, 300), dataset)
    assert measured["by_position"] == pytest.approx([math.log(300)] * 2, rel=1e-6)  # float32
    assert measured["bits_per_byte"] == pytest.approx(3 * 32 * math.log2(300) / n_bytes, rel=1e-6)

    # The next token is known from place 8 to place 30, and the last one is not.
    reader = Reader(lambda row, i: row[i + 1] if 8 <= i < 31 else None, 300)
    known = math.log1p(299 * math.exp(-30))
    expected = [math.log(300), (23 * known + math.log(300)) / 24]
    assert attention_compared.losses(reader, dataset)["by_position"] == pytest.approx(expected, rel=1e-6)


def test_a_run_ends_with_the_batch_that_spends_its_flops():
    for kind in ("softmax", "linear"):
        model, batches = make_model(kind, "needle"), attention_compared.of_needles(0)
        lengths = [next(batches)["tokens"].shape for _ in range(3)]
        flops = [n * length * model.flops_per_token(length) for n, length in lengths]
        spent = attention_compared.train(
            model, attention_compared.of_needles(0), sum(flops[:2]) + 1, 1e-3, "adamw"
        )
        assert spent["flops"] == sum(flops) and spent["steps"] == 3
        assert spent["tokens"] == sum(n * length for n, length in lengths)


def test_kinds_keep_the_keys_and_values_that_they_are_called_after():
    of_layer = 2 * 2 * 16 * 4  # bytes of a token: keys and values of two heads, 16 numbers each
    state = 4 * 16 * 16 * 4  # of a row, four heads
    expected = {
        "softmax": 2 * 512 * of_layer,
        "windows, softmax": (64 + 512) * of_layer,
        "MoBA": 2 * 512 * of_layer,
        "linear": 2 * state,
        "linear, softmax": state + 512 * of_layer,
        "latent": 2 * 512 * (32 + 8) * 4,
        "talking heads": 2 * 512 * of_layer,
        # 31 summaries, the last 32 tokens, all tokens, the window of 64
        "native sparse": 2 * (31 + 32 + 512 + 64) * of_layer,
    }
    assert {kind: cache_bytes(make_model(kind, "text"), 512) for kind in KINDS} == expected


def test_groups_of_positions_are_all_of_the_row():
    assert GROUPS[0] == 0 and GROUPS[-1] == attention_compared.T and sorted(set(GROUPS)) == list(GROUPS)


def test_every_kind_learns_a_step_and_a_second_start_repeats_nothing(tmp_path, dataset, monkeypatch, capsys):
    out = tmp_path / "compared.json"
    flags = ["--text-flops", "1", "--needle-flops", "1", "--seeds", "5", "--out", str(out)]
    monkeypatch.setattr(data.text, "prepare", lambda *args, **options: None)
    monkeypatch.setattr(data.text, "as_rows", lambda *args, **options: dataset)
    attention_compared.main(flags)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["task"], row["kind"]) for row in rows] == [(t, k) for t in ("text", "needle") for k in KINDS]
    assert all(row["seed"] == 5 and row["steps"] == 1 for row in rows)
    printed = capsys.readouterr().out
    assert printed.count("seed 5") == 16 and printed.count("\n| MoBA |") == 2
    pictures = [tmp_path / f"compared_{task}.png" for task in ("text", "needle")]
    assert all(picture.exists() for picture in pictures)  # empty in tests, see conftest.py

    monkeypatch.setattr(attention_compared, "measure", None)
    attention_compared.main(flags)
    assert "seed 5" not in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"] == rows


def test_a_kind_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"kind 'soft': expected one of softmax, .*talking heads"):
        make_model("soft", "text")
