"""Tests of posttraining/reward.py: the token that is scored, losses, calibration, files, and runs."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import small_gpt
import torch
from safetensors.torch import load_file

import gpt
import lora
import train
from data.preferences import Example, PreferenceRows
from data.tokenizer import get_tokenizer
from formats.open_model import open_model
from posttraining import reward
from posttraining.reward import RewardModel

FIXTURE = Path(__file__).parents[1] / "fixtures/llama-reward"
TRL = load_file(FIXTURE / "expected.safetensors")


def test_the_loss_has_its_unit_values():
    zero, one = torch.zeros(1), torch.ones(1)
    assert reward.bradley_terry_loss(zero, zero).item() == pytest.approx(math.log(2))
    assert reward.bradley_terry_loss(one, zero).item() == pytest.approx(0.313262, abs=5e-7)
    assert reward.bradley_terry_loss(one, zero, margin=1.0).item() == pytest.approx(math.log(2))
    centred = reward.bradley_terry_loss(one, one, centering=0.01)
    assert centred.item() == pytest.approx(math.log(2) + 0.04)


@pytest.mark.parametrize("p", [0.6, 0.75, 0.9])
def test_converged_the_difference_of_scores_is_the_log_odds_of_the_preference(p):
    # The derivative of p loss(d) + (1 - p) loss(-d) is 0 there, whatever both scores have in common.
    d = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
    for constant in (0.0, 5.0):
        loss = p * reward.bradley_terry_loss(constant + d, torch.tensor(constant))
        loss = loss + (1 - p) * reward.bradley_terry_loss(torch.tensor(constant), constant + d)
        assert torch.autograd.grad(loss, d)[0].item() == pytest.approx(0, abs=1e-7)


def test_a_ranking_is_the_mean_over_its_pairs_of_unequal_rank():
    scores = torch.tensor([[2.0, 0.5, -1.0, 0.0], [1.0, 3.0, 0.0, 0.0]])
    ranks = torch.tensor([[1, 2, 3, 2], [1, 2, 9, 9]])
    pairs = [[(0, 1), (0, 2), (0, 3), (1, 2), (3, 2)], [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]]
    expected = [
        sum(-math.log(1 / (1 + math.exp(row[j] - row[i]))) for i, j in some) / len(some)
        for row, some in zip(scores.tolist(), pairs, strict=True)
    ]
    assert reward.ranking_loss(scores, ranks).tolist() == pytest.approx(expected, rel=1e-6)
    two = reward.ranking_loss(scores[:, :2], torch.tensor([[1, 2], [1, 2]]))
    assert torch.equal(two, reward.bradley_terry_loss(scores[:, 0], scores[:, 1]))


# --- the token that is scored


@pytest.fixture(scope="module")
def model():
    return RewardModel.from_pretrained(FIXTURE).eval()


@pytest.mark.parametrize("lengths", [[0, 5], [6, 5], [[False] * 5, [True] * 5]])
def test_a_text_without_a_last_token_is_refused(lengths, model):
    """Position -1, the last of the row, is padding, and no token of the text."""
    with pytest.raises(ValueError, match=r"lengths \[[06], 5\]: expected 1 to 5 for each text"):
        model(torch.ones(2, 5, dtype=torch.int64), torch.tensor(lengths))


def test_scores_agree_with_transformers_whatever_the_padding(model):
    tokens, mask = TRL["tokens"], TRL["mask"]
    assert (tokens[mask.bool()] == 0).any()  # inside the texts is the id that pads, too
    with torch.no_grad():
        for found in (
            model(tokens, mask.sum(1)),
            model(tokens, mask),
            model(TRL["left_tokens"], TRL["left_mask"]),
        ):
            assert found.tolist() == pytest.approx(TRL["alone"].tolist(), abs=1e-5)
            assert found.tolist() == pytest.approx(TRL["right"].tolist(), abs=1e-5)
            assert found.tolist() == pytest.approx(TRL["left"].tolist(), abs=1e-5)


def test_a_text_that_ends_with_the_padding_id_is_scored_at_its_end(model):
    tokens, lengths = TRL["tokens"].clone(), TRL["mask"].sum(1)
    tokens[torch.arange(len(tokens)), lengths - 1] = model.pad_token_id
    with torch.no_grad():
        alone = [model(row[:n][None], n[None]).item() for row, n in zip(tokens, lengths, strict=True)]
        assert model(tokens, lengths).tolist() == pytest.approx(alone, abs=1e-5)
        one_early = model(tokens, lengths - 1)
    assert (
        one_early - torch.tensor(alone)
    ).abs().min() > 1e-3  # where "the last that is not padding" would be


def test_what_stands_behind_a_text_changes_its_score_by_no_bit(model):
    tokens, lengths = TRL["tokens"].clone(), TRL["mask"].sum(1)
    with torch.no_grad():
        before = model(tokens, lengths)
        tokens[~TRL["mask"].bool()] = 7
        assert torch.equal(model(tokens, lengths), before)


def test_learned_positions_begin_at_the_text_under_padding_on_the_left():
    torch.manual_seed(0)
    config = gpt.Config(2, 4, 32, 64, 96, 64, norm="layer", positions="learned", mlp="gelu", bias=True)
    model = RewardModel(gpt.GPT(config)).eval()
    with torch.no_grad():
        model.decoder.model.embed_positions.weight.normal_()
        right = model(TRL["tokens"], TRL["mask"])
        left = model(TRL["left_tokens"], TRL["left_mask"])
    assert left.tolist() == pytest.approx(right.tolist(), abs=1e-5)


def test_several_answers_of_a_prompt_go_through_the_model_together(model):
    tokens, lengths = TRL["tokens"], TRL["mask"].sum(1)
    with torch.no_grad():
        together = model(tokens.view(2, 3, -1), lengths.view(2, 3))
        assert together.shape == (2, 3) and torch.equal(together.flatten(), model(tokens, lengths))


def test_the_loss_and_its_gradient_agree_with_trl(model):
    model.zero_grad()
    chosen, rejected = model(TRL["tokens"], TRL["mask"].sum(1)).chunk(2)
    loss = reward.bradley_terry_loss(chosen, rejected, margin=0.5, centering=0.01).mean()
    loss.backward()
    gradient = model.get_parameter("decoder.model.layers.0.self_attn.q_proj.weight").grad
    expected = TRL["loss.gradient"]
    assert loss.item() == pytest.approx(TRL["loss"].item(), abs=1e-5)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


# --- files


def scores(model):
    with torch.no_grad():
        return model(TRL["tokens"], TRL["mask"])


def test_a_reward_model_is_written_as_it_is_read(model, tmp_path):
    calibrated = reward.calibrated(model, torch.tensor([1.0, 2.0, 4.0]))
    calibrated.save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    assert hf["architectures"] == ["LlamaForSequenceClassification"]
    assert (len(hf["id2label"]), hf["pad_token_id"]) == (1, 0)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names == load_file(FIXTURE / "model.safetensors").keys()
    again = open_model(tmp_path)
    assert type(again) is RewardModel and torch.equal(scores(again), scores(calibrated))


def test_transformers_reads_what_is_written(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    reward.calibrated(model, torch.tensor([1.0, 2.0, 4.0])).save_pretrained(tmp_path)
    theirs = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        found = theirs(input_ids=TRL["tokens"], attention_mask=TRL["mask"]).logits[:, 0]
    again = RewardModel.from_pretrained(tmp_path)
    assert (found + again.bias).tolist() == pytest.approx(scores(again).tolist(), abs=1e-5)


def test_a_reward_model_on_gpt2_is_read_again(tmp_path):
    torch.manual_seed(0)
    config = gpt.Config(2, 4, 32, 64, 96, 64, norm="layer", norm_eps=1e-5, positions="learned", mlp="gelu")
    model = RewardModel(gpt.GPT(replace(config, bias=True))).eval()
    model.save_pretrained(tmp_path)
    assert "GPT2ForSequenceClassification" in (tmp_path / "config.json").read_text()
    assert torch.equal(scores(RewardModel.from_pretrained(tmp_path)), scores(model))


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"id2label": {"0": "a", "1": "b"}}, "id2label {'0': 'a', '1': 'b'}: expected 1 label"),
        ({"reward_bias": "x"}, "reward_bias 'x': expected a number"),
        ({"architectures": ["LlamaForCausalLM"]}, "expected one of GPT2ForSequenceClassification"),
    ],
)
def test_another_model_is_refused(change, problem, tmp_path):
    hf = json.loads((FIXTURE / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(hf | change))
    with pytest.raises(ValueError, match=r"config\.json") as error:
        RewardModel.from_pretrained(tmp_path)
    assert problem in str(error.value)


def test_calibrated_scores_have_mean_0_and_deviation_1_and_training_goes_on_as_before(model):
    before = scores(model)
    new = reward.calibrated(model, before)
    after = scores(new)
    assert after.mean().item() == pytest.approx(0, abs=1e-6) and after.std().item() == pytest.approx(1)
    assert after.argsort().tolist() == before.argsort().tolist()
    assert torch.equal(scores(model), before)


# --- runs


def test_a_batch_has_the_lengths_of_prompt_and_answer():
    examples = [
        Example(torch.arange(3).numpy(), (torch.zeros(2).long().numpy(), torch.ones(4).long().numpy()))
    ]
    batch = reward.make_batch([PreferenceRows(examples)[0]], None, None)
    assert batch["lengths"].tolist() == [[5, 7]] and batch["tokens"].shape == (1, 2, 7)


def test_on_the_chain_the_scores_follow_the_exact_reward(tmp_path, capsys):
    argv = ["--model", "reward", "--batch-size", "64", "--steps", "40", "--eval-every", "40"]
    argv += ["--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    r = float(out.rpartition("correlation with the exact reward ")[2].partition(",")[0])
    assert r > 0.8
    saved = RewardModel.from_pretrained(tmp_path / "run/model").eval()
    assert saved.bias != 0 and "chance ranks 50.0%" in out
    last = small_gpt.rows(tmp_path / "run")[-1]
    assert "val_accuracy" in last and "perplexity" not in last  # it predicts no token


@pytest.fixture
def pairs(tmp_path):
    records = [{"prompt": f"{i}?", "chosen": f"{i} is it.", "rejected": "no"} for i in range(12)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    tokenizer = get_tokenizer("bytes")
    config = replace(small_gpt.SMALL, vocab_size=tokenizer.n_vocab, eos_token_id=tokenizer.eot_id)
    gpt.GPT(config).save_pretrained(tmp_path / "start")
    tokenizer.save(tmp_path / "start")
    argv = ["--model", "reward", "--init-from", tmp_path / "start", "--data", path, "--out", tmp_path / "run"]
    return [str(word) for word in [*argv, "--cache", tmp_path / "cache", "--steps", 4, "--batch-size", 4]]


def test_a_run_on_a_file_leaves_a_model_that_scores_answers(pairs, tmp_path, capsys):
    assert train.main(pairs) == 0
    reward.main([str(tmp_path / "run/model"), "--prompt", "3?", "3 is it.", "no"])
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert sorted(line.split("  ")[1] for line in lines) == ["3 is it.", "no"]
    assert float(lines[0].split()[0]) >= float(lines[1].split()[0])


def test_a_reward_model_that_is_asked_for_an_answer_says_that_it_gives_none(pairs, tmp_path, capsys):
    assert train.main(pairs) == 0
    assert lora.main([str(tmp_path / "run"), "--prompt", "3?"]) == 2
    assert "a RewardModel gives no answers; expected a model that writes text" in capsys.readouterr().err


def test_an_adapter_is_refused_since_it_would_lose_the_head(pairs, capsys):
    assert "no place for the head" in small_gpt.refused(capsys, [*pairs, "--adapter", "lora"])
