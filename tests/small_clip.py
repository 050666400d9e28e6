"""A small CLIP, for the tests of models that read its embeddings."""

from dataclasses import replace

import torch

from vision.clip import CLIP, Config

CLIP_CONFIG = Config(
    *(2, 2, 16, 24, 1, 2, 16, 20, 16), image_size=8, patch_size=4, n_channels=1, vocab_size=257,
    max_seq_len=60, eos_token_id=256, mean=(0.5,), std=(0.5,), kernels="reference",
)  # fmt: skip


def small_clip(**changes):
    """Return a new CLIP, always with the same weights."""
    torch.manual_seed(1)
    return CLIP(replace(CLIP_CONFIG, **changes))
