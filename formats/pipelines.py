"""The directory of a StableDiffusionPipeline of diffusers: a folder for each part.

    vae/              AutoencoderKL                     formats/autoencoder_kl.py
    unet/             UNet2DConditionModel              formats/unet.py
    text_encoder/     CLIPTextModel                     formats/clip.py
    tokenizer/        the tokenizer of the texts
    scheduler/        scheduler_config.json             formats/schedules.py
    model_index.json  the class of each part

The filter of images ("safety_checker") and its preprocessor ("feature_extractor") are neither read nor
written.
"""

from pathlib import Path

from formats.json_file import read_json, write_json
from formats.schedules import DIFFUSERS

INDEX, CLASS, CONCEPT = "model_index.json", "StableDiffusionPipeline", "vision.latent_diffusion"
TOKENIZER, SCHEDULER = "tokenizer", "scheduler"
PARTS = {  # folder of a model: its library and class
    "vae": ("diffusers", "AutoencoderKL"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "text_encoder": ("transformers", "CLIPTextModel"),
}
WRITTEN = PARTS | {
    SCHEDULER: ("diffusers", "DDPMScheduler"),
    TOKENIZER: ("transformers", "PreTrainedTokenizerFast"),
    "safety_checker": (None, None),
    "feature_extractor": (None, None),
}


def is_pipeline(directory: str | Path) -> bool:
    """Return whether directory holds a pipeline: model_index.json, and no config.json of a single model."""
    directory = Path(directory)
    return (directory / INDEX).is_file() and not (directory / "config.json").is_file()


def check(directory: str | Path) -> None:
    """Raise ValueError for another pipeline than Stable Diffusion's, and for parts of other classes."""
    path = Path(directory) / INDEX
    index = read_json(path, "a directory of a StableDiffusionPipeline")
    if index.get("_class_name") != CLASS:
        raise ValueError(f"{path}: class {index.get('_class_name')!r:.100}: expected {CLASS}")
    for part, (_, expected) in PARTS.items():
        found = index.get(part)
        name = found[1] if isinstance(found, list) and len(found) == 2 else found
        if name != expected:
            raise ValueError(f"{path}: {part} {name!r:.100} is not implemented; expected {expected}")


def write_index(directory: str | Path, has_tokenizer: bool) -> None:
    """Write model_index.json. has_tokenizer: whether the pipeline has the folder of a tokenizer."""
    parts = {name: list(found) for name, found in WRITTEN.items()}
    if not has_tokenizer:
        parts[TOKENIZER] = [None, None]
    content = {"_class_name": CLASS, "_diffusers_version": DIFFUSERS, "requires_safety_checker": False}
    write_json(Path(directory) / INDEX, content | parts)
