"""Estimates of memory against the bytes of real tensors and the peak of real steps, and as text.

The estimates are for a GPU. On a CPU some operations keep more than the kernels do on a GPU; the fixture
`as_on_a_gpu` makes them keep the same.
"""

from argparse import Namespace
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from kept import kept_by_forward
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

import bert
import gpt
import lora
import moe
import train
from engine import parallel, trainable
from engine.activations import Precision, attention_bytes, mlp_bytes
from engine.memory import MOMENTS, block_bytes, describe, estimate
from engine.optim import make_optimizers, step_optimizers
from language import electra, masking
from posttraining.nf4 import n_bytes

GPT, BERT, MOE = gpt.SIZES["tiny"], bert.SIZES["tiny-bert"], moe.SIZES["tiny"]
GPT2 = replace(
    gpt.SIZES["gpt2"], n_layers=3, d_model=128, n_heads=4, d_ff=512, vocab_size=4096, max_seq_len=256
)
SOFTMAX = replace(
    MOE, router="softmax", n_shared_experts=0, n_experts=8, top_k=2, d_expert=128, dense_layers=(0,)
)
# With few logits, as a CPU makes float32 copies of those in 16 bits.
FEW_LOGITS = replace(GPT, vocab_size=512)
UNTIED = replace(FEW_LOGITS, tie_embeddings=False)
FEW_TOKENS = {"batch_size": 1, "seq_len": 16}
CHECKPOINTED = {"checkpoint_activations": True}
KINDS = {gpt.Config: gpt.GPT, moe.Config: moe.MoEGPT, bert.Config: bert.BERT, electra.Config: electra.Electra}

# What the files of models and tasks define, where the defaults do not describe them.
FUNCTIONS = {
    gpt.Config: {},
    moe.Config: {"mlp_bytes": moe.mlp_bytes},
    bert.Config: {"loss_bytes": masking.loss_bytes},
    electra.Config: {"loss_bytes": electra.loss_bytes},
}


def flags(**changes) -> Namespace:
    args = dict(batch_size=2, grad_accum=1, seq_len=128, dtype="float32", optimizer="adamw", parallel="none")
    args |= dict(checkpoint_activations=False, kernels="auto", lr=1e-3, weight_decay=0.1, device="cpu")
    args |= dict(mask_rate=0.15, ema=None, sam_rho=0.0)
    return Namespace(**args | changes)


def on_meta(config):
    with torch.device("meta"):
        return KINDS[type(config)](config)


def plan(config, args, n_processes=1):
    return estimate(
        on_meta(config),
        args,
        n_processes,
        config=settings_of(config, args.mask_rate),
        **FUNCTIONS[type(config)],
    )


def settings_of(config, mask_rate=0.15):
    return masking.Config(mask_rate=mask_rate) if type(config) is bert.Config else config


def loss_of(model, batch):
    return masking.loss(model, batch) if type(model) is bert.BERT else model.loss(batch)


def batch_for(config, B, T, mask_rate=0.15):
    tokens, labels = (torch.randint(config.vocab_size, (B, T)) for _ in range(2))
    if not isinstance(config, bert.Config):
        return {"tokens": tokens, "targets": labels}
    masks = (
        electra.masks(config) if isinstance(config, electra.Config) else masking.Config(mask_rate=mask_rate)
    )
    n = masks.n_masked(T)
    batch = {"tokens": tokens, "positions": torch.randint(B * T, (B, n)), "targets": labels[:, :n]}
    return batch | {"uniform": torch.rand(B, n)}  # for language/electra.py


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [GPT, GPT2, MOE, SOFTMAX, BERT])
def test_activations_are_what_autograd_keeps(as_on_a_gpu, config, dtype):
    args = flags(dtype=dtype)
    model, batch = KINDS[type(config)](config), batch_for(config, 2, 128)
    kept = kept_by_forward(lambda: loss_of(model, batch), model, dtype=dtype)
    parts = plan(config, args).parts
    # Left out are statistics and angles, and in bert.py the head's own layers at the masked places.
    assert parts["activations"][0] + parts["gradients"][0] == pytest.approx(kept, rel=0.02)


def test_the_fused_kernels_keep_what_is_estimated():
    config = gpt.Config(1, 2, 32, 48, 128, 16, n_kv_heads=1, qk_norm=True, kernels="triton")
    model = gpt.GPT(config)
    kept = kept_by_forward(lambda: loss_of(model, batch_for(config, 1, 16)), model)
    parts = plan(config, flags(batch_size=1, seq_len=16)).parts
    # So small, angles (16 numbers twice, for each token) and statistics (7 numbers) count.
    small = 16 * 4 * (2 * 16 + 2 + 3 + 1) + 2 * 8 * 16
    assert parts["activations"][0] + parts["gradients"][0] + small == pytest.approx(kept, rel=0.01)


