"""Natural wrong calls, of every public function: each is refused with a message that names the argument.

A table of functions and kinds. A cell is a list of calls, each an argument's wrong value and what the message says, or
the reason why the kind does not apply.
"""

import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import unigen_fast as uf

B, K, D, C = 4, 5, 6, 3
FUNCTIONS = {
    name: getattr(uf, name)
    for name in uf.__all__
    if inspect.isfunction(getattr(uf, name)) and name not in ("info", "checked")
}

Call = tuple[dict[str, Any], str]
Cell = list[Call] | str


def rand(*shape: int) -> Tensor:
    return torch.randn(shape)


def unit(*shape: int) -> Tensor:
    return 0.05 + 0.9 * torch.rand(shape)


def of_latent() -> dict[str, Any]:
    return {"mean": rand(B, D), "logvar": rand(B, D)}


def of_bound(*samples: int) -> dict[str, Any]:
    return {"decoder": rand(B, *samples, D), "x": unit(B, D), "mean": rand(B, 2), "logvar": rand(B, 2)}


def penalised() -> dict[str, Any]:
    inputs = rand(B, D).requires_grad_()
    return {"logits": 3 * inputs.square().sum(1), "inputs": inputs}


# a right call of each
RIGHT: dict[str, Callable[[], dict[str, Any]]] = {
    **{
        name: lambda: {"log_w": rand(B, K), "dim": 1}
        for name in (
            "log_mean_exp",
            "importance_weights",
            "effective_sample_size",
            "weight_diagnostics",
            "iwae_loss",
            "cubo_loss",
            "log_variance_loss",
        )
    },
    **{
        name: lambda: {"log_w": rand(B, K, 3), "sample_dim": 1, "group_dim": 2}
        for name in ("miwae_loss", "piwae_losses")
    },
    "importance_weighted_sum": lambda: {"log_w": rand(B, K), "payload": rand(B, K, 2), "dim": 1},
    "ciwae_loss": lambda: {"log_w": rand(B, K), "dim": 1, "beta": 0.5},
    "renyi_loss": lambda: {"log_w": rand(B, K), "dim": 1, "alpha": 0.5},
    "tvo_loss": lambda: {"log_w": rand(B, K), "dim": 1, "partition": [0.0, 0.5, 1.0]},
    "vimco_loss": lambda: {"log_w": rand(B, K), "log_q": rand(B, K), "dim": 1},
    "rws_losses": lambda: {"log_p": rand(B, K), "log_q": rand(B, K), "dim": 1},
    "dreg_loss": lambda: {"log_w": rand(B, K), "z": rand(B, K, 2), "dim": 1},
    "trajectory_balance_loss": lambda: {"log_w": rand(B), "log_z": rand(1)},
    "memorization_score": lambda: {"log_px_in": rand(B, K), "log_px_out": rand(B, 2), "dim": 1},
    "discriminator_loss": lambda: {"real": rand(B, K), "fake": rand(B, K)},
    "generator_loss": lambda: {"fake": rand(B, K)},
    "importance_weighted_generator_loss": lambda: {"fake": rand(B * K), "groups": torch.arange(B * K) % 3},
    "log_discriminator": lambda: {"logits": rand(B, K), "y": torch.ones(B, 1)},
    "log_ratio": lambda: {"logits": rand(B, K), "y": torch.ones(B, 1)},
    "density_ratio_kl": lambda: {"logits": rand(B, K)},
    "density_ratio_js": lambda: {"real": rand(B, K), "fake": rand(B, K)},
    "r1_penalty": penalised,
    "gradient_penalty": lambda: {"discriminator": lambda x: x.sum(1), "real": rand(B, D), "fake": rand(B, D)},
    "gaussian_kl": lambda: {**of_latent(), "weights": unit(B)},
    "gaussian_kl_monte_carlo": lambda: {
        "z": rand(B, D),
        **of_latent(),
        "prior_mean": rand(D),
        "prior_logvar": rand(D),
        "weights": unit(B),
    },
    "sample_gaussian": of_latent,
    "sample_gaussian_with_kl": of_latent,
    "bernoulli_kl": lambda: {"logits_q": rand(B, D), "logits_p": rand(D), "weights": unit(B)},
    "categorical_kl": lambda: {"logits_q": rand(B, C), "logits_p": rand(B, C), "weights": unit(B)},
    "balanced_categorical_kl": lambda: {"posterior_logits": rand(B, 2, C), "prior_logits": rand(B, 2, C)},
    "total_correlation": lambda: {"z": rand(B, D), **of_latent(), "dataset_size": 100},
    "mmd": lambda: {"x": rand(B, D), "y": rand(K, D)},
    "bernoulli_log_prob": lambda: {"logits": rand(B, D), "x": unit(B, D)},
    "gaussian_log_prob": lambda: {"x": rand(B, D), **of_latent()},
    "laplace_log_prob": lambda: {"x": rand(B, D), "mean": rand(B, D), "log_scale": rand(B, D)},
    "discretized_logistic_log_prob": lambda: {"x": unit(B, D), "mean": rand(B, D), "log_scale": rand(B, D)},
    "negative_binomial_log_prob": lambda: {"x": unit(B, D).round(), "mu": unit(B, D), "theta": unit(D)},
    "zero_inflated_negative_binomial_log_prob": lambda: {
        "x": unit(B, D).round(),
        "mu": unit(B, D),
        "theta": unit(D),
        "gate_logits": rand(B, D),
    },
    "categorical_log_prob": lambda: {"logits": rand(B, C), "x": torch.arange(B) % C},
    "discretized_logistic_mixture_log_prob": lambda: {"params": rand(B, 2, 2, 10), "x": unit(B, 2, 2, 3)},
    "elbo_loss": lambda: {**of_bound(), "weights": unit(B)},
    "iwae_objective": lambda: {**of_bound(K), "z": rand(B, K, 2), "dim": 1},
    "adversary_activated_loss": lambda: {
        "per_example_loss_real": rand(20),
        "per_example_loss_fake": rand(20),
        "real_logits": rand(20),
        "fake_logits": rand(20),
    },
    "streaming_log_likelihood": lambda: {"log_w_chunks": [rand(B, K), rand(B, 2)], "dim": 1},
}

