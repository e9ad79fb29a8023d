"""torchgan: the losses of logits in its `losses.functional`, which its loss classes call."""

from typing import Any

from torch import Tensor

from unigen_fast.adversarial import discriminator_loss, generator_loss
from unigen_fast.integrations import _patching
from unigen_fast.integrations._patching import as_theirs

_TORCHGAN = _patching.Library("torchgan", "torchgan")
_MODULE = "torchgan.losses.functional"


def apply_to_torchgan(*, check_version: bool = True, correct: bool = False) -> _patching.Patch:
    """The minimax, least-squares and Wasserstein losses of `torchgan.losses`, functions and classes.

    `correct` changes nothing: their number is right.

    Args: as for every integration, see `unigen_fast.integrations`.
    """
    return _patching.apply("torchgan", check_version=check_version, correct=correct)


_REDUCTIONS = ("mean", "sum", "none")


def _discriminator(real: Tensor, fake: Tensor, kind: str, reduction: str) -> Any:
    # torchgan reduces the sum of both sides, where we add what they were reduced to: the same for as many logits
    if reduction not in _REDUCTIONS or real.shape != fake.shape:
        return NotImplemented
    return as_theirs(discriminator_loss(real=real, fake=fake, kind=kind, reduction=reduction), real, fake)


def _generator(fake: Tensor, kind: str, reduction: str) -> Any:
    if reduction not in _REDUCTIONS:
        return NotImplemented
    return as_theirs(generator_loss(fake=fake, kind=kind, reduction=reduction), fake)


@_TORCHGAN.replaces(_MODULE, "minimax_generator_loss", accepted={"101c67dc178ff2b6": "0.0.3 to 0.1.0"})
def _minimax_generator_loss(dgz: Tensor, nonsaturating: bool = True, reduction: str = "mean") -> Any:
    return _generator(dgz, "non_saturating" if nonsaturating else "saturating", reduction)


@_TORCHGAN.replaces(_MODULE, "minimax_discriminator_loss", accepted={"d0628ed7d6e14aae": "0.0.3 to 0.1.0"})
def _minimax_discriminator_loss(dx: Tensor, dgz: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Any:
    loss = _discriminator(dx, dgz, "logistic", reduction)
    if loss is NotImplemented or not label_smoothing:
        return loss
    smooth = dx if reduction == "none" else dx.mean() if reduction == "mean" else dx.sum()
    return loss + label_smoothing * smooth  # a label of 1 - s costs s·l more


@_TORCHGAN.replaces(_MODULE, "least_squares_generator_loss", accepted={"178f6d67a5c6ed52": "0.0.3 to 0.1.0"})
def _least_squares_generator_loss(dgz: Tensor, c: float = 1.0, reduction: str = "mean") -> Any:
    return _generator(_moved(dgz, 1.0 - c), "least_squares", reduction)


@_TORCHGAN.replaces(_MODULE, "least_squares_discriminator_loss", accepted={"d4b89988b7a66168": "0.0.3 to 0.1.0"})
def _least_squares_discriminator_loss(
    dx: Tensor, dgz: Tensor, a: float = 0.0, b: float = 1.0, reduction: str = "mean"
) -> Any:
    return _discriminator(_moved(dx, 1.0 - b), _moved(dgz, -a), "least_squares", reduction)


def _moved(logits: Tensor, by: float) -> Tensor:
    return logits + by if by else logits


@_TORCHGAN.replaces(_MODULE, "wasserstein_generator_loss", accepted={"1ba7baf7281f5bc8": "0.0.3 to 0.1.0"})
def _wasserstein_generator_loss(fgz: Tensor, reduction: str = "mean") -> Any:
    return _generator(fgz, "wasserstein", reduction)


@_TORCHGAN.replaces(_MODULE, "wasserstein_discriminator_loss", accepted={"953c3736edc7ac9d": "0.0.3 to 0.1.0"})
def _wasserstein_discriminator_loss(fx: Tensor, fgz: Tensor, reduction: str = "mean") -> Any:
    return _discriminator(fx, fgz, "wasserstein", reduction)
