"""Speculative decoding has the law of the model alone, whatever the draft is, and greedily the same text."""

import copy
import itertools
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from conftest import run_command
from small_gpt import SMALL
from torch import nn

from data.tokenizer import get_tokenizer
from generate import likely, penalise, tokens_in
from gpt import GPT
from language import speculative
from language.prefix_lm import PrefixModel
from language.speculative import (
    Counts,
    DraftModel,
    Lookup,
    Proposal,
    accept,
    expected_tokens,
    first_of,
    generate,
)

V = 61


def small(seed: int = 0, **changes) -> GPT:
    """A random model in float64, where the order of additions decides no token, and with the attention that
    takes one call for rows of any lengths."""
    torch.manual_seed(seed)
    model = GPT(replace(SMALL, **{"vocab_size": V, "kernels": "reference", **changes})).eval().double()
    return moved(model, 0.2)


@torch.no_grad()
def moved(model: nn.Module, by: float) -> nn.Module:
    for p in model.parameters():
        p.add_(by * torch.randn_like(p))
    return model


def drafts_of(model: nn.Module) -> dict:
    """Drafts that are right always, often, hardly ever, and for what repeats itself."""
    torch.manual_seed(1)
    near, other = moved(copy.deepcopy(model), 0.02), small(2, n_layers=1, vocab_size=model.config.vocab_size)
    lookup = Lookup(model.config.vocab_size)
    return {
        "itself": DraftModel(model),
        "near": DraftModel(near),
        "other": DraftModel(other),
        "lookup": lookup,
    }


