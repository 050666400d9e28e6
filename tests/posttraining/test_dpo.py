"""Tests of posttraining/dpo.py: unit values, identities, converged losses, which tokens count, and runs."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import small_gpt
import torch
from safetensors.torch import load_file, save_file

import gpt
import moe
import train
from data.tokenizer import get_tokenizer
from posttraining import dpo, frontier
from posttraining.reward import RewardModel

# One pair: log-probabilities of policy and reference, lengths 4 and 5; h = 1.5.
PAIR = [torch.tensor([x], dtype=torch.float64) for x in (-10.0, -12.0, -11.0, -11.5)]
LENGTHS = [torch.tensor([4.0], dtype=torch.float64), torch.tensor([5.0], dtype=torch.float64)]
OWN = PAIR[:2]
R = PAIR[0] - PAIR[2]

UNIT_VALUES = {
    "dpo": (dpo.dpo_loss(*PAIR, 0.1), 0.620957),
    "conservative": (dpo.dpo_loss(*PAIR, 0.1, 0.1), 0.635957),
    "robust": (dpo.robust_dpo_loss(*PAIR, 0.1, 0.1), 0.602207),
    "hinge": (dpo.hinge_loss(*PAIR, 0.1), 0.85),
    "ipo of sums": (dpo.ipo_loss(*PAIR, 0.1), 12.25),
    "ipo of means": (dpo.ipo_mean_loss(*PAIR, *LENGTHS, 0.1), 21.6225),
    "simpo": (dpo.simpo_loss(*OWN, *LENGTHS, 2.0, 1.0), 1.463282),
    "orpo": (dpo.orpo_loss(*OWN, *LENGTHS, 0.1), 2.574937),
    "log odds": (dpo.log_odds(OWN[0] / 4) - dpo.log_odds(OWN[1] / 5), -0.109449),
    "kto desirable": (dpo.kto_loss(PAIR[0], PAIR[2], torch.tensor([True]), 0.0, 0.1), 0.475021),
    "kto undesirable": (dpo.kto_loss(PAIR[1], PAIR[3], torch.tensor([False]), 0.0, 0.1), 0.487503),
    "kto desirable, z": (dpo.kto_loss(PAIR[0], PAIR[2], torch.tensor([True]), 0.4, 0.1), 0.485004),
    "kto undesirable, z": (dpo.kto_loss(PAIR[1], PAIR[3], torch.tensor([False]), 0.4, 0.1), 0.477515),
}


@pytest.mark.parametrize("name", UNIT_VALUES)
def test_a_loss_has_its_unit_value(name):
    value, expected = UNIT_VALUES[name]
    assert value.shape == (1,) and value.item() == pytest.approx(expected, abs=6e-7)


def test_each_method_of_pairs_has_the_loss_of_its_name():
    policy, reference = torch.stack(PAIR[:2], dim=1), torch.stack(PAIR[2:], dim=1)
    names = {method: method for method in dpo.METHODS if method != "kto"}
    for method, name in (names | {"ipo": "ipo of sums", "ipo_mean": "ipo of means"}).items():
        loss = dpo.pair_losses(policy, reference, torch.stack(LENGTHS, dim=1), dpo.Config(method=method))
        assert loss.item() == pytest.approx(UNIT_VALUES[name][1], abs=6e-7), method


def test_the_gradient_of_dpo_is_beta_times_how_wrong_the_pair_is():
    chosen, rejected = (x.clone().requires_grad_() for x in OWN)
    dpo.dpo_loss(chosen, rejected, *PAIR[2:], 0.1).sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.0462570, abs=5e-8)
    assert rejected.grad.item() == -chosen.grad.item()


def test_where_policy_and_reference_are_equal_each_loss_has_its_known_value():
    p = torch.tensor([[-3.0, -7.0]], dtype=torch.float64)
    n = torch.tensor([[2, 5]])
    expected = {"dpo": math.log(2), "conservative": math.log(2), "ipo": 25.0, "ipo_mean": 25.0, "hinge": 1.0}
    for method, value in expected.items():
        loss = dpo.pair_losses(p, p, n, dpo.Config(method=method))
        assert loss.item() == pytest.approx(value, rel=1e-12), method
    for desirable in (True, False):
        loss = dpo.kto_loss(p[:, 0], p[:, 0], torch.tensor([desirable]), dpo.kto_z(p[:, 1], p[:, 1]))
        assert loss.item() == 0.5


def converged(loss, p: float) -> float:
    """Return the h at which p * loss(h) + (1 - p) * loss(-h) is least, by Newton's method."""
    h, zero = torch.zeros(1, dtype=torch.float64, requires_grad=True), torch.zeros(1, dtype=torch.float64)
    for _ in range(30):
        total = (p * loss(h, zero, zero, zero) + (1 - p) * loss(zero, h, zero, zero)).sum()
        (gradient,) = torch.autograd.grad(total, h, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient.sum(), h)
        with torch.no_grad():
            h -= (gradient / curvature).clamp(-1, 1)
    return h.item()


