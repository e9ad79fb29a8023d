"""Importance weights: bounds and self-normalised weights of `log_w`, K samples along `dim`.

Conventions: `log_w = log p(x, z) - log q(z | x)`; fp16 and bf16 are computed and returned in fp32. A row of all `-inf`
has bound `-inf`, weights 0 and gradient 0; a NaN or `+inf` makes its row NaN, and that row alone.
"""

from torch import Tensor

from unigen_fast import _checks, _ops


def log_mean_exp(log_w: Tensor, *, dim: int) -> Tensor:
    """log (1/K) sum_k exp(log_w_k): the importance-weighted bound on log p(x).

    Args:
        log_w: log-weights in nats, K >= 1 samples along `dim`, any strides.
        dim: the dimension of the samples.

    Returns:
        Shape of `log_w` without `dim`.

    Raises:
        TypeError: `log_w` is not a floating-point tensor.
        ValueError: `dim` is out of range, or holds no samples.

    Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders" (2016), Eq. 8.
    """
    dim = _checks.sample_dimension("log_w", _checks.floating("log_w", log_w), dim)
    return _ops.log_mean_exp((log_w,), dim)


def importance_weights(log_w: Tensor, *, dim: int, temperature: float = 1.0, detach: bool = True) -> Tensor:
    """Self-normalised weights softmax(log_w / temperature) over `dim`: they sum to 1.

    Args:
        log_w: log-weights in nats, K >= 1 samples along `dim`, any strides.
        dim: the dimension of the samples.
        temperature: > 0; above 1 it flattens the weights.
        detach: whether the weights are constants to autograd, as estimators need them.

    Returns:
        Shape of `log_w`.

    Raises:
        TypeError: `log_w` is not a floating-point tensor.
        ValueError: `dim` is out of range or holds no samples; `temperature` is not positive.

    Source: Hu et al., "On Unifying Deep Generative Models" (2018), Eq. 16, w~_i.
    """
    dim = _checks.sample_dimension("log_w", _checks.floating("log_w", log_w), dim)
    temperature = _checks.number("temperature", temperature, minimum=0.0, exclusive=True)
    return _ops.importance_weights((log_w.detach() if detach else log_w,), dim, temperature)


def effective_sample_size(log_w: Tensor, *, dim: int) -> Tensor:
    """1 / sum_k w~_k^2, in [1, K]: how many samples carry the weight. Detached. 0 for a row of all `-inf`.

    Args:
        log_w: log-weights in nats, K >= 1 samples along `dim`, any strides.
        dim: the dimension of the samples.

    Returns:
        Shape of `log_w` without `dim`.

    Raises:
        TypeError: `log_w` is not a floating-point tensor.
        ValueError: `dim` is out of range, or holds no samples.

    Source: Kong, "A note on importance sampling using standardized weights" (1992).
    """
    dim = _checks.sample_dimension("log_w", _checks.floating("log_w", log_w), dim)
    return _ops.effective_sample_size((log_w.detach(),), dim)


def iwae_loss(log_w: Tensor, *, dim: int, reduction: str = "mean", value: str = "bound") -> Tensor:
    """-log (1/K) sum_k exp(log_w_k), reduced over the rows. Its gradient is -w~_k, w~ the self-normalised weights.

    With K = 1 it is exactly `-log_w`, the negative single-sample ELBO.

    Args:
        log_w: log-weights in nats, K >= 1 samples along `dim`, any strides.
        dim: the dimension of the samples.
        reduction: over the rows: "mean", "sum" or "none".
        value: what the loss reports: "bound", as above, or "surrogate", -sum_k w~_k log_w_k with detached weights,
            which some implementations log. The gradient is the same.

    Returns:
        A scalar, or with "none" the shape of `log_w` without `dim`.

    Raises:
        TypeError: `log_w` is not a floating-point tensor.
        ValueError: `dim` is out of range or holds no samples; unknown `reduction` or `value`.

    Source: Burda et al. (2016), Eqs. 8 and 13.
    """
    dim = _checks.sample_dimension("log_w", _checks.floating("log_w", log_w), dim)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    _checks.choice("value", value, ("bound", "surrogate"))
    return _ops.iwae_loss((log_w,), dim, reduction, value)
