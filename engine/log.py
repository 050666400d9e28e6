"""The log of a run: what is printed, written and drawn while it goes on.

    metrics.jsonl    one object per logged step and per evaluation
    samples.txt      a sample of what the model does, such as a text, at each evaluation
    pictures/        the same as a picture, N.png at step N; picture.png is the last one
    loss.png         training and validation loss over tokens, or images
    report.html      curves, samples, configuration and environment on one page
    run.json         how and where the run was started, each time

Numbers are read from the device every --log-every steps only: reading waits for it.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engine import checkpoint, cpu, parallel, report, watch
from engine.batches import to_device
from engine.checkpoint import save_model
from engine.device import mfu, wait_for
from engine.progress import Progress
from engine.run import Run
from formats.json_file import json_line

MAX_SKIPPED = 5  # updates in a row without a finite gradient after which a run gives up


class Diverged(Exception):
    """The gradient was not finite in MAX_SKIPPED steps in a row."""


class Failed(Exception):
    """Raised by the loop of a task where what a user has supplied, such as a reward function, fails."""


class UpdateResult(NamedTuple):
    """The results of one update that are logged, still on the device."""

    loss: Tensor  # this rank's share of the mean over all targets of the update
    norm: Tensor  # of the gradient, before clipping
    lr: float
    metrics: dict[str, Tensor]  # means over this rank's targets of the last batch
    n_targets: int  # the number of those targets


class Log:
    """Writes the log of a run. On other ranks than 0 it only takes part in what all ranks compute."""

    def __init__(self, run: Run):
        self.run = run
        self.watchers = start_logs(run) if run.is_first else []
        self.progress = Progress(run.args.steps, run.step, enabled=run.is_first)
        self.shown: dict[str, str] = {}
        # Since the last logged step: seconds of training, CPU seconds, updates made, updates skipped.
        self.interval, self.cpu_interval = 0.0, 0.0
        self.logged_step, self.logged_skipped = run.step, run.n_skipped
        self.advised = run.args.device != "cpu"  # whether the advice about busy cores is printed, or needless
        self.begin_step()
        # The lowest validation loss, and the number of evaluations since.
        self.lowest, self.n_since_lowest = math.inf, 0
        for loss in parallel.on_rank_0(lambda: validation_losses(run.args.out)):
            self.count_evaluation(loss)

    def close(self) -> None:
        self.progress.close()
        for watcher in self.watchers:
            watcher.close()

    def begin_step(self) -> None:
        """Start the clock of a step; what happens between steps, evaluation and saving, is not counted."""
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def step(self, step: UpdateResult) -> None:
        """Log an update. Raises Diverged after MAX_SKIPPED updates in a row without a finite gradient."""
        run, args = self.run, self.run.args
        self.progress.update(run.step)
        log = run.is_due(args.log_every)
        pause = log or run.is_due(args.eval_every) or run.is_due(args.save_every)
        if pause:
            wait_for(args.device)
        passed = time.perf_counter() - self.began
        self.interval, run.seconds = self.interval + passed, run.seconds + passed
        self.cpu_interval += time.process_time() - self.cpu_began
        if log:
            self.write_step(step)
        if pause and run.n_skipped_in_a_row >= MAX_SKIPPED:
            raise Diverged(f"{run.n_skipped_in_a_row} steps in a row were not finite; try a lower --lr")

    def write_step(self, step: UpdateResult) -> None:
        """Write a row of metrics.jsonl and show its figures."""
        run, n_steps = self.run, self.run.step - self.logged_step
        row = row_of(run, step, n_steps / self.interval)
        self.write(row)
        n_skipped = run.n_skipped - self.logged_skipped
        if n_skipped:
            figures = f"step {run.step}: loss {row['loss']}, gradient norm {row['grad_norm']}"
            self.progress.note(f"{figures}: {n_skipped} of {n_steps} updates skipped")
        if not self.advised and (advice := cpu.crowded(self.interval, self.cpu_interval)):
            self.progress.note(advice)
            self.advised = True
        self.logged_step, self.logged_skipped = run.step, run.n_skipped
        self.interval, self.cpu_interval = 0.0, 0.0
        rate = row[f"{run.dataset.unit}_per_second"]
        self.shown |= {"loss": f"{row['loss']:.3f}", f"{run.dataset.unit}/s": f"{rate:,.0f}"}
        if row["mfu"]:
            self.shown["mfu"] = f"{row['mfu']:.1%}"
        self.progress.show(**self.shown)

    def evaluate(self, evaluate: Callable[[Run], dict[str, float]]) -> bool:
        """Evaluate the model, with --ema its averages, log what is found, and with --keep-best keep a model
        of a lower loss. Return whether --patience ends the run. Called by all ranks."""
        with self.run.averaged():
            self.evaluation(evaluate(self.run))
        if self.run.args.keep_best and self.n_since_lowest == 0:
            save_model(self.run, self.run.args.out / "best")
        return self.patience_ends()

    def evaluation(self, result: dict[str, float]) -> None:
        """Write an evaluation, a sample of the model, and the report. Called by all ranks."""
        run, out = self.run, self.run.args.out
        self.count_evaluation(result["val_loss"])
        parallel.update_unsharded(run.model, run.unsharded)
        self.write({"step": run.step, run.dataset.unit: run.step * run.units_per_step, **result})
        accuracy = result.get("val_accuracy")
        self.shown["val"] = f"{result['val_loss']:.3f}"
        if accuracy is not None:
            self.shown["val"] += f", {accuracy:.1%} right"
        if run.is_first:
            # Samples have varying shapes: compiled, they would exhaust torch.compile's cache.
            with torch.compiler.set_stance("force_eager"):
                sample = run.concept.task.show(run.unsharded.eval(), run.dataset, out)
            heading = f"=== step {run.step}, validation loss {result['val_loss']:.4f}"
            if accuracy is not None:
                heading += f", accuracy {accuracy:.1%}"
            append(out / "samples.txt", f"{heading}\n{sample}\n\n")
            report.keep_picture(out, run.step)
            report.draw_loss(out)
            report.write(out)
        run.model.train()
        self.progress.show(**self.shown)
        parallel.barrier()

    def count_evaluation(self, loss: float) -> None:
        """Count an evaluation since the lowest loss, or note a lower one."""
        is_lower = loss < self.lowest
        self.lowest = loss if is_lower else self.lowest
        self.n_since_lowest = 0 if is_lower else self.n_since_lowest + 1

    def patience_ends(self) -> bool:
        """Return whether --patience evaluations in a row have found no lower loss. If so, print it."""
        if self.run.args.patience is None or self.n_since_lowest < self.run.args.patience:
            return False
        self.progress.note(
            f"stopped at step {self.run.step}: {self.n_since_lowest} evaluations, no lower loss"
        )
        return True

    def write(self, row: dict) -> None:
        """Write a row to metrics.jsonl and to what --watch names."""
        if self.run.is_first:
            append(self.run.args.out / "metrics.jsonl", json_line(row))
        for watcher in self.watchers:
            watcher.log(row["step"], row)

    def evaluation_is_missing(self) -> bool:
        """Return whether an evaluation is due at this step and metrics.jsonl has none: at the start, and on
        resuming where a signal came before the evaluation was done."""
        run = self.run
        if not run.is_due(run.args.eval_every):
            return False

        def is_missing() -> bool:
            rows = (run.args.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            last = json.loads(rows[-1]) if rows else {}
            return last.get("step") != run.step or "val_loss" not in last

        return parallel.on_rank_0(is_missing)


def evaluate_and_save(run: Run, log: Log, evaluate: Callable[[Run], dict[str, float]]) -> bool:
    """Evaluate and save after a step, where the flags call for it. Return whether --patience ends the run.

    The last step is not saved here, but after the loop. While updates are skipped the last checkpoint is not
    overwritten.
    """
    if run.is_due(run.args.eval_every) and log.evaluate(evaluate):
        return True
    if run.is_due(run.args.save_every) and run.step < run.args.steps and not run.n_skipped_in_a_row:
        checkpoint.save(run)
    return False


def validation_losses(out: Path) -> list[float]:
    """Return the validation losses in the metrics.jsonl of a run, NaN where one was not finite."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["val_loss"] for line in lines if '"val_loss"' in line]
    return [math.nan if loss is None else loss for loss in losses]


