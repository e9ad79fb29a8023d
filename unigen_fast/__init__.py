"""Fused losses of deep generative models: the same numbers as PyTorch, faster, in less memory, without overflow."""

from unigen_fast import _info, _loader, nn
from unigen_fast._version import __version__
from unigen_fast.adversarial import (
    DiscriminatorStats,
    discriminator_loss,
    generator_loss,
    importance_weighted_generator_loss,
    log_discriminator,
    log_ratio,
)
from unigen_fast.divergence import (
    TotalCorrelation,
    gaussian_kl,
    mmd,
    sample_gaussian,
    sample_gaussian_with_kl,
    total_correlation,
)
from unigen_fast.importance import effective_sample_size, importance_weights, iwae_loss, log_mean_exp
from unigen_fast.likelihood import bernoulli_log_prob

__all__ = [
    "DiscriminatorStats",
    "TotalCorrelation",
    "bernoulli_log_prob",
    "discriminator_loss",
    "effective_sample_size",
    "gaussian_kl",
    "generator_loss",
    "importance_weighted_generator_loss",
    "importance_weights",
    "info",
    "iwae_loss",
    "log_discriminator",
    "log_mean_exp",
    "log_ratio",
    "mmd",
    "nn",
    "sample_gaussian",
    "sample_gaussian_with_kl",
    "total_correlation",
]

_BACKENDS = _loader.load()


def info() -> _info.Info:
    """Versions, device, and which kernels are loaded, with a one-line reason for each set that is not."""
    return _info.collect(__version__, _BACKENDS)
