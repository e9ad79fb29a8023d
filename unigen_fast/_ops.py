"""Every op's schema, once.

An op takes its tensors already broadcast to one shape (strides of 0 included) and its options already checked; what
each option means stands in the reference of the same name. `dim` None reduces over every dimension. Statistics and rows
are fp32 for fp16, bf16 and fp32, else fp64.
"""

import math
from collections.abc import Callable
from typing import Any

from unigen_fast import closed_forms
from unigen_fast._fused import FusedOp
from unigen_fast.reference import adversarial, categorical, divergence, importance, likelihood, objectives, pairwise

# elements below which the compiler's own code of a cheap reference is faster than calls of kernels (benches/inlined.py)
_FEW = 32768


def _row_formula(
    name: str,
    reference: Callable[..., Any],
    tensors: str,
    options: str = "",
    *,
    reduced: bool = False,
    inline_below: float = 0,
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
        inline_below=inline_below,
    )


_SPREAD = ", str spread, float clamp_min, float clamp_max"

# ---- importance ------------------------------------------------------------------------------------------------------

log_mean_exp = FusedOp(
    "log_mean_exp(Tensor log_w, int dim) -> (Tensor value, Tensor statistics)",
    importance.log_mean_exp,
    backward="(Tensor grad, Tensor log_w, Tensor statistics, int dim) -> Tensor",
    saved=(1,),
    inline_below=_FEW,
)
importance_weights = FusedOp(
    "importance_weights(Tensor log_w, int dim, float temperature) -> Tensor",
    importance.importance_weights,
    backward="(Tensor grad, Tensor log_w, Tensor weights, int dim, float temperature) -> Tensor",
    saved=(0,),
    inline_below=_FEW,
)
effective_sample_size = FusedOp(
    "effective_sample_size(Tensor log_w, int dim) -> Tensor",
    importance.effective_sample_size,
    inline_below=_FEW,
)
iwae_loss = FusedOp(
    "iwae_loss(Tensor log_w, int dim, str reduction, str value) -> (Tensor loss, Tensor statistics)",
    importance.iwae_loss,
    backward="(Tensor grad, Tensor log_w, Tensor statistics, int dim, str reduction, str value) -> Tensor",
    saved=(1,),
    inline_below=_FEW,
)

power_bound_loss = FusedOp(
    "power_bound_loss(Tensor log_w, int dim, float power, float elbo_weight, float scale, str reduction)"
    " -> (Tensor loss, Tensor statistics)",
    importance.power_bound_loss,
    backward="(Tensor grad, Tensor log_w, Tensor statistics, int dim, float power, float elbo_weight, float scale,"
    " str reduction) -> Tensor",
    saved=(1,),
    inline_below=_FEW,
)
tvo_loss = FusedOp(
    "tvo_loss(Tensor log_w, int dim, float[] partition, str reduction) -> (Tensor loss, Tensor statistics)",
    importance.tvo_loss,
    backward="(Tensor grad, Tensor log_w, Tensor statistics, int dim, float[] partition, str reduction) -> Tensor",
    saved=(1,),
    inline_below=_FEW,
)
vimco_loss = FusedOp(
    "vimco_loss(Tensor log_w, Tensor log_q, int dim, str reduction) -> (Tensor loss, Tensor statistics)",
    importance.vimco_loss,
    backward="(Tensor grad, Tensor log_w, Tensor log_q, Tensor statistics, int dim, str reduction, int needed)"
    " -> (Tensor, Tensor)",
    tensors=2,
    differentiable=(0, 1),
    saved=(1,),
)
rws_losses = FusedOp(
    "rws_losses(Tensor log_p, Tensor log_q, int dim, str reduction)"
    " -> (Tensor wake_theta, Tensor wake_phi, Tensor statistics)",
    importance.rws_losses,
    backward="(Tensor grad_theta, Tensor grad_phi, Tensor log_p, Tensor log_q, Tensor statistics, int dim,"
    " str reduction, int needed) -> (Tensor, Tensor)",
    tensors=2,
    differentiable=(0, 1),
    differentiable_outputs=2,
    reaches=((0,), (1,)),
    saved=(2,),
    inline_below=_FEW,
)
log_variance_loss = FusedOp(
    "log_variance_loss(Tensor log_w, int dim, str reduction) -> (Tensor loss, Tensor statistics)",
    importance.log_variance_loss,
    backward="(Tensor grad, Tensor log_w, Tensor statistics, int dim, str reduction) -> Tensor",
    saved=(1,),
    inline_below=_FEW,
)
importance_weighted_sum = FusedOp(
    "importance_weighted_sum(Tensor log_w, Tensor payload, int dim, float temperature)"
    " -> (Tensor value, Tensor statistics)",
    importance.importance_weighted_sum,
    backward="(Tensor grad, Tensor log_w, Tensor payload, Tensor value, Tensor statistics, int dim, float temperature,"
    " int needed) -> (Tensor, Tensor)",
    tensors=2,
    differentiable=(0, 1),
    saved=(0, 1),
    inline_below=_FEW,
)
weight_diagnostics = FusedOp(
    "weight_diagnostics(Tensor log_w, int dim) -> Tensor",
    importance.weight_diagnostics,
)
# tail: the largest log-weights `[…, M + 1]`, descending and contiguous, fp32 or fp64
pareto_shape = FusedOp("pareto_shape(Tensor tail) -> Tensor", importance.pareto_shape)

