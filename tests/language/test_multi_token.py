"""Multi-token prediction: the decoder is that of gpt.py, and each head predicts its own token."""

import math
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import run_command
from small_gpt import SMALL, flags, rows
from torch.utils.flop_counter import FlopCounterMode

import gpt
import train
from data.tokenizer import get_tokenizer
from formats.open_model import open_model
from language import multi_token
from language.multi_token import Config, Heads, Module, MultiToken
from language.speculative import Counts, generate

V = 61
FIELDS = {name: getattr(SMALL, name) for name in ("n_layers", "n_heads", "d_model", "d_ff", "n_kv_heads")}
FIELDS |= {"vocab_size": V, "max_seq_len": 64, "kernels": "reference"}
KINDS = ("parallel", "sequential")


def small(modules: str = "parallel", **changes) -> MultiToken:
    """A random model in float64 whose outputs depend visibly on every weight."""
    torch.manual_seed(0)
    model = MultiToken(Config(**FIELDS | {"n_future": 3, "modules": modules} | changes)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def batch_of(T: int = 12) -> dict[str, torch.Tensor]:
    rows = torch.randint(V, (2, T + 1), generator=torch.Generator().manual_seed(1))
    return {"tokens": rows[:, :-1], "targets": rows[:, 1:].contiguous()}


@pytest.mark.parametrize("modules", KINDS)
def test_the_decoder_is_that_of_gpt_with_the_same_first_draws(modules):
    torch.manual_seed(0)
    expected = gpt.GPT(gpt.Config(**FIELDS))
    torch.manual_seed(0)
    model = MultiToken(Config(**FIELDS, modules=modules))
    tokens = batch_of()["tokens"]
    assert torch.equal(model(tokens), expected(tokens))
    options = {"generator": torch.Generator().manual_seed(3)}
    text = model.generate(tokens, 9, **options)
    assert text == expected.generate(tokens, 9, generator=torch.Generator().manual_seed(3))


def by_definition(model: MultiToken, batch: dict) -> list[torch.Tensor]:
    """Return the cross entropy of the logits of each place against the tokens that far ahead."""
    tokens, T = batch["tokens"], batch["tokens"].shape[1]
    z, rotation = model.trunk(tokens)
    last, states = model.model.layers[-1](z, rotation, None, None), []
    if model.config.modules == "parallel":
        blocks = [model.model.layers[-1], *model.further]
        states = [model.model.norm(block(z, rotation, None, None)) for block in blocks]
    else:
        states, h = [model.model.norm(last)], last
        for k, module in enumerate(model.further, 1):
            # Equations 21 to 23 of DeepSeek-V3, with the embedding first.
            n = T - k
            embedded = module.enorm(model.model.embed_tokens(tokens[:, k:]))
            x = module.eh_proj(torch.cat((embedded, module.hnorm(h[:, :n])), dim=-1))
            h = gpt.Block.forward(module, x, tuple(r[:, :n] for r in rotation), None, None)
            states.append(module.shared_head["norm"](h))
    losses = []
    for k, hidden in enumerate(states):
        logits = model.logits(hidden[:, : T - k])
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch["targets"][:, k:].flatten()))
    return losses


@pytest.mark.parametrize("modules", KINDS)
def test_losses_and_gradients_are_those_of_all_heads_at_once(modules):
    """Each over its own valid targets; heads that share z are weighted and summed, modules averaged."""
    model, batch = small(modules, future_weight=0.3), batch_of()
    total, metrics = model.loss(batch)
    (2 * total).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    losses = by_definition(model, batch)
    further = sum(losses[1:]) if modules == "parallel" else sum(losses[1:]) / 2
    expected = losses[0] + 0.3 * further
    (2 * expected).backward()
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=0)
    assert list(metrics) == ["next_token", "token_2", "token_3"]
    torch.testing.assert_close(list(metrics.values()), [loss.detach() for loss in losses], atol=1e-12, rtol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-12, rtol=0, msg=name)


@pytest.mark.parametrize("modules", KINDS)
def test_one_token_of_future_is_gpt(modules):
    model, batch = small(modules, n_future=1), batch_of()
    total, metrics = model.loss(batch)
    expected, _ = gpt.GPT.loss(model, batch)
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=0)
    assert list(metrics) == ["next_token"]
    with pytest.raises(ValueError, match="n_future 1: the model predicts the next token alone"):
        Heads(model)


def test_ignored_targets_count_for_no_head_and_frozen_weights_get_no_gradient():
    model, batch = small(), batch_of()
    batch["targets"][:, 4:] = -100
    model.model.embed_tokens.weight.requires_grad_(False)
    total, metrics = model.loss(batch)
    total.backward()
    shorter = batch_of()
    shorter = {"tokens": shorter["tokens"][:, :4], "targets": shorter["targets"][:, :4].contiguous()}
    with torch.no_grad():
        assert model.loss(shorter)[0].item() == pytest.approx(total.item(), abs=1e-12)
    assert (
        model.model.embed_tokens.weight.grad is None and model.further[0].mlp.up_proj.weight.grad is not None
    )


def test_further_heads_take_hardly_more_memory_in_training(peak_memory):
    """The logits of one head, 2 MB here, are gone before those of the next: three more heads, with layers of
    their own, take less than those logits alone."""
    changes = {"vocab_size": 2048, "kernels": "reference"}
    batch = {name: x.repeat(1, 10) for name, x in batch_of().items()}  # 240 tokens
    peaks = []
    for n in (1, 4):
        model = small(n_future=n, **changes).float()
        model.loss(batch)[0].backward()  # the gradients are there already
        peaks.append(peak_memory(lambda model=model: model.loss(batch)[0].backward()))
    logits = 240 * 2048 * 4
    assert peaks[1] - peaks[0] < logits < peaks[0]


