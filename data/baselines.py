"""Baselines: how well images are classified by their pixels alone, without a network.

    chance                 one over the number of classes
    nearest neighbour      the label of the training image at the smallest distance
    logistic regression    softmax(W x + b) of the standardised pixels x, with an L2 penalty, by L-BFGS

A network that reads images has to beat these. The two classifiers also measure a network's features, in
place of pixels (evaluation/probe.py).

Shapes: N examples to learn from, M held out, F numbers in each, pixels or features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.rows import Rows, stack

MOST = 10_000, 2_000  # examples to learn from, and held out, that `describe` takes from larger sets


def pixels(rows: Rows, most: int) -> tuple[Tensor, Tensor]:
    """Return the pixels (N, F) in [0, 1] and the labels (N,) of at most `most` rows, evenly spaced."""
    step = -(-len(rows) // most)
    batch = stack([rows[i] for i in range(0, len(rows), step)])
    return batch["image"].flatten(1).float() / 255, batch["label"]


def nearest_neighbour(train: Tensor, labels: Tensor, held: Tensor, k: int = 1) -> Tensor:
    """Return the label (M,) that most of the k nearest rows of train (N, F) have, for each of held (M, F).

    The distance is Euclidean. Of equally frequent labels it is the smallest.
    """
    nearest = torch.cdist(held, train).topk(k, largest=False).indices  # (M, k)
    return labels[nearest].mode(dim=1).values


def logistic_regression(train: Tensor, labels: Tensor, held: Tensor, penalty: float = 1e-3) -> Tensor:
    """Return the likeliest label (M,) of each of held (M, F), by a linear classifier fitted to train (N, F).

    Features are float32. The loss is the mean cross-entropy in nats, plus penalty times |W|^2.
    """
    # Standardise the features, and leave out those that are constant in train.
    mean, std = train.mean(0), train.std(0)
    varies = std > 1e-6
    train, held = ((x - mean)[:, varies] / std[varies] for x in (train, held))

    n_classes = int(labels.max()) + 1
    weight = torch.zeros(n_classes, train.shape[1], requires_grad=True)
    bias = torch.zeros(n_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = F.cross_entropy(F.linear(train, weight, bias), labels) + penalty * weight.square().sum()
            loss.backward()
        return loss

    optimizer.step(closure)
    return F.linear(held, weight, bias).detach().argmax(1)


def describe(train: Rows, held: Rows, n_classes: int) -> str:
    """Return one line: how often chance and the classifiers of pixels are right on held-out images."""
    (x, labels), (y, expected) = pixels(train, MOST[0]), pixels(held, MOST[1])
    right = [
        (predicted == expected).float().mean()
        for predicted in (nearest_neighbour(x, labels, y), logistic_regression(x, labels, y))
    ]
    return (
        f"on held-out images, chance is right for {1 / n_classes:.1%}, the nearest neighbour in pixels for "
        f"{right[0]:.1%}, logistic regression on pixels for {right[1]:.1%}"
    )
