"""The modules: one for each function, with all its options."""

import inspect
from typing import Any

import pytest
import torch
from helpers import as_tuple, assert_same_bits
from torch import Tensor, nn

import unigen_fast as uf

FUNCTION_OF: dict[type[nn.Module], Any] = {
    uf.nn.LogMeanExp: uf.log_mean_exp,
    uf.nn.ImportanceWeights: uf.importance_weights,
    uf.nn.EffectiveSampleSize: uf.effective_sample_size,
    uf.nn.IWAELoss: uf.iwae_loss,
    uf.nn.WeightDiagnostics: uf.weight_diagnostics,
    uf.nn.ImportanceWeightedSum: uf.importance_weighted_sum,
    uf.nn.MIWAELoss: uf.miwae_loss,
    uf.nn.PIWAELosses: uf.piwae_losses,
    uf.nn.CIWAELoss: uf.ciwae_loss,
    uf.nn.RenyiLoss: uf.renyi_loss,
    uf.nn.CUBOLoss: uf.cubo_loss,
    uf.nn.TVOLoss: uf.tvo_loss,
    uf.nn.VIMCOLoss: uf.vimco_loss,
    uf.nn.RWSLosses: uf.rws_losses,
    uf.nn.DReGLoss: uf.dreg_loss,
    uf.nn.LogVarianceLoss: uf.log_variance_loss,
    uf.nn.TrajectoryBalanceLoss: uf.trajectory_balance_loss,
    uf.nn.MemorizationScore: uf.memorization_score,
    uf.nn.DiscriminatorLoss: uf.discriminator_loss,
    uf.nn.GeneratorLoss: uf.generator_loss,
    uf.nn.ImportanceWeightedGeneratorLoss: uf.importance_weighted_generator_loss,
    uf.nn.LogDiscriminator: uf.log_discriminator,
    uf.nn.LogRatio: uf.log_ratio,
    uf.nn.DensityRatioKL: uf.density_ratio_kl,
    uf.nn.DensityRatioJS: uf.density_ratio_js,
    uf.nn.R1Penalty: uf.r1_penalty,
    uf.nn.GradientPenalty: uf.gradient_penalty,
    uf.nn.GaussianKL: uf.gaussian_kl,
    uf.nn.SampleGaussian: uf.sample_gaussian,
    uf.nn.SampleGaussianWithKL: uf.sample_gaussian_with_kl,
    uf.nn.TotalCorrelation: uf.total_correlation,
    uf.nn.MMD: uf.mmd,
    uf.nn.BernoulliLogProb: uf.bernoulli_log_prob,
    uf.nn.CategoricalKL: uf.categorical_kl,
    uf.nn.BalancedCategoricalKL: uf.balanced_categorical_kl,
    uf.nn.CategoricalLogProb: uf.categorical_log_prob,
    uf.nn.DiscretizedLogisticMixtureLogProb: uf.discretized_logistic_mixture_log_prob,
    uf.nn.GaussianKLMonteCarlo: uf.gaussian_kl_monte_carlo,
    uf.nn.BernoulliKL: uf.bernoulli_kl,
    uf.nn.BernoulliLogProb: uf.bernoulli_log_prob,
    uf.nn.GaussianLogProb: uf.gaussian_log_prob,
    uf.nn.LaplaceLogProb: uf.laplace_log_prob,
    uf.nn.DiscretizedLogisticLogProb: uf.discretized_logistic_log_prob,
    uf.nn.NegativeBinomialLogProb: uf.negative_binomial_log_prob,
    uf.nn.ZeroInflatedNegativeBinomialLogProb: uf.zero_inflated_negative_binomial_log_prob,
    uf.nn.ELBOLoss: uf.elbo_loss,
    uf.nn.IWAEObjective: uf.iwae_objective,
    uf.nn.AdversaryActivatedLoss: uf.adversary_activated_loss,
    uf.nn.StreamingLogLikelihood: uf.streaming_log_likelihood,
}
MODULES = list(FUNCTION_OF)

