"""Width transfer against the table of the paper and by a coordinate check; updates that are skipped; SAM
against its closed form, and in runs."""

import math
import signal
from argparse import Namespace
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import SHARD, rows_of
from safetensors.torch import load_file
from small_gpt import die_in, flags, forked, prepared, refused, rows, same_run
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import bert
import gpt
import moe
import train
from engine import optim
from engine.optim import step_optimizers
from vision import gan

TINY = gpt.Config(2, 2, 64, 176, 61, 32, qk_norm=True)
MODELS = {
    "gpt": (gpt.GPT, TINY),
    "untied head": (gpt.GPT, replace(TINY, tie_embeddings=False)),
    "GPT-2": (gpt.GPT, gpt.Config(2, 2, 64, 256, 61, 32, **gpt.GPT2)),
    "moe": (moe.MoEGPT, moe.Config(2, 2, 64, 176, 61, 32, n_experts=4, d_expert=48, n_shared_experts=1)),
}
ADAMW = Namespace(optimizer="adamw", lr=1e-2, weight_decay=0.1, device="cpu", mup=None)
MUON = Namespace(**vars(ADAMW) | {"optimizer": "muon"})
UNFUSED = Namespace(**vars(ADAMW) | {"device": "mps"})  # where AdamW is not fused; it runs anywhere
# Of each kind of parameter, for a base a quarter as wide: what its initial values and AdamW's learning rate
# are multiplied with. Table 8 of Tensor Programs V for vectors, hidden matrices and (in the final norm) the
# logits' multiplier; table 3, output weights, for the router.
QUARTER = {
    "embed_tokens": (1, 1),
    "embed_positions": (1, 1),
    "lm_head": (1, 1),
    "layernorm": (1, 1),
    "q_norm": (1, 1),
    "k_norm": (1, 1),
    "bias": (1, 1),
    "_proj": (1 / 2, 1 / 4),
    "mlp.gate": (1 / 4, 1 / 4),
    "model.norm": (1 / 4, 1 / 4),
}


def expected(name):
    if name == "model.norm.bias":  # a part of the logits, so not as other biases
        return QUARTER["model.norm"]
    (kind,) = {kind for kind in QUARTER if name.removesuffix(".weight").endswith(kind)}
    return QUARTER[kind]


def fresh(name="gpt", **fields):
    torch.manual_seed(0)
    concept, config = MODELS[name]
    return concept(replace(config, **fields))


def with_mup(args, base_width):
    return Namespace(**vars(args) | {"mup": base_width})


def make_optimizers(model, args):
    """For a decoder, whose file has the rules of width transfer."""
    return optim.make_optimizers(model, args, width_factors=optim.width_factors)


def groups_of(model, optimizers):
    """Each parameter's name, and the group it is in."""
    names = {p: name for name, p in model.named_parameters()}
    return [(names[p], group) for o in optimizers for group in o.param_groups for p in group["params"]]


@pytest.mark.parametrize("name", MODELS)
def test_initial_values_and_learning_rates_follow_the_table(name):
    model = fresh(name)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optim.transfer_width(model, 16, optim.width_factors)
    groups = dict(groups_of(model, make_optimizers(model, with_mup(ADAMW, 16))))
    for name, p in model.named_parameters():
        initial, rate = expected(name)
        assert torch.equal(p, before[name] * initial), name
        assert groups[name]["lr_factor"] == rate, name
        # lr * weight_decay is what it is at the base width
        decay = groups[name]["weight_decay"] * groups[name]["lr_factor"]
        assert decay == pytest.approx(0.1 if p.ndim >= 2 else 0.0), name


def test_muon_learns_by_the_square_root_of_the_width():
    # Both sides of a hidden matrix grow, so that sqrt(fan-out / fan-in) stays.
    model = fresh("moe")
    adamw, muon = make_optimizers(model, with_mup(MUON, 16))
    (group,) = muon.param_groups
    assert group["lr_factor"] == 1 / 2 and group["weight_decay"] == pytest.approx(0.2)
    rates = {name: group["lr_factor"] for name, group in groups_of(model, [adamw])}
    assert all(rate == expected(name)[1] for name, rate in rates.items())
    assert "model.layers.0.mlp.experts.down_proj.weight" in rates
    assert not any("q_proj" in name for name in rates)


