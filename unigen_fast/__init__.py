"""Fused losses of deep generative models: the same numbers as PyTorch, faster, in less memory, without overflow."""

from unigen_fast import _info, _loader, nn
from unigen_fast._version import __version__
from unigen_fast.adversarial import (
    DiscriminatorStats,
    density_ratio_js,
    density_ratio_kl,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    importance_weighted_generator_loss,
    log_discriminator,
    log_ratio,
    r1_penalty,
)
from unigen_fast.divergence import (
    BalancedKL,
    TotalCorrelation,
    balanced_categorical_kl,
    categorical_kl,
    gaussian_kl,
    mmd,
    sample_gaussian,
    sample_gaussian_with_kl,
    total_correlation,
)
from unigen_fast.importance import (
    WeightDiagnostics,
    ciwae_loss,
    cubo_loss,
    dreg_loss,
    effective_sample_size,
    importance_weighted_sum,
    importance_weights,
    iwae_loss,
    log_mean_exp,
    log_variance_loss,
    memorization_score,
    miwae_loss,
    piwae_losses,
    renyi_loss,
    rws_losses,
    trajectory_balance_loss,
    tvo_loss,
    vimco_loss,
    weight_diagnostics,
)
from unigen_fast.likelihood import (
    bernoulli_log_prob,
    categorical_log_prob,
    discretized_logistic_mixture_log_prob,
)

__all__ = [
    "BalancedKL",
    "DiscriminatorStats",
    "TotalCorrelation",
    "WeightDiagnostics",
    "balanced_categorical_kl",
    "bernoulli_log_prob",
    "categorical_kl",
    "categorical_log_prob",
    "ciwae_loss",
    "cubo_loss",
    "density_ratio_js",
    "density_ratio_kl",
    "discretized_logistic_mixture_log_prob",
    "discriminator_loss",
    "dreg_loss",
    "effective_sample_size",
    "gaussian_kl",
    "generator_loss",
    "gradient_penalty",
    "importance_weighted_generator_loss",
    "importance_weighted_sum",
    "importance_weights",
    "info",
    "iwae_loss",
    "log_discriminator",
    "log_mean_exp",
    "log_ratio",
    "log_variance_loss",
    "memorization_score",
    "miwae_loss",
    "mmd",
    "nn",
    "piwae_losses",
    "r1_penalty",
    "renyi_loss",
    "rws_losses",
    "sample_gaussian",
    "sample_gaussian_with_kl",
    "total_correlation",
    "trajectory_balance_loss",
    "tvo_loss",
    "vimco_loss",
    "weight_diagnostics",
]

_BACKENDS = _loader.load()


def info() -> _info.Info:
    """Versions, device, and which kernels are loaded, with a one-line reason for each set that is not."""
    return _info.collect(__version__, _BACKENDS)
