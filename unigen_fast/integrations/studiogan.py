"""PyTorch-StudioGAN: the losses of its `utils/losses.py`, under the same names and arguments."""

from types import ModuleType
from typing import Any

from torch import Tensor

from unigen_fast.adversarial import discriminator_loss, generator_loss
from unigen_fast.integrations import _patching
from unigen_fast.integrations._patching import as_theirs

_STUDIOGAN = _patching.Checkout("studiogan")


def apply_to_studiogan(module: ModuleType, *, correct: bool = False) -> _patching.Patch:
    """`d_vanilla`, `g_vanilla`, `d_ls`, `g_ls`, `d_hinge`, `g_hinge`, `d_wasserstein`, `g_wasserstein` of `module`.

    With `correct`: `d_vanilla` takes softplus(l) of fakes, where StudioGAN's log sigmoid(1 - l) is softplus(l - 1).

    Args:
        module: StudioGAN's `utils.losses`, imported. The functions wherever they have been imported to are ours too.
        correct: see `unigen_fast.integrations`.

    Raises:
        TypeError: what is given is no module.
        ValueError: a function of the module takes other arguments, or it has none of them.
    """
    return _STUDIOGAN.apply(module, correct)


def _discriminator(real: Tensor, fake: Tensor, kind: str) -> Any:
    if real.shape != fake.shape:  # StudioGAN adds the two elementwise before the mean
        return NotImplemented
    return as_theirs(discriminator_loss(real=real, fake=fake, kind=kind), real, fake)


def _generator(fake: Tensor, kind: str) -> Tensor:
    return as_theirs(generator_loss(fake=fake, kind=kind), fake)


@_STUDIOGAN.replaces("d_vanilla", corrects="softplus(l) of fakes, not softplus(l - 1)")
def d_vanilla(d_logit_real: Tensor, d_logit_fake: Tensor, *, correct: bool = False) -> Any:
    """mean softplus(-l_r) + mean softplus(l_f - 1); with `correct` softplus(l_f)."""
    return _discriminator(d_logit_real, d_logit_fake if correct else d_logit_fake - 1, "logistic")


@_STUDIOGAN.replaces("g_vanilla")
def g_vanilla(g_logit_fake: Tensor) -> Tensor:
    """mean softplus(-l)."""
    return _generator(g_logit_fake, "non_saturating")


@_STUDIOGAN.replaces("d_ls")
def d_ls(d_logit_real: Tensor, d_logit_fake: Tensor) -> Any:
    """mean ½ (l_r - 1)² + ½ l_f²."""
    return _discriminator(d_logit_real, d_logit_fake, "least_squares")


@_STUDIOGAN.replaces("g_ls")
def g_ls(d_logit_fake: Tensor) -> Tensor:
    """mean ½ (l - 1)²."""
    return _generator(d_logit_fake, "least_squares")


@_STUDIOGAN.replaces("d_hinge")
def d_hinge(d_logit_real: Tensor, d_logit_fake: Tensor) -> Tensor:
    """mean relu(1 - l_r) + mean relu(1 + l_f)."""
    loss = discriminator_loss(real=d_logit_real, fake=d_logit_fake, kind="hinge")
    return as_theirs(loss, d_logit_real, d_logit_fake)


@_STUDIOGAN.replaces("g_hinge")
def g_hinge(g_logit_fake: Tensor) -> Tensor:
    """mean -l."""
    return _generator(g_logit_fake, "hinge")


@_STUDIOGAN.replaces("d_wasserstein")
def d_wasserstein(d_logit_real: Tensor, d_logit_fake: Tensor) -> Any:
    """mean l_f - l_r."""
    return _discriminator(d_logit_real, d_logit_fake, "wasserstein")


@_STUDIOGAN.replaces("g_wasserstein")
def g_wasserstein(g_logit_fake: Tensor) -> Tensor:
    """mean -l."""
    return _generator(g_logit_fake, "wasserstein")
