"""Adapters against PEFT, what each method trains and keeps, runs from questions to answers, and mistakes."""

import builtins
import copy
import json
import math
import shutil
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import SHARD, run_command
from safetensors.torch import load_file, save_file
from small_gpt import refused

import bert
import data.text
import gpt
import lora
import moe
import train
from data.tokenizer import Tokenizer, get_tokenizer
from engine.optim import make_optimizers
from formats.chat_template import prompt_tokens
from formats.open_model import open_model
from formats.safetensors_dir import check_weights, fingerprint
from lora import Config, apply, load_adapter, save_pretrained
from posttraining import chat, instruct
from posttraining.adapter_command import open_adapted
from posttraining.adapters import adapted_layers, adapter_names, set_adapter, use
from posttraining.merging import merge, unmerge

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = sorted(path.name for path in (FIXTURES / "adapters").iterdir())
ADAMW = Namespace(optimizer="adamw", lr=0.01, weight_decay=0.1, device="cpu")
TOKENIZER = get_tokenizer("bytes")
ROLES = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
ENCODER_TOKENIZER = TOKENIZER.with_special_tokens(ROLES | {"mask_token": "[MASK]"})
NARROW = dict(n_layers=2, d_model=32, d_ff=48, max_seq_len=64)
DECODER = NARROW | dict(d_head=8, vocab_size=TOKENIZER.n_vocab, eos_token_id=TOKENIZER.eot_id)
SMALL = replace(gpt.SIZES["tiny"], **DECODER)
WIDE = replace(SMALL, vocab_size=2 * SMALL.vocab_size, d_ff=96)
MOE = replace(moe.SIZES["tiny"], **DECODER, d_expert=20, n_experts=6)
BERT = replace(
    bert.SIZES["tiny-bert"],
    **NARROW,
    d_embedding=32,
    vocab_size=ENCODER_TOKENIZER.n_vocab,
    pad_token_id=ENCODER_TOKENIZER.pad_id,
)