# ---- adversarial -----------------------------------------------------------------------------------------------------

importance_weighted_generator_loss = FusedOp(
    "importance_weighted_generator_loss(Tensor fake, int? dim, float temperature, bool detach, str reduction)"
    " -> (Tensor loss, Tensor statistics)",
    importance.importance_weighted_generator_loss,
    backward="(Tensor grad, Tensor fake, Tensor statistics, int? dim, float temperature, bool detach, str reduction)"
    " -> Tensor",
    saved=(1,),
    inline_below=_FEW,
)
_GROUPED = "float temperature, bool detach, str reduction"
grouped_importance_weighted_generator_loss = FusedOp(
    f"grouped_importance_weighted_generator_loss(Tensor fake, Tensor groups, {_GROUPED})"
    " -> (Tensor loss, Tensor statistics)",
    importance.grouped_importance_weighted_generator_loss,
    backward=f"(Tensor grad, Tensor fake, Tensor groups, Tensor statistics, {_GROUPED}) -> Tensor",
    tensors=2,
    saved=(1,),
)


def _inline_logits(
    reals: int, real_term: int, fake_term: int, reduction: str, scale: float, return_stats: bool
) -> float:
    """Sums of products alone the compiler fuses with the network's last layer whatever their number."""
    arithmetic = real_term in adversarial.ARITHMETIC and fake_term in adversarial.ARITHMETIC
    return math.inf if arithmetic and not return_stats else _FEW


_LOGIT_LOSS = "int reals, int real_term, int fake_term, str reduction, float scale, bool return_stats"
logit_loss = FusedOp(
    f"logit_loss(Tensor[] logits, {_LOGIT_LOSS}) -> (Tensor loss, Tensor statistics)",
    adversarial.logit_loss,
    backward=f"(Tensor grad, Tensor[] logits, {_LOGIT_LOSS}) -> Tensor[]",
    tensor_list=True,
    inline_below=_inline_logits,
)
_COUPLED = "int reals, str coupling, int real_term, int fake_term, str reduction, float scale, bool return_stats"
coupled_logit_loss = FusedOp(
    f"coupled_logit_loss(Tensor[] logits, {_COUPLED}) -> (Tensor loss, Tensor statistics)",
    adversarial.coupled_logit_loss,
    backward=f"(Tensor grad, Tensor[] logits, Tensor statistics, {_COUPLED}) -> Tensor[]",
    tensor_list=True,
    saved=(1,),
    inline_below=_FEW,
)
logit_term = FusedOp(
    "logit_term(Tensor logits, int term, float scale) -> Tensor",
    adversarial.logit_term,
    backward="(Tensor grad, Tensor logits, int term, float scale) -> Tensor",
    inline_below=math.inf,
)

# ---- divergence ------------------------------------------------------------------------------------------------------

_KL = (
    "int event_ndims, str spread, float free_bits, str free_bits_mode, float clamp_min, float clamp_max, float scale, "
    "str reduction"
)
_KL_TENSORS = "Tensor mean, Tensor logvar, Tensor? prior_mean, Tensor? prior_logvar, Tensor? weights"
_SAMPLE_TENSORS = "Tensor mean, Tensor logvar, Tensor rng_state"
_SAMPLE = "SymInt num_samples, int sample_dim, str spread, float clamp_min, float clamp_max"
_SAMPLE_KL = "SymInt num_samples, int sample_dim, int event_ndims, str spread, float clamp_min, float clamp_max"

