"""The loop of PPO, GRPO and RLOO: exact at its start and on resuming, better at its end; its rewards."""

import copy
import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from forks import Forked
from safetensors.torch import load_file
from small_gpt import refused, rows, same_run

import gpt
import train
from data.tokenizer import Tokenizer, get_tokenizer
from formats.open_model import open_model
from posttraining import frontier, ppo, rollout, scores
from posttraining.prompts import of_chain
from posttraining.reward import RewardModel

METHODS = ("ppo", "grpo", "dr_grpo", "dapo", "gspo", "rloo")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Return a cache with the model of the chain."""
    folder = tmp_path_factory.mktemp("cache")
    frontier.reference_model(folder)
    return folder


def flags(cache, out, *settings, steps=3, **others):
    """Return the flags of a run with few completions on the chain."""
    small = {"steps": steps, "batch_size": 2, "log_every": 1, "eval_every": 100, "save_every": 1, "seed": 0}
    small |= {"out": out, "cache": cache} | others
    argv = ["--model", "ppo", *(f"--{k.replace('_', '-')}={v}" for k, v in small.items() if v is not True)]
    argv += [f"--{k.replace('_', '-')}" for k, v in small.items() if v is True]
    return [*argv, "--set", "samples=8", "epochs=2", *settings]


@pytest.fixture
def exact_values_later(monkeypatch):
    """Leave out the exact value of the policy, a second of work, where a test is about something else."""
    monkeypatch.setattr(frontier, "value_of", lambda model: (2.0, 0.5))


@pytest.mark.usefixtures("exact_values_later")
@pytest.mark.parametrize("method", METHODS)
def test_before_the_first_update_every_ratio_is_1_and_the_kl_is_0_to_the_bit(method, cache, tmp_path):
    settings = (f"method={method}", "temperature=0.7", "minibatches=2")
    assert train.main(flags(cache, tmp_path / "run", *settings)) == 0
    steps = [row for row in rows(tmp_path / "run") if "reward" in row]
    assert [row["first_ratio"] for row in steps] == [1.0, 1.0, 1.0]
    assert steps[0]["kl"] == steps[0]["kl_k3"] == 0.0 and steps[1]["kl"] != 0.0
    assert all(math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in steps)


@pytest.mark.usefixtures("exact_values_later")
def test_an_adapter_learns_with_its_base_as_the_reference_and_resumes_to_the_bit(cache, tmp_path):
    # The value head and the coefficient of the KL are in the checkpoint, beside the adapter alone.
    argv = ["--adapter", "lora", "--schedule", "constant", "--warmup", "0"]
    settings = ("temperature=1.5", "target_kl=0.01", "r=4", "dropout=0.1")
    assert train.main([*flags(cache, tmp_path / "a", *settings), *argv]) == 0
    assert train.main([*flags(cache, tmp_path / "b", *settings, steps=2), *argv]) == 0
    assert train.main([*flags(cache, tmp_path / "b", *settings, resume=True), *argv]) == 0
    for part in (
        "checkpoint/shard-00001-model-00001-of-00001.safetensors",
        "model/adapter_model.safetensors",
    ):
        a, b = (load_file(tmp_path / run / part) for run in ("a", "b"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    saved = load_file(tmp_path / "a" / "checkpoint/shard-00001-model-00001-of-00001.safetensors")
    assert {"model.beta", "model.value_head.weight"} <= saved.keys()
    assert all(".adapters." in name or "value_head" in name or name == "model.beta" for name in saved)
    assert saved["model.beta"].item() != 1.0
    steps = [row for row in rows(tmp_path / "a") if "reward" in row]
    assert steps == [row for row in rows(tmp_path / "b") if "reward" in row]
    assert steps[0]["kl"] == 0.0 and [row["first_ratio"] for row in steps] == [1.0, 1.0, 1.0]
    assert [row["beta"] for row in steps] != [1.0, 1.0, 1.0]

    # The base in the adapter's model is the reference, unchanged.
    model, base = open_model(tmp_path / "a" / "model"), open_model(frontier.reference_model(cache))
    own = model.model.layers[0].mlp.down_proj.base_layer.weight
    assert torch.equal(own, base.model.layers[0].mlp.down_proj.weight)


@pytest.mark.usefixtures("exact_values_later")
def test_an_adapter_that_is_trained_further_has_itself_at_the_start_as_the_reference(cache, tmp_path):
    argv = ["--adapter", "lora", "--schedule", "constant", "--warmup", "0"]
    assert train.main([*flags(cache, tmp_path / "a"), *argv]) == 0
    start = tmp_path / "a" / "model"
    assert train.main([*flags(cache, tmp_path / "b", init_from=start, data="chain", steps=2), *argv]) == 0
    first, second = (row for row in rows(tmp_path / "b") if "reward" in row)
    assert first["kl"] == first["kl_k3"] == 0.0 and second["kl"] != 0.0

    # A copy of the model, such as one that is arranged for sampling, has the same reference.
    own = policy()
    assert copy.deepcopy(own.reference) is own.reference


@pytest.mark.usefixtures("exact_values_later")
@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_the_pass_of_the_rollout_takes_the_place_of_one_in_the_first_update_to_the_bit(
    method, cache, tmp_path, monkeypatch
):
    def trained(out):
        calls, evaluate = [], rollout.Policy.evaluate
        counted = lambda *args: calls.append(1) or evaluate(*args)  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(rollout.Policy, "evaluate", counted)
            assert train.main(flags(cache, out, f"method={method}", steps=2)) == 0
        return load_file(out / "model" / "model.safetensors"), len(calls)

    once, n_once = trained(tmp_path / "once")
    original = ppo.roll_out
    monkeypatch.setattr(ppo, "roll_out", lambda *args: original(*args[:5], keep_graph=False))
    twice, n_twice = trained(tmp_path / "twice")
    assert all(torch.equal(once[name], twice[name]) for name in twice)
    assert (n_once, n_twice) == (4, 6)  # two steps of two epochs


def test_the_flops_of_a_step_are_those_of_all_its_passes():
    own, forward = policy(samples=8, epochs=4), frontier.build_model().flops_per_token(9) / 3
    # To sample, by the policy and by the reference; then three epochs forward and four backward.
    assert ppo.flops_per_token(own, own.settings, 9) == round(8 * forward * (3 + 3 + 4 * 2))
    own = policy(samples=8, epochs=4, minibatches=2)
    assert ppo.flops_per_token(own, own.settings, 9) == round(8 * forward * (3 + 4 * 3))


def test_beta_may_be_0_where_the_penalty_is_in_the_loss(cache, tmp_path, capsys):
    argv = flags(cache, tmp_path / "run", "method=dapo", "beta=0", steps=2)
    assert train.main(argv) == 0
    assert "the optimum at beta 0 has reward 8.0000 at KL 6.5241" in capsys.readouterr().out
    last = rows(tmp_path / "run")[-1]
    assert last["val_loss"] == -last["val_reward"]


def die_in_a_rollout(argv, n: int) -> int:
    """Train in this process, which ends by SIGKILL in the middle of the n-th rollout."""
    original, calls = gpt.GPT.generate, []

    def fatal(model, prompts, *args, **options):
        calls.append(1)
        if len(calls) == n:
            original(model, prompts, 3, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(model, prompts, *args, **options)

    gpt.GPT.generate = fatal
    return train.main(argv)


def test_a_run_that_is_killed_in_a_rollout_resumes_to_the_bit(cache, tmp_path):
    settings = ("method=ppo", "target_kl=0.1", "whiten_rewards=True")
    assert train.main(flags(cache, tmp_path / "whole", *settings, steps=4)) == 0
    killed = Forked(die_in_a_rollout, flags(cache, tmp_path / "parts", *settings, steps=4), 3)
    assert killed.end() == -signal.SIGKILL, killed.said()
    assert len(rows(tmp_path / "parts")) >= 2
    assert train.main(flags(cache, tmp_path / "parts", *settings, steps=4, resume=True)) == 0
    assert same_run(tmp_path / "whole", tmp_path / "parts")
    names = load_file(tmp_path / "whole" / "checkpoint/shard-00001-model-00001-of-00001.safetensors").keys()
    models = [name for name in names if name.endswith("embed_tokens.weight") and "optimizer" not in name]
    assert models == ["model.model.model.embed_tokens.weight"], "the reference is in no checkpoint"


@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_the_reward_rises_to_what_its_kl_allows(method, cache, tmp_path, capsys):
    argv = flags(cache, tmp_path / "run", f"method={method}", "samples=32", "epochs=4", steps=8, batch_size=4)
    assert train.main(argv) == 0
    last = rows(tmp_path / "run")[-1]
    assert last["val_reward"] > 3 and last["val_share_of_gain"] > 0.9
    assert last["val_loss"] == pytest.approx(last["val_kl"] - last["val_reward"])
    reward, kl = frontier.value_of(open_model(tmp_path / "run" / "model").eval())
    assert (reward, kl) == pytest.approx((last["val_reward"], last["val_kl"]), abs=1e-5)
    shown = capsys.readouterr().out
    assert f"reward {reward:.4f}" in shown
    # What GRPO minimises has another optimum.
    assert ("the exact optimum at beta 1: 5.3843 at KL 1.7520" in shown) == (method != "grpo")


@pytest.mark.usefixtures("exact_values_later")
def test_another_seed_draws_other_completions_and_the_same_seed_the_same(cache, tmp_path):
    found = []
    for i, seed in enumerate((0, 1, 0)):
        assert train.main(flags(cache, tmp_path / str(i), steps=1, seed=seed)) == 0
        found.append(load_file(tmp_path / str(i) / "model" / "model.safetensors")["lm_head.weight"])
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_the_reference_is_the_one_that_the_run_began_with(cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(frontier, "value_of", lambda model: (2.0, 0.5))
    start = tmp_path / "start"
    frontier.build_model().save_pretrained(start)
    assert train.main(flags(cache, tmp_path / "run", steps=2, init_from=start, schedule="constant")) == 0
    changed = frontier.build_model()
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.5)
    changed.save_pretrained(start)
    argv = flags(cache, tmp_path / "run", init_from=start, schedule="constant", resume=True)
    assert f"the weights in {start} have changed since the run was started" in refused(capsys, argv)


# --- rollouts


def policy(**changes) -> rollout.Policy:
    return rollout.Policy(frontier.build_model(), replace(ppo.Config(), **changes)).eval()


def test_the_mask_counts_tokens_by_position_whatever_their_values():
    # 0 pads; it is a prompt's token, a completion's and its end too.
    tokens, mask = rollout.laid_out([[0, 5], [7]], [[0, 0, 3, 0], [0, 2]])
    assert tokens.tolist() == [[0, 5, 0, 0, 3, 0], [7, 0, 2, 0, 0, 0]]
    assert mask.tolist() == [[False, True, True, True, True], [True, True, False, False, False]]


def test_log_probabilities_are_those_of_the_temperature_of_sampling():
    own = policy(temperature=0.5, beta=0.1)
    dataset = of_chain(1.0)
    dataset.scorer = scores.find("chain", None, None)
    batch = ppo.make_batch([dataset.train[0]], own.settings, None)
    found = rollout.roll_out(own, batch, dataset, seed=3, n=512)
    # The chain to the power 2, normalised: entropies of its rows, weighted by how often they are met.
    sharp = frontier.Chain().probs.square()
    sharp = sharp / sharp.sum(dim=1, keepdim=True)
    log_p = sharp.log()[found.tokens[:, :-1], found.tokens[:, 1:]]
    assert torch.allclose(found.logps.double(), log_p, atol=1e-5) and torch.equal(
        found.logps, found.ref_logps
    )
    entropies = -(sharp * sharp.log()).sum(dim=1)[found.tokens[:, :-1]]
    assert torch.allclose(found.entropies.double(), entropies, atol=1e-5)
    assert -found.logps.mean().item() == pytest.approx(entropies.mean().item(), abs=0.05)
    assert torch.equal(found.scores, (found.tokens == 3).sum(dim=1).float())


def test_a_completion_without_a_score_changes_neither_the_loss_nor_the_metrics_of_the_others():
    own = policy(method="grpo", samples=4)
    dataset = of_chain(1.0)
    all_scores = [1.0, 2.0, 3.0, 0.0]
    batch = ppo.make_batch([dataset.train[0]], own.settings, None)

    def loss_and_metrics(scorer, rows):
        dataset.scorer = scorer
        whole = rollout.roll_out(own, batch, dataset, seed=3, n=4)
        found = rollout.Rollout(*(column[rows] for column in whole))
        advantages, returns = ppo.advantages_of(found, own.settings, 1.0)
        weights = ppo.token_weights(found.mask, "grpo")
        loss, _ = ppo.loss_of(own, found, torch.arange(len(rows)), advantages, returns, weights)
        return loss, rollout.metrics_of(found)

    loss, metrics = loss_and_metrics(lambda _: [*all_scores[:3], math.nan], [0, 1, 2, 3])
    expected, of_three = loss_and_metrics(lambda _: all_scores, [0, 1, 2])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert metrics["unscored"] == 1 and metrics["reward"] == of_three["reward"] == 2
    assert metrics["completion_tokens"] == 8


def test_equal_groups_are_counted():
    own = policy(method="grpo")
    dataset = of_chain(1.0)
    dataset.scorer = lambda found: [1, 1, 1, 2, 5, math.nan, 5, 5]
    batch = ppo.make_batch([dataset.train[0]] * 2, own.settings, None)
    metrics = rollout.metrics_of(rollout.roll_out(own, batch, dataset, seed=0, n=4))
    assert metrics["equal_groups"] == 1 and metrics["unscored"] == 1


def test_rloo_has_the_kl_of_the_sequence_in_the_reward_and_ppo_that_of_each_token():
    mask = torch.tensor([[False, True, True], [False, True, False]])
    d = torch.tensor([[9.0, 0.5, -0.1], [9.0, 0.2, 9.0]])
    zeros = torch.zeros(2, 3)
    given = rollout.Rollout(
        tokens=torch.zeros(2, 4, dtype=torch.long),
        mask=mask,
        scores=torch.tensor([2.0, 1.0]),
        groups=torch.tensor([0, 0]),
        ended=torch.tensor([True, True]),
        logps=d,
        ref_logps=zeros,
        values=zeros,
        entropies=zeros,
    )
    of_rloo, _ = ppo.advantages_of(given, ppo.Config(method="rloo"), 0.5)
    assert torch.allclose(of_rloo, torch.tensor([[0.9], [-0.9]]))  # (2 - 0.2) - (1 - 0.1)
    _, returns = ppo.advantages_of(given, ppo.Config(lam=1.0), 0.5)
    assert torch.allclose(returns, torch.tensor([[0, 1.8, 2.05], [0, 0.9, 0]]))
    of_grpo, _ = ppo.advantages_of(given, ppo.Config(method="dr_grpo"), 0.5)
    assert torch.allclose(of_grpo, torch.tensor([[0.5], [-0.5]]))  # the KL is in the loss


# --- words, and what a user gets wrong


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Return a folder with a small model of text, its tokenizer, questions, and functions of rewards."""
    folder = tmp_path_factory.mktemp("words")
    torch.manual_seed(0)
    model = gpt.GPT(gpt.Config(1, 2, 16, 32, vocab_size=257, max_seq_len=64, eos_token_id=256))
    model.save_pretrained(folder / "model")
    get_tokenizer("bytes").save(folder / "model")
    questions = [{"question": f"{i} + {i}?", "answer": f"{i + i}"} for i in range(12)]
    questions.append({"question": "?" * 80, "answer": "long"})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "rewards.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Rule:\n    letters: str = 'aeiou'\n"
        "def vowels(prompts, completions):\n"
        "    assert all('?' in prompt for prompt in prompts)\n"
        "    scores = [sum(c in Rule().letters for c in text) for text in completions]\n"
        "    return [None, *scores[1:]]\n"
        "def broken(prompts, completions):\n    return {}['score']\n"
        "def few(prompts, completions):\n    return [1.0]\n"
        "def words(prompts, completions):\n    return ['good' for _ in prompts]\n"
        "number = 3\n"
    )
    return folder


