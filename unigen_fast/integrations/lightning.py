"""A Lightning callback that logs what the losses of a training step know.

    from unigen_fast.integrations.lightning import LossStatistics

    lightning.Trainer(callbacks=[LossStatistics()], log_every_n_steps=50)

Works with `lightning` and with `pytorch_lightning`.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unigen_fast import _checks, adversarial, divergence, importance, objectives
from unigen_fast._private import transforms_active
from unigen_fast.integrations._patching import Exchange, exchange, substitute

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
_MOST_DIMENSIONS = 64
_ACTIVE = 0.01

Statistics = dict[str, Tensor]


def _callback_classes() -> tuple[type, ...]:
    """Of the packages that are in use, or else of the first that is installed."""
    found = [module for module in map(sys.modules.get, _PACKAGES) if module is not None]
    for name in _PACKAGES:
        if found:
            break
        try:
            found.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            if error.name not in ("lightning", name):
                raise
    if not found:
        raise ImportError("lightning: not installed (pip install lightning, or pytorch-lightning)")
    return tuple(module.Callback for module in found)


# ---- what a call tells -----------------------------------------------------------------------------------------------


def _of_posterior(kl: Tensor, event_ndims: int, mean: Tensor | None, weights: Tensor | None) -> Statistics:
    """Of each entry's KL: the mean over the rows, which `weights` weigh; of a Gaussian's mean, the units that vary."""
    event_ndims = event_ndims or min(kl.dim(), 1)  # torch.distributions' rows are dimensions
    rows = kl.shape[: kl.dim() - event_ndims]
    share = kl.new_ones(rows) if weights is None else weights.detach().to(kl).expand(rows)
    total = share.sum()
    share = (share / total.where(total != 0, 1)).reshape(-1, 1)

    def mean_over_rows(x: Tensor) -> Tensor:
        return (share * x.reshape(share.numel(), -1)).sum(0)  # no matrix product: autocast would round it to 16 bits

    each = mean_over_rows(kl)
    found = {"total": each.sum()}
    if mean is not None:
        mean = mean.to(kl).expand_as(kl).reshape(share.numel(), -1)
        found["active_units"] = (mean_over_rows((mean - mean_over_rows(mean)).square()) > _ACTIVE).sum().to(kl.dtype)
    return {**found, "dimension": each}


def _gaussian(given: Mapping[str, Any], event_ndims: int | None) -> Statistics:
    named = {name: _detached(given.get(name)) for name in ("mean", "logvar", "prior_mean", "prior_logvar")}
    tensors, event_ndims = _checks.aligned(event_ndims, optional=("prior_mean", "prior_logvar"), **named)  # type: ignore[arg-type]
    options = {name: given[name] for name in ("spread", "clamp_logvar")}
    kl = divergence.gaussian_kl(*tensors, event_ndims=0, reduction="none", **options)
    return _of_posterior(kl, event_ndims, tensors[0], given.get("weights"))


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _of_gaussian_kl(given: Mapping[str, Any], result: Any) -> dict[str, Statistics]:
    return {"kl": _gaussian(given, given["event_ndims"])}


def _of_elbo(given: Mapping[str, Any], result: objectives.Bound) -> dict[str, Statistics]:
    return {"kl": _gaussian(given, given["mean"].dim() - result.kl.dim())}


def _of_objective(given: Mapping[str, Any], result: objectives.MultiSampleBound) -> dict[str, Statistics]:
    kl = _gaussian(given, given["z"].dim() - result.log_w.dim())
    return {"kl": kl, "importance": {"effective_sample_size": result.ess.mean()}}


def _of_bernoulli_kl(given: Mapping[str, Any], result: Any) -> dict[str, Statistics]:
    named = {name: _detached(given[name]) for name in ("logits_q", "logits_p")}
    tensors, event_ndims = _checks.aligned(given["event_ndims"], optional=("logits_p",), **named)  # type: ignore[arg-type]
    kl = divergence.bernoulli_kl(*tensors, event_ndims=0, reduction="none")
    return {"kl": _of_posterior(kl, event_ndims, None, given["weights"])}


def _of_categorical_kl(given: Mapping[str, Any], result: Any) -> dict[str, Statistics]:
    options = {name: given[name] for name in ("class_dim", "unimix")}
    named = {name: _detached(given[name]) for name in ("logits_q", "logits_p")}
    tensors, event_ndims, _ = _checks.aligned_sites(
        given["event_ndims"], given["class_dim"], optional=("logits_p",), **named
    )
    kl = divergence.categorical_kl(*tensors, event_ndims=0, reduction="none", **options)
    return {"kl": _of_posterior(kl, event_ndims, None, given["weights"])}


def _of_weights(log_w: Tensor, dim: int) -> dict[str, Statistics]:
    return {"importance": {"effective_sample_size": importance.effective_sample_size(log_w, dim=dim).mean()}}


def _of_log_weights(given: Mapping[str, Any], result: Any) -> dict[str, Statistics]:
    return _of_weights(given["log_w"].detach() / given.get("temperature", 1.0), given["dim"])


def _of_grouped(given: Mapping[str, Any], result: Any) -> dict[str, Statistics]:
    return _of_weights(given["log_w"], given["sample_dim"])


def _of_wake_sleep(given: Mapping[str, Any], result: Any) -> dict[str, Statistics]:
    return _of_weights(given["log_p"].detach() - given["log_q"].detach(), given["dim"])


def _of_generator(given: Mapping[str, Any], result: Any) -> dict[str, Statistics]:
    fake, dim = given["fake"].detach() / given["temperature"], given["dim"]
    if given["groups"] is not None or fake.numel() == 0:
        return {}
    return _of_weights(fake.flatten() if dim is None else fake, 0 if dim is None else dim)


def _of_discriminator(given: Mapping[str, Any], result: adversarial.DiscriminatorStats) -> dict[str, Statistics]:
    found = result._asdict()
    del found["losses"]
    return {"discriminator": {name: value.mean() for name, value in found.items()}}


def _with_statistics(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """What `discriminator_loss` returns, and the statistics of the same pass."""
    if kwargs.get("return_stats"):
        result = function(**kwargs)
        return result, result[1]
    if kwargs.get("reduction") == "none":  # has none
        result = function(**kwargs)
        return result, function(**{**kwargs, "reduction": "mean", "return_stats": True})[1]
    return function(**{**kwargs, "return_stats": True})


class _Observed(NamedTuple):
    module: ModuleType
    name: str
    statistics: Callable[[Mapping[str, Any], Any], dict[str, Statistics]]  # of a call's arguments and result


_OBSERVED = (
    _Observed(divergence, "gaussian_kl", _of_gaussian_kl),
    _Observed(divergence, "sample_gaussian_with_kl", _of_gaussian_kl),
    _Observed(divergence, "bernoulli_kl", _of_bernoulli_kl),
    _Observed(divergence, "categorical_kl", _of_categorical_kl),
    _Observed(objectives, "elbo_loss", _of_elbo),
    _Observed(objectives, "iwae_objective", _of_objective),
    *(
        _Observed(importance, name, _of_log_weights)
        for name in (
            "iwae_loss",
            "ciwae_loss",
            "dreg_loss",
            "vimco_loss",
            "importance_weights",
            "importance_weighted_sum",
        )
    ),
    _Observed(importance, "miwae_loss", _of_grouped),
    _Observed(importance, "piwae_losses", _of_grouped),
    _Observed(importance, "rws_losses", _of_wake_sleep),
    _Observed(adversarial, "importance_weighted_generator_loss", _of_generator),
    _Observed(adversarial, "discriminator_loss", _of_discriminator),
)

# ---- calls are seen --------------------------------------------------------------------------------------------------

_training: list["LossStatistics"] = []  # ours are in place as long as there are any
_recording: list["LossStatistics"] = []  # in a step that is logged, and outside of a call that is recorded
_watching: list[Exchange] = []


def _watched(observed: _Observed, function: FunctionType) -> FunctionType:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not _recording or transforms_active():
            return function(*args, **kwargs)
        recorders = _recording[:]
        _recording.clear()  # what the function calls in its turn is part of it
        try:
            if observed.name == "discriminator_loss" and not args:
                result, told = _with_statistics(function, kwargs)
            else:
                result = told = function(*args, **kwargs)
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            with torch.no_grad():
                statistics = observed.statistics(given.arguments, told)
        finally:
            _recording[:] = recorders
        for recorder in recorders:
            recorder._record(statistics)
        return result

    return wrapper  # type: ignore[return-value]


def _watch(callback: "LossStatistics") -> None:
    if not _training:
        for observed in _OBSERVED:
            function = vars(observed.module)[observed.name]
            _watching.append(Exchange(observed.module, observed.name, function, _watched(observed, function)))
        substitute(_watching)
    _training.append(callback)


def _stop_recording(callback: "LossStatistics") -> bool:
    """Whether it was recording."""
    found = callback in _recording
    if found:
        _recording.remove(callback)
    return found


def _leave(callback: "LossStatistics") -> None:
    _stop_recording(callback)
    if callback in _training:
        _training.remove(callback)
    if _watching and not _training:
        exchange([each.back for each in _watching])
        _watching.clear()


class LossStatistics(*_callback_classes()):  # type: ignore[misc]
    """Logs, of the training steps that Lightning logs, what the calls of this package's losses know.

      - `kl/total`, of `gaussian_kl`, `sample_gaussian_with_kl`, `elbo_loss`, `iwae_objective`, `bernoulli_kl`,
        `categorical_kl`: KL(q(z|x) ‖ p(z)) in nats, in closed form and before free bits, the mean over the batch
        (weighted, where the call has `weights`);
      - `kl/dimension/…`: that of each dimension, if there are no more than 64;
      - `kl/active_units`, of Gaussians: how many dimensions have Var_x(E[z|x]) > 0.01 in the batch;
      - `importance/effective_sample_size`, of `iwae_loss`, `iwae_objective`, `importance_weights`,
        `importance_weighted_sum`, `ciwae_loss`, `miwae_loss`, `piwae_losses`, `dreg_loss`, `vimco_loss`, `rws_losses`,
        and of `importance_weighted_generator_loss` without `groups`: 1 / sum_k w~_k², in [1, K], the mean over the
        rows;
      - `discriminator/…`, of `discriminator_loss`: `DiscriminatorStats` but for the losses; of several scales the mean.

    A second call in a step is logged as `kl_2/…`, and so on. All of it is about the process's own samples, and comes
    from the tensors that the losses are given: the networks run no more often, the numbers stay on the device until
    Lightning reads those of a step it logs, random numbers are left alone, and the steps between do nothing besides.
    Training is bit for bit that without the callback. The functions are seen wherever they are called from, so also
    where `uf.integrations` has put them into a library; not inside `torch.compile` or `torch.func`. Of
    `unigen_fast.distributed` nothing is logged.

    Attributes:
        statistics: those of the last logged step, by name; `kl/dimension` is one tensor, of any length.

    Raises:
        ImportError: on import of this module, where there is neither package.

    Source: Burda, Grosse, Salakhutdinov (2016), Sec. 5.2, active units; Kong (1992), effective sample size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.statistics: Statistics = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        _watch(self)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        _stop_recording(self)  # the batch before, if the module skipped it, has not ended
        if trainer._logger_connector.should_update_logs or trainer.fast_dev_run:
            self.statistics = {}
            _recording.append(self)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if _stop_recording(self):
            pl_module.log_dict(dict(_scalars(self.statistics)))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        _leave(self)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        _leave(self)

    def _record(self, statistics: dict[str, Statistics]) -> None:
        for family, found in statistics.items():
            count, prefix = 1, family
            while any(name.startswith(f"{prefix}/") for name in self.statistics):
                count += 1
                prefix = f"{family}_{count}"
            self.statistics.update({f"{prefix}/{name}": value for name, value in found.items()})


def _scalars(statistics: Statistics) -> Iterator[tuple[str, Tensor]]:
    for name, value in statistics.items():
        if value.dim() == 0:
            yield name, value
        elif value.numel() <= _MOST_DIMENSIONS:
            width = len(str(value.numel() - 1))
            for i, entry in enumerate(value.unbind()):
                yield f"{name}/{i:0{width}}", entry
