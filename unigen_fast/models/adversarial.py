"""One formulation, Eq. 3: samples of p_θ(x|y=1) and of p_θ(x|y=0), a discriminator q_φ(y|x) that tells them apart, and
what is trained to make it answer the reverse, q^r_φ(y|x) = q_φ(1-y|x).

    max_φ  E_{p_θ(x|y) p(y)}[ log q_φ(y|x) ]        max_θ  E_{p_θ(x|y) p(y)}[ log q^r_φ(y|x) ]

p(y) is uniform; as in the paper its factor is dropped, so each side counts by its own mean. A model says what the two
sides are: `real(batch)` and `fake(batch)` give the discriminator's inputs for y = 1 and y = 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unigen_fast import _checks, distributed
from unigen_fast.adversarial import (
    discriminator_loss,
    generator_loss,
    importance_weighted_generator_loss,
    log_discriminator,
)
from unigen_fast.likelihood import categorical_log_prob, gaussian_log_prob, laplace_log_prob
from unigen_fast.models._likelihoods import Likelihood
from unigen_fast.models._model import (
    Losses,
    Model,
    Prior,
    conditioned,
    constants,
    draw_labels,
    frozen,
    phase,
    positive,
    same_length,
    tensors,
)

TELL_APART = "KL(p_θ(y|x) ‖ q_φ(y|x))"
PASS_FOR_REAL = "KL(p_θ(x|y) ‖ q^r(x|y)) − JSD(p_θ(x|0) ‖ p_θ(x|1))"


class Discriminated(Model):
    """A model with a discriminator, trained as every discriminator of the paper is."""

    discriminator: nn.Module

    def real(self, batch: Any) -> tuple[Tensor, ...]:
        """The discriminator's inputs: samples of p_θ(x|y=1)."""
        raise NotImplementedError

    def fake(self, batch: Any) -> tuple[Tensor, ...]:
        """The discriminator's inputs: samples of p_θ(x|y=0)."""
        raise NotImplementedError

    @phase(updates=("discriminator",), minimises=TELL_APART)
    def discriminator_phase(self, batch: Any) -> Losses:
        with constants():
            real, fake = self.real(batch), self.fake(batch)
        return tell_apart(real=self.discriminator(*real), fake=self.discriminator(*fake))


def tell_apart(*, real: Tensor, fake: Tensor) -> Losses:
    """-E[log q_φ(y|x)], and from the same pass how right the discriminator is."""
    loss, stats = discriminator_loss(real=real, fake=fake, return_stats=True)
    return {
        "loss": loss,
        "real_accuracy": stats.real_accuracy,
        "fake_accuracy": stats.fake_accuracy,
        "real_probability": stats.real_mean_probability,
        "fake_probability": stats.fake_mean_probability,
    }


class GAN(Discriminated):
    """Generative adversarial network: p_θ(x|y=0) is the generator's x = G_θ(z), p_θ(x|y=1) the data.

    Phases, for a batch x `[N, …]`:
        discriminator: E_data[-log D(x)] + E_z[-log(1 - D(G(z)))]
        generator: E_z[-log D(G(z))], the non-saturating loss (Eq. 5)

    Args:
        generator: z `[N, latent…]` to x.
        discriminator: x to logits of D(x) = q_φ(y=1|x), of any shape (one number, or one for each patch).
        latent: the size of z, or its shape.
        noise: draws z: `noise(N, *latent, device=…, dtype=…)`.

    Source: Goodfellow et al. (2014); Hu et al. (2018), Eq. 3 to 6 (Lemma 1).
    """

    of_paper = "Eq. 3–6"
    p = "p_θ(x|y): generator (y=0), data (y=1)"
    q = "q_φ(y|x): discriminator"

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        latent: int | tuple[int, ...],
        noise: Callable[..., Tensor] = torch.randn,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator
        self.prior = Prior(latent, noise)

    def real(self, batch: Any) -> tuple[Tensor, ...]:
        return tensors(batch, "x")

    def fake(self, batch: Any) -> tuple[Tensor, ...]:
        x, *condition = self.real(batch)
        return self.generator(self.prior(len(x), self), *condition), *condition

    @phase(updates=("generator",), minimises=PASS_FOR_REAL)
    def generator_phase(self, batch: Any) -> Losses:
        fake = self.fake(batch)
        return {"loss": self.generator_loss(frozen(self.discriminator)(*fake), fake)}

    def generator_loss(self, logits: Tensor, fake: tuple[Tensor, ...]) -> Tensor:
        """-E[log q^r_φ(y=0|x)] of the logits of these samples."""
        return generator_loss(fake=logits)

    @constants()
    def sample(self, n: int) -> Tensor:
        return self.generator(self.prior(n, self))