@pytest.mark.parametrize("p", [0.6, 0.75, 0.9])
def test_converged_dpo_recovers_the_log_odds_of_the_preference(p):
    beta = 0.5
    h = converged(lambda *pair: dpo.dpo_loss(*pair, beta), p)
    assert beta * h == pytest.approx(math.log(p / (1 - p)), abs=1e-6)
    h = converged(lambda *pair: dpo.ipo_loss(*pair, beta), p)
    assert beta * h == pytest.approx((2 * p - 1) / 2, abs=1e-9)


def test_where_all_labels_agree_ipo_and_conservative_dpo_stay_finite():
    assert 0.5 * converged(lambda *pair: dpo.ipo_loss(*pair, 0.5), 1.0) == pytest.approx(0.5)
    h = converged(lambda *pair: dpo.dpo_loss(*pair, 0.5, 0.1), 1.0)
    assert 0.5 * h == pytest.approx(math.log(0.9 / 0.1), abs=1e-6)


def test_the_expectation_of_robust_dpo_over_flipped_labels_is_dpo():
    flipped = [PAIR[1], PAIR[0], PAIR[3], PAIR[2]]
    mean = 0.8 * dpo.robust_dpo_loss(*PAIR, 0.1, 0.2) + 0.2 * dpo.robust_dpo_loss(*flipped, 0.1, 0.2)
    assert mean.item() == pytest.approx(dpo.dpo_loss(*PAIR, 0.1).item(), rel=1e-12)


@pytest.mark.parametrize(
    "beta, expected", [(1.0, (1.350056, 0.322834, 1.027222)), (0.5, (1.764107, 0.915475, 1.306369))]
)
def test_dpo_on_all_pairs_finds_the_optimum_under_a_kl_penalty(beta, expected):
    # A bandit of three arms; labels of all pairs by sigmoid(r_a - r_b), weights by the reference.
    ref = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reward = torch.arange(3.0, dtype=torch.float64)
    logits = ref.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=80, tolerance_grad=1e-11, tolerance_change=0)
    a, b = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T

    def closure():
        optimizer.zero_grad()
        logp, r = logits.log_softmax(0), ref.log()
        losses = dpo.dpo_loss(logp[a], logp[b], r[a], r[b], beta)
        loss = (ref[a] * ref[b] * torch.sigmoid(reward[a] - reward[b]) * losses).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    p = logits.detach().softmax(0)
    kl = (p * (p / ref).log()).sum().item()
    found = ((p @ reward).item(), kl, (p @ reward).item() - beta * kl)
    assert found == pytest.approx(expected, abs=2e-6)
    assert p.tolist() == pytest.approx((ref.log() + reward / beta).softmax(0).tolist(), abs=1e-6)
    if beta == 1.0:
        assert p.tolist() == pytest.approx([0.179000, 0.291944, 0.529056], abs=1e-6)


def test_only_masked_tokens_count_and_never_by_their_value():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 6, 5), torch.randint(5, (2, 6))
    tokens[0, 4] = tokens[1, 2] = 0  # inside an answer, the id that pads elsewhere
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    logps = logits.double().log_softmax(-1)
    expected = [sum(logps[i, t - 1, tokens[i, t]] for t in range(1, 6) if mask[i, t]) for i in range(2)]
    assert dpo.sequence_logps(logits, tokens, mask).tolist() == pytest.approx([float(x) for x in expected])
    assert dpo.n_predicted(mask).tolist() == [3, 2]


