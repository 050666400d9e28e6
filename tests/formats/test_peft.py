"""Adapters in PEFT's format: read against what peft computed (recorded), written and read by peft again."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
from bert import BERT
from formats.open_model import open_model
from formats.peft import EMBEDDINGS, SavedAdapter, read, write
from gpt import GPT
from moe import MoEGPT

FIXTURES = Path(__file__).parents[1] / "fixtures"
ADAPTERS = FIXTURES / "adapters"
RECORDED = sorted(path.name for path in ADAPTERS.iterdir())
LORA = {"method": "lora", "r": 2, "alpha": 4.0, "rank_stabilized": False, "dropout": 0.0}
MODELS = {"olmoe": MoEGPT, "mixtral": MoEGPT, "qwen3-moe": MoEGPT, "dots1": MoEGPT}
MODELS |= dict.fromkeys(("bert-mlm", "bert-model", "roberta-mlm", "electra-generator"), BERT)
MODELS |= dict.fromkeys(("modernbert-mlm", "albert-pretraining"), BERT)


def base_of(name):
    return MODELS.get(name, GPT).from_pretrained(FIXTURES / name).eval()


def base_name(name):
    """The checkpoint of a recorded adapter."""
    base = name.split("-")[0]
    return "modernbert-mlm" if base == "modernbert" else base


def recorded(name):
    model = base_of(base_name(name))
    return model, read(ADAPTERS / name, model), load_file(ADAPTERS / name / "expected.safetensors")


@torch.no_grad()
def merge(model, adapter):
    """Change the weights of model to what the adapter makes of them, straight from the definitions."""
    state = model.state_dict()
    for path, layer in adapter.layers.items():
        weight = state.get(f"{path}.weight", state.get(path))
        wide = (weight.T if path.endswith(EMBEDDINGS) else weight).double()
        if "ia3_l" in layer:
            wide = wide * layer["ia3_l"]
            if layer["ia3_l"].shape[1] == 1 and f"{path}.bias" in state:
                state[f"{path}.bias"].mul_(layer["ia3_l"][:, 0])
        else:
            wide = wide + layer["scale"] * layer["lora_B"].double() @ layer["lora_A"].double()
        if "lora_magnitude_vector" in layer:
            wide = layer["lora_magnitude_vector"][:, None] * wide / wide.norm(dim=1, keepdim=True)
        weight.copy_(wide.T if path.endswith(EMBEDDINGS) else wide)
    return model


def random_adapter(model, paths, method="lora", scales=(2.0,), ranks=(2,), **fields):
    """An adapter of these layers, which take turns with the scales and ranks."""
    generator = torch.Generator().manual_seed(0)
    state, layers = model.state_dict(), {}
    for i, path in enumerate(paths):
        weight = state.get(f"{path}.weight", state.get(path))
        if path.endswith(EMBEDDINGS):
            weight = weight.T
        *E, D_out, D_in = weight.shape
        r = ranks[i % len(ranks)]
        draw = lambda *shape: 0.3 * torch.randn(*shape, generator=generator)  # noqa: E731
        if method == "ia3":
            of_input = path.endswith(("down_proj", "output.dense"))
            layers[path] = {"ia3_l": 1 + draw(1, D_in) if of_input else 1 + draw(D_out, 1)}
            continue
        layers[path] = {"lora_A": draw(*E, r, D_in), "lora_B": draw(*E, D_out, r)}
        layers[path]["scale"] = scales[i % len(scales)]
        if method == "dora":
            layers[path]["lora_magnitude_vector"] = weight.norm(dim=1) * (1 + draw(D_out))
    return SavedAdapter(LORA | {"method": method} | fields, layers, None, None)


def assert_same(layers, others):
    assert layers.keys() == others.keys()
    for path, layer in layers.items():
        other = others[path]
        assert layer.keys() == other.keys()
        assert layer.get("scale", 0) == pytest.approx(other.get("scale", 0), rel=1e-12)
        assert all(w.equal(other[kind]) for kind, w in layer.items() if kind != "scale")


@pytest.mark.parametrize("name", RECORDED)
def test_logits_equal_peft(name):
    model, adapter, expected = recorded(name)
    with torch.no_grad():
        logits = merge(model, adapter)(expected["tokens"])
    tolerance = max(1e-5, 5 * expected["logits64_error"].item())  # the reference's own float32 noise
    assert (logits - expected["logits"]).abs().max() < tolerance
    assert (logits - expected["merged"]).abs().max() < tolerance


@pytest.mark.parametrize("name", RECORDED)
def test_written_and_read_again_is_the_same(name, tmp_path):
    """Fused layers too: their three have one lora_A."""
    model, adapter, _ = recorded(name)
    write(tmp_path, model, adapter._replace(fingerprint="abc"))
    again = read(tmp_path, model)
    assert_same(again.layers, adapter.layers)
    assert again.fields | {"target_modules": ()} == adapter.fields | {"target_modules": ()}
    assert (again.base, again.fingerprint, adapter.fingerprint) == (base_name(name), "abc", None)
    theirs, ours = (load_file(path / "adapter_model.safetensors") for path in (ADAPTERS / name, tmp_path))
    theirs = {key: w for key, w in theirs.items() if ".base_layer.weight" not in key}
    assert theirs.keys() == ours.keys() and all(w.equal(ours[key]) for key, w in theirs.items())


def test_what_is_read():
    _, adapter, _ = recorded("llama-dora")
    assert adapter.fields == {
        "method": "dora", "r": 4, "alpha": 8.0, "rank_stabilized": False, "dropout": 0.0,
        "target_modules": ("down_proj", "q_proj", "v_proj"),
    }  # fmt: skip
    assert recorded("llama-ia3")[1].fields["method"] == "ia3"
    layers = recorded("llama-rslora")[1].layers
    assert {layer["scale"] for layer in layers.values()} == {8 / math.sqrt(4)}
    layers = recorded("gpt2-lora")[1].layers
    assert {path.rpartition(".")[2] for path in layers} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj",
    }  # fmt: skip
    q, k = (layers[f"model.layers.0.self_attn.{letter}_proj"] for letter in "qk")
    assert q["lora_A"].equal(k["lora_A"]) and q["lora_A"].data_ptr() != k["lora_A"].data_ptr()
    layers = recorded("modernbert-dora")[1].layers
    assert {path.removeprefix(f"{BERT_LAYER}3.") for path in layers if f"{BERT_LAYER}3." in path} == {
        *BERT_QKV, "attention.output.dense", "intermediate.dense", "output.dense",
    }  # fmt: skip
    q, k = (layers[f"{BERT_LAYER}0.{end}"] for end in BERT_QKV[:2])
    assert q["lora_A"].equal(k["lora_A"]) and q["lora_magnitude_vector"].shape == (18,)
    layers = recorded("olmoe-experts")[1].layers
    assert layers["model.layers.1.mlp.experts.gate_up_proj"]["lora_A"].shape == (8, 3, 32)
    assert layers["model.layers.1.mlp.experts.down_proj"]["lora_B"].shape == (8, 32, 2)


def test_patterns_are_matched_as_peft_does():
    """A pattern means the end of a path from a dot on; the first that matches counts."""
    layers = recorded("llama-patterns")[1].layers
    found = {
        path.removeprefix("model.layers."): (layer["lora_A"].shape[0], layer["scale"])
        for path, layer in layers.items()
    }
    assert found == {
        "0.self_attn.q_proj": (4, 5 / 4), "0.self_attn.v_proj": (2, 3 / 2), "0.self_attn.o_proj": (4, 3 / 4),
        "0.mlp.up_proj": (4, 8 / 4), "0.mlp.down_proj": (3, 8 / 3),
        "1.self_attn.q_proj": (4, 3 / 4), "1.self_attn.v_proj": (2, 3 / 2), "1.self_attn.o_proj": (4, 3 / 4),
        "1.mlp.up_proj": (1, 0.5), "1.mlp.down_proj": (1, 8.0),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama-lora", "modernbert-dora"])
def test_an_adapter_of_a_model_without_heads(name, tmp_path):
    model, adapter, _ = recorded(name)
    file = copy_of(name, tmp_path) / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key.replace("model.model.layers", "model.layers"): w for key, w in tensors.items()}, file)
    assert_same(read(tmp_path, model).layers, adapter.layers)


def copy_of(name, to, **changes):
    """A copy of a recorded adapter with other values in its adapter_config.json."""
    shutil.copytree(ADAPTERS / name, to, dirs_exist_ok=True)
    hf = json.loads((to / "adapter_config.json").read_text()) | changes
    (to / "adapter_config.json").write_text(json.dumps(hf))
    return to


def layer_paths(*ends, n_layers=2):
    return [f"model.layers.{i}.{end}" for i in range(n_layers) for end in ends]


def bert_paths(*ends, n_layers=2):
    return [f"{BERT_LAYER}{i}.{end}" for i in range(n_layers) for end in ends]


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
BERT_LAYER = "bert.encoder.layer."
BERT_QKV = ("attention.self.query", "attention.self.key", "attention.self.value")
WRITTEN = {
    "layers that differ": (
        "llama",
        [*layer_paths("self_attn.q_proj", "mlp.up_proj"), "model.layers.1.mlp.down_proj", "lm_head"],
        {"ranks": (1, 2, 3), "scales": (0.7, 2.0), "dropout": 0.1},
    ),
    "rank stabilised": (
        "llama",
        layer_paths(*QKV),
        {"ranks": (2, 3), "scales": (1.3,), "rank_stabilized": True},
    ),
    "dora": ("llama", ["model.embed_tokens", *layer_paths(*QKV)], {"method": "dora", "ranks": (2, 3)}),
    "ia3": ("llama", layer_paths(*QKV, "mlp.down_proj"), {"method": "ia3"}),
    "ia3 of one layer": ("llama", ["model.layers.1.mlp.down_proj"], {"method": "ia3"}),
    "gpt2": ("gpt2", ["model.embed_positions", *layer_paths(*QKV, "self_attn.o_proj", "mlp.up_proj")], {}),
    "gpt2, different": ("gpt2", layer_paths(*QKV), {"ranks": (1, 2, 3), "scales": (0.5, 2.0)}),
    "gpt2, not all": (
        "gpt2",
        ["model.layers.0.self_attn.v_proj", *layer_paths("self_attn.q_proj", "mlp.down_proj")],
        {},
    ),
    "gpt2, dora": (
        "gpt2",
        layer_paths(*QKV),
        {"method": "dora", "scales": (1.0, 2.0), "rank_stabilized": True},
    ),
    "gpt2, ia3": (
        "gpt2",
        layer_paths("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"),
        {"method": "ia3"},
    ),
    "experts": ("olmoe", layer_paths(*EXPERTS, "self_attn.o_proj"), {"ranks": (2, 3, 2), "dropout": 0.1}),
    "experts of some layers": (
        "olmoe",
        ["model.layers.0.mlp.experts.down_proj", *layer_paths(EXPERTS[0])],
        {"ranks": (1, 2)},
    ),
    "mixtral": ("mixtral", layer_paths(*EXPERTS, "mlp.gate", *QKV), {"scales": (1.0, 2.0)}),
    "a dense layer beside experts": (
        "qwen3-moe",
        [f"model.layers.{end}" for end in ("0.mlp.up_proj", "0.mlp.down_proj", "1.mlp.experts.down_proj")],
        {"ranks": (2, 3)},
    ),
    "shared experts": (
        "dots1",
        ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.shared_experts.gate_proj", *layer_paths(*QKV)],
        {},
    ),
    "bert": (
        "bert-mlm",
        [f"{BERT_LAYER}{i}.{end}" for i in (0, 1) for end in ("attention.self.query", "output.dense")],
        {},
    ),
    "bert, dora of one layer": (
        "bert-mlm",
        ["bert.embeddings.position_embeddings", f"{BERT_LAYER}1.attention.output.dense"],
        {"method": "dora"},
    ),
    "bert without heads": ("bert-model", [f"{BERT_LAYER}{i}.attention.self.value" for i in (0, 1)], {}),
    "roberta": (
        "roberta-mlm",
        ["cls.predictions.transform.dense", *(f"{BERT_LAYER}{i}.output.dense" for i in (0, 1))],
        {"method": "ia3"},
    ),
    "electra": (
        "electra-generator",
        ["bert.embeddings_project", f"{BERT_LAYER}0.intermediate.dense"],
        {"ranks": (1, 2)},
    ),
    "modernbert": (
        "modernbert-mlm",
        [
            "cls.predictions.transform.dense",
            *bert_paths(
                *BERT_QKV, "attention.output.dense", "intermediate.dense", "output.dense", n_layers=4
            ),
        ],
        {"scales": (1.0,)},
    ),
    "modernbert, different": (
        "modernbert-mlm",
        bert_paths(*BERT_QKV),
        {"ranks": (1, 2, 3), "scales": (0.5, 2.0)},
    ),
    "modernbert, not all": (
        "modernbert-mlm",
        [f"{BERT_LAYER}0.{BERT_QKV[2]}", *bert_paths(BERT_QKV[0], "output.dense")],
        {"rank_stabilized": True},
    ),
    "modernbert, dora": (
        "modernbert-mlm",
        bert_paths(*BERT_QKV, "intermediate.dense"),
        {"method": "dora", "scales": (1.0, 2.0)},
    ),
    "modernbert, ia3": (
        "modernbert-mlm",
        bert_paths(BERT_QKV[1], BERT_QKV[2], "output.dense", n_layers=4),
        {"method": "ia3"},
    ),
}
FUSED = ("gpt2", "modernbert-mlm")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", WRITTEN)
def test_peft_opens_what_we_write(case, tmp_path):
    """No key is missing or left over, and PEFT computes the function of the adapter."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    name, paths, options = WRITTEN[case]
    model = base_of(name)
    adapter = random_adapter(model, paths, **options)
    write(tmp_path, model, adapter)
    loader = transformers.AutoModelForCausalLM
    if isinstance(model, BERT):
        loader = transformers.AutoModelForMaskedLM if model.config.mlm_head else transformers.AutoModel
    options = {"experts_implementation": "eager"} if isinstance(model, MoEGPT) else {}
    base = loader.from_pretrained(FIXTURES / name, attn_implementation="eager", **options).eval()
    tokens = torch.arange(24).view(2, 12) % 90 + 5
    with torch.no_grad():
        plain = base(tokens)[0]
        opened = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        result = opened.load_adapter(tmp_path, "again")
        assert not [key for key in result.missing_keys if "again" in key] and not result.unexpected_keys
        theirs = opened(tokens)[0]
        merged = merge(model, adapter)
        ours = merged.hidden(tokens) if name == "bert-model" else merged(tokens)
    assert (theirs - plain).abs().max() > 0.1
    assert (ours - theirs).abs().max() < 5e-5


