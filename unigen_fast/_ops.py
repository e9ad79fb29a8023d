"""Every op's schema, once.

An op takes its tensors already broadcast to one shape (strides of 0 included) and its options already checked; what
each option means stands in the reference of the same name. `dim` None reduces over every dimension. Statistics and rows
are fp32 for fp16, bf16 and fp32, else fp64.
"""

from collections.abc import Callable
from typing import Any

from unigen_fast._fused import FusedOp
from unigen_fast.reference import adversarial, divergence, importance, likelihood


def _row_formula(
    name: str, reference: Callable[..., Any], tensors: str, options: str = "", *, reduced: bool = False
) -> FusedOp:
    """An op that sums a formula of a few tensors over the event: rows or, if `reduced`, weighted and reduced."""
    count = len(tensors.split(","))
    if reduced:
        tensors += ", Tensor? weights"
        options += ", float scale, str reduction"
    gradients = ", ".join(["Tensor"] * count)
    return FusedOp(
        f"{name}({tensors}, int event_ndims{options}) -> Tensor",
        reference,
        backward=f"(Tensor grad, {tensors}, int event_ndims{options}, int needed) -> ({gradients})",
        tensors=count + reduced,
        differentiable=range(count),
    )


_SPREAD = ", str spread, float clamp_min, float clamp_max"

# ---- importance ------------------------------------------------------------------------------------------------------

log_mean_exp = FusedOp(
    "log_mean_exp(Tensor log_w, int dim) -> (Tensor value, Tensor statistics)",
    importance.log_mean_exp,
    backward="(Tensor grad, Tensor log_w, Tensor statistics, int dim) -> Tensor",
    saved=(1,),
)
importance_weights = FusedOp(
    "importance_weights(Tensor log_w, int dim, float temperature) -> Tensor",
    importance.importance_weights,
    backward="(Tensor grad, Tensor log_w, Tensor weights, int dim, float temperature) -> Tensor",
    saved=(0,),
)
effective_sample_size = FusedOp(
    "effective_sample_size(Tensor log_w, int dim) -> Tensor",
    importance.effective_sample_size,
)
iwae_loss = FusedOp(
    "iwae_loss(Tensor log_w, int dim, str reduction, str value) -> (Tensor loss, Tensor statistics)",
    importance.iwae_loss,
    backward="(Tensor grad, Tensor log_w, Tensor statistics, int dim, str reduction, str value) -> Tensor",
    saved=(1,),
)

# ---- adversarial -----------------------------------------------------------------------------------------------------

importance_weighted_generator_loss = FusedOp(
    "importance_weighted_generator_loss(Tensor fake, int? dim, float temperature, bool detach, str reduction)"
    " -> (Tensor loss, Tensor statistics)",
    importance.importance_weighted_generator_loss,
    backward="(Tensor grad, Tensor fake, Tensor statistics, int? dim, float temperature, bool detach, str reduction)"
    " -> Tensor",
    saved=(1,),
)
_LOGIT_LOSS = "int reals, int real_term, int fake_term, str reduction, float scale, bool return_stats"
logit_loss = FusedOp(
    f"logit_loss(Tensor[] logits, {_LOGIT_LOSS}) -> (Tensor loss, Tensor statistics)",
    adversarial.logit_loss,
    backward=f"(Tensor grad, Tensor[] logits, {_LOGIT_LOSS}) -> Tensor[]",
    tensor_list=True,
)
logit_term = FusedOp(
    "logit_term(Tensor logits, int term, float scale) -> Tensor",
    adversarial.logit_term,
    backward="(Tensor grad, Tensor logits, int term, float scale) -> Tensor",
    elementwise=True,
)

# ---- divergence ------------------------------------------------------------------------------------------------------