IMPORTANCE = [name for name in FUNCTIONS if "log_w" in RIGHT[name]() or name in ("rws_losses", "memorization_score")]
ADVERSARIAL = [
    "discriminator_loss",
    "generator_loss",
    "importance_weighted_generator_loss",
    "log_discriminator",
    "log_ratio",
    "density_ratio_kl",
    "density_ratio_js",
]


# ---- kinds that are made from the right call -------------------------------------------------------------------------


def tensor_arguments(name: str) -> dict[str, Tensor]:
    given = RIGHT[name]()
    given["log_w_chunks"] = given["log_w_chunks"][0] if "log_w_chunks" in given else None
    return {argument: x for argument, x in given.items() if isinstance(x, Tensor)}


def changed(argument: str, value: Any) -> dict[str, Any]:
    return {argument: [value] if argument == "log_w_chunks" and not isinstance(value, list) else value}


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


REPLACED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "NumPy": (lambda x: x.detach().numpy(), "ndarray"),
    "sparse": (lambda x: x.detach().to_sparse(), "sparse_coo"),
    "nested": (nested, "nested"),
    "float8": (lambda x: x.detach().float().to(torch.float8_e4m3fn), "float8"),
    "integer": (lambda x: x.detach().to(torch.int64), "int64"),
    "empty list": (lambda x: [], r"list|0 tensors|no chunks"),
    "wrong device": (lambda x: x.detach().to("meta"), "meta|no graph"),
    "NaN, checked": (lambda x: torch.full_like(x, float("nan"), requires_grad=x.requires_grad), "nan"),
}
LABELS = "labels may be integers"
# where the argument takes what the kind brings
TAKEN = {
    "integer": {
        ("log_discriminator", "y"): LABELS,
        ("log_ratio", "y"): LABELS,
        ("importance_weighted_generator_loss", "groups"): LABELS,
        ("categorical_log_prob", "x"): LABELS,
        ("gaussian_log_prob", "x"): "uint8 alone is an image for certain",
        ("laplace_log_prob", "x"): "uint8 alone is an image for certain",
        ("negative_binomial_log_prob", "x"): "counts are integers",
        ("zero_inflated_negative_binomial_log_prob", "x"): "counts are integers",
        **{(name, "weights"): "a mask may be integers" for name in FUNCTIONS},
    },
    "float8": {(name, "weights"): "a mask of any dtype is converted" for name in FUNCTIONS}
    | {("log_discriminator", "y"): "labels are converted", ("log_ratio", "y"): "labels are converted"},
    "NaN, checked": {
        ("importance_weighted_sum", "payload"): "a weight of 0 silences its payload",
        ("importance_weighted_generator_loss", "groups"): "integers",
        ("categorical_log_prob", "x"): "integers",
        ("r1_penalty", "logits"): "NaN logits of these inputs are made by the network",
        ("r1_penalty", "inputs"): "the logits are no longer computed from them",
    },
}


def replaced(name: str, kind: str) -> Cell:
    replace, message = REPLACED[kind]
    arguments = tensor_arguments(name)
    if kind == "wrong device" and len(arguments) == 1 and name != "streaming_log_likelihood":
        return "one tensor: there is no other device to be on"
    if kind == "wrong device" and name == "streaming_log_likelihood":
        return "chunks are moved one by one"
    reasons = TAKEN.get(kind, {})
    calls = []
    for argument, x in arguments.items():
        if (name, argument) not in reasons:
            words = message if kind == "wrong device" else rf"\b{argument}\b.*({message})"
            if kind == "NaN, checked" and argument == "y":
                words = "y: got nan"
            calls.append((changed(argument, replace(x)), words))
    return calls or reasons[name, next(iter(arguments))]


def choices(name: str) -> dict[str, str]:
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, str)}


def misspelt(name: str, kind: str) -> Cell:
    calls = [
        ({option: default + default[-1]}, f"{option}: got '{default}{default[-1]}', .*did you mean '{default}'")
        for option, default in choices(name).items()
    ]
    return calls or "no option with a name"