def random_model(kind, config, seed=0):
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Small random bases with their tokenizers, and something to teach them."""
    root = tmp_path_factory.mktemp("lora")
    for name, kind, config in (
        ("gpt", gpt.GPT, SMALL),
        ("long", gpt.GPT, replace(SMALL, max_seq_len=128)),
        ("untied", gpt.GPT, replace(SMALL, tie_embeddings=False)),
        ("wide", gpt.GPT, WIDE),
        ("moe", moe.MoEGPT, MOE),
        ("bert", bert.BERT, BERT),
    ):
        random_model(kind, config).save_pretrained(root / name)
        (ENCODER_TOKENIZER if kind is bert.BERT else TOKENIZER).save(root / name)
    random_model(gpt.GPT, SMALL, seed=1).save_pretrained(root / "other")
    records = [{"question": f"What is {i}?", "answer": "abba"} for i in range(60)]
    (root / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "text.txt").write_text("".join(f"line {i}, {i * i % 97} and so on\n" for i in range(200)))
    return root


def flags(home, out, **changes):
    small = dict(model="lora", base=home / "gpt", data=home / "questions.jsonl", steps=4, batch_size=2)
    small |= dict(seq_len=48, eval_every=4, log_every=1, lr=0.02, out=out, cache=home / "cache") | changes
    argv = []
    for name, value in small.items():
        flag = f"--{name.replace('_', '-')}"
        if value is not None and value is not False:
            argv += [flag] if value is True else [flag, *map(str, value if type(value) is tuple else [value])]
    return argv


@pytest.fixture(scope="module")
def trained(home):
    """A run that has learned the one answer."""
    options = dict(base=home / "long", steps=40, eval_every=20, batch_size=8)
    assert train.main(flags(home, home / "run", **options)) == 0
    return home / "run"


def plain(home, name="gpt"):
    """The flags of the same run without an adapter."""
    model = {"gpt": "gpt", "moe": "moe", "bert": "bert"}[name]
    return dict(model=model, task="instruct", base=None, init_from=home / name)


def rows(out, key):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in found if key in row]


def some_tokens(n=2, T=12, vocab=90):
    return torch.randint(vocab, (n, T), generator=torch.Generator().manual_seed(0))


def logits(model, tokens=None):
    with torch.no_grad():
        return model(some_tokens() if tokens is None else tokens)


def off(a, b):
    return (a - b).abs().max().item()


def rounding(model):
    """Return the tolerance for logits of equal models: 1e-5, or 5 times the noise of float32, where a few
    quick steps have made the weights large."""
    return max(1e-5, 5 * off(logits(model), logits(copy.deepcopy(model).double())))


def adapted(directory, config, **changes):
    """A model with a new adapter, as train.py makes it, and the fingerprint of its base."""
    config = replace(config, **changes)
    model = open_model(directory)
    base_fingerprint = lora.prepare_base(model, config)
    apply(model, config)
    return model, base_fingerprint


def optimizers_for(model, config):
    """AdamW as train.py makes it for an adapter."""
    rules = {"lr_factor": partial(lora.lr_factor, config), "decays": partial(lora.decays, config)}
    return make_optimizers(model, ADAMW, **rules)


def n_parameters(model, learning=False):
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not learning)


def step(model, optimizers, tokens):
    loss, _ = model.loss({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]})
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()
    return loss.item()


# --- parity with PEFT


def base_of(name):
    """The directory of the base of a recorded adapter."""
    base = name.split("-")[0]
    return FIXTURES / {"modernbert": "modernbert-mlm"}.get(base, base)


def fixture(name):
    kinds = {"olmoe": moe.MoEGPT, "modernbert": bert.BERT}
    return kinds.get(name.split("-")[0], gpt.GPT).from_pretrained(base_of(name)).eval()


def opened_by_peft(directory, name):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    options = {"experts_implementation": "eager"} if name.startswith("olmoe") else {}
    masked = name.startswith("modernbert")
    kind = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    base = kind.from_pretrained(base_of(name), attn_implementation="eager", **options)
    return peft.PeftModel.from_pretrained(base, directory).eval()


@pytest.mark.parametrize("name", RECORDED)
def test_logits_equal_those_that_peft_recorded(name):
    expected = load_file(FIXTURES / "adapters" / name / "expected.safetensors")
    tolerance = max(1e-5, 5 * expected["logits64_error"].item())  # the reference's own float32 noise
    model = fixture(name)
    plain = logits(model, expected["tokens"])
    load_adapter(model, FIXTURES / "adapters" / name)
    assert off(logits(model, expected["tokens"]), plain) > 0.1
    assert off(logits(model, expected["tokens"]), expected["logits"]) < tolerance
    merge(model)
    assert off(logits(model, expected["tokens"]), expected["merged"]) < tolerance
    unmerge(model)
    with use(model, None):
        assert torch.equal(logits(model, expected["tokens"]), plain)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RECORDED)
def test_peft_opens_what_we_have_loaded_and_saved(name, tmp_path):
    pytest.importorskip("peft")
    expected = load_file(FIXTURES / "adapters" / name / "expected.safetensors")
    tolerance = max(1e-5, 5 * expected["logits64_error"].item())
    model = fixture(name)
    config = load_adapter(model, FIXTURES / "adapters" / name, "theirs")
    save_pretrained(model, tmp_path, config, str(base_of(name)), name="theirs")
    with torch.no_grad():
        found = opened_by_peft(tmp_path, name)(expected["tokens"]).logits
    assert off(found, expected["logits"]) < tolerance


def small(name):
    """The Config of an adapter with rank 4, if it has one."""
    config = lora.ADAPTERS[name]
    return replace(config, r=4) if config.method in ("lora", "dora") else config


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", ["lora", "rslora", "pissa", "dora", "ia3"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_opens_what_we_have_trained(name, adapter, tmp_path):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    config, base = small(adapter), FIXTURES / name
    model, base_fingerprint = adapted(base, config)
    model.eval()
    tokens = some_tokens()
    plain, optimizers = logits(model, tokens), optimizers_for(model, config)
    losses = [step(model, optimizers, tokens) for _ in range(4)]
    assert losses[-1] < losses[0]
    save_pretrained(model, tmp_path, config, str(base), base_fingerprint)
    ours, theirs = logits(model, tokens), opened_by_peft(tmp_path, name)
    assert off(ours, plain) > 0.01
    with torch.no_grad():
        expected = theirs(tokens).logits
        noise = off(expected, theirs.double()(tokens).logits)
    assert off(ours, expected) < max(1e-5, 5 * noise)
    again = open_model(tmp_path).eval()
    assert off(logits(again, tokens), ours) < 1e-5
    # A PiSSA has become a LoRA of twice the rank, and GPT-2's three projections one of three times the rank.
    assert torch.equal(logits(again, tokens), ours) or adapter == "pissa" or name == "gpt2"


# --- what learns, and what that costs


def learning(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_memory_and_files_are_the_adapters_alone(home, tmp_path):
    """The same on a base with twice the vocabulary and MLP."""
    sizes = []
    config = Config(target_modules="q_proj|v_proj", r=4)
    for name in ("gpt", "wide"):
        n_base = n_parameters(open_model(home / name))
        model, base_fingerprint = adapted(home / name, config)
        assert all(".adapters." in learns for learns in learning(model))
        optimizers = optimizers_for(model, config)
        step(model, optimizers, some_tokens())
        states = [t for o in optimizers for state in o.state.values() for t in state.values()]
        save_pretrained(model, tmp_path / name, config, str(home / name), base_fingerprint)
        save_file(lora.state(model), tmp_path / f"{name}.safetensors")
        n_adapter = 2 * 4 * (32 + 32 + 32 + 16)  # layers, rank, inputs and outputs of q_proj and v_proj
        assert sum(t.numel() for t in states if t.ndim) == 2 * n_adapter  # two moments
        assert sum(w.numel() for w in lora.state(model).values()) == n_adapter
        assert n_parameters(model, learning=True) == n_adapter
        assert n_parameters(model) == n_base + n_adapter
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        files = (tmp_path / name / "adapter_model.safetensors", tmp_path / f"{name}.safetensors")
        sizes.append([file.stat().st_size for file in files])
    # The fingerprint is of one length too.
    assert sizes[0] == sizes[1]
    assert (home / "wide" / "model.safetensors").stat().st_size > 10 * max(sizes[0])


@pytest.mark.parametrize("adapter", list(lora.ADAPTERS))
@pytest.mark.parametrize("name", ["gpt", "untied", "moe", "bert"])
def test_what_each_method_trains(adapter, name, home):
    every = {n for n, _ in open_model(home / name).named_parameters()}
    model, _ = adapted(home / name, small(adapter))
    part = "ia3_l" if adapter == "ia3" else "lora_A"
    layers = {n.split(".adapters.")[0] for n in learning(model) if n.endswith(part)}
    every = {n.removesuffix(".weight") for n in every if "norm" not in n.lower() and not n.endswith("bias")}
    beside = ("lm_head", "embed_tokens", "mlp.gate")  # the last: a router
    linear = {n for n in every if not n.endswith(beside) and "embeddings" not in n and "cls." not in n}
    if adapter == "ia3":
        ends = ("k_proj", "v_proj", "down_proj", ".key", ".value")
        linear = {n for n in linear if n.endswith(ends) or ("output.dense" in n and "attention" not in n)}
    if adapter in ("dora", "ia3"):  # which PEFT knows nothing of for stacked experts
        linear = {n for n in linear if ".experts." not in n}
    assert layers == linear
    assert all(".adapters.default." in n for n in learning(model) | lora.state(model).keys())


@pytest.mark.parametrize("part", ["all", "head", "last:1"])
@pytest.mark.parametrize("name", ["gpt", "moe"])
def test_what_does_not_learn_does_not_move(part, name, home, tmp_path):
    """The classical ways, without an adapter, beside which lora.py stands."""
    before, untouched = load_file(home / name / "model.safetensors"), open_model(home / name).eval()
    options = dict(steps=2, eval_every=2, save_every=2, **plain(home, name))
    assert train.main(flags(home, tmp_path / "run", train=part, **options)) == 0
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert after.keys() - before.keys() == ({"lm_head.weight"} if part == "head" else set())
    moved = {n for n, w in before.items() if not torch.equal(after[n], w)}
    # The bias of a router that learns moves too, without a gradient.
    ends = {"all": ("",), "head": ("model.norm.weight",), "last:1": ("model.norm.weight", "model.layers.1.")}
    assert moved == {n for n in before if n.startswith(ends[part])}
    again = open_model(tmp_path / "run" / "model").eval()
    assert off(logits(again), logits(untouched)) > 1e-5


def test_last_counts_layers(home, tmp_path, capsys):
    options = dict(steps=1, eval_every=1, **plain(home))
    assert train.main(flags(home, tmp_path / "run", train="last:2", **options)) == 0
    before = load_file(home / "gpt" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    moved = {n for n, w in before.items() if not torch.equal(after[n], w)}
    assert {n.split(".")[2] for n in moved if ".layers." in n} == {"0", "1"}
    error = refused(capsys, flags(home, tmp_path / "other", train="last:3", **options))
    assert "--train last:3" in error and "2 blocks" in error


def test_state_restores_exactly_what_learns(home):
    config = Config(r=4, init="pissa")
    (model, _), (other, _) = (adapted(home / "gpt", config) for _ in range(2))
    step(model, optimizers_for(model, config), some_tokens())
    assert off(logits(model), logits(other)) > 1e-4
    other.load_state_dict(lora.state(model), strict=False)
    assert torch.equal(logits(model), logits(other))
    with pytest.raises(ValueError, match="is missing"):
        check_weights(lora.state(other), {}, "checkpoint")
    with pytest.raises(ValueError, match="has shape"):
        check_weights(lora.state(adapted(home / "gpt", config, r=3)[0]), lora.state(model), "checkpoint")


def test_the_optimizer_is_told_how_much_faster_B_learns(home):
    config = replace(lora.ADAPTERS["lora+"], r=4)
    model, _ = adapted(home / "gpt", config)
    (optimizer,) = optimizers_for(model, config)
    names = {id(p): name for name, p in model.named_parameters()}
    factors = {names[id(p)]: group["lr_factor"] for group in optimizer.param_groups for p in group["params"]}
    assert {factor for name, factor in factors.items() if name.endswith("lora_B")} == {16.0}
    assert {factor for name, factor in factors.items() if name.endswith("lora_A")} == {1.0}


def test_muon_leaves_the_head_to_adamw(home):
    model = open_model(home / "untied")
    adamw, muon = make_optimizers(model, Namespace(**vars(ADAMW) | {"optimizer": "muon"}))
    held = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in held}
    assert names == {name for name in learning(model) if name.endswith("_proj.weight")}


def test_the_first_step_of_B_is_the_learning_rate_times_its_factor(home, tmp_path):
    """Adam's first step is lr * g / (|g| + eps): the rate itself, for all but the smallest gradients."""
    options = dict(steps=1, eval_every=1, schedule="constant", warmup=0, lr=0.001, weight_decay=0.5)
    assert train.main(flags(home, tmp_path / "run", adapter="lora+", grad_clip=0, **options)) == 0
    tensors = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    B = torch.cat([w.abs().flatten() for name, w in tensors.items() if "lora_B" in name])
    assert B.max().item() == pytest.approx(16 * 0.001, rel=1e-4)
    assert B.gt(0.99 * 16 * 0.001).float().mean() > 0.9
    # While B is 0, A has no gradient: it only decays, by its own rate.
    torch.manual_seed(0)
    start, _ = adapted(home / "gpt", lora.ADAPTERS["lora+"])
    A = start.model.layers[0].self_attn.q_proj.adapters.default.lora_A.detach()
    found = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    torch.testing.assert_close(found, A * (1 - 0.001 * 0.5), rtol=1e-5, atol=1e-7)