def test_the_first_token_counts_neither_in_the_sum_nor_in_the_length():
    # A row that was cut from the left begins with a token of the answer, which nothing predicts.
    logits, tokens = torch.randn(1, 4, 5), torch.randint(5, (1, 4))
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert dpo.n_predicted(mask).item() == 3
    logps = logits[0, :-1].log_softmax(-1)
    expected = sum(logps[t, tokens[0, t + 1]] for t in range(3)).item()
    assert dpo.sequence_logps(logits, tokens, mask).item() == pytest.approx(expected, abs=1e-5)


def test_padding_changes_neither_loss_nor_gradient_by_a_bit():
    torch.manual_seed(0)
    mask = torch.tensor([[0, 1, 1, 1, 0, 0]] * 2, dtype=torch.bool)
    tokens, logits = torch.randint(5, (2, 6)), torch.randn(2, 6, 5)
    found = []
    for change in (0, 1):
        x = logits.clone()
        x[:, 4:] += change * 7
        x.requires_grad_()
        changed = tokens.clone()
        changed[:, 4:] = changed[:, 4:] * (1 - change)
        total = dpo.sequence_logps(x, changed, mask)
        total.sum().backward()
        found.append((total.detach(), x.grad[:, :3], x.grad[:, 3:]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not found[1][2].any()


def test_a_prompt_in_the_sum_leaves_dpo_and_changes_means():
    # The prompt adds the same log-probability and length to both answers.
    prompt, n = -6.0, 3
    with_prompt = [x + prompt for x in OWN] + [x + prompt for x in PAIR[2:]]
    longer = [x + n for x in LENGTHS]
    assert dpo.dpo_loss(*with_prompt).item() == pytest.approx(dpo.dpo_loss(*PAIR).item(), rel=1e-12)
    assert dpo.ipo_mean_loss(*with_prompt, *longer).item() != pytest.approx(21.6225, rel=0.01)
    assert dpo.simpo_loss(*with_prompt[:2], *longer).item() != pytest.approx(1.463282, rel=0.01)


def test_z_is_never_negative_and_has_no_gradient():
    policy = torch.tensor([-4.0, -6.0], requires_grad=True)
    z = dpo.kto_z(policy, torch.tensor([-5.0, -6.5]))
    assert z.item() == 0.75 and not z.requires_grad
    assert dpo.kto_z(policy, torch.tensor([-1.0, -1.0])).item() == 0


def test_a_certain_answer_has_finite_log_odds():
    logp = torch.tensor([0.0, -1e-9, -1.0], requires_grad=True)
    odds = dpo.log_odds(logp)
    odds.sum().backward()
    assert odds.isfinite().all() and logp.grad.isfinite().all()


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"beta": 0.0}, "beta 0.0: expected a number above 0"),
        ({"beta": -1.0}, "beta -1.0: expected a number above 0"),
        ({"method": "ppo"}, "method 'ppo': expected dpo or conservative"),
        ({"smoothing": 0.5}, "smoothing 0.5: expected less than 0.5"),
        ({"method": "orpo", "reference": "runs/a"}, "reference runs/a: orpo has no reference; leave it out"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, expected):
    with pytest.raises(ValueError, match=expected):
        dpo.Config(**values)


# --- TRL 1.16, see tests/fixtures/make_preference_fixtures.py

FIXTURES = Path(__file__).parents[1] / "fixtures"
TRL = load_file(FIXTURES / "preferences/expected.safetensors")


@pytest.fixture(scope="module")
def models():
    """Return the policy and the reference of the fixtures, as decoders of gpt.py."""
    policy, reference = (gpt.GPT.from_pretrained(FIXTURES / "llama").float() for _ in range(2))
    with torch.no_grad():
        for p in reference.parameters():
            p *= 1.1
    return policy, reference.requires_grad_(False)


def logps(model, rows):
    tokens = TRL[f"{rows}.input_ids"]
    return dpo.sequence_logps(model(tokens), tokens, TRL[f"{rows}.completion_mask"])


def agrees(name, loss, model):
    """Compare a loss and its gradient by one matrix with TRL's."""
    model.zero_grad()
    loss.backward()
    gradient = model.get_parameter("model.layers.0.self_attn.q_proj.weight").grad
    expected = TRL[f"{name}.gradient"]
    assert loss.item() == pytest.approx(TRL[name].item(), abs=1e-5, rel=1e-5)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