gaussian_kl = FusedOp(
    f"gaussian_kl({_KL_TENSORS}, {_KL}) -> (Tensor kl, Tensor rows)",
    divergence.gaussian_kl,
    backward=f"(Tensor grad, {_KL_TENSORS}, Tensor rows, {_KL}, int needed) -> (Tensor, Tensor, Tensor, Tensor)",
    tensors=5,
    differentiable=(0, 1, 2, 3),
    saved=(1,),
    inline_below=_FEW,
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
    inline_below=_FEW,
)
bernoulli_kl = _row_formula("bernoulli_kl", divergence.bernoulli_kl, "Tensor logits_q, Tensor? logits_p", reduced=True)

# ---- likelihood ------------------------------------------------------------------------------------------------------

bernoulli_log_prob = FusedOp(
    "bernoulli_log_prob(Tensor logits, Tensor x, int event_ndims) -> Tensor",
    likelihood.bernoulli_log_prob,
    backward="(Tensor grad, Tensor logits, Tensor x, int event_ndims, int needed) -> (Tensor, Tensor)",
    tensors=2,
    differentiable=(0, 1),
    inline_below=_FEW,
)
gaussian_log_prob = _row_formula(
    "gaussian_log_prob",
    likelihood.gaussian_log_prob,
    "Tensor x, Tensor mean, Tensor logvar",
    _SPREAD,
    inline_below=_FEW,
)
laplace_log_prob = _row_formula(
    "laplace_log_prob",
    likelihood.laplace_log_prob,
    "Tensor x, Tensor mean, Tensor log_scale",
    inline_below=_FEW,
)
discretized_logistic_log_prob = _row_formula(
    "discretized_logistic_log_prob",
    likelihood.discretized_logistic_log_prob,
    "Tensor x, Tensor mean, Tensor log_scale",
    ", float half_bin, float low, float high",
    inline_below=_FEW,
)
negative_binomial_log_prob = _row_formula(
    "negative_binomial_log_prob",
    likelihood.negative_binomial_log_prob,
    "Tensor x, Tensor mu, Tensor theta",
    ", float eps",
)
zero_inflated_negative_binomial_log_prob = _row_formula(
    "zero_inflated_negative_binomial_log_prob",
    likelihood.zero_inflated_negative_binomial_log_prob,
    "Tensor x, Tensor mu, Tensor theta, Tensor gate_logits",
    ", float eps",
)

# ---- categorical -----------------------------------------------------------------------------------------------------

_CATEGORICAL_TENSORS = "Tensor logits_q, Tensor? logits_p, Tensor? weights"
_CATEGORICAL_KL = "int class_dim, int event_ndims, float unimix, float scale, str reduction"
_BALANCED = (
    "int event_ndims, float free_nats, str free_nats_mode, float unimix, float dynamics_scale, "
    "float representation_scale"
)

categorical_kl = FusedOp(
    f"categorical_kl({_CATEGORICAL_TENSORS}, {_CATEGORICAL_KL}) -> Tensor",
    categorical.categorical_kl,
    backward=f"(Tensor grad, {_CATEGORICAL_TENSORS}, {_CATEGORICAL_KL}, int needed) -> (Tensor, Tensor)",
    tensors=3,
    differentiable=(0, 1),
    inline_below=_FEW,
)
balanced_categorical_kl = FusedOp(
    f"balanced_categorical_kl(Tensor posterior_logits, Tensor prior_logits, {_BALANCED})"
    " -> (Tensor loss, Tensor dynamics, Tensor representation, Tensor rows)",
    categorical.balanced_categorical_kl,
    backward="(Tensor grad_loss, Tensor grad_dynamics, Tensor grad_representation, Tensor posterior_logits,"
    f" Tensor prior_logits, Tensor rows, {_BALANCED}, int needed) -> (Tensor, Tensor)",
    tensors=2,
    differentiable=(0, 1),
    differentiable_outputs=3,
    reaches=((0, 1), (1,), (0,)),
    saved=(3,),
)
categorical_log_prob = FusedOp(
    "categorical_log_prob(Tensor logits, Tensor x, int class_dim, int event_ndims, int ignore_index) -> Tensor",
    categorical.categorical_log_prob,
    backward="(Tensor grad, Tensor logits, Tensor x, int class_dim, int event_ndims, int ignore_index) -> Tensor",
    tensors=2,
)
discretized_logistic_mixture_log_prob = FusedOp(
    "discretized_logistic_mixture_log_prob(Tensor params, Tensor x, int event_ndims) -> Tensor",
    categorical.discretized_logistic_mixture_log_prob,
    backward="(Tensor grad, Tensor params, Tensor x, int event_ndims, int needed) -> (Tensor, Tensor)",
    tensors=2,
    differentiable=(0, 1),
)