# --- which base


def test_fingerprint():
    model = random_model(gpt.GPT, SMALL)
    expected = fingerprint(model)
    assert len(expected) == 64 and fingerprint(random_model(gpt.GPT, SMALL)) == expected
    assert fingerprint(random_model(gpt.GPT, SMALL).to(torch.bfloat16)) == expected
    assert fingerprint(random_model(gpt.GPT, SMALL, seed=1)) != expected
    assert fingerprint(random_model(gpt.GPT, replace(SMALL, vocab_size=300))) != expected
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.02)  # one matrix alone
    assert fingerprint(model) != expected


def test_fingerprint_of_a_base_is_that_of_its_file(home):
    """Whatever is done to it next."""
    expected = fingerprint(gpt.GPT.from_pretrained(home / "gpt"))
    for changes in ({}, {"quantize": "nf4"}, {"base_dtype": "bfloat16"}):
        assert adapted(home / "gpt", Config(**changes))[1] == expected


def saved(home, to, base="gpt", **changes):
    config = Config(r=4, **changes)
    model, base_fingerprint = adapted(home / base, config)
    save_pretrained(model, to, config, str(home / base), base_fingerprint)
    return to


def edited(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def test_an_adapter_of_another_base_is_refused(home, tmp_path):
    adapter = saved(home, tmp_path / "adapter")
    other = gpt.GPT.from_pretrained(home / "other")
    with pytest.raises(ValueError, match=r"adapter: made for other weights than this base has; .*gpt"):
        load_adapter(other, adapter, base_fingerprint=fingerprint(other))
    assert not adapted_layers(other)
    with pytest.raises(ValueError, match=r"has shape .* this base needs .*; name the right base"):
        load_adapter(gpt.GPT.from_pretrained(home / "wide"), adapter)
    with pytest.raises(ValueError, match="made for other weights than this base has"):
        open_model(edited(adapter, base_model_name_or_path=str(home / "other")))
    for base in (None, "", str(tmp_path / "gone")):
        with pytest.raises(
            ValueError, match=r"adapter: an adapter of .*name that model's directory by --base"
        ):
            open_model(edited(adapter, base_model_name_or_path=base))


@pytest.mark.parametrize(
    "name, base", [("gpt2-lora", "llama"), ("llama-lora", "gpt2"), ("olmoe-experts", "llama")]
)
def test_a_peft_adapter_of_another_architecture_is_refused(name, base):
    model = fixture(base)
    expected = logits(model)
    with pytest.raises(ValueError, match=r"fits no layer|does not have") as error:
        load_adapter(model, FIXTURES / "adapters" / name)
    assert name in str(error.value) and torch.equal(logits(model), expected)
    assert not adapted_layers(model)


def test_broken_adapters_are_named(home, tmp_path):
    adapter = saved(home, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"nowhere.adapter_config\.json: no such file"):
        load_adapter(gpt.GPT.from_pretrained(home / "gpt"), tmp_path / "nowhere")
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: damaged"):
        open_model(adapter)
    file.unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: no such file"):
        open_model(adapter)
    file.write_bytes(whole)
    assert load_adapter(gpt.GPT.from_pretrained(home / "gpt"), adapter).r == 4
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json: not JSON"):
        open_model(adapter)


# --- mistakes in Python


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"r": 0}, "r 0: expected at least 1"),
        ({"method": "lorra"}, "method 'lorra': expected lora or dora or ia3"),
        ({"init": "svd"}, "init 'svd': expected zero or pissa"),
        ({"quantize": "int8"}, "quantize 'int8': expected None or nf4"),
        ({"r": 4, "method": "ia3"}, "r 4: has no effect with method 'ia3'"),
        ({"init": "pissa", "method": "dora"}, "init 'pissa': has no effect with method 'dora'"),
        ({"base_dtype": "float16"}, "base_dtype 'float16': expected float32 or bfloat16"),
        ({"dropout": 1.0}, r"dropout 1\.0: expected at least 0 and less than 1"),
        ({"alpha": 0.0}, r"alpha 0\.0: expected a number above 0"),
        ({"alpha": math.nan}, "alpha nan: expected a number above 0"),
        ({"lr_ratio": -1.0}, r"lr_ratio -1\.0: expected a number above 0"),
    ],
)
def test_mistakes_in_the_config(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


@pytest.mark.parametrize(
    "config, name, message",
    [
        (Config(target_modules="q_prj"), "a", r"'q_prj': matches no layer; expected some of .*q_proj"),
        (Config(target_modules="(q_proj"), "a", r"'\(q_proj': not a regular expression"),
        (Config(target_modules="proj"), "a", "'proj': matches no layer"),  # whole names, from a dot on
        (Config(method="dora", target_modules="embed_tokens"), "a", "dora cannot adapt the embedding"),
        (Config(method="ia3", target_modules="embed_tokens"), "a", "ia3 cannot adapt the embedding"),
        (Config(init="pissa", r=40), "a", "r 40"),  # of layers with 32 outputs
        (Config(), "default", "adapter name 'default': there is one of that name; choose another"),
        (Config(), "a.b", r"adapter name 'a\.b': expected one without dots"),
        (Config(), "", "adapter name ''"),
        (Config(), "keys", "adapter name 'keys'"),
        (Config(), "training", "adapter name 'training'"),
    ],
)
def test_an_adapter_that_cannot_be_added_changes_nothing(config, name, message):
    model = random_model(gpt.GPT, SMALL)
    apply(model, Config(r=4))
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.adapters["default"].lora_B.normal_()
    expected, learns = logits(model), learning(model)
    with pytest.raises(ValueError, match=message):
        apply(model, config, name)
    assert torch.equal(logits(model), expected)
    assert learning(model) == learns and adapter_names(adapted_layers(model)) == ["default"]


def test_names_that_there_are_not(home, tmp_path):
    model = random_model(gpt.GPT, SMALL)
    with pytest.raises(ValueError, match="no adapter 'french'; there are none"):
        set_adapter(model, "french")
    apply(model, Config(r=4), "german")
    for mistake in (
        lambda: set_adapter(model, "french"),
        lambda: merge(model, "french"),
        lambda: save_pretrained(model, tmp_path / "new", Config(r=4), name="french"),
    ):
        with pytest.raises(ValueError, match=r"no adapter 'french'.*; there are german"):
            mistake()
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="adapter name 'german': there is one of that name"):
        load_adapter(model, saved(home, tmp_path / "adapter"), "german")


