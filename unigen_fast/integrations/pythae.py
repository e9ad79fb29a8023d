"""pythae: the losses of its VAE, IWAE, CIWAE, MIWAE, PIWAE and BetaTCVAE."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from unigen_fast.divergence import gaussian_kl, gaussian_kl_monte_carlo, total_correlation
from unigen_fast.importance import ciwae_loss, iwae_loss
from unigen_fast.integrations import _patching

_PYTHAE = _patching.Library("pythae", "pythae")
_BOUND = "reports the bound, not its surrogate sum_k w~_k log w_k; same gradient"
_GROUPS = "weights normalised over the K samples of a group, not over the M groups; reports the bound"


def apply_to_pythae(*, check_version: bool = True, correct: bool = False) -> _patching.Patch:
    """`loss_function` of pythae's VAE, IWAE, CIWAE, MIWAE, PIWAE and BetaTCVAE, and of what inherits it.

    No `[B, K, D]` tensor is made beside the reconstruction itself, nor BetaTCVAE's `[B, B, D]`.

    With `correct`: IWAE and CIWAE report the bound rather than its surrogate (same gradient); MIWAE and PIWAE normalise
    the weights over the K samples of each of the M groups (Rainforth et al., 2018), where pythae does over the groups;
    BetaTCVAE's stratified weights are those of Chen et al. (2018), App. C.2, where pythae, as the published code, fills
    two columns in place of two diagonals.

    Args: as for every integration, see `unigen_fast.integrations`.
    """
    return _patching.apply("pythae", check_version=check_version, correct=correct)


def _reconstruction(self: Any, recon_x: Tensor, x: Tensor) -> Tensor:
    """Per row of `recon_x`, `[…, D]`; `x` broadcasts to it."""
    if self.model_config.reconstruction_loss == "mse":  # ½ |x - r|² is the KL of two normals of variance 1
        return gaussian_kl(recon_x, recon_x.new_zeros(()), x, event_ndims=1, reduction="none")
    return F.binary_cross_entropy(recon_x, x.expand_as(recon_x), reduction="none").sum(-1)


def _known(self: Any) -> bool:
    return self.model_config.reconstruction_loss in ("mse", "bce")


def _rows(self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """(reconstruction, KL by the sample) of each sample: of `[B, K, D]`, or of groups of them, `[B, M, K, D]`."""
    x = x.reshape(recon_x.shape[0], *[1] * (recon_x.dim() - 2), -1)
    standard = z.new_zeros(())
    kl = gaussian_kl_monte_carlo(z, mu, log_var, standard, standard, event_ndims=1, reduction="none")
    return _reconstruction(self, recon_x, x), kl


@_PYTHAE.replaces("pythae.models.vae.vae_model", "VAE.loss_function", accepted={"2a8ab432648efb6e": "0.1.2"})
def _vae(self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> Any:
    if not _known(self):
        return NotImplemented
    flat = (x.shape[0], -1)
    recon_loss = _reconstruction(self, recon_x.reshape(flat), x.reshape(flat)).mean()
    kl = gaussian_kl(mu, log_var)
    return recon_loss + kl, recon_loss, kl


@_PYTHAE.replaces(
    "pythae.models.iwae.iwae_model", "IWAE.loss_function", accepted={"e8bf8086f81db4de": "0.1.2"}, corrects=_BOUND
)
def _iwae(
    self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, *, correct: bool = False
) -> Any:
    if not _known(self):
        return NotImplemented
    recon_loss, kl = _rows(self, recon_x, x, mu, log_var, z)
    loss = iwae_loss(-(recon_loss + kl), dim=1, value="bound" if correct else "surrogate")
    return loss, recon_loss.mean(), kl.mean()


@_PYTHAE.replaces(
    "pythae.models.ciwae.ciwae_model", "CIWAE.loss_function", accepted={"c16e5038eb638ed9": "0.1.2"}, corrects=_BOUND
)
def _ciwae(
    self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, *, correct: bool = False
) -> Any:
    if not _known(self):
        return NotImplemented
    recon_loss, kl = _rows(self, recon_x, x, mu, log_var, z)
    log_w = -(recon_loss + kl)
    if correct:
        loss = ciwae_loss(log_w, dim=1, beta=self.beta)
    else:
        loss = (1 - self.beta) * iwae_loss(log_w, dim=1, value="surrogate") - self.beta * log_w.mean()
    return loss, recon_loss.mean(0), kl.mean(0)


@_PYTHAE.replaces(
    "pythae.models.miwae.miwae_model", "MIWAE.loss_function", accepted={"e97bf63522436b09": "0.1.2"}, corrects=_GROUPS
)
def _miwae(
    self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, *, correct: bool = False
) -> Any:
    if not _known(self):
        return NotImplemented
    recon_loss, kl = _rows(self, recon_x, x, mu, log_var, z)
    return _grouped(-(recon_loss + kl), correct), recon_loss.mean(0), kl.mean(0)


@_PYTHAE.replaces(
    "pythae.models.piwae.piwae_model", "PIWAE.loss_function", accepted={"ac64b2d6c00c91c1": "0.1.2"}, corrects=_GROUPS
)
def _piwae(
    self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, *, correct: bool = False
) -> Any:
    if not _known(self):
        return NotImplemented
    recon_loss, kl = _rows(self, recon_x, x, mu, log_var, z)
    log_w = -(recon_loss + kl)
    of_all = iwae_loss(log_w.flatten(1), dim=1, value="bound" if correct else "surrogate")
    return _grouped(log_w, correct), of_all, recon_loss.mean(0), kl.mean(0)


def _grouped(log_w: Tensor, correct: bool) -> Tensor:
    """MIWAE's loss of `[B, M, K]`."""
    return iwae_loss(log_w, dim=2) if correct else iwae_loss(log_w, dim=1, value="surrogate")


@_PYTHAE.replaces(
    "pythae.models.beta_tc_vae.beta_tc_vae_model",
    "BetaTCVAE.loss_function",
    accepted={"834eaa17044c6869": "0.1.2"},
    corrects="stratified weights on the diagonals, where the published code fills columns",
)
def _beta_tc_vae(
    self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, dataset_size: int,
    *, correct: bool = False,
) -> Any:  # fmt: skip
    batch = x.shape[0]
    if not _known(self) or not isinstance(dataset_size, int) or dataset_size < batch or batch < 2:
        return NotImplemented
    recon_loss = _reconstruction(self, recon_x.reshape(batch, -1), x.reshape(batch, -1)).mean()
    estimator = ("mss" if correct else "mss_columns") if self.use_mss else "mws"
    found = total_correlation(z, mu, log_var, dataset_size=dataset_size, estimator=estimator)
    regularisation = (
        self.alpha * found.mutual_information
        + self.beta * found.total_correlation
        + self.gamma * found.dimension_wise_kl
    ).mean()
    return recon_loss + regularisation, recon_loss, regularisation
