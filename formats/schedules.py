"""scheduler_config.json of diffusers: how noise is added, and what the model beside it predicts.

A scheduler of diffusers is a sampler. Those for the noise of DDPM (vision/noise.py) describe that noise by
the same keys, which are read:

    beta_schedule             how beta, the variance of the noise of one step, grows with the step
    beta_start, beta_end      its first and last value
    num_train_timesteps       the number of steps
    prediction_type           what the model predicts: the noise, the image, or v
    rescale_betas_zero_snr    whether the last step is pure noise

All other keys are settings of the sampler, which the user chooses. A DDPMScheduler is written, and for a
model that reads no condition also model_index.json, so that diffusers' DDPMPipeline opens the directory.
"""

from pathlib import Path

from formats.config_json import checked, damage_named
from formats.json_file import read_json, write_json

FILE = "scheduler_config.json"
KINDS = {"v": "v_prediction", "x0": "sample", "eps": "epsilon"}  # our names: theirs, as in the next line
SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear", "scaled_linear": "scaled_linear"}
ENDS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}  # first and last beta of 1,000 steps
DIFFUSERS = "0.42.1"  # the version of diffusers that is named in the files


def write(
    directory: str | Path,
    target: str,
    schedule: str,
    n_steps: int,
    zero_terminal: bool,
    pipeline: bool,
    clip: bool = True,
) -> None:
    """Write scheduler_config.json to directory, and with `pipeline` also model_index.json.

    target, schedule: by their names in vision/noise.py. n_steps: time steps. zero_terminal: whether the last
    step is pure noise. clip: whether samplers keep x_0 between -1 and 1, as for pixels, but not for latents.
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
    """Return {"target", "schedule", "n_steps", "zero_terminal"} of the file in directory, see `write`.

    Raises ValueError naming what is missing, damaged or not implemented.
    """
    path = Path(directory) / FILE
    hf = read_json(path)
    with damage_named(path):
        # Schedulers for other noise, such as flow matching's, have no beta_schedule.
        if "beta_schedule" not in hf:
            raise ValueError(f"beta_schedule is missing; expected {', '.join(SCHEDULES.values())}")
        if hf.get("trained_betas") is not None:
            raise ValueError("trained_betas is not implemented; expected a beta_schedule alone")
        n_steps = checked(path, "num_train_timesteps", "n_steps", hf.get("num_train_timesteps", 1000))
        found = {"n_steps": n_steps}
        for field, key, names, default in (
            ("schedule", "beta_schedule", SCHEDULES, None),
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
                if not abs(value / ours - 1) < 1e-6:
                    expected = f"{ours:g}, that of {found['schedule']} with {n_steps} steps"
                    raise ValueError(f"{key} {value}: expected {expected}")
        found["zero_terminal"] = checked(path, "", "flag", hf.get("rescale_betas_zero_snr", False))
    return found
