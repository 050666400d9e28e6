"""Train any of the models: `python train.py --model gpt`.

    for step in range(steps):
        gradient of the mean loss over batch_size x grad_accum sequences, clipped to norm grad_clip
        optimizer step at learning_rate(step)

The loop stands in `train` below, a step of it in `update`. Around it: engine/options.py has the flags, engine/run.py what
is settled before the first step and what a model file must offer, engine/optim.py the rules of the update,
engine/parallel.py what many processes need. Everything random is a function of (seed, step): a run that is killed
and resumed computes, on a CPU to the bit, what it would have computed in one go. It leaves behind, in --out:

    model/           Hugging Face layout: opens with AutoModelForCausalLM and AutoTokenizer (adapters: PEFT)
    checkpoint/      what --resume needs; checkpoint.previous/ is the one before
    metrics.jsonl    one object per logged step and per evaluation
    report.html      curves, samples, configuration and environment on one page
    loss.png         training and validation loss over tokens
    samples.txt      what the model had to show at each evaluation; moe.py also draws experts.png
    run.json         how and where the run was started, each time
"""

import argparse
import json
import math
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import data.text
from engine import benchmark, cpu, memory, optim, parallel, report, watch
from engine.benchmark import wait_for
from engine.contract import find
from engine.options import parse_arguments
from engine.run import (
    Run,
    as_asked,
    command,
    count_parameters,
    next_batches,
    part_of,
    planned_model,
    prepare,
    save,
    to_device,
    whole_batch,
)

MAX_SKIPPED = 5  # steps in a row with a non-finite gradient at which the run gives up, when it next looks


class Told(Exception):
    """To stop, by the signal of that number, which some process was sent; raised in all of them."""

    def __init__(self, number: int):
        self.number = number


def autocast(args: argparse.Namespace) -> torch.autocast:
    """--dtype bfloat16: matrix products in it, of weights that stay float32. FSDP casts by itself."""
    enabled = args.dtype == "bfloat16" and args.parallel != "fsdp"
    return torch.autocast(args.device, dtype=torch.bfloat16, enabled=enabled)


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """Mean loss and other metrics over the whole held-out text, always the same draws whatever the training
    has drawn. Each process takes a part of the text; all of them are given the result. Raises Told."""
    run.model.eval()
    sums, n_targets, i, n = Counter(), 0, parallel.rank(), parallel.n_processes()
    tokens, T, B = run.dataset.val.tokens, run.args.seq_len, run.args.batch_size
    for index, rows in enumerate(data.text.held_out_batches(tokens, T, B)):
        if run.concept.SPECIAL_TOKENS and rows.shape[1] <= T:
            continue  # the end of the text: special tokens might leave it no room
        asked = parallel.ask(run.signal)
        batch = whole_batch(run, rows, index)
        # The last rows have another shape, for which nothing should be compiled again: each process takes
        # all of them.
        whole = rows.shape == (B, T + 1)
        batch = to_device(run, as_asked(run, part_of(run, batch, i, n) if whole else batch))
        with autocast(run.args), torch.compiler.set_stance("default" if whole else "force_eager"):
            loss, metrics = (run.loss_of if whole else run.model.loss)(batch)
        if told := asked():
            raise Told(told)
        n_here = int(metrics.pop("targets"))
        if n_here == 0 or not (whole or run.is_first):
            continue  # nothing was masked in these rows, and the mean of nothing is NaN; or counted already
        n_targets += n_here
        for name, mean in {"loss": loss, **metrics}.items():
            sums[f"val_{name}"] += n_here * mean.item()
    run.model.train()
    parts = parallel.gather_objects((n_targets, sums))
    n_targets, sums = sum(n for n, _ in parts), Counter()
    for _, part in parts:
        sums.update(part)  # adds up
    result = {name: total / n_targets for name, total in sums.items()}
    # Of the tokens alone, where something else is asked too.
    result["perplexity"] = math.exp(min(result.get("val_mlm_loss", result["val_loss"]), 700))
    if n_targets == len(tokens) - 1:  # every byte was predicted, so the sum is a code length for the text
        result["bits_per_byte"] = sums["val_loss"] / math.log(2) / run.dataset.val.n_bytes
    return result


