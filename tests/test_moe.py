"""The mixture of experts against a loop over tokens in float64, the published counts, and itself."""

import copy
import json
import math
from argparse import Namespace
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import SHARD, rows_of, run_command
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import moe
import train
from engine import parallel
from gpt import GPT, make_batch
from language.routing import aux_loss, sequence_loss, softmax_top_k, z_loss
from moe import SIZES, Config, MoE, MoEGPT, n_active_params

SMALL = Config(2, 4, 32, 48, 61, 32, n_kv_heads=2, qk_norm=True, n_experts=6, top_k=2, d_expert=20)
SWITCH = replace(SMALL, router="switch", top_k=1, renormalize=False, capacity_factor=0.75)
GROUPS = replace(
    SMALL,
    router="sigmoid",
    n_experts=8,
    n_groups=4,
    top_groups=2,
    top_k=3,
    n_shared_experts=2,
    routed_scale=2.5,
)
ROUTERS = {
    "softmax": SMALL,
    "softmax, not renormalised": replace(SMALL, renormalize=False),
    "switch": SWITCH,
    "sigmoid": replace(GROUPS, n_groups=1, top_groups=1, n_shared_experts=0, renormalize=False),
    "sigmoid in groups, shared experts": GROUPS,
    "expert choice": replace(SMALL, router="expert_choice", renormalize=False),
}


def random_layer(config):
    """Return a layer whose outputs depend visibly on every weight."""
    torch.manual_seed(0)
    layer = MoE(config)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(0.3 * torch.randn_like(p))
        if config.router == "sigmoid":
            layer.gate.e_score_correction_bias.copy_(0.1 * torch.randn(config.n_experts))
    return layer


def small(config=SMALL):
    torch.manual_seed(0)
    model = MoEGPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def batch_of(config=SMALL, B=3, T=16):
    tokens = torch.randint(config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(1))
    return make_batch(rows_of(tokens), config, torch.Generator())


# --- the layer against its definition


def chosen_one_by_one(config, logits, bias):
    """Return {(token, expert): weight} for logits (N, E), straight from the papers."""
    N, E = logits.shape
    k, chosen = config.top_k, {}
    if config.router == "expert_choice":
        probs = logits.softmax(dim=-1)
        for e in range(E):
            best = sorted(range(N), key=lambda t: -probs[t, e])[: math.ceil(N * k / E)]
            chosen |= {(t, e): probs[t, e] for t in best}
        return chosen
    room = [math.ceil(config.capacity_factor * N / E)] * E
    for t in range(N):
        scores = logits[t].sigmoid() if config.router == "sigmoid" else logits[t].softmax(dim=0)
        ranked = (scores + bias if config.router == "sigmoid" else scores).tolist()
        size = E // config.n_groups
        groups = [range(g * size, (g + 1) * size) for g in range(config.n_groups)]
        if config.n_groups > 1:
            groups.sort(key=lambda g: -sum(sorted(ranked[e] for e in g)[-2:]))
            groups = groups[: config.top_groups]
        best = sorted((e for g in groups for e in g), key=lambda e: -ranked[e])[:k]
        total = sum(scores[e] for e in best) if config.renormalize else 1.0
        for e in best:
            if config.router == "switch":
                room[e] -= 1
                if room[e] < 0:
                    continue
            chosen[t, e] = config.routed_scale * scores[e] / total
    return chosen


def layer_one_by_one(layer, config, x):
    flat = x.flatten(0, 1)
    chosen = chosen_one_by_one(
        config, flat @ layer.gate.weight.T, getattr(layer.gate, "e_score_correction_bias", 0)
    )
    y = torch.zeros_like(flat)
    for (t, e), weight in chosen.items():
        gate, up = (layer.experts.gate_up_proj.weight[e] @ flat[t]).chunk(2)
        out = layer.experts.down_proj.weight[e] @ (gate * torch.sigmoid(gate) * up)
        y = y + weight * F.one_hot(torch.tensor(t), len(flat))[:, None] * out
    if layer.shared_experts is not None:
        y = y + layer.shared_experts(flat)
    return y.view_as(x)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", ROUTERS)
def test_layer_and_all_gradients_equal_a_loop_over_tokens_in_float64(name, backend):
    config = replace(ROUTERS[name], kernels=backend)
    layer = random_layer(config)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(2, 9, 32)
    x64 = x.double().requires_grad_()
    y64 = layer_one_by_one(exact, config, x64)
    dy = torch.randn_like(x)
    y64.backward(dy.double())
    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    # float32 sums of some tens of terms of order one
    torch.testing.assert_close(y, y64.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, x64.grad.float(), atol=2e-5, rtol=1e-5)
    for (name, p), q in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert q.grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad, q.grad.float(), atol=5e-5, rtol=1e-5, msg=name)