@pytest.mark.parametrize("case", WRITTEN)
def test_what_we_write_means_the_same_when_read(case, tmp_path):
    name, paths, options = WRITTEN[case]
    model = base_of(name)
    adapter = random_adapter(model, paths, **options)
    write(tmp_path, model, adapter)
    again = read(tmp_path, model)
    before, after = (merge(base_of(name), one).state_dict() for one in (adapter, again))
    assert all(torch.allclose(before[key], w, atol=1e-6) for key, w in after.items())
    if name not in FUSED:
        assert_same(again.layers, adapter.layers)


@pytest.mark.parametrize(
    "case, targets",
    [
        ("layers that differ", ["lm_head", "model.layers.1.mlp.down_proj", "q_proj", "up_proj"]),
        ("ia3", ["k_proj", "q_proj", "v_proj", "down_proj"]),
        ("gpt2", ["attn.c_proj", "c_attn", "c_fc", "wpe"]),
        ("experts", ["o_proj"]),
        ("modernbert", ["Wi", "Wo", "Wqkv", "dense"]),
        ("modernbert, ia3", ["Wqkv", "mlp.Wo"]),
        (
            "bert",
            ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.dense", "query"],
        ),
    ],
)
def test_targets_are_short_where_all_layers_have_them(case, targets, tmp_path):
    name, paths, options = WRITTEN[case]
    model = base_of(name)
    write(tmp_path, model, random_adapter(model, paths, **options))
    hf = json.loads((tmp_path / "adapter_config.json").read_text())
    assert hf["target_modules"] == targets
    if case == "experts":
        assert hf["target_parameters"] == ["down_proj", "gate_up_proj"]
        assert (hf["rank_pattern"], hf["lora_dropout"]) == ({"down_proj": 3}, 0.0)
    if case == "ia3":
        assert hf["feedforward_modules"] == ["down_proj"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "LOHA"}, r"adapter_config\.json: peft_type 'LOHA' is not implemented"),
        ({"bias": "all"}, "bias 'all' is not implemented; expected 'none'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] is not implemented"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora True"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"new_key": 3}, "new_key 3 is not implemented; remove the key only if it has no effect"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights 'pissa_niter_4' changed the base's weights",
        ),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"r": 0}, "r 0: expected a whole number of at least 1"),
        ({"r": None}, "r None"),
        ({"lora_alpha": "8"}, "lora_alpha '8': expected int or float"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern 'q_proj' 0: expected a whole number"),
        ({"rank_pattern": {"q_proj(": 4}}, r"rank_pattern 'q_proj\(' is not a pattern"),
        ({"rank_pattern": [4]}, r"rank_pattern \[4\]: expected dict"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern 'q_proj' '8': expected a number"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern 'q_proj' nan: expected a number"),
        ({"rank_pattern": {"q_proj": True}}, "rank_pattern 'q_proj' True: expected a whole number"),
        ({"r": 3}, r"lora_A has shape \(4, .*: expected \(3, D_in\) for rank 3 by adapter_config"),
        ({"rank_pattern": {"1.self_attn.q_proj": 2}}, r"layers\.1\.self_attn\.q_proj\.lora_A .* for rank 2"),
        ({"use_dora": True}, r"lora_magnitude_vector is missing; expected lora_A and lora_B and"),
        ({"peft_type": "IA3"}, r"is missing; expected ia3_l for ia3"),
        ({"target_parameters": ["q_proj.weight"]}, None),  # the same tensors either way
        ({"new_key": None, "other": {}, "init_lora_weights": "gaussian", "use_rslora": None}, None),
    ],
)
def test_config_keys(changes, message, tmp_path):
    directory = copy_of("llama-lora", tmp_path, **changes)
    if message is None:
        assert_same(read(directory, base_of("llama")).layers, recorded("llama-lora")[1].layers)
        return
    with pytest.raises(ValueError, match=message) as error:
        read(directory, base_of("llama"))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
