"""scheduler_config.json of diffusers: how noise is added, and what the model beside it predicts.

Any scheduler of diffusers that has alphas_cumprod names the same noise: "beta_schedule" with its ends,
"num_train_timesteps", "prediction_type" and "rescale_betas_zero_snr". What else is in the file is about
sampling, which is the user's choice. We write a DDPMScheduler, and where the model reads no condition also
model_index.json, so that diffusers' DDPMPipeline opens the directory.
"""

from pathlib import Path

from formats.config_json import checked, damage_named
from formats.json_file import read_json, write_json

FILE = "scheduler_config.json"
KINDS = {"v": "v_prediction", "x0": "sample", "eps": "epsilon"}
SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear", "scaled_linear": "scaled_linear"}
ENDS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}  # of the betas, for 1,000 steps
DIFFUSERS = "0.42.1"  # whose files these are


def write(
    directory: str | Path,
    target: str,
    schedule: str,
    n_steps: int,
    zero_terminal: bool,
    pipeline: bool,
    clip: bool = True,
) -> None:
    """Write the schedule, named as in vision/noise.py, and with `pipeline` model_index.json.

    clip: samplers keep x_0 from -1 to 1, as pixels are, but no latents.
    """
    content = {"_class_name": "DDPMScheduler", "_diffusers_version": DIFFUSERS}
    content |= {"num_train_timesteps": n_steps, "beta_schedule": SCHEDULES[schedule]}
    if schedule in ENDS:
        first, last = (beta * 1000 / n_steps for beta in ENDS[schedule])
        content |= {"beta_start": first, "beta_end": last}
    content |= {"prediction_type": KINDS[target], "rescale_betas_zero_snr": zero_terminal}
    content |= {"clip_sample": clip, "clip_sample_range": 1.0, "variance_type": "fixed_small"}
    write_json(Path(directory) / FILE, content | {"timestep_spacing": "trailing"})
    if pipeline:
        parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
        index = {"_class_name": "DDPMPipeline", "_diffusers_version": DIFFUSERS, **parts}
        write_json(Path(directory) / "model_index.json", index)


def read(directory: str | Path) -> dict:
    """Return {"target", "schedule", "n_steps", "zero_terminal"} of the file in directory.

    Raises ValueError naming what is missing, damaged or not implemented.
    """
    path = Path(directory) / FILE
    hf = read_json(path)
    with damage_named(path):
        n_steps = checked(path, "num_train_timesteps", "n_steps", hf.get("num_train_timesteps", 1000))
        found = {"n_steps": n_steps}
        for field, key, names, default in (
            ("schedule", "beta_schedule", SCHEDULES, "linear"),
            ("target", "prediction_type", KINDS, "epsilon"),
        ):
            value = hf.get(key, default)
            known = {theirs: ours for ours, theirs in names.items()}
            if value not in known:
                raise ValueError(f"{key} {value!r:.100} is not implemented; expected {', '.join(known)}")
            found[field] = known[value]
        for key, i in (("beta_start", 0), ("beta_end", 1)):
            if found["schedule"] in ENDS:
                ours = ENDS[found["schedule"]][i] * 1000 / n_steps
                value = hf.get(key, ENDS["linear"][i])
                if abs(value / ours - 1) > 1e-6:
                    raise ValueError(f"{key} {value}: expected {ours:g}, as {found['schedule']} has it")
        found["zero_terminal"] = checked(path, "", "flag", hf.get("rescale_betas_zero_snr", False))
    return found