def row_of(run: Run, step: UpdateResult, steps_per_second: float) -> dict:
    """Return the row of metrics.jsonl for a step. Metrics of the ranks are averaged over their targets."""
    unit, rate = run.dataset.unit, steps_per_second * run.units_per_step
    weight = step.n_targets
    own = [step.loss.item(), weight, *(weight * value.item() for value in step.metrics.values())]
    loss, weight, *sums = parallel.all_reduce_sum(torch.tensor(own, dtype=torch.float64)).tolist()
    row = {"step": run.step, unit: run.step * run.units_per_step, "loss": loss, "lr": step.lr}
    row |= {"grad_norm": step.norm.item(), "skipped": run.n_skipped, f"{unit}_per_second": rate}
    row |= {"mfu": mfu(run, rate), "seconds": run.seconds}
    return row | {name: total / max(weight, 1) for name, total in zip(step.metrics, sums, strict=True)}


def start_logs(run: Run) -> list:
    """Write to run.json how the run is started, and return the watchers that --watch names."""
    args, config = run.args, asdict(run.model.config)
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    start = {"step": run.step, "command": checkpoint.command(), "flags": flags, "config": config}
    start |= {"n_params": run.sizes.n_params, "flops_per_token": run.flops_per_token}
    start |= {"fingerprint": run.dataset.fingerprint, "text": run.dataset.text}
    start |= {"data": data_of(run), "guess": run.dataset.guess, "task": run.concept.task.name}
    start |= {"unit": run.dataset.unit, "loss": run.concept.task.LOSS}
    start |= {"references": run.concept.model_file.references(run.model.config)}
    start |= {"environment": report.environment()}
    goes_on = bool(args.resume or args.extend)
    report.record_start(args.out, start, goes_on)
    return watch.watchers(args.watch, args.out, flags | config, run.step if goes_on else None)


