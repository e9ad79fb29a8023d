"""scvi-tools: the log-probabilities of its count distributions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unigen_fast.integrations import _patching
from unigen_fast.integrations._patching import as_theirs
from unigen_fast.likelihood import negative_binomial_log_prob, zero_inflated_negative_binomial_log_prob

_SCVI = _patching.Library("scvi", "scvi-tools")
_MODULE = "scvi.distributions._negative_binomial"


def apply_to_scvi(*, check_version: bool = True, correct: bool = False) -> _patching.Patch:
    """`log_nb_positive` and `log_zinb_positive`, which `NegativeBinomial` and its zero-inflated sister call.

    Accurate where scvi-tools' lose their digits (theta >= 1e5 in float32, scverse/scvi-tools#2965). The Gaussian KL of
    its models is `torch.distributions`': see `apply_to_torch_distributions`.

    With `correct`: nothing is added to mu and theta inside the logarithms (scvi-tools adds 1e-8).

    Args: as for every integration, see `unigen_fast.integrations`.
    """
    return _patching.apply("scvi", check_version=check_version, correct=correct)


_EXACT = "nothing is added to mu and theta"


def _usual(log_fn: Callable[..., Any], lgamma_fn: Callable[..., Any], *tensors: Any) -> bool:
    """PyTorch's tensors and functions, not JAX's or those for Apple's GPUs."""
    return log_fn is torch.log and lgamma_fn is torch.lgamma and all(isinstance(t, Tensor) for t in tensors)


@_SCVI.replaces(_MODULE, "log_nb_positive", accepted={"855a753b3361a3f8": "0.16.4 to 1.5.1"}, corrects=_EXACT)
def _log_nb_positive(
    x: Tensor, mu: Tensor, theta: Tensor, eps: float = 1e-8, log_fn: Any = torch.log, lgamma_fn: Any = torch.lgamma,
    *, correct: bool = False,
) -> Any:  # fmt: skip
    if not _usual(log_fn, lgamma_fn, x, mu, theta):
        return NotImplemented
    x, mu, theta = torch.broadcast_tensors(x, mu, theta)
    log_prob = negative_binomial_log_prob(x, mu, theta, eps=0.0 if correct else eps, event_ndims=0)
    return as_theirs(log_prob, mu, theta)


@_SCVI.replaces(
    _MODULE,
    "log_zinb_positive",
    accepted={"39ad29e09f54a34a": "1.2.2 to 1.5.1", "b87010b2f5ae9726": "0.16.4 to 1.2.1"},
    corrects=_EXACT,
)
def _log_zinb_positive(
    x: Tensor, mu: Tensor, theta: Tensor, pi: Tensor, eps: float = 1e-8, log_fn: Any = torch.log,
    lgamma_fn: Any = torch.lgamma, *, correct: bool = False,
) -> Any:  # fmt: skip
    if not _usual(log_fn, lgamma_fn, x, mu, theta, pi):
        return NotImplemented
    x, mu, theta, pi = torch.broadcast_tensors(x, mu, theta, pi)
    log_prob = zero_inflated_negative_binomial_log_prob(x, mu, theta, pi, eps=0.0 if correct else eps, event_ndims=0)
    return as_theirs(log_prob, mu, theta, pi)
