"""The command `python -m evaluation`: its table, its file, several models, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import copy_of
from small_gpt import refused

from data.tokenizer import get_tokenizer
from evaluation import __main__ as command
from evaluation import glue, perplexity, sandbox, stdlib_suite
from evaluation.multiple_choice import load
from evaluation.published import TaskFile
from gpt import GPT

FIXTURE = Path(__file__).parents[1] / "fixtures/harness"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())


def run(*words):
    return command.main([str(word) for word in words])


def test_the_default_tasks_give_a_table_and_a_file_with_chance_and_baselines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stdlib_suite, "TEXT_BYTES", 2000)
    run(FIXTURE, FIXTURE, "--limit", 4, "--max-new-tokens", 8, "--out", tmp_path / "all.json")
    printed = capsys.readouterr().out
    assert re.search(r"^next_line +acc +4 +25\.0 +\d+\.\d \w", printed, re.M)
    assert re.search(r"^bits_per_byte +bits per byte +1 +8\.000 ", printed, re.M) and "pass@1" in printed
    content = json.loads((tmp_path / "all.json").read_text())
    ours = [row for row in content["results"] if row["task"] == "next_line"]
    assert {row["rule"] for row in ours} >= {"acc", "acc_norm", "acc_bytes", "acc_mutual_info"}
    assert ours[0]["chance"] == 0.25 and len(ours[0]["per_item"]) == 4 and "longest" in ours[0]["baselines"]
    # A model does not differ from itself.
    assert all(row["difference"] == 0 and row["p"] == 1 for row in content["comparisons"])


def test_published_files_give_the_harness_s_figures(tmp_path, capsys):
    names = ("hellaswag", "arc", "mmlu", "lambada", "text")
    run(FIXTURE, "--tasks", *(FIXTURE / f"{name}.jsonl" for name in names), "--out", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    found = {(row["task"].partition(":")[0], row["rule"]): row["value"] for row in found}
    for name in names[:3]:
        for rule in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info"):
            assert found[name, rule] == EXPECTED[name]["metrics"][rule]
    for rule in ("acc", "perplexity"):
        assert found["lambada", rule] == pytest.approx(EXPECTED["lambada"]["metrics"][rule], rel=1e-4)


def test_bits_per_byte_of_whole_windows_are_the_harness_s(monkeypatch):
    model, tokenizer = load(FIXTURE)
    text = json.loads((FIXTURE / "text.jsonl").read_text())["text"]
    tokens = torch.tensor([tokenizer.eot_id, *tokenizer.encode(text)])
    nats = perplexity.nats(model, tokens, stride=model.config.max_seq_len)
    bits = nats / torch.tensor(2.0).log().item() / len(text.encode())
    assert bits == pytest.approx(EXPECTED["text"]["metrics"]["bits_per_byte"], abs=1e-4)


def test_a_model_that_sees_later_tokens_is_refused(monkeypatch):
    model, _ = load(FIXTURE)
    perplexity.check_causal(model)
    forward = GPT.forward
    leak = lambda self, tokens: forward(self, tokens) + tokens[:, -1:, None] / 100  # noqa: E731
    monkeypatch.setattr(GPT, "forward", leak)
    with pytest.raises(ValueError, match="a later token moves the logits of earlier ones by"):
        perplexity.check_causal(model)


def test_examples_samples_and_glue_are_given_by_flags(tmp_path, capsys):
    shots = ["--tasks", FIXTURE / "arc.jsonl", "--shots", 1, "--shots-from", FIXTURE / "arc.jsonl"]
    run(FIXTURE, *shots)
    assert re.search(r"^arc:arc.jsonl +acc +3 ", capsys.readouterr().out, re.M)
    records = stdlib_suite.programs()[:1]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, records)))
    run(FIXTURE, "--tasks", tmp_path / "p.jsonl", "--samples", 10, "--temperature", 0.8)
    assert re.search(r"pass@10 +1 +0.0 `pass` +0.0", capsys.readouterr().out)


def test_a_user_s_mistakes_end_in_one_line_before_a_model_is_read(tmp_path, capsys, monkeypatch):
    def line(*words):
        return refused(
            capsys, [str(word) for word in words], lambda argv: command.command.exit_code(lambda: run(*argv))
        )

    assert "--samples 5: equal at --temperature 0" in line("nowhere", "--samples", 5)
    assert "--limit 0: expected at least 1" in line("nowhere", "--limit", 0)
    assert "--shots-from x.jsonl: needs --shots K" in line("nowhere", "--shots-from", "x.jsonl")
    assert "--shots 2: the tasks of stdlib take no examples" in line("nowhere", "--shots", 2)
    assert "--tasks nothing.jsonl: no such file" in line("nowhere", "--tasks", "nothing.jsonl")
    shots = ("nowhere", "--tasks", FIXTURE / "arc.jsonl", "--shots", 1, "--shots-from")
    assert "--shots-from nothing.jsonl: no such file" in line(*shots, "nothing.jsonl")
    assert "text.jsonl: its items are of kind text, those of arc" in line(*shots, FIXTURE / "text.jsonl")
    assert "needs a text classifier" in line(FIXTURE, "--tasks", f"cola:{write_cola(tmp_path)}")
    with monkeypatch.context() as patch:
        patch.setattr(command, "evaluate", None)  # neither of two models is evaluated if one is missing
        error = line(FIXTURE, "nowhere", "--tasks", FIXTURE / "arc.jsonl")
        assert "nowhere/config.json: no such file" in error
    (tmp_path / "p.jsonl").write_text(json.dumps(stdlib_suite.programs()[0]))
    monkeypatch.setattr(sandbox, "lacking", lambda: ("no filter of system calls",))
    assert "would run with no filter" in line("nowhere", "--tasks", tmp_path / "p.jsonl")


@pytest.mark.parametrize("labels, baseline", [("01", 0.0), ("10", 2 / 3)])
def test_of_equally_frequent_labels_the_first_is_the_baseline(labels, baseline, monkeypatch):
    monkeypatch.setattr("formats.open_model.open_model", lambda directory: None)
    monkeypatch.setattr("data.tokenizer.get_tokenizer", lambda name: None)
    monkeypatch.setattr(glue, "evaluate", lambda *arguments: {"f1": 1.0})
    task = TaskFile("mrpc", "glue", [glue.Example(("a", "b"), label) for label in labels])
    (figure,) = command.glue_figures(Path("model"), [task], 1)
    assert figure.baselines == {"most frequent label": pytest.approx(baseline)}


def write_cola(folder):
    (folder / "cola.jsonl").write_text('{"sentence": "a", "label": 1}\n')
    return folder / "cola.jsonl"


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    copy_of(FIXTURE, tmp_path)
    get_tokenizer("bytes").with_special_tokens({}, [f"<{i}>" for i in range(90)]).save(tmp_path)
    with pytest.raises(ValueError, match="the model has 320; they do not belong together"):
        load(tmp_path)