def test_adapters_come_and_go_by_name(home, tmp_path):
    """Several beside each other, of which one is saved and loaded elsewhere."""
    model = gpt.GPT.from_pretrained(home / "gpt").eval()
    configs = {"a": Config(r=3, dropout=0.5), "b": Config(method="ia3"), "c": Config(r=2, method="dora")}
    for name, config in configs.items():
        apply(model, config, name)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for p in layer.adapters.parameters():
                p.add_(0.1 * torch.randn_like(p))
    other = gpt.GPT.from_pretrained(home / "gpt").eval()
    for name, config in configs.items():
        save_pretrained(model, tmp_path / name, config, name=name)
        again = load_adapter(other, tmp_path / name, f"new_{name}")
        assert (again.method, again.dropout) == (config.method, config.dropout)
        with use(model, name):  # the last one loaded is in use, and drops nothing out: the model is in eval
            assert torch.equal(logits(other), logits(model))


# --- runs


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"base": "no/such/place"}, ["no/such/place", "no such file", "Hugging Face layout"]),
        ({"base": "README.md"}, ["README.md", "no such file"]),
        ({"base": "tests"}, ["config.json", "no such file"]),
        ({"model": "gpt"}, ["--base", "--model lora", "--init-from"]),
        ({"size": "dora"}, ["--size dora", "--adapter dora"]),
        ({"size": "full"}, ["--size full", "the model in --base has its size", "leave out --size"]),
        ({"size": "tiny"}, ["--size tiny"]),
        ({"init_from": "runs/x"}, ["--base", "--init-from", "cannot go together"]),
        ({"adapter": "loora"}, ["--adapter loora", "qlora"]),
        ({"set": "r=0"}, ["r=0", "at least 1"]),
        ({"adapter": "ia3", "set": "r=4"}, ["r 4", "no effect with method 'ia3'"]),
        ({"set": "target_modules=q_prj"}, ["q_prj", "q_proj"]),
        ({"set": "base=x"}, ["base=x"]),
        ({"train": "head"}, ["--train head"]),
        ({"tokenizer": "bpe:300"}, ["bpe:300"]),  # learned from a text, which conversations are not
        ({"optimizer": "muon"}, ["--optimizer muon", "adamw"]),
        ({"seq_len": 500}, ["--seq-len 500", "at most 64"]),
        ({"seq_len": 8}, ["--seq-len 8", "longer rows"]),
        ({"data": "no/questions.jsonl"}, ["no/questions.jsonl"]),
    ],
)
def test_mistakes_in_flags_are_named(changes, words, home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    error = refused(capsys, flags(home, tmp_path / "run", **changes))
    assert all(word in error for word in words), error


def test_a_tokenizer_of_more_tokens_than_the_base_is_refused(home, tmp_path, capsys):
    error = refused(capsys, flags(home, tmp_path / "run", tokenizer=home / "bert"))
    assert "261 tokens" in error and "257" in error and "leave" in error


def test_a_base_is_needed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_command("train.py", "--model", "lora")
    assert run.code == 2 and run.out == ""
    assert run.err.startswith("error: --model lora needs --base DIR") and run.err.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_run_learns_and_leaves_an_adapter_behind(trained, home):
    names = {path.name for path in (trained / "model").iterdir()}
    assert names >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja",
    }  # fmt: skip
    # Generation is as in the base's own generation_config.json, which whoever opens the adapter reads.
    assert not names & {"config.json", "model.safetensors", "generation_config.json"}
    losses = rows(trained, "val_loss")
    assert len(losses) == 3 and losses[-1] < 0.3 * losses[0]
    checkpoint = load_file(trained / SHARD)
    assert all(".adapters.default." in name for name in checkpoint)
    n_trained = n_parameters(adapted(home / "long", Config())[0], learning=True)
    assert sum(w.numel() for name, w in checkpoint.items() if name.startswith("model.")) == n_trained
    hf = json.loads((trained / "model" / "adapter_config.json").read_text())
    assert hf["base_model_name_or_path"] == str(home / "long") and (hf["r"], hf["lora_alpha"]) == (16, 32.0)
    shown = (trained / "samples.txt").read_text()
    assert shown.count("=== step") == 3 and "expected: abba" in shown
    first, *_, last = shown.split("=== step")[1:]
    told = [
        [line.split(": ", 1)[-1].strip() for line in last.splitlines() if key in line]
        for key in ("before:", "after:")
    ]
    assert set(told[1]) == {"abba"} and "abba" not in told[0]
    assert first.count("before:") == 4