def test_a_block_of_gpt2_against_korthikanti_et_al():
    """2022, section 4.1: 34 D bytes a token and layer and 5 H T of scores. Without the masks of the dropouts
    after attention and MLP, D bytes each, and with the softmax's denominators, 4 H bytes, for the scores."""
    config = replace(gpt.SIZES["gpt2"], n_layers=1)
    precision = Precision(e=2, r=2, autocast=False)
    in_mlp, _ = mlp_bytes(on_meta(config).model.layers[0], config, precision)
    assert attention_bytes(config, precision) + in_mlp == (34 - 2) * config.d_model + 4 * config.n_heads


def test_zero_counts_16_bytes_a_parameter():
    """Rajbhandari et al. 2020, section 3.1: 2 + 2 for weights and gradients in 16 bits, 12 for weights and
    moments in 32. Here gradients have 32, and the weights in 16 are autocast's copies: of matrices only."""
    config = replace(GPT, vocab_size=8)
    model = on_meta(config)
    parts = estimate(model, flags(dtype="bfloat16")).parts
    states = sum(parts[name][-1] for name in ("weights", "gradients", "optimizer states"))
    terms = (1, Precision(2, 4, True), mlp_bytes, lambda *block: 0)
    copies = sum(block_bytes(block, config, *terms).copies for block in model.model.layers)
    n_params = sum(p.numel() for p in model.parameters())
    assert states == 16 * n_params
    assert copies == pytest.approx(2 * n_params, rel=0.01)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("config", [GPT, MOE, BERT])
def test_states_are_what_real_tensors_occupy(config, optimizer):
    args = flags(optimizer=optimizer, batch_size=1, seq_len=16)
    model = KINDS[type(config)](config)
    optimizers = make_optimizers(model, args)
    loss_of(model, batch_for(config, 1, 16))[0].backward()
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters())
    step_optimizers(optimizers, torch.tensor(True))
    states = [t for o in optimizers for state in o.state.values() for t in state.values()]
    parts = plan(config, args).parts
    assert parts["weights"] == (n_bytes(model),) * len(MOMENTS)
    assert parts["gradients"][-1] == gradients
    # AdamW's counts of steps, a number a parameter, are no part of it.
    assert parts["optimizer states"][-1] == sum(t.numel() * t.element_size() for t in states if t.ndim)


def test_shares_of_fsdp_are_rows_rounded_up():
    config = gpt.Config(2, 3, 12, 20, 100, 16)  # 100, 12 and 20 rows by 8: 13, 2 and 3
    D, F, rows = 12, 20, 13 * 12 + 2
    per_layer = 4 * 2 * D + 2 * 3 * D + 2 * F + 2 * 2  # q k v o, gate up, down, norms
    args = flags(parallel="fsdp", batch_size=8, seq_len=16)
    parts = plan(config, args, 8).parts
    assert parts["weights"][0] == 4 * (rows + 2 * per_layer)
    assert parts["gradients"][-1] == parts["weights"][0]
    assert parts["optimizer states"][0] == 2 * parts["weights"][0]


def test_ddp_shares_only_the_tokens():
    args = flags(batch_size=8)
    alone, of_four = plan(GPT, args), plan(GPT, flags(batch_size=8, parallel="ddp"), 4)
    quarter = plan(GPT, flags(batch_size=2))
    for name in ("weights", "optimizer states"):
        assert alone.parts[name] == of_four.parts[name]
    assert of_four.parts["activations"] == quarter.parts["activations"]
    assert of_four.parts["gradients"][1] == alone.parts["gradients"][-1]  # its buckets never go