def update(run: Run, mark: Callable[[str], None] = lambda part: None) -> tuple[Tensor, Tensor, float, dict]:
    """One step of the optimizers, left out if the gradient is not finite. Returns this process's share of the
    loss, the gradient's norm before clipping, the learning rate and the other metrics of the last batch.

    Nothing here waits for the device (but PyTorch's own attention of packed documents), which itself decides
    whether the step is made, and counts in run.skipped those that are not: in all, and in a row. mark is told
    after each part what it was."""
    args, model = run.args, run.model
    lr = optim.set_learning_rate(run.optimizers, run.step, args)
    mark("rest")
    batches, shares = next_batches(run)
    mark("batch")
    n = parallel.n_processes()
    torch.manual_seed((((args.seed << 32) + run.step) * n + parallel.rank()) % (1 << 64))  # for dropout
    loss = torch.zeros((), device=args.device)
    for i, (batch, share) in enumerate(zip(batches, shares, strict=True)):
        parallel.last_of_update(run.engine, i + 1 == len(batches))
        with autocast(args):
            micro_loss, metrics = run.loss_of(to_device(run, batch))
        (micro_loss * (share * n)).backward()  # gradients of n processes are averaged
        loss += micro_loss.detach() * share
    mark("gradient")
    norm = parallel.as_tensor(nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf))
    finite = norm.isfinite()
    optim.step_optimizers(run.optimizers, finite)
    if hasattr(model, "after_step"):
        model.after_step(finite)
    model.zero_grad(set_to_none=True)
    mark("update")
    run.step += 1
    run.skipped += ~finite
    run.skipped[1] *= ~finite
    return loss, norm, lr, metrics


def train(run: Run, watchers: list) -> int:
    """The loop. Returns the exit code: 0 at the end and after SIGTERM, by which a cluster takes its machine
    back, 130 after Ctrl-C, 1 if the loss stays non-finite."""
    args, out = run.args, run.args.out

    def on_signal(number: int, _) -> None:
        run.signal = number  # the step, or batch of an evaluation, is finished; a second Ctrl-C does not wait
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    announce(run)
    bar = tqdm(
        total=args.steps,
        initial=run.step,
        unit="step",
        smoothing=0,
        dynamic_ncols=True,
        disable=not run.is_first,
    )
    # tqdm has no flag for it: it goes by the wall clock, which may be set while it runs.
    bar._time = time.monotonic
    bar.start_t = bar.last_print_t = bar._time()
    shown, told = {}, 0
    try:
        if evaluation_is_due(run):
            shown["val"] = evaluate_and_show(run, watchers)
        logged, n_skipped, interval, began = run.step, run.n_skipped, 0.0, time.perf_counter()
        while run.step < args.steps:
            asked = parallel.ask(run.signal)  # of all processes, while the step is made
            loss, norm, lr, metrics = update(run)
            told = asked()
            bar.update()
            everies = args.log_every, args.eval_every, args.save_every
            log, show, keep = (run.step % every == 0 or run.step == args.steps for every in everies)
            if not (log or show or keep or told):
                continue
            wait_for(args.device)
            passed = time.perf_counter() - began
            interval, run.seconds = interval + passed, run.seconds + passed
            if log:
                row = log_row(run, loss, norm, lr, metrics, (run.step - logged) / interval)
                write_row(run, row, watchers)
                if run.n_skipped > n_skipped and run.is_first:
                    said = f"step {run.step}: loss {row['loss']}, gradient norm {row['grad_norm']}"
                    tqdm.write(f"{said}: {run.n_skipped - n_skipped} of {run.step - logged} updates skipped")
                logged, n_skipped, interval = run.step, run.n_skipped, 0.0
                shown |= {"loss": f"{row['loss']:.3f}", "tok/s": f"{row['tokens_per_second']:,.0f}"}
                shown |= {"mfu": f"{row['mfu']:.1%}"} if row["mfu"] else {}
            if run.n_skipped_in_a_row >= MAX_SKIPPED:
                bar.close()
                problem = f"{run.n_skipped_in_a_row} steps in a row were not finite; try a lower --lr"
                say_error(f"{problem}; {last_good(out)}")
                return 1
            if told:
                break
            if show:
                shown["val"] = evaluate_and_show(run, watchers)
            if keep and run.step < args.steps and not run.n_skipped_in_a_row:
                save(run)
            bar.set_postfix(shown, refresh=log)
            began = time.perf_counter()
    except Told as order:
        told = order.number
    bar.close()
    save(run)
    if told:
        if run.is_first:
            print(f"interrupted at step {run.step} and saved; go on with --resume", file=sys.stderr)
        return 130 if told == signal.SIGINT else 0
    if run.is_first:
        print((out / "samples.txt").read_text().rpartition("=== ")[2])
        print(f"model: {out / 'model'}    report: {out / 'report.html'}")
    return 0


