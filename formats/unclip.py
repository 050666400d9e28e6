"""The decoder of DALL-E 2 in the layout of diffusers' UnCLIPPipeline: a folder for each part.

    decoder/            UNet2DConditionModel, which reads a vector and tokens    formats/unet.py
    text_proj/          UnCLIPTextProjModel, which computes both from the embedding of an image
    decoder_scheduler/  scheduler_config.json                                    formats/schedules.py
    config.json         the concept vision.unclip, which formats/open_model.py looks for

UnCLIPTextProjModel also reads a text: its embedding, and the states of its tokens. Our decoder reads none. So
the weights for texts are written as zeros, and those of the states' LayerNorm with their initial values. Then
the class computes what vision/unclip.py does, if it gets any embedding of a text and the states of no tokens
(B, 0, d_text).
"""

from pathlib import Path

from torch import Tensor, nn

from formats import diffusers, native
from formats.json_file import write_json
from formats.safetensors_dir import read_weights

CLASS, CONCEPT = "UnCLIPTextProjModel", "vision.unclip"
DECODER, PROJECTION, SCHEDULER = "decoder", "text_proj", "decoder_scheduler"
FIELDS = {"clip_extra_context_tokens": "n_context", "clip_embeddings_dim": "d_embed"}
DEFAULTS = {"n_context": 4, "d_embed": 768}  # the values of absent keys: diffusers'
WIDTHS = {"time_embed_dim", "cross_attention_dim"}  # widths in the U-Net, which its weights have too
# The weights for texts: of the embedding, of the states of tokens, and of their LayerNorm.
EMBEDDING, STATES, NORM = "embedding_proj", "encoder_hidden_states_proj", "text_encoder_hidden_states_norm"


def read(directory: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Return the fields of `unclip.Config` that text_proj/ in directory names, and its weights without those
    for texts.

    Raises ValueError naming what is missing, damaged or not implemented, such as a decoder that reads texts.
    """
    folder = Path(directory) / PROJECTION
    path, _, fields = diffusers.fields_of(folder, CLASS, FIELDS, DEFAULTS, {}, WIDTHS)
    weights = read_weights(folder)
    for name in [name for name in weights if name.startswith((EMBEDDING, STATES, NORM))]:
        if weights.pop(name).any() and name.startswith(EMBEDDING):
            raise ValueError(f"{path.parent}: {name} is not 0: a decoder that reads texts is not implemented")
    return fields, weights


def write(directory: str | Path, projection: nn.Module, fields: dict, d_time: int, d_text: int) -> None:
    """Write text_proj/ and config.json into a directory. Each file is replaced only once it is complete.

    projection: the module with the weights of text_proj/. fields: n_context and d_embed of the Config.
    d_time, d_text: the widths of the U-Net's vector and of its tokens.
    """
    directory, E = Path(directory), fields["d_embed"]
    hf = {key: fields[field] for key, field in FIELDS.items()}
    weights = projection.state_dict()
    like = next(iter(weights.values()))
    for name, width in ((EMBEDDING, d_time), (STATES, d_text)):
        weights |= {f"{name}.weight": like.new_zeros(width, E), f"{name}.bias": like.new_zeros(width)}
    weights |= {f"{NORM}.weight": like.new_ones(d_text), f"{NORM}.bias": like.new_zeros(d_text)}
    hf |= {"time_embed_dim": d_time, "cross_attention_dim": d_text}
    diffusers.write(directory / PROJECTION, CLASS, hf, weights)
    write_json(directory / "config.json", {"architectures": [f"{native.PREFIX}{CONCEPT}"]})
