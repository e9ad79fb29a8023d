"""The table of `info --ops`: nothing that the public contract names is missing from it, nor from any layer."""

import subprocess
import sys

import pytest
import torch
from helpers import NATIVE, OPS

import unigen_fast as uf
from unigen_fast import _coverage

# of both losses; the generator's have the two of the original GAN in place of the logistic one
_KINDS = (
    "least_squares",
    "hinge",
    "wasserstein",
    "relativistic",
    "relativistic_average",
    "relativistic_average_least_squares",
    "relativistic_average_hinge",
    "kl_wgan",
    "fgan_kl",
    "fgan_reverse_kl",
    "fgan_pearson",
    "fgan_neyman",
    "fgan_hellinger",
    "fgan_js",
)

_LIKELIHOODS = (
    "bernoulli",
    "gaussian",
    "laplace",
    "discretized_logistic",
    "negative_binomial",
    "zero_inflated_negative_binomial",
    "categorical",
    "discretized_logistic_mixture",
)

# family -> function -> named options
CONTRACT: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "importance": {
        "log_mean_exp": {},
        "importance_weights": {},
        "effective_sample_size": {},
        "weight_diagnostics": {},
        "importance_weighted_sum": {},
        "iwae_loss": {"value": ("bound", "surrogate")},
        "miwae_loss": {},
        "ciwae_loss": {},
        "piwae_losses": {},
        "renyi_loss": {},
        "cubo_loss": {},
        "tvo_loss": {},
        "vimco_loss": {},
        "rws_losses": {},
        "dreg_loss": {},
        "log_variance_loss": {},
        "trajectory_balance_loss": {},
        "memorization_score": {},
    },
    "adversarial": {
        "discriminator_loss": {"kind": ("logistic", *_KINDS)},
        "generator_loss": {"kind": ("non_saturating", "saturating", *_KINDS)},
        "r1_penalty": {},
        "gradient_penalty": {},
        "importance_weighted_generator_loss": {},
        "log_discriminator": {},
        "log_ratio": {},
        "density_ratio_kl": {},
    },
    "divergence": {
        "gaussian_kl": {"spread": ("logvar", "logstd", "std"), "free_bits_mode": ("sum", "per_dim")},
        "gaussian_kl_monte_carlo": {"spread": ("logvar", "logstd", "std")},
        "sample_gaussian": {"spread": ("logvar", "logstd", "std")},
        "sample_gaussian_with_kl": {"spread": ("logvar", "logstd", "std")},
        "bernoulli_kl": {},
        "categorical_kl": {},
        "balanced_categorical_kl": {"free_nats_mode": ("sum", "per_variable")},
        "total_correlation": {"estimator": ("mss", "mws", "mss_columns")},
        "mmd": {"kernel": ("imq", "rbf")},
    },
    "likelihood": {
        "bernoulli_log_prob": {},
        "gaussian_log_prob": {"spread": ("logvar", "logstd", "std")},
        "laplace_log_prob": {},
        "categorical_log_prob": {},
        "discretized_logistic_log_prob": {},
        "discretized_logistic_mixture_log_prob": {},
        "negative_binomial_log_prob": {},
        "zero_inflated_negative_binomial_log_prob": {},
    },
    "objectives": {
        "elbo_loss": {"likelihood": _LIKELIHOODS, "spread": ("logvar", "logstd", "std")},
        "iwae_objective": {
            "likelihood": _LIKELIHOODS,
            "estimator": ("iwae", "stl", "dreg", "elbo", "miwae", "ciwae", "renyi", "cubo", "tvo"),
            "spread": ("logvar", "logstd", "std"),
        },
        "adversary_activated_loss": {},
        "streaming_log_likelihood": {},
    },
}
FUNCTIONS = [(family, name) for family, functions in CONTRACT.items() for name in functions]
ENTRIES = {entry.name: entry for entry in _coverage.entries()}


@pytest.mark.parametrize(("family", "name"), FUNCTIONS, ids=[name for _, name in FUNCTIONS])
def test_every_function_of_the_contract_is_in_the_table(family: str, name: str) -> None:
    entry = ENTRIES[name]
    assert entry.family == family
    for option, values in CONTRACT[family][name].items():
        assert set(values) <= set(entry.options[option])


@pytest.mark.parametrize("layer", _coverage.LAYERS)
def test_no_layer_lacks_an_op(layer: str) -> None:
    if layer in ("cpu", "cuda") and not (NATIVE["cpu"] or NATIVE["cuda"]):
        pytest.skip("the extension modules are not in use")
    if layer == "triton":
        pytest.importorskip("triton")
    assert {name: entry.missing[layer] for name, entry in ENTRIES.items() if entry.missing[layer]} == {}


def test_every_op_belongs_to_a_function_of_the_table() -> None:
    assert {op for entry in ENTRIES.values() for op in entry.ops} == set(OPS)


@pytest.mark.skipif(not NATIVE["cpu"], reason="the C++ kernels are not in use")
def test_the_dispatcher_has_what_the_table_says() -> None:
    for name, op in OPS.items():
        for found in [name, f"{name}_backward"] if hasattr(op, "backward") else [name]:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"unigen_fast::{found}", "CPU")


def test_the_command_prints_the_table() -> None:
    command = [sys.executable, "-m", "unigen_fast", "info", "--ops"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    for family, name in FUNCTIONS:
        assert f"{family}.{name} " in printed
    assert str(uf.info().backends[0]) in printed