ALIASES = {
    "kind": ("lsgan", "least_squares"),
    "likelihood": ("zinb", "zero_inflated_negative_binomial"),
    "spread": ("sigma", "std"),
    "reduction": ("avg", "mean"),
    "kernel": ("gaussian", "rbf"),
}


def aliased(name: str, kind: str) -> Cell:
    calls = [
        ({option: ALIASES[option][0]}, f"{option}: got .*did you mean '{ALIASES[option][1]}'")
        for option in choices(name)
        if option in ALIASES
    ]
    return calls or "no option that the field names otherwise"


# ---- kinds that are written out --------------------------------------------------------------------------------------

GAUSSIAN_KLS = ("gaussian_kl", "sample_gaussian_with_kl")
ONE_TENSOR = "one tensor, and dim says which dimension is which"
ANY_SHAPE = "logits of any shape"
BESIDE = r"got shape .* beside"
RGB, GREY = (B, 3, 8, 8), (B, 1, 8, 8)


def with_shapes(first: tuple[int, ...], second: tuple[int, ...], **more: Any) -> dict[str, dict[str, Any]]:
    """Of the functions of an event: the first argument of one shape, and the others of another."""
    a, b = rand(*first), rand(*second)
    p, q = a.sigmoid(), b.sigmoid()
    return {
        "gaussian_kl": {"mean": a, "logvar": b, "weights": None},
        "sample_gaussian_with_kl": {"mean": a, "logvar": b},
        "gaussian_kl_monte_carlo": {
            "z": a,
            "mean": b,
            "logvar": b,
            "prior_mean": b,
            "prior_logvar": b,
            "weights": None,
        },
        "bernoulli_kl": {"logits_q": a, "logits_p": b, "weights": None},
        "bernoulli_log_prob": {"logits": b, "x": p},
        "gaussian_log_prob": {"x": a, "mean": b, "logvar": b},
        "laplace_log_prob": {"x": a, "mean": b, "log_scale": b},
        "discretized_logistic_log_prob": {"x": p, "mean": b, "log_scale": b},
        "negative_binomial_log_prob": {"x": p, "mu": q, "theta": q},
        "zero_inflated_negative_binomial_log_prob": {"x": p, "mu": q, "theta": q, "gate_logits": b},
    }


def of_events(message: str, first: tuple[int, ...], second: tuple[int, ...], **more: Any) -> dict[str, Cell]:
    return {name: [({**given, **more}, message)] for name, given in with_shapes(first, second).items()}


