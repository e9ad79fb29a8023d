"""torchrl: the KL terms of DreamerV3's world model."""

from typing import Any

import torch
from torch import Tensor

from unigen_fast.divergence import balanced_categorical_kl
from unigen_fast.integrations import _patching
from unigen_fast.integrations._patching import as_theirs

_TORCHRL = _patching.Library("torchrl", "torchrl")


def apply_to_torchrl(*, check_version: bool = True, correct: bool = False) -> _patching.Patch:
    """`torchrl.objectives.dreamer_v3.categorical_kl_terms`, both terms in one kernel: `DreamerV3ModelLoss` calls it.

    That is with `kl_mode="separate"`, the published loss. A side whose gradient is stopped gets None.

    With `correct` also `categorical_kl_balanced`, of `kl_mode="balanced"`: torchrl sets every probability to at least
    1e-8, which bounds the KL to a prior that is wrong and stops its gradient where it is most needed.

    Args: as for every integration, see `unigen_fast.integrations`.
    """
    return _patching.apply("torchrl", check_version=check_version, correct=correct)


_MODULE = "torchrl.objectives.dreamer_v3"


@_TORCHRL.replaces(_MODULE, "categorical_kl_terms", accepted={"575007c9a038bc59": "0.14.0 to 0.14.1"})
def _categorical_kl_terms(
    posterior_logits: Tensor, prior_logits: Tensor, free_nats: float = 1.0, unimix: float = 0.01
) -> tuple[Tensor, Tensor]:
    posterior_logits, prior_logits = torch.broadcast_tensors(posterior_logits, prior_logits)
    found = balanced_categorical_kl(
        posterior_logits, prior_logits, event_ndims=1, free_nats=max(free_nats, 0.0), unimix=unimix
    )
    inputs = (posterior_logits, prior_logits)
    return as_theirs(found.dynamics, *inputs), as_theirs(found.representation, *inputs)


@_TORCHRL.replaces(
    _MODULE,
    "categorical_kl_balanced",
    accepted={"e4df5e3acdc440ae": "0.13.1 to 0.14.1"},
    corrects="no floor of 1e-8 under the probabilities",
)
def _categorical_kl_balanced(
    posterior_logits: Tensor, prior_logits: Tensor, alpha: float = 0.8, free_bits: float = 1.0, *, correct: bool = False
) -> Any:
    if not correct:
        return NotImplemented
    posterior_logits, prior_logits = torch.broadcast_tensors(posterior_logits, prior_logits)
    found = balanced_categorical_kl(
        posterior_logits, prior_logits, event_ndims=0, free_nats=max(free_bits, 0.0), dynamics_scale=alpha,
        representation_scale=1 - alpha,
    )  # fmt: skip
    return as_theirs(found.loss, posterior_logits, prior_logits)
