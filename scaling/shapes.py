"""Transformers of Hoffmann et al. 2022: their parameters, their FLOPs, and a usual shape for a given size.

    parameters N    count_parameters     agrees with all 50 models of table A9
    FLOPs           training_flops       appendix F: attention and the head included, unlike in C = 6 N D
    shape           shape_for            d_model, layers and heads of a model of about N parameters

Six FLOPs for each parameter and token are two for the forward pass, four for the backward pass, and none for
attention.
"""

import math
from dataclasses import dataclass

SEQ_LEN = 2048


@dataclass(frozen=True)
class Shape:
    """The widths and depth of a transformer, as in Hoffmann et al. 2022, tables A4 and A9."""

    d_model: int
    ffw: int
    kv_size: int
    heads: int
    layers: int
    vocab: int = 32000


def count_parameters(shape: Shape, relative: bool = True) -> int:
    """Return the number of weights, biases and norms, with the head and without the embedding.

    relative: count the weights of relative positions too, a thirteenth of a layer. So counted, all 50 rows of
    table A9 agree. heads * kv_size need not be d_model: in six rows it is not."""
    d, f, q = shape.d_model, shape.ffw, shape.kv_size * shape.heads
    attention = 3 * (d * q + q) + (q * d + d)  # q, k, v; output
    if relative:
        attention += d * q + 2 * q  # keys, 2 biases
    feedforward = (d * f + f) + (f * d + d)
    return shape.layers * (attention + feedforward + 4 * d) + 2 * d + d * shape.vocab


def training_flops(shape: Shape, seq_len: int = SEQ_LEN, vocab_products: int = 1) -> int:
    """Return the FLOPs of the forward and backward pass over one sequence of seq_len tokens, by appendix F of
    Hoffmann et al. 2022. The backward pass costs twice the forward pass.

    vocab_products: how many matrix products with the vocabulary are counted. 1 is the head alone: an
    embedding is a look-up, without FLOPs. The appendix prints terms for both, 2. Its table A4, which compares
    with 6 N D, can be reproduced only with 0.
    """
    S, d, q = seq_len, shape.d_model, shape.kv_size * shape.heads
    projections = 6 * S * d * q + 2 * S * q * d
    attention = 2 * S * S * q + 3 * shape.heads * S * S + 2 * S * S * q
    forward = shape.layers * (projections + attention + 4 * S * d * shape.ffw)
    return 3 * (forward + vocab_products * 2 * S * shape.vocab * d)


def shape_for(N: float) -> Shape | None:
    """Return the shape nearest to N parameters among those that are usual in table A9: feed-forward 4 d_model
    wide; heads of 64 up to d_model 1024, of 128 above; d_model 64 to 128 times the number of layers.

    Return None if the nearest is more than 10 % away, as below about 8 million parameters, where the head is
    nearly the whole model."""
    shapes = []
    widths = ((64, 1024, 64), (1024, 2048, 128), (2048, 8192, 256), (8192, 65537, 1024))
    for d in (d for step in widths for d in range(*step)):
        kv = 64 if d <= 1024 else 128
        # The number of layers that comes nearest to N at this width, within the usual range.
        one, two = (count_parameters(Shape(d, 4 * d, kv, d // kv, layers)) for layers in (1, 2))
        layers = round(1 + (N - one) / (two - one))
        shapes.append(Shape(d, 4 * d, kv, d // kv, min(max(layers, math.ceil(d / 128)), d // 64)))
    best = min(shapes, key=lambda shape: abs(math.log(count_parameters(shape) / N)))
    return best if abs(count_parameters(best) / N - 1) <= 0.1 else None
