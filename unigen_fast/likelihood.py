"""Log-densities that build log-weights and reconstruction terms. Rows: the event dimensions are summed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unigen_fast import _checks, _ops, _values


def bernoulli_log_prob(logits: Tensor, x: Tensor, *, event_ndims: int | None = None) -> Tensor:
    """log Bernoulli(x; sigmoid(logits)) = sum_d x_d log sigma(l_d) + (1 - x_d) log sigma(-l_d).

    Args:
        logits: `[rows…, event…]`, the decoder's raw outputs.
        x: data in [0, 1], or bool, of the shape of `logits`, rows of size 1 being those that are the same for all:
            `x.unsqueeze(1)` of `[B, D]` against `[B, K, D]` is not repeated in memory.
        event_ndims: how many trailing dimensions make one example and are summed: 3 of images `[B, C, H, W]`. None: 1
            of tensors of one or two dimensions; of more an error, unless `[B, K, D]` beside `[B, 1, D]` tells.

    Returns:
        Nats, one per row; fp32 for fp16 and bf16.

    Raises:
        TypeError: `logits` is not floating-point, or x of integers other than bool (pixels, say).
        ValueError: shapes that do not fit, tensors on two devices, `event_ndims` out of range.

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes" (2014), App. C.1.
    """
    tensors, event_ndims = _checks.aligned(event_ndims, data="x", logits=logits, x=binary(x, logits))
    if _values.on:
        _values.likelihood("bernoulli", tensors[1], {"logits": tensors[0]})
    return _ops.bernoulli_log_prob(tensors, event_ndims)


def gaussian_log_prob(
    x: Tensor,
    mean: Tensor,
    logvar: Tensor,
    *,
    event_ndims: int | None = None,
    spread: str = "logvar",
    clamp_logvar: tuple[float, float] | None = None,
) -> Tensor:
    """log N(x; m, s²) of a diagonal Gaussian = -½ sum_d [ log 2 pi + v + (x - m)² e^{-v} ], v = log s².

    Args:
        x: data, of as many dimensions as the others: `x.unsqueeze(1)` of `[B, D]` against `[B, K, D]` is not repeated
            in memory, and gets no gradient unless it asks for one.
        mean, logvar: `[rows…, event…]`, any strides; a parameter for all rows is `[event…]` or `()`.
        event_ndims: how many trailing dimensions make one example and are summed: 3 of images `[B, C, H, W]`. None: 1
            of tensors of one or two dimensions; of more an error, unless `[B, K, D]` beside `[B, 1, D]` tells.
        spread: what `logvar` holds: "logvar", "logstd" or "std" (positive).
        clamp_logvar: (low, high) for the log-variance; the gradient is 0 outside.

    Returns:
        Nats, one per row; fp32 for fp16 and bf16.

    Raises:
        TypeError: tensors that are not floating-point (x may hold integers, but no uint8: these are pixels).
        ValueError: shapes that do not fit, tensors on two devices, `event_ndims` out of range, unknown `spread`.

    Source: Kingma and Welling (2014), App. C.2.
    """
    _checks.choice("spread", spread, _checks.SPREADS)
    low, high = _checks.clamp_range(clamp_logvar)
    tensors, event_ndims = _checks.aligned(event_ndims, data="x", x=real(x, mean, logvar), mean=mean, logvar=logvar)
    if _values.on:
        _values.likelihood("gaussian", tensors[0], {"mean": tensors[1], "logvar": tensors[2]}, (spread,))
    return _ops.gaussian_log_prob(tensors, event_ndims, spread, low, high)


def laplace_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor, *, event_ndims: int | None = None) -> Tensor:
    """log Laplace(x; m, b) = -sum_d [ log 2 + log b + |x - m| / b ].

    Args:
        x: data, of as many dimensions as the others; rows of size 1 are the same for all.
        mean: `[rows…, event…]`, any strides.
        log_scale: log b (`scale.log()` of a network that gives the scale).
        event_ndims: how many trailing dimensions make one example and are summed: 3 of images `[B, C, H, W]`. None: 1
            of tensors of one or two dimensions; of more an error, unless `[B, K, D]` beside `[B, 1, D]` tells.

    Returns:
        Nats, one per row; fp32 for fp16 and bf16. The gradient at x = m is 0, as that of `torch.abs`.

    Raises:
        TypeError: tensors that are not floating-point (x may hold integers, but no uint8: these are pixels).
        ValueError: shapes that do not fit, tensors on two devices, `event_ndims` out of range.

    Source: `torch.distributions.Laplace`.
    """
    tensors, event_ndims = _checks.aligned(
        event_ndims, data="x", x=real(x, mean, log_scale), mean=mean, log_scale=log_scale
    )
    if _values.on:
        _values.likelihood("laplace", tensors[0], {"mean": tensors[1], "log_scale": tensors[2]})
    return _ops.laplace_log_prob(tensors, event_ndims)


def discretized_logistic_log_prob(
    x: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    *,
    event_ndims: int | None = None,
    bin_width: float = 2 / 255,
    low: float = -1.0,
    high: float = 1.0,
) -> Tensor:
    """log of the logistic distribution's mass in the bin of x, summed over the event.

    With a, b = (x - m ± bin_width / 2) e^{-log_scale}: log sigma(a) in the lowest bin, log sigma(-b) in the highest,
    and between them log(sigma(a) - sigma(b)) = log(1 - e^{b - a}) + log sigma(a) + log sigma(-b): no floor under the
    probability, whatever the scale, and exact gradients.

    Args:
        x: data at levels `bin_width` apart from `low` to `high`, of as many dimensions as the others. By default 256
            levels in [-1, 1]: PixelCNN++'s. Integers where these three are.
        mean: `[rows…, event…]`, any strides.
        log_scale: log of the logistic's scale.
        event_ndims: how many trailing dimensions make one example and are summed: 3 of images `[B, C, H, W]`. None: 1
            of tensors of one or two dimensions; of more an error, unless `[B, K, D]` beside `[B, 1, D]` tells.
        bin_width: distance between two levels.
        low, high: the extreme levels: their bins, as far as half a bin inside of them, reach to infinity.

    Returns:
        Nats, one per row; fp32 for fp16 and bf16.

    Raises:
        TypeError: tensors that are not floating-point (x may hold integers, but no uint8: these are pixels).
        ValueError: shapes that do not fit, tensors on two devices, `event_ndims` out of range, a `bin_width` that
            is not positive, `low` above `high`.

    Source: Salimans et al., "PixelCNN++" (2017), Eq. 2; Kingma et al. (2016), App. for the single logistic.
    """
    bins = logistic_bins(bin_width, low, high)
    tensors, event_ndims = _checks.aligned(
        event_ndims, data="x", x=levels(x, bins, mean), mean=mean, log_scale=log_scale
    )
    if _values.on:
        _values.likelihood("discretized_logistic", tensors[0], {"mean": tensors[1], "log_scale": tensors[2]}, bins)
    return _ops.discretized_logistic_log_prob(tensors, event_ndims, *bins)


def logistic_bins(bin_width: float = 2 / 255, low: float = -1.0, high: float = 1.0) -> tuple[float, float, float]:
    """Half the width of a bin and the extreme levels, checked."""
    bin_width = _checks.number("bin_width", bin_width, minimum=0.0, exclusive=True)
    low, high = _checks.number("low", low), _checks.number("high", high)
    if not (isinstance(low, Tensor) or isinstance(high, Tensor)) and not low <= high:
        raise ValueError(f"low: got {low}, expected at most high = {high}")
    return bin_width / 2, low, high


def negative_binomial_log_prob(
    x: Tensor, mu: Tensor, theta: Tensor, *, event_ndims: int | None = None, eps: float = 0.0
) -> Tensor:
    """log NB(x; mu, theta) of the mean mu and the inverse dispersion theta: variance mu + mu² / theta.

    sum_d lgamma(x + theta) - lgamma(theta) - lgamma(x + 1) + theta log(theta / (theta + mu)) + x log(mu / (theta + mu))

    As written this loses every digit in fp32 for theta >= 1e5 (scverse/scvi-tools#2965); here the terms that cancel are
    cancelled by hand (Stirling's formula, its remainder, and the deviance of the counts as a sum of two numbers of one
    sign), so that value and gradients keep theirs for theta from 1e-4 to 1e7 and counts to 1e5.

    With `eps` the last two are theta log((theta + eps) / s) + x log((mu + eps) / s), s = theta + mu + eps; that is the
    above at the mean mu + eps, plus theta log(1 + eps / theta).

    Args:
        x: counts >= 0 of any dtype (real ones are taken by the same formula), of as many dimensions as mu.
        mu: means >= 0, `[rows…, event…]`, any strides. mu = 0 (without `eps`) means that x is 0 for certain.
        theta: positive, finite; one for each gene is `[D]`.
        event_ndims: how many trailing dimensions make one example and are summed: 3 of images `[B, C, H, W]`. None: 1
            of tensors of one or two dimensions; of more an error, unless `[B, K, D]` beside `[B, 1, D]` tells.
        eps: >= 0, added to mu and theta inside the logarithms. 1e-8 gives scvi-tools' `log_nb_positive`.

    Returns:
        Nats, one per row; fp32 for fp16 and bf16. Means or thetas outside their range give NaN.

    Raises:
        TypeError: mu or theta not floating-point.
        ValueError: shapes that do not fit, tensors on two devices, `event_ndims` out of range, negative `eps`.

    Source: Lopez et al., "Deep generative modeling for single-cell transcriptomics" (2018), Methods; the evaluation
    after Loader, "Fast and accurate computation of binomial probabilities" (2000).
    """
    eps = _checks.number("eps", eps, minimum=0.0)
    tensors, event_ndims = _checks.aligned(event_ndims, data="x", x=counts(x, mu, theta), mu=mu, theta=theta)
    if _values.on:
        _values.likelihood("negative_binomial", tensors[0], {"mu": tensors[1], "theta": tensors[2]})
    return _ops.negative_binomial_log_prob(tensors, event_ndims, eps)


def zero_inflated_negative_binomial_log_prob(
    x: Tensor, mu: Tensor, theta: Tensor, gate_logits: Tensor, *, event_ndims: int | None = None, eps: float = 0.0
) -> Tensor:
    """log ZINB(x): zero with probability sigma(g), a count of NB(mu, theta) otherwise.

    x = 0: log(sigma(g) + sigma(-g) NB(0)); x > 0: log sigma(-g) + log NB(x); summed over the event. Stable for logits
    and means of any size, and as accurate in theta as `negative_binomial_log_prob`.

    Args:
        x: counts >= 0 of any dtype, of as many dimensions as mu. Exactly 0 is a zero, whatever `eps` is; scvi-tools'
            are those below its eps, the same of counts.
        mu, theta: as in `negative_binomial_log_prob`.
        gate_logits: g, the logit of the zero inflation: scvi-tools' `zi_logits`.
        event_ndims: how many trailing dimensions make one example and are summed: 3 of images `[B, C, H, W]`. None: 1
            of tensors of one or two dimensions; of more an error, unless `[B, K, D]` beside `[B, 1, D]` tells.
        eps: as in `negative_binomial_log_prob`, for log NB(x). 1e-8 gives scvi-tools' `log_zinb_positive`.

    Returns:
        Nats, one per row; fp32 for fp16 and bf16.

    Raises:
        TypeError: mu, theta or gate_logits not floating-point.
        ValueError: shapes that do not fit, tensors on two devices, `event_ndims` out of range, negative `eps`.

    Source: Lopez et al. (2018), Methods.
    """
    eps = _checks.number("eps", eps, minimum=0.0)
    tensors, event_ndims = _checks.aligned(
        event_ndims, data="x", x=counts(x, mu, theta, gate_logits), mu=mu, theta=theta, gate_logits=gate_logits
    )
    if _values.on:
        given = {"mu": tensors[1], "theta": tensors[2], "gate_logits": tensors[3]}
        _values.likelihood("zero_inflated_negative_binomial", tensors[0], given)
    return _ops.zero_inflated_negative_binomial_log_prob(tensors, event_ndims, eps)


def binary(x: Tensor, logits: Tensor) -> Tensor:
    """Data in [0, 1]. Integers other than bool are refused: of images they are pixels, 0 to 255."""
    if isinstance(x, Tensor) and x.dtype == torch.bool:
        return x.to(_checks.floating("logits", logits).dtype)
    return x if _is_real(x) else _refused(x, "in [0, 1] (x / 255 of pixels), or bool")


def counts(x: Tensor, *parameters: Tensor) -> Tensor:
    """Integers as floating-point numbers: fp16 and bf16 do not have every one of them."""
    if _is_real(x):
        return x
    wide = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in parameters)
    return _checks.tensor("x", x).to(torch.float64 if wide else torch.float32)


def real(x: Tensor, *parameters: Tensor) -> Tensor:
    """Data on the real line; uint8 is refused: that is an image whose pixels were left at 0 to 255."""
    if isinstance(x, Tensor) and x.dtype == torch.uint8:
        return _refused(x, "(of pixels say x / 127.5 - 1)")
    return counts(x, *parameters)


def levels(x: Tensor, bins: Sequence[float], *parameters: Tensor) -> Tensor:
    """Data at levels a bin apart: integers where the levels are."""
    if _is_real(x):
        return x
    half_bin, low, high = bins
    if all(float(level).is_integer() for level in (2 * half_bin, low, high) if not isinstance(level, Tensor)):
        return counts(x, *parameters)
    return _refused(x, f"in [low, high] = [{low:g}, {high:g}] (x / 127.5 - 1 of pixels in [-1, 1])")


def _is_real(x: Tensor) -> bool:
    """Floating-point numbers, or what is refused elsewhere."""
    return not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex()


def _refused(x: Tensor, expected: str) -> Tensor:
    raise TypeError(f"x: got {x.dtype} of shape {tuple(x.shape)}, expected floating-point numbers {expected}")


def categorical_log_prob(
    logits: Tensor, x: Tensor, *, class_dim: int = -1, event_ndims: int = 0, ignore_index: int = -100
) -> Tensor:
    """log Categorical(x; softmax(logits)) = l_x - log sum_c exp(l_c), summed over the event.

    Args:
        logits: `[rows…, event…]` with a dimension of C classes anywhere, any strides.
        x: the classes, integers in [0, C), of the shape of `logits` without its classes; rows of size 1 are the same
            for all (neither is repeated in memory). A class that does not exist makes its row NaN, and its gradients:
            to say more would take a host synchronisation.
        class_dim: the dimension of the classes.
        event_ndims: how many of the trailing dimensions, that of the classes left out, make one example and are summed.
        ignore_index: a class that is not read, as in `torch.nn.functional.cross_entropy`: where x has it the
            log-probability is 0, and so is the gradient of the logits there, NaN or not.

    Returns:
        Nats, one per row; fp32 for fp16 and bf16.

    Raises:
        TypeError: `logits` is not floating-point, or `x` not integers (one-hot or soft classes among them: a
            cross-entropy of distributions is `(x * logits.log_softmax(-1)).sum(-1)`), or `ignore_index` not an int.
        ValueError: shapes that do not fit, tensors on two devices, `class_dim` or `event_ndims` out of range.

    Source: Bishop, "Pattern Recognition and Machine Learning" (2006), Eq. 4.104 and 4.108.
    """
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    logits, x, class_dim = _classes(logits, x, class_dim, event_ndims)
    if _values.on:
        _values.likelihood("categorical", x, {"logits": logits}, (class_dim, ignore_index))
    return _ops.categorical_log_prob((logits, x), class_dim, event_ndims, ignore_index)


def _classes(logits: Tensor, x: Tensor, class_dim: int, event_ndims: int) -> tuple[Tensor, Tensor, int]:
    """The logits, and the int64 classes of the same shape without `class_dim`, both expanded; `class_dim` >= 0."""
    _checks.floating("logits", logits)
    _checks.tensor("x", x)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"x: expected integer classes, got {x.dtype} of shape {tuple(x.shape)}")
    if x.device != logits.device:
        raise ValueError(f"x: got device {x.device}, expected {logits.device} as logits")
    class_dim = _checks.dimension("class_dim", logits, class_dim)
    _checks.site_event("logits", logits, event_ndims)
    sites = logits.shape[:class_dim] + logits.shape[class_dim + 1 :]
    if x.shape != sites:
        classes, without = logits.size(class_dim), f"logits {tuple(logits.shape)} without its classes, {tuple(sites)}"
        of_site = logits.select(class_dim, 0) if classes else logits.sum(class_dim)
        if x.dim() == len(sites):
            shape, _ = _checks.common_shape({"logits": of_site, "x": x}, without)
        elif len(sites) == event_ndims < x.dim():
            shape = list(x.shape)  # logits that are the same for all rows
        else:
            raise ValueError(
                f"x: got shape {tuple(x.shape)} beside {without}, expected as many dimensions, of size 1 where a class "
                "is the same for all"
            )
        x = _checks.fitted("x", x, shape, event_ndims, without, whole=True)
        _checks.fitted("logits", of_site, shape, event_ndims, f"x {tuple(x.shape)}, classes apart")
        class_dim += len(shape) - len(sites)
        logits = logits.expand(*shape[:class_dim], classes, *shape[class_dim:])
    return logits, x.to(torch.int64), class_dim


def discretized_logistic_mixture_log_prob(params: Tensor, x: Tensor, *, event_ndims: int = 3) -> Tensor:
    """log of a mixture of M discretized logistics: the likelihood of 8-bit images in PixelCNN++ and its kin.

    A channel's mass at x is sigma((x - m + 1/255) / s) - sigma((x - m - 1/255) / s), that of everything below for
    x < -0.999 and of everything above for x > 0.999; the channels of a pixel share the mixture's component, and with
    three of them m_1 += c_0 x_0 and m_2 += c_1 x_0 + c_2 x_1, c = tanh of what the network gave. Log-scales are clamped
    at -7 from below, without gradient beyond.

    The difference is evaluated as log(1 - e^(-2/255 / s)) + log sigma(upper) + log sigma(-lower): nothing is lost in
    the tails. There, for a mass below 1e-5, PixelCNN++ takes the density in the bin's middle times its width: the same
    number to second order in 1/255 / s, of which ours is the exact one.

    Args:
        params: `[rows…, pixels…, P]`, any strides, in PixelCNN++'s order: M mixture logits; then for each channel M
            means, M log-scales and, with three channels, M coefficients. P = 10 M for three channels, 3 M for one.
        x: `[rows…, pixels…, C]`, C 1 or 3, in [-1, 1] in steps of 2/255; its rows and pixels are those of
            `params`, 1 where a row is the same for all.
        event_ndims: how many of x's trailing dimensions make one example and are summed, the channels included: 3 for
            `[B, H, W, C]`.

    Returns:
        Nats, one per row; fp32 for fp16 and bf16.

    Raises:
        TypeError: tensors that are not floating-point.
        ValueError: channels other than 1 or 3, a last dimension of `params` that is no multiple of 3 or 10, shapes that
            do not fit, tensors on two devices, `event_ndims` out of range (the channels are always summed).

    Source: Salimans et al., "PixelCNN++" (2017), Eq. 1-3 and Sec. 2.2.
    """
    for name, tensor in (("params", params), ("x", x)):
        if _checks.floating(name, tensor).dim() == 0:
            raise ValueError(f"{name}: got shape (), expected at least one dimension")
    if params.device != x.device:
        raise ValueError(f"x: got device {x.device}, expected {params.device} as params")
    channels, numbers = x.size(-1), params.size(-1)
    if channels not in (1, 3):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected 1 or 3 channels in the last dimension")
    each = 10 if channels == 3 else 3
    if numbers == 0 or numbers % each:
        raise ValueError(
            f"params: got shape {tuple(params.shape)}, expected a multiple of {each} in the last dimension, for "
            f"mixtures of {channels} channels"
        )
    params, x = _checks.promoted([params, x])
    if _checks.event("x", x, event_ndims) == 0:
        raise ValueError("event_ndims: got 0, expected at least 1: the channels of a pixel share a mixture")
    if params.shape[:-1] != x.shape[:-1]:
        of_params, of_x = params.select(-1, 0), x.select(-1, 0)
        beside = f"x {tuple(of_x.shape)}, the last dimension of both apart"
        shape = list(of_x.shape)
        if of_params.dim() == of_x.dim():
            shape, _ = _checks.common_shape({"x": of_x, "params": of_params}, beside)
        _checks.fitted("params", of_params, shape, event_ndims - 1, beside)
        _checks.fitted("x", of_x, shape, event_ndims - 1, f"params {tuple(of_params.shape)}, the last dimension apart")
        params, x = params.expand(*shape, numbers), x.expand(*shape, channels)
    if _values.on:
        _values.likelihood("discretized_logistic_mixture", x, {"params": params})
    return _ops.discretized_logistic_mixture_log_prob((params, x), event_ndims - 1)
