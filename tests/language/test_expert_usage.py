"""The usage of experts against the routing itself, and the report written out."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import moe
from data.text import HeldOut
from data.tokenizer import get_tokenizer
from language.expert_usage import Usage, report, usage
from moe import Config, MoEGPT

SWITCH = Config(
    2, 4, 32, 48, 61, 32, n_kv_heads=2, qk_norm=True, n_experts=6, top_k=1, d_expert=20, router="switch",
    renormalize=False, capacity_factor=0.75,
)  # fmt: skip


@pytest.mark.usefixtures("rendered")
def test_usage_is_what_the_routing_was(tmp_path):
    tokenizer = get_tokenizer("bytes")
    config = replace(SWITCH, vocab_size=tokenizer.n_vocab, eos_token_id=tokenizer.eot_id)
    torch.manual_seed(0)
    model = MoEGPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    text = torch.tensor(tokenizer.encode("the plinth carries the column, the column carries the roof; " * 10))
    rows = text[: 6 * 32].view(6, 32)
    used = usage(model, rows)
    assert used.loads.sum(dim=1).tolist() == [192.0, 192.0] and sum(used.chosen.values()) == 192
    assert used.seen == Counter(rows.flatten().tolist())
    by_expert = [sum(n for (e, _), n in used.chosen.items() if e == expert) for expert in range(6)]
    assert by_expert == used.loads[1].tolist()
    room = math.ceil(0.75 * 192 / 6)
    assert used.dropped == pytest.approx(sum(max(0, n - room) for n in used.loads.flatten().tolist()) / 384)
    layer = model.train().sparse_layers[0]  # the first, before which nothing was dropped
    routing = layer.gate(
        model.model.layers[0].post_attention_layernorm(model.model.embed_tokens(rows)).flatten(0, 1)
    )
    assert model.dropped(routing.load(), 192) == (routing.weights == 0).float().mean()
    held_out = HeldOut(text.numpy(), 32, n_bytes=len(text))
    dataset = SimpleNamespace(tokenizer=tokenizer, val=held_out)
    shown = moe.show(model.eval(), dataset, tmp_path)
    assert "training on this would drop" in shown and (tmp_path / "experts.png").stat().st_size > 5000


def test_the_report_says_who_gets_what():
    tokenizer = get_tokenizer("bytes")
    a, b, rare = (tokenizer.encode(letter)[0] for letter in "abc")
    chosen = Counter({(0, a): 30, (1, a): 10, (1, b): 20, (0, rare): 2, (1, rare): 2})
    loads, entropy = torch.tensor([[10.0, 30.0], [32.0, 32.0]]), torch.tensor([0.25, 0.5])
    used = Usage([1, 3], loads, entropy, None, Counter({a: 40, b: 20, rare: 4}), chosen)
    assert report(used, tokenizer).splitlines() == [
        "layer  1 |▂▆| load 0.50 to 1.50 of the mean, router entropy 0.25 of 0.69 nats",
        "layer  3 |▄▄| load 1.00 to 1.00 of the mean, router entropy 0.50 of 0.69 nats",
        "layer 3: the tokens that an expert gets most of",
        "expert 0: 'a' 75%",
        "expert 1: 'b' 100%  'a' 25%",
    ]