def test_the_loss_is_of_held_out_answers(trained, home):
    """Taken apart: mean nats of the answers' tokens, each conversation by itself."""
    val = instruct.prepare(str(home / "questions.jsonl"), TOKENIZER, 48).val
    held_out = [val[i] for i in range(len(val))]
    model, nats = open_adapted(trained, None)[0], []
    for prompt, answer in instruct.conversations_in(held_out, 10**6):
        scores = logits(model, torch.tensor([prompt + answer[:-1]]))[0].log_softmax(-1)
        nats += [-scores[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)]
    assert len(nats) == 6 * 5  # of six held out, "abba" and the end
    assert rows(trained, "val_loss")[-1] == pytest.approx(sum(nats) / len(nats), rel=1e-4)


@pytest.mark.parametrize(
    "adapter, file", [("pissa", "adapter_model.safetensors"), (None, "model.safetensors")]
)
def test_resumed_equals_uninterrupted(adapter, file, home, tmp_path):
    """To the bit, with the draws of dropout."""
    options = {"adapter": adapter, "set": "dropout=0.2"} if adapter else plain(home)
    options["schedule"] = "constant"
    for out, steps, resume in (("whole", 4, False), ("part", 2, False), ("part", 4, True)):
        assert train.main(flags(home, tmp_path / out, steps=steps, resume=resume, **options)) == 0
    for path in (SHARD, f"model/{file}"):
        whole, part = (load_file(tmp_path / out / path) for out in ("whole", "part"))
        assert whole.keys() == part.keys() and all(torch.equal(w, part[name]) for name, w in whole.items())
    assert rows(tmp_path / "whole", "loss") == rows(tmp_path / "part", "loss")
    assert rows(tmp_path / "whole", "val_loss")[-1] == rows(tmp_path / "part", "val_loss")[-1]


