"""taming-transformers, and latent-diffusion which imports from it: the discriminator's losses, with their 1/2."""

from torch import Tensor

from unigen_fast.adversarial import discriminator_loss
from unigen_fast.integrations import _patching
from unigen_fast.integrations._patching import as_theirs

_TAMING = _patching.Library("taming", "taming-transformers")
_MODULE = "taming.modules.losses.vqperceptual"


def apply_to_taming(*, check_version: bool = True, correct: bool = False) -> _patching.Patch:
    """`hinge_d_loss` and `vanilla_d_loss` of VQGAN, and of LDM, whose losses import them.

    Losses made before, which keep the function as an attribute (`VQLPIPSWithDiscriminator.disc_loss`), get ours too.
    `correct` changes nothing: their number is right.

    Args: as for every integration, see `unigen_fast.integrations`.
    """
    return _patching.apply("taming", check_version=check_version, correct=correct)


def _half(logits_real: Tensor, logits_fake: Tensor, kind: str) -> Tensor:
    loss = discriminator_loss(real=logits_real, fake=logits_fake, kind=kind, scale=0.5)
    return as_theirs(loss, logits_real, logits_fake)


@_TAMING.replaces(_MODULE, "hinge_d_loss", accepted={"3cacc921c89d7891": "0.0.1"})
def _hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return _half(logits_real, logits_fake, "hinge")


@_TAMING.replaces(_MODULE, "vanilla_d_loss", accepted={"d62fbf27fe1b8bae": "0.0.1"})
def _vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    return _half(logits_real, logits_fake, "logistic")