EXPERT = "base_model.model.model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("llama-lora", {f"{Q}.lora_B.weight": None}, rf"{Q}\.lora_B is missing; expected lora_A and lora_B"),
        ("llama-lora", {f"{Q}.lora_B.weight": (32, 3)}, r"lora_B has shape \(32, 3\): .*\(D_out, 4\)"),
        ("llama-lora", {f"{Q}.lora_A.weight": (4,)}, r"q_proj\.lora_A has shape \(4,\)"),
        ("llama-lora", {f"{Q}.lora_magnitude_vector": (32,)}, "lora_magnitude_vector has no place there"),
        ("llama-lora", {f"{Q}.lora_C.weight": (4, 4)}, r"lora_C\.weight fits no layer .* such as base_model"),
        ("llama-lora", {f"{Q}x.lora_A.weight": (4, 32)}, r"q_projx\.lora_A\.weight fits no layer"),
        ("llama-lora", {"model.layers.0.self_attn.q_proj.lora_A.weight": (4, 32)}, "fits no layer"),
        ("llama-lora", {"base_model.model.model.embed_tokens.weight": (96, 32)}, "fits no layer"),
        ("llama-dora", {f"{Q}.lora_magnitude_vector": (31,)}, r"has shape \(31,\): expected \(D_out,\)"),
        ("llama-ia3", {f"{Q}.ia3_l": (32,)}, r"ia3_l has shape \(32,\): expected \(D_out, 1\)"),
        ("olmoe-experts", {f"{EXPERT}.lora_A.weight": (15, 8)}, r"\(16, D_in\) for rank 2 .*, 8 experts"),
        ("olmoe-experts", {f"{EXPERT}.base_layer.base_layer.lora_A.weight": (16, 8)}, "fits no layer"),
        (
            "olmoe-experts",
            {f"{EXPERT}.lora_A.weight": None, f"{EXPERT}.lora_B.weight": None},
            r"no tensors of model\.layers\.0\.mlp\.experts\.down_proj; expected those of the targets",
        ),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(name, changes, message, tmp_path):
    file = copy_of(name, tmp_path) / "adapter_model.safetensors"
    tensors = load_file(file) | {key: shape and torch.zeros(shape) for key, shape in changes.items()}
    save_file({key: w for key, w in tensors.items() if w is not None}, file)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, base_of(name.split("-")[0]))
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_broken_files_are_named(tmp_path):
    model = base_of("llama")
    config = copy_of("llama-lora", tmp_path) / "adapter_config.json"
    file = tmp_path / "adapter_model.safetensors"
    save_file({}, tmp_path / "empty")
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:20], b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors: damaged"):
            read(tmp_path, model)
    (tmp_path / "empty").rename(file)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: no tensors of an adapter"):
        read(tmp_path, model)
    file.unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: no such file") as error:
        read(tmp_path, model)
    assert "adapter_model.bin" not in str(error.value)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(ValueError, match=r"adapter_model\.bin is not read: it is a pickle"):
        read(tmp_path, model)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json: not JSON"):
        read(tmp_path, model)
    config.unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json: no such file"):
        read(tmp_path, model)


