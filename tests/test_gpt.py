"""GPT against transformers (recorded on random weights), against the published counts, and against itself."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_greedy_recorded, assert_logits_recorded, copy_of, rows_of
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.flop_counter import FlopCounterMode

from engine import contract
from evaluation.perplexity import perplexity
from gpt import GPT, SIZES, Config, make_batch

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = [
    "gpt2",
    "llama",
    "llama3-scaling",
    "llama-linear",
    "llama-yarn",
    "mistral",
    "qwen2",
    "qwen2-sliding",
]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
RECORDED += ["qwen2-yarn", "qwen3"]
SMALL = Config(2, 4, 32, 48, vocab_size=61, max_seq_len=32, n_kv_heads=2)
GPT2_LIKE = {"norm": "layer", "positions": "learned", "mlp": "gelu", "bias": True, "n_kv_heads": 4}


def recorded(name):
    return GPT.from_pretrained(FIXTURES / name).eval(), load_file(FIXTURES / name / "expected.safetensors")


def small(**changes):
    """A random model whose outputs depend visibly on every weight."""
    torch.manual_seed(0)
    model = GPT(replace(SMALL, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


# --- parity with transformers


@pytest.mark.parametrize("name", RECORDED)
def test_logits_equal_transformers(name):
    assert_logits_recorded(*recorded(name))


@pytest.mark.parametrize("name", RECORDED)
def test_greedy_tokens_equal_transformers(name):
    """Three prompts of different lengths in one batch; the sliding windows are passed several times over."""
    assert_greedy_recorded(*recorded(name))


@pytest.mark.parametrize("name", [name for name in RECORDED if name != "gpt2"])
def test_transformers_4_spelling_of_config_means_the_same(name, tmp_path):
    v4 = json.loads((FIXTURES / name / "config_v4.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(v4))
    (tmp_path / "model.safetensors").write_bytes((FIXTURES / name / "model.safetensors").read_bytes())
    assert GPT.from_pretrained(tmp_path).config == recorded(name)[0].config


def test_sharded_checkpoint_is_the_same_model():
    whole, sharded = recorded("llama")[0], GPT.from_pretrained(FIXTURES / "llama-sharded")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sharded.parameters(), strict=True))


@pytest.mark.parametrize("name", RECORDED)
def test_saving_and_loading_returns_the_same_model(name, tmp_path):
    model, expected = recorded(name)
    if model.config.rope_scaling is None or name == "llama3-scaling":
        model.save_pretrained(tmp_path)
    else:
        model.save_pretrained(tmp_path / "deep" / "er")
        tmp_path = tmp_path / "deep" / "er"
    again = GPT.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    assert torch.equal(again(expected["tokens"]), model(expected["tokens"]))
    hf = json.loads((tmp_path / "config.json").read_text())
    assert hf["architectures"] == json.loads((FIXTURES / name / "config.json").read_text())["architectures"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True},
        {"qk_norm": True, "window": 8, "full_layers": (1,), "d_head": 16, "tie_embeddings": False},
        {"qkv_bias": True, "window": 8, "full_layers": (0,)},
        {"window": 8},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": YARN},
        GPT2_LIKE,
    ],
    ids=[
        "llama",
        "qwen3",
        "qwen3 mixed windows",
        "qwen2 mixed windows",
        "mistral",
        "linear rope",
        "yarn",
        "gpt2",
    ],
)
def test_transformers_opens_what_we_save(changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small(**changes)
    model.save_pretrained(tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (model(tokens) - theirs.eval()(tokens).logits).abs().max()
    # weights of order one give logits of order ten: ten times the parity tolerance of logits of order one
    assert difference < 1e-4


@pytest.mark.parametrize("changes", [{}, GPT2_LIKE], ids=["llama", "gpt2"])
def test_transformers_generates_our_greedy_tokens_from_what_we_save(changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small(eos_token_id=60, **changes)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.generation_config.do_sample and theirs.generation_config.eos_token_id == 60
    prompt = torch.tensor([[3, 1, 4]])
    (expected,) = model.generate(prompt, 20, temperature=0)
    # Random weights may well end the text at once: go on.
    new = theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 3:]
    assert new.tolist() == expected


def test_llama_cpp_and_mlx_find_the_context_of_a_gpt2_by_its_older_name(tmp_path):
    small(**GPT2_LIKE).save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    assert hf["n_ctx"] == hf["n_positions"] == 32


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_whom_the_umask_lets_can_read_what_we_save(umask, mode, tmp_path):
    (tmp_path / "model.safetensors.new").touch(0o400)  # of a run that was killed
    before = os.umask(umask)
    try:
        small().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("config.json", "generation_config.json", "model.safetensors"), mode)


def test_a_model_no_architecture_describes_is_refused_before_anything_is_written(tmp_path):
    two_kinds = {"window": 8, "full_layers": (0,)}
    for changes in ({"logit_softcap": 30.0}, {"norm": "layer"}, two_kinds, {"qk_norm": "all"}):
        with pytest.raises(ValueError, match="no Hugging Face architecture"):
            small(**changes).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor of rope_type 'linear' is missing"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2, "beta_fast": 8}}, "beta_fast of rope_type"),
        ({"rope_parameters": YARN | {"truncate": 1}}, "truncate 1: expected true or false"),
        ({"rope_parameters": YARN | {"factor": 0.5}}, "factor 0.5 of rope_type 'yarn': expected at least 1"),
        ({"rope_parameters": YARN | {"beta_slow": "x"}}, "beta_slow 'x': expected a number above 0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": 16}, "shape"),
        ({"num_hidden_layers": 3}, "is missing"),
        ({"num_hidden_layers": 1}, "no place"),
        ({"num_key_value_heads": 3}, "multiple"),
    ],
)
def test_config_features_we_lack_are_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(copy_of(FIXTURES / "llama", tmp_path, **changes))


def test_broken_checkpoints_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        GPT.from_pretrained(tmp_path / "nowhere")
    copy_of(FIXTURES / "llama", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        GPT.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: no such file"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        GPT.from_pretrained(tmp_path)


def test_original_gpt2_names_load(tmp_path):
    """The files of 2019 lack the prefix and carry the causal mask."""
    weights = load_file(FIXTURES / "gpt2" / "model.safetensors")
    old = {name.removeprefix("transformer."): w for name, w in weights.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    copy_of(FIXTURES / "gpt2", tmp_path)
    save_file(old, tmp_path / "model.safetensors")
    model, expected = recorded("gpt2")
    assert torch.equal(GPT.from_pretrained(tmp_path)(expected["tokens"]), model(expected["tokens"]))


# --- sizes, initialisation, cost

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_are_the_published_ones(size):
    with torch.device("meta"):
        model = GPT(SIZES[size])
    assert contract.n_active_params(model) == PUBLISHED[size]


@pytest.mark.parametrize("window", [None, 5])
def test_flops_formula_counts_the_matrix_products(window):
    """PyTorch counts the products that run; it cannot see that masked scores need none: added here."""
    model, T = small(window=window, kernels="reference"), 16
    batch = make_batch(rows_of(torch.randint(61, (3, T + 1))), model.config, torch.Generator())
    with FlopCounterMode(display=False) as counter:
        model.loss(batch)[0].backward()
    per_key = 12 * model.config.n_heads * model.config.K
    seen = sum(min(i + 1, window or T) for i in range(T)) / T
    masked = model.config.n_layers * per_key * (T - seen)
    assert model.flops_per_token(T) == pytest.approx(counter.get_total_flops() / (3 * T) - masked, rel=1e-3)


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(replace(SIZES["tiny"], bias=True, norm="layer", positions="learned"))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        elif "norm" in name:
            assert (p == 1).all()
        else:
            residual = "o_proj" in name or "down_proj" in name
            expected = 0.02 / math.sqrt(2 * 4) if residual else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.03), name
    model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="extra: no rule"):
        model.initialize()


def test_the_loss_with_our_kernels_is_one_graph():
    """The kernels run in Triton's interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = small(kernels="triton", qk_norm=True).to(device)
    tokens = torch.randint(61, (2, 9), device=device)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    model.loss(batch)[0].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compiler.reset()
    torch.compile(model.loss, backend="aot_eager", fullgraph=True)(batch)[0].backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs PyTorch built for GPUs, but no GPU")
