"""The other direction: KL(q_η(z|x,y) q^r(y|x) ‖ p_θ(z,y|x)), Eq. 12, in which θ stands on the right.

With the perfect discriminator q_* (1 on data, 0 on what is generated) q^r_*(y=0|x) is 1 on data, and the KL is the
VAE's (Lemma 2). With a learned one, q^r_φ(y=0|x) = D(x), it is the adversary-activated VAE's (Eq. 17): each example of
the mixture p_θ0(x), half data, half samples of the model, counts D(x).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unigen_fast import _checks
from unigen_fast.adversarial import generator_loss, log_discriminator
from unigen_fast.divergence import categorical_kl, sample_gaussian, sample_gaussian_with_kl
from unigen_fast.likelihood import categorical_log_prob, gaussian_log_prob
from unigen_fast.models._likelihoods import Likelihood
from unigen_fast.models._memory import MAX_BYTES, Chunks, blocks
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
from unigen_fast.models.adversarial import TELL_APART, Discriminated, tell_apart
from unigen_fast.objectives import Bound, elbo_loss, iwae_objective, streaming_log_likelihood
from unigen_fast.reference._common import weigh

PERFECT = "KL(q_η(z|x,y) q^r_*(y|x) ‖ p_θ(z,y|x))"
ACTIVATED = "KL(q_η(z|x,y) q^r_φ(y|x) ‖ p_θ(z,y|x))"

_FAKES = ("sample", "mean")
_ESTIMATOR_OPTIONS = ("num_groups", "beta", "alpha", "order", "partition")


class VAE(Model):
    """Variational autoencoder: p_θ(x|z) the decoder, q_η(z|x) the encoder, and a discriminator degenerated to q_*.

    Phase, for a batch x `[N, …]`:
        autoencoder: E_data[-E_q(z|x)[log p_θ(x|z)] + kl_weight · KL(q_η(z|x) ‖ p(z))], over θ and η (Eq. 11)

    Args:
        encoder: x to (mean, logvar) of q_η(z|x), each `[N, latent…]`.
        decoder: z to the parameters of `likelihood`, one tensor or several.
        latent: the size of z, or its shape; p(z) is the standard normal.
        likelihood, likelihood_options: as in `elbo_loss`; all dimensions of x but the first are one event.
        kl_weight: 1 for the bound, beta of a beta-VAE.

    Source: Kingma and Welling (2014); Hu et al. (2018), Eq. 11 to 13 (Lemma 2).
    """

    of_paper = "Eq. 11–13"
    p = "p_θ(x|z,y): decoder (y=0), data (y=1)"
    q = "q_η(z|x,y): encoder; q_*(y|x): perfect discriminator"

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        latent: int | tuple[int, ...],
        likelihood: str = "bernoulli",
        likelihood_options: dict[str, Any] | None = None,
        kl_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.prior = Prior(latent)
        self.likelihood = Likelihood(likelihood, likelihood_options)
        self.kl_weight = _checks.number("kl_weight", kl_weight)

    def examples(self, batch: Any) -> tuple[Tensor, ...]:
        """x, and what it is conditioned on: the encoder's inputs."""
        return tensors(batch, "x")

    @phase(updates=("encoder", "decoder"), minimises=PERFECT)
    def autoencoder_phase(self, batch: Any) -> Losses:
        bound = self.negative_bound(*self.examples(batch))
        return {
            "loss": bound.loss,
            "log_likelihood": bound.log_likelihood.detach().mean(),
            "kl": bound.kl.detach().mean(),
        }

    def negative_bound(
        self, x: Tensor, *condition: Tensor, weights: Tensor | None = None, reduction: str = "mean"
    ) -> Bound:
        """Eq. 11, of one z for each example, the examples weighted."""
        mean, logvar = self.posterior(x, *condition)
        z = sample_gaussian(mean, logvar)
        return self._bound_of(self.decoder(z, *condition), x, mean, logvar, self.kl_weight, weights, reduction)

    def _bound_of(
        self,
        decoded: Any,
        x: Tensor,
        mean: Tensor,
        logvar: Tensor,
        kl_weight: float,
        weights: Tensor | None,
        reduction: str,
    ) -> Bound:
        return elbo_loss(
            decoded,
            x,
            mean,
            logvar,
            likelihood=self.likelihood.name,
            likelihood_options=self.likelihood.options,
            event_ndims=x.dim() - 1,
            kl_weight=kl_weight,
            weights=weights,
            reduction=reduction,
        )

    def posterior(self, x: Tensor, *condition: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, logvar) of q_η(z|x)."""
        return gaussian_parameters(self.encoder(x, *condition), (len(x), *self.prior.shape))

    @constants()
    def bound(self, batch: Any, num_samples: int = 1, *, max_bytes: int = MAX_BYTES) -> Tensor:
        """A lower bound of log p_θ(x) for each example, in nats, without a gradient; `[N]`.

        The ELBO for one sample, its KL in closed form; beyond, log (1/K) sum_k p(x, z_k) / q(z_k|x): with 5000 samples,
        the field's estimate of log p(x). Other than the loss it knows no `kl_weight`.

        Args:
            batch: as of `losses`.
            num_samples: K >= 1.
            max_bytes: of tensors that encoder and decoder may hold at a time; examples and samples pass them in chunks
                as large as that allows, of one row at least. Their parameters, the batch and the workspace inside of a
                PyTorch function come on top.
        """
        positive("num_samples", num_samples)
        return self._bound(num_samples, max_bytes, self.examples(batch), lambda *examples: examples)

    def _bound(
        self, num_samples: int, max_bytes: int, rows: Sequence[Tensor], examples: Callable[..., Sequence[Tensor]]
    ) -> Tensor:
        """The bound of `examples(*rows)`, made as they are needed."""

        def encode(*rows: Tensor) -> tuple[Tensor, Tensor]:
            return self.posterior(*examples(*rows))

        def log_weights(n: int, posterior: tuple[Tensor, Tensor], *rows: Tensor) -> Tensor:
            x, *condition = examples(*rows)
            mean, logvar = posterior
            if num_samples == 1:
                decoded = self.decoder(sample_gaussian(mean, logvar), *condition)
                return -self._bound_of(decoded, x, mean, logvar, 1.0, None, "none").loss.unsqueeze(1)
            z = sample_gaussian(mean, logvar, num_samples=n, sample_dim=1)
            return self._multi_sample(x, condition, z, mean, logvar, reduction="none").log_w

        return bound_in_chunks(self, encode, log_weights, rows, num_samples, max_bytes)

    def _multi_sample(self, x: Tensor, condition: Any, z: Tensor, mean: Tensor, logvar: Tensor, **options: Any) -> Any:
        return iwae_objective(
            decode_samples(self.decoder, z, condition, x.dim()),
            x,
            z,
            mean,
            logvar,
            dim=1,
            likelihood=self.likelihood.name,
            likelihood_options=self.likelihood.of_samples().options,
            event_ndims=x.dim() - 1,
            **options,
        )

    @constants()
    def sample(self, n: int, *, mean: bool = False) -> Tensor:
        """n samples x ~ p_θ(x|z), z ~ p(z); or the means of p_θ(x|z), as pictures of digits are shown."""
        return self._decoded_sample(self.prior(n, self), mean=mean)

    def _decoded_sample(self, z: Tensor, *condition: Tensor, mean: bool, like: Tensor | None = None) -> Tensor:
        return self.likelihood.sample(self.decoder(z, *condition), mean=mean, like=like)


class ConditionalVAE(VAE):
    """VAE given a condition c: p_θ(x|z, c), q_η(z|x, c), and the prior p(z) for every c.

    The phase is the VAE's, for a batch (x, c). That the prior does not depend on c is our choice.

    Args:
        encoder: (x, c) to (mean, logvar). decoder: (z, c) to the likelihood's parameters.
        num_classes: where c is a label `[N]` of 0 … num_classes-1: `sample` can draw it.
        options: latent, likelihood, likelihood_options, kl_weight: as in `VAE`.

    Source: Sohn, Lee, Yan (2015); Hu et al. (2018), Sec. 4.2.
    """

    of_paper = "Sec. 4.2"
    p = "p_θ(x|z,y,c): decoder (y=0), data (y=1)"
    q = "q_η(z|x,y,c): encoder; q_*(y|x,c): perfect discriminator"

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, *, num_classes: int | None = None, **options: Any
    ) -> None:
        super().__init__(encoder, decoder, **options)
        self.num_classes = None if num_classes is None else positive("num_classes", num_classes)

    def examples(self, batch: Any) -> tuple[Tensor, ...]:
        return conditioned(batch)

    @constants()
    def sample(self, n: int, condition: Tensor | None = None, *, mean: bool = False) -> Tensor:
        """n samples, of labels drawn uniformly or of the condition `[n, …]`."""
        if condition is None:
            condition = draw_labels(n, self.num_classes, self)
        return self._decoded_sample(self.prior(n, self), condition, mean=mean)


class SemiSupervisedVAE(VAE):
    """Semi-supervised VAE (M2): a class c is latent where it is not given, inferred by a classifier q_η(c|x).

    Phase, for a batch (x_labelled, labels, x_unlabelled), over all networks:
        autoencoder: ( sum_labelled L(x, c) + sum_unlabelled U(x) ) / examples
                     + classification_weight · E_labelled[-log q_η(c|x)]
        L(x, c) = -E_q(z|x,c)[log p_θ(x|z, c)] + kl_weight · KL(q_η(z|x, c) ‖ p(z)) - log p(c), p(c) uniform
        U(x) = sum_c q_η(c|x) L(x, c) - H(q_η(c|x)), the sum over all classes

    Args:
        encoder: (x, labels) to (mean, logvar). decoder: (z, labels) to the likelihood's parameters.
        classifier: x to logits of the classes. num_classes: how many.
        classification_weight: alpha of Kingma et al., per example (0.1 there, by memory of its text).
        options: latent, likelihood, likelihood_options, kl_weight: as in `VAE`.

    Source: Kingma et al., "Semi-supervised learning with deep generative models" (2014), Eq. 6 to 9; Hu et al. (2018),
    Sec. 4.2.
    """

    of_paper = "Sec. 4.2"
    p = "p_θ(x|z,c,y): decoder (y=0), data (y=1)"
    q = "q_η(z,c|x,y): encoder, classifier; q_*(y|x): perfect discriminator"

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        classifier: nn.Module,
        *,
        num_classes: int,
        classification_weight: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(encoder, decoder, **options)
        self.classifier = classifier
        self.num_classes = positive("num_classes", num_classes)
        self.classification_weight = _checks.number("classification_weight", classification_weight)

    def examples(self, batch: Any) -> tuple[Tensor, ...]:
        x, labels, unlabelled = tensors(batch, "x_labelled", "labels", "x_unlabelled")
        same_length(x_labelled=x, labels=labels)
        return x, labels, unlabelled

    @phase(updates=("encoder", "decoder", "classifier"), minimises="KL(q_η(z,c|x,y) q^r_*(y|x) ‖ p_θ(z,c,y|x))")
    def autoencoder_phase(self, batch: Any) -> Losses:
        x, labels, unlabelled = self.examples(batch)
        return self.semi_supervised(x, labels, unlabelled, None, None)

    def semi_supervised(
        self, x: Tensor, labels: Tensor, unlabelled: Tensor, weights: Tensor | None, weights_unlabelled: Tensor | None
    ) -> Losses:
        """The phase's loss, the examples weighted."""
        of_labels = self._labelled(x, labels)
        log_class = categorical_log_prob(self.classifier(x), labels)
        of_unlabelled = self._unlabelled(unlabelled, self.classifier(unlabelled))
        of_labels, log_class = weigh(of_labels, weights), weigh(log_class, weights)
        of_unlabelled = weigh(of_unlabelled, weights_unlabelled)
        bounds = torch.cat((of_labels, of_unlabelled)).mean()
        classification = -log_class.mean()
        return {
            "loss": bounds + self.classification_weight * classification,
            "bounds": bounds.detach(),
            "classification": classification.detach(),
        }

    def _labelled(self, x: Tensor, labels: Tensor) -> Tensor:
        """L(x, c) `[N]`."""
        rows = self.negative_bound(x, labels, reduction="none").loss
        return rows - self._log_prior(rows)

    def _unlabelled(self, x: Tensor, logits: Tensor) -> Tensor:
        """U(x) `[N]`: sum_c q(c|x) (-ELBO(x|c)) + KL(q(c|x) || p(c))."""
        self._check_classes(logits)
        repeated, labels = self._of_all_classes(x)
        rows = self.negative_bound(repeated, labels, reduction="none").loss.unflatten(0, (self.num_classes, -1))
        kl = categorical_kl(logits, reduction="none")
        return (logits.softmax(-1) * rows.t()).sum(-1) + kl

    def _of_all_classes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x once for each class, and that class."""
        labels = torch.arange(self.num_classes, device=x.device).repeat_interleave(len(x))
        return x.repeat(self.num_classes, *(1,) * (x.dim() - 1)), labels

    def _check_classes(self, logits: Tensor) -> None:
        if logits.dim() != 2 or logits.size(1) != self.num_classes:
            raise ValueError(f"classifier: got shape {tuple(logits.shape)}, expected [N, {self.num_classes}]")

    def _log_prior(self, like: Tensor) -> Tensor:
        return -like.new_tensor(float(self.num_classes)).log()

    def predict(self, x: Tensor) -> Tensor:
        """Logits of q_η(c|x)."""
        return self.classifier(x)

    @constants()
    def bound(self, batch: Any, num_samples: int = 1, *, max_bytes: int = MAX_BYTES) -> Tensor:
        """A lower bound of log p_θ(x), or of log p_θ(x, c), for each example, in nats, without a gradient; `[N]`.

        For one sample -U(x), or -L(x, c). Beyond, the K-sample bound of log p(x|c) for every class, summed over them
        as log sum_c p(c) p(x|c).

        Args:
            batch: x, or (x, labels).
            num_samples: K >= 1, of each class.
            max_bytes: as in `VAE.bound`.
        """
        positive("num_samples", num_samples)
        if not isinstance(batch, Tensor):
            x, labels = conditioned(batch)
            rows = self._bound(num_samples, max_bytes, (x, labels), lambda *examples: examples)
            return rows + self._log_prior(rows)
        (x,) = tensors(batch, "x")
        classes = self.num_classes
        pairs = torch.arange(len(x) * classes, device=x.device)  # each example with each class
        of_pairs = self._bound(num_samples, max_bytes, (pairs,), lambda i: (x[i // classes], i % classes))
        of_classes = of_pairs.unflatten(0, (-1, classes))
        if num_samples > 1:
            return torch.logsumexp(of_classes, 1) + self._log_prior(of_classes)
        chunks = Chunks(max_bytes, self, (x,))
        logits = torch.cat([chunks.run(len(part), self.classifier, part) for (part,) in blocks((x,), chunks)])
        self._check_classes(logits)
        return (logits.softmax(-1) * of_classes).sum(-1) - categorical_kl(logits, reduction="none")

    @constants()
    def sample(self, n: int, labels: Tensor | None = None, *, mean: bool = False) -> Tensor:
        """n samples, of labels drawn uniformly or of those given `[n]`."""
        if labels is None:
            labels = draw_labels(n, self.num_classes, self)
        return self._decoded_sample(self.prior(n, self), labels, mean=mean)


class IWAE(VAE):
    """Importance-weighted autoencoder: the VAE with the bound of K samples, log (1/K) sum_k p(x, z_k) / q(z_k|x).

    Phase: autoencoder: the negative of that bound, or another of `iwae_objective`'s estimators.

    Args:
        num_samples: K.
        estimator: "iwae", "stl", "dreg", "miwae", …; estimator_options: `{"num_groups": 5}`, `{"alpha": 0.5}`, ….
        encoder, decoder, latent, likelihood, likelihood_options: as in `VAE`. The decoder is called with z `[N·K, …]`.

    Raises:
        TypeError: a `kl_weight`: the bound has none, as no KL stands in it. Set later, it is an AttributeError.
        ValueError: an estimator's option that it lacks or does not have, or of another value than it takes.

    Source: Burda, Grosse, Salakhutdinov (2016): what IWGAN's bound is modelled on, Hu et al. (2018), Sec. 3.1.
    """

    of_paper = "Sec. 3.1"

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        num_samples: int,
        latent: int | tuple[int, ...],
        likelihood: str = "bernoulli",
        likelihood_options: dict[str, Any] | None = None,
        estimator: str = "iwae",
        estimator_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(encoder, decoder, latent=latent, likelihood=likelihood, likelihood_options=likelihood_options)
        self.num_samples = positive("num_samples", num_samples)
        for name in estimator_options or {}:
            _checks.choice("estimator_options", name, _ESTIMATOR_OPTIONS)
        self.estimator = {"estimator": estimator, **(estimator_options or {})}
        z, mean = torch.zeros(1, num_samples, 1, device="cpu"), torch.zeros(1, 1, device="cpu")
        iwae_objective(z, mean, z, mean, mean, dim=1, **self.estimator)  # says what the estimator does not take

    @property
    def kl_weight(self) -> float:
        return 1.0

    @kl_weight.setter
    def kl_weight(self, value: float) -> None:
        if value != 1:
            raise AttributeError(f"kl_weight: got {value}, but the bound of an IWAE has none")

    @phase(updates=("encoder", "decoder"), minimises="−E log (1/K) Σₖ p_θ(x,zₖ) / q_η(zₖ|x), zₖ ~ q_η(z|x)")
    def autoencoder_phase(self, batch: Any) -> Losses:
        x, *condition = self.examples(batch)
        mean, logvar = self.posterior(x, *condition)
        z = sample_gaussian(mean, logvar, num_samples=self.num_samples, sample_dim=1)
        found = self._multi_sample(x, condition, z, mean, logvar, **self.estimator)
        return {"loss": found.loss, "effective_sample_size": found.ess.mean()}


# ---- with a discriminator --------------------------------------------------------------------------------------------


class AAVAE(Discriminated, VAE):
    """Adversary-activated VAE: the VAE whose perfect discriminator is replaced by a learned one.

    Phases, for a batch x of data and as many samples x~ of the model, constants:
        discriminator: E_data[-log D(x)] + E_x~[-log(1 - D(x~))], as a GAN's
        autoencoder: 1/2 E_data[ D(x) L(x) ] + 1/2 E_x~[ D(x~) L(x~) ] (Eq. 17), L the VAE's loss

    No gradient reaches D through the weights, nor θ through x~. With D = 1 on data and 0 on samples it is half the
    VAE's loss (Lemma 2). Data and samples pass encoder and decoder as one batch, p_θ0(x); the sum is that of
    `adversary_activated_loss`, made in the bound's own kernel.

    Args:
        encoder, decoder; options: latent, likelihood, likelihood_options, kl_weight: as in `VAE`.
        discriminator: x to one logit for each example.
        fakes: "sample": x~ ~ p_θ(x|z), as p_θ0 says; "mean": its mean, a picture of grey levels, where data are such.
            The paper does not say which it took; the default is our choice.

    Source: Hu et al. (2018), Eq. 17.
    """

    of_paper = "Eq. 17"
    q = "q_η(z|x,y): encoder; q_φ(y|x): discriminator"

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        discriminator: nn.Module,
        *,
        fakes: str = "sample",
        **options: Any,
    ) -> None:
        super().__init__(encoder, decoder, **options)
        self.discriminator = discriminator
        self.fakes = _checks.choice("fakes", fakes, _FAKES)

    def real(self, batch: Any) -> tuple[Tensor, ...]:
        return self.examples(batch)

    @constants()
    def fake(self, batch: Any) -> tuple[Tensor, ...]:
        x, *condition = self.examples(batch)
        z = self.prior(len(x), self)
        return self._decoded_sample(z, *condition, mean=self.fakes == "mean", like=x), *condition

    @constants()
    def q_reversed(self, *examples: Tensor) -> Tensor:
        """q^r_φ(y=0|x) = D(x) `[N]`, a constant."""
        logits = self.discriminator(*examples)
        if logits.numel() != len(examples[0]):
            raise ValueError(
                f"discriminator: got logits of shape {tuple(logits.shape)}, expected one for each of "
                f"{len(examples[0])} examples"
            )
        return log_discriminator(logits.flatten(), 0, reversed=True).exp()

    @phase(updates=("encoder", "decoder"), minimises=ACTIVATED)
    def autoencoder_phase(self, batch: Any) -> Losses:
        real, fake = self.real(batch), self.fake(batch)
        of_real, of_fake = self.q_reversed(*real), self.q_reversed(*fake)
        mixture = [torch.cat(sides) for sides in zip(real, fake, strict=True)]
        bound = self.negative_bound(*mixture, weights=torch.cat((of_real, of_fake)))
        return {
            "loss": bound.loss,
            "log_likelihood": bound.log_likelihood[: len(of_real)].detach().mean(),  # of data, as the VAE's
            "kl": bound.kl[: len(of_real)].detach().mean(),
            "real_weight": of_real.mean(),
            "fake_weight": of_fake.mean(),
        }


class AAConditionalVAE(AAVAE, ConditionalVAE):
    """Adversary-activated conditional VAE: `AAVAE` given a condition.

    Phases as in `AAVAE`, for a batch (x, c); samples have the batch's conditions, and the discriminator sees them: that
    D is conditioned is our choice, the paper does not say.

    Args:
        discriminator: (x, c) to one logit for each example.
        fakes: as in `AAVAE`.
        encoder, decoder, options: as in `ConditionalVAE`.

    Source: Hu et al. (2018), Sec. 4.2 and Eq. 17.
    """

    of_paper = "Sec. 4.2, Eq. 17"
    q = "q_η(z|x,y,c): encoder; q_φ(y|x,c): discriminator"


class AASemiSupervisedVAE(AAVAE, SemiSupervisedVAE):
    """Adversary-activated semi-supervised VAE: every term of `SemiSupervisedVAE`, of data and of samples, counts D(x).

    Phases, for a batch (x_labelled, labels, x_unlabelled):
        discriminator: as a GAN's, all x of the batch against as many samples
        autoencoder: 1/2 the loss of `SemiSupervisedVAE`, its L, U and -log q_η(c|x) weighted with D(x),
                     + 1/2 E_x~[ D(x~) U(x~) ]

    The paper does not say how labels enter. Our choice: D sees x alone, and so does the bound of a sample: it is drawn
    of any class and counts as unlabelled, p_θ0(x) being a distribution over x. Were it to keep the label that it was
    drawn with, the classifier would learn the decoder's mistakes. With a perfect D this is half the SVAE's loss, by
    Lemma 2.

    Args:
        discriminator: x to one logit for each example.
        fakes: as in `AAVAE`.
        encoder, decoder, classifier, options: as in `SemiSupervisedVAE`.

    Source: Hu et al. (2018), Sec. 4.2 and Eq. 17.
    """

    of_paper = "Sec. 4.2, Eq. 17"
    q = "q_η(z,c|x,y): encoder, classifier; q_φ(y|x): discriminator"

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        classifier: nn.Module,
        discriminator: nn.Module,
        *,
        fakes: str = "sample",
        **options: Any,
    ) -> None:
        super().__init__(encoder, decoder, discriminator, classifier=classifier, fakes=fakes, **options)

    def real(self, batch: Any) -> tuple[Tensor, ...]:
        x, _, unlabelled = self.examples(batch)
        return (torch.cat((x, unlabelled)),)

    @constants()
    def fake(self, batch: Any) -> tuple[Tensor, ...]:
        (x,) = self.real(batch)
        labels = draw_labels(len(x), self.num_classes, self)
        return (self._decoded_sample(self.prior(len(x), self), labels, mean=self.fakes == "mean", like=x),)

    @phase(updates=("encoder", "decoder", "classifier"), minimises="KL(q_η(z,c|x,y) q^r_φ(y|x) ‖ p_θ(z,c,y|x))")
    def autoencoder_phase(self, batch: Any) -> Losses:
        x, labels, unlabelled = self.examples(batch)
        (real,), (fake,) = self.real(batch), self.fake(batch)
        of_real, of_fake = self.q_reversed(real), self.q_reversed(fake)
        losses = self.semi_supervised(x, labels, unlabelled, of_real[: len(x)], of_real[len(x) :])
        of_samples = (of_fake * self._unlabelled(fake, self.classifier(fake))).mean()
        loss = (losses["loss"] + of_samples) / 2
        return losses | {"loss": loss, "real_weight": of_real.mean(), "fake_weight": of_fake.mean()}


class VAEGAN(Discriminated):
    """VAE and GAN with one generator: both of the paper's KLs, θ on opposite sides, and a likelihood in D's features.

    Phases, for a batch x, x~ = G(z) of a prior z, x^ = G(z) of z ~ q_η(z|x), f the features:
        discriminator: E_data[-log D(x)] + 1/2 E[-log(1 - D(x~))] + 1/2 E[-log(1 - D(x^))]
        encoder: KL(q_η(z|x) ‖ p(z)) - log N(f(x); f(x^), 1)
        generator: -reconstruction_weight · log N(f(x); f(x^), 1) - 1/2 E[log D(x~)] - 1/2 E[log D(x^)]

    That p_θ(x|y=0) is half prior samples, half reconstructions, and the non-saturating loss of Eq. 5, is our choice:
    Larsen et al. add the two and minimise log(1 - D).

    Args:
        encoder: x to (mean, logvar). generator: z to x.
        features: x to features `[N, …]`, the lower layers of D. discriminator: features to logits.
        latent: the size of z, or its shape; p(z) is the standard normal.
        reconstruction_weight: gamma of Larsen et al.

    Source: Larsen et al. (2015); Hu et al. (2018), Sec. 3.4, which it motivates by the two directions of the KL.
    """

    of_paper = "Sec. 3.4"
    p = "p_θ(x|z,y): generator (y=0), data (y=1)"
    q = "q_η(z|x,y): encoder; q_φ(y|x): discriminator"

    def __init__(
        self,
        encoder: nn.Module,
        generator: nn.Module,
        features: nn.Module,
        discriminator: nn.Module,
        *,
        latent: int | tuple[int, ...],
        reconstruction_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.encoder, self.generator = encoder, generator
        self.features, self.discriminator = features, discriminator
        self.prior = Prior(latent)
        self.reconstruction_weight = _checks.number("reconstruction_weight", reconstruction_weight)

    def real(self, batch: Any) -> tuple[Tensor, ...]:
        return tensors(batch, "x")

    def _code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z ~ q_η(z|x), and the KL of each example."""
        mean, logvar = gaussian_parameters(self.encoder(x), (len(x), *self.prior.shape))
        return sample_gaussian_with_kl(mean, logvar, event_ndims=mean.dim() - 1)

    def fake(self, batch: Any) -> tuple[Tensor, ...]:
        (x,) = self.real(batch)
        return (torch.cat((self.generator(self.prior(len(x), self)), self.generator(self._code(x)[0]))),)

    @phase(updates=("features", "discriminator"), minimises=TELL_APART)
    def discriminator_phase(self, batch: Any) -> Losses:
        (x,) = self.real(batch)
        with constants():
            (fake,) = self.fake(batch)
        return tell_apart(real=self.discriminator(self.features(x)), fake=self.discriminator(self.features(fake)))

    def _log_features(self, x: Tensor, reconstructed: Tensor) -> Tensor:
        """log N(f(x); f(x^), 1), the mean over examples."""
        with constants():
            of_x = self.features(x)
        return gaussian_log_prob(
            of_x, reconstructed, reconstructed.new_zeros(()), event_ndims=reconstructed.dim() - 1
        ).mean()

    @phase(updates=("encoder",), minimises="KL(q_η(z|x,y) q^r_*(y|x) ‖ p_θ(z,y|f(x)))")
    def encoder_phase(self, batch: Any) -> Losses:
        (x,) = self.real(batch)
        z, kl = self._code(x)
        log_features = self._log_features(x, frozen(self.features)(frozen(self.generator)(z)))
        kl = kl.mean()
        return {"loss": kl - log_features, "kl": kl.detach(), "log_features": log_features.detach()}

    @phase(
        updates=("generator",),
        minimises="KL(q_η(z|x,y) q^r_*(y|x) ‖ p_θ(z,y|f(x))) + KL(p_θ(x|y) ‖ q^r(x|y)) − JSD(p_θ(x|0) ‖ p_θ(x|1))",
    )
    def generator_phase(self, batch: Any) -> Losses:
        (x,) = self.real(batch)
        with constants():
            z = torch.cat((self.prior(len(x), self), self._code(x)[0]))
        of_fake = frozen(self.features)(self.generator(z))
        adversarial = generator_loss(fake=frozen(self.discriminator)(of_fake))
        log_features = self._log_features(x, of_fake[len(x) :])
        return {
            "loss": adversarial - self.reconstruction_weight * log_features,
            "adversarial": adversarial.detach(),
            "log_features": log_features.detach(),
        }

    @constants()
    def sample(self, n: int) -> Tensor:
        return self.generator(self.prior(n, self))


