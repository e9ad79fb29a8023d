"""torch.distributions: entries of `kl_divergence`."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal, kl

from unigen_fast.divergence import bernoulli_kl, categorical_kl, gaussian_kl
from unigen_fast.integrations import _patching
from unigen_fast.integrations._patching import Exchange, Found, Patch, as_theirs


class _Entries(_patching.Library):
    """What is registered later counts too: pyro, once imported, has an entry of its own in place of Independent's."""

    def exchanges(self, found: list[Found], patch: Patch) -> list[Exchange]:
        theirs = kl.register_kl

        @functools.wraps(theirs)
        def register_kl(type_p: Any, type_q: Any) -> Callable[[Any], Any]:
            register = theirs(type_p, type_q)
            return lambda entry: self.stand_in(register(entry), patch)

        return [*super().exchanges(found, patch), Exchange(kl, "register_kl", theirs, register_kl)]

    def forget(self) -> None:
        kl._KL_MEMOIZE.clear()


_DISTRIBUTIONS = _Entries("torch_distributions", "torch")
_MODULE = "torch.distributions.kl"
_FINITE = "finite where a probability is rounded to 0 or 1; theirs runs otherwise"


def apply_to_torch_distributions(*, check_version: bool = True, correct: bool = False) -> _patching.Patch:
    """Entries of `torch.distributions.kl_divergence`: (Normal, Normal), and Independent ones of both.

    `Independent(Normal(…), n)` is one kernel that sums its event. Normal's subclasses of other libraries come along,
    unless an entry of their own is registered; so does pyro's entry for Independent, whenever pyro is imported.

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


@_DISTRIBUTIONS.replaces(_MODULE, "_kl_normal_normal", accepted={"a9cd4e61b7cd6b1d": "2.10.0 to 2.14.1"})
def _kl_normal_normal(p: Any, q: Any) -> Any:
    return _normals(p, q, 0)


@_DISTRIBUTIONS.replaces(_MODULE, "_kl_independent_independent", accepted={"93a58a96c82cd0a8": "2.10.0 to 2.14.1"})
@_DISTRIBUTIONS.replaces(
    "pyro.distributions.kl",
    "_kl_independent_independent",
    accepted={"aa3e62d9ebcaccfd": "0.5.1 to 1.9.2"},
    distribution="pyro-ppl",
)
def _kl_independent_independent(p: Any, q: Any) -> Any:
    n, p_base, q_base = p.reinterpreted_batch_ndims, p.base_dist, q.base_dist
    normal = (
        isinstance(p_base, Normal) and isinstance(q_base, Normal) and _entry(p_base, q_base) is kl._kl_normal_normal
    )
    if not normal or n != q.reinterpreted_batch_ndims or p_base.batch_shape != q_base.batch_shape:
        return NotImplemented
    return _normals(p_base, q_base, n)


def _entry(p: Any, q: Any) -> Any:
    """The function that `kl_divergence` calls: a subclass of Normal may have one of its own."""
    pair = type(p), type(q)
    entry = kl._KL_MEMOIZE.get(pair)
    if entry is None:
        entry = kl._KL_MEMOIZE[pair] = kl._dispatch_kl(*pair)
    return entry


def _of_logits(*distributions: Any) -> bool:
    return all("logits" in vars(d) and d._param is d.logits for d in distributions)


@_DISTRIBUTIONS.replaces(
    _MODULE, "_kl_bernoulli_bernoulli", accepted={"ae9e83ab9412e239": "2.10.0 to 2.14.1"}, corrects=_FINITE
)
def _kl_bernoulli_bernoulli(p: Any, q: Any, *, correct: bool = False) -> Any:
    if not correct or not _of_logits(p, q):
        return NotImplemented
    tensors = torch.broadcast_tensors(p.logits, q.logits)
    return as_theirs(bernoulli_kl(*tensors, event_ndims=0, reduction="none"), *tensors)


@_DISTRIBUTIONS.replaces(
    _MODULE, "_kl_categorical_categorical", accepted={"055bbf4be8db9748": "2.10.0 to 2.14.1"}, corrects=_FINITE
)
def _kl_categorical_categorical(p: Any, q: Any, *, correct: bool = False) -> Any:
    if not correct or not _of_logits(p, q):
        return NotImplemented
    tensors = torch.broadcast_tensors(p.logits, q.logits)
    return as_theirs(categorical_kl(*tensors, reduction="none"), *tensors)