def of_words(spoken, out, reward, *settings, **others):
    given = {"data": spoken / "questions.jsonl", "init_from": spoken / "model", "save_every": 100}
    return flags(out.parent, out, f"reward={reward}", "max_new_tokens=5", *settings, **(given | others))


def test_words_learn_from_any_function_with_prompts_of_uneven_lengths(spoken, tmp_path, capsys):
    argv = of_words(spoken, tmp_path / "run", f"{spoken / 'rewards.py'}:vowels", "missing_end=1", steps=2)
    assert train.main(argv) == 0
    steps = [row for row in rows(tmp_path / "run") if "reward" in row]
    assert steps[0]["kl"] == 0.0 and all(row["first_ratio"] == 1.0 for row in steps)
    # Those without end token score -1, also the first, which has no score.
    assert all(row["unscored"] <= 1 and -1 <= row["reward"] <= 5 for row in steps)
    assert "1 prompts dropped" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "chat_template.jinja").exists()
    assert "likeliest:" in (tmp_path / "run" / "samples.txt").read_text()


@pytest.mark.parametrize(
    "function, words",
    [
        ("broken", "the reward function failed: KeyError: 'score'"),
        ("few", "the reward function returned 1 scores for"),
        ("words", "the reward function returned no numbers: ValueError"),
    ],
)
def test_a_reward_function_that_fails_ends_the_run_with_one_line(function, words, spoken, tmp_path, capsys):
    argv = of_words(spoken, tmp_path / "run", f"{spoken / 'rewards.py'}:{function}", "method=rloo")
    assert words in refused(capsys, argv)


