"""First stages: trained models that other models are built on, and that default runs train by themselves.

LLaVA and the prior of DALL-E 2 need a CLIP, latent diffusion needs an autoencoder. A user names its directory
by a flag. If none is named and the data are drawn, the run first trains one in a separate process, and keeps
it below --cache for later runs.
"""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from engine import parallel
from engine.checkpoint import is_begun
from formats.json_file import read_json

ROOT = Path(__file__).parents[1]
# Prefixes of the environment variables that torchrun sets for its ranks. The first stage is no rank of that
# group, so it is started without them.
OF_TORCHRUN = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_RANK", "MASTER_", "TORCHELASTIC_")


def trained(args: Namespace, model: str, data: str, steps: int, what: str, flag: str) -> str:
    """Return the directory of a model that was trained on data. If it is not yet below --cache, one process
    of each machine trains it.

    model, data, steps: the flags --model, --data and --steps of its run; other flags are those of args. what:
    what the run says that it does, such as "a CLIP learns captions". flag: how a user names another model.
    Raises ValueError if the run fails or is stopped.
    """
    out = args.cache / f"{model}-{data.replace(':', '-')}-{steps}-{args.seed}"
    with parallel.one_per_machine_first():
        if not (out / "done").exists():
            flags = ["--model", model, "--data", data, "--steps", steps, "--seed", args.seed]
            flags += ["--out", out, "--cache", args.cache, "--device", args.device, "--kernels", args.kernels]
            flags += ["--resume"] * is_begun(out)
            print(f"no {flag.partition(' ')[0]}: first {what}, {out}", flush=True)
            environment = {name: x for name, x in os.environ.items() if not name.startswith(OF_TORCHRUN)}
            done = subprocess.run([sys.executable, ROOT / "train.py", *map(str, flags)], env=environment)
            if done.returncode:
                raise ValueError(f"{out}: this run, of the first stage, has failed; name another by {flag}")
            # The code is 0 after SIGTERM, too.
            if read_json(out / "checkpoint" / "state.json")["step"] < steps:
                raise ValueError(f"{out}: this run, of the first stage, was stopped; start again to go on")
            (out / "done").touch()
    return str(out / "model")
