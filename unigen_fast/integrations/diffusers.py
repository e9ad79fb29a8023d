"""diffusers: the posterior of its autoencoders, which LDM and Stable Diffusion train with."""

from typing import Any

import torch
from torch import Tensor

from unigen_fast.divergence import gaussian_kl
from unigen_fast.integrations import _patching
from unigen_fast.integrations._patching import as_theirs

_DIFFUSERS = _patching.Library("diffusers", "diffusers")
_MODULE = "diffusers.models.autoencoders.vae"


def apply_to_diffusers(*, check_version: bool = True, correct: bool = False) -> _patching.Patch:
    """`DiagonalGaussianDistribution.kl` and `.sample`, of every autoencoder that returns one.

    `sample` draws diffusers' own noise: same generator, same numbers.

    With `correct`: `kl` sums over all dimensions but the batch's, where diffusers takes three of them (of a video's
    `[B, C, T, H, W]` it returns `[B, W]`); and it is float32 for fp16 and bf16, where diffusers' overflows from 65504.

    Args: as for every integration, see `unigen_fast.integrations`.
    """
    return _patching.apply("diffusers", check_version=check_version, correct=correct)


@_DIFFUSERS.replaces(
    _MODULE,
    "DiagonalGaussianDistribution.kl",
    accepted={"6508774a3ccdd2be": "0.25.0 to 0.42.1"},
    corrects="sums over all dimensions but the first, not the next three; float32 for fp16 and bf16",
)
def _kl(self: Any, other: Any = None, *, correct: bool = False) -> Any:
    event_ndims = self.mean.dim() - 1
    if self.deterministic or (other is not None and other.deterministic) or event_ndims < 3:
        return NotImplemented
    tensors = [self.mean, self.logvar]
    if other is not None:
        tensors = list(torch.broadcast_tensors(*tensors, other.mean, other.logvar))
    if not correct and event_ndims > 3:  # dimensions 1, 2 and 3 to the end
        tensors, event_ndims = [t.movedim((1, 2, 3), (-3, -2, -1)) for t in tensors], 3
    rows = gaussian_kl(*tensors, event_ndims=event_ndims, reduction="none")
    return rows if correct else as_theirs(rows, *tensors)


@_DIFFUSERS.replaces(_MODULE, "DiagonalGaussianDistribution.sample", accepted={"f3b382f54317feb6": "0.25.0 to 0.42.1"})
def _sample(self: Any, generator: torch.Generator | None = None) -> Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    like = self.parameters
    noise = randn_tensor(self.mean.shape, generator=generator, device=like.device, dtype=like.dtype)
    return torch.addcmul(self.mean, self.std, noise)
