"""Generation: the cache changes nothing, rows do not touch, and each option does what its paper says."""

import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_gpt import FIXTURES, small

import generate
import gpt
import train
from data.tokenizer import get_tokenizer
from generate import end_tokens, sample

CONFIGS = {
    "modern": {"qk_norm": True},
    "window": {"window": 5},
    "mixed windows": {"window": 5, "full_layers": (1,)},
    "learned": {"positions": "learned"},
}


def greedy_without_cache(model, prompt, n):
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_cached_greedy_equals_uncached_for_prompts_of_any_length(name):
    """Rows shorter than, as long as and longer than the window, alone and in one batch."""
    model = small(**CONFIGS[name])
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(61, (n,), generator=generator).tolist() for n in (1, 4, 5, 6, 13)]
    expected = [greedy_without_cache(model, prompt, 15) for prompt in prompts]
    assert model.generate(prompts, 15, temperature=0) == expected
    assert [model.generate([prompt], 15, temperature=0)[0] for prompt in prompts] == expected
    same_length = torch.tensor([prompts[2], prompts[2][::-1]])
    assert model.generate(same_length, 15, temperature=0)[0] == expected[2]


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_under_autocast_the_tokens_are_the_likeliest_up_to_rounding(name):
    """As PPO samples with --dtype bfloat16. For 33 steps a model on a CPU would be arranged anew, see
    kernels/few_rows.py. The likeliest logit is about 2.6 above the mean, and 0.1 more than rounding changes.
    """
    model, n_new = small(**CONFIGS[name]), 19 if name == "learned" else 33
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(61, (n,), generator=generator).tolist() for n in (1, 4, 13)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.generate(prompts, n_new, temperature=0)
    for prompt, new in zip(prompts, found, strict=True):
        logits = model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]
        drawn = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
        assert (logits.amax(dim=1) - drawn).max() < 0.1


def test_compiled_steps_give_the_same_tokens():
    """One graph for rows of different lengths, with windows that wrap around and without."""
    model = small(window=5, full_layers=(1,), qk_norm=True)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
    expected = model.generate(prompts, 12, temperature=0)
    assert model.generate(prompts, 12, temperature=0, compile=True) == expected


def test_the_mode_of_compilation_can_be_named(monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda f, mode=None: modes.append(mode) or f)
    model = small()
    expected = model.generate([[1, 2, 3]], 5, temperature=0)
    for mode in (True, "reduce-overhead"):
        assert model.generate([[1, 2, 3]], 5, temperature=0, compile=mode) == expected
    assert modes == [None, "reduce-overhead"]


def test_cache_takes_the_memory_of_the_window_only():
    model = small(window=5, full_layers=(1,))
    cache = model.new_cache([3, 7], 30)
    assert cache.keys[0].shape == (2, 5, 2, 8)
    assert cache.keys[1].shape == (2, 30, 2, 8)


def test_stream_yields_what_generate_returns_and_stops_row_by_row():
    model = small()
    prompts = [[1, 2, 3], [4, 5]]
    whole = model.generate(prompts, 12, temperature=0)
    steps = list(model.stream(prompts, 12, temperature=0))
    assert [[step[row] for step in steps] for row in (0, 1)] == whole
    stop = whole[0][4]
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    assert model.generate(prompts, 12, temperature=0, stop=stop) == cut
    assert model.generate(prompts, 12, temperature=0, stop=[stop, whole[1][0]])[1] == whole[1][:1]


def test_same_generator_same_text():
    model = small()

    def draw(seed):
        return model.generate([[1, 2]], 20, generator=torch.Generator().manual_seed(seed))

    assert draw(0) == draw(0) != draw(1)


def frequencies(logits, **options):
    rows = logits.expand(20_000, -1)
    drawn = sample(rows, **({"temperature": 1.0} | options), generator=torch.Generator().manual_seed(0))
    return torch.bincount(drawn.flatten(), minlength=logits.numel()) / len(rows)


@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.5}, [0]),  # exactly reached by the first
        ({"top_p": 0.51}, [0, 1]),
        ({"top_p": 0.01}, [0]),
        ({"min_p": 0.3}, [0, 1]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 3, "min_p": 0.5}, [0, 1]),
    ],
)
def test_cuts_keep_the_likely_tokens_in_proportion(options, kept):
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    expected = torch.zeros(4)
    expected[kept] = p[kept] / p[kept].sum()
    # 20,000 draws: the standard error of a frequency is at most 0.0036
    torch.testing.assert_close(frequencies(p.log(), **options), expected, atol=0.015, rtol=0)


def test_temperature_divides_the_logits():
    p = torch.tensor([0.5, 0.25, 0.25])
    expected = (p.log() / 0.5).softmax(0)
    torch.testing.assert_close(frequencies(p.log(), temperature=0.5), expected, atol=0.015, rtol=0)