# ---- pairwise --------------------------------------------------------------------------------------------------------

_ROWS = ("log_qz", "log_prod_qzi", "log_qzx", "mutual_information", "total_correlation", "dimension_wise_kl")
_TENSORS = "Tensor z, Tensor mean, Tensor logvar"

total_correlation = FusedOp(
    f"total_correlation({_TENSORS}, SymInt dataset_size, str estimator)"
    f" -> ({', '.join(f'Tensor {name}' for name in _ROWS)}, Tensor statistics)",
    pairwise.total_correlation,
    backward=f"({', '.join(f'Tensor grad_{name}' for name in _ROWS)}, {_TENSORS}, Tensor statistics,"
    " SymInt dataset_size, str estimator, int needed) -> (Tensor, Tensor, Tensor)",
    tensors=3,
    differentiable=(0, 1, 2),
    differentiable_outputs=6,
    saved=(6,),
)
mmd = FusedOp(
    "mmd(Tensor x, Tensor y, str kernel, float[] scales, bool unbiased, int gradients)"
    " -> (Tensor value, Tensor gradients)",
    pairwise.mmd,
    backward="(Tensor grad, Tensor x, Tensor y, Tensor saved, str kernel, float[] scales, bool unbiased, int gradients,"
    " int needed) -> (Tensor, Tensor)",
    tensors=2,
    differentiable=(0, 1),
    saved=(1,),
)

# ---- objectives ------------------------------------------------------------------------------------------------------
# the tensors are not of one shape here: the references say which is of which

_ELBO_TENSORS = (
    "Tensor decoder, Tensor? decoder_2, Tensor? decoder_3, Tensor x, Tensor mean, Tensor logvar, Tensor? prior_mean,"
    " Tensor? prior_logvar, Tensor? weights"
)
_ELBO = "int event_ndims, str likelihood, float[] bins, float kl_weight, float scale, str reduction, int gradients"
_OF_ELBO = ("decoder", "decoder_2", "decoder_3", "mean", "logvar", "prior_mean", "prior_logvar")

elbo_loss = FusedOp(
    f"elbo_loss({_ELBO_TENSORS}, {_ELBO}) -> (Tensor loss, Tensor log_likelihood, Tensor kl,"
    f" {', '.join(f'Tensor grad_{name}' for name in _OF_ELBO)})",
    objectives.elbo_loss,
    backward=f"(Tensor grad_loss, Tensor grad_log_likelihood, Tensor grad_kl, {_ELBO_TENSORS}, {_ELBO}, int needed)"
    f" -> ({', '.join(f'Tensor grad_{name}' for name in _OF_ELBO)})",
    tensors=9,
    differentiable=(0, 1, 2, 4, 5, 6, 7),
    differentiable_outputs=3,
    gradients=True,
)

_BOUND_TENSORS = (
    "Tensor decoder, Tensor? decoder_2, Tensor? decoder_3, Tensor x, Tensor z, Tensor mean, Tensor logvar,"
    " Tensor? prior_mean, Tensor? prior_logvar"
)
_BOUND = (
    "int dim, int event_ndims, str likelihood, float[] bins, int groups, float power, float elbo_weight, float scale,"
    " str reduction, int gradients"
)
_OF_BOUND = ("decoder", "decoder_2", "decoder_3", "z", "mean", "logvar", "prior_mean", "prior_logvar")

multi_sample_bound = FusedOp(
    f"multi_sample_bound({_BOUND_TENSORS}, {_BOUND}) -> (Tensor loss, Tensor log_w, Tensor bound, Tensor ess,"
    f" Tensor residual, {', '.join(f'Tensor grad_{name}' for name in _OF_BOUND)})",
    objectives.multi_sample_bound,
    backward=f"(Tensor grad_loss, Tensor grad_log_w, {_BOUND_TENSORS}, Tensor log_w, Tensor residual, {_BOUND},"
    f" int needed) -> ({', '.join(f'Tensor grad_{name}' for name in _OF_BOUND)})",
    tensors=9,
    differentiable=(0, 1, 2, 4, 5, 6, 7, 8),
    differentiable_outputs=2,
    saved=(1, 4),
    gradients=True,
)

closed_forms.attach(FusedOp.every)
