"""The multiplications of the towers in vision/clip_towers.py, by a formula that a test compares with PyTorch's count.

Shapes: T tokens, D model width, F inner width of the MLP, L layers, C channels, P patch size.
"""

from vision.clip_towers import TextConfig, VisionConfig


def n_macs(config: VisionConfig | TextConfig, seq_len: int | None = None) -> int:
    """Return the multiplications of one forward pass over one image, or a text of seq_len (max_seq_len)
    tokens.

    They are T (4 D^2 + 2 D F) + 2 T^2 D for each of the L layers, the matrix (D, C P^2) of the patches, and
    SigLIP's pooling. In CLIP's last layer one token is computed: 2 T D^2 for keys and values, the rest once.
    """
    D, siglip = config.d_model, config.layout == "siglip"
    if isinstance(config, TextConfig):
        T, around = seq_len or config.max_seq_len, D * config.d_out * siglip
    else:
        T = config.n_tokens
        around = config.n_patches * D * config.n_channels * config.patch_size**2
        if siglip:  # the probe's query is one for all images
            around += T * 2 * D * D + 2 * T * D + D * D + 2 * D * config.d_ff
    layer = T * (4 * D * D + 2 * D * config.d_ff) + 2 * T * T * D
    last = layer if siglip else 2 * T * D * D + 2 * D * D + 2 * D * config.d_ff + 2 * T * D
    return (config.n_layers - 1) * layer + last + around
