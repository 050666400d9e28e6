"""Train any of the models: `python train.py --model gpt`.

    for step in range(steps):
        gradient of the mean loss over all targets of batch_size x grad_accum rows, clipped to norm grad_clip
        optimizer step at learning_rate(step)

`train` is the loop, `update` one step of it, `evaluate` the loss on held-out data. One update of
`--model gpt` uses four files:

    train.py             update: set the learning rate, take the batches, `gradient`, `descend`
    engine/batches.py    rows of the data -> `make_batch` of gpt.py -> the part of this rank, one update ahead
    gpt.py               `make_batch`, and `GPT.loss`: the forward pass. Autograd does the backward pass, with
                         gradients of their own for the operations in kernels/
    engine/optim.py      the learning rate of a step; a step of AdamW (the default) or Muon

A file such as gpt.py offers a model, and a task: how a batch is made, and its loss. Both together, with an
adapter if there is one, are called a concept. engine/contract.py has defaults for what a file leaves out, and
engine/run.py everything that is settled before the first step.

Everything random is a function of (seed, step, rank): a run that is killed and resumed computes, on a CPU to
the bit, what it would have computed in one go. It leaves behind, in --out:

    model/           opens with formats.open_model, AutoModelForCausalLM and the like, or PEFT
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
from engine.batches import Part, seed_of, to_device
from engine.checkpoint import last_saved, save
from engine.log import Diverged, Failed, Log, UpdateResult, evaluate_and_save, time_and_announce
from engine.optim import set_learning_rate, sharpness_aware, step_optimizers
from engine.options import parse_arguments
from engine.run import Interrupted, Run, prepare, signals
from formats import command


def train(run: Run, log: Log) -> None:
    """Train to the last step, or until --patience ends. Raises Interrupted after a signal, and Diverged if
    the gradient was not finite in several steps in a row."""
    if log.evaluation_is_missing() and log.evaluate(evaluate):
        return  # --patience ends

    for _ in run.steps():
        log.begin_step()
        log.step(update(run))
        # After --eval-every and --save-every steps.
        if evaluate_and_save(run, log, evaluate):
            return  # --patience ends


def update(run: Run) -> UpdateResult:
    """Make one update of the weights. Return what is logged of it: this rank's term of the mean loss (in one
    process all of it), the norm of the gradient, the learning rate, and of the last batch the task's metrics
    and the number of targets that they are means of.

    Nothing here waits for a GPU, so that the next update is queued while it computes this one.
    """
    lr = set_learning_rate(run.optimizers, run.step, run.args)
    parts = run.batches.next()  # this rank's part of each batch, prepared by a thread; by default one
    loss, metrics = sharpness_aware(gradient, run, parts)  # with --sam-rho a second pass
    norm = descend(run)
    return UpdateResult(loss, norm, lr, metrics, parts[-1].n_targets)


def gradient(run: Run, parts: list[Part]) -> tuple[torch.Tensor, dict]:
    """Add up the gradients of this rank's parts of the --grad-accum batches of one update.

    The weight of a part is its number of targets over that of the whole update: of all parts on all ranks.
    So the mean loss over all targets is the sum of weight * loss over all parts on all ranks. In one process
    and without --grad-accum there is one part, of weight 1. Returns this rank's term of that sum, and the
    metrics of its last part.
    """
    n_ranks, args = parallel.world_size(), run.args
    # One number for each (seed, step, rank): dropout draws the same whenever this step is computed.
    torch.manual_seed(seed_of(args.seed, run.step * n_ranks + parallel.rank()))
    total, metrics = torch.zeros((), device=args.device), {}
    for i, part in enumerate(parts):
        # The ranks average their gradients once, during the backward pass of the last part.
        parallel.sync_gradients(run.synced_module, i + 1 == len(parts))
        # run.loss is parallel.Objective, perhaps compiled, perhaps wrapped by DDP or FSDP. It calls the
        # task's `loss`, by default contract.loss, and that GPT.loss. Autocast acts with --dtype bfloat16.
        with run.autocast():
            loss, metrics = run.loss(to_device(part.batch, args.device))
        # The factor turns the average of the ranks' gradients into their sum.
        (loss * (part.weight * n_ranks)).backward()
        total += loss.detach() * part.weight
    return total, metrics


def descend(run: Run) -> torch.Tensor:
    """Clip the gradient, step the optimizers, clear the gradient and count the step.

    If the norm is infinite or NaN the optimizers skip the step. `finite` stays a tensor, which they read on
    the device, because an `if` would make Python wait. Returns the norm of the gradient before clipping.
    """
    # --grad-clip 0 measures the norm and clips nothing.
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.args.grad_clip or math.inf)
    norm = parallel.unshard(norm)  # with FSDP each rank holds a part of it
    finite = norm.isfinite()
    step_optimizers(run.optimizers, finite)
    # Nothing for gpt.py; moe.py corrects the balance of its experts here.
    run.concept.model_file.after_step(run.model, finite)
    run.model.zero_grad(set_to_none=True)
    run.count_step(finite)
    if run.averages is not None:  # --ema
        run.averages.update(finite, run.step)
    return norm


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """Return the mean loss and other metrics over all held-out rows, on every rank.

    The batches are the same at every evaluation. Raises Interrupted after a signal.
    """
    run.model.eval()
    sums, n_targets = Counter(), 0
    for part in run.batches.held_out():
        wait_for_signal = parallel.max_over_ranks_async(run.signal)  # exchanged while the batch is computed
        # run.objective is the same loss, neither compiled as a whole nor wrapped by DDP. The last rows have
        # another shape, for which nothing should be compiled again.
        loss_of, stance = (run.loss, "default") if part.is_whole else (run.objective, "force_eager")
        with run.autocast(), torch.compiler.set_stance(stance):
            loss, metrics = loss_of(to_device(part.batch, run.args.device))
        if number := wait_for_signal():
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

    # Perplexity and bits per byte are of the prediction of tokens. Where the loss has further terms, as
    # Electra's, the task names the metric that is without them, and "" where no token is predicted.
    if token_loss := run.concept.task.TOKEN_LOSS:
        name, val = token_loss if token_loss in totals else "loss", run.dataset.val
        result["perplexity"] = math.exp(min(totals[name] / n_all, 700))  # exp(710) overflows
        if n_all == val.n_targets:  # every token was predicted, by next-token tasks alone: a code length
            result["bits_per_byte"] = totals[name] / math.log(2) / val.n_bytes
    return result


def train_and_save(run: Run, log: Log) -> int:
    """Train, save, and print the last sample. Returns the exit code: 0 at the end and after SIGTERM, by which
    clusters take machines back; 130 after Ctrl-C; 1 if the gradient stays non-finite; 2 after Failed."""
    try:
        time_and_announce(run)
        (run.concept.task.train or train)(run, log)
    except Interrupted as interruption:
        save(run)
        log.progress.close()
        if run.is_first:
            print(f"interrupted at step {run.step} and saved; go on with --resume", file=sys.stderr)
        return 130 if interruption.number == signal.SIGINT else 0
    except (Diverged, Failed) as error:
        log.progress.close()  # so that the error is the last line
        parallel.print_error(f"{error}; {last_saved(run.args.out)}")
        return 2 if isinstance(error, Failed) else 1
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
            from engine import compare

            print(compare.compare(args.compare, Path()))
            return 0
        if args.dry_run:
            from engine import memory

            print(memory.plan(args))
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
    """Run train.py with these arguments, by default those of the command line. Return the exit code."""
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