@pytest.mark.parametrize(
    "name, paths, method, message",
    [
        ("llama", ["model.layers.7.self_attn.q_proj"], "lora", r"layers\.7\.self_attn\.q_proj: no layer"),
        ("llama", [], "lora", "nothing: no layer"),
        ("olmoe", [f"model.layers.0.{EXPERTS[0]}"], "dora", "dora of .* peft has none; .* target_modules"),
        ("olmoe", [f"model.layers.0.{EXPERTS[0]}"], "ia3", "ia3 of stacked experts"),
        ("gpt2", layer_paths(QKV[0], QKV[2]), "dora", r"layers\.0\.self_attn\.k_proj missing: .* magnitudes"),
        ("gpt2", layer_paths(*QKV), "ia3", "the input of which can only be scaled for all three alike"),
        ("modernbert-mlm", bert_paths(*BERT_QKV[1:]), "dora", r"layer\.0\.attention\.self\.query missing"),
        ("modernbert-mlm", bert_paths(*BERT_QKV), "ia3", "the input of which can only be scaled for all"),
        ("albert-pretraining", ["bert.encoder.layer.0.output.dense"], "lora", "adapters of albert are not"),
    ],
)  # fmt: skip
def test_what_the_format_has_no_place_for_is_refused_before_anything_is_written(
    name, paths, method, message, tmp_path
):
    model = base_of(name)
    layers = {
        path: {"lora_A": torch.ones(1, 24), "lora_B": torch.ones(24, 1), "scale": 1.0} for path in paths
    }
    if method == "ia3":
        layers = {
            path: {"ia3_l": torch.ones(1, 24) if path.endswith(("q_proj", "query")) else torch.ones(24, 1)}
            for path in paths
        }
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "new", model, SavedAdapter(LORA | {"method": method}, layers, None, None))
    assert not (tmp_path / "new").exists()


def test_an_adapter_of_an_embedding_that_is_no_lora_is_refused_before_the_model_changes(tmp_path):
    """PEFT can train a DoRA of one, whose magnitudes have no place in posttraining/adapters.py."""
    model = base_of("llama")
    paths = ["model.embed_tokens", "model.layers.0.self_attn.q_proj"]
    write(tmp_path, model, random_adapter(model, paths, method="dora"))
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"dora cannot adapt the embedding model\.embed_tokens") as error:
        lora.load_adapter(model, tmp_path)
    assert str(tmp_path) in str(error.value) and [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("name", ["t5", "bart", "electra-discriminator", "vit", "llava", "deberta-v3"])
def test_a_model_whose_adapters_have_no_names_is_refused_before_training(name):
    model = open_model(FIXTURES / name).bfloat16()
    with pytest.raises(ValueError, match=r"adapters of \w+ are not implemented; expected"):
        lora.prepare_base(model, lora.Config())
    assert next(model.parameters()).dtype == torch.bfloat16
