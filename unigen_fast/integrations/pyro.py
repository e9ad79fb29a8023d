"""pyro: the Rényi bound, and with it the IWAE."""

from typing import Any

import torch
from torch import Tensor

from unigen_fast.importance import importance_weights, renyi_loss
from unigen_fast.integrations import _patching

_PYRO = _patching.Library("pyro", "pyro-ppl")
_MODULE = "pyro.infer.renyi_elbo"


def apply_to_pyro(*, check_version: bool = True, correct: bool = False) -> _patching.Patch:
    """`RenyiELBO.loss` and `.loss_and_grads`: value, weights and gradient of the particles in one kernel.

    `correct` changes nothing: its number is right.

    Args: as for every integration, see `unigen_fast.integrations`.
    """
    return _patching.apply("pyro", check_version=check_version, correct=correct)


def _particles(self: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[list[Any], list[Any], bool]:
    """Each particle's log-weight and what is differentiated in its place, and whether a trace has parameters.

    They are the same object where the guide is reparameterised. Sites without a pathwise gradient have alpha / (1 -
    alpha) times their log-probability, and not its negative (Li and Turner, 2016, with the score function).
    """
    from pyro.distributions.util import is_identically_zero
    from pyro.infer.util import get_dependent_plate_dims, torch_sum

    log_w: list[Any] = []
    surrogates: list[Any] = []
    trainable = False
    for traces in self._get_traces(model, guide, args, kwargs):
        dims = get_dependent_plate_dims(traces[0].nodes.values())
        trainable = any(site["type"] == "param" for trace in traces for site in trace.nodes.values())
        of_model, of_guide = (
            [(site, torch_sum(site["log_prob"], dims)) for site in trace.nodes.values() if site["type"] == "sample"]
            for trace in traces
        )
        weight = sum(log_prob for _, log_prob in of_model) - sum(log_prob for _, log_prob in of_guide)
        surrogate = weight
        for site, log_prob in of_guide:
            _, score, entropy = site["score_parts"]
            if not is_identically_zero(score):
                if not is_identically_zero(entropy):
                    raise NotImplementedError(f"{site['name']}: a site with a score and a pathwise gradient")
                surrogate = surrogate + log_prob / (1 - self.alpha)  # -1 + 1 / (1 - alpha) = alpha / (1 - alpha)
            elif is_identically_zero(entropy):
                surrogate = surrogate + log_prob
        log_w.append(weight)
        surrogates.append(surrogate)
    return log_w, surrogates, trainable


def _joined(self: Any, particles: list[Any]) -> Tensor:
    """Particles along the first dimension."""
    return particles[0] if self.vectorize_particles and self.num_particles > 1 else torch.stack(particles)


@_PYRO.replaces(_MODULE, "RenyiELBO.loss", accepted={"d0fbb7b2a0cca485": "1.3.0 to 1.9.2"})
@torch.no_grad()
def _loss(self: Any, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
    particles, _, _ = _particles(self, model, guide, args, kwargs)
    if not isinstance(particles[0], Tensor):  # no site was sampled
        return 0.0
    return _reported(renyi_loss(_joined(self, particles), dim=0, alpha=self.alpha, reduction="sum"))


@_PYRO.replaces(_MODULE, "RenyiELBO.loss_and_grads", accepted={"91f8817cb152cf9b": "1.3.0 to 1.9.2"})
def _loss_and_grads(self: Any, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
    particles, surrogates, trainable = _particles(self, model, guide, args, kwargs)
    if not isinstance(particles[0], Tensor):
        return 0.0
    log_w = _joined(self, particles)
    if all(s is w for s, w in zip(surrogates, particles, strict=True)):
        loss = surrogate_loss = renyi_loss(log_w, dim=0, alpha=self.alpha, reduction="sum")
    else:
        log_w = log_w.detach()
        loss = renyi_loss(log_w, dim=0, alpha=self.alpha, reduction="sum")
        weights = importance_weights((1 - self.alpha) * log_w, dim=0)
        surrogate_loss = -(weights * _joined(self, surrogates)).sum()
    if trainable and surrogate_loss.requires_grad:
        surrogate_loss.backward()
    return _reported(loss)


def _reported(loss: Tensor) -> float:
    from pyro.util import warn_if_nan

    value = loss.item()
    warn_if_nan(value, "loss")
    return value
