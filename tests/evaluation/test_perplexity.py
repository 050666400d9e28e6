"""The command that measures a model on a text; the sliding window itself is tested in tests/test_gpt.py."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from data.tokenizer import Tokenizer, get_tokenizer
from evaluation import perplexity
from gpt import GPT, Config

TEXT = "One two three, four five: süß.\n" * 4


@pytest.fixture
def directory(tmp_path):
    torch.manual_seed(0)
    tokenizer = get_tokenizer("bytes")
    model = GPT(Config(1, 2, 16, 32, vocab_size=tokenizer.n_vocab, max_seq_len=16))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


def test_the_figures_are_those_of_the_text_led_by_the_separating_token(directory, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    perplexity.main([str(directory), str(tmp_path / "text.txt"), "--stride", "1"])
    printed = dict(
        re.findall(r"^(text|nats per token|perplexity|bits per byte) +(.*)$", capsys.readouterr().out, re.M)
    )
    tokenizer = get_tokenizer(str(directory))
    tokens = torch.tensor([tokenizer.eot_id, *tokenizer.encode(TEXT)])
    # With stride 1 every token is predicted from all that the window of 16 tokens can hold.
    model, nats = GPT.from_pretrained(directory), 0.0
    for i in range(1, len(tokens)):
        logits = model(tokens[None, max(0, i - 16) : i])[0, -1]
        nats += F.cross_entropy(logits.double(), tokens[i]).item()
    n_bytes = len(TEXT.encode())
    assert printed["text"] == f"{n_bytes} bytes, {len(tokens) - 1} tokens"
    assert float(printed["nats per token"]) == pytest.approx(nats / (len(tokens) - 1), abs=1e-4)
    assert float(printed["perplexity"]) == pytest.approx(math.exp(nats / (len(tokens) - 1)), rel=1e-3)
    assert float(printed["bits per byte"]) == pytest.approx(nats / math.log(2) / n_bytes, abs=1e-4)


def test_the_first_document_begins_as_any_text_of_the_tokenizer_does(directory, tmp_path, capsys):
    plain = get_tokenizer("bytes").with_special_tokens({}, ["<s>"])
    begins = Tokenizer(plain.ranks, plain.pattern, plain.special_tokens, around=(("<s>",), ()))
    model = GPT(Config(1, 2, 16, 32, vocab_size=begins.n_vocab, max_seq_len=64))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)  # so that the first token matters
    model.save_pretrained(directory)
    begins.save(directory)
    (tmp_path / "two.jsonl").write_text('{"text": "One."}\n{"text": "Two."}\n')
    perplexity.main([str(directory), str(tmp_path / "two.jsonl")])
    found = float(re.search(r"nats per token +(.*)", capsys.readouterr().out)[1])
    tokens = [[i, *b"One.", begins.eot_id, *b"Two."] for i in (begins.special_tokens["<s>"], begins.eot_id)]
    right, other = (perplexity.nats(model.eval(), torch.tensor(row), 64) / 9 for row in tokens)
    assert found == pytest.approx(right, abs=1e-4) != pytest.approx(other, abs=1e-3)


@pytest.mark.parametrize("stride", [1, 5, 16])
@pytest.mark.parametrize("n", [2, 16, 17, 18, 33, 100])
def test_windows_that_pass_together_give_the_same(directory, stride, n, monkeypatch):
    model, tokens = GPT.from_pretrained(directory), torch.randint(256, (n,))
    expected = 0.0
    for i in range(1, n):  # the window that predicts token i first is the one that ends last before or at it
        end = 16 if i <= 16 else 16 + -(-(i - 16) // stride) * stride
        logits = model(tokens[None, max(0, end - 16) : i])[0, -1]
        expected += F.cross_entropy(logits.double(), tokens[i]).item()
    for n_tokens in (1, 48, 10_000):
        monkeypatch.setattr(perplexity, "TOKENS_PER_PASS", n_tokens)
        assert perplexity.nats(model, tokens, stride) == pytest.approx(expected, rel=1e-6)


def test_no_text_and_too_long_a_stride_are_refused(directory, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="empty"):
        perplexity.main([str(directory), str(tmp_path / "empty.txt")])
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    for stride in ("17", "0"):
        with pytest.raises(ValueError, match=f"stride {stride},"):
            perplexity.main([str(directory), str(tmp_path / "text.txt"), "--stride", stride])


def test_weights_in_bfloat16_are_measured_in_float32(directory, tmp_path, capsys):
    model, tokenizer = GPT.from_pretrained(directory).bfloat16(), get_tokenizer("bytes")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # large logits, so that the two dtypes differ
    model.save_pretrained(directory)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    perplexity.main([str(directory), str(tmp_path / "text.txt")])
    printed = re.search(r"nats per token +(\S+)", capsys.readouterr().out)[1]
    tokens = torch.tensor([tokenizer.eot_id, *tokenizer.encode(TEXT)])
    rounded, expected = (
        perplexity.nats(net(), tokens, 8) / (len(tokens) - 1) for net in (model.bfloat16, model.float)
    )
    assert float(printed) == pytest.approx(expected, abs=6e-5)  # printed to 4 decimals
    assert abs(rounded - expected) > 1e-3


def test_logits_that_are_not_finite_are_named_and_not_taken_for_a_look_ahead(directory):
    model = GPT.from_pretrained(directory)
    torch.nn.init.constant_(next(model.parameters()), math.nan)
    with pytest.raises(ValueError, match="not finite"):
        perplexity.check_causal(model)