@pytest.mark.parametrize("model", ["ppo", "online_dpo"])
def test_a_language_model_without_data_of_its_own_is_refused(model, spoken, tmp_path, capsys):
    """The default data are those of the chain."""
    words = ["--model", model, "--init-from", spoken / "model", "--out", tmp_path / "run"]
    error = refused(capsys, list(map(str, words)))
    assert "--data chain: needs a model of 5 tokens" in error and "has 257; name a file by --data" in error


def test_a_reward_model_scores_prompt_and_completion_whatever_stands_behind_them(spoken, tmp_path):
    torch.manual_seed(1)
    model = RewardModel(gpt.GPT(gpt.Config(1, 2, 16, 32, vocab_size=257, max_seq_len=64)))
    model.save_pretrained(tmp_path / "judge")
    tokenizer = Tokenizer.load(spoken / "model")
    scorer = scores.find(str(tmp_path / "judge"), tokenizer, 256)
    found = scores.score(scorer, scores.Completions([[5, 6], [7]], [[8, 9, 256], [0]], [[], []]))
    alone = [
        model(torch.tensor([row]), torch.tensor([len(row)])).item() for row in ([5, 6, 8, 9, 256], [7, 0])
    ]
    assert found.tolist() == pytest.approx(alone, abs=1e-6) and alone[0] != alone[1]