def test_an_adapter_is_trained_further(trained, home, tmp_path):
    options = dict(base=None, init_from=trained / "model", steps=2, eval_every=2, batch_size=8)
    assert train.main(flags(home, tmp_path / "run", **options)) == 0
    before, after = rows(trained, "val_loss")[-1], rows(tmp_path / "run", "val_loss")
    assert after[0] == pytest.approx(before, rel=1e-5)
    configs = [
        json.loads((run / "model" / "adapter_config.json").read_text()) for run in (trained, tmp_path / "run")
    ]
    assert configs[0] == configs[1]
    files = [load_file(run / "model" / "adapter_model.safetensors") for run in (trained, tmp_path / "run")]
    assert files[0].keys() == files[1].keys()
    assert not any(torch.equal(w, files[1][name]) for name, w in files[0].items())


def test_an_adapter_that_is_trained_further_with_other_options_keeps_its_places(home, tmp_path):
    adapter = saved(home, tmp_path / "adapter", target_modules="q_proj|down_proj")
    TOKENIZER.save(adapter)
    options = dict(base=None, init_from=adapter, set="dropout=0.1", steps=1, eval_every=1)
    assert train.main(flags(home, tmp_path / "run", **options)) == 0
    after = tmp_path / "run" / "model"
    names = [load_file(path / "adapter_model.safetensors").keys() for path in (adapter, after)]
    assert names[0] == names[1]
    assert json.loads((after / "adapter_config.json").read_text())["lora_dropout"] == 0.1


@pytest.mark.parametrize("adapter", ["qlora", "dora", None])
def test_other_adapters_train_and_all_weights(adapter, home, tmp_path):
    out = tmp_path / "run"
    options = dict(steps=8, eval_every=8, batch_size=8, schedule="constant")
    options |= {"adapter": adapter} if adapter else plain(home)
    assert train.main(flags(home, out, **options)) == 0
    losses = rows(out, "val_loss")
    assert losses[-1] < losses[0]
    model, tokenizer = open_adapted(out, None)
    assert tokenizer.n_vocab == TOKENIZER.n_vocab and (out / "model" / "chat_template.jinja").exists()
    assert off(logits(model), logits(gpt.GPT.from_pretrained(home / "gpt"))) > 1e-3
    if adapter is None:
        assert torch.equal(logits(gpt.GPT.from_pretrained(out / "model")), logits(model))


def test_a_mixture_of_experts_trains_and_merges(home, tmp_path):
    out = tmp_path / "run"
    assert train.main(flags(home, out, base=home / "moe", steps=12, eval_every=12, schedule="constant")) == 0
    losses = rows(out, "val_loss")
    assert losses[-1] < losses[0]
    model = open_adapted(out, None)[0]
    assert any(path.endswith("experts.down_proj") for path in adapted_layers(model))
    assert lora.main([str(out), "--merge", str(tmp_path / "merged")]) == 0
    merged = moe.MoEGPT.from_pretrained(tmp_path / "merged")
    assert off(logits(merged), logits(model)) < rounding(model)


@pytest.mark.parametrize("adapter", ["lora", None])
def test_an_encoder_trains_on_text(adapter, home, tmp_path, capsys):
    out = tmp_path / "run"
    options = dict(base=home / "bert", adapter=adapter) if adapter else plain(home, "bert") | {"task": None}
    options |= dict(data=home / "text.txt", seq_len=32, steps=12, eval_every=12, schedule="constant")
    assert train.main(flags(home, out, **options)) == 0
    losses = rows(out, "val_loss")
    assert losses[-1] < losses[0]
    if adapter is None:
        assert isinstance(open_model(out / "model"), bert.BERT)
        return
    assert "encoder" in refused(capsys, [str(out), "--prompt", "Hello?"], lora.main)