def test_a_switch_drops_in_training_only():
    layer, x = random_layer(SWITCH), torch.randn(2, 9, 32)
    layer.eval()
    roomy = replace(SWITCH, capacity_factor=99.0)
    torch.testing.assert_close(layer(x), layer_one_by_one(layer, roomy, x), atol=1e-5, rtol=1e-5)
    layer.train()
    assert (layer(x).flatten(0, 1) == 0).all(dim=1).sum() > 0  # nothing but the residual stream


def test_nothing_is_dropped_when_all_tokens_choose_the_same_experts():
    layer, x = random_layer(SMALL), torch.randn(2, 9, 32).abs()
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[4], layer.gate.weight[1] = 1.0, 0.5
    y = layer(x)
    assert set(layer.gate(x.flatten(0, 1)).experts.tolist()) == {1, 4}
    torch.testing.assert_close(y, layer_one_by_one(layer, SMALL, x), atol=1e-5, rtol=1e-5)


def test_the_router_decides_in_float32_under_autocast():
    layer, x = random_layer(SMALL), torch.randn(2, 9, 32)
    exact, logits = layer(x), layer.gate(x.flatten(0, 1)).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert torch.equal(layer.gate(x.flatten(0, 1)).logits, logits)
    assert (y - exact).norm() / exact.norm() < 0.01  # bfloat16 rounds to 0.4 %


def test_memory_grows_with_tokens_times_k_and_not_with_experts(peak_memory):
    def bytes_of(N, k, E):
        config = replace(SMALL, n_experts=E, top_k=k, d_model=64, n_heads=4)
        layer, x = random_layer(config), torch.randn(1, N, 64, requires_grad=True)
        weights = 4 * sum(p.numel() for p in layer.parameters())  # their gradients
        return peak_memory(lambda: layer(x).sum().backward()) - weights

    base = bytes_of(2048, 2, 8)
    assert bytes_of(4096, 2, 8) == pytest.approx(2 * base, rel=0.1)
    assert bytes_of(2048, 4, 8) < 2.1 * base
    assert bytes_of(2048, 2, 32) < 1.5 * base  # the scores (N, E) alone


@pytest.mark.parametrize("name", ROUTERS)
def test_the_layer_never_asks_its_device_for_a_value(name):
    """Fake tensors have none: whatever would wait for a GPU raises here."""
    with FakeTensorMode():
        layer = MoE(ROUTERS[name])
        layer.keep_routing = True
        layer(torch.zeros(2, 16, 32, requires_grad=True)).sum().backward()
        ends = torch.tensor([0, 16, 32])
        aux_loss(layer.routing, layer.routing.load())
        z_loss(layer.routing)
        sequence_loss(layer.routing, ends, 2)
        if name.startswith("sigmoid"):
            layer.gate.update_bias()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ROUTERS)
def test_a_gpu_computes_the_same_and_is_never_waited_for(name, a_gpu_itself):
    config = replace(ROUTERS[name], kernels="triton")
    layer, x = random_layer(replace(config, kernels="reference")), torch.randn(2, 9, 32)
    y, dx = layer(x.requires_grad_()), torch.randn_like(x)
    y.backward(dx)
    expected = [y, x.grad, *(p.grad for p in layer.parameters())]
    layer, x, dx = random_layer(config).cuda(), x.detach().cuda().requires_grad_(), dx.cuda()
    layer(x)  # compiles, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = layer(x)
        y.backward(dx)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip([y, x.grad, *(p.grad for p in layer.parameters())], expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-4, rtol=1e-4)


def test_a_model_can_be_copied_after_a_pass():
    model, batch = small(), batch_of()
    model(batch["tokens"])
    model.loss(batch)
    again = copy.deepcopy(model)
    assert torch.equal(again(batch["tokens"]), model(batch["tokens"]))