THEIRS = {  # TRL's loss_type: our method. Its `ipo` is of means, its `sigmoid` ignores label_smoothing
    "sigmoid": {"method": "dpo"},
    "hinge": {"method": "hinge"},
    "robust": {"method": "robust"},
    "ipo": {"method": "ipo_mean"},
    "simpo": {"method": "simpo", "beta": 2.0},
}


def test_simpo_has_the_beta_of_its_paper_unless_it_is_set():
    assert dpo.Config(method="simpo").scale == 2.0 and dpo.Config().scale == 0.1
    assert dpo.Config(method="simpo", beta=0.1).scale == 0.1
    pair = torch.tensor([[-10.0, -12.0]]), torch.zeros(1, 2), torch.tensor([[4, 5]])
    loss = dpo.pair_losses(*pair, dpo.Config(method="simpo"))
    assert loss.item() == pytest.approx(1.463282, abs=6e-7)  # beta 2, gamma 1


@pytest.mark.parametrize("name", THEIRS)
def test_a_loss_of_pairs_agrees_with_trl(name, models):
    policy, reference = (logps(model, "pairs").view(2, -1).T for model in models)  # (3, 2)
    n = dpo.n_predicted(TRL["pairs.completion_mask"]).view(2, -1).T
    agrees(name, dpo.pair_losses(policy, reference, n, dpo.Config(**THEIRS[name])).mean(), models[0])


def test_the_odds_ratio_of_orpo_agrees_with_trl(models):
    # TRL's NLL term is of prompt and answer, the paper's (6) of the answer: only the other term is the same.
    policy, n = (
        logps(models[0], "pairs").view(2, -1),
        dpo.n_predicted(TRL["pairs.completion_mask"]).view(2, -1),
    )
    losses = dpo.orpo_loss(*policy, *n, 0.1)
    agrees("orpo", (losses + policy[0] / n[0]).mean(), models[0])


def test_kto_and_its_z_agree_with_trl(models):
    (policy, other), (reference, ref_other) = (
        (logps(model, "single"), logps(model, "other")) for model in models
    )
    z = dpo.kto_z(other, ref_other)
    assert z.item() == pytest.approx(TRL["kto.z"].item(), rel=1e-5) and z > 0
    agrees("kto", dpo.kto_loss(policy, reference, TRL["single.label"], z, 0.1, 1.5).mean(), models[0])


# --- runs