WRITTEN: dict[str, dict[str, Cell]] = {
    "[B] with [B, 1]": {
        **dict.fromkeys(IMPORTANCE, "one tensor"),
        **of_events(BESIDE, (B,), (B, 1)),
        "vimco_loss": [({"log_w": rand(B, 1), "log_q": rand(B), "dim": 0}, r"log_q: got shape \(4,\) beside")],
        "rws_losses": [({"log_p": rand(B, 1), "log_q": rand(B), "dim": 0}, r"log_q: got shape \(4,\) beside")],
        "trajectory_balance_loss": [({"log_z": rand(B, 1)}, r"log_w: got shape \(4,\) beside log_z \(4, 1\)")],
        "memorization_score": [({"log_px_out": rand(B, 1, K)}, r"log_px_out: got shape \(4, 1, 5\)")],
        "importance_weighted_sum": [({"log_w": rand(B), "payload": rand(B + 1, 1), "dim": 0}, "payload: got shape")],
        "dreg_loss": [({"z": rand(B, 1)}, r"z: got shape \(4, 1\)")],
        "discriminator_loss": [
            ({"real": rand(B), "fake": rand(B, 1), "reduction": "none"}, "expected equal shapes"),
            ({"real": rand(B), "fake": rand(B, 1), "kind": "relativistic"}, "expected equal shapes"),
        ],
        "generator_loss": [
            ({"real": rand(B), "fake": rand(B, 1), "kind": "relativistic"}, "expected equal shapes"),
        ],
        "importance_weighted_generator_loss": [
            ({"groups": torch.zeros(B * K, 1, dtype=torch.int64)}, r"groups: got shape \(20, 1\)")
        ],
        "log_discriminator": [({"logits": rand(B, 1), "y": torch.ones(B)}, r"y: got shape \(4,\) beside logits")],
        "log_ratio": [({"logits": rand(B, 1), "y": torch.ones(B)}, r"y: got shape \(4,\) beside logits")],
        "density_ratio_kl": "one tensor",
        "density_ratio_js": "each side is averaged by itself",
        "r1_penalty": "the logits are summed, of whatever shape",
        "gradient_penalty": [({"fake": rand(B, D, 1)}, "expected samples .* of one shape")],
        "sample_gaussian": [({"mean": rand(B), "logvar": rand(B, 1)}, BESIDE)],
        "categorical_kl": [({"logits_p": rand(B, 1, C), "weights": None}, BESIDE)],
        "balanced_categorical_kl": [({"prior_logits": rand(B, 1, 2, C)}, BESIDE)],
        "total_correlation": [({"mean": rand(B)}, r"mean: got shape \(4,\) beside z")],
        "mmd": [({"y": rand(K)}, r"expected \[N, D\] and \[M, D\]")],
        "categorical_log_prob": [({"logits": rand(B, 1, C)}, r"x: got shape \(4,\) beside logits")],
        "discretized_logistic_mixture_log_prob": [
            ({"params": rand(B, 1, 3), "x": unit(B, 1), "event_ndims": 1}, r"params: got shape .* beside x")
        ],
        "elbo_loss": [
            ({"decoder": rand(B, 1), "x": unit(B)}, r"x: got shape \(4,\) beside decoder's logits \(4, 1\)"),
            ({"decoder": rand(B, 1)}, r"x: got shape \(4, 6\) beside decoder's logits \(4, 1\)"),
            ({"decoder": rand(1, D)}, r"x: got shape \(4, 6\) beside decoder's logits \(1, 6\)"),
            ({"x": unit(1, D)}, r"x: got shape \(1, 6\)"),
            ({"mean": rand(1, 2)}, r"mean: got shape \(1, 2\), expected the decoder's rows \(4,\)"),
            ({"weights": unit(B, 1)}, r"weights: got shape \(4, 1\), expected that of the rows, \(4,\)"),
        ],
        "iwae_objective": [
            ({"decoder": rand(B, K, 1)}, r"x: got shape \(4, 6\) beside decoder's logits \(4, 5, 1\)"),
            ({"x": unit(1, D)}, r"x: got shape \(1, 6\)"),
            ({"mean": rand(1, 2)}, r"mean: got shape \(1, 2\) beside z"),
        ],
        "adversary_activated_loss": [({"per_example_loss_real": rand(20, 1)}, r"real_logits: got shape \(20,\)")],
        "streaming_log_likelihood": [({"log_w_chunks": [rand(B, K), rand(B, 1, K)]}, "got a chunk of rows")],
    },
    "[K, B] for [B, K]": {
        **dict.fromkeys(IMPORTANCE, ONE_TENSOR),
        **of_events(BESIDE, (B, K, D), (K, B, D), event_ndims=1),
        "vimco_loss": [({"log_q": rand(K, B)}, r"log_q: got shape \(5, 4\) beside log_w \(4, 5\)")],
        "rws_losses": [({"log_q": rand(K, B)}, r"log_q: got shape \(5, 4\) beside log_p \(4, 5\)")],
        "trajectory_balance_loss": [({"log_w": rand(B, K), "log_z": rand(K, B)}, "log_z: got shape")],
        "memorization_score": [({"log_px_out": rand(K, B)}, r"log_px_out: got shape \(5, 4\)")],
        "importance_weighted_sum": [({"payload": rand(K, B, 2)}, r"payload: got shape \(5, 4, 2\)")],
        "dreg_loss": [({"z": rand(K, B, 2)}, r"z: got shape \(5, 4, 2\)")],
        **dict.fromkeys(ADVERSARIAL, ANY_SHAPE),
        "discriminator_loss": [({"fake": rand(K, B), "reduction": "none"}, "expected equal shapes")],
        "generator_loss": [({"real": rand(B, K), "fake": rand(K, B), "kind": "relativistic"}, "expected equal shapes")],
        "log_discriminator": [({"y": torch.ones(K, B)}, r"y: got shape \(5, 4\) beside logits")],
        "log_ratio": [({"y": torch.ones(K, B)}, r"y: got shape \(5, 4\) beside logits")],
        "r1_penalty": "one tensor of samples",
        "gradient_penalty": [({"fake": rand(D, B)}, "expected samples .* of one shape")],
        "sample_gaussian": [({"logvar": rand(D, B)}, BESIDE)],
        "categorical_kl": [({"logits_q": rand(B, K, C), "logits_p": rand(K, B, C), "weights": None}, BESIDE)],
        "balanced_categorical_kl": [({"posterior_logits": rand(B, K, C), "prior_logits": rand(K, B, C)}, BESIDE)],
        "total_correlation": [({"mean": rand(D, B)}, r"mean: got shape \(6, 4\) beside z")],
        "mmd": [({"y": rand(D, K)}, r"expected \[N, D\] and \[M, D\]")],
        "categorical_log_prob": [
            ({"logits": rand(B, K, C), "x": torch.zeros(K, B, dtype=torch.int64)}, r"x: got shape \(5, 4\) beside")
        ],
        "discretized_logistic_mixture_log_prob": [({"x": unit(2, B, 2, 3)}, r"params: got shape .* beside x")],
        "elbo_loss": [({"decoder": rand(D, B)}, r"x: got shape \(4, 6\) beside decoder's logits")],
        "iwae_objective": [
            ({"decoder": rand(K, B, D)}, r"x: got shape \(4, 6\) beside decoder's logits \(5, 4, 6\)"),
            ({"z": rand(K, B, 2)}, r"z: got shape \(5, 4, 2\), expected the decoder's rows \(4, 5\)"),
        ],
        "adversary_activated_loss": [
            ({"per_example_loss_real": rand(B, K), "real_logits": rand(K, B)}, r"real_logits: got shape \(5, 4\)")
        ],
        "streaming_log_likelihood": [({"log_w_chunks": [rand(B, K), rand(K, B)]}, "got a chunk of rows")],
    },
    "images for vectors": {
        **dict.fromkeys(IMPORTANCE, "dimensions beside dim are rows"),
        **of_events(r"event_ndims=3: rows \[4\]; event_ndims=1: rows \[4, 3, 8\]", RGB, RGB),
        **dict.fromkeys(ADVERSARIAL, ANY_SHAPE),
        "r1_penalty": "samples of any shape",
        "gradient_penalty": "samples of any shape",
        "sample_gaussian": "elementwise",
        "categorical_kl": "event_ndims is 0 unless told",
        "categorical_log_prob": "event_ndims is 0 unless told",
        "balanced_categorical_kl": "event_ndims is 1 unless told",
        "discretized_logistic_mixture_log_prob": "takes images",
        "total_correlation": [({"z": rand(*RGB)}, r"got shape \(4, 3, 8, 8\), expected \[B, D\]")],
        "mmd": [({"x": rand(*RGB)}, r"expected \[N, D\] and \[M, D\]")],
        "elbo_loss": [
            (
                {"decoder": rand(*RGB), "x": unit(*RGB), "mean": rand(B, 3, 2, 2), "logvar": rand(B, 3, 2, 2)},
                r"event_ndims=3: rows \[4\]; event_ndims=2: rows \[4, 3\]",
            ),
            ({"decoder": rand(*RGB), "x": unit(*RGB), "event_ndims": 1}, "mean: got shape .*event_ndims"),
        ],
        "iwae_objective": [
            (
                {
                    "decoder": rand(B, K, 3, 8, 8),
                    "x": unit(*RGB),
                    "z": rand(B, K, 3, 2, 2),
                    "mean": rand(B, 3, 2, 2),
                    "logvar": rand(B, 3, 2, 2),
                },
                r"event_ndims=3: rows \[4\]; event_ndims=2: rows \[4, 3\]",
            ),
            ({"decoder": rand(B, K, *RGB[1:]), "x": unit(*RGB), "dim": -2}, "dim: got -2, .*from the front"),
        ],
        "adversary_activated_loss": [({"real_logits": rand(20, 1, 8, 8)}, "real_logits: got shape")],
        "streaming_log_likelihood": "dimensions beside dim are rows",
    },
    "vectors for images": {
        **dict.fromkeys(IMPORTANCE, "takes log-weights"),
        **of_events("event_ndims: got 3, expected 0 to 2", (B, D), (B, D), event_ndims=3),
        **dict.fromkeys(ADVERSARIAL, ANY_SHAPE),
        "r1_penalty": "samples of any shape",
        "gradient_penalty": "samples of any shape",
        "sample_gaussian": "elementwise",
        "categorical_kl": [({"event_ndims": 3}, "event_ndims: got 3, expected 0 to 1")],
        "categorical_log_prob": [({"event_ndims": 3}, "event_ndims: got 3, expected 0 to 1")],
        "balanced_categorical_kl": [({"event_ndims": 3}, "event_ndims: got 3, expected 0 to 2")],
        "discretized_logistic_mixture_log_prob": [
            ({"params": rand(B, 10), "x": unit(B, 3)}, "event_ndims: got 3, expected 0 to 2")
        ],
        "total_correlation": "takes vectors",
        "mmd": "takes vectors",
        "elbo_loss": [({"event_ndims": 3}, "event_ndims: got 3, expected 0 to 2")],
        "iwae_objective": [({"event_ndims": 3}, "event_ndims: got 3, expected 0 to 2")],
        "adversary_activated_loss": "takes one number for each example",
        "streaming_log_likelihood": "takes log-weights",
    },
    "one channel for three": {
        **dict.fromkeys(IMPORTANCE, "takes log-weights"),
        **of_events("an event is not broadcast", RGB, GREY, event_ndims=3),
        **dict.fromkeys(ADVERSARIAL, ANY_SHAPE),
        "r1_penalty": "one tensor of samples",
        "gradient_penalty": [({"real": rand(*RGB), "fake": rand(*GREY)}, "expected samples .* of one shape")],
        "sample_gaussian": "a spread of size 1 is the same for all, as its caller wrote",
        "categorical_kl": [({"logits_p": rand(B, 1), "weights": None}, "3 classes in dimension 1")],
        "balanced_categorical_kl": [
            ({"prior_logits": rand(B, 2, 1)}, "3 classes in dimension 2"),
            ({"prior_logits": rand(B, 1, C)}, "an event is not broadcast"),
        ],
        "categorical_log_prob": [
            (
                {"logits": rand(B, 1, C), "x": torch.zeros(B, 3, dtype=torch.int64), "event_ndims": 1},
                "an event is not broadcast",
            )
        ],
        "discretized_logistic_mixture_log_prob": [({"params": rand(B, 2, 2, 3)}, "expected a multiple of 10")],
        "total_correlation": [({"mean": rand(B, 1)}, "an event is not broadcast")],
        "mmd": [({"y": rand(K, 1)}, r"expected \[N, D\] and \[M, D\]")],
        "elbo_loss": [
            ({"decoder": rand(*GREY), "x": unit(*RGB)}, r"x: got shape \(4, 3, 8, 8\) beside decoder's logits"),
            ({"decoder": rand(*RGB), "x": unit(*GREY)}, r"x: got shape \(4, 1, 8, 8\) beside decoder's logits"),
            (
                {"decoder": (rand(*RGB), rand(*GREY)), "x": unit(*RGB), "likelihood": "gaussian"},
                "decoder's logvar: .*an event is not broadcast",
            ),
        ],
        "iwae_objective": [({"decoder": rand(B, K, 1, 8, 8), "x": unit(*RGB)}, r"x: got shape \(4, 3, 8, 8\) beside")],
        "adversary_activated_loss": "takes one number for each example",
        "streaming_log_likelihood": "takes log-weights",
    },
}