_KL = (
    "int event_ndims, str spread, float free_bits, str free_bits_mode, float clamp_min, float clamp_max, float scale, "
    "str reduction"
)
_KL_TENSORS = "Tensor mean, Tensor logvar, Tensor? prior_mean, Tensor? prior_logvar, Tensor? weights"
_SAMPLE_TENSORS = "Tensor mean, Tensor logvar, Tensor rng_state"
_SAMPLE = "int num_samples, int sample_dim, str spread, float clamp_min, float clamp_max"
_SAMPLE_KL = "int num_samples, int sample_dim, int event_ndims, str spread, float clamp_min, float clamp_max"

gaussian_kl = FusedOp(
    f"gaussian_kl({_KL_TENSORS}, {_KL}) -> (Tensor kl, Tensor rows)",
    divergence.gaussian_kl,
    backward=f"(Tensor grad, {_KL_TENSORS}, Tensor rows, {_KL}, int needed) -> (Tensor, Tensor, Tensor, Tensor)",
    tensors=5,
    differentiable=(0, 1, 2, 3),
    saved=(1,),
)
sample_gaussian = FusedOp(
    f"sample_gaussian({_SAMPLE_TENSORS}, {_SAMPLE}) -> Tensor",
    divergence.sample_gaussian,
    backward=f"(Tensor grad, {_SAMPLE_TENSORS}, {_SAMPLE}, int needed) -> (Tensor, Tensor)",
    tensors=3,
    differentiable=(0, 1),
)
sample_gaussian_with_kl = FusedOp(
    f"sample_gaussian_with_kl({_SAMPLE_TENSORS}, {_SAMPLE_KL}) -> (Tensor z, Tensor kl)",
    divergence.sample_gaussian_with_kl,
    backward=f"(Tensor grad_z, Tensor grad_kl, {_SAMPLE_TENSORS}, {_SAMPLE_KL}, int needed) -> (Tensor, Tensor)",
    tensors=3,
    differentiable=(0, 1),
    differentiable_outputs=2,
)
gaussian_kl_monte_carlo = _row_formula(
    "gaussian_kl_monte_carlo",
    divergence.gaussian_kl_monte_carlo,
    "Tensor z, Tensor? mean, Tensor logvar, Tensor prior_mean, Tensor prior_logvar",
    _SPREAD,
    reduced=True,
)
bernoulli_kl = _row_formula("bernoulli_kl", divergence.bernoulli_kl, "Tensor logits_q, Tensor? logits_p", reduced=True)

# ---- likelihood ------------------------------------------------------------------------------------------------------

bernoulli_log_prob = FusedOp(
    "bernoulli_log_prob(Tensor logits, Tensor x, int event_ndims) -> Tensor",
    likelihood.bernoulli_log_prob,
    backward="(Tensor grad, Tensor logits, Tensor x, int event_ndims, int needed) -> (Tensor, Tensor)",
    tensors=2,
    differentiable=(0, 1),
)
gaussian_log_prob = _row_formula(
    "gaussian_log_prob", likelihood.gaussian_log_prob, "Tensor x, Tensor mean, Tensor logvar", _SPREAD
)
laplace_log_prob = _row_formula(
    "laplace_log_prob", likelihood.laplace_log_prob, "Tensor x, Tensor mean, Tensor log_scale"
)
discretized_logistic_log_prob = _row_formula(
    "discretized_logistic_log_prob",
    likelihood.discretized_logistic_log_prob,
    "Tensor x, Tensor mean, Tensor log_scale",
    ", float half_bin, float low, float high",
)
negative_binomial_log_prob = _row_formula(
    "negative_binomial_log_prob", likelihood.negative_binomial_log_prob, "Tensor x, Tensor mu, Tensor theta"
)
zero_inflated_negative_binomial_log_prob = _row_formula(
    "zero_inflated_negative_binomial_log_prob",
    likelihood.zero_inflated_negative_binomial_log_prob,
    "Tensor x, Tensor mu, Tensor theta, Tensor gate_logits",
)
