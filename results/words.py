"""Alignment with words: a question with an exact reward, and what each stage of the pipeline makes of it.

    python train.py --model gpt --out runs/gpt
    python -m results.words --base runs/gpt/model --out results/words.json         about an hour on two cores

The question is, for example, "List the parameters: `connect(host, port)`", and its answer "host, port". So
every answer has an exact reward, 1 or 0, and needs no judge. The names are those in Python's library,
combined at random. The demonstrations for instruction tuning have three styles, each a third of them: "host,
port", "The parameters are host, port." and "`host`, `port`"; the reward wants the first. The stages are those
of InstructGPT (Ouyang et al. 2022), each of them but "pairs" a run of train.py:

    sft       instruction tuning on the demonstrations: it answers in each style about as often
    pairs     the right answer and a wrong one: a sample of the tuned model, or the right one with a mistake
    reward    a reward model on the pairs; beside it, the guess that the longer (or shorter) answer is better
    dpo       from the tuned model, on the same pairs
    grpo      from the tuned model, with the exact reward

Tuning and rewards have different questions: on those that the tuned model has memorised, a reward model would
learn what was memorised. 500 questions are held out, and every model answers them. One sample each at
temperature 1 gives the share of exact answers and the KL to the tuned model; greedy decoding gives the share
of exact answers that a user would see.

Runs and files in --work that are complete are not made again.
"""

import argparse
import ast
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from data.corpus import documents, find_files
from data.rows import stack
from data.tokenizer import get_tokenizer
from engine import cpu
from formats import command
from formats.atomic import replace_file
from formats.json_file import write_json
from formats.open_model import open_model
from posttraining import ppo, prompts, scores
from posttraining.rollout import Policy, Reference, metrics_of, roll_out
from results.training_runs import trained

N_QUESTIONS = 24_000
PARTS = ("held_out", *["tuning"] * 23, *["rewards"] * 24)  # of each 48 questions in a row
N_SAMPLED_QUESTIONS, N_SAMPLES = 4000, 3  # questions that the tuned model answers for pairs; answers of each
N_NEW = 40  # tokens of an answer at most
FORMS = ("{}", "The parameters are {}.", "`{}`")  # styles of a demonstration; the first is the exact answer
LETTERS = "abcdefghijklmnopqrstuvwxyz_"


# --- questions and pairs


def questions() -> Iterator[list[dict]]:
    """Yield N_QUESTIONS conversations about functions with two to four parameters.

    The names are those of functions and parameters in Python's library, combined at random.
    """
    functions, parameters = set(), set()
    for name, path in find_files("stdlib", Path("cache")):
        for text in documents([(name, path)], on_bad_text=lambda problem: None):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    functions.add(node.name)
                if isinstance(node, ast.arg):
                    parameters.add(node.arg)
    functions, parameters = sorted(functions), sorted(parameters - {"self", "cls"})
    generator = random.Random(0)
    for _ in range(N_QUESTIONS):
        signature = ", ".join(generator.sample(parameters, generator.randint(2, 4)))
        line = f"`{generator.choice(functions)}({signature})`"
        form = generator.choice(["List the parameters: {}", "What are the parameters of {}?"])
        turns = [("user", form.format(line)), ("assistant", signature)]
        yield [{"role": role, "content": content} for role, content in turns]


def write_questions(folder: Path) -> None:
    """Write a file for each of PARTS, that of held_out last. The questions go to the parts in turn."""
    sides: dict[str, list] = {name: [] for name in PARTS}
    generator = random.Random(1)
    for i, (question, answer) in enumerate(questions()):
        part = PARTS[i % len(PARTS)]
        form = generator.choice(FORMS) if part == "tuning" else FORMS[0]
        names = answer["content"].replace(", ", "`, `") if "`" in form else answer["content"]
        sides[part].append({"messages": [question, answer | {"content": form.format(names)}]})
    for name in ("tuning", "rewards", "held_out"):
        write_lines(folder / f"{name}.jsonl", sides[name])


def write_lines(path: Path, records: list) -> None:
    with replace_file(path) as new:
        new.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def read_lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def corrupted(names: list[str], pool: list[str], generator: random.Random) -> list[str]:
    """Return the names with one mistake: a name left out, added, replaced or misspelt, or two exchanged.

    pool: names to add. By chance the result may have no mistake.
    """
    names, i = list(names), generator.randrange(len(names))
    kind = generator.choice(["drop", "add", "swap", "replace", "misspell"])
    if kind == "drop":
        names.pop(i)
    elif kind == "add":
        names.insert(generator.randrange(len(names) + 1), generator.choice(pool))
    elif kind == "swap":
        j = (i + generator.randrange(1, len(names))) % len(names)
        names[i], names[j] = names[j], names[i]
    elif kind == "replace":
        names[i] = generator.choice(pool)
    else:
        at = generator.randrange(len(names[i]))
        names[i] = names[i][:at] + generator.choice(LETTERS) + names[i][at + 1 :]
    return names


