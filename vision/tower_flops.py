"""The multiplications of the towers of vision/clip_towers.py; a test compares them with PyTorch's count.

Shapes: T tokens, D model width, F inner width of the MLP, L layers, C channels, P patch size.
"""

from vision.clip_towers import TextConfig, VisionConfig


def n_macs(config: VisionConfig | TextConfig, seq_len: int | None = None) -> int:
    """Return the multiplications of one forward pass over one image, or over a text of seq_len tokens
    (default: max_seq_len).

    They are T (4 D^2 + 2 D F) + 2 T^2 D for each of the L layers, D C P^2 for each patch, and for SigLIP the
    pooling of images and the last linear layer of texts. The last layer of a CLIP computes one token only:
    keys and values of all tokens are 2 T D^2, its attention 2 T D, and its other products 2 D^2 + 2 D F.
    """
    D, siglip = config.d_model, config.layout == "siglip"
    if isinstance(config, TextConfig):
        T, around = seq_len or config.max_seq_len, D * config.d_out * siglip
    else:
        T = config.n_tokens
        around = config.n_patches * D * config.n_channels * config.patch_size**2
        if siglip:  # the pooling attends to all tokens from a learned query, computed once for all images
            around += T * 2 * D * D + 2 * T * D + D * D + 2 * D * config.d_ff
    layer = T * (4 * D * D + 2 * D * config.d_ff) + 2 * T * T * D
    last = layer if siglip else 2 * T * D * D + 2 * D * D + 2 * D * config.d_ff + 2 * T * D
    return (config.n_layers - 1) * layer + last + around