def test_repetition_penalty_makes_seen_tokens_less_likely():
    """Keskar et al. 2019, equation 2, by hand on one step, and no loops in a long greedy text."""
    model = small()
    prompt = [3, 7, 7, 11]
    logits = model(torch.tensor([prompt]))[0, -1]
    for token in set(prompt):
        logits[token] = logits[token] / 5 if logits[token] > 0 else logits[token] * 5
    assert model.generate([prompt], 1, temperature=0, repetition_penalty=5.0) == [[logits.argmax().item()]]
    free = model.generate([prompt], 30, temperature=0)[0]
    penalised = model.generate([prompt], 30, temperature=0, repetition_penalty=5.0)[0]
    assert len(set(penalised)) > len(set(free))


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[]], {}, "empty prompt"),
        ([], {}, "empty prompt"),
        ([[61]], {}, "token 61"),
        ([[1]], {"temperature": -1.0}, "temperature -1"),
        ([[1]], {"top_k": 0}, "top_k 0"),
        ([[1]], {"top_p": 0.0}, "top_p 0"),
        ([[1]], {"min_p": 2.0}, "min_p 2"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty 0"),
    ],
)
def test_bad_arguments_say_why(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        small().generate(prompts, 2, **options)


def test_learned_positions_end():
    with pytest.raises(ValueError, match="32 positions"):
        small(positions="learned").generate([[1] * 30], 3)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-31])
def test_a_temperature_that_overflows_takes_the_likeliest_token(temperature):
    logits = torch.tensor([[1.0, 30.0, -2e4], [0.5, -1.0, 0.25]])
    for options in ({}, {"top_p": 0.9}, {"min_p": 0.1, "top_k": 2}):
        assert sample(logits, temperature, **options).flatten().tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(temperature):
    model = small()
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        model.generate([[1, 2]], 3, temperature=temperature)


# --- the command line


BEGIN = "<|begin_of_text|>"


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A random Llama of several ends of text, with a tokenizer that puts a token in front of a text."""
    directory = tmp_path_factory.mktemp("begun")
    tokenizer = get_tokenizer("bytes").with_special_tokens({"bos_token": BEGIN})
    tokenizer.around = ((BEGIN,), ())
    model = small(vocab_size=tokenizer.n_vocab, eos_token_id=(0, 256), n_layers=1)
    model.save_pretrained(directory)
    tokenizer.save(directory)
    return directory


def printed(capsys, monkeypatch, *arguments, main=lambda: generate.run(gpt.GPT, gpt.SIZES)):
    """What the command prints: (stdout, stderr, exit code)."""
    monkeypatch.setattr(sys, "argv", ["gpt.py", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as exit:
        code = exit.code
    return (*capsys.readouterr(), code)


@pytest.mark.parametrize("prompt", ["hello", ""])
def test_a_prompt_is_continued_as_transformers_continues_it(begun, prompt, capsys, monkeypatch):
    """Greedily, from the token that the tokenizer puts in front, which decides the rest."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(begun)
    tokenizer = transformers.AutoTokenizer.from_pretrained(begun)
    ids = tokenizer(prompt, return_tensors="pt")
    assert ids["input_ids"][0, 0] == tokenizer.convert_tokens_to_ids(BEGIN)
    new = theirs.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    tokens = []
    monkeypatch.setattr(generate, "print_stream", lambda given, *_: tokens.extend(t for (t,) in given))
    flags = ("--prompt", prompt, "--temperature", "0", "--max-new-tokens", "12")
    out, err, code = printed(capsys, monkeypatch, begun, *flags)
    assert (out, code) == (prompt, 0) and tokens == new
    assert re.search(r"^12 tokens, \d+ tokens/s with the prompt$", err, re.MULTILINE)


def test_several_ends_of_text_are_read_and_saved_unchanged_and_stop_a_text(begun, tmp_path):
    """generation_config.json goes before config.json, as in transformers."""
    for ids, saved in (([5, 9], [5, 9]), (7, 7), (None, None)):
        (begun / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        model = gpt.GPT.from_pretrained(begun)
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == saved
        assert gpt.GPT.from_pretrained(tmp_path).config == model.config
        expected = {ids} if isinstance(ids, int) else set(ids or ())
        assert set(end_tokens(model, get_tokenizer(str(begun)))) == {*expected, 256}
    (begun / "generation_config.json").unlink()
    assert gpt.GPT.from_pretrained(begun).config.eos_token_id == (0, 256)


@pytest.mark.parametrize(
    "name, command",
    [
        ("mixtral", "python moe.py"),
        ("bert-mlm", "python bert.py"),
        ("bert-classifier", "python -m posttraining.classify"),
        ("adapters/llama-lora", "python lora.py"),
    ],
)
def test_a_model_of_another_file_is_opened_by_its_command(name, command, capsys, monkeypatch):
    out, err, code = printed(capsys, monkeypatch, FIXTURES / name)
    assert (out, code) == ("", 2) and err.count("\n") == 1
    assert f"no model of gpt.py; open it by {command} {FIXTURES / name}" in err


def test_a_checkpoint_with_a_nan_ends_gpt_and_train_in_one_line(begun, tmp_path, capsys, monkeypatch):
    directory = shutil.copytree(begun, tmp_path / "damaged")
    weights = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name][1, 2] = torch.nan
    save_file(weights, directory / "model.safetensors")
    line = f"error: {directory / 'model.safetensors'}: {name} is not finite"
    out, err, code = printed(capsys, monkeypatch, directory, "--prompt", "x")
    assert (out, code) == ("", 2) and err.startswith(line) and err.count("\n") == 1

    flags = ("--model", "gpt", "--init-from", str(directory), "--out", str(tmp_path / "run"))
    assert train.main([*flags, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(line) and err.count("\n") == 1