def corrupted_pairs(records: list[dict], seed: int) -> list[dict]:
    """Return a pair for each question: the right answer, and one with a mistake."""
    generator, pairs = random.Random(seed), []
    pool = sorted({name for r in records for name in r["messages"][1]["content"].split(", ")})
    for record in records:
        question, answer = (message["content"] for message in record["messages"])
        wrong = ", ".join(corrupted(answer.split(", "), pool, generator))
        if wrong != answer:
            pairs.append({"prompt": question, "chosen": answer, "rejected": wrong})
    return pairs


def sampled_pairs(sft: Path, questions: Path, n: int) -> list[dict]:
    """Return pairs for the first n questions of a file: the right answer, and a wrong one of the tuned model.

    Each is a dict of "prompt", "chosen" and "rejected", and none occurs twice.
    """
    model, dataset = open_model(sft).eval(), dataset_of(questions, str(sft), 256)
    tokenizer, records = dataset.tokenizer, []
    generator = torch.Generator().manual_seed(0)
    n = min(n, len(dataset.train))
    for first in range(0, n, 64):
        rows = stack([dataset.train[i] for i in range(first, min(first + 64, n))])
        asked = [p for p in prompts.unpadded(rows, "prompt") for _ in range(N_SAMPLES)]
        right = [a for a in prompts.unpadded(rows, "answer") for _ in range(N_SAMPLES)]
        options = {"temperature": 1.0, "stop": dataset.stop, "generator": generator}
        found = model.generate(asked, N_NEW, **options)
        for prompt, answer, tokens in zip(asked, right, found, strict=True):
            ended = tokens[-1] == dataset.stop
            text = tokenizer.decode([t for t in tokens if t != dataset.stop]).strip()
            chosen = tokenizer.decode(answer).strip()
            if ended and text and text != chosen and text.isprintable():
                question = tokenizer.decode(prompt).split("<|user|>\n")[-1].split("\n<|assistant|>")[0]
                records.append({"prompt": question, "chosen": chosen, "rejected": text})
    return [json.loads(r) for r in dict.fromkeys(map(json.dumps, records))]


def write_pairs(sft: Path, work: Path) -> None:
    """Write the pairs of "rewards" and of "held_out": those by samples, those by mistakes, and all in random
    order."""
    for side, n, seed in (("rewards", N_SAMPLED_QUESTIONS, 1), ("held_out", N_QUESTIONS, 2)):
        kinds = {"sampled": sampled_pairs(sft, work / f"{side}.jsonl", n)}
        kinds["corrupted"] = corrupted_pairs(read_lines(work / f"{side}.jsonl"), seed)
        kinds["all"] = [*kinds["sampled"], *kinds["corrupted"]]
        random.Random(seed).shuffle(kinds["all"])
        for kind, pairs in kinds.items():
            write_lines(work / f"pairs-{side}-{kind}.jsonl", pairs)


# --- runs and their figures


def dataset_of(path: Path, tokenizer: str, seq_len: int) -> prompts.Prompts:
    """Return all questions of a file as prompts that are scored by the exact reward."""
    records = read_lines(path)
    own = get_tokenizer(tokenizer)
    pairs = [prompts.prompt_and_answer(record["messages"], own) for record in records]
    pairs = [(p, a) for p, a in pairs if len(p) + N_NEW <= seq_len]
    rows = prompts.Rows(prompts.padded(pairs))
    dataset = prompts.Prompts("", own, rows, rows, "", stop=prompts.end_id(own))
    dataset.scorer = scores.find("exact", own, dataset.stop)
    return dataset


@torch.no_grad()
def examine(model: nn.Module, reference: nn.Module, dataset: prompts.Prompts) -> dict[str, float]:
    """Return means over the n questions. Of one sample each: "exact", the share of exact answers; "kl", the
    KL to the reference in nats; "tokens". By greedy decoding: "greedy", the share of exact answers.
    """
    policy = Policy(model.eval(), ppo.Config(method="grpo", max_new_tokens=N_NEW))
    policy.reference = Reference(reference)
    sums, n = {"exact": 0.0, "kl": 0.0, "tokens": 0.0, "greedy": 0.0}, 0
    for first in range(0, len(dataset.train), 64):
        rows = stack([dataset.train[i] for i in range(first, min(first + 64, len(dataset.train)))])
        metrics = metrics_of(roll_out(policy, rows, dataset, seed=first, n=1))
        likeliest = model.generate(prompts.unpadded(rows, "prompt"), N_NEW, temperature=0, stop=dataset.stop)
        right = prompts.unpadded(rows, "answer")
        exact = scores.score(dataset.scorer, scores.Completions([], likeliest, right)).sum().item()
        m = len(right)
        n, sums["greedy"] = n + m, sums["greedy"] + exact
        for name, key in (("exact", "reward"), ("kl", "kl"), ("tokens", "completion_tokens")):
            sums[name] += metrics[key].item() * m
    return {name: total / n for name, total in sums.items()} | {"n": n}


