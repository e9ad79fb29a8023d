"""mimicry (torch-mimicry): its GAN losses, fake first in one function and real first in the next."""

from typing import Any

from torch import Tensor

from unigen_fast.adversarial import discriminator_loss, generator_loss
from unigen_fast.integrations import _patching
from unigen_fast.integrations._patching import as_theirs

_MIMICRY = _patching.Library("mimicry", "torch-mimicry")
_MODULE = "torch_mimicry.modules.losses"


def apply_to_mimicry(*, check_version: bool = True, correct: bool = False) -> _patching.Patch:
    """The minimax, hinge and Wasserstein losses of `torch_mimicry.modules.losses`, each with its order of arguments.

    With `correct` also `ns_loss_gen`: -mean log(sigma(l) + 1e-8), whose gradient dies where the generator loses most,
    becomes mean softplus(-l).

    Args: as for every integration, see `unigen_fast.integrations`.
    """
    return _patching.apply("mimicry", check_version=check_version, correct=correct)


def _discriminator(real: Tensor, fake: Tensor, kind: str) -> Tensor:
    return as_theirs(discriminator_loss(real=real, fake=fake, kind=kind), real, fake)


def _generator(fake: Tensor, kind: str) -> Tensor:
    return as_theirs(generator_loss(fake=fake, kind=kind), fake)


def _columns(*logits: Tensor) -> bool:
    """`[N, 1]`, the only shape that its labels have."""
    return all(x.dim() == 2 and x.size(1) == 1 for x in logits)


@_MIMICRY.replaces(_MODULE, "minimax_loss_gen", accepted={"1d107d09f4514792": "0.1.11 to 0.1.16"})
def _minimax_loss_gen(output_fake: Tensor, real_label_val: float = 1.0, **kwargs: Any) -> Any:
    if kwargs or not _columns(output_fake):
        return NotImplemented
    loss = _generator(output_fake, "non_saturating")
    return loss if real_label_val == 1 else loss + (1 - real_label_val) * output_fake.mean()


@_MIMICRY.replaces(_MODULE, "minimax_loss_dis", accepted={"b60ce27c97ec217d": "0.1.11 to 0.1.16"})
def _minimax_loss_dis(
    output_fake: Tensor, output_real: Tensor, real_label_val: float = 1.0, fake_label_val: float = 0.0, **kwargs: Any
) -> Any:
    if kwargs or not _columns(output_fake, output_real):
        return NotImplemented
    loss = _discriminator(output_real, output_fake, "logistic")
    if real_label_val != 1:  # a label of v in place of 1 costs (1 - v)·l more
        loss = loss + (1 - real_label_val) * output_real.mean()
    return loss - fake_label_val * output_fake.mean() if fake_label_val else loss


@_MIMICRY.replaces(
    _MODULE,
    "ns_loss_gen",
    accepted={"1f3b21ec4d581bb0": "0.1.11 to 0.1.16"},
    corrects="softplus(-l), without 1e-8 inside the logarithm",
)
def _ns_loss_gen(output_fake: Tensor, *, correct: bool = False) -> Any:
    return _generator(output_fake, "non_saturating") if correct else NotImplemented


@_MIMICRY.replaces(_MODULE, "wasserstein_loss_dis", accepted={"602c5278e419e0c6": "0.1.11 to 0.1.16"})
def _wasserstein_loss_dis(output_real: Tensor, output_fake: Tensor) -> Tensor:
    return _discriminator(output_real, output_fake, "wasserstein")


@_MIMICRY.replaces(_MODULE, "wasserstein_loss_gen", accepted={"92b3de6b74fdc973": "0.1.11 to 0.1.16"})
def _wasserstein_loss_gen(output_fake: Tensor) -> Tensor:
    return _generator(output_fake, "wasserstein")


@_MIMICRY.replaces(_MODULE, "hinge_loss_dis", accepted={"34e8fc99461d85cb": "0.1.11 to 0.1.16"})
def _hinge_loss_dis(output_fake: Tensor, output_real: Tensor) -> Tensor:
    return _discriminator(output_real, output_fake, "hinge")


@_MIMICRY.replaces(_MODULE, "hinge_loss_gen", accepted={"507777cbddcb4ed6": "0.1.11 to 0.1.16"})
def _hinge_loss_gen(output_fake: Tensor) -> Tensor:
    return _generator(output_fake, "hinge")
