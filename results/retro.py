"""RETRO: facts never seen in training, and bits per byte over what a chunk shares with its neighbours.

    python -m results.retro --out results/retro.json --parts facts         three default runs
    python -m results.retro --out results/retro.json --parts text          two models of the same text, a seed

Each part is made with every seed of --seeds:

    facts    the default run of --model retro: the share of held-out facts whose value is right with their
             neighbours, without, and with the neighbours of other questions
    text     `--model retro --size text` beside gpt.py's tiny, which is the same decoder without the encoder
             and the chunked cross attention: the same text, tokenizer, number of tokens and learning rate.
             The bits per byte of the held-out chunks whose overlap with their neighbours is at most alpha,
             for several alpha: with their neighbours, without, and with those of other chunks. The overlap is
             the longest run of tokens that a chunk shares with a neighbour, as a share of the chunk (Borgeaud
             et al. 2022, section 2.6)

At a small alpha little can be copied, so a gain there comes from elsewhere. RETRO has more parameters and
FLOPs per token; both are written beside the figures. Every run is one of train.py in --work, and is not
repeated if it is there. The figures are written to --out after each run. A part with a seed that is in the
file is kept, whatever its --steps and --data were.
"""

import json
import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.rows import in_order
from data.tokenizer import get_tokenizer
from formats import command
from formats.open_model import open_model
from language import retro_rows
from language.retrieval import common_run
from results.keep import Ended
from results.training_runs import run

ALPHAS = (0.125, 0.25, 0.5, 1.0)
BATCH = 16  # rows at once
TEXT_STEPS = 600  # updates of both models of a text, of 8 rows each


def of_facts(work: Path, seed: int, steps: list[str]) -> dict:
    """Return the shares of held-out facts that the default run of a seed gets right, and its held-out loss.

    steps: flags, ["--steps", n] or none.
    """
    out = work / f"facts-{seed}"
    last = run(out, seed, "--model", "retro", *steps)
    model = open_model(out / "model").eval()
    c = model.config
    val = retro_rows.load_facts(c.max_seq_len, c.chunk, c.n_neighbours).val
    batch = retro_rows.batch_of([val[i] for i in range(len(val))])
    given = {"with": batch["neighbours"], "without": None, "of others": batch["neighbours"].roll(1, 0)}
    shares = {name: retro_rows.accuracy(model, batch, n) for name, n in given.items()}
    n_asked = int((batch["targets"] >= 0).sum()) // retro_rows.VALUE
    return {"loss": last["val_loss"], "facts": n_asked, "steps": last["step"]} | shares


@torch.no_grad()
def nats_of(model, rows, given: str) -> np.ndarray:
    """Return the nats of each token of held-out rows but the first, in order, float64 (n - 1,).

    given: "with" the neighbours of their row, "without", or "of others": those of another row of the batch.
    """
    found = []
    for some in in_order(rows, BATCH):
        batch = retro_rows.batch_of(some)
        options = {}
        if given != "without":  # a GPT has no neighbours
            neighbours = batch["neighbours"]
            options["neighbours"] = neighbours if given == "with" else neighbours.roll(1, 0)
        log_p: Tensor = model(batch["tokens"], **options).double().log_softmax(-1)
        found.append(-log_p.gather(-1, batch["targets"][..., None]).flatten().numpy())
    return np.concatenate(found)


def by_overlap(nats: np.ndarray, n_bytes: np.ndarray, overlap: np.ndarray, m: int) -> dict[str, float]:
    """Return the bits per byte of the chunks whose overlap is at most alpha, by alpha, where there are any.

    nats, n_bytes: (n,), of each token. overlap: (C,), of the C whole chunks, in tokens. m: tokens of a chunk.
    """
    C = len(overlap)
    bits = nats[: C * m].reshape(C, m).sum(1) / math.log(2)
    size = n_bytes[: C * m].reshape(C, m).sum(1)
    kept = {alpha: overlap <= alpha * m for alpha in ALPHAS}
    return {str(alpha): float(bits[k].sum() / size[k].sum()) for alpha, k in kept.items() if k.any()}