def test_a_reward_model_with_another_tokenizer_is_refused(spoken, tmp_path):
    model = RewardModel(gpt.GPT(gpt.Config(1, 2, 16, 32, vocab_size=257, max_seq_len=64)))
    model.save_pretrained(tmp_path / "judge")
    tokenizer = Tokenizer.load(spoken / "model")
    shifted = {bytes([byte]): (byte + 1) % 256 for byte in range(256)}  # each byte has another id
    Tokenizer(shifted, tokenizer.pattern, tokenizer.special_tokens).save(tmp_path / "judge")
    with pytest.raises(ValueError, match="another tokenizer than the policy's; expected a reward model with"):
        scores.find(str(tmp_path / "judge"), tokenizer, 256)
    tokenizer.save(tmp_path / "judge")
    assert callable(scores.find(str(tmp_path / "judge"), tokenizer, 256))


def test_exact_scores_1_where_the_text_is_the_answer():
    class Letters:
        def decode(self, tokens):
            return "".join(map(chr, tokens))

    scorer = scores.find("exact", Letters(), 0)
    rows_of = [[ord(c) for c in text] + [0] for text in ("12", " 12", "1", "")]
    answers = [[ord(c) for c in "12"]] * 4
    found = scores.score(scorer, scores.Completions([[1]] * 4, rows_of, answers))
    assert found.tolist() == [1, 1, 0, 0]
    infinite = scores.score(
        lambda _: [math.inf, -math.inf, None, 2], scores.Completions([], rows_of, answers)
    )
    assert infinite[:3].isnan().all() and infinite[3] == 2