def say_error(problem: str) -> None:
    """An error that ends the run; once, though every process may meet it."""
    if parallel.first_to_fail():
        print(f"error: {problem}", file=sys.stderr)


def last_good(out: Path) -> str:
    for where in (out / "checkpoint", out / "checkpoint.previous"):
        if where.is_dir():
            return f"the last good state is in {where}; go on with --resume"
    return "nothing is saved yet"


def start_logs(run: Run) -> list:
    """Note in run.json how the run is started, and open what --watch names."""
    if not run.is_first:
        return []
    args, config = run.args, asdict(run.model.config)
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    start = {"step": run.step, "command": command(), "flags": flags, "config": config}
    start |= {"n_params": count_parameters(run.model)[0], "environment": report.environment()}
    report.record_start(args.out, start, args.resume)
    return watch.watchers(args.watch, args.out, flags | config, run.step if args.resume else None)


def log_row(run: Run, loss: Tensor, norm: Tensor, lr: float, metrics: dict, steps_per_second: float) -> dict:
    """What metrics.jsonl says of a step. Of the metrics of several processes the mean over the targets."""
    rate = steps_per_second * run.tokens_per_step
    weight = metrics.pop("targets").item()
    own = [loss.item(), weight, *(weight * value.item() for value in metrics.values())]
    loss, weight, *sums = parallel.total(torch.tensor(own, dtype=torch.float64)).tolist()
    row = {"step": run.step, "tokens": run.step * run.tokens_per_step, "loss": loss, "lr": lr}
    row |= {"grad_norm": norm.item(), "skipped": run.n_skipped, "tokens_per_second": rate}
    row |= {"mfu": benchmark.mfu(run, rate), "seconds": run.seconds}
    return row | {name: value / max(weight, 1) for name, value in zip(metrics, sums, strict=True)}


def write_row(run: Run, row: dict, watchers: list) -> None:
    if run.is_first:
        append(run.args.out / "metrics.jsonl", json.dumps(row) + "\n")
    for watcher in watchers:
        watcher.log(row["step"], row)


def append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def evaluation_is_due(run: Run) -> bool:
    """At the start, and on resuming where a signal came before the evaluation was done."""
    if run.step % run.args.eval_every and run.step != run.args.steps:
        return False

    def is_missing() -> bool:
        rows = (run.args.out / "metrics.jsonl").read_text().splitlines()
        last = json.loads(rows[-1]) if rows else {}
        return last.get("step") != run.step or "val_loss" not in last

    return parallel.ask_first(is_missing)


def evaluate_and_show(run: Run, watchers: list) -> str:
    args, out = run.args, run.args.out
    result = evaluate(run)
    parallel.gather(run.model, run.whole)
    shown = f"{result['val_loss']:.3f}"
    if "val_accuracy" in result:
        shown += f", {result['val_accuracy']:.1%} right"
    write_row(run, {"step": run.step, "tokens": run.step * run.tokens_per_step, **result}, watchers)
    if run.is_first:
        held_out = torch.from_numpy(run.dataset.val.tokens[: 16 * args.seq_len].astype("int64"))
        with torch.compiler.set_stance("force_eager"):  # its shapes would use up what may be compiled
            sample = run.concept.show(run.whole.eval(), run.dataset.tokenizer, held_out, out)
        heading = f"=== step {run.step}, validation loss {result['val_loss']:.4f}"
        if "val_accuracy" in result:
            heading += f", accuracy {result['val_accuracy']:.1%}"
        append(out / "samples.txt", f"{heading}\n{sample}\n\n")
        report.draw_loss(out)
        report.write(out)
    run.model.train()
    parallel.barrier()
    return shown


