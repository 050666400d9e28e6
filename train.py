"""Train any of the models: `python train.py --model gpt`.

    for step in range(steps):
        gradient of the mean loss over batch_size x grad_accum sequences, clipped to norm grad_clip
        optimizer step at learning_rate(step)

`train` is the loop; `update` is one step of it, made of `gradient` and `descend`; `evaluate` is the loss on
held-out data. Behind it stand

    engine/contract.py    what a file such as gpt.py must offer to be trained, and what it may leave out
    engine/run.py         everything that is settled before the first step
    engine/batches.py     from rows of data to the batches of a step
    engine/optim.py       AdamW, Muon, the learning rate's schedule

Everything random is a function of (seed, step, rank): a run that is killed and resumed computes, on a CPU to
the bit, what it would have computed in one go. It leaves behind, in --out:

    model/           opens with formats.open_model; also with AutoModelForCausalLM and the like, or with PEFT
    checkpoint/      what --resume needs; checkpoint.previous/ is the one before
    metrics.jsonl, samples.txt, loss.png, report.html, run.json     see engine/log.py
"""

import argparse
import math
import signal
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from engine import cpu, parallel
from engine.batches import Part, to_device
from engine.checkpoint import last_saved, save
from engine.log import Diverged, Log, UpdateResult, time_and_announce
from engine.optim import set_learning_rate, step_optimizers
from engine.options import parse_arguments
from engine.run import Interrupted, Run, plan, prepare, signals
from formats import command


def train(run: Run, log: Log) -> None:
    """Train to the last step. Raises Interrupted after a signal, and Diverged if the gradient was not finite
    in several steps in a row."""
    if log.evaluation_is_missing():
        log.evaluation(evaluate(run))

    for _ in run.steps():
        log.begin_step()
        log.step(update(run))

        if run.is_due(run.args.eval_every):
            log.evaluation(evaluate(run))
        # The last step is saved by the caller. After skipped updates the weights are those of the last save.
        if run.is_due(run.args.save_every) and run.step < run.args.steps and not run.n_skipped_in_a_row:
            save(run)


def update(run: Run) -> UpdateResult:
    """Make one update of the weights.

    Nothing here waits for a GPU, so that the next update is queued while it computes this one.
    """
    lr = set_learning_rate(run.optimizers, run.step, run.args)
    parts = run.batches.next()
    loss, metrics = gradient(run, parts)
    norm = descend(run)
    return UpdateResult(loss, norm, lr, metrics, parts[-1].n_targets)


def gradient(run: Run, parts: list[Part]) -> tuple[torch.Tensor, dict]:
    """Add up the gradients of the --grad-accum batches of one update, of each of which this rank has a part.

    run.loss(batch) is the loss of the task, for gpt.py `GPT.loss`, as DDP, FSDP or torch.compile wrap it.
    Returns this rank's term in the sum that is the mean loss over all targets, and the last part's metrics.
    """
    n, args = parallel.world_size(), run.args
    # Dropout draws the same numbers whenever this step is computed, and other numbers on every rank.
    torch.manual_seed((((args.seed << 32) + run.step) * n + parallel.rank()) % (1 << 64))
    total, metrics = torch.zeros((), device=args.device), {}
    for i, part in enumerate(parts):
        # The ranks exchange gradients once, with the last part.
        parallel.sync_gradients(run.synced_module, i + 1 == len(parts))
        with run.autocast():
            loss, metrics = run.loss(to_device(part.batch, args.device))
        # Gradients of n ranks are averaged, and the weights of all parts add up to 1: hence the factor n.
        (loss * (part.weight * n)).backward()
        total += loss.detach() * part.weight
    return total, metrics