def of_text(work: Path, seed: int, data: str, steps: list[str]) -> list[dict]:
    """Return a row of figures for gpt.py's tiny and for RETRO with each kind of neighbours."""
    steps = steps or ["--steps", str(TEXT_STEPS)]
    shared = ["--data", data, "--cache", str(work / "cache"), "--lr", "0.004", *steps]
    outs = {"gpt": work / f"gpt-{seed}", "retro": work / f"retro-{seed}"}
    run(outs["gpt"], seed, "--model", "gpt", "--batch-size", "8", *shared)
    run(outs["retro"], seed, "--model", "retro", "--size", "text", "--batch-size", "8", *shared)
    models = {name: open_model(out / "model").eval() for name, out in outs.items()}

    # The held-out rows, the bytes of each token, and the overlap of each chunk.
    args = flags_of_text(data, work, models["retro"].config.max_seq_len)
    val = retro_rows.load_text(args, models["retro"].config.chunk, models["retro"].config.n_neighbours).val
    tokens, m = np.asarray(val.rows.tokens, np.int64), val.index.m
    token_bytes = get_tokenizer(str(outs["retro"] / "model")).token_bytes
    n_bytes = np.array([len(token_bytes[t]) for t in tokens.tolist()])
    C = len(val.found)
    chunks = tokens[: C * m].reshape(C, m)
    passages = val.index.read(np.asarray(val.found, np.int64))
    overlap = np.array([common_run(chunk, row) for chunk, row in zip(chunks, passages, strict=True)])

    rows = []
    for name, model in models.items():
        for given in ("with", "without", "of others") if name == "retro" else ("without",):
            nats = np.r_[0.0, nats_of(model, val, given)]  # the first token is not predicted
            size = {"parameters": sum(p.numel() for p in model.parameters())}
            size["FLOPs per token"] = model.flops_per_token(args.seq_len)
            shares = {str(alpha): float((overlap <= alpha * m).mean()) for alpha in ALPHAS}
            of_run = {"part": "text", "model": name, "neighbours": given, "seed": seed, "share": shares}
            rows.append(of_run | size | {"bits per byte": by_overlap(nats, n_bytes, overlap, m)})
    return rows


def flags_of_text(data: str, work: Path, seq_len: int) -> Namespace:
    """Return the flags of train.py by which a text is read, as the runs of `of_text` have them."""
    options = {"val": None, "text_field": "text", "bad_text": "refuse", "tokenizer": "bpe:4096"}
    return Namespace(data=data, cache=work / "cache", seq_len=seq_len, **options)


def main(argv: list[str] | None = None) -> None:
    parser = command.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=command.new_file, required=True, help="file for the figures")
    work = Path("runs/results")
    add("--work", type=command.path, default=work, help="folder of runs (default %(default)s)")
    add("--parts", nargs="+", choices=("facts", "text"), default=["facts"], help="parts (default facts)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default 0 1 2)")
    add("--data", default="stdlib", help="the text, as for train.py (default %(default)s)")
    add("--steps", type=command.count, help="updates of each run (default: the model's, or 600 on a text)")
    args = parser.parse_args(argv)
    steps = ["--steps", str(args.steps)] if args.steps else []
    ended = Ended(args.out)
    for seed in args.seeds:
        if "facts" in args.parts and not ended.has(part="facts", seed=seed):
            ended.add({"part": "facts", "seed": seed} | of_facts(args.work, seed, steps))
        if "text" in args.parts and not ended.has(part="text", seed=seed):
            ended.add(*of_text(args.work, seed, args.data, steps))
    for row in ended.rows:
        print(json.dumps(row))


if __name__ == "__main__":
    command.run(main)