class ConditionalGAN(GAN):
    """GAN given a condition c: p_θ(x|y=0, c) is x = G_θ(z, c), p_θ(x|y=1, c) the data of that condition.

    The phases are the GAN's, for a batch (x, c); generated samples have the batch's conditions.

    Args:
        generator: (z, c) to x. discriminator: (x, c) to logits.
        num_classes: where c is a label `[N]` of 0 … num_classes-1: `sample` can draw it.
        options: latent, noise: as in `GAN`.

    Source: Mirza and Osindero (2014); Hu et al. (2018), Sec. 4.1.
    """

    of_paper = "Sec. 4.1"
    p = "p_θ(x|y,c): generator (y=0), data (y=1)"
    q = "q_φ(y|x,c): discriminator"

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        num_classes: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(generator, discriminator, **options)
        self.num_classes = None if num_classes is None else positive("num_classes", num_classes)

    def real(self, batch: Any) -> tuple[Tensor, ...]:
        return conditioned(batch)

    @constants()
    def sample(self, n: int, condition: Tensor | None = None) -> Tensor:
        """n samples, of labels drawn uniformly or of the condition `[n, …]`."""
        if condition is None:
            condition = draw_labels(n, self.num_classes, self)
        return self.generator(self.prior(n, self), condition)


class IWGAN(GAN):
    """Importance-weighted GAN: the GAN but for its generator's loss, k being the minibatch.

    Phases: discriminator as in `GAN`;
        generator: sum_i w~_i · -log D(x_i), w~ = w / sum w without gradient, w_i = q^r(y=0|x_i) / q(y=0|x_i) = D/(1-D)

    The bound is L_k = E[log (1/k) sum_i w_i]; for k = 1 it is the GAN's KL, and a batch of one gives the GAN's loss.
    Eq. 16 weighs samples, each with one D(x_i). Where a discriminator of patches gives several logits for each, every
    place has its own k weights, and the loss is the mean over places: this choice keeps that a batch of one gives the
    GAN's loss.

    Args:
        group: of processes whose minibatches are k together, see `unigen_fast.distributed`; None: this one's is.
        generator, options: as in `GAN`. discriminator: x to logits, one for each example, or `[N, …]`.

    Source: Hu et al. (2018), Eq. 15 and 16; k is the minibatch as in its Sec. 3.1.
    """

    of_paper = "Eq. 15–16"

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        group: distributed.Group = None,
        **options: Any,
    ) -> None:
        super().__init__(generator, discriminator, **options)
        self.group = group

    @phase(updates=("generator",), minimises="−E log (1/k) Σᵢ q^r(y|xᵢ) p_θ₀(xᵢ) / p_θ(xᵢ|y), xᵢ ~ p_θ(x|y)")
    def generator_phase(self, batch: Any) -> Losses:
        return super().generator_phase(batch)

    def generator_loss(self, logits: Tensor, fake: tuple[Tensor, ...]) -> Tensor:
        return _importance_weighted(logits, len(fake[0]), None, self.group)


