"""Hugging Face checkpoints of decoders that write images: ImageGPTForCausalImageModeling.

The model is GPT-2 with another norm, so formats/decoders.py renames its weights. An id stands for a colour of
a palette, and one more id for the start of an image: vocab_size is the number of colours plus 1, but the head
has no row for the start. The palette and the size of images are in preprocessor_config.json; colours are red,
green and blue from -1 to 1. A palette of greys is written as colours of three equal numbers, and read back as
greys.
"""

from pathlib import Path

from torch import nn

from formats.config_json import INERT, damage_named, read_architecture, read_fields
from formats.decoders import GPT2_FIELDS, from_gpt2, to_gpt2
from formats.json_file import read_json, write_json
from formats.safetensors_dir import filled, read_weights, write

ARCHITECTURE = "ImageGPTForCausalImageModeling"
CONCEPT = "vision.igpt"
FIELDS = {key: field for key, field in GPT2_FIELDS.items() if field not in ("tie_embeddings", "eos_token_id")}
# The values of absent keys: transformers leaves out what is its default.
DEFAULTS = {
    "n_layers": 24, "n_heads": 8, "d_model": 512, "vocab_size": 513, "max_seq_len": 1024, "norm_eps": 1e-5,
}  # fmt: skip
ONLY = {
    "activation_function": ("quick_gelu",),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (False,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
}


def load(kind: type[nn.Module], config_kind: type, directory: str | Path, kernels: str) -> nn.Module:
    """Return kind(config) with the weights in directory; config is of config_kind, an `igpt.Config`.

    Raises ValueError naming what is missing, damaged or not implemented.
    """
    path, hf, _ = read_architecture(directory, [ARCHITECTURE])
    with damage_named(path):
        if hf.get("n_inner") is None:
            hf["n_inner"] = 4 * (hf.get("n_embd") or DEFAULTS["d_model"])
        fields = read_fields(path, hf, FIELDS, DEFAULTS, ONLY, INERT | {"eos_token_id"})
    fields |= read_palette(Path(directory), fields)
    with damage_named(Path(directory)):
        weights = from_gpt2(read_weights(directory))
    return filled(kind, config_kind, fields, weights, directory, kernels)


def read_palette(directory: Path, fields: dict) -> dict:
    """Return the fields "palette", "n_channels" and "image_size" by preprocessor_config.json.

    fields: those of config.json. Raises ValueError for a palette with another number of colours, for a size
    that is no height and width, and where the file is missing, since then no id has a colour.
    """
    path = directory / "preprocessor_config.json"
    hf = read_json(path)
    n, colours, size = fields["vocab_size"] - 1, hf.get("clusters"), hf.get("size")
    numbers = isinstance(colours, list) and all(
        isinstance(colour, list) and len(colour) == 3 and all(isinstance(v, int | float) for v in colour)
        for colour in colours
    )
    if not numbers or len(colours) != n:
        raise ValueError(f"{path}: clusters {colours!r:.60}: expected {n} lists of red, green and blue")
    if isinstance(size, dict):
        size = [size.get("height"), size.get("width")]
    if isinstance(size, int):
        size = [size, size]
    if not isinstance(size, list) or not all(isinstance(side, int) for side in size):
        raise ValueError(f"{path}: size {hf.get('size')!r:.100}: expected a height and a width")
    grey = all(colour[0] == colour[1] == colour[2] for colour in colours)
    palette = tuple(tuple(map(float, colour[:1] if grey else colour)) for colour in colours)
    return {"palette": palette, "n_channels": 1 if grey else 3, "image_size": tuple(size)}


def save(model: nn.Module, directory: str | Path) -> None:
    """Write an `igpt.ImageGPT`: config.json, model.safetensors and preprocessor_config.json."""
    config = model.config
    hf = {"architectures": [ARCHITECTURE], "model_type": "imagegpt"}
    hf |= {key: getattr(config, field) for key, field in FIELDS.items()}
    # Our models have no dropout. Without its keys, transformers would use 0.1 in further training.
    hf |= {"activation_function": "quick_gelu", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    write(directory, hf | {"tie_word_embeddings": False}, to_gpt2(model.state_dict()))
    height, width = config.image_size
    content = {"image_processor_type": "ImageGPTImageProcessor", "do_resize": True, "do_normalize": True}
    content |= {"do_color_quantize": True, "size": {"height": height, "width": width}}
    colours = [list(colour) * (3 if config.n_channels == 1 else 1) for colour in config.palette]
    write_json(Path(directory) / "preprocessor_config.json", content | {"clusters": colours})
