"""multivae: MMVAE's multi-sample bounds and the KL that its models share."""

from typing import Any

import torch
from torch import Tensor

from unigen_fast.divergence import gaussian_kl
from unigen_fast.importance import iwae_loss, weigh_gradient
from unigen_fast.integrations import _patching
from unigen_fast.integrations._patching import as_theirs

_MULTIVAE = _patching.Library("multivae", "multivae")
_MMVAE = "multivae.models.mmvae.mmvae_model"
_BOUND = "reports the bound, not its surrogate sum_k w~_k log w_k; same gradient"


def apply_to_multivae(*, check_version: bool = True, correct: bool = False) -> _patching.Patch:
    """`MMVAE.dreg_looser` and `.iwae_looser` (samples first, summed over the batch), `base_utils.kl_divergence`.

    With `correct`: `dreg_looser` reports the bound rather than its surrogate (same gradient).

    Args: as for every integration, see `unigen_fast.integrations`.
    """
    return _patching.apply("multivae", check_version=check_version, correct=correct)


def _output(loss: Tensor) -> Any:
    from multivae.models.base import ModelOutput

    return ModelOutput(loss=loss, loss_sum=loss, metrics={})


def _over_modalities(losses: Tensor, modalities: Any) -> Any:
    """The mean over each example's modalities of `[modalities, batch]`, summed over the batch."""
    return _output((losses.sum(0) / modalities).sum())


@_MULTIVAE.replaces(_MMVAE, "MMVAE.dreg_looser", accepted={"fe5682b77edcb5a7": "1.0.0 to 1.0.3"}, corrects=_BOUND)
def _dreg_looser(
    self: Any, qz_xs: Any, embeddings: Any, reconstructions: Any, inputs: Any, *, correct: bool = False
) -> Any:
    lws, modalities = self.compute_k_lws(qz_xs, embeddings, reconstructions, inputs)
    for name in embeddings:
        weigh_gradient(embeddings[name], lws[name], 0)
    log_w = torch.stack([lws[name] for name in embeddings])
    value = "bound" if correct else "surrogate"
    return _over_modalities(iwae_loss(log_w, dim=1, reduction="none", value=value), modalities)


@_MULTIVAE.replaces(_MMVAE, "MMVAE.iwae_looser", accepted={"930c226be08d017f": "1.0.0 to 1.0.3"})
def _iwae_looser(self: Any, qz_xs: Any, embeddings: Any, reconstructions: Any, inputs: Any) -> Any:
    lws, modalities = self.compute_k_lws(qz_xs, embeddings, reconstructions, inputs)
    return _over_modalities(iwae_loss(torch.stack(list(lws.values())), dim=1, reduction="none"), modalities)


@_MULTIVAE.replaces("multivae.models.base.base_utils", "kl_divergence", accepted={"f2fdfab4dfe01f56": "1.0.0 to 1.0.3"})
def _kl_divergence(mean: Tensor, log_var: Tensor, prior_mean: Tensor, prior_log_var: Tensor) -> Tensor:
    tensors = torch.broadcast_tensors(mean, log_var, prior_mean, prior_log_var)
    return as_theirs(gaussian_kl(*tensors, event_ndims=1, reduction="none"), *tensors)
