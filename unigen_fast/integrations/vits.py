"""VITS and HiFi-GAN: the losses of their `losses.py` (`models.py`), under the same names and arguments."""

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from unigen_fast.adversarial import loss_and_sides, loss_of_each
from unigen_fast.divergence import gaussian_kl_monte_carlo
from unigen_fast.integrations import _patching

_VITS = _patching.Checkout("vits")


def apply_to_vits(module: ModuleType, *, correct: bool = False) -> _patching.Patch:
    """`kl_loss`, `discriminator_loss` and `generator_loss` of `module`: those of this module.

    The functions can as well be imported from here in place of theirs. `correct` changes nothing.

    Args:
        module: VITS' `losses` (or HiFi-GAN's `models`, which has the last two), imported. The functions wherever they
            have been imported to are ours too.
        correct: see `unigen_fast.integrations`.

    Raises:
        TypeError: what is given is no module.
        ValueError: a function of the module takes other arguments, or it has none of them.
    """
    return _VITS.apply(module, correct)


@_VITS.replaces("kl_loss")
def kl_loss(z_p: Tensor, logs_q: Tensor, m_p: Tensor, logs_p: Tensor, z_mask: Tensor) -> Tensor:
    """sum of mask · [logs_p - logs_q - ½ + ½ (z_p - m_p)² e^{-2 logs_p}] over sum of mask: the KL of each frame.

    Args:
        z_p, logs_q, m_p, logs_p: `[B, C, T]`; log standard deviations.
        z_mask: `[B, 1, T]`. A mask of zeros gives 0 (theirs: NaN).

    Source: Kim, Kong and Son, "VITS" (2021), Eq. 4.
    """
    z_p, logs_q, m_p, logs_p = (t.transpose(1, 2) for t in (z_p, logs_q, m_p, logs_p))
    return gaussian_kl_monte_carlo(
        z_p, None, logs_q, m_p, logs_p, event_ndims=1, spread="logstd", weights=z_mask.squeeze(1),
        normalize_weights=True,
    )  # fmt: skip


@_VITS.replaces("discriminator_loss")
def discriminator_loss(
    disc_real_outputs: Sequence[Tensor], disc_generated_outputs: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """sum over the discriminators of mean (1 - l_r)² + mean l_f²: one launch for all of them.

    Args:
        disc_real_outputs, disc_generated_outputs: as many tensors of logits, any shapes.

    Returns:
        The loss, and each discriminator's two terms, as detached tensors: where theirs calls `.item()` for every one,
        nothing waits for the GPU.

    Source: Kong, Kim and Bae, "HiFi-GAN" (2020), Eq. 1.
    """
    loss, of_real, of_fake = loss_and_sides(disc_real_outputs, disc_generated_outputs, "least_squares", scale=2.0)
    return loss, list(2 * of_real), list(2 * of_fake)


@_VITS.replaces("generator_loss")
def generator_loss(disc_outputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """sum over the discriminators of mean (1 - l)²: one launch for all of them.

    Args:
        disc_outputs: tensors of logits, any shapes.

    Returns:
        The loss, and each discriminator's, as detached tensors to log.

    Source: Kong, Kim and Bae (2020), Eq. 2.
    """
    loss, of_each = loss_of_each(disc_outputs, "least_squares", scale=2.0)
    return loss, list(2 * of_each)
