"""The decoder of DALL-E 2 in the layout of diffusers' UnCLIPPipeline, of which each part has a folder.

    decoder/            UNet2DConditionModel, whose classes are vectors      formats/unet.py
    text_proj/          UnCLIPTextProjModel, which makes these vectors, and tokens, of an embedding
    decoder_scheduler/  scheduler_config.json                                formats/schedules.py
    config.json         names vision/unclip.py, by which formats.open_model finds it

UnCLIPTextProjModel reads a text beside the embedding of an image. Our decoder does not, so the weights of
that part are written as zeros, and those of its LayerNorm as it starts. Then the class computes what
vision/unclip.py computes, if it gets any embedding of a text, and states of no tokens (B, 0, d_text).
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from formats import diffusers, native
from formats.json_file import write_json
from formats.safetensors_dir import read_weights

CLASS, CONCEPT = "UnCLIPTextProjModel", "vision.unclip"
DECODER, PROJECTION, SCHEDULER = "decoder", "text_proj", "decoder_scheduler"
FIELDS = {"clip_extra_context_tokens": "n_context", "clip_embeddings_dim": "d_embed"}
DEFAULTS = {"n_context": 4, "d_embed": 768}  # diffusers'
WIDTHS = {"time_embed_dim", "cross_attention_dim"}  # of the U-Net: the shapes of weights show them
ADDED, STATES, NORM = "embedding_proj", "encoder_hidden_states_proj", "text_encoder_hidden_states_norm"


def read(directory: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Return the fields of `unclip.Config` that text_proj/ in directory names, and its weights without those
    that read a text.

    Raises ValueError naming what is missing, damaged or not implemented, as a model that reads texts.
    """
    folder = Path(directory) / PROJECTION
    path, _, fields = diffusers.fields_of(folder, CLASS, FIELDS, DEFAULTS, {}, WIDTHS)
    weights = read_weights(folder)
    for name in [name for name in weights if name.startswith((ADDED, STATES, NORM))]:
        if weights.pop(name).any() and name.startswith(ADDED):
            raise ValueError(f"{path.parent}: {name} is not 0: a decoder that reads texts is not implemented")
    return fields, weights


def write(directory: str | Path, projection: nn.Module, fields: dict, d_time: int, d_text: int) -> None:
    """Write text_proj/ and config.json into a directory, each file replaced only once it is complete.

    fields: n_context and d_embed of the Config. d_time: width of the U-Net's vectors. d_text: of its tokens.
    """
    directory, E = Path(directory), fields["d_embed"]
    hf = {key: fields[field] for key, field in FIELDS.items()}
    weights = projection.state_dict()
    like = next(iter(weights.values()))
    for name, width, d_in in ((ADDED, d_time, E), (STATES, d_text, E)):
        weights |= {f"{name}.weight": like.new_zeros(width, d_in), f"{name}.bias": like.new_zeros(width)}
    weights |= {
        f"{NORM}.weight": torch.ones_like(like[:1]).repeat(d_text),
        f"{NORM}.bias": like.new_zeros(d_text),
    }
    hf |= {"time_embed_dim": d_time, "cross_attention_dim": d_text}
    diffusers.write(directory / PROJECTION, CLASS, hf, weights)
    write_json(directory / "config.json", {"architectures": [f"{native.PREFIX}{CONCEPT}"]})
