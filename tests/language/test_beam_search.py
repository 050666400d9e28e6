"""Writing with T5 against transformers (recorded), and against a search of all outputs."""

import itertools

import pytest
import torch
from small_t5 import FIXTURES, OLD, V11, recorded, small

from kernels import few_rows
from language import beam_search, t5


def recorded_prompts(expected):
    lengths = expected["prompt_lengths"].tolist()
    return [row[:n].tolist() for row, n in zip(expected["prompts"], lengths, strict=True)]


def outputs(rows):
    return [[token for token in row if token >= 0] for row in rows.tolist()]


@pytest.mark.parametrize("name", ["t5", "t5-v1_1"])
def test_greedy_and_beam_tokens_equal_transformers(name):
    """Three inputs of different lengths in one batch."""
    model, expected = recorded(name)
    prompts, n_new = recorded_prompts(expected), 16
    assert model.generate(prompts, n_new, temperature=0) == outputs(expected["greedy"])
    assert model.beam_search(prompts, n_new, n_beams=3) == outputs(expected["beams"])
    short = model.beam_search(prompts, n_new, n_beams=4, length_penalty=-0.5)
    assert short == outputs(expected["short_beams"])


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, V11, OLD], ids=["1.0", "1.1", "original"])
def test_a_cache_changes_nothing(changes):
    """Each token is the likeliest by a pass over the whole output, also far beyond the last bucket."""
    model, prompts = small(**changes), [[5, 9, 3], [7, 7, 2, 30, 8]]
    written = model.generate(prompts, 24, temperature=0, stop=())
    for prompt, output in zip(prompts, written, strict=True):
        logits = model(torch.tensor([prompt]), torch.tensor([output]))
        assert logits[0].argmax(-1).tolist() == output


def test_wide_matrices_of_a_cpu_are_rearranged_and_give_the_same_tokens(monkeypatch):
    model, prompts = small(**V11), [[5, 9, 3], [7, 7, 2, 30, 8]]
    expected = [model.generate(rows, 12, temperature=0) for rows in (prompts, prompts[:1])]
    monkeypatch.setattr(few_rows, "LARGE", 1)
    monkeypatch.setattr(few_rows, "STEPS", 1)
    decoder = beam_search.Decoder(model, prompts)
    arranged = few_rows.arrange(decoder, n_rows=2, n_steps=12)
    assert arranged is not decoder and arranged.keys_0.data_ptr() == decoder.keys_0.data_ptr()
    own, cross, mlp = arranged.model.decoder.block[1].layer
    assert own.SelfAttention.joined.sizes == [24, 24, 24] and mlp.DenseReluDense.joined.sizes == [40, 40]
    assert not hasattr(cross.EncDecAttention, "joined") and isinstance(
        arranged.model.lm_head, few_rows.Product
    )
    assert [model.generate(rows, 12, temperature=0) for rows in (prompts, prompts[:1])] == expected


def test_a_tied_head_is_rearranged_and_scaled_as_before(monkeypatch):
    model, prompts = small(), [[5, 9, 3], [7, 7, 2]]
    expected = model.generate(prompts, 12, temperature=0, stop=())
    monkeypatch.setattr(few_rows, "LARGE", 1)
    monkeypatch.setattr(few_rows, "STEPS", 1)
    arranged = few_rows.arrange(beam_search.Decoder(model, prompts), n_rows=2, n_steps=12).model
    assert isinstance(arranged.lm_head, few_rows.Product) and model.lm_head is None
    assert model.generate(prompts, 12, temperature=0, stop=()) == expected


def test_one_beam_is_greedy():
    model, prompts = small(), [[5, 9, 3], [7, 7, 2, 30, 8]]
    assert model.beam_search(prompts, 12, n_beams=1) == model.generate(prompts, 12, temperature=0)