def announce(run: Run) -> None:
    """Say what will be trained and how long it will take, by timing a forward and backward pass."""
    args, model, train, val = run.args, run.model, run.dataset.train.tokens, run.dataset.val.tokens
    passes = []
    (batch, *_), _ = run.ahead.result()
    for _ in range(3):  # the first ones warm up, or compile
        began = time.perf_counter()
        with autocast(args):
            loss, _ = run.loss_of(to_device(run, batch))
        loss.backward()
        loss.item()
        passes.append(time.perf_counter() - began)
    model.zero_grad(set_to_none=True)
    if not run.is_first:
        return
    n_params, n_active, n_trained = count_parameters(model)
    n_tokens = args.steps * run.tokens_per_step
    n_flops = n_tokens * model.flops_per_token(args.seq_len)
    left = args.steps - run.step
    evaluations = (left // args.eval_every + 1) * len(val) / (args.batch_size * args.seq_len)
    minutes = min(passes) * (left * args.grad_accum + evaluations / 3) / 60  # forward alone: a third
    part = f", {n_active:,} of them active" if n_active < n_params else ""
    if n_trained < n_params:
        part = f", {n_trained:,} of them trained ({n_trained / n_params:.2%})"
    print(f"model  {args.model} {args.init_from or args.size}, {n_params:,} parameters{part}")
    print(f"text   {args.data}, {len(train):,} tokens to train on, {len(val):,} held out")
    epochs = n_tokens / len(train)
    if not hasattr(run.concept, "prepare_data"):
        best = np.bincount(train[: 1 << 24]).argmax()
        print(f"guess  the most frequent token is right for {np.mean(val == best):.2%} of the held out")
    print(f"run    {args.steps:,} steps of {run.tokens_per_step:,} tokens: {n_tokens:,}, {epochs:.2f} epochs")
    per_parameter = f", {n_tokens / n_params:.2f} tokens per parameter (Chinchilla: 20)"
    print(f"cost   {n_flops:.2e} FLOPs{per_parameter if n_trained == n_params else ''}")
    n = parallel.n_processes()
    where = f"{n} x {args.device} ({args.parallel})" if n > 1 else args.device
    print(f"here   {args.dtype} on {where}, about {minutes:.1f} min from step {run.step}", flush=True)


def measure(args: argparse.Namespace) -> str:
    """What --benchmark or --profile is to print. Nothing is written but the trace, to --out."""
    trace = args.out / "trace.json"
    with tempfile.TemporaryDirectory() as aside:
        args.out = Path(aside)
        run = prepare(args)
        args.steps = max(args.steps, benchmark.WARM_UP + benchmark.STEPS)  # no schedule ends before
        if args.profile:
            said = f"{benchmark.trace(run, update, trace)}\ntrace: {trace}\n"
        else:
            said = benchmark.describe(benchmark.measure(run, update, log_row))
        run.close()
    return said


def dry_run(args: argparse.Namespace) -> str:
    """What --dry-run is to print."""
    model, functions = planned_model(args), {}
    if hasattr(model, "base_model"):
        model, functions = model.base_model, {"adapter_bytes": find("lora").adapter_bytes}
    file = sys.modules[type(model).__module__]
    task = file if hasattr(file, "loss_bytes") else getattr(file, "masking", file)
    for source, name in ((file, "mlp_bytes"), (task, "loss_bytes")):
        functions |= {name: getattr(source, name)} if hasattr(source, name) else {}
    return memory.describe(model, args, args.dry_run, config=model.config, **functions)


def obey(args: argparse.Namespace) -> int:
    """Do what the flags say. Returns the exit code."""
    try:
        if args.compare:
            print(report.compare(args.compare, Path()))
            return 0
        if args.dry_run:
            print(dry_run(args))
            return 0
        parallel.start(args)
        if args.benchmark or args.profile:
            said = measure(args)
            print(said if parallel.rank() == 0 else "", end="")
            return 0
        run = prepare(args)
        watchers = start_logs(run)
    except (ValueError, OSError) as error:
        say_error(str(error))
        return 2
    try:
        return train(run, watchers)
    except OSError as error:  # most likely a full disk
        say_error(f"{error}; {last_good(args.out)}")
        return 1
    finally:
        run.close()
        for watcher in watchers:
            watcher.close()


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    cpu.keep_memory()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return obey(args)
    except KeyboardInterrupt:
        return 130
    except Exception:
        # Where one process fails the others do too, for want of it: only the first is of interest.
        if parallel.first_to_fail():
            raise
        return 1
    finally:
        torch.set_float32_matmul_precision(precision)
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    code = main()
    if code == 0:
        parallel.end()
    sys.exit(code)
