"""torch.distributions: entries of `kl_divergence`."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from unigen_fast.divergence import bernoulli_kl, categorical_kl, gaussian_kl
from unigen_fast.integrations import _patching
from unigen_fast.integrations._patching import as_theirs

_DISTRIBUTIONS = _patching.Library("torch_distributions", "torch", "2.13.0")
_MODULE = "torch.distributions.kl"
_FINITE = "finite where a probability is rounded to 0 or 1; theirs runs otherwise"


def apply_to_torch_distributions(*, check_version: bool = True, correct: bool = False) -> _patching.Patch:
    """Entries of `torch.distributions.kl_divergence`: (Normal, Normal), and Independent ones of both.

    `Independent(Normal(…), n)` is one kernel that sums its event; Normal's subclasses of other libraries come along.

    With `correct` also (Bernoulli, Bernoulli) and (Categorical, Categorical), and OneHotCategorical with it, of
    distributions that were given logits: PyTorch's is infinite where q's probability is rounded to 0 or 1 (in float32,
    a Bernoulli's logit beyond 17), ours is not.

    Args: as for every integration, see `unigen_fast.integrations`.
    """
    return _patching.apply("torch_distributions", check_version=check_version, correct=correct)


def _normals(p: Normal, q: Normal, event_ndims: int) -> Tensor:
    tensors = torch.broadcast_tensors(p.loc, p.scale, q.loc, q.scale)
    rows = gaussian_kl(*tensors, spread="std", event_ndims=event_ndims, reduction="none")
    return as_theirs(rows, *tensors)


@_DISTRIBUTIONS.replaces(_MODULE, "_kl_normal_normal", code="19a97e4cd0170bde")
def _kl_normal_normal(p: Any, q: Any) -> Any:
    return _normals(p, q, 0)


@_DISTRIBUTIONS.replaces(_MODULE, "_kl_independent_independent", code="a618fa28006af8bf")
def _kl_independent_independent(p: Any, q: Any) -> Any:
    n = p.reinterpreted_batch_ndims
    normal = isinstance(p.base_dist, Normal) and isinstance(q.base_dist, Normal)
    if not normal or n != q.reinterpreted_batch_ndims or p.base_dist.batch_shape != q.base_dist.batch_shape:
        return NotImplemented
    return _normals(p.base_dist, q.base_dist, n)


def _of_logits(*distributions: Any) -> bool:
    return all("logits" in vars(d) and d._param is d.logits for d in distributions)


@_DISTRIBUTIONS.replaces(_MODULE, "_kl_bernoulli_bernoulli", code="f0eeb11ecaa0de25", corrects=_FINITE)
def _kl_bernoulli_bernoulli(p: Any, q: Any, *, correct: bool = False) -> Any:
    if not correct or not _of_logits(p, q):
        return NotImplemented
    tensors = torch.broadcast_tensors(p.logits, q.logits)
    return as_theirs(bernoulli_kl(*tensors, event_ndims=0, reduction="none"), *tensors)


@_DISTRIBUTIONS.replaces(_MODULE, "_kl_categorical_categorical", code="a121d9e685577980", corrects=_FINITE)
def _kl_categorical_categorical(p: Any, q: Any, *, correct: bool = False) -> Any:
    if not correct or not _of_logits(p, q):
        return NotImplemented
    tensors = torch.broadcast_tensors(p.logits, q.logits)
    return as_theirs(categorical_kl(*tensors, reduction="none"), *tensors)