@torch.no_grad()
def accuracy(reward: Path, pairs: Path) -> dict[str, float]:
    """Return the share of pairs that a reward model ranks rightly, and that guessing by length would.

    "shorter" is the guess that the shorter answer is better, "longer" the opposite. A pair of answers of
    equal length counts one half.
    """
    records, tokenizer = read_lines(pairs), get_tokenizer(str(reward))
    score, right, shorter = scores.open_reward_model(str(reward)), 0, 0.0
    for first in range(0, len(records), 64):
        some = records[first : first + 64]
        rows = {}
        for side in ("chosen", "rejected"):
            rows[side] = []
            for record in some:
                turn = [{"role": "user", "content": record["prompt"]}]
                answer = [*tokenizer.encode(record[side]), prompts.end_id(tokenizer)]
                rows[side].append(prompts.prompt_tokens(turn, tokenizer) + answer)
        found = zip(score(rows["chosen"]), score(rows["rejected"]), strict=True)
        right += sum(chosen > rejected for chosen, rejected in found)
        difference = [len(b) - len(a) for a, b in zip(rows["chosen"], rows["rejected"], strict=True)]
        shorter += sum((d > 0) + 0.5 * (d == 0) for d in difference)
    n = len(records)
    return {"pairs": n, "accuracy": right / n, "shorter": shorter / n, "longer": 1 - shorter / n}


def stages(args: argparse.Namespace, work: Path) -> dict:
    """Make all runs in the folder `work`, and return their figures. What is there already is not repeated."""
    # The questions, instruction tuning, and the pairs.
    questions, held_out = work / "rewards.jsonl", work / "held_out.jsonl"
    if not held_out.exists():
        write_questions(work)
    data, val = ("--data", str(work / "tuning.jsonl")), ("--val", str(held_out))
    tuning = ("--model", "gpt", "--task", "instruct", "--init-from", str(args.base))
    sft = trained(work / "sft", *tuning, *data, *val, "--steps", "600")
    if not (work / "pairs-held_out-all.jsonl").exists():
        write_pairs(sft, work)
    pairs = ("--data", str(work / "pairs-rewards-all.jsonl"), "--val", str(work / "pairs-held_out-all.jsonl"))

    # Three runs from the tuned model.
    start = ("--init-from", str(sft), "--seq-len", "128")
    settings = ("--steps", "450", "--batch-size", "32", "--lr", "3e-4")
    reward = trained(work / "reward", "--model", "reward", *start, *pairs, *settings)
    settings = ("--steps", "150", "--batch-size", "32")
    dpo = trained(work / "dpo", "--model", "dpo", *start, *pairs, *settings)
    settings = ("--steps", "20", "--batch-size", "32", "--lr", "1e-4", "--set", "method=grpo", "reward=exact")
    settings += ("max_new_tokens=32", "samples=8", "epochs=2", "beta=0.02")
    grpo = trained(work / "grpo", "--model", "ppo", *start, "--data", str(questions), *val, *settings)

    # The answers of all models, and the ranks that the reward model gives to answers.
    models = {"sft": sft, "dpo": dpo, "grpo": grpo}
    dataset, tuned = dataset_of(held_out, str(sft), 128), open_model(sft).eval()
    found = {name: examine(open_model(path), tuned, dataset) for name, path in models.items()}
    kinds = ("all", "sampled", "corrupted")
    ranked = {kind: accuracy(reward, work / f"pairs-held_out-{kind}.jsonl") for kind in kinds}
    return {"models": found, "reward": ranked}


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, out = parser.add_argument, Path("results/words.json")
    add("--base", type=command.path, required=True, help="directory of a GPT, such as runs/gpt/model")
    work = Path("runs/words")
    add("--work", type=command.path, default=work, help="folder of the runs (default %(default)s)")
    add("--out", type=command.new_file, default=out, help="file for the figures (default %(default)s)")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    found = stages(args, args.work) | {"cpu": cpu.name(), "torch": torch.__version__}
    write_json(args.out, found)
    for name, row in found["models"].items():
        print(f"{name:10} exact {row['exact']:.1%}  greedy {row['greedy']:.1%}  KL {row['kl']:.3f}")
    for kind, row in found["reward"].items():
        print(
            f"reward, {kind:10} {row['accuracy']:.1%} of {row['pairs']} pairs; shorter {row['shorter']:.1%}"
        )


if __name__ == "__main__":
    command.run(main)