def descend(run: Run) -> torch.Tensor:
    """Clip the gradient, step the optimizers, clear the gradient and count the step.

    Where the gradient is not finite the device leaves the update out, by itself. Returns the norm of the
    gradient before clipping.
    """
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.args.grad_clip or math.inf)
    norm = parallel.unshard(norm)
    finite = norm.isfinite()
    step_optimizers(run.optimizers, finite)
    run.finish_step(finite)
    return norm


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """Return the mean loss and other metrics over all held-out rows, on every rank.

    The batches are the same at every evaluation. Raises Interrupted after a signal.
    """
    run.model.eval()
    sums, n_targets = Counter(), 0
    for part in run.batches.held_out():
        signal_number = parallel.max_over_ranks_async(run.signal)
        # The last rows have another shape, for which neither the loss nor a block should be compiled again.
        loss_of, stance = (run.loss, "default") if part.is_whole else (run.objective, "force_eager")
        with run.autocast(), torch.compiler.set_stance(stance):
            loss, metrics = loss_of(to_device(part.batch, run.args.device))
        if number := signal_number():
            raise Interrupted(number)
        # Every rank gets the last rows, which may not divide evenly, and rank 0 counts them. A part without
        # targets counts for nothing; its mean may be NaN.
        if part.n_targets == 0 or not (part.is_whole or run.is_first):
            continue
        n_targets += part.n_targets
        for name, mean in {"loss": loss, **metrics}.items():
            sums[name] += part.n_targets * mean.item()
    run.model.train()

    # Add up the sums of all ranks.
    everywhere = parallel.all_gather((n_targets, sums))
    n_all, totals = sum(n for n, _ in everywhere), Counter()
    for _, own in everywhere:
        totals.update(own)  # a Counter adds
    result = {f"val_{name}": total / n_all for name, total in totals.items()}

    # Perplexity is of the tokens alone, without other terms of the loss.
    nats = result.get(f"val_{run.concept.task.TOKEN_LOSS}", result["val_loss"])
    result["perplexity"] = math.exp(min(nats, 700))  # exp(710) overflows
    val = run.dataset.val
    if n_all == val.n_targets:  # every token of a text was predicted: the sum is a code length for it
        result["bits_per_byte"] = totals["loss"] / math.log(2) / val.n_bytes
    return result


def train_and_save(run: Run, log: Log) -> int:
    """Train, save, and print the last sample. Returns the exit code: 0 at the end and after SIGTERM, with
    which a cluster takes its machine back, 130 after Ctrl-C, 1 if the gradient stays non-finite."""
    try:
        time_and_announce(run)
        train(run, log)
    except Interrupted as interruption:
        save(run)
        log.progress.close()
        if run.is_first:
            print(f"interrupted at step {run.step} and saved; go on with --resume", file=sys.stderr)
        return 130 if interruption.number == signal.SIGINT else 0
    except Diverged as error:
        log.progress.close()  # so that the error is the last line
        parallel.print_error(f"{error}; {last_saved(run.args.out)}")
        return 1
    save(run)
    log.progress.close()
    if run.is_first:
        out = run.args.out
        print((out / "samples.txt").read_text(encoding="utf-8").rpartition("\n=== step ")[2])
        print(f"model: {out / 'model'}    report: {out / 'report.html'}")
    return 0


def run_command(args: argparse.Namespace) -> int:
    """Do what the flags name: compare, estimate, measure or train. Returns the exit code."""
    try:
        if args.compare:
            from engine import report

            print(report.compare(args.compare, Path()))
            return 0
        if args.dry_run:
            print(plan(args))
            return 0
        parallel.initialize(args)
        if args.benchmark or args.profile:
            from engine import benchmark

            print(benchmark.run(args, prepare, gradient, descend), end="")
            return 0
        run = prepare(args)
        log = Log(run)
    except (ValueError, OSError) as error:
        parallel.print_error(str(error))
        return 2
    try:
        with signals(run):
            return train_and_save(run, log)
    except OSError as error:  # most likely a full disk
        parallel.print_error(f"{error}; {last_saved(args.out)}")
        return 1
    finally:
        log.close()
        run.close()


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU; engine/cpu.py chooses on a CPU
    cpu.keep_memory()
    try:
        return run_command(args)
    except KeyboardInterrupt:
        return 130
    except Exception:
        # When one rank fails, the others fail waiting for it: only the first traceback is printed.
        if parallel.first_to_fail():
            raise
        return 1
    finally:
        torch.set_float32_matmul_precision(precision)


if __name__ == "__main__":
    command.use_streams(outlive_reader=True)
    code = main()
    if code == 0:
        parallel.shut_down()
    sys.exit(code)