def _importance_weighted(logits: Tensor, k: int, labels: Tensor | None, group: distributed.Group) -> Tensor:
    """Eq. 16 for each place of the logits `[k, …]`, the mean over places: and over labels, where they are given."""
    if logits.dim() == 0 or len(logits) != k:
        raise ValueError(f"discriminator: got logits of shape {tuple(logits.shape)}, expected [{k}, …], examples first")
    options: dict[str, Any] = {} if logits.numel() == k else {"dim": 0}
    if labels is not None:
        if labels.shape != (k,):
            raise ValueError(f"batch: got labels of shape {tuple(labels.shape)}, expected ({k},) with per_class=True")
        places = logits.numel() // max(1, k)
        of_places = labels.unsqueeze(1) * places + torch.arange(places, device=labels.device)
        options = {"groups": of_places.flatten()}  # a group for each label at each place
    if group is None:
        return importance_weighted_generator_loss(fake=logits, **options)
    return distributed.importance_weighted_generator_loss(fake=logits, group=group, **options)


class IWConditionalGAN(ConditionalGAN):
    """Importance-weighted conditional GAN: `ConditionalGAN` with the generator's loss of `IWGAN`.

    Args:
        per_class: normalise the weights among the samples of one label, the mean over labels being the loss, and not
            over the whole minibatch. The paper does not say which of the two it means; the default, the minibatch as
            in its IWGAN, is our choice.
        group: as in `IWGAN`.
        generator, discriminator, options: as in `ConditionalGAN`.

    Source: Hu et al. (2018), Sec. 4.1 and Eq. 16.
    """

    of_paper = "Sec. 4.1, Eq. 16"

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        per_class: bool = False,
        group: distributed.Group = None,
        **options: Any,
    ) -> None:
        super().__init__(generator, discriminator, **options)
        self.per_class = per_class
        self.group = group

    @phase(updates=("generator",), minimises="−E log (1/k) Σᵢ q^r(y|xᵢ,c) p_θ₀(xᵢ|c) / p_θ(xᵢ|y,c)")
    def generator_phase(self, batch: Any) -> Losses:
        return super().generator_phase(batch)

    def generator_loss(self, logits: Tensor, fake: tuple[Tensor, ...]) -> Tensor:
        return _importance_weighted(logits, len(fake[0]), fake[1] if self.per_class else None, self.group)


class Code(NamedTuple):
    """A code of InfoGAN: z `[N, latent + categories + continuous]` and what of it is to be inferred."""

    z: Tensor
    category: Tensor | None  # [N]
    continuous: Tensor | None  # [N, continuous]


