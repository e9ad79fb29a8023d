"""Every op's schema, once.

An op takes its tensors already broadcast to one shape (strides of 0 included) and its options already checked; what
each option means stands in the reference of the same name. `dim` None reduces over every dimension. Statistics and rows
are fp32 for fp16, bf16 and fp32, else fp64.
"""

from unigen_fast._fused import FusedOp
from unigen_fast.reference import adversarial, divergence, importance, likelihood, pairwise

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

# ---- likelihood ------------------------------------------------------------------------------------------------------

bernoulli_log_prob = FusedOp(
    "bernoulli_log_prob(Tensor logits, Tensor x, int event_ndims) -> Tensor",
    likelihood.bernoulli_log_prob,
    backward="(Tensor grad, Tensor logits, Tensor x, int event_ndims, int needed) -> (Tensor, Tensor)",
    tensors=2,
    differentiable=(0, 1),
)

# ---- pairwise --------------------------------------------------------------------------------------------------------

_ROWS = ("log_qz", "log_prod_qzi", "log_qzx", "mutual_information", "total_correlation", "dimension_wise_kl")
_TENSORS = "Tensor z, Tensor mean, Tensor logvar"

total_correlation = FusedOp(
    f"total_correlation({_TENSORS}, int dataset_size, str estimator)"
    f" -> ({', '.join(f'Tensor {name}' for name in _ROWS)}, Tensor statistics)",
    pairwise.total_correlation,
    backward=f"({', '.join(f'Tensor grad_{name}' for name in _ROWS)}, {_TENSORS}, Tensor statistics, int dataset_size,"
    " str estimator, int needed) -> (Tensor, Tensor, Tensor)",
    tensors=3,
    differentiable=(0, 1, 2),
    differentiable_outputs=6,
    saved=(6,),
)
mmd = FusedOp(
    "mmd(Tensor x, Tensor y, str kernel, str scales, bool unbiased) -> Tensor",
    pairwise.mmd,
    backward="(Tensor grad, Tensor x, Tensor y, str kernel, str scales, bool unbiased, int needed) -> (Tensor, Tensor)",
    tensors=2,
    differentiable=(0, 1),
)