# ---- what the autoencoders are written with --------------------------------------------------------------------------


def gaussian_parameters(encoded: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(mean, logvar) as the encoder should give them."""
    if not isinstance(encoded, (tuple, list)) or not all(isinstance(t, Tensor) for t in encoded):
        raise TypeError(f"encoder: expected a pair of tensors (mean, logvar), got {type(encoded).__name__}")
    if len(encoded) != 2 or any(t.shape != shape for t in encoded):
        got = ", ".join(str(tuple(t.shape)) for t in encoded)
        raise ValueError(f"encoder: got shapes {got}, expected (mean, logvar), each {shape}")
    return encoded[0], encoded[1]


def bound_in_chunks(
    model: Model,
    encode: Callable[..., Any],
    log_weights: Callable[..., Tensor],
    examples: Sequence[Tensor],
    num_samples: int,
    max_bytes: int,
) -> Tensor:
    """log (1/K) sum_k w_k of each example `[N]`, in blocks of them and chunks of their samples.

    `encode(*block)` gives the posterior of a block, `log_weights(k, posterior, *block)` k of its log w `[n, k]`.
    """
    positive("max_bytes", max_bytes)
    encoding, decoding = (Chunks(max_bytes, model, examples) for _ in range(2))

    def of_block(block: Sequence[Tensor]) -> Iterator[Tensor]:
        n, left = len(block[0]), num_samples
        posterior = encoding.run(n, encode, *block)
        while left:
            k = min(left, max(1, decoding.rows // max(1, n)))
            yield decoding.run(n * k, log_weights, k, posterior, *block)
            left -= k

    found = [streaming_log_likelihood(of_block(block), dim=1) for block in blocks(examples, encoding, decoding)]
    return torch.cat(found)


def decode_samples(decoder: nn.Module, z: Tensor, condition: Any, ndims: int) -> Any:
    """What the decoder gives for z `[N, K, latent…]`, as `[N, K, event…]`; it sees `[N·K, latent…]`.

    What it gives without examples (a variance that all share) stays as it is; `ndims` are the dimensions of x.
    """
    n, samples = z.shape[:2]
    decoded = decoder(z.flatten(0, 1), *(c.repeat_interleave(samples, 0) for c in condition))

    def unflatten(t: Tensor) -> Tensor:
        return t.unflatten(0, (n, samples)) if t.dim() >= ndims and t.size(0) == n * samples else t

    return unflatten(decoded) if isinstance(decoded, Tensor) else tuple(unflatten(t) for t in decoded)