@torch.no_grad()
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_enough_beams_find_the_best_of_all_outputs(penalty):
    """All outputs of at most 3 of 5 tokens, of which the second ends an output."""
    model, prompt, scores = small(vocab_size=5), torch.tensor([[4, 2, 3]]), {}
    for n in (1, 2, 3):
        all_outputs = torch.tensor(list(itertools.product(range(5), repeat=n)))
        log_p = model(prompt.expand(len(all_outputs), -1), all_outputs).log_softmax(-1)
        total = log_p.gather(2, all_outputs[:, :, None]).sum((1, 2)) / n**penalty
        for output, score in zip(all_outputs.tolist(), total.tolist(), strict=True):
            if 1 not in output[:-1] and (output[-1] == 1 or n == 3):
                scores[tuple(output)] = score
    assert len(scores) == 1 + 4 + 16 * 5
    assert tuple(model.beam_search(prompt, 3, n_beams=25, length_penalty=penalty)[0]) == max(
        scores, key=scores.get
    )


def test_sampling_is_that_of_generate():
    model = small()
    draws = [
        model.generate([[5, 9]], 10, temperature=1.0, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    "inputs, options, message",
    [
        ([[]], {}, "an empty input"),
        ([[61]], {}, "token 61 in an input: expected 0 to 60"),
        ([[5]], {"n_beams": 0}, "n_beams 0: expected at least 1"),
    ],
)
def test_inputs_and_options_out_of_range_are_refused(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        small().beam_search(inputs, 4, **options)


def test_the_command_prints_the_sizes(capsys):
    beam_search.main(t5.T5, {"small": t5.SIZES["small"]}, [])
    assert "60,506,624" in capsys.readouterr().out


def test_the_command_refuses_a_search_without_beams():
    with pytest.raises(ValueError, match="--beams 0: expected at least 1"):
        beam_search.main(t5.T5, t5.SIZES, ["nowhere", "--beams", "0"])


def test_a_directory_of_another_concept_is_refused():
    with pytest.raises(ValueError, match=r"open it by python gpt\.py"):
        beam_search.main(t5.T5, t5.SIZES, [str(FIXTURES / "gpt2")])


@pytest.mark.parametrize("early", [False, True])
def test_with_early_stopping_a_search_ends_once_n_outputs_have_ended_whatever_goes_on(early):
    search = beam_search.Search(2, 0.0, eos=1, early_stopping=early)
    search.step([-1.0, -4.0, -5.0, -6.0], [0, 0, 1, 1], [5, 6, 7, 8], is_last=False)
    # Both of the best end, with worse scores than a beginning that goes on has after a longer search.
    search.step([-4.0, -5.0, -4.5, -6.0], [0, 1, 0, 0], [1, 1, 7, 8], is_last=False)
    assert [output for _, output in search.ended] == [[5, 1], [6, 1]]
    assert search.done is early


def test_rules_forbid_an_early_end_and_repetition_and_force_both_ends():
    rules = beam_search.Rules(no_repeat_ngram_size=3, min_length=4)
    log_p = torch.zeros(2, 9)
    rules.apply(log_p, [[0, 4, 5], [0, 6, 7]], eos=1, is_last=False)
    assert log_p.isinf().nonzero().tolist() == [[0, 1], [1, 1]]  # the end alone, in both
    log_p = torch.zeros(2, 9)
    rules.apply(log_p, [[4, 5, 6, 2, 4, 5], [4, 5, 6, 2, 5, 4]], eos=1, is_last=False)
    assert log_p.isinf().nonzero().tolist() == [[0, 6]]  # 4 5 6 again

    forced = beam_search.Rules(forced_bos_token_id=3, forced_eos_token_id=1)
    for row, is_last, token in (([0], False, 3), ([0, 5], True, 1)):
        log_p = torch.full((1, 9), -2.0)
        forced.apply(log_p, [row], eos=1, is_last=is_last)
        assert log_p[0, token] == 0 and log_p.isinf().sum() == 8
    log_p = torch.full((1, 9), -2.0)
    forced.apply(log_p, [[0, 5]], eos=1, is_last=False)
    assert (log_p == -2).all()