class InfoGAN(GAN):
    """GAN with an inference network q_η(z|x) that reads the code off the generated sample.

    Phases, for a batch x:
        discriminator: as in `GAN` (Eq. 9, of which q_η has no part in φ)
        generator: E_z[-log D(G(z)) - info_weight · log q_η(z|G(z))], over θ and η (Eq. 10)

    z is [noise, one-hot category, continuous code], of which the last two are inferred. The paper's q_η infers all of
    z: that is `latent=0` here. Continuous codes are drawn as the noise is, and inferred as a diagonal Gaussian.

    Args:
        generator: z `[N, latent + categories + continuous]` to x. discriminator: x to logits.
        inference: x to (logits `[N, categories]`, mean, logvar `[N, continuous]`), without what is not asked for.
        latent: size of the noise that is not inferred, at least 0.
        categories: classes of the category, 0 for none. continuous: size of the continuous code.
        info_weight: lambda of InfoGAN.
        noise: as in `GAN`.

    Source: Chen et al. (2016); Hu et al. (2018), Eq. 9 and 10.
    """

    of_paper = "Eq. 9–10"
    q = "q_φ(y|x): discriminator; q_η(z|x,y): infer net"

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        inference: nn.Module,
        *,
        latent: int,
        categories: int = 0,
        continuous: int = 0,
        info_weight: float = 1.0,
        noise: Callable[..., Tensor] = torch.randn,
    ) -> None:
        for name, size in (("latent", latent), ("categories", categories), ("continuous", continuous)):
            positive(name, size, least=0)
        if categories + continuous == 0:
            raise ValueError(
                f"categories, continuous: got {categories} and {continuous}, expected a code to infer, at least one of "
                "them above 0"
            )
        super().__init__(generator, discriminator, latent=latent + categories + continuous, noise=noise)
        self.inference = inference
        self.categories, self.continuous = categories, continuous
        self.info_weight = _checks.number("info_weight", info_weight)

    def code(self, n: int) -> Code:
        """n codes z ~ p(z)."""
        z = self.prior(n, self)
        category = continuous = None
        if self.continuous:
            continuous = z[:, z.size(1) - self.continuous :]
        if self.categories:
            category = draw_labels(n, self.categories, self)
            start = z.size(1) - self.categories - self.continuous
            one_hot = F.one_hot(category, self.categories).to(z.dtype)
            z = torch.cat([part for part in (z[:, :start], one_hot, continuous) if part is not None], 1)
        return Code(z, category, continuous)

    def log_code(self, inferred: Any, code: Code) -> Tensor:
        """log q_η(z|x) `[N]` of the parameters that the inference network gave."""
        found = (inferred,) if isinstance(inferred, Tensor) else tuple(inferred)
        expected = bool(self.categories) + 2 * bool(self.continuous)
        if len(found) != expected:
            names = ["logits"] * bool(self.categories) + ["mean", "logvar"] * bool(self.continuous)
            raise ValueError(f"inference: got {len(found)} tensors, expected ({', '.join(names)})")
        rows: list[Tensor] = []
        if code.category is not None:
            rows.append(categorical_log_prob(found[0], code.category))
        if code.continuous is not None:
            rows.append(gaussian_log_prob(code.continuous, *found[-2:]))
        return sum(rows[1:], rows[0])

    def fake(self, batch: Any) -> tuple[Tensor, ...]:
        return (self.generator(self.code(len(self.real(batch)[0])).z),)

    @phase(updates=("generator", "inference"), minimises="KL(p_θ(x|y) ‖ q^r(x|z,y)) − JSD(p_θ(x|0) ‖ p_θ(x|1))")
    def generator_phase(self, batch: Any) -> Losses:
        code = self.code(len(self.real(batch)[0]))
        x = self.generator(code.z)
        adversarial = generator_loss(fake=frozen(self.discriminator)(x))
        log_code = self.log_code(self.inference(x), code).mean()
        return {
            "loss": adversarial - self.info_weight * log_code,
            "adversarial": adversarial.detach(),
            "log_code": log_code.detach(),
        }

    @constants()
    def sample(self, n: int) -> Tensor:
        return self.generator(self.code(n).z)