NEGATIVE = {"spread": "std", "logvar": -torch.ones(B, D)}
PIXELS = torch.full((B, D), 200.0)
NO_LOGITS = "takes no logits"
AS_WEIGHTS = "log_w: got numbers in .* that sum to 1"
OPEN = "every number has a meaning"
INFINITE = "log_w: got inf"
AS_PROBABILITIES = r"all lie in \[0, 1\], as probabilities do"
SOFTMAX = "sum to 1, as probabilities do"


def softmax(*shape: int) -> Tensor:
    return rand(*shape).softmax(-1)


CHECKED: dict[str, dict[str, Cell]] = {
    "probabilities for logits, checked": {
        **{name: [({"log_w": softmax(B, K)}, AS_WEIGHTS)] for name in IMPORTANCE},
        **{name: [({"log_w": rand(B, K, 3).softmax(1)}, AS_WEIGHTS)] for name in ("miwae_loss", "piwae_losses")},
        "rws_losses": [({"log_p": softmax(B, K)}, AS_WEIGHTS.replace("_w", "_p"))],
        "trajectory_balance_loss": "sums to nothing known",
        "memorization_score": "densities sum to nothing known",
        **{name: [({"logits": unit(B, K)}, AS_PROBABILITIES)] for name in ADVERSARIAL},
        **{
            name: [({"real": unit(B, K)}, "real: .*" + AS_PROBABILITIES)]
            for name in ("discriminator_loss", "density_ratio_js")
        },
        "generator_loss": [
            ({"fake": unit(B, K)}, "fake: .*" + AS_PROBABILITIES),
            ({"fake": [rand(B, K), unit(B, K)]}, r"fake\[1\]: .*" + AS_PROBABILITIES),
        ],
        "importance_weighted_generator_loss": [({"fake": unit(B * K)}, AS_PROBABILITIES)],
        **dict.fromkeys(
            (
                "r1_penalty",
                "gradient_penalty",
                "gaussian_kl",
                "gaussian_kl_monte_carlo",
                "sample_gaussian",
                "sample_gaussian_with_kl",
                "total_correlation",
                "mmd",
                "gaussian_log_prob",
                "laplace_log_prob",
                "discretized_logistic_log_prob",
                "negative_binomial_log_prob",
                "discretized_logistic_mixture_log_prob",
            ),
            NO_LOGITS,
        ),
        "bernoulli_kl": [({"logits_q": unit(B, D)}, "logits_q: .*" + AS_PROBABILITIES)],
        "categorical_kl": [({"logits_q": softmax(B, C)}, "logits_q: .*" + SOFTMAX)],
        "balanced_categorical_kl": [({"prior_logits": softmax(B, 2, C)}, "prior_logits: .*" + SOFTMAX)],
        "bernoulli_log_prob": [({"logits": unit(B, D)}, AS_PROBABILITIES)],
        "zero_inflated_negative_binomial_log_prob": [({"gate_logits": unit(B, D)}, AS_PROBABILITIES)],
        "categorical_log_prob": [({"logits": softmax(B, C)}, SOFTMAX)],
        "elbo_loss": [
            ({"decoder": unit(B, D)}, AS_PROBABILITIES),
            ({"decoder": softmax(B, D, C), "x": torch.ones(B, D).long(), "likelihood": "categorical"}, SOFTMAX),
        ],
        "iwae_objective": [({"decoder": unit(B, K, D)}, AS_PROBABILITIES)],
        "adversary_activated_loss": [({"fake_logits": unit(20)}, "fake_logits: .*" + AS_PROBABILITIES)],
        "streaming_log_likelihood": [({"log_w_chunks": [softmax(B, K)]}, "log_w_chunks: .* sum to 1")],
    },
    "outside the support, checked": {
        **{name: [({"log_w": torch.full((B, K), torch.inf)}, INFINITE)] for name in IMPORTANCE},
        **{name: [({"log_w": torch.full((B, K, 3), torch.inf)}, INFINITE)] for name in ("miwae_loss", "piwae_losses")},
        "rws_losses": [({"log_q": torch.full((B, K), torch.inf)}, "log_q: got inf")],
        "trajectory_balance_loss": [({"log_w": torch.full((B,), torch.inf)}, INFINITE)],
        "memorization_score": [({"log_px_in": torch.full((B, K), torch.inf)}, "log_px_in: got inf")],
        **dict.fromkeys((*ADVERSARIAL, "r1_penalty", "gradient_penalty"), OPEN),
        "log_discriminator": [({"y": torch.full((B, 1), 2)}, r"y: got 2 .* labels in \[0, 1\]")],
        "log_ratio": [({"y": torch.full((B, 1), -1.0)}, r"y: got -1 .* labels in \[0, 1\]")],
        **{name: [(NEGATIVE, "logvar: got -1 .* positive standard")] for name in (*GAUSSIAN_KLS, "sample_gaussian")},
        "gaussian_kl_monte_carlo": [(NEGATIVE, "logvar: got -1 .* positive standard")],
        "gaussian_log_prob": [(NEGATIVE, "logvar: got -1 .* positive standard")],
        **dict.fromkeys(
            ("bernoulli_kl", "categorical_kl", "balanced_categorical_kl", "total_correlation", "mmd"), OPEN
        ),
        "bernoulli_log_prob": [
            ({"x": PIXELS}, r"x: got 200 .*\[0, 1\]"),
            ({"x": PIXELS.byte()}, r"x: got torch.uint8 .*x / 255"),
        ],
        "laplace_log_prob": [({"x": PIXELS.byte()}, "x: got torch.uint8"), ({"x": PIXELS * torch.inf}, "x: got inf")],
        "discretized_logistic_log_prob": [
            ({"x": PIXELS}, r"x: got 200 .*\[-1, 1\]"),
            ({"x": PIXELS.byte()}, "x: got torch.uint8"),
        ],
        "negative_binomial_log_prob": [
            ({"x": -PIXELS}, "x: got -200 .* counts"),
            ({"theta": -unit(D)}, "theta: got -.*positive inverse dispersions"),
        ],
        "zero_inflated_negative_binomial_log_prob": [({"mu": -unit(B, D)}, "mu: got -.* >= 0")],
        "categorical_log_prob": [({"x": torch.full((B,), 99)}, "x: got 99 .* classes from 0 to 2")],
        "discretized_logistic_mixture_log_prob": [({"x": 200 * unit(B, 2, 2, 3)}, r"x: got .*\[-1, 1\]")],
        "elbo_loss": [
            ({"x": -unit(B, D)}, r"x: got -.*\[0, 1\]"),
            ({"x": PIXELS.byte()}, "x: got torch.uint8"),
            ({"spread": "std", "logvar": -torch.ones(B, 2)}, "logvar: got -1 .* positive standard"),
            ({"x": torch.full((B,), 99), "decoder": rand(B, C), "likelihood": "categorical"}, "x: got 99"),
        ],
        "iwae_objective": [
            ({"x": -unit(B, D)}, r"x: got -.*\[0, 1\]"),
            ({"spread": "std", "logvar": -torch.ones(B, 2)}, "logvar: got -1 .* positive standard"),
        ],
        "adversary_activated_loss": OPEN,
        "streaming_log_likelihood": [({"log_w_chunks": [torch.full((B, K), torch.inf)]}, "log_w_chunks: got inf")],
    },
}

