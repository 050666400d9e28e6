"""Upcycling: the mixture begins as the dense model, and its experts grow apart."""

from dataclasses import replace

import pytest
import torch
from conftest import rows_of, run_command

from data.tokenizer import get_tokenizer
from gpt import GPT, make_batch
from gpt import Config as DenseConfig
from language.upcycle import from_dense
from moe import MoEGPT

DENSE = DenseConfig(2, 4, 32, 48, vocab_size=61, max_seq_len=32, n_kv_heads=2)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "tie_embeddings": False}, {"window": 4}])
def test_upcycling_starts_with_the_dense_models_outputs_and_parts_from_there(changes):
    torch.manual_seed(0)
    dense = GPT(replace(DENSE, **changes))
    sparse = from_dense(dense, 8, top_k=3)
    tokens = torch.randint(61, (3, 17), generator=torch.Generator().manual_seed(1))
    batch = make_batch(rows_of(tokens), sparse.config, torch.Generator())
    # the weights of three equal experts add up to 1 within rounding
    torch.testing.assert_close(sparse(batch["tokens"]), dense(batch["tokens"]), atol=1e-6, rtol=1e-5)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse.loss(batch)[0].backward()
    optimizer.step()
    experts = sparse.sparse_layers[0].experts.down_proj.weight
    assert not torch.equal(experts[0], experts[1])


def test_upcycling_can_leave_layers_dense_and_keeps_the_precision():
    dense = GPT(DENSE).bfloat16()
    sparse = from_dense(dense, 4, dense_layers=(0,))
    assert len(sparse.sparse_layers) == 1 and sparse.head_weight.dtype == torch.bfloat16
    tokens = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(1))
    assert torch.equal(sparse(tokens), dense(tokens))  # twice a half of the same, added up in float32


def test_upcycling_needs_a_gated_mlp():
    gelu = GPT(replace(DENSE, mlp="gelu", norm="layer", bias=True))
    with pytest.raises(ValueError, match="mlp 'gelu', bias True: experts are swiglu"):
        from_dense(gelu, 4)


def test_upcycling_from_the_command_line(tmp_path):
    tokenizer = get_tokenizer("bytes")
    dense = GPT(replace(DENSE, vocab_size=tokenizer.n_vocab, eos_token_id=tokenizer.eot_id))
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save(tmp_path / "dense")

    upcycle = "-m language.upcycle"
    for file, arguments, error in (
        ("moe.py", ("--upcycle", 4, "--out", tmp_path / "sparse"), "python -m language.upcycle"),
        (upcycle, ("--experts", 1, "--out", tmp_path / "sparse"), "--experts 1: expected at least 2 experts"),
        (upcycle, ("--experts", 4, "--out", tmp_path / "dense"), "there is a model in it"),
    ):
        done = run_command(*file.split(), tmp_path / "dense", *arguments)
        assert done.code == 2 and error in done.err and done.err.count("\n") == 1
    done = run_command(*upcycle.split(), tmp_path / "dense", "--experts", 4, "--out", tmp_path / "sparse")
    assert done.code == 0 and "active" in done.out, done.err
    sparse = MoEGPT.from_pretrained(tmp_path / "sparse")
    tokens = torch.randint(200, (1, 16))
    torch.testing.assert_close(sparse(tokens), dense(tokens), atol=1e-6, rtol=1e-5)