class AdversarialAutoencoder(Discriminated):
    """InfoGAN with x and z swapped: p_θ(z|y=0) are the codes z = E_θ(x) of data, p_θ(z|y=1) is the prior.

    Phases, for a batch x:
        discriminator: E_p(z)[-log D(z)] + E_data[-log(1 - D(E(x)))]
        autoencoder: E_data[-adversary_weight · log D(E(x)) - log q_η(x|E(x))], over θ and η

    Args:
        encoder: x to z `[N, latent…]`. decoder: z to the parameters of `likelihood`, of q_η(x|z).
        discriminator: z to logits of q_φ(y=1|z).
        latent, noise: the shape of z, and the prior that draws it.
        likelihood, likelihood_options: as in `elbo_loss`.
        adversary_weight: 1 in the formulation.

    Source: Makhzani et al. (2015); Hu et al. (2018), supplement ("InfoGAN with x and z swapped").
    """

    of_paper = "Sec. 3.2, supp. D"
    p = "p_θ(z|y): encoder of data (y=0), prior (y=1)"
    q = "q_φ(y|z): discriminator; q_η(x|z,y): decoder"

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        discriminator: nn.Module,
        *,
        latent: int | tuple[int, ...],
        likelihood: str = "bernoulli",
        likelihood_options: dict[str, Any] | None = None,
        adversary_weight: float = 1.0,
        noise: Callable[..., Tensor] = torch.randn,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.discriminator = encoder, decoder, discriminator
        self.prior = Prior(latent, noise)
        self.likelihood = Likelihood(likelihood, likelihood_options)
        self.adversary_weight = _checks.number("adversary_weight", adversary_weight)

    def real(self, batch: Any) -> tuple[Tensor, ...]:
        (x,) = tensors(batch, "x")
        return (self.prior(len(x), self),)

    def fake(self, batch: Any) -> tuple[Tensor, ...]:
        (x,) = tensors(batch, "x")
        return (self.encoder(x),)

    @phase(updates=("discriminator",), minimises="KL(p_θ(y|z) ‖ q_φ(y|z))")
    def discriminator_phase(self, batch: Any) -> Losses:
        return super().discriminator_phase(batch)

    @phase(updates=("encoder", "decoder"), minimises="KL(p_θ(z|y) ‖ q^r(z|x,y)) − JSD(p_θ(z|0) ‖ p_θ(z|1))")
    def autoencoder_phase(self, batch: Any) -> Losses:
        (x,) = tensors(batch, "x")
        z = self.encoder(x)
        adversarial = generator_loss(fake=frozen(self.discriminator)(z))
        log_likelihood = self.likelihood.log_prob(self.decoder(z), x).mean()
        return {
            "loss": self.adversary_weight * adversarial - log_likelihood,
            "adversarial": adversarial.detach(),
            "log_likelihood": log_likelihood.detach(),
        }

    @constants()
    def sample(self, n: int, *, mean: bool = False) -> Tensor:
        """n samples x ~ q_η(x|z), z ~ p(z); or the means of q_η(x|z)."""
        return self.likelihood.sample(self.decoder(self.prior(n, self)), mean=mean)


class PredictabilityMinimization(Model):
    """Codes none of whose units the others predict: an adversarial autoencoder whose discriminator predicts units.

    The code h = sigma(E_θ(x)) has L units in (0, 1). Phases, for a batch x:
        predictor: E[-sum_i log q_φ(h_i|h_-i)], q_φ a Gaussian of variance 1: the predictors' squared errors
        autoencoder: E[predictability_weight · sum_i log q_φ(h_i|h_-i) - log q_η(x|h)], over θ and η

    The paper says that AAE "closely resembles" this method; the code units between 0 and 1 and the squared error are
    Schmidhuber's, the decoder that keeps the code informative, in place of his variance term, is our choice.

    Args:
        encoder: x to the logits of h `[N, L]`. decoder: h to the parameters of `likelihood`.
        predictors: L networks; the i-th takes the other units `[N, L-1]`, in their order, and gives h_i `[N, 1]`.
        likelihood, likelihood_options: as in `elbo_loss`.
        predictability_weight: 1 in the formulation.

    Source: Schmidhuber, "Learning factorial codes by predictability minimization" (1992); Hu et al. (2018), supplement.
    """

    of_paper = "Sec. 3.2, supp. D"
    p = "p_θ(h): code of data"
    q = "q_φ(hᵢ|h₋ᵢ): predictors; q_η(x|h): decoder"

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        predictors: nn.ModuleList,
        *,
        likelihood: str = "bernoulli",
        likelihood_options: dict[str, Any] | None = None,
        predictability_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if len(predictors) < 2:
            raise ValueError(f"predictors: got {len(predictors)}, expected one for each of at least 2 units")
        self.encoder, self.decoder, self.predictors = encoder, decoder, predictors
        self.likelihood = Likelihood(likelihood, likelihood_options)
        self.predictability_weight = _checks.number("predictability_weight", predictability_weight)

    def code(self, x: Tensor) -> Tensor:
        """h `[N, L]`."""
        logits = self.encoder(x)
        if logits.dim() != 2 or logits.size(1) != len(self.predictors):
            raise ValueError(
                f"encoder: got shape {tuple(logits.shape)}, expected [N, {len(self.predictors)}], a unit for each "
                "predictor"
            )
        return logits.sigmoid()

    def log_predictions(self, h: Tensor, *, constant_predictors: bool) -> Tensor:
        """sum_i log q_φ(h_i|h_-i) `[N]`."""
        predicted = [
            (frozen(predictor) if constant_predictors else predictor)(torch.cat((h[:, :i], h[:, i + 1 :]), 1))
            for i, predictor in enumerate(self.predictors)
        ]
        return gaussian_log_prob(h, torch.cat(predicted, 1), h.new_zeros(()))

    @phase(updates=("predictors",), minimises="Σᵢ KL(p_θ(hᵢ|h₋ᵢ) ‖ q_φ(hᵢ|h₋ᵢ))")
    def predictor_phase(self, batch: Any) -> Losses:
        (x,) = tensors(batch, "x")
        with constants():
            h = self.code(x)
        return {"loss": -self.log_predictions(h, constant_predictors=False).mean()}

    @phase(updates=("encoder", "decoder"), minimises="E Σᵢ log q_φ(hᵢ|h₋ᵢ) − E log q_η(x|h)")
    def autoencoder_phase(self, batch: Any) -> Losses:
        (x,) = tensors(batch, "x")
        h = self.code(x)
        predictability = self.log_predictions(h, constant_predictors=True).mean()
        log_likelihood = self.likelihood.log_prob(self.decoder(h), x).mean()
        return {
            "loss": self.predictability_weight * predictability - log_likelihood,
            "predictability": predictability.detach(),
            "log_likelihood": log_likelihood.detach(),
        }