def data_of(run: Run) -> str:
    """Return a description of the data set: --data, and its size where the data set gives it."""
    return f"{run.args.data}, {run.dataset.summary}" if run.dataset.summary else str(run.args.data)


def append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def time_and_announce(run: Run) -> None:
    """Print what will be trained and how long it will take, by timing a forward and backward pass.

    The time is left out for a task with a loop of its own, which does more in a step.
    """
    args, passes = run.args, []
    part = run.batches.peek()[0]
    for _ in range(3 if run.concept.task.train is None else 0):  # the first ones warm up, or compile
        began = time.perf_counter()
        with run.autocast():
            loss, _ = run.loss(to_device(part.batch, args.device))
        loss.backward()
        loss.item()
        passes.append(time.perf_counter() - began)
    run.model.zero_grad(set_to_none=True)
    if not run.is_first:
        return

    left, n_rows = args.steps - run.step, len(run.dataset.val)
    evaluations = (left // args.eval_every + 1) * n_rows / args.batch_size
    per_step = args.grad_accum * (1 + bool(args.sam_rho))  # SAM makes a second pass
    n_passes = left * per_step + evaluations / 3  # forward alone: a third
    minutes = min(passes) * n_passes / 60 if passes else None
    n = parallel.world_size()
    where = f"{n} x {args.device} ({args.parallel})" if n > 1 else args.device
    lines = report.describe_run(
        model=f"{args.model} {args.init_from or args.base or args.size}",
        data=data_of(run),
        guess=run.dataset.guess,
        **run.sizes._asdict(),
        steps=args.steps,
        unit=run.dataset.unit,
        units_per_step=run.units_per_step,
        epochs=args.steps * args.batch_size * args.grad_accum / len(run.dataset.train),
        flops=args.steps * run.units_per_step * run.flops_per_token,
        device=f"{args.dtype} on {where}",
        minutes=minutes,
        step=run.step,
    )
    print(*lines, sep="\n", flush=True)