def pairs_file(folder, n=12):
    records = [{"prompt": f"{i}?", "chosen": f"{i} is it.", "rejected": "no"} for i in range(n)]
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def flags(out, *more, steps=4):
    common = (
        f"--model dpo --out {out} --steps {steps} --eval-every 2 --log-every 1 --cache {out.parent}/cache"
    )
    return [*common.split(), *map(str, more)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return the directory of a random model that reads bytes."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = get_tokenizer("bytes")
    config = replace(small_gpt.SMALL, vocab_size=tokenizer.n_vocab, eos_token_id=tokenizer.eot_id)
    torch.manual_seed(0)
    gpt.GPT(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.mark.parametrize("method", ["dpo", "ipo_mean", "kto"])
def test_a_run_begins_where_policy_and_reference_are_equal(method, small, tmp_path, capsys):
    data = pairs_file(tmp_path)
    argv = flags(tmp_path / "run", "--init-from", small, "--data", data, "--set", f"method={method}")
    assert train.main([*argv, "--batch-size", "4"]) == 0
    first = next(row for row in small_gpt.rows(tmp_path / "run") if "val_loss" in row)
    expected = {"dpo": math.log(2), "ipo_mean": 25.0, "kto": 0.5}[method]
    assert first["step"] == 0 and first["val_loss"] == pytest.approx(expected, abs=2e-4)
    assert first["val_margin"] == pytest.approx(0, abs=2e-6)
    assert "expected" not in capsys.readouterr().err


def test_answers_of_an_earlier_run_that_was_never_saved_are_not_shown_as_those_before(small, tmp_path):
    """An earlier run in the same folder may have ended before its first checkpoint."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "before.json").write_text('["an answer of long ago"]')
    argv = flags(tmp_path / "run", "--init-from", small, "--data", pairs_file(tmp_path, 40), steps=1)
    assert train.main(argv) == 0
    assert "long ago" not in (tmp_path / "run" / "samples.txt").read_text()


def test_a_resumed_run_computes_what_one_in_one_go_does(small, tmp_path):
    data, more = pairs_file(tmp_path), ("--init-from", small, "--batch-size", "4", "--save-every", "2")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train.main(flags(whole, *more, "--data", data)) == 0
    with pytest.MonkeyPatch.context() as patch:
        update, calls = train.update, []

        def interrupted(run):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return update(run)

        patch.setattr(train, "update", interrupted)
        train.main(flags(halves, *more, "--data", data))
    # The reference is read from the cache, and is still the model of the start.
    assert train.main(flags(halves, *more, "--data", data, "--resume")) == 0
    assert small_gpt.same_run(whole, halves)
    assert len(list((tmp_path / "cache").glob("reference-*"))) == 1


def test_the_reference_is_the_model_of_the_start_and_in_no_checkpoint(small, tmp_path):
    argv = flags(tmp_path / "run", "--init-from", small, "--data", pairs_file(tmp_path), "--batch-size", "4")
    run = train.prepare(train.parse_arguments(argv))
    row = run.dataset.train[0]
    model = gpt.GPT.from_pretrained(small).eval()
    with torch.no_grad():
        logits = model(torch.tensor(row["tokens"])).double().log_softmax(-1)
    expected = [
        sum(logits[c, t - 1, row["tokens"][c, t]].item() for t in row["mask"][c].nonzero()[0])
        for c in range(2)
    ]
    assert row["reference"].tolist() == pytest.approx(expected, rel=1e-5)
    assert not any("reference" in name for name in run.state_dict())
    run.close()


def test_with_an_adapter_the_reference_is_the_base_without_it(small, tmp_path):
    argv = flags(tmp_path / "run", "--init-from", small, "--data", pairs_file(tmp_path), "--adapter", "lora")
    # DPO and LoRA both have a field `method`: it is the one of the task.
    assert train.main([*argv, "--batch-size", "4", "--set", "method=dpo"]) == 0
    first = next(row for row in small_gpt.rows(tmp_path / "run") if "val_loss" in row)
    assert first["val_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (tmp_path / "run/model/adapter_config.json").is_file()


def first_loss(out):
    return next(row["val_loss"] for row in small_gpt.rows(out) if "val_loss" in row)


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_an_adapter_that_is_trained_further_is_the_reference_as_it_starts(adapter, small, tmp_path):
    # With its base in 4 bits or not, as it is trained, but without dropout.
    data = pairs_file(tmp_path)
    more = ("--data", data, "--adapter", adapter, "--batch-size", "4", "--lr", "0.05")
    assert train.main(flags(tmp_path / "a", "--init-from", small, *more)) == 0
    last = [row["val_loss"] for row in small_gpt.rows(tmp_path / "a") if "val_loss" in row][-1]
    assert abs(last - math.log(2)) > 0.01  # it is no longer the base
    further = (*more, "--set", "dropout=0.5")
    assert train.main(flags(tmp_path / "b", "--init-from", tmp_path / "a/model", *further, steps=1)) == 0
    assert first_loss(tmp_path / "b") == pytest.approx(math.log(2), abs=1e-6)


def test_fields_of_the_model_that_set_changes_reach_the_reference(small, tmp_path):
    more = ("--init-from", small, "--data", pairs_file(tmp_path), "--batch-size", "4")
    assert train.main(flags(tmp_path / "run", *more, "--set", "rope_theta=10.0", "beta=100.0", steps=1)) == 0
    assert first_loss(tmp_path / "run") == pytest.approx(math.log(2), abs=1e-3)


def test_cached_log_probabilities_that_do_not_fit_the_rows_are_computed_again(small, tmp_path):
    argv = flags(tmp_path / "run", "--init-from", small, "--data", pairs_file(tmp_path), "--batch-size", "4")

    def reference():
        run = train.prepare(train.parse_arguments(argv))
        run.close()
        return run.dataset.train.reference.tolist()

    expected = reference()
    (path,) = (tmp_path / "cache").glob("reference-*")
    tensors = load_file(path)
    for change in (lambda x: x[:, :1], lambda x: x[1:], lambda x: x * math.nan):
        save_file(tensors | {"train": change(tensors["train"]).contiguous()}, path)
        assert reference() == expected
    path.write_bytes(b"damaged")
    assert reference() == expected
    tensors["train"][0, 0] = -5.0  # one that fits is read
    save_file(tensors, path)
    assert reference()[0][0] == -5.0


def test_another_reference_is_used_where_it_is_named(small, tmp_path):
    other = tmp_path / "other"
    torch.manual_seed(1)
    gpt.GPT(gpt.GPT.from_pretrained(small).config).save_pretrained(other)
    get_tokenizer("bytes").save(other)
    data = pairs_file(tmp_path)
    for argv in (["--set", f"reference={other}"], []):
        run = train.prepare(
            train.parse_arguments(
                flags(tmp_path / f"run{len(argv)}", "--init-from", small, "--data", data, *argv)
            )
        )
        _, metrics = dpo.loss(run.model, run.batches.peek()[0].batch)
        assert (abs(metrics["margin"]) > 1e-4) == bool(argv)
        run.close()


def test_on_the_chain_dpo_comes_near_the_exact_optimum(tmp_path, capsys):
    argv = flags(tmp_path / "run", "--batch-size", "64", steps=30)
    argv[argv.index("--eval-every") + 1] = "30"
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    assert "the optimum for beta 0.1 is 7.9998 at KL 6.5219" in out
    rewards = re.findall(r"^reward ([\d.]+) at KL", out, re.M)
    assert float(rewards[-1]) > 7


@pytest.mark.parametrize(
    "more, problem",
    [
        (["--set", "beta=0"], "beta 0: expected a number above 0"),
        (["--set", "reference={chain}"], "a vocabulary of 5 tokens, the trained model has 257"),
        (["--set", "reference={judge}"], "a RewardModel writes no text; expected a decoder"),
        (["--document-mask"], "--document-mask"),
        (["--set", "method=kto", "beta=x"], "beta 'x': expected a number above 0"),
    ],
)
def test_a_mistake_ends_in_one_line(more, problem, small, tmp_path, capsys):
    directories = {"chain": frontier.reference_model(tmp_path / "cache"), "judge": tmp_path / "judge"}
    RewardModel(gpt.GPT.from_pretrained(small)).save_pretrained(tmp_path / "judge")
    more = [word.format(**directories) for word in more]
    argv = flags(tmp_path / "run", "--init-from", small, "--data", pairs_file(tmp_path), *more)
    assert problem in small_gpt.refused(capsys, argv)


def test_the_balance_losses_of_a_mixture_are_left_out_only_where_that_is_said(tmp_path, capsys):
    config = moe.Config(1, 2, 16, 32, 257, 64, n_experts=4, top_k=2, d_expert=8, eos_token_id=256)
    moe.MoEGPT(config).save_pretrained(tmp_path / "moe")
    get_tokenizer("bytes").save(tmp_path / "moe")
    argv = flags(tmp_path / "run", "--init-from", tmp_path / "moe", "--data", pairs_file(tmp_path), steps=1)
    argv[argv.index("dpo") : argv.index("dpo") + 1] = ["moe", "--task", "dpo"]
    assert "add --set aux_loss_coef=0" in small_gpt.refused(capsys, [*argv, "--batch-size", "4"])
    assert train.main([*argv, "--batch-size", "4", "--set", "aux_loss_coef=0"]) == 0


def test_a_run_without_a_trained_model_is_refused(tmp_path, capsys):
    error = small_gpt.refused(capsys, flags(tmp_path / "run", "--data", pairs_file(tmp_path)))
    assert "needs --init-from DIR, a model that is trained to answer already" in error


def test_the_chain_needs_a_model_of_its_tokens(small, tmp_path, capsys):
    error = small_gpt.refused(capsys, flags(tmp_path / "run", "--init-from", small))
    assert "--data chain: needs a model of 5 tokens" in error and "name a file by --data" in error


def test_labels_need_kto(small, tmp_path, capsys):
    path = tmp_path / "labels.jsonl"
    records = [{"prompt": f"{i}?", "completion": f"{i}.", "label": i % 2 == 0} for i in range(12)]
    path.write_text("\n".join(map(json.dumps, records)))
    argv = flags(tmp_path / "run", "--init-from", small, "--data", path, "--batch-size", "4")
    assert "expected pairs, or --set method=kto" in small_gpt.refused(capsys, argv)
    assert train.main([*argv, "--set", "method=kto"]) == 0
