"""Width transfer against the table of the paper and by a coordinate check; updates that are skipped."""

import math
from argparse import Namespace
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import rows_of
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import bert
import gpt
import moe
from engine import optim
from engine.optim import step_optimizers

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