class CycleGAN(Model):
    """Two domains x and z, translated into each other: z to x by InfoGAN's objectives, x to z by those of the AAE.

    Phases, for a batch (x, z) of unpaired examples:
        discriminator: a GAN's discriminator loss in each domain
        generator: E_z[-log D_x(x^) - cycle_weight · log q_η(z|x^)], x^ = z_to_x(z), q_η that of x_to_z,
            + E_x[-log D_z(z^) - cycle_weight · log q_η(x|z^)], z^ = x_to_z(x), q_η that of z_to_x

    q_η is a Laplace distribution of scale 1, its log-density a mean over the dimensions and not their sum, as in
    CycleGAN's L1 cycle loss. The logistic losses are the paper's; CycleGAN's own code has least squares.

    Args:
        x_to_z, z_to_x: translators. discriminator_x, discriminator_z: to logits.
        cycle_weight: lambda of CycleGAN.

    Source: Zhu et al. (2017); Hu et al. (2018), supplement.
    """

    of_paper = "supp. D"
    p = "p_θ(x|y), p_θ(z|y): translation (y=0), data (y=1)"
    q = "q_φ(y|x), q_φ(y|z): discriminators; q_η(z|x), q_η(x|z): the way back"

    def __init__(
        self,
        x_to_z: nn.Module,
        z_to_x: nn.Module,
        discriminator_x: nn.Module,
        discriminator_z: nn.Module,
        *,
        cycle_weight: float = 10.0,
    ) -> None:
        super().__init__()
        self.x_to_z, self.z_to_x = x_to_z, z_to_x
        self.discriminator_x, self.discriminator_z = discriminator_x, discriminator_z
        self.cycle_weight = _checks.number("cycle_weight", cycle_weight)

    @phase(
        updates=("discriminator_x", "discriminator_z"),
        minimises="KL(p_θ(y|x) ‖ q_φ(y|x)) + KL(p_θ(y|z) ‖ q_φ(y|z))",
    )
    def discriminator_phase(self, batch: Any) -> Losses:
        x, z = tensors(batch, "x", "z")
        with constants():
            fake_x, fake_z = self.z_to_x(z), self.x_to_z(x)
        of_x = tell_apart(real=self.discriminator_x(x), fake=self.discriminator_x(fake_x))
        of_z = tell_apart(real=self.discriminator_z(z), fake=self.discriminator_z(fake_z))
        parts = {
            f"{key}_{domain}": value.detach() for domain, of in (("x", of_x), ("z", of_z)) for key, value in of.items()
        }
        return {"loss": of_x["loss"] + of_z["loss"]} | parts

    @phase(
        updates=("x_to_z", "z_to_x"),
        minimises="KL(p_θ(x|y) ‖ q^r(x|z,y)) − JSD + KL(p_θ(z|y) ‖ q^r(z|x,y)) − JSD",
    )
    def generator_phase(self, batch: Any) -> Losses:
        x, z = tensors(batch, "x", "z")
        fake_x, fake_z = self.z_to_x(z), self.x_to_z(x)
        adversarial = generator_loss(fake=frozen(self.discriminator_x)(fake_x))
        adversarial = adversarial + generator_loss(fake=frozen(self.discriminator_z)(fake_z))
        cycle = _mean_laplace(z, self.x_to_z(fake_x)) + _mean_laplace(x, self.z_to_x(fake_z))
        return {
            "loss": adversarial - self.cycle_weight * cycle,
            "adversarial": adversarial.detach(),
            "log_cycle": cycle.detach(),
        }