def test_an_adapted_encoder_can_be_merged(home, tmp_path):
    """The error for --prompt recommends this."""
    adapter = saved(home, tmp_path / "adapter", "bert")
    get_tokenizer(str(home / "bert")).save(adapter)
    assert lora.main([str(adapter), "--merge", str(tmp_path / "merged")]) == 0
    merged = bert.BERT.from_pretrained(tmp_path / "merged").eval()
    assert off(logits(merged), logits(open_model(adapter).eval())) < 1e-5


@pytest.mark.parametrize("rest", [2, 4])
def test_an_encoder_evaluates_held_out_text_of_any_length(rest, home, tmp_path):
    """Its last row may be too short for special tokens."""
    corpus = data.text.prepare(str(home / "text.txt"), str(home / "bert"), home / "cache")
    n = len(corpus.val.tokens) - 1
    seq_len = next(T for T in range(16, 64) if n % T == rest)
    options = plain(home, "bert") | dict(task=None, data=home / "text.txt", seq_len=seq_len, train="head")
    assert train.main(flags(home, tmp_path / "run", steps=1, eval_every=1, **options)) == 0
    assert all(map(math.isfinite, rows(tmp_path / "run", "val_loss")))


# --- asked


def test_the_table_says_what_each_method_trains(capsys, monkeypatch):
    config = replace(gpt.SIZES["llama3-8b"], n_layers=2)  # of 32, which would take longer
    monkeypatch.setitem(gpt.SIZES, "llama3-8b", config)
    assert lora.main([]) == 0
    table = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert set(lora.ADAPTERS) <= table.keys()
    # r times inputs and outputs of q, k, v, o and the MLP's three.
    n = 2 * 16 * (2 * 8192 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert table["lora"][1] == table["qlora"][1] == f"{n:,}"
    assert table["lora"][3] == f"{2 * n / 1e6:,.1f}"
    assert table["ia3"][1] == f"{2 * (1024 + 1024 + 14336):,}"


def expected_answer(trained, messages, n=20):
    model, tokenizer = open_adapted(trained, None)
    return instruct.answers(model, tokenizer, [prompt_tokens(messages, tokenizer)], n)[0]


def test_prompt(trained, capsys):
    assert lora.main([str(trained), "--prompt", "What is 77?"]) == 0
    assert capsys.readouterr().out == "abba\n"
    question = [{"role": "user", "content": "Who are you?"}]
    for system in (None, "You are brief."):
        messages = [{"role": "system", "content": system}, *question] if system else question
        argv = [str(trained / "model"), "--prompt", "Who are you?", "--max-new-tokens", "20"]
        assert lora.main(argv + (["--system", system] if system else [])) == 0
        assert capsys.readouterr().out == expected_answer(trained, messages) + "\n"


@pytest.fixture
def asked(monkeypatch):
    """Return a list that collects the contents of the messages at each call of chat.answer."""
    calls, answer = [], chat.answer

    def listen(model, tokenizer, messages, args, image=None):
        calls.append([message["content"] for message in messages])
        return answer(model, tokenizer, messages, args, image)

    monkeypatch.setattr(chat, "answer", listen)
    return calls


def type_in(monkeypatch, *lines):
    lines = iter(lines)

    def read(prompt):
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr(builtins, "input", read)


def test_chat_remembers_until_an_empty_line(trained, asked, monkeypatch, capsys):
    type_in(monkeypatch, "What is 1?", "What is 2?", "  ", "What is 3?")
    assert lora.main([str(trained), "--chat", "--max-new-tokens", "8"]) == 0
    first, second, third = asked
    assert first == ["What is 1?"] and third == ["What is 3?"]
    assert second == ["What is 1?", "abba", "What is 2?"]
    assert capsys.readouterr().out.count("abba\n") >= 2


def test_chat_forgets_the_oldest_turns_when_there_is_no_room(trained, asked, monkeypatch):
    questions = [f"What is {i}?" for i in range(5)]
    type_in(monkeypatch, *questions)
    assert lora.main([str(trained), "--chat", "--max-new-tokens", "20"]) == 0
    tokenizer = open_adapted(trained, None)[1]
    assert len(asked[4]) < 9 and [turns[-1] for turns in asked] == questions
    for turns in asked:  # whole turns, that fit in 128 tokens with an answer
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(turns)]
        assert turns[0].startswith("What") and len(turns) % 2
        assert len(prompt_tokens(messages, tokenizer)) <= 108


def test_merged_is_one_ordinary_model(trained, tmp_path, capsys):
    merged = tmp_path / "merged"
    assert lora.main([str(trained), "--merge", str(merged)]) == 0
    model = gpt.GPT.from_pretrained(merged).eval()
    unmerged = open_adapted(trained, None)[0]
    assert off(logits(model), logits(unmerged)) < rounding(unmerged)
    assert Tokenizer.load(merged).n_vocab == TOKENIZER.n_vocab
    assert (merged / "chat_template.jinja").read_text() == (
        trained / "model" / "chat_template.jinja"
    ).read_text()
    assert lora.main([str(merged), "--prompt", "What is 5?"]) == 0  # and is asked as any other
    assert capsys.readouterr().out == f"model: {merged}\nabba\n"