@pytest.mark.parametrize("args", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("name", MODELS)
def test_a_transfer_from_the_same_width_changes_nothing(name, args):
    model, same = fresh(name), fresh(name)
    optim.transfer_width(same, 64, optim.width_factors)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True))
    plain = groups_of(model, make_optimizers(model, args))
    transferred = groups_of(same, make_optimizers(same, with_mup(args, 64)))
    for (name, group), (same_name, same_group) in zip(plain, transferred, strict=True):
        assert name == same_name
        hyperparameters = {key: value for key, value in group.items() if key != "params"}
        assert hyperparameters == {key: value for key, value in same_group.items() if key != "params"}


@pytest.mark.parametrize("base_width", [None, 16])
@pytest.mark.parametrize("args", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_exactly_one_group(name, args, base_width):
    model = fresh(name)
    names = [name for name, _ in groups_of(model, make_optimizers(model, with_mup(args, base_width)))]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_models_without_a_rule_are_refused():
    model = bert.BERT(bert.Config(1, 2, 16, 32, 61, 32))
    with pytest.raises(ValueError, match=r"bert\.embeddings.* no rule"):
        optim.transfer_width(model, 8, optim.width_factors)
    with pytest.raises(ValueError, match="no rule"):
        optim.make_optimizers(model, with_mup(ADAMW, 8))


def test_models_without_a_width_are_refused():
    model = gan.GAN(gan.Config())
    with pytest.raises(ValueError, match="--mup 8: this model has no d_model"):
        optim.transfer_width(model, 8, optim.width_factors)
    with pytest.raises(ValueError, match="--mup 8: this model has no d_model"):
        optim.make_optimizers(model, with_mup(ADAMW, 8))


def changes(width, args, transfer):
    """Root mean square change of the last block's output and of the logits in three steps."""
    torch.manual_seed(0)
    config = gpt.Config(2, width // 16, width, 2 * width, 61, 32, qk_norm=True)
    model = gpt.GPT(config)
    args = with_mup(args, 64 if transfer else None)
    if transfer:
        optim.transfer_width(model, 64, optim.width_factors)
    optimizers = make_optimizers(model, args)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = args.lr * group["lr_factor"]
    seen = []
    model.model.layers[-1].register_forward_hook(lambda layer, inputs, output: seen.append(output.detach()))
    tokens = torch.randint(61, (4, 33), generator=torch.Generator().manual_seed(1))
    batch = gpt.make_batch(rows_of(tokens), config, None)

    def outputs():
        with torch.no_grad():
            logits = model(batch["tokens"])
        return seen[-1], logits

    before = outputs()
    for _ in range(3):
        model.loss(batch)[0].backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return [(new - old).square().mean().sqrt().item() for new, old in zip(outputs(), before, strict=True)]


@pytest.mark.parametrize("args, growth", [(ADAMW, (5, 2)), (MUON, (2, 2))], ids=["adamw", "muon"])
def test_coordinate_check(args, growth):
    """What three steps change of hidden states and logits does not depend on the width, and without transfer
    grows with it (the "coord check" of the paper's code, microsoft/mup).

    From width 64 to 256 hidden states and logits measured 26 and 3.2 (AdamW), 2.4 and 2.5 (Muon) times the
    change without transfer, and 0.88 and 0.94, 1.02 and 0.93 times with it."""
    base = changes(64, args, transfer=False)
    assert all(
        wide > least * narrow
        for wide, least, narrow in zip(changes(256, args, False), growth, base, strict=True)
    )
    for width in (128, 256):
        assert changes(width, args, transfer=True) == pytest.approx(base, rel=0.2)


def with_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def snapshot(model, optimizers):
    return deepcopy(([p.detach() for p in model.parameters()], [o.state_dict()["state"] for o in optimizers]))


def assert_same(a, b):
    """Bit for bit."""
    for p, q in zip(a[0], b[0], strict=True):
        assert torch.equal(p, q)
    for states, others in zip(a[1], b[1], strict=True):
        assert states.keys() == others.keys()
        for key, state in states.items():
            assert state.keys() == others[key].keys() and state
            assert all(torch.equal(tensor, others[key][name]) for name, tensor in state.items())


@pytest.mark.parametrize("args", [ADAMW, MUON, UNFUSED], ids=["adamw", "muon", "not fused"])
def test_a_finite_step_is_that_of_the_optimizers(args):
    model, same = fresh(), fresh()
    optimizers, others = make_optimizers(model, args), make_optimizers(same, args)
    for seed in range(2):
        with_gradients(model, seed)
        with_gradients(same, seed)
        step_optimizers(optimizers, torch.tensor(True))
        for optimizer in others:
            optimizer.step()
    assert_same(snapshot(model, optimizers), snapshot(same, others))


@pytest.mark.parametrize("args", [ADAMW, MUON, UNFUSED], ids=["adamw", "muon", "not fused"])
def test_a_step_that_is_not_finite_leaves_every_bit(args):
    model = fresh()
    optimizers = make_optimizers(model, args)
    with_gradients(model, seed=0)
    step_optimizers(optimizers, torch.tensor(True))
    before = snapshot(model, optimizers)
    for p in model.parameters():
        p.grad.fill_(math.nan)
    step_optimizers(optimizers, torch.tensor(False))
    assert_same(snapshot(model, optimizers), before)


@pytest.mark.parametrize("args", [ADAMW, MUON], ids=["adamw", "muon"])
def test_the_first_step_may_be_skipped(args):
    model, same = fresh(), fresh()
    optimizers, others = make_optimizers(model, args), make_optimizers(same, args)
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    step_optimizers(optimizers, torch.tensor(False))
    with_gradients(model, seed=0)
    with_gradients(same, seed=0)
    for optimizer in (*optimizers, *others):  # nor is anything left behind that would hold them back
        optimizer.step()
    assert_same(snapshot(model, optimizers), snapshot(same, others))


@pytest.mark.parametrize("args", [ADAMW, MUON], ids=["adamw", "muon"])
def test_sharded_parameters(args):
    """DTensors, in a world of one rank, are transferred, updated and skipped like other parameters."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, whole = fully_shard(fresh()), fresh()
        pairs = list(zip(model.parameters(), whole.parameters(), strict=True))
        assert isinstance(pairs[0][0], DTensor)
        optim.transfer_width(model, 16, optim.width_factors)
        optim.transfer_width(whole, 16, optim.width_factors)
        optimizers = make_optimizers(model, with_mup(args, 16))
        others = make_optimizers(whole, with_mup(args, 16))
        for finite in (True, False):
            with_gradients(whole, seed=0)
            for p, q in pairs:
                gradient = q.grad if finite else torch.full_like(q, math.nan)
                p.grad = distribute_tensor(gradient, p.device_mesh, p.placements)
            step_optimizers(optimizers, torch.tensor(finite))
            if finite:
                step_optimizers(others, torch.tensor(True))
        for p, q in pairs:
            assert torch.equal(p.full_tensor(), q)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_muon_on_a_cpu_is_torchs_but_in_float32(shape):
    torch.manual_seed(0)
    matrix = torch.nn.Linear(*shape[::-1], bias=False)
    linear = torch.nn.ModuleDict({"ours": matrix, "theirs": deepcopy(matrix)})
    options = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    ours = optim.Muon(linear["ours"].parameters(), **options)
    theirs = torch.optim.Muon(linear["theirs"].parameters(), **options)
    for _ in range(3):
        gradient = torch.randn(shape)
        for optimizer, name in ((ours, "ours"), (theirs, "theirs")):
            linear[name].weight.grad = gradient.clone()
            optimizer.step()
    moved = (linear["theirs"].weight - linear["ours"].weight).norm() / linear["ours"].weight.norm()
    assert moved < 0.02  # bfloat16 has two to three digits

    # The iteration's own aim: singular values near 1 (Jordan et al.: 0.7 to 1.2), but for the smallest.
    values = torch.linalg.svdvals(optim.orthogonalized(gradient, ours.param_groups[0]))
    assert values.dtype == torch.float32 and values.median() > 0.6 and values.max() < 1.3


# --- SAM


class Quadratic(nn.Module):
    """1/2 (w - c)^T A (w - c) of w in two parameters, whose gradient is A (w - c)."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
        self.A = root @ root.T
        self.c = torch.randn(5, generator=generator, dtype=torch.float64)
        self.first = nn.Parameter(torch.randn(2, generator=generator, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))
        self.register_buffer("passes", torch.zeros((), dtype=torch.float64))

    @property
    def w(self):
        return torch.cat((self.first, self.second))

    def loss(self, share):
        """Return a share of the function, and count the pass."""
        self.passes += 1
        return share * (self.w - self.c) @ self.A @ (self.w - self.c) / 2


def add_gradients(run, parts):
    """Add up the gradients of parts, as train.gradient does, and return the loss before."""
    losses = [run.model.loss(share) for share in parts]
    sum(losses).backward()
    return sum(losses).item()


@pytest.mark.parametrize("parts", [[1.0], [0.25, 0.75]], ids=["one batch", "two batches"])
def test_a_step_of_sam_is_its_closed_form_on_a_quadratic(parts):
    model, rho = Quadratic(), 0.7
    run = Namespace(model=model, args=Namespace(sam_rho=rho))
    before = model.w.detach().clone()
    gradient = model.A @ (before - model.c)
    worst = before + rho * gradient / gradient.norm()
    loss = optim.sharpness_aware(add_gradients, run, parts)

    assert torch.equal(model.w.detach(), before)  # restored to the bit
    assert loss == pytest.approx((0.5 * (before - model.c) @ gradient).item(), rel=1e-14)
    found = torch.cat((model.first.grad, model.second.grad))
    torch.testing.assert_close(found, model.A @ (worst - model.c), rtol=1e-13, atol=1e-13)
    assert model.passes == len(parts)  # those of the first gradient alone

    torch.optim.SGD(model.parameters(), lr=0.1).step()
    expected = before - 0.1 * model.A @ (worst - model.c)
    torch.testing.assert_close(model.w.detach(), expected, rtol=1e-13, atol=1e-13)


def test_weights_are_restored_to_the_bit_after_an_error_too():
    model = fresh()
    with_gradients(model, 0)
    before = deepcopy(model.state_dict())
    with pytest.raises(KeyError), optim.at_worst_point(model, 1e3):
        assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert all(p.grad is None for p in model.parameters())
        moved = sum((p - before[name]).double().square().sum() for name, p in model.named_parameters())
        assert moved.sqrt().item() == pytest.approx(1e3, rel=1e-6)
        raise KeyError
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_without_a_gradient_the_weights_stay_and_with_nan_they_are_nan():
    model = Quadratic()
    before = model.w.detach().clone()
    for value in (0.0, math.nan):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        with optim.at_worst_point(model, 0.1):
            expected = before if value == 0 else torch.full_like(before, math.nan)
            torch.testing.assert_close(model.w.detach(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(model.w.detach(), before)


def test_with_a_radius_of_0_a_second_pass_changes_no_bit(text, tmp_path, monkeypatch):
    options = dict(model="moe", ema=0.5, grad_accum=2)
    assert train.main(flags(text, tmp_path / "adamw", **options)) == 0
    assert train.main(flags(text, tmp_path / "none", sam_rho=0, **options)) == 0
    assert same_run(tmp_path / "adamw", tmp_path / "none")

    def twice(gradient, run, parts):
        result = gradient(run, parts)
        with optim.at_worst_point(run.model, 0.0):
            gradient(run, parts)
        return result

    monkeypatch.setattr(train, "sharpness_aware", twice)
    assert train.main(flags(text, tmp_path / "twice", **options)) == 0
    assert same_run(tmp_path / "adamw", tmp_path / "twice")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_with_sam_steps_by_the_gradient_at_the_worst_point(optimizer, text, tmp_path):
    options = dict(optimizer=optimizer, grad_accum=2, grad_clip=0.5)
    run = prepared(text, tmp_path / "sam", sam_rho=0.1, **options)
    other = prepared(text, tmp_path / "by-hand", **options)
    for _ in range(2):
        result = train.update(run)

        parts = other.batches.next()
        optim.set_learning_rate(other.optimizers, other.step, other.args)
        train.gradient(other, parts)
        own = [p.detach().clone() for p in other.model.parameters()]
        norm = torch.cat([p.grad.flatten() for p in other.model.parameters()]).norm()
        with torch.no_grad():
            for p in other.model.parameters():
                p += 0.1 * p.grad / norm
        other.model.zero_grad()
        train.gradient(other, parts)
        with torch.no_grad():
            for p, w in zip(other.model.parameters(), own, strict=True):
                p.copy_(w)
        assert result.norm.item() == pytest.approx(train.descend(other).item(), rel=1e-4)
        for p, q in zip(run.model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
    run.close()
    other.close()


def test_killed_and_resumed_a_run_with_sam_is_equal_to_the_bit(text, tmp_path, capsys):
    options = dict(steps=8, eval_every=4, save_every=3, ema=0.9)
    short = dict(optimizer="sam", **options)
    process = forked(flags(text, tmp_path / "killed", **short), prepare=die_in, arguments=("save", 2))
    assert process.end() == -signal.SIGKILL, process.said()
    long = dict(optimizer="adamw", sam_rho=0.05, **options)  # what --optimizer sam is short for
    assert train.main(flags(text, tmp_path / "killed", resume=True, **long)) == 0
    assert train.main(flags(text, tmp_path / "whole", **short)) == 0
    assert same_run(tmp_path / "whole", tmp_path / "killed")
    assert train.main(flags(text, tmp_path / "plain", **options)) == 0
    assert rows(tmp_path / "plain") != rows(tmp_path / "whole")
    capsys.readouterr()
    error = refused(capsys, flags(text, tmp_path / "killed", resume=True, **options))
    assert "was started with --sam-rho 0.05, not 0.0" in error


def test_a_step_of_sam_that_is_not_finite_changes_no_weight(text, tmp_path):
    run = prepared(text, tmp_path / "run", optimizer="sam")
    before = snapshot(run.model, run.optimizers)[0]
    hook = run.model.model.norm.weight.register_hook(lambda g: g * math.nan)
    train.update(run)
    hook.remove()
    assert run.n_skipped == 1
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True))
    train.update(run)
    assert run.n_skipped == 1
    assert not any(torch.equal(p, q) for p, q in zip(run.model.parameters(), before, strict=True))
    run.close()


def test_an_adapter_alone_is_moved(text, tmp_path):
    assert train.main(flags(text, tmp_path / "base")) == 0
    lora = dict(init_from=tmp_path / "base" / "model", adapter="lora", tokenizer=None, optimizer="sam")
    assert train.main(flags(text, tmp_path / "run", **lora)) == 0
    assert all(w.isfinite().all() for w in load_file(tmp_path / "run" / SHARD).values())


def test_both_passes_are_counted_as_work(text, tmp_path):
    plain, sam = prepared(text, tmp_path / "a"), prepared(text, tmp_path / "b", optimizer="sam")
    assert sam.flops_per_token == 2 * plain.flops_per_token
    plain.close()
    sam.close()


@pytest.mark.parametrize(
    "options, flag", [(["--optimizer", "sam"], "--optimizer sam"), (["--sam-rho", "1"], "--sam-rho")]
)
def test_a_task_with_a_loop_of_its_own_refuses_sam(options, flag, tmp_path, capsys):
    error = refused(capsys, ["--model", "ppo", *options, "--out", str(tmp_path / "run")])
    assert error.endswith(f"{flag}: posttraining.ppo has a loop of its own, which makes one pass")


@pytest.mark.parametrize("value", ["-0.1", "nan", "inf"])
def test_a_radius_that_is_none_is_refused(value, text, tmp_path, capsys):
    error = refused(capsys, flags(text, tmp_path / "run", sam_rho=value))
    assert f"--sam-rho {float(value)}: expected at least 0" in error


def test_a_dry_run_counts_the_copies_of_sam(capsys):
    totals = []
    for more in ([], ["--optimizer", "sam"]):
        assert train.main(["--model", "gpt", "--size", "124m", "--dry-run", *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        totals.append(next(float(line.split()[1]) for line in lines if line.startswith("together")))
        found = [line.split() for line in lines if line.startswith("copies of SAM")]
        assert len(found) == bool(more)
    assert totals[1] - totals[0] == pytest.approx(float(found[0][3]), abs=0.011)