@pytest.mark.parametrize("kernels", ["auto", "triton"])
def test_on_a_gpu_the_loss_in_bfloat16_is_one_graph_with_our_kernels(kernels, monkeypatch):
    """Tensors without memory on a GPU that need not be there are enough to make the graph."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    with torch.device("meta"):
        model = GPT(replace(SIZES["124m"], n_layers=2, kernels=kernels))
    graphs = []
    torch.compiler.reset()
    with FakeTensorMode():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, device="cuda")))
        tokens = torch.zeros(2, 1024, dtype=torch.int64, device="cuda")
        loss = torch.compile(
            model.loss, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True
        )
        with torch.autocast("cuda", torch.bfloat16):
            loss({"tokens": tokens, "targets": tokens})
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes]
    assert called.count("plinth.attention.default") == 2
    assert called.count("plinth.linear_cross_entropy.default") == 1
    assert called.count("plinth.rms_norm.default") == (9 if kernels == "triton" else 0)  # auto: fused


def test_loss_at_the_start_is_that_of_guessing():
    torch.manual_seed(0)
    model = GPT(SMALL)
    tokens = torch.randint(61, (4, 33))
    batch = make_batch(rows_of(tokens), SMALL, torch.Generator())
    loss, metrics = model.loss(batch)
    assert loss.item() == pytest.approx(math.log(61), abs=0.05)
    assert contract.count(batch) == 4 * 32 and metrics == {}


# --- what the options mean


def test_packed_documents_are_read_as_if_alone():
    for changes in ({}, {"positions": "learned"}, {"window": 3}):
        model = small(**changes)
        documents = [torch.randint(61, (n,)) for n in (5, 1, 9)]
        ends = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
        packed = model(torch.cat(documents)[None], cu_seqlens=ends)[0]
        alone = torch.cat([model(document[None])[0] for document in documents])
        # the same products in other block shapes: float32 rounding of logits of order ten
        torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-5)


def test_logit_softcap_bounds_the_logits():
    tokens = torch.randint(61, (1, 9))
    free, capped = small()(tokens), small(logit_softcap=2.0)(tokens)
    torch.testing.assert_close(capped, 2 * torch.tanh(free / 2))


def test_kernel_backends_agree():
    tokens = torch.randint(61, (2, 20))
    for changes in ({"qk_norm": True}, {"window": 5}):
        reference = small(kernels="reference", **changes)(tokens)
        torch.testing.assert_close(small(kernels="torch", **changes)(tokens), reference, atol=2e-5, rtol=1e-5)


def test_fully_sharded_gradients_are_the_same():
    """FSDP gathers and reduces around the registered operations; here with one process."""

    def gradients(shard):
        torch.manual_seed(0)
        model = GPT(replace(SMALL, d_model=64, kernels="triton"))
        if shard:
            for module in (*model.model.layers, model):
                fully_shard(module)
            register_fsdp_forward_method(model, "loss")
        model.loss(batch)[0].backward()
        return [p.grad.full_tensor() if shard else p.grad for p in model.parameters()]

    batch = make_batch(rows_of(torch.arange(66).view(2, 33) % 61), SMALL, torch.Generator())
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        sharded = gradients(True)
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(a, b) for a, b in zip(sharded, gradients(False), strict=True))


@pytest.mark.parametrize(
    "field, value", [("norm", "batch"), ("positions", "alibi"), ("mlp", "relu"), ("n_kv_heads", 3)]
)
def test_impossible_configs_say_why(field, value):
    with pytest.raises(ValueError, match=str(value)):
        replace(SMALL, **{field: value})


# --- perplexity


def test_perplexity_predicts_every_token_once_with_the_context_the_stride_leaves():
    model = small()
    tokens = torch.randint(61, (75,))
    for stride in (32, 7, 1):
        nats = []
        for i in range(1, 75):
            # token i is new in the first window that reaches it
            start = next(s for s in range(0, 75, stride) if s + 32 >= i)
            logits = model(tokens[None, start:i])[0, -1].double()
            nats.append(F.cross_entropy(logits, tokens[i]).item())
        assert perplexity(model, tokens, stride) == pytest.approx(math.exp(sum(nats) / 74), rel=1e-5)
    with pytest.raises(ValueError, match="stride 33"):
        perplexity(model, tokens, 33)