@pytest.mark.parametrize(
    "others, settings, words",
    [
        ({}, ["beta=0"], ["beta 0", "above 0"]),
        ({}, ["method=rloo", "beta=0"], ["beta 0", "above 0 with rloo"]),
        ({}, ["method=grpo", "beta=0", "target_kl=1.0"], ["beta 0", "target_kl"]),
        ({}, ["beta=-1.0"], ["beta -1.0"]),
        ({}, ["method=other"], ["method 'other'", "rloo"]),
        ({}, ["method=rloo", "samples=1"], ["samples 1", "at least 2"]),
        ({}, ["lam=3"], ["lam 3", "at most 1"]),
        ({}, ["reward=exact"], ["reward=exact", "--data chain"]),
        ({"data": "stdlib"}, [], ["--data stdlib: needs --init-from DIR"]),
        ({"size": "tiny"}, [], ["--size tiny", "leave out --size"]),
        ({"benchmark": True}, [], ["--benchmark", "a loop of its own"]),
        ({"document_mask": True}, [], ["--document-mask"]),
        ({}, ["max_new_tokens=4"], ["max_new_tokens=4", "8 tokens"]),
    ],
)
def test_what_makes_no_sense_on_the_chain_is_one_line(others, settings, words, cache, tmp_path, capsys):
    line = refused(capsys, flags(cache, tmp_path / "run", *settings, **others))
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "reward, settings, words",
    [
        ("nothing", [], ["reward=nothing", "FILE.py:FUNCTION"]),
        ("rewards.py:absent", [], ["has no function absent"]),
        ("rewards.py:number", [], ["has no function number"]),
        ("no_module:f", [], ["cannot import no_module", "ModuleNotFoundError"]),
        ("chain", [], ["reward=chain", "--data chain"]),
        ("exact", ["max_new_tokens=64"], ["--seq-len 64: no room for the shortest prompt"]),
    ],
)
def test_what_makes_no_sense_with_words_is_one_line(reward, settings, words, spoken, tmp_path, capsys):
    source = str(spoken / reward) if reward.startswith("rewards") else reward
    line = refused(capsys, of_words(spoken, tmp_path / "run", source, *settings))
    assert all(word in line for word in words), line