KINDS: dict[str, Callable[[str, str], Cell]] = {
    **dict.fromkeys(REPLACED, replaced),
    "misspelt option": misspelt,
    "the field's name": aliased,
    **dict.fromkeys((*WRITTEN, *CHECKED), lambda name, kind: (WRITTEN | CHECKED)[kind][name]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_right_call(name: str) -> None:
    """What the table changes one thing of is right, checked or not."""
    with uf.checked():
        FUNCTIONS[name](**RIGHT[name]())
    FUNCTIONS[name](**RIGHT[name]())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_call(name: str, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        cell = KINDS[kind](name, kind)
        if isinstance(cell, str):
            assert cell, "a cell without a reason"
            return
        assert cell
        for wrong, message in cell:
            given = {**RIGHT[name](), **wrong}
            with pytest.raises((TypeError, ValueError)) as raised:
                if kind.endswith("checked"):
                    with uf.checked():
                        FUNCTIONS[name](**given)
                else:
                    FUNCTIONS[name](**given)
            assert re.search(message, str(raised.value), re.DOTALL), f"{message!r} is not in {raised.value}"


def test_the_table_is_whole() -> None:
    """Ten kinds and more of each function, and messages rather than reasons in most cells."""
    assert set(RIGHT) == set(FUNCTIONS) and len(KINDS) >= 10
    for table in (WRITTEN, CHECKED):
        for kind, cells in table.items():
            assert set(cells) == set(FUNCTIONS), kind


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uf.gaussian_kl(rand(B, D), rand(B, D), clamp_logvar=10), "clamp_logvar: got 10, .* pair"),
        (
            lambda: uf.mmd(rand(B, D), rand(B, D), scales=1.0),
            r"scales: got 1.0, expected a sequence of numbers, \[1.0\]",
        ),
        (lambda: uf.mmd(rand(B, D), rand(B, D), scales=[]), "scales: got 0 of them"),
        (
            lambda: uf.elbo_loss(**of_bound(), likelihood="gaussian", likelihood_options={"variance": 1}),
            "likelihood_options: got 'variance' for likelihood 'gaussian', expected one of 'spread', 'clamp_logvar'",
        ),
        (
            lambda: uf.elbo_loss(
                **{**of_bound(), "decoder": [rand(B, D)] * 2},
                likelihood="discretized_logistic",
                likelihood_options={"bin_widht": 1},
            ),
            "likelihood_options: got 'bin_widht' .*did you mean 'bin_width'",
        ),
        (lambda: uf.elbo_loss(**{**of_bound(), "decoder": []}), "decoder: got 0 tensors, expected logits"),
        (lambda: uf.elbo_loss(**of_bound(), likelihood="mse"), "did you mean 'gaussian'"),
        (lambda: uf.elbo_loss(**of_bound(), likelihood="BCE"), "did you mean 'bernoulli'"),
        (lambda: uf.discriminator_loss(real=rand(B), fake=rand(B), kind="vanilla"), "did you mean 'logistic'"),
        (lambda: uf.discriminator_loss(real=rand(B), fake=rand(B), kind="non_saturating"), "did you mean 'logistic'"),
        (lambda: uf.generator_loss(fake=rand(B), kind="wgan-gp"), "did you mean 'wasserstein'"),
        (lambda: uf.generator_loss(fake=rand(B), kind=None), "kind: got None, expected one of"),
        (lambda: uf.log_discriminator(rand(B), "real"), "y: expected 0, 1 or a torch.Tensor of labels, got str"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_messages_beside_the_table(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_latent_of_four_dimensions_is_summed_as_it_is_told() -> None:
    """LDM's number, and the message that names the argument where it is missing."""
    mean, logvar = rand(4, 4, 32, 32), rand(4, 4, 32, 32)
    expected = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=[1, 2, 3]).mean()
    torch.testing.assert_close(uf.gaussian_kl(mean, logvar, event_ndims=3), expected)
    with pytest.raises(ValueError, match=r"event_ndims=3: rows \[4\]; event_ndims=1: rows \[4, 4, 32\]"):
        uf.gaussian_kl(mean, logvar)
    one = rand(4, 1, 32)
    rows = uf.gaussian_kl(rand(4, 5, 32), one, reduction="none")  # the broadcast dimension is a row
    assert rows.shape == (4, 5)


@pytest.mark.parametrize("name", ["gaussian_kl", "elbo_loss", "categorical_kl", "mixture"])
def test_shapes_are_read_in_a_compiled_graph(name: str) -> None:
    """Without a break and, of sizes that change, without a graph for each."""
    calls: dict[str, Callable[[int, int], tuple[Callable[..., Tensor], tuple[Tensor, ...]]]] = {
        "gaussian_kl": lambda b, n: (uf.gaussian_kl, (rand(b, 7, n), rand(b, 1, n), rand(n))),
        "elbo_loss": lambda b, n: (
            lambda *t: uf.elbo_loss(*t).loss,
            (rand(b, 2, n, 8), unit(b, 2, n, 8), rand(b, 3), rand(b, 3)),
        ),
        "categorical_kl": lambda b, n: (uf.categorical_kl, (rand(b, n), rand(n))),
        "mixture": lambda b, n: (
            lambda p, x: uf.discretized_logistic_mixture_log_prob(p, x, event_ndims=1),
            (rand(b, n, 9), unit(b, 1, 1)),
        ),
    }
    graphs = 0

    def counted(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: calls[name](2, 2)[0](*t), fullgraph=True, dynamic=True, backend=counted)
    for b, n in ((4, 5), (6, 9), (3, 11)):
        call, given = calls[name](b, n)
        torch.testing.assert_close(compiled(*given), call(*given))
    assert graphs == 1


def test_values_are_looked_at_on_request_alone() -> None:
    wrong = {**of_latent(), "spread": "std"}
    wrong["logvar"] = -torch.ones(B, D)
    compiled = torch.compile(lambda: uf.gaussian_kl(**wrong), backend="eager")
    uf.gaussian_kl(**wrong)
    with uf.checked():
        with uf.checked(), pytest.raises(ValueError, match="positive standard deviations"):
            uf.gaussian_kl(**wrong)
        with pytest.raises(ValueError, match="positive standard deviations"):
            uf.gaussian_kl(**wrong)
        torch.func.vmap(lambda m, v: uf.gaussian_kl(m, v, spread="std"))(wrong["mean"], wrong["logvar"])
        compiled()
    uf.gaussian_kl(**wrong)


def test_rows_of_weight_0_are_not_looked_at() -> None:
    given = of_latent()
    given["mean"][1] = torch.nan
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    with uf.checked():
        uf.gaussian_kl(**given, weights=weights)
        with pytest.raises(ValueError, match="mean: got nan"):
            uf.gaussian_kl(**given, weights=1 - weights)
