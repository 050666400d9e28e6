"""A first stage: the trained model that another one is built on, and that a default run makes by itself.

LLaVA needs a CLIP, latent diffusion an autoencoder, the prior of DALL-E 2 a CLIP. A user names its directory.
Where none is named and the data are drawn, the run first trains one, in a process of its own, and keeps it
below --cache for all later runs.
"""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from engine import parallel

ROOT = Path(__file__).parents[1]
# How the variables begin that torchrun sets for its ranks, to which a run of its own does not belong.
OF_TORCHRUN = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_RANK", "MASTER_", "TORCHELASTIC_")


def trained(args: Namespace, model: str, data: str, steps: int, what: str, flag: str) -> str:
    """Return the directory of a model of that --model, trained on data: the one below --cache, or one that
    this trains first. One process of each machine does so.

    what: the line that explains it, such as "a CLIP learns captions". flag: how a user names another.
    Raises ValueError if that run fails.
    """
    out = args.cache / f"{model}-{data.replace(':', '-')}-{steps}-{args.seed}"
    with parallel.one_per_machine_first():
        if not (out / "done").exists():
            flags = ["--model", model, "--data", data, "--steps", steps, "--seed", args.seed]
            flags += ["--out", out, "--cache", args.cache, "--device", args.device, "--kernels", args.kernels]
            flags += ["--resume"] * (out / "checkpoint").exists()
            print(f"no {flag.partition(' ')[0]}: first {what}, {out}", flush=True)
            environment = {name: x for name, x in os.environ.items() if not name.startswith(OF_TORCHRUN)}
            done = subprocess.run([sys.executable, ROOT / "train.py", *map(str, flags)], env=environment)
            if done.returncode:
                raise ValueError(f"{out}: this run, of the first stage, has failed; name another by {flag}")
            (out / "done").touch()
    return str(out / "model")
