"""How fast is a step of GRPO beside TRL's, on the same model, prompts and numbers of tokens?

    python -m results.rl_speed --out results/rl_speed.json        some minutes; needs trl==1.16.0 and datasets

Both sides train the same random Llama, made by gpt.py, in float32 with AdamW: 8 prompts, 8 completions of
each, 32 new tokens (no completion ends earlier), the same reward function in Python, a KL penalty of 0.04
against a reference. A step samples, scores, computes the reference's log-probabilities and updates the
weights once. The steps of both are made in turn (A B A B ...) in one process: ours at the end of each step of
TRL's trainer. The first step of each side is not counted. Tokens per second are those of the completions, in
processor time of one thread, so that other programs count for little.
"""

import argparse
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

import train
from data.rows import seed_of
from data.tokenizer import train_bpe
from engine import cpu
from engine.run import Run
from formats import command
from formats.json_file import write_json
from gpt import GPT, Config
from posttraining import ppo
from posttraining.prompts import unpadded
from results.in_turn import compared
from results.peers import require

COMMAND = "python -m results.rl_speed --out results/rl_speed.json"
SHAPES = {
    "4 layers, width 128": Config(4, 4, 128, 352, 4096, 256),
    "5 layers, width 384": Config(5, 6, 384, 1024, 4096, 256),
}
PROMPTS, SAMPLES, NEW, BETA = 8, 8, 32, 0.04  # completions of a prompt; tokens of each; weight of the KL


def vowels(prompts: list[str], completions: list[str], **_) -> list[float]:
    """Return the number of vowels of each completion."""
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def prepare(config: Config, folder: Path) -> Run:
    """Return a run of ours before its first step, with its model, tokenizer and prompts in the folder."""
    if not (folder / "tokenizer").exists():
        text = Path(torch.__file__).read_text(encoding="utf-8")
        train_bpe([text], config.vocab_size - 1).save(folder / "tokenizer")
    questions = [{"question": f"def function_{i}(first, second, third):", "answer": "?"} for i in range(64)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    torch.manual_seed(0)
    directory = folder / f"model-{config.d_model}"
    GPT(config).save_pretrained(directory)
    flags = ["--model", "ppo", "--init-from", directory, "--data", folder / "questions.jsonl"]
    flags += ["--tokenizer", folder / "tokenizer", "--batch-size", PROMPTS, "--steps", 100]
    flags += ["--out", folder / f"run-{config.d_model}", "--lr", 1e-5]
    flags += ["--set", "method=grpo", f"beta={BETA}", f"samples={SAMPLES}", "epochs=1"]
    flags += [f"max_new_tokens={NEW}", "reward=results.rl_speed:vowels"]
    run = train.prepare(train.parse_arguments([str(flag) for flag in flags]))
    run.dataset.stop = None  # so that all completions have 32 tokens
    return run


def step_of_ours(run: Run) -> float:
    """Make a step of the loop of posttraining/ppo.py, and return its completions' tokens per second."""
    began = time.process_time()
    policy = run.model.eval()
    seed = seed_of(0, run.step)
    rollout = ppo.roll_out(policy, run.batches.next()[0].batch, run.dataset, seed, SAMPLES, keep_graph=True)
    ppo.metrics_of(rollout)
    ppo.update(run, rollout, torch.Generator().manual_seed(seed))
    return int(rollout.mask.sum()) / (time.process_time() - began)


def train_both(run: Run, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Train with TRL, and after each of its steps make one of ours. Return the tokens per second of both.

    run: ours, from `prepare`. rounds: steps of each side that count.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    figures = {"ours": [], "TRL": []}

    class InTurn(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.process_time()

        def on_step_end(self, *_, **__):
            n_tokens = PROMPTS * SAMPLES * NEW
            figures["TRL"].append(n_tokens / (time.process_time() - self.began))
            figures["ours"].append(step_of_ours(run))

    rows = [run.dataset.train[i] for i in range(len(run.dataset.train))]
    prompts = unpadded(ppo.make_batch(rows, run.settings, None), "prompt")
    texts = [run.dataset.tokenizer.decode(prompt) for prompt in prompts]
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    n = PROMPTS * SAMPLES
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=n,
        num_generations=SAMPLES,
        max_completion_length=NEW,
        generation_kwargs={"min_new_tokens": NEW},
        beta=BETA,
        learning_rate=1e-5,
        max_steps=rounds + 1,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(run.args.init_from, dtype=torch.float32),
        reward_funcs=vowels,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
        callbacks=[InTurn()],
    )
    trainer.train()
    return {side: rates[1:] for side, rates in figures.items()}


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, first = parser.add_argument, list(SHAPES)[:1]
    add(
        "--rounds", type=command.count, default=10, help="steps of each side that count (default %(default)s)"
    )
    add("--shapes", nargs="+", choices=SHAPES, default=first, help="shapes of the model (default: the first)")
    add("--out", type=command.new_file, help="write the figures as JSON")
    args = parser.parse_args(argv)
    require("trl", "trl==1.16.0")
    require("datasets")
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for shape in args.shapes:
            run = prepare(SHAPES[shape], Path(name))
            print(shape, flush=True)
            rows += compared(train_both(run, Path(name), args.rounds), "TRL", shape=shape)
            run.close()
    if args.out:
        about = {"command": COMMAND, "cpu": cpu.name(), "torch": torch.__version__}
        about |= {name: version(name) for name in ("trl", "transformers")}
        write_json(args.out, about | {"threads": torch.get_num_threads(), "results": rows}, indent=1)


if __name__ == "__main__":
    command.run(main)