def test_the_state_of_the_124m_counted_by_hand():
    V, L, D, F, K = 50257, 12, 768, 2048, 64
    n = V * D + L * (4 * D * D + 3 * D * F + 2 * D + 2 * K) + D  # head and embedding are one; norms
    parts = plan(gpt.SIZES["124m"], flags(batch_size=64, seq_len=1024, dtype="bfloat16")).parts
    assert parts["weights"] == (4 * n,) * 5 and parts["optimizer states"] == (8 * n,) * 5
    assert parts["gradients"][-1] == 4 * n

    # Per token and layer, in float32 the stream before norms and a number per head; in 16 bits the inputs
    # of q, k, v, gate and up; q and k before and after norms, v, and the result; four of the MLP's.
    layer = 4 * (2 * D + D // K) + 2 * (5 * D + 6 * D + 4 * F)
    matrices = 2 * L * (4 * D * D + 3 * D * F)  # in 16 bits
    hidden = (4 + 2) * D  # of the final norm: what it read and the gradient of what it gave
    assert parts["activations"][0] == 64 * 1024 * (L * layer + hidden) + matrices


def whole_step(model, args, batch):
    """Two steps like those of train.py; the first makes the optimizers' states."""
    optimizers = make_optimizers(model, args)
    if args.checkpoint_activations:
        for block in parallel.blocks(model):
            block.forward = lambda *given, forward=block.forward: checkpoint(
                forward, *given, use_reentrant=False
            )
    for _ in range(2):
        for _ in range(args.grad_accum):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss, _ = loss_of(model, batch)
            loss.backward()
            del loss
        step_optimizers(optimizers, torch.tensor(True))
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("config", "changes", "off"),
    [
        (GPT, {}, 0.03),
        (GPT, {"batch_size": 1, "grad_accum": 2}, 0.03),
        (GPT, {"batch_size": 8} | CHECKPOINTED, 0.05),
        (GPT2, {"optimizer": "muon"}, 0.03),
        # The worst moment is at the embeddings,
        (BERT, FEW_TOKENS, 0.05),
        (GPT, FEW_TOKENS, 0.05),
        # the update,
        (GPT, FEW_TOKENS | {"optimizer": "muon"}, 0.05),
        # and the loss, when autocast still has its copies.
        (UNTIED, FEW_TOKENS | {"dtype": "bfloat16", "grad_accum": 2} | CHECKPOINTED, 0.05),
        (BERT, {"batch_size": 4, "mask_rate": 0.5}, 0.03),
        (MOE, {}, 0.03),
        (MOE, CHECKPOINTED, 0.1),
        (electra.SIZES["tiny"], {}, 0.1),
    ],
)
def test_peak_of_a_step(as_on_a_gpu, peak_memory, config, changes, off):
    args = flags(**changes)
    batch = batch_for(config, args.batch_size, args.seq_len, args.mask_rate)
    peak = peak_memory(lambda: whole_step(KINDS[type(config)](config), args, batch))
    assert plan(config, args).total == pytest.approx(peak, rel=off)


@pytest.mark.parametrize(("config", "size"), [(GPT, "qlora"), (MOE, "lora"), (BERT, "dora"), (GPT, "last")])
def test_peak_of_a_step_with_adapters(as_on_a_gpu, peak_memory, config, size):
    model = KINDS[type(config)](config)
    if size == "last":
        trainable.freeze(model, "last:1")
    else:
        lora.prepare_base(model, lora.ADAPTERS[size])
        lora.apply(model, lora.ADAPTERS[size])
    args, batch = flags(), batch_for(config, 2, 128)
    peak = n_bytes(model) + peak_memory(lambda: whole_step(model, args, batch))
    functions = FUNCTIONS[type(config)] | {"adapter_bytes": lora.adapter_bytes}
    planned = estimate(model, args, config=settings_of(config), **functions)
    assert planned.total == pytest.approx(peak, rel=0.1)


