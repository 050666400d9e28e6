"""Scores by models: perplexity and Ask-LLM's answer are what the plain model computes."""

import math
from types import SimpleNamespace

import pytest
import small_t5
import torch

from data import model_scores
from data.tokenizer import END_OF_TEXT, Tokenizer, get_tokenizer
from gpt import GPT, Config

BYTES = get_tokenizer("bytes")
TEXT = "Water boils at 100 degrees at the level of the sea, and at less on a mountain. " * 2


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(Config(1, 2, 16, 16, BYTES.n_vocab, 512, eos_token_id=BYTES.eot_id)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def short(model) -> GPT:
    """Return the same model with a context of 64 tokens."""
    short = GPT(Config(1, 2, 16, 16, BYTES.n_vocab, 64, eos_token_id=BYTES.eot_id)).eval()
    short.load_state_dict(model.state_dict())
    return short


def test_ask_llm_is_the_probability_of_yes_among_all_tokens_behind_the_prompt(model):
    asked = f"""###
{TEXT}
###

Does the previous paragraph demarcated within ### and ### contain informative signal for pre-training \
a large-language model? An informative datapoint should be well-formatted, contain some usable knowledge of \
the world, and strictly NOT have any harmful, racist, sexist, etc. content.

OPTIONS:
- yes
- no
"""
    with torch.no_grad():
        logits = model(torch.tensor([BYTES.encode(asked)]))[0, -1].double()
    yes, no = (BYTES.encode(word)[0] for word in ("yes", "no"))
    expected = logits[yes].exp() / logits.exp().sum()
    found = model_scores.ask(model, BYTES, TEXT)
    assert found == pytest.approx(expected.item(), rel=1e-9)
    # It is not the share of yes beside no alone.
    assert abs(found - (logits[yes].exp() / (logits[yes].exp() + logits[no].exp())).item()) > 1e-3


def test_a_prompt_begins_as_any_text_of_the_tokenizer_does(model):
    begins = Tokenizer(BYTES.ranks, BYTES.pattern, BYTES.special_tokens, around=((END_OF_TEXT,), ()))
    tokens = [BYTES.eot_id, *BYTES.encode(model_scores.PROMPT.format(TEXT))]
    with torch.no_grad():
        expected = model(torch.tensor([tokens]))[0, -1].double().softmax(0)[BYTES.encode("y")[0]]
    assert model_scores.ask(model, begins, TEXT) == pytest.approx(expected.item(), rel=1e-9)
    assert 0 < model_scores.ask(model, begins, TEXT * 99) < 1  # cut so that all of it fits

    # So does the text of a perplexity.
    begins = SimpleNamespace(begin_ids=[65], eot_id=BYTES.eot_id, encode=BYTES.encode)
    tokens = torch.tensor([65, *BYTES.encode(TEXT)])
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(model(tokens[None, :-1])[0].double(), tokens[1:]).item()
    assert model_scores.perplexity(model, begins, TEXT) == pytest.approx(math.exp(nats), rel=1e-9)
    assert model_scores.perplexity(model, BYTES, TEXT) != pytest.approx(math.exp(nats), rel=1e-6)


def test_a_long_text_is_cut_and_the_question_is_whole():
    frame = len(BYTES.encode(model_scores.PROMPT.format("")))
    tokens = model_scores.ask_tokens(BYTES, "x" * 1000, frame + 7)
    assert BYTES.decode(tokens) == model_scores.PROMPT.format("x" * 7)
    assert BYTES.decode(model_scores.ask_tokens(BYTES, "ab", frame + 7)) == model_scores.PROMPT.format("ab")
    with pytest.raises(ValueError, match="the prompt alone has"):
        model_scores.ask_tokens(BYTES, "x", frame - 1)


def test_the_answer_is_one_token_of_its_own():
    assert model_scores.answer_token(BYTES) == BYTES.encode("y")[0]


def test_an_encoder_decoder_answers_with_the_first_token_that_it_writes():
    model = small_t5.small()
    tokens = torch.arange(3, 13)[None]
    with torch.no_grad():
        ends = torch.cat((tokens, torch.tensor([[model.config.eos_token_id]])), 1)
        logits = model(ends, torch.tensor([[7, 8]]))[0, 0].double()
    found = model_scores.first_probabilities(model, tokens)
    assert torch.allclose(found, logits.exp() / logits.exp().sum(), rtol=0, atol=1e-6)
    assert torch.equal(model_scores.first_probabilities(model, ends), found)  # one end, not two


def test_perplexity_predicts_each_token_once_from_those_before_it_in_its_window(short):
    tokens = [BYTES.eot_id, *BYTES.encode(TEXT)]
    assert len(tokens) - 1 > 2 * 64 and (len(tokens) - 1) % 64
    total = 0.0
    for i in range(1, len(tokens)):
        start = (i - 1) // 64 * 64
        with torch.no_grad():
            logits = short(torch.tensor([tokens[start:i]]))[0, -1].double()
        total -= (logits[tokens[i]] - logits.logsumexp(0)).item()
    expected = math.exp(total / (len(tokens) - 1))
    assert model_scores.perplexity(short, BYTES, TEXT) == pytest.approx(expected, rel=1e-5)  # of float32


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(short):
    blind = GPT(short.config).eval()
    with torch.no_grad():
        blind.model.norm.weight.zero_()
    for text in ("a", "a" * 63, "a" * 64, "a" * 65, TEXT):  # windows full, and not
        assert model_scores.perplexity(blind, BYTES, text) == pytest.approx(BYTES.n_vocab, rel=1e-12)
    assert math.isnan(model_scores.perplexity(blind, BYTES, ""))


def test_a_directory_is_checked_before_work(model, short, tmp_path):
    for name, one in (("long", model), ("short", short)):
        one.save_pretrained(tmp_path / name)
        BYTES.save(tmp_path / name)
    model_scores.check(tmp_path / "long", "ask_llm")
    model_scores.check(tmp_path / "short", "perplexity")
    with pytest.raises(ValueError, match="the prompt alone has"):
        model_scores.check(tmp_path / "short", "ask_llm")
    (found,) = model_scores.scores("ask_llm", tmp_path / "long", [TEXT])
    assert found == pytest.approx(model_scores.ask(model, BYTES, TEXT), rel=1e-6)