@pytest.mark.parametrize("modules", KINDS)
def test_flops_are_those_of_the_products(modules):
    config = Config(**FIELDS | {"n_future": 3, "modules": modules, "window": 5})
    model, T = MultiToken(config), 12
    weights = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    assert config.n_matmul_params == sum(p.numel() for p in weights) + 3 * V * config.d_model
    deeper = config.with_further_layers
    attention = deeper.flops_per_token(T) - 6 * deeper.n_matmul_params
    assert config.flops_per_token(T) == 6 * config.n_matmul_params + attention
    if modules == "parallel":  # heads are trained in turn by a gradient that the counter cannot follow
        return
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.loss(batch_of(T))
    # The formula counts 3 times forward. Modules leave out the last tokens, and attention here computes the
    # scores that the mask hides too.
    assert 0.85 < 3 * counter.get_total_flops() / (config.flops_per_token(T) * 2 * T) < 1.15


def test_names_inside_a_module_are_those_of_the_published_weights():
    names = {
        name.removesuffix(".weight") for name, _ in Module(small("sequential").config, 2).named_parameters()
    }
    block = {
        name.removesuffix(".weight") for name, _ in gpt.Block(gpt.Config(**FIELDS), 0).named_parameters()
    }
    assert names - block == {"enorm", "hnorm", "eh_proj", "shared_head.norm"} and block < names


def prompts_of(n: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(V, (1 + 2 * i,), generator=generator).tolist() for i in range(n)]


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("modules", KINDS)
def test_text_by_its_own_guesses_is_that_without(modules, positions):
    model, counts = small(modules, positions=positions, window=6), Counts()
    expected = model.generate(prompts_of(4), 12, temperature=0)
    assert generate(model, Heads(model), prompts_of(4), 12, temperature=0, counts=counts) == expected
    assert counts.tested > 0


def test_guesses_are_the_likeliest_tokens_of_the_heads_after_the_whole_text():
    """With the last tokens as predicted by each head in one pass over the text, from the trunk at its end."""
    for modules in KINDS:
        model, tried = small(modules), []
        heads = Heads(model)
        propose = heads.propose

        def record(texts, n, *rest, propose=propose, tried=tried):
            tried.append(([list(text) for text in texts], propose(texts, n, *rest)))
            return tried[-1][1]

        heads.propose = record
        generate(model, heads, prompts_of(3), 9, temperature=0, n_drafts=2)
        assert len(tried) > 2
        for texts, proposal in tried:
            for text, guesses in zip(texts, proposal.tokens.tolist(), strict=True):
                assert guesses == expected_guesses(model, text)[: len(guesses)]


def expected_guesses(model: MultiToken, text: list[int]) -> list[int]:
    """Return the guesses behind a text by one pass without a cache; its last token is read by no head."""
    tokens = torch.tensor([text])
    z, rotation = model.trunk(tokens[:, :-1])
    if model.config.modules == "parallel":
        states = [model.model.norm(block(z, rotation, None, None)) for block in model.further]
    else:
        last, module = model.model.layers[-1](z, rotation, None, None), model.further[0]
        h = module(last, model.model.embed_tokens(tokens[:, 1:]), rotation, None, None)
        states = [module.shared_head["norm"](h)]
    return [int(model.logits(x[0, -1]).argmax()) for x in states]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="n_future 0: expected at least 1"):
        Config(**FIELDS, n_future=0)
    with pytest.raises(ValueError, match="modules"):
        Config(**FIELDS, modules="serial")
    model = MultiToken(Config(**FIELDS, modules="sequential", n_future=4))
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="rows of 3 tokens: expected at least n_future 4"):
        model.loss({"tokens": tokens, "targets": tokens})


def test_shards_of_weights_are_refused():
    with pytest.raises(ValueError, match="--parallel fsdp: the loss needs all weights of the heads"):
        multi_token.load_data(Namespace(parallel="fsdp"), Config(**vars(SMALL)))


def test_it_trains_saves_opens_and_continues_a_text(tmp_path, monkeypatch):
    from language import multi_token

    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 60)
    tiny = Config(1, 2, 16, 24, n_future=3)
    monkeypatch.setitem(multi_token.SIZES, "tiny", tiny)
    out = tmp_path / "run"
    assert train.main(flags(text, out, model="multi_token", steps=40, eval_every=40, lr=0.01)) == 0
    model = open_model(out / "model")
    assert model.config.n_future == 3
    # Both are of the next token alone, and a byte is a token here.
    last = [row for row in rows(out) if "val_loss" in row][-1]
    assert last["perplexity"] == pytest.approx(math.exp(last["val_next_token"]))
    assert last["bits_per_byte"] == pytest.approx(last["val_next_token"] / math.log(2), rel=0.01)
    tokens = torch.tensor([get_tokenizer("bytes").encode("one two three four")])
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:].contiguous()}
    with torch.no_grad():
        _, metrics = model.loss(batch)
        torch.manual_seed(0)
        _, before = MultiToken(replace(model.config)).loss(batch)
    assert all(metrics[name] < before[name] - 1 for name in metrics)

    command = ("-m", "language.multi_token")
    written = ("--prompt", "one", "--temperature", "0", "--max-new-tokens", "9")
    done = run_command(*command, out / "model", *written)
    assert done.code == 0 and done.out == run_command("generate.py", out / "model", *written).out
    assert "guesses accepted" in done.err
    assert "tiny" in run_command(*command).out
    gpt.GPT(gpt.Config(**FIELDS | {"kernels": "auto"})).save_pretrained(tmp_path / "plain")
    done = run_command(*command, tmp_path / "plain")
    assert done.code == 2 and "no model of language.multi_token.py; open it by python gpt.py" in done.err