X = torch.linspace(-2, 3, 24).reshape(6, 4)
M, V = X, X.flip(0) / 2
# (module, options other than the defaults, positional arguments, keyword arguments of the call)
CALLS: list[tuple[type[nn.Module], dict[str, Any], tuple, dict[str, Any]]] = [
    (uf.nn.LogMeanExp, {"dim": 1}, (X,), {}),
    (uf.nn.ImportanceWeights, {"dim": 0, "temperature": 2.0, "detach": False}, (X,), {}),
    (uf.nn.EffectiveSampleSize, {"dim": -1}, (X,), {}),
    (uf.nn.IWAELoss, {"dim": 1, "reduction": "none", "value": "surrogate"}, (X,), {}),
    (uf.nn.WeightDiagnostics, {"dim": 0}, (X,), {}),
    (uf.nn.ImportanceWeightedSum, {"dim": 1, "temperature": 2.0, "detach": False}, (X, V), {}),
    (uf.nn.MIWAELoss, {"sample_dim": 2, "group_dim": 1, "reduction": "sum"}, (X.reshape(2, 3, 4),), {}),
    (uf.nn.PIWAELosses, {"sample_dim": 2, "group_dim": 1, "reduction": "none"}, (X.reshape(2, 3, 4),), {}),
    (uf.nn.CIWAELoss, {"dim": 1, "beta": 0.3, "reduction": "sum"}, (X,), {}),
    (uf.nn.RenyiLoss, {"dim": 1, "alpha": 0.5, "reduction": "none"}, (X,), {}),
    (uf.nn.CUBOLoss, {"dim": 1, "order": 3.0, "reduction": "sum"}, (X,), {}),
    (uf.nn.TVOLoss, {"dim": 1, "partition": [0.0, 0.3, 1.0], "reduction": "sum"}, (X,), {}),
    (uf.nn.VIMCOLoss, {"dim": 1, "reduction": "sum"}, (X, V), {}),
    (uf.nn.RWSLosses, {"dim": 1, "reduction": "none"}, (X, V), {}),
    (uf.nn.DReGLoss, {"dim": 1, "reduction": "sum"}, (X, V), {}),
    (uf.nn.LogVarianceLoss, {"dim": 1, "reduction": "sum"}, (X,), {}),
    (uf.nn.TrajectoryBalanceLoss, {"reduction": "none"}, (X, V[:1]), {}),
    (uf.nn.MemorizationScore, {"dim": 0}, (X, V[:4]), {}),
    (
        uf.nn.DiscriminatorLoss,
        {"kind": "hinge", "reduction": "sum", "scale": 0.5, "return_stats": True},
        (),
        {"real": X, "fake": V},
    ),
    (uf.nn.GeneratorLoss, {"kind": "saturating", "reduction": "none", "scale": 2.0}, (), {"fake": X}),
    (
        uf.nn.ImportanceWeightedGeneratorLoss,
        {"dim": 1, "temperature": 0.5, "detach": False, "reduction": "sum"},
        (),
        {"fake": X},
    ),
    (uf.nn.ImportanceWeightedGeneratorLoss, {}, (), {"fake": X, "groups": torch.arange(24) % 5}),
    (uf.nn.LogDiscriminator, {"reversed": True}, (X, 1), {}),
    (uf.nn.LogRatio, {"reversed": True}, (X,), {"y": (0, 2)}),
    (uf.nn.DensityRatioKL, {"reduction": "sum"}, (X,), {}),
    (uf.nn.DensityRatioJS, {}, (), {"real": X, "fake": V}),
    (uf.nn.R1Penalty, {"gamma": 3.0, "reduction": "none"}, (), {"inputs": X, "logits": None}),
    (
        uf.nn.GradientPenalty,
        {"weight": 3.0, "target": 0.5, "reduction": "sum"},
        (),
        {"discriminator": torch.sin, "real": X, "fake": V},
    ),
    (
        uf.nn.GaussianKL,
        {
            "event_ndims": 2,
            "spread": "logstd",
            "free_bits": 0.1,
            "free_bits_mode": "per_dim",
            "clamp_logvar": (-1.0, 1.0),
            "normalize_weights": True,
            "scale": 0.3,
            "reduction": "none",
        },
        tuple(t.reshape(2, 3, 4) for t in (M, V, 0.9 * M, 0.9 * V)),
        {"weights": torch.tensor([0.5])},
    ),
    (
        uf.nn.SampleGaussian,
        {"num_samples": 3, "sample_dim": -1, "spread": "logstd", "clamp_logvar": (-1.0, 1.0)},
        (M, V),
        {},
    ),
    (
        uf.nn.SampleGaussianWithKL,
        {"event_ndims": 2, "num_samples": 2, "sample_dim": 1, "spread": "logstd", "clamp_logvar": (-1.0, 1.0)},
        (M, V),
        {},
    ),
    (uf.nn.TotalCorrelation, {"dataset_size": 100, "estimator": "mws"}, (M.sin(), M, V), {}),
    (uf.nn.MMD, {"kernel": "rbf", "scales": (0.5, 1.5), "unbiased": False}, (X, V), {}),
    (uf.nn.BernoulliLogProb, {"event_ndims": 2}, (X, X.sigmoid()), {}),
    (
        uf.nn.CategoricalKL,
        {
            "class_dim": 1,
            "event_ndims": 1,
            "unimix": 0.1,
            "normalize_weights": True,
            "scale": 0.3,
            "reduction": "none",
        },
        (X.reshape(3, 4, 2), V.reshape(3, 4, 2)),
        {"weights": torch.tensor([0.5])},
    ),
    (
        uf.nn.BalancedCategoricalKL,
        {
            "event_ndims": 2,
            "free_nats": 0.1,
            "free_nats_mode": "per_variable",
            "unimix": 0.1,
            "dynamics_scale": 0.8,
            "representation_scale": 0.2,
        },
        (X.reshape(2, 3, 4) * torch.arange(6).reshape(2, 3, 1), V.reshape(2, 3, 4)),
        {},
    ),
    (uf.nn.CategoricalLogProb, {"class_dim": 0, "event_ndims": 1}, (X.reshape(6, 2, 2), torch.tensor([[0, 3]])), {}),
    (
        uf.nn.DiscretizedLogisticMixtureLogProb,
        {"event_ndims": 2},
        (X.reshape(2, 1, 2, 6), torch.tensor([[-1.0], [0.2]]).expand(2, 1, 2, 1)),
        {},
    ),
    (
        uf.nn.GaussianKLMonteCarlo,
        {
            "event_ndims": 2,
            "spread": "logstd",
            "clamp_logvar": (-1.0, 1.0),
            "normalize_weights": True,
            "scale": 0.3,
            "reduction": "none",
        },
        tuple(t if t is None else t.reshape(2, 3, 4) for t in (M, None, V, 0.9 * M, 0.9 * V)),
        {"weights": torch.tensor([0.5])},
    ),
    (
        uf.nn.BernoulliKL,
        {"event_ndims": 2, "normalize_weights": True, "scale": 0.3, "reduction": "none"},
        (M.reshape(2, 3, 4), V.reshape(2, 3, 4)),
        {"weights": torch.tensor([0.5])},
    ),
    (uf.nn.BernoulliLogProb, {"event_ndims": 2}, (X, X.sigmoid()), {}),
    (uf.nn.GaussianLogProb, {"event_ndims": 2, "spread": "logstd", "clamp_logvar": (-1.0, 1.0)}, (X, M, V), {}),
    (uf.nn.LaplaceLogProb, {"event_ndims": 2}, (X, M.flip(0), V), {}),
    (
        uf.nn.DiscretizedLogisticLogProb,
        {"event_ndims": 2, "bin_width": 0.5, "low": -1.5, "high": 2.0},
        (X, M.flip(0), V),
        {},
    ),
    (uf.nn.NegativeBinomialLogProb, {"event_ndims": 2, "eps": 0.1}, (X.round().relu(), M.exp(), V.exp()), {}),
    (
        uf.nn.ZeroInflatedNegativeBinomialLogProb,
        {"event_ndims": 2, "eps": 0.1},
        (X.round().relu(), M.exp(), V.exp(), X),
        {},
    ),
    (
        uf.nn.ELBOLoss,
        {
            "likelihood": "discretized_logistic",
            "likelihood_options": {"bin_width": 0.5},
            "event_ndims": 1,
            "kl_weight": 0.5,
            "spread": "logstd",
            "clamp_logvar": (-1.0, 1.0),
            "normalize_weights": True,
            "scale": 0.3,
            "reduction": "none",
        },
        ([X.reshape(3, 2, 4), V.reshape(3, 2, 4)], X.reshape(3, 2, 4).sin(), *(t.reshape(3, 2, 4) for t in (X, V))),
        {"prior_mean": V[0], "prior_logvar": V[1], "weights": torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 1.0]])},
    ),
    *(
        (
            uf.nn.IWAEObjective,
            {
                "dim": 1,
                "likelihood": "gaussian",
                "likelihood_options": {"spread": "std"},
                "event_ndims": 0,
                "spread": "logstd",
                "clamp_logvar": (-1.0, 1.0),
                "scale": 0.3,
                "reduction": "none",
                **estimator,
            },
            (
                [X.reshape(2, 3, 4), V.exp().reshape(2, 3, 4)],
                *(X[::3], X.reshape(2, 3, 4, 1), *(t[:2].unsqueeze(-1) for t in (X, V))),
            ),
            {"prior_mean": V[2:4].unsqueeze(-1), "prior_logvar": V[4:].unsqueeze(-1)},
        )
        for estimator in (
            {"estimator": "miwae", "num_groups": 3},
            {"estimator": "ciwae", "beta": 0.3},
            {"estimator": "renyi", "alpha": 0.5},
            {"estimator": "cubo", "order": 3.0},
            {"estimator": "tvo", "partition": [0.0, 0.2, 1.0]},
        )
    ),
    (uf.nn.AdversaryActivatedLoss, {"reduction": "sum"}, (X, V), {"real_logits": V, "fake_logits": X}),
    (uf.nn.StreamingLogLikelihood, {"dim": 1}, ([X, V],), {}),
]
each_call = pytest.mark.parametrize(
    ("module", "options", "args", "kwargs"), CALLS, ids=lambda x: x.__name__ if isinstance(x, type) else ""
)
# what a module is given at its call, although it is no tensor of the function's own
AT_CALL = {
    "prior_mean",
    "prior_logvar",
    "real_logits",
    "fake_logits",
    "real",
    "fake",
    "groups",
    "y",
    "weights",
    "generator",
    "logits",
    "inputs",
    "discriminator",
    "log_q",
    "included",
}