def test_the_loss_compiles_into_one_graph():
    model = small(replace(GROUPS, n_layers=1, bias_update_rate=0.001))
    batch = batch_of(GROUPS)
    loss, metrics = torch.compile(model.loss, backend="aot_eager", fullgraph=True)(batch)
    model.zero_grad()
    expected, also = model.loss(batch)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics, also)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_blocks_that_are_computed_twice_give_the_same_gradients(backend, monkeypatch):
    model, batch = small(), batch_of()
    model.loss(batch)[0].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    args = Namespace(parallel="none", checkpoint_activations=True, compile=True, device="cpu")
    objective = parallel.Objective(model, lambda model, batch: model.loss(batch))
    _, loss, _ = parallel.distribute(objective, args, moe.recomputation)
    loss(batch)[0].backward()
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, expected)
    assert all(layer.routing is None for layer in model.sparse_layers)


# --- balance


def one_by_one_balance(config, routing, B):
    """Switch's loss, DeepSeek-V3's and the z-loss, summed up with Python's floats."""
    N, E, k = *routing.logits.shape, config.top_k
    probs, experts = routing.probs.double().tolist(), routing.experts.tolist()
    switch = E * sum(experts.count(e) / N * sum(p[e] for p in probs) / N for e in range(E))
    sequence = 0.0
    for b in range(B):
        rows = probs[b * N // B : (b + 1) * N // B]
        best = [sorted(range(E), key=lambda e: -row[e])[:k] for row in rows]
        for e in range(E):
            f = E / k * sum(e in chosen for chosen in best) / len(rows)
            sequence += f * sum(row[e] for row in rows) / len(rows) / B
    z = sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in routing.logits.double().tolist()) / N
    return switch, sequence, z


@pytest.mark.parametrize("name", ["softmax", "switch", "sigmoid in groups, shared experts"])
def test_balance_losses_are_their_definitions_and_count_in_training_alone(name):
    config = replace(ROUTERS[name], aux_loss_coef=0.3, z_loss_coef=0.2, sequence_loss_coef=0.1)
    model, batch = small(config), batch_of(config)
    model.keep_routings()
    model.hidden(batch["tokens"])
    routings = model.take_routings()
    sums = [one_by_one_balance(config, routing, 3) for routing in routings]
    switch, sequence, z = (sum(column) / 2 for column in zip(*sums, strict=True))  # mean over two layers
    loss, metrics = model.loss(batch)
    assert metrics["aux_loss"].item() == pytest.approx(switch, rel=1e-5)
    assert metrics["sequence_loss"].item() == pytest.approx(sequence, rel=1e-5)
    assert metrics["z_loss"].item() == pytest.approx(z, rel=1e-5)
    logits = model(batch["tokens"])
    plain = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()).item()
    assert loss.item() == pytest.approx(plain + 0.3 * switch + 0.2 * z + 0.1 * sequence, rel=1e-5)
    model.eval()
    logits = model(batch["tokens"])
    plain = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()).item()
    assert model.loss(batch)[0].item() == pytest.approx(plain, rel=1e-5)


def test_balance_losses_are_least_where_all_is_even():
    even = softmax_top_k(torch.eye(6).repeat(4, 1), 1, False)
    assert aux_loss(even, even.load()).item() == pytest.approx(1.0)
    busy = softmax_top_k(torch.eye(6)[:1].repeat(24, 1), 1, False)
    assert aux_loss(busy, busy.load()).item() > 1.5
    ends = torch.tensor([0, 12, 24])
    assert sequence_loss(busy, ends, 1).item() > 1.5
    assert sequence_loss(even, ends, 1).item() == pytest.approx(1.0)


def test_the_sequence_loss_of_packed_documents_is_the_mean_of_each_alone():
    logits, ends = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), [0, 5, 6, 20]
    packed = sequence_loss(softmax_top_k(logits, 2, True), torch.tensor(ends), 2)
    parts = [softmax_top_k(logits[start:end], 2, True) for start, end in pairwise(ends)]
    alone = [aux_loss(part, part.load()) / 2 for part in parts]
    torch.testing.assert_close(packed, torch.stack(alone).mean())


def test_documents_packed_in_a_row_are_the_sequences_of_the_loss():
    config = replace(SMALL, sequence_loss_coef=0.1)
    model, batch = small(config), batch_of(config, B=1, T=16)
    whole = model.loss(batch)[1]["sequence_loss"]
    parts = model.loss(batch | {"cu_seqlens": torch.tensor([0, 6, 16], dtype=torch.int32)})[1]
    assert parts["sequence_loss"] > 1.01 * whole  # the shorter, the less even