@pytest.fixture
def four_processes():
    """Rank 0 of a world of four whose other ranks do not exist, so that collectives return at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (FEW_LOGITS, {"dtype": "bfloat16", "batch_size": 8}),
        (replace(FEW_LOGITS, tie_embeddings=False, vocab_size=2048), {"batch_size": 4}),
        (FEW_LOGITS, {"dtype": "bfloat16", "batch_size": 4, "grad_accum": 2}),
        (replace(GPT, n_layers=1), {"batch_size": 4, "seq_len": 16}),
        (replace(UNTIED, n_layers=1, vocab_size=4096), {"dtype": "bfloat16", "batch_size": 4, "seq_len": 16}),
        (replace(MOE, vocab_size=512), {"dtype": "bfloat16", "batch_size": 4}),
        (BERT, {"batch_size": 4}),
    ],
)
def test_peak_of_a_step_of_fsdp(as_on_a_gpu, peak_memory, four_processes, config, changes):
    args = flags(parallel="fsdp", **changes)
    model = KINDS[type(config)](config)
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh("cpu", (4,))
    objective = parallel.Objective(model, loss_of)
    for module in (*parallel.blocks(model), objective):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    optimizers, batch = make_optimizers(model, args), batch_for(config, args.batch_size // 4, args.seq_len)

    def whole():
        for _ in range(2):
            for i in range(args.grad_accum):
                objective.set_requires_gradient_sync(i + 1 == args.grad_accum)
                objective(batch)[0].backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()

    weights = sum(p.to_local().numel() * 4 for p in model.parameters())
    planned = plan(config, args, 4)
    assert planned.parts["weights"][0] == weights + sum(b.numel() * 4 for b in model.buffers())
    # From above: the plan is for blocks in the middle, of which these models have few.
    assert 0.96 < planned.total / (weights + peak_memory(whole)) < 1.13


def test_unsharded_bytes_and_gradients_by_hand():
    """Llama 3 8B on 8 GPUs: 218M parameters a block, 525M each in embeddings and head, 14336 wide MLPs."""
    args = flags(batch_size=8, seq_len=8192, dtype="bfloat16", parallel="fsdp")
    parts = plan(gpt.SIZES["llama3-8b"], args, 8).parts
    block = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) + 2 * 4096
    V, n = 128256 * 4096, 8192
    root = 2 * V + 4096
    in_block = 2 * (root + V + 2 * block) + (2 + 4) * block
    assert parts["unsharded"] == (2 * root, in_block, in_block, (2 + 4) * root, 0)
    assert parts["temporary"][1] == n * (2 * 4096 * 2 + 2 * 14336 * 2)
    # Tied, in float32: the weights, and two gradients of the embeddings.
    args = flags(batch_size=8, seq_len=16, parallel="fsdp")
    D, V = GPT.d_model, GPT.vocab_size * GPT.d_model
    assert plan(GPT, args, 8).parts["unsharded"][3] == 4 * (3 * V + 2 * D)


def test_checkpointing_and_more_processes_save_memory():
    model = on_meta(gpt.SIZES["llama3-8b"])
    args = flags(batch_size=8, seq_len=8192, dtype="bfloat16", parallel="fsdp")
    plain = estimate(model, args, 8)
    checkpointed = estimate(model, Namespace(**vars(args) | {"checkpoint_activations": True}), 8)
    # Of 32 blocks the inputs in bfloat16, and one whole block.
    block = plain.parts["activations"][2]
    inputs = 32 * 8192 * 4096 * 2
    assert checkpointed.parts["activations"][1] == pytest.approx(inputs + block, rel=0.06)
    assert checkpointed.total < plain.total < estimate(model, args, 4).total
    assert checkpointed.total < 0.9 * 40e9  # fits 8 GPUs of 40 GB


def test_the_text_shows_every_part_and_the_gpus_that_fit():
    args = flags(batch_size=8, seq_len=8192, dtype="bfloat16", parallel="fsdp", checkpoint_activations=True)
    model = on_meta(gpt.SIZES["llama3-8b"])
    text, planned = describe(model, args, 8), estimate(model, args, 8)
    lines = {line[:18].strip(): line[18:].split() for line in text.splitlines()}
    for name, sizes in planned.parts.items():
        assert lines[name] == [f"{size / 1e9:.2f}" for size in sizes]
    assert lines["together"] == [f"{total / 1e9:.2f}" for total in planned.totals]
    assert f"the most   {planned.total / 1e9:.2f} GB" in text
    assert "a GPU of 40, 80, 141, 192 GB" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_text_names_flags_that_help_where_no_gpu_fits():
    model = on_meta(gpt.SIZES["llama3-8b"])
    args = flags(batch_size=8, seq_len=8192, dtype="bfloat16", parallel="ddp")
    text = describe(model, args, 8)
    changed = {"parallel": "fsdp", "checkpoint_activations": False}
    total = estimate(model, Namespace(**vars(args) | changed), 8).total
    assert "no GPU" in text
    assert f"{total / 1e9:.2f} GB with --parallel fsdp --batch-size 8 --dry-run 8" in text
    assert "--checkpoint-activations" in text
    assert "--dtype" not in text.splitlines()[-1]  # it is bfloat16 already
    assert "--grad-accum" not in text  # each process has one sequence


@pytest.mark.parametrize("device", [None, "cuda", "cpu", "mps"])
def test_a_dry_run_names_what_it_plans_for_and_needs_no_gpu(device, capsys):
    given = ["--device", device] if device else []
    code = train.main(
        ["--model", "gpt", "--size", "llama3-8b", "--parallel", "fsdp", "--dry-run", "8", *given]
    )
    out, err = capsys.readouterr()
    if device in (None, "cuda"):
        assert code == 0 and out.startswith(
            "planned for GPUs (CUDA or ROCm); this machine needs none\nGPU 1 of 8"
        )
        assert "a GPU of" in out and "80" in out
    else:
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert err.startswith(f"error: --device {device}: --dry-run plans the memory of GPUs")


@pytest.mark.parametrize(
    ("changes", "n", "problem"),
    [
        ({}, 2, "add --parallel"),
        ({"parallel": "ddp", "batch_size": 6}, 4, "multiple of the 4 processes"),
        ({"kernels": "reference"}, 1, "use auto"),
    ],
)
def test_flags_that_cannot_be_estimated(changes, n, problem):
    with pytest.raises(ValueError, match=problem):
        plan(GPT, flags(**changes), n)
