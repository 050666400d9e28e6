"""What the ranks of a test compute, and three ways to start them: forked, which is fast; by a torchrun that
forks them; or by torchrun as users start it."""

import json
import multiprocessing
import os
import signal
import sys
import traceback
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed.run
from conftest import ROOT, Beside
from forks import Forked
from safetensors.torch import save_file
from torch.distributed import TCPStore
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import gpt
import train
from engine import parallel
from engine.contract import find

SMALL = dict(n_layers=2, n_heads=4, d_model=32, d_ff=48, max_seq_len=64)


def make_small():
    """Let the size "tiny" of each model be smaller."""
    for name in ("gpt", "bert", "moe"):
        sizes = find(name).SIZES
        fields = SMALL | ({"n_kv_heads": 2} if name != "bert" else {})
        fields |= {"n_experts": 6, "d_expert": 20, "bias_update_rate": 0.01} if name == "moe" else {}
        sizes["tiny"] = replace(sizes["tiny"], **fields)


@contextmanager
def watched(out, spoilt=None):
    """Write to the directory `out` the gradients of the first and the third update, how often ddp has reduced
    gradients, and how many graphs --compile has found, which are run as they are. spoilt: the arguments of
    `spoil`, or None."""
    made, step, ddp, reduced = [], train.step_optimizers, parallel.DistributedDataParallel, []
    graphs, compiler = [], torch.compile

    def as_it_is(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def counted(state, bucket):
        reduced.append(bucket.index())
        return allreduce_hook(None, bucket)

    class Counting(ddp):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_comm_hook(None, counted)

    def watching(optimizers, finite):
        made.append(1)
        params = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        gradients = {str(i): parallel.unshard(p.grad).clone() for i, p in enumerate(params)}
        if len(made) in (1, 3) and parallel.rank() == 0:
            save_file(gradients, Path(out) / f"gradients-{len(made)}.safetensors")
        step(optimizers, finite)

    train.step_optimizers, parallel.DistributedDataParallel = watching, Counting
    torch.compile = partial(compiler, backend=as_it_is)
    forget = spoil(*spoilt) if spoilt else None
    try:
        yield
    finally:
        train.step_optimizers, parallel.DistributedDataParallel, torch.compile = step, ddp, compiler
        if forget:
            forget()
        if parallel.rank() == 0:
            (Path(out) / "reduced").write_text(str(reduced.count(0)))
            (Path(out) / "graphs").write_text(str(len(graphs)))


def spoil(rank, update, how):
    """Spoil one update of one rank, and return a function that undoes this. how: by a NaN in its gradient
    ("nan"), by an exception ("raise"), or by SIGTERM in the evaluation after it ("sigterm")."""
    original, calls = gpt.GPT.loss, []

    def loss(self, batch):
        value, metrics = original(self, batch)
        calls.append(self.training)
        # After three passes that are timed, two in each update.
        now = parallel.rank() == rank and sum(calls) == 3 + 2 * update
        if now and how == "sigterm" and not self.training:
            os.kill(os.getpid(), signal.SIGTERM)
        now = now and self.training
        if now and how == "raise":
            raise RuntimeError("this process has had enough")
        return value * (float("nan") if now and how == "nan" else 1.0), metrics

    gpt.GPT.loss = loss
    return lambda: setattr(gpt.GPT, "loss", original)


def run_all(runs) -> int:
    """Make runs one after the other in the same process group, as one of its ranks. A run is its flags, the
    arguments of `spoil` or None, and the exit code that is expected. Return the first other code, or 0."""
    make_small()
    for argv, spoilt, expected in runs:
        with watched(argv[argv.index("--out") + 1], spoilt):
            code = train.main(argv)
        if code != expected:
            return code or 1
    return 0


def fork(n: int, runs) -> list[Forked]:
    """Start n ranks that make runs. This process holds the store of their group, as torchrun's agent does:
    were it in rank 0, the other ranks would lose it with the end of rank 0."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(n)}
    group["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    places = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]
    ranks = [Forked(run_all, runs, environment=place) for place in places]
    ranks[0].store = store  # It lives as long as the ranks.
    return ranks


TORCHRUN = ("--standalone", "--nproc_per_node=2")


def torchrun(argv, spoilt=None) -> Beside:
    """Start torchrun with two ranks that make one run. What they print on stdout is dropped."""
    command = [sys.executable, "-m", "torch.distributed.run", *TORCHRUN]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return Beside([*command, __file__, json.dumps([[argv, spoilt, 0]])], env)


def forked_torchrun(argv) -> Forked:
    """Start the same in a forked process, which forks the ranks: nothing has to be imported."""
    return Forked(run_torchrun, [*TORCHRUN, "--start-method=fork", "--run-path"], [[argv, None, 0]])


def run_torchrun(flags, runs) -> int:
    # A daemon of multiprocessing, as forks.py starts it, may not have children.
    multiprocessing.current_process()._config["daemon"] = False
    torch.distributed.run.main([*flags, __file__, json.dumps(runs)])
    return 0


def main() -> int:
    """Make the runs of the command line. A failure ends a forked rank, too, with its traceback and code 1."""
    try:
        return run_all(json.loads(sys.argv[1]))
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    sys.exit(main())