@pytest.mark.parametrize(
    "loss",
    [
        lambda routing: aux_loss(routing, routing.load()),
        lambda routing: sequence_loss(routing, torch.tensor([0, 200]), 1),
    ],
)
def test_balance_losses_push_the_busy_expert_down(loss):
    torch.manual_seed(0)
    logits = (torch.randn(200, 6) + torch.tensor([1.0, 0, 0, 0, 0, 0])).requires_grad_()
    loss(softmax_top_k(logits, 1, False)).backward()
    slope = logits.grad.sum(dim=0)
    assert slope[0] > 0 and (slope[1:] < 0).all()


def test_the_bias_steps_towards_an_even_load_once_per_update():
    config = replace(GROUPS, bias_update_rate=0.01)
    model, batch = small(config), batch_of(config)
    model.loss(batch)
    model.zero_grad()  # a pass whose gradients are dropped: its loads too
    router = model.sparse_layers[0].gate
    assert router.load.sum() == 0 and (router.e_score_correction_bias == 0).all()
    for _ in range(2):  # two batches to one update
        model.loss(batch)
    load = router.load.clone()
    assert load.sum() == 2 * 3 * 16 * config.top_k
    moe.after_step(model)
    expected = 0.01 * torch.sign(load.mean() - load)
    assert torch.equal(router.e_score_correction_bias, expected) and router.load.sum() == 0
    moe.after_step(model)  # nothing has come: nothing moves
    assert torch.equal(router.e_score_correction_bias, expected)
    model.eval().loss(batch)
    assert router.load.sum() == 0


def test_the_bias_refuses_a_precision_that_swallows_its_steps():
    layer = random_layer(replace(GROUPS, bias_update_rate=0.001)).bfloat16()
    with pytest.raises(ValueError, match=r"bias in torch\.bfloat16: its steps need float32"):
        layer.gate.update_bias()


def test_the_bias_alone_evens_out_a_lopsided_router():
    config = replace(GROUPS, bias_update_rate=0.02, n_groups=1, top_groups=1)
    layer = random_layer(config)
    x = torch.randn(1, 512, 32) + 2 * layer.gate.weight[3].detach()
    layer(x)
    before = layer.gate.load.max() / layer.gate.load.mean()
    layer.gate.load.zero_()
    for _ in range(100):
        layer(x)
        load = layer.gate.load.clone()
        layer.gate.update_bias()
    assert before > 2 and load.max() / load.mean() < 1.2


# --- sizes and costs

PUBLISHED = {  # total, active
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),
    "olmoe-1b-7b": (6_919_161_856, 1_282_017_280),
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704),
    "deepseek-moe-16b": (16_375_728_128, 2_828_650_496),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_are_the_published_ones(size):
    """Totals are the checkpoints' own; the active round to the papers' 12.9, 1.3, 3.3 and 2.8 billion."""
    with torch.device("meta"):
        model = MoEGPT(SIZES[size])
    total, active = sum(p.numel() for p in model.parameters()), n_active_params(model)
    assert (total, active) == PUBLISHED[size]


@pytest.mark.parametrize("config", [SMALL, replace(GROUPS, dense_layers=(1,)), SWITCH])
def test_flops_formula_counts_the_matrix_products(config):
    """As in test_gpt.py: what runs is counted by PyTorch, less the scores that causality masks."""
    T, config = 16, replace(config, kernels="reference")
    model = small(config)
    with FlopCounterMode(display=False) as counter:
        model.loss(batch_of(config, 3, T))[0].backward()
    masked = 12 * config.n_layers * config.n_heads * config.K * (T - (T + 1) / 2)
    assert model.flops_per_token(T) == pytest.approx(counter.get_total_flops() / (3 * T) - masked, rel=1e-3)


def test_a_tiny_mixture_costs_as_much_as_the_tiny_dense_model():
    from gpt import SIZES as DENSE

    sparse, dense = SIZES["tiny"], DENSE["tiny"]
    assert sparse.flops_per_token(256) == pytest.approx(dense.flops_per_token(256), rel=0.01)  # the router
    sparse, dense = (sum(p.numel() for p in model.parameters()) for model in (MoEGPT(sparse), GPT(dense)))
    assert sparse > 2 * dense


