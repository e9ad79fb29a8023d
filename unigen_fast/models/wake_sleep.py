"""Wake-sleep: each phase minimises a KL over one side alone, with samples of the other (Eq. 14).

Let h be z, and let the wake phase optimise q_λ as well: a VAE. Let h be y: the sleep phase is a GAN's discriminator.
"""

from typing import Any

import torch
from torch import Tensor, nn

from unigen_fast import _checks
from unigen_fast.divergence import sample_gaussian
from unigen_fast.importance import rws_losses
from unigen_fast.likelihood import bernoulli_log_prob, gaussian_log_prob
from unigen_fast.models._likelihoods import Likelihood
from unigen_fast.models._memory import MAX_BYTES
from unigen_fast.models._model import Losses, Model, Prior, constants, phase, positive, tensors
from unigen_fast.models.variational import bound_in_chunks, decode_samples, gaussian_parameters


def _fair_coins(*shape: int, device: Any = None, dtype: Any = None) -> Tensor:
    return torch.randint(2, shape, device=device).to(dtype or torch.get_default_dtype())


class WakeSleep(Model):
    """Wake-sleep on p_θ(x|h) p(h) and q_λ(h|x).

    Phases, for a batch x:
        wake: E_data E_q(h|x)[-log p_θ(x|h)], over θ: the VAE's reconstruction term with q fixed
        sleep: E_p(h) E_p(x|h)[-log q_λ(h|x)], over λ: with h = y the GAN's discriminator loss

    Args:
        encoder: x to (mean, logvar) of q_λ(h|x), or to the logits of binary h.
        decoder: h `[N, latent…]` to the parameters of `likelihood`.
        latent: the size of h, or its shape.
        latents: "gaussian": h standard normal; "bernoulli": h of 0 and 1, alike probable.
        likelihood, likelihood_options: as in `elbo_loss`.

    Source: Hinton et al. (1995); Hu et al. (2018), Eq. 14.
    """

    of_paper = "Eq. 14"
    p = "p_θ(x|h): decoder"
    q = "q_λ(h|x): encoder"

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        latent: int | tuple[int, ...],
        latents: str = "gaussian",
        likelihood: str = "bernoulli",
        likelihood_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.latents = _checks.choice("latents", latents, ("gaussian", "bernoulli"))
        self.prior = Prior(latent, torch.randn if latents == "gaussian" else _fair_coins)
        self.likelihood = Likelihood(likelihood, likelihood_options)

    def posterior(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parameters of q_λ(h|x): (mean, logvar), or (logits,)."""
        encoded, shape = self.encoder(x), (len(x), *self.prior.shape)
        if self.latents == "gaussian":
            return gaussian_parameters(encoded, shape)
        if not isinstance(encoded, Tensor):
            raise TypeError(f"encoder: expected the logits of h, got {type(encoded).__name__}")
        if encoded.shape != shape:
            raise ValueError(f"encoder: got shape {tuple(encoded.shape)}, expected logits {shape}")
        return (encoded,)

    @constants()
    def draw(self, posterior: tuple[Tensor, ...], num_samples: int) -> Tensor:
        """h ~ q_λ(h|x) `[N, K, latent…]`, constants: neither phase differentiates through h."""
        if self.latents == "gaussian":
            return sample_gaussian(*posterior, num_samples=num_samples, sample_dim=1)
        (logits,) = posterior
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid().unsqueeze(1)
        return torch.bernoulli(wide.expand(-1, num_samples, *wide.shape[2:])).to(logits.dtype)

    def log_q(self, h: Tensor, posterior: tuple[Tensor, ...]) -> Tensor:
        """log q_λ(h|x) of h `[N, latent…]` or `[N, K, latent…]`, as rows."""
        event = len(self.prior.shape)
        if h.dim() > event + 1:
            posterior = tuple(t.unsqueeze(1) for t in posterior)
        if self.latents == "gaussian":
            return gaussian_log_prob(h, posterior[0], posterior[1], event_ndims=event)
        return bernoulli_log_prob(posterior[0], h, event_ndims=event)

    def log_p(self, x: Tensor, h: Tensor) -> Tensor:
        """log p_θ(x|h) + log p(h) `[N, K]` of h `[N, K, latent…]`."""
        decoded = decode_samples(self.decoder, h, (), x.dim())
        of_x = self.likelihood.of_samples().log_prob(decoded, x.unsqueeze(1), event_ndims=x.dim() - 1)
        zero, event = h.new_zeros(()), len(self.prior.shape)
        if self.latents == "gaussian":
            return of_x + gaussian_log_prob(h, zero, zero, event_ndims=event)
        return of_x + bernoulli_log_prob(torch.zeros_like(h), h, event_ndims=event)

    @phase(updates=("decoder",), minimises="KL(p_data(x) q_λ(h|x) ‖ p_θ(x,h))")
    def wake_phase(self, batch: Any) -> Losses:
        (x,) = tensors(batch, "x")
        with constants():
            h = self.draw(self.posterior(x), 1).squeeze(1)
        return {"loss": -self.likelihood.log_prob(self.decoder(h), x).mean()}

    @phase(updates=("encoder",), minimises="KL(p_θ(x,h) ‖ p_θ(x) q_λ(h|x))")
    def sleep_phase(self, batch: Any) -> Losses:
        (x,) = tensors(batch, "x")  # says how many to dream
        with constants():
            h = self.prior(len(x), self)
            dreamt = self.likelihood.sample(self.decoder(h), like=x)
        return {"loss": -self.log_q(h, self.posterior(dreamt)).mean()}

    @constants()
    def bound(self, batch: Any, num_samples: int = 1, *, max_bytes: int = MAX_BYTES) -> Tensor:
        """log (1/K) sum_k p(x, h_k) / q(h_k|x) for each example, in nats, without a gradient; `[N]`.

        Args:
            batch: as of `losses`.
            num_samples: K >= 1.
            max_bytes: as in `VAE.bound`.
        """

        def log_weights(n: int, posterior: tuple[Tensor, ...], x: Tensor) -> Tensor:
            h = self.draw(posterior, n)
            return self.log_p(x, h) - self.log_q(h, posterior)

        positive("num_samples", num_samples)
        return bound_in_chunks(self, self.posterior, log_weights, tensors(batch, "x"), num_samples, max_bytes)

    @constants()
    def sample(self, n: int, *, mean: bool = False) -> Tensor:
        """n samples x ~ p_θ(x|h), h ~ p(h); or the means of p_θ(x|h)."""
        return self.likelihood.sample(self.decoder(self.prior(n, self)), mean=mean)


class ReweightedWakeSleep(WakeSleep):
    """Wake-sleep whose wake phase weights K samples, w_k = p(x, h_k) / q(h_k|x), and updates both sides with them.

    Phases, for a batch x, h_k ~ q_λ(h|x), w~ = w / sum w without gradient:
        wake: E_data[-log (1/K) sum_k p_θ(x, h_k) / q(h_k|x)] over θ, E_data[-sum_k w~_k log q_λ(h_k|x)] over λ
        sleep: as in `WakeSleep`; it may be left out

    Args:
        num_samples: K.
        encoder, decoder, options: as in `WakeSleep`. The decoder is called with h `[N·K, …]`.

    Source: Bornschein and Bengio (2015); Le et al. (2019).
    """

    of_paper = "Eq. 14, with Sec. 3.1"

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        num_samples: int,
        **options: Any,
    ) -> None:
        super().__init__(encoder, decoder, **options)
        self.num_samples = positive("num_samples", num_samples)

    @phase(
        updates=("decoder", "encoder"),
        minimises="θ: −E log (1/K) Σₖ p_θ(x,hₖ) / q_λ(hₖ|x); λ: KL(p_data(x) p_θ(h|x) ‖ p_data(x) q_λ(h|x))",
    )
    def wake_phase(self, batch: Any) -> Losses:
        (x,) = tensors(batch, "x")
        posterior = self.posterior(x)
        h = self.draw(posterior, self.num_samples)
        wake, wake_inference = rws_losses(self.log_p(x, h), self.log_q(h, posterior), dim=1)
        return {"loss": wake + wake_inference, "theta": wake.detach(), "lambda": wake_inference.detach()}