def _mean_laplace(x: Tensor, mean: Tensor) -> Tensor:
    """The mean log-density of one dimension, of scale 1."""
    if mean.shape != x.shape:
        raise ValueError(f"cycle: got shape {tuple(mean.shape)}, expected {tuple(x.shape)}, that of its domain")
    return laplace_log_prob(x, mean, mean.new_zeros(()), event_ndims=0).mean()


class AdversarialDomainAdaptation(Discriminated):
    """Features x = G_θ(z) of data z that do not tell the domain: y = 1 the labelled source, y = 0 the target.

    Phases, for a batch (source, labels, target):
        discriminator: E_source[-log D(x)] + E_target[-log(1 - D(x))]  (Eq. 1)
        generator: adversary_weight · ( E_source[-log(1 - D(x))] + E_target[-log D(x)] ) (Eq. 2)
            - E_source[log f_ω(label|x)], over θ and ω

    Args:
        features: G_θ, of data to features. classifier: f_ω, of features to logits of the classes.
        discriminator: of features to logits of q_φ(y=1|x).
        adversary_weight: 1 in the formulation.

    Source: Ganin et al. (2016); Hu et al. (2018), Eq. 1 and 2; the classifier's term: its supplement.
    """

    of_paper = "Eq. 1–2"
    p = "p_θ(x|y): features of target (y=0) and source (y=1)"
    q = "q_φ(y|x): discriminator"

    def __init__(
        self, features: nn.Module, classifier: nn.Module, discriminator: nn.Module, *, adversary_weight: float = 1.0
    ) -> None:
        super().__init__()
        self.features, self.classifier, self.discriminator = features, classifier, discriminator
        self.adversary_weight = _checks.number("adversary_weight", adversary_weight)

    def real(self, batch: Any) -> tuple[Tensor, ...]:
        source, labels, _ = tensors(batch, "source", "labels", "target")
        same_length(source=source, labels=labels)
        return (self.features(source),)

    def fake(self, batch: Any) -> tuple[Tensor, ...]:
        return (self.features(tensors(batch, "source", "labels", "target")[2]),)

    @phase(updates=("features", "classifier"), minimises=f"{PASS_FOR_REAL} − E log f_ω(t|x)")
    def generator_phase(self, batch: Any) -> Losses:
        (source,), (target,) = self.real(batch), self.fake(batch)
        discriminator = frozen(self.discriminator)
        adversarial = generator_loss(fake=discriminator(target))
        adversarial = adversarial - log_discriminator(discriminator(source), 1, reversed=True).mean()
        log_label = categorical_log_prob(self.classifier(source), batch[1]).mean()
        return {
            "loss": self.adversary_weight * adversarial - log_label,
            "adversarial": adversarial.detach(),
            "log_label": log_label.detach(),
        }

    def predict(self, x: Tensor) -> Tensor:
        """Logits of the classes."""
        return self.classifier(self.features(x))