def tensors_of(function: Any) -> set[str]:
    """Positional parameters are tensors; so are the keyword-only ones named above."""
    parameters = inspect.signature(function).parameters
    return {n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD} | (AT_CALL & set(parameters))


def connected(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Logits that hang on the inputs, where a penalty asks for both."""
    if "inputs" not in kwargs:
        return kwargs
    inputs = kwargs["inputs"].detach().requires_grad_()
    return {"inputs": inputs, "logits": inputs.pow(3).sum(1)}


def moved(x: Any, device: torch.device) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x


def test_every_function_has_a_module() -> None:
    functions = {
        getattr(uf, n) for n in uf.__all__ if inspect.isfunction(getattr(uf, n)) and n not in ("info", "checked")
    }
    assert functions == set(FUNCTION_OF.values())
    modules = {
        c for c in vars(uf.nn).values() if inspect.isclass(c) and issubclass(c, nn.Module) and c.__name__[0] != "_"
    }
    assert modules == set(MODULES)
    assert {call[0] for call in CALLS} == modules


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_signatures_are_complete(module: type[nn.Module]) -> None:
    """Options at construction, tensors at the call, with the function's defaults and order, and none missing."""
    function = FUNCTION_OF[module]
    parameters = inspect.signature(function).parameters
    at_call = tensors_of(function)
    options = {n: p.default for n, p in parameters.items() if n not in at_call}
    constructor = inspect.signature(module).parameters
    assert {n: p.default for n, p in constructor.items()} == options
    assert all(p.kind is p.KEYWORD_ONLY for p in constructor.values())
    forward = dict(list(inspect.signature(module.forward).parameters.items())[1:])
    assert {n: (p.default, p.kind) for n, p in forward.items()} == {
        n: (p.default, p.kind) for n, p in parameters.items() if n in at_call
    }


@each_call
def test_module_equals_its_function(module, options, args, kwargs, device: torch.device) -> None:
    args = tuple(moved(x, device) for x in args)
    kwargs = connected({n: moved(x, device) for n, x in kwargs.items()})
    torch.manual_seed(0)
    got = module(**options)(*args, **kwargs)
    torch.manual_seed(0)
    expected = FUNCTION_OF[module](*args, **kwargs, **options)
    assert type(got) is type(expected)
    for a, b in zip(as_tuple(got), as_tuple(expected), strict=True):
        assert_same_bits(a, b)


@each_call
def test_every_option_is_passed_on(module, options, args, kwargs) -> None:
    """Each option of the table, taken out, changes the result or is missed: none is dropped on the way."""

    def run(chosen: dict[str, Any]) -> list[Tensor]:
        tensors = [x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        given = {
            n: x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
            for n, x in kwargs.items()
        }
        given = connected(given)
        torch.manual_seed(0)
        outputs = as_tuple(module(**chosen)(*tensors, **given))
        inputs = [x for x in (*tensors, *given.values()) if isinstance(x, Tensor) and x.requires_grad and x.is_leaf]
        total = sum(o.sum() for o in outputs if o.requires_grad)
        gradients = torch.autograd.grad(total, inputs, materialize_grads=True) if isinstance(total, Tensor) else ()
        return [*outputs, *gradients]

    full = run(options)
    for name in options:
        if inspect.signature(module).parameters[name].default is inspect.Parameter.empty:
            continue  # no default to fall back to
        try:
            without = run({n: v for n, v in options.items() if n != name})
        except (TypeError, ValueError):  # the others make no sense without it
            continue
        same = len(full) == len(without) and all(
            a.shape == b.shape and a.requires_grad == b.requires_grad and torch.equal(a, b)
            for a, b in zip(full, without, strict=True)
        )
        assert not same, name


@each_call
def test_repr_shows_every_option(module, options, args, kwargs) -> None:
    instance = module(**options)
    shown = repr(instance)
    assert shown.startswith(f"{module.__name__}(")
    for name, value in options.items():
        assert f"{name}={value!r}" in shown
    for name in inspect.signature(module).parameters:
        assert f"{name}=" in shown
    assert repr(instance) in repr(nn.Sequential(instance))


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_modules_hold_no_state(module: type[nn.Module]) -> None:
    parameters = inspect.signature(module).parameters
    given = next(options for m, options, _, _ in CALLS if m is module)
    options = {n: given[n] for n, p in parameters.items() if p.default is inspect.Parameter.empty}
    instance = module(**options)
    assert not list(instance.parameters()) and not list(instance.buffers()) and not instance.state_dict()
    assert module.__doc__ and FUNCTION_OF[module].__name__ in module.__doc__
    with pytest.raises(TypeError, match="bogus"):
        module(**options, bogus=1)


def test_options_are_checked_at_the_call() -> None:
    with pytest.raises(ValueError, match="reduction: got 'avg'"):
        uf.nn.GaussianKL(reduction="avg")(M, V)


def test_generator_is_given_at_the_call(device: torch.device) -> None:
    for module in (uf.nn.SampleGaussian(), uf.nn.SampleGaussianWithKL()):
        a, b = (
            as_tuple(module(M.to(device), V.to(device), generator=torch.Generator(device).manual_seed(3)))[0]
            for _ in range(2)
        )
        assert_same_bits(a, b)