def test_mistakes_in_questions_are_named(trained, home, tmp_path, capsys):
    for argv, words in (
        ([trained], ["give one of --chat, --prompt and --merge"]),
        ([trained, "--chat", "--prompt", "x"], ["give one of"]),
        ([tmp_path / "nowhere", "--chat"], ["nowhere: has no adapter_config.json or config.json"]),
        ([home / "other", "--prompt", "x"], ["tokenizer"]),
        ([trained, "--merge", home / "gpt"], [str(home / "gpt"), "there is a model in it"]),
        ([trained, "--merge", trained / "model"], ["model: there is a model in it"]),
        ([home / "gpt", "--merge", tmp_path / "new"], ["no adapters"]),
        ([trained, "--prompt", "x", "--temperature", "-1"], ["temperature -1"]),
    ):
        error = refused(capsys, [str(arg) for arg in argv], lora.main)
        assert error.startswith("error: ") and all(word in error for word in words), error
    assert not (tmp_path / "new").exists()
    broken = tmp_path / "broken"
    shutil.copytree(trained / "model", broken)
    (broken / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors: no such file" in refused(capsys, [str(broken), "--chat"], lora.main)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("name", ["gpt", "untied", "moe"])
def test_flops(name, quantize, home):
    """6 per weight that learns and a token meets, 4 per one that is frozen, against counting by hand."""
    plain = open_model(home / name)
    c, full = plain.config, plain.flops_per_token(32)
    frozen = full - 2 * c.n_matmul_params
    shape = {"q_proj": (c.n_heads * 8, c.d_model), "down_proj": (c.d_model, c.d_ff)}
    if name == "moe":
        shape["experts.down_proj"] = (c.d_model, c.d_expert)
        del shape["down_proj"]
    for target, (N, D) in shape.items():
        used = c.top_k if "experts" in target else 1
        added = 6 * c.n_layers * 4 * (N + D) * used
        for start, times in (("zero", 1), ("pissa", 2)):
            config = Config(r=4, target_modules=target.replace(".", r"\."), init=start, quantize=quantize)
            model, _ = adapted(home / name, config)
            assert lora.flops_per_token(model, config, full) == frozen + times * added
    config = Config(method="ia3", quantize=quantize)
    assert lora.flops_per_token(adapted(home / name, config)[0], config, full) == frozen
    # The head is multiplied with every token, adapted or not; of an embedding only B is a product.
    config = Config(r=4, target_modules="embed_tokens|lm_head", quantize=quantize)
    added = 6 * 4 * (c.d_model + c.d_model + c.vocab_size)
    assert lora.flops_per_token(adapted(home / name, config)[0], config, full) == frozen + added


def test_flops_of_an_encoder(home):
    model, _ = adapted(home / "bert", small("lora"))
    full = bert.BERT.from_pretrained(home / "bert").flops_per_token(32)
    D, d_ff = 32, 48
    flops = lora.flops_per_token(model, small("lora"), full)
    assert full / 2 < flops < full
    layer = 4 * D * D + 2 * D * d_ff
    assert flops == full - 2 * 2 * layer + 6 * 2 * 4 * (4 * 2 * D + 2 * (D + d_ff))


def test_scales_and_starts_do_not_decay(home):
    """Weight decay pulls to 0, which is no change for A and B, but not for IA3's ones or PiSSA's start."""
    for adapter in ("lora", "dora", "ia3", "pissa"):
        model, _ = adapted(home / "gpt", small(adapter))
        names = {id(p): n.rpartition(".")[2] for n, p in model.named_parameters()}
        optimizers = optimizers_for(model, small(adapter))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        decayed = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"]}
        assert decayed == ({"lora_A", "lora_B"} if adapter in ("lora", "dora") else set())


def test_default_learning_rates():
    rates = {name: lora.learning_rate(config) for name, config in lora.ADAPTERS.items()}
    assert rates["lora"] == rates["dora"] == 2.0 and rates["lora+"] == 0.5 and rates["ia3"] == 60.0


def test_a_resumed_run_needs_the_same_base(home, tmp_path, capsys):
    base, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(home / "gpt", base)
    assert train.main(flags(home, out, base=base, steps=2)) == 0
    model = gpt.GPT.from_pretrained(base)
    model.model.embed_tokens.weight.data *= 1.5
    model.save_pretrained(base)
    assert "have changed" in refused(capsys, flags(home, out, base=base, steps=2, resume=True))


def test_the_base_may_be_elsewhere(home, tmp_path, capsys):
    adapter, moved = saved(home, tmp_path / "adapter", "gpt"), tmp_path / "moved"
    shutil.copytree(home / "gpt", moved)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "somebody/model"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    said = refused(capsys, [str(adapter), "--prompt", "Hello?"], lora.main)
    assert "somebody/model" in said and "--base" in said
    assert lora.main([str(adapter), "--base", str(moved), "--prompt", "Hello?"]) == 0  # and its tokenizer


def test_accumulated_batches_weigh_by_their_answers(home, tmp_path):
    """The mean over the tokens of all answers, however the rows are divided into batches."""
    told, questions = [], tmp_path / "questions.jsonl"
    questions.write_text("\n".join(json.dumps({"question": str(i), "answer": "a" * i}) for i in range(1, 15)))
    for out, batch_size in (("one", 4), ("four", 1)):
        options = dict(
            batch_size=batch_size, grad_accum=4 // batch_size, steps=1, eval_every=1, data=questions
        )
        assert train.main(flags(home, tmp_path / out, **options)) == 0
        told += [rows(tmp_path / out, key)[0] for key in ("loss", "grad_norm")]
    assert told[:2] == pytest.approx(told[2:], rel=1e-5)