def prompts_of(n: int, longest: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    return [torch.randint(V, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("draft", ["near", "other", "lookup"])
def test_greedy_text_is_that_of_the_model_alone_for_50_prompts_of_any_length(draft):
    model, prompts, counts = small(window=7, full_layers=(1,)), prompts_of(50), Counts()
    expected = model.generate(prompts, 16, temperature=0)
    assert generate(model, drafts_of(model)[draft], prompts, 16, temperature=0, counts=counts) == expected
    assert counts.tokens == 50 * 15 and 0 < counts.accepted < counts.tested  # rows accept different numbers


def test_each_row_gets_what_it_gets_alone_in_the_last_positions_too():
    model = small(positions="learned", max_seq_len=32)
    prompts, draft = prompts_of(3), drafts_of(model)["near"]
    draft.model.config = replace(draft.model.config, max_seq_len=32)
    together = generate(model, draft, prompts, 20, temperature=0)
    assert together == [generate(model, draft, [prompt], 20, temperature=0)[0] for prompt in prompts]
    assert together == model.generate(prompts, 20, temperature=0)


@pytest.mark.parametrize("n_drafts, n_new", [(1, 9), (3, 9), (8, 9), (20, 9), (4, 1), (4, 0)])
def test_all_guesses_of_the_model_itself_are_accepted(n_drafts, n_new):
    """Also where it must first read the last of its own guesses, and with the draws of a temperature."""
    model, counts = small(), Counts()
    options = {"temperature": 0.9, "generator": torch.Generator().manual_seed(0), "counts": counts}
    new = generate(model, DraftModel(model), prompts_of(3), n_new, n_drafts=n_drafts, **options)
    assert [len(row) for row in new] == [n_new] * 3
    assert counts.accepted == counts.tested == counts.tokens - counts.passes
    assert counts.passes == 3 * -(-max(0, n_new - 1) // (n_drafts + 1))


# --- the law


def limit(n: int) -> float:
    """Return what chi-square with n degrees of freedom exceeds once in 10,000 times (Wilson 1931)."""
    return n * (1 - 2 / (9 * n) + NormalDist().inv_cdf(1 - 1e-4) * (2 / (9 * n)) ** 0.5) ** 3


def check_law(frequencies: torch.Tensor, p: torch.Tensor) -> None:
    """Assert that frequencies of events are those of probabilities p: by chi-square."""
    expected = p * frequencies.sum()
    assert (frequencies[p == 0] == 0).all()
    large = expected >= 5
    found = ((frequencies - expected)[large] ** 2 / expected[large]).sum().item()
    assert found < limit(int(large.sum()) - 1), found


OPTIONS = [
    {},
    {"temperature": 0.7, "top_k": 4, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.3, "repetition_penalty": 1.8},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("draft", ["other", "lookup"])
def test_texts_have_the_law_of_the_model(options, draft):
    """Chi-square of 5,000 texts of 3 tokens of 5, by two guesses per pass, against all 125 probabilities."""
    model, start, n = small(vocab_size=5, n_layers=1, d_model=16, n_heads=2), [3, 1, 3], 5_000
    generator, counts = torch.Generator().manual_seed(0), Counts()
    new = generate(
        model,
        drafts_of(model)[draft],
        [start] * n,
        3,
        n_drafts=2,
        generator=generator,
        counts=counts,
        **options,
    )
    assert 0.1 < counts.acceptance < 0.9

    # The exact law: a product over the three tokens of each possible text.
    texts = [list(text) for text in itertools.product(range(5), repeat=3)]
    options = {"temperature": 1.0, **options}
    penalty, p = options.pop("repetition_penalty", 1.0), torch.ones(125)
    for i in range(3):
        read = [start + text[:i] for text in texts]
        logits = model(torch.tensor(read))[:, -1].detach().float()
        logits = penalise(logits, tokens_in(read, 5, logits.device), penalty)
        p *= likely(logits, **options)[range(125), [text[i] for text in texts]]
    codes = torch.tensor(new) @ torch.tensor([25, 5, 1])
    check_law(torch.bincount(codes, minlength=125).float(), p)


P = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
Q = torch.tensor([0.1, 0.3, 0.1, 0.3, 0.2])


def accepted(q: torch.Tensor, g: int, n: int = 20_000):
    """Return how many of g guesses by q were accepted in n rows, and the first token of each row."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(q, n * g, replacement=True, generator=generator).view(n, g)
    proposal = Proposal(tokens, q.expand(n, g, -1), torch.full((n,), g))
    k, behind = accept(P.expand(n, g + 1, -1), proposal, generator)
    return k, torch.where(k > 0, tokens[:, 0], behind[:, 0])


def test_a_draft_that_never_agrees_is_never_accepted_and_changes_no_law():
    k, first = accepted(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]), 1)
    assert k.sum() == 0
    check_law(torch.bincount(first, minlength=5).float(), P)


def test_acceptance_is_one_less_the_total_variation_and_gives_the_tokens_of_the_formula():
    k, first = accepted(Q, 4)
    check_law(torch.bincount(first, minlength=5).float(), P)
    a, tokens = 1 - (P - Q).abs().sum().item() / 2, k + 1.0
    assert expected_tokens(a, 4) == pytest.approx((1 - a**5) / (1 - a))
    assert abs(tokens.mean() - expected_tokens(a, 4)) < 3 * tokens.std() / len(k) ** 0.5
    assert [round(expected_tokens(0.8, g), 2) for g in (1, 3, 7)] == [1.8, 2.95, 4.16]
    assert expected_tokens(1.0, 3) == 4


def test_rows_with_fewer_guesses_draw_from_the_model_behind_them():
    """What fills a row counts as no guess: the token behind comes from p itself, not from what q leaves."""
    n = 20_000
    proposal = Proposal(
        torch.zeros(n, 2, dtype=torch.int64), torch.eye(5)[0].expand(n, 2, -1), torch.zeros(n).long()
    )
    k, behind = accept(P.expand(n, 3, -1), proposal, torch.Generator().manual_seed(0))
    assert k.sum() == 0
    check_law(torch.bincount(behind[:, 0], minlength=5).float(), P)


# --- the end of a text


def test_a_text_ends_with_a_stop_token_among_accepted_guesses():
    model, prompts = small(), prompts_of(4)
    free = model.generate(prompts, 20, temperature=0)
    stops = [free[0][7], free[1][2]]
    expected = model.generate(prompts, 20, temperature=0, stop=stops)
    assert [len(row) for row in expected[:2]] == [8, 3] or min(map(len, expected)) < 20
    for draft in drafts_of(model).values():
        assert generate(model, draft, prompts, 20, temperature=0, stop=stops) == expected


def test_tokens_are_cut_at_the_first_stop_and_at_what_fits():
    assert first_of([1, 2, 3, 2], 9, {2}) == [1, 2]
    assert first_of([1, 2, 3], 1, {2}) == [1]
    assert first_of([1, 2, 3], 3, set()) == [1, 2, 3]
    assert first_of([1, 2, 3], 0, {1}) == []


def test_a_look_up_copies_what_followed_the_longest_repetition_and_goes_on_with_its_copy():
    lookup, model = Lookup(V), small()
    texts = [[1, 2, 3, 9, 3, 4, 1, 2, 3], [5, 6, 5, 6, 5, 6], [1, 2, 3, 4]]
    lookup.begin([text[:2] for text in texts], 9, model)
    found = lookup.propose(texts, 4, None, None)
    assert found.counts.tolist() == [4, 4, 0]
    assert found.tokens[:2].tolist() == [[9, 3, 4, 1], [5, 6, 5, 6]]
    assert lookup.propose([[1, 2, 3, 9, 3, 4, 1, 2, 3, 4]] * 3, 2, None, None).tokens[0].tolist() == [1, 2]


# --- mistakes, and the command


def test_mistakes_are_named_before_the_prompts_are_read():
    model = small()
    with pytest.raises(ValueError, match="draft has a vocabulary of 60 tokens, the model one of 61"):
        generate(model, DraftModel(small(vocab_size=60)), [[1]], 2)
    with pytest.raises(ValueError, match="0 drafts per pass: expected at least 1"):
        generate(model, Lookup(V), [[1]], 2, n_drafts=0)
    with pytest.raises(ValueError, match="PrefixModel keeps a PrefixCache, which cannot be cut back"):
        generate(PrefixModel(model), Lookup(V), [[1]], 2)
    with pytest.raises(ValueError, match="empty prompt"):
        generate(model, Lookup(V), [[]], 2)
    with pytest.raises(ValueError, match="logits are not finite"):
        model.model.norm.weight.data[0] = torch.nan
        generate(model, Lookup(V), [[1]], 2)


def saved(directory, seed: int, **changes):
    tokenizer = get_tokenizer("bytes")
    small(seed, **{"vocab_size": tokenizer.n_vocab, "n_layers": 1, **changes}).float().save_pretrained(
        directory
    )
    tokenizer.save(directory)
    return directory


def test_the_command_prints_the_text_of_the_model_alone_and_both_speeds(tmp_path):
    model, draft = saved(tmp_path / "model", 0), saved(tmp_path / "draft", 1)
    flags = ("--prompt", "hello", "--temperature", "0", "--max-new-tokens", "12")
    alone = run_command("generate.py", model, *flags)
    for kind in (("--draft", draft), ("--lookup",)):
        done = run_command("-m", "language.speculative", model, *kind, *flags)
        assert (done.code, done.out) == (0, alone.out)
        assert (
            "12 tokens, " in done.err and "guesses accepted (" in done.err and "tokens per pass" in done.err
        )

    other = saved(tmp_path / "other", 1)
    get_tokenizer("bytes").with_special_tokens({"bos_token": "<s>"}).save(other)
    for words, kind in (
        ("expected one draft", ()),
        ("expected one draft", ("--lookup", "--draft", draft)),
        ("tokenizer of 258 tokens", ("--draft", other)),
        ("--compile: passes over several tokens", ("--lookup", "--compile")),
    ):
        done = run_command("-m", "language.speculative", model, *kind)
        assert done.code == 2 and done.err.startswith("error: ") and words in done.err, done.err
    assert "no checkpoint" in run_command("-m", "language.speculative", "--lookup").err


def test_only_decoders_are_opened(tmp_path):
    from bert import BERT, SIZES

    BERT(replace(SIZES["tiny"], n_layers=1, d_model=16, n_heads=2, d_ff=16)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BERT is no decoder"):
        speculative.open_decoder(tmp_path)
