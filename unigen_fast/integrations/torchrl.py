"""torchrl: DreamerV3's two KL terms."""

from torch import Tensor

from unigen_fast.divergence import balanced_categorical_kl
from unigen_fast.integrations import _patching
from unigen_fast.integrations._patching import as_theirs

_TORCHRL = _patching.Library("torchrl", "torchrl", "0.14.1")


def apply_to_torchrl(*, check_version: bool = True, correct: bool = False) -> _patching.Patch:
    """`torchrl.objectives.dreamer_v3.categorical_kl_terms`, both terms in one kernel: `DreamerV3ModelLoss` calls it.

    A side whose gradient is stopped gets None. `correct` changes nothing: its number is right.

    Args: as for every integration, see `unigen_fast.integrations`.
    """
    return _patching.apply("torchrl", check_version=check_version, correct=correct)


@_TORCHRL.replaces("torchrl.objectives.dreamer_v3", "categorical_kl_terms", code="a2aeec95c6dfe648")
def _categorical_kl_terms(
    posterior_logits: Tensor, prior_logits: Tensor, free_nats: float = 1.0, unimix: float = 0.01
) -> tuple[Tensor, Tensor]:
    found = balanced_categorical_kl(
        posterior_logits, prior_logits, event_ndims=1, free_nats=max(free_nats, 0.0), unimix=unimix
    )
    inputs = (posterior_logits, prior_logits)
    return as_theirs(found.dynamics, *inputs), as_theirs(found.representation, *inputs)