def test_initialisation_follows_gpt():
    model = MoEGPT(replace(SIZES["tiny"], router="sigmoid", n_shared_experts=1))
    for layer in model.sparse_layers:
        for name, std in (("gate_up_proj", 0.02), ("down_proj", 0.02 / math.sqrt(8))):
            assert getattr(layer.experts, name).weight.std().item() == pytest.approx(std, rel=0.03)
        assert layer.gate.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert (layer.gate.e_score_correction_bias == 0).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"router": "hash"}, "router 'hash': expected one of softmax"),
        ({"top_k": 7}, "top_k 7: expected 1 to n_experts 6"),
        ({"router": "switch"}, "top_k 2, renormalize True: a switch needs top_k 1"),
        ({"capacity_factor": 0.0}, "capacity_factor 0.0"),
        ({"n_groups": 4}, "n_groups 4, top_groups 1: expected a divisor of n_experts 6"),
        (
            {"router": "switch", "top_k": 1, "renormalize": False, "n_groups": 3},
            "router 'switch' has no groups",
        ),
        ({"n_groups": 3, "router": "sigmoid", "top_k": 3}, "top_k 3: expected at least 2 experts"),
        ({"bias_update_rate": 0.001}, "router 'softmax' has no bias"),
        ({"dense_layers": (0, 1)}, "some of 0 to 1, not all"),
        ({"dense_layers": (2,)}, "some of 0 to 1"),
        ({"router": "expert_choice"}, "a token may have no expert"),
        ({"n_shared_experts": -1}, "n_shared_experts -1"),
        ({"d_expert": -3}, "d_expert -3"),
        ({"mlp": "gelu"}, "experts are swiglu"),
        ({"qk_norm": "heads"}, "qk_norm 'heads': expected False or True or all"),
    ],
)
def test_impossible_configs_say_why(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_experts_have_the_width_of_the_mlp_unless_the_config_says_otherwise():
    config = replace(SMALL, d_expert=None)
    assert replace(config, d_ff=64).F == 64
    assert replace(replace(config, d_expert=24), d_ff=64).F == 24


# --- the model


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "expert choice"])
def test_cached_generation_equals_whole_passes(name):
    model = small(replace(ROUTERS[name], dense_layers=(0,))).eval()
    prompts, n_new = [[3, 14, 15], [9, 2, 6, 5, 35]], 12
    for prompt, new in zip(prompts, model.generate(prompts, n_new, temperature=0), strict=True):
        for i, token in enumerate(new):
            logits = model(torch.tensor([prompt + new[:i]]))[0, -1]
            assert logits[token] > logits.max() - 1e-4  # the best, but for rounding


def test_expert_choice_cannot_continue_a_text():
    with pytest.raises(ValueError, match="router 'expert_choice': an expert chooses among all tokens"):
        small(ROUTERS["expert choice"]).generate([[1, 2]], 3)


@pytest.mark.parametrize("router", ["softmax", "switch", "sigmoid in groups, shared experts"])
def test_a_run_in_two_parts_is_the_run_in_one_and_draws_its_experts(router, tmp_path, monkeypatch):
    """The bias is part of the state: passes that only measure time must leave no mark on it."""
    config = replace(ROUTERS[router], bias_update_rate=0.01 if "sigmoid" in router else 0.0)
    monkeypatch.setitem(moe.SIZES, "tiny", config)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of the text, {i * i % 97} and so on\n" for i in range(160)))
    flags = f"--model moe --data {text} --tokenizer bytes --batch-size 2 --seq-len 16 --eval-every 3 "
    flags += "--grad-accum 2 --log-every 1 --warmup 0 --schedule constant --lr 0.01 "
    flags += f"--cache {tmp_path / 'cache'} --out {tmp_path}/"
    assert train.main([*(flags + "whole").split(), "--steps", "6"]) == 0
    assert train.main([*(flags + "parts").split(), "--steps", "3"]) == 0
    assert train.main([*(flags + "parts").split(), "--steps", "6", "--resume"]) == 0
    whole, parts = (load_file(tmp_path / run / SHARD) for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    for name in (name for name in whole if name.endswith("correction_bias")):
        assert whole[name].abs().max() >= 0.01
    samples = (tmp_path / "whole" / "samples.txt").read_text()
    assert samples == (tmp_path / "parts" / "samples.txt").read_text() and "an expert gets most of" in samples
    assert (tmp_path / "whole" / "experts.png").is_file()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all("val_max_load" in row or row["max_load"] >= 1 for row in rows)
    loaded = MoEGPT.from_pretrained(tmp_path / "whole" / "model")
    assert loaded.generate([[1, 2, 3]], 4, temperature=0)


def test_commands_print_the_sizes():
    run = run_command("moe.py")
    assert run.code == 0
    assert "mixtral-8x7b        46,702,792,704  12,879,925,248     32      2/8" in run.out
    assert "deepseek-moe-16b    16,375,728,128   2,828,650,496     28   2+6/64" in run.out
