"""BART and PEGASUS against transformers (recorded), published figures, and their directories."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.tokenizer import Tokenizer
from formats.bart import Decoding, ours, theirs
from formats.open_model import open_model
from formats.tokenizer_json import END_OF_TEXT, GPT2_PATTERN
from language import beam_search
from language.bart import BART, SIZES, Config
from language.beam_search import Decoder, Rules

FIXTURES = Path(__file__).parents[1] / "fixtures"
SMALL = Config(2, 4, 32, 40, vocab_size=61, max_seq_len=40, n_decoder_layers=3)
PEGASUS = {"pegasus": True, "mlp": "relu", "scale_embedding": True}


def recorded(name):
    """Return the model in a fixture, and what transformers computes from it."""
    return BART.from_pretrained(FIXTURES / name).eval(), load_file(FIXTURES / name / "expected.safetensors")


def prompts_of(expected):
    pairs = zip(expected["prompts"], expected["prompt_lengths"], strict=True)
    return [row[:n].tolist() for row, n in pairs]


def small(**changes):
    """Return a random model whose outputs depend visibly on every weight."""
    torch.manual_seed(0)
    model = BART(replace(SMALL, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    return model


def copied(name, tmp_path, config=None, generation=None):
    """Return a copy of a fixture with these keys of two of its files (None: without)."""
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(FIXTURES / name / file, tmp_path)
    for file, keys in (("config.json", config), ("generation_config.json", generation)):
        content = json.loads((tmp_path / file).read_text()) | (keys or {})
        (tmp_path / file).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return tmp_path


# --- parity


@pytest.mark.parametrize("name", ["bart", "pegasus"])
def test_logits_loss_and_gradients_equal_transformers(name):
    """One input is padded, the end of one output is not predicted, and the bias of the logits is not zero."""
    model, expected = recorded(name)
    batch = {key: expected[key] for key in ("tokens", "targets", "lengths")}
    tolerance = max(1e-5, 5 * expected["logits64_error"].item())  # the reference's own float32 noise
    logits = model(**batch)
    assert (logits - expected["logits"]).abs().max() < tolerance
    loss, _ = model.loss(batch)
    assert abs(loss - expected["loss"]) < tolerance
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for key, gradient in expected.items():
        if key.startswith("gradients."):
            found = gradients[ours(key.removeprefix("gradients."))]
            assert (found - gradient).abs().max() < 5 * tolerance * max(1, gradient.abs().max()), key

    with torch.no_grad():
        assert (model.double()(**batch) - expected["logits64"]).abs().max() < 1e-11


@pytest.mark.parametrize("name", ["bart", "pegasus"])
def test_tokens_written_by_the_rules_of_the_checkpoint_equal_those_of_transformers(name):
    """The rules of the BART: a forced first and last token, no pair of tokens twice, early stopping."""
    model, expected = recorded(name)
    prompts = prompts_of(expected)
    plain = {"n_beams": 3, "length_penalty": 1.0, "early_stopping": False, "rules": Rules()}
    written = {
        "greedy": model.generate(prompts, temperature=0),
        "beams": model.beam_search(prompts),
        "plain": model.beam_search(prompts, 16, **plain),
    }
    for key, rows in written.items():
        assert rows == [row[row >= 0].tolist() for row in expected[key]], key


@torch.no_grad()
@pytest.mark.parametrize("name", ["bart", "pegasus"])
def test_a_decoder_with_a_cache_equals_one_whole_pass(name):
    """Inputs of different lengths, and tokens of the output one by one."""
    model, expected = recorded(name)
    prompts, targets = prompts_of(expected), torch.randint(3, 61, (3, 12))
    read, lengths = model.shifted(targets), expected["prompt_lengths"]
    whole = model.logits(model.decode(read, model.encode(expected["prompts"], lengths), lengths))
    decoder = Decoder(model, prompts)
    cache = decoder.new_cache([1] * 3, 12)
    steps = [decoder.logits(decoder.hidden(read[:, i : i + 1], cache=cache)) for i in range(12)]
    assert (torch.cat(steps, 1) - whole).abs().max() < 5 * expected["logits64_error"]


# --- published figures


@pytest.mark.parametrize(
    "name, count", [("base", 139_420_416), ("large", 406_291_456), ("pegasus-large", 570_797_056)]
)
def test_published_sizes_have_their_numbers_of_parameters(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in BART(SIZES[name]).parameters()) == count


def test_sinusoids_are_all_sines_then_all_cosines():
    table = replace(SMALL, **PEGASUS).sinusoids()
    assert table[7, 3] == pytest.approx(torch.sin(torch.tensor(7 / 10000 ** (6 / 32))).item(), abs=1e-6)
    assert table[7, 16 + 3] == pytest.approx(torch.cos(torch.tensor(7 / 10000 ** (6 / 32))).item(), abs=1e-6)
    stored = load_file(FIXTURES / "pegasus" / "model.safetensors")["model.encoder.embed_positions.weight"]
    assert torch.equal(table, stored)


# --- directories


@pytest.mark.parametrize("changes", [{}, PEGASUS], ids=["bart", "pegasus"])
def test_transformers_opens_what_we_save(changes, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokens = small(**changes), torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path)
    kind = transformers.AutoModelForSeq2SeqLM
    opened, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        reference = opened.eval()(input_ids=tokens, labels=tokens).logits
        assert (model(tokens, tokens) - reference).abs().max() < 1e-4  # logits of order ten

    again = open_model(tmp_path)
    assert again.config == model.config and again.decoding == model.decoding
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_rules_and_the_bias_of_a_checkpoint_are_saved(tmp_path):
    model, _ = recorded("bart")
    model.save_pretrained(tmp_path)
    again = BART.from_pretrained(tmp_path)
    assert again.decoding == model.decoding != Decoding()
    assert again.has_bias and torch.equal(again.final_logits_bias, model.final_logits_bias)


def test_names_of_weights_are_translated_both_ways():
    for name in load_file(FIXTURES / "bart" / "model.safetensors"):
        assert theirs(ours(name)) == name


def test_sinusoids_and_bias_may_be_missing_and_embeddings_stored_twice(tmp_path):
    directory = copied("pegasus", tmp_path)
    weights = load_file(directory / "model.safetensors")
    kept = {k: w for k, w in weights.items() if "embed_positions" not in k and k != "final_logits_bias"}
    kept["lm_head.weight"] = kept["model.shared.weight"].clone()
    save_file(kept, directory / "model.safetensors")
    model, whole = BART.from_pretrained(directory), recorded("pegasus")[0]
    assert not model.has_bias
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize(
    "config, generation, message",
    [
        ({"activation_function": "gelu_new"}, {}, "activation_function 'gelu_new' is not implemented"),
        ({"decoder_ffn_dim": 44}, {}, "decoder_ffn_dim is not encoder_ffn_dim"),
        ({"normalize_before": True}, {}, "normalize_before True is not implemented"),
        ({}, {"repetition_penalty": 1.2}, "repetition_penalty 1.2 is not implemented"),
        ({}, {"num_beams": 0}, "num_beams 0: expected at least 1"),
        ({}, {"max_length": -5}, "max_length -5: expected at least 0"),
        ({}, {"length_penalty": float("nan")}, "length_penalty nan: expected a finite number"),
        ({}, {"early_stopping": "never"}, "early_stopping 'never': expected bool"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(config, generation, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        BART.from_pretrained(copied("bart", tmp_path, config, generation))


def test_rules_of_an_old_checkpoint_are_in_its_config(tmp_path):
    keys = {"num_beams": 4, "no_repeat_ngram_size": 3, "normalize_before": False, "normalize_embedding": True}
    copied("bart", tmp_path, keys)
    (tmp_path / "generation_config.json").unlink()
    assert BART.from_pretrained(tmp_path).decoding == Decoding(num_beams=4, no_repeat_ngram_size=3)


# --- limits


def test_more_tokens_than_positions_are_refused():
    model = small()
    with pytest.raises(ValueError, match="41 tokens: this model reads and writes at most 40"):
        model(torch.full((1, 41), 3), torch.full((1, 4), 3))
    for n in (None, 0, 41):
        with pytest.raises(ValueError, match=rf"max_new_tokens {n}: expected 1 to 40"):
            model.beam_search([[3, 4]], n)


def test_sampling_against_the_rules_of_a_checkpoint_is_refused():
    model, _ = recorded("bart")
    with pytest.raises(ValueError, match=r"no_repeat_ngram_size=2.*only with temperature 0"):
        model.generate([[3, 4]], 5)


def test_the_command_writes_by_the_rules_of_the_checkpoint(tmp_path, capsys):
    """The text that a model of bytes writes has no pair of bytes twice, with beams and without."""
    torch.manual_seed(0)
    plain = Tokenizer({bytes([i]): i for i in range(256)}, GPT2_PATTERN, {END_OF_TEXT: 256})
    tokenizer = plain.with_special_tokens({"pad_token": "<pad>"})
    config = replace(SMALL, vocab_size=258, pad_token_id=257, eos_token_id=256, start_token_id=256)
    model = BART(config)
    model.decoding = Decoding(no_repeat_ngram_size=2, num_beams=2, min_length=10)
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    for flags in ([], ["--beams", "2"]):
        beam_search.main(BART, SIZES, [str(tmp_path), "--text", "abc", "--max-new-tokens", "20", *flags])
        assert capsys.readouterr().out.strip()
    row = [*b"abc", 256]
    for written in (model.generate([row], 20, temperature=0)[0], model.beam_search([row], 20)[0]):
        pairs = list(itertools.pairwise([256, *written]))
        assert len(written) > 5 and len(set(pairs)) == len(pairs)


def test_the_sizes_are_printed(capsys):
    beam_search.main(BART, SIZES, [])
    assert "139,420,416" in capsys.readouterr().out
