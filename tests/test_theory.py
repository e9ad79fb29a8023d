"""The paper's statements, held against the models' own losses; each check is seen to fail on a broken formula."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unigen_fast as uf
from unigen_fast.models import (
    AAVAE,
    GAN,
    IWGAN,
    VAE,
    AAConditionalVAE,
    AASemiSupervisedVAE,
    AdversarialDomainAdaptation,
    ConditionalVAE,
    SemiSupervisedVAE,
    WakeSleep,
)

STATES = 7  # of the finite sample space
STEP = 1e-5  # of finite differences


# ---- Lemma 1: the generator's gradient is that of KL(p_θ(x|y) || q^r(x|y)) - JSD ------------------------------------


class Table(nn.Module):
    """A number for each state x."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, x: Tensor) -> Tensor:
        return self.values[x]


class Emits(nn.Module):
    """A generator that gives one state."""

    state = 0

    def forward(self, z: Tensor) -> Tensor:
        return torch.full((len(z),), self.state)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    m = (p + q) / 2
    return (kl(p, m) + kl(q, m)) / 2


def finite_differences(f: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    steps = torch.eye(theta.numel(), dtype=theta.dtype).unflatten(1, theta.shape) * STEP
    return torch.stack([(f(theta + step) - f(theta - step)) / (2 * STEP) for step in steps]).view_as(theta)


def reversed_posteriors(logits: Tensor, p0: Tensor, p1: Tensor) -> list[Tensor]:
    """q^r(x|y) ∝ q^r(y|x) p_θ0(x) for y = 0, 1; q^r(0|x) = D(x)."""
    mixture = (p0 + p1) / 2
    found = [logits.sigmoid() * mixture, (-logits).sigmoid() * mixture]
    return [q / q.sum() for q in found]


def finite_gan(model_class: type[GAN], logits: Tensor) -> Callable[[int], Tensor]:
    """The generator's loss of a state, by the model on the finite space."""
    model = model_class(Emits(), Table(logits), latent=1).double()

    def loss_of(state: int) -> Tensor:
        model.generator.state = state
        return model.losses("generator", torch.zeros(1, dtype=torch.long))["loss"].detach()

    return loss_of


def lemma_1(model_class: type[GAN], optimal: bool = False) -> None:
    """-E_{p_θ(x|y) p(y)}[log q^r(y|x)] against KL minus JSD: only y = 0 depends on θ."""
    torch.manual_seed(3)
    theta0, data = torch.randn(STATES).double(), torch.rand(STATES).double().softmax(0)
    generated = theta0.softmax(0)
    logits = (data / generated).log() if optimal else 2 * torch.randn(STATES).double()
    loss_of = finite_gan(model_class, logits)
    losses = torch.stack([loss_of(state) for state in range(STATES)])
    theta = theta0.clone().requires_grad_()
    (found,) = torch.autograd.grad(0.5 * (theta.softmax(0) * losses).sum(), theta)
    q0, q1 = reversed_posteriors(logits, generated, data)

    def divergence(theta: Tensor) -> Tensor:
        p = theta.softmax(0)
        return (kl(p, q0) + kl(data, q1)) / 2 - jensen_shannon(p, data)

    def of_optimal(theta: Tensor) -> Tensor:  # Eq. 8: then the KL is to the data
        p = theta.softmax(0)
        return kl(p, data) / 2 - jensen_shannon(p, data)

    assert found.norm() > 1e-2
    torch.testing.assert_close(found, finite_differences(divergence, theta0), atol=1e-8, rtol=1e-6)
    if optimal:
        torch.testing.assert_close(found, finite_differences(of_optimal, theta0), atol=1e-8, rtol=1e-6)


class Saturating(GAN):
    """log(1 - D), the minimax loss: not log q^r."""

    def generator_loss(self, logits: Tensor, fake: tuple[Tensor, ...]) -> Tensor:
        return uf.generator_loss(fake=logits, kind="saturating")


class NotReversed(GAN):
    def generator_loss(self, logits: Tensor, fake: tuple[Tensor, ...]) -> Tensor:
        return -uf.log_discriminator(logits, 0).mean()


@pytest.mark.parametrize("optimal", [False, True])
def test_lemma_1(optimal):
    lemma_1(GAN, optimal)


@pytest.mark.parametrize("broken", [Saturating, NotReversed])
def test_lemma_1_sees_another_loss(broken):
    with pytest.raises(AssertionError):
        lemma_1(broken)


def domain_adaptation(sign: float = 1.0) -> None:
    """Both sides depend on θ: p_θ(x|1) the source's features, p_θ(x|0) the target's."""
    torch.manual_seed(4)
    theta0, logits = torch.randn(2, STATES).double(), 2 * torch.randn(STATES).double()
    model = AdversarialDomainAdaptation(nn.Identity(), Table(torch.zeros(STATES, 3)), Table(logits)).double()
    losses = torch.zeros(2, STATES, dtype=torch.float64)
    for state in range(STATES):
        x = torch.tensor([state])
        # y = 1 with the other side at state 0, and the other way round: their sum is separable
        for y, batch in (
            (1, (x, torch.tensor([0]), torch.tensor([0]))),
            (0, (torch.tensor([0]), torch.tensor([0]), x)),
        ):
            losses[y, state] = model.losses("generator", batch)["adversarial"]
    theta = theta0.clone().requires_grad_()
    (found,) = torch.autograd.grad(0.5 * (theta.softmax(1) * losses).sum() * sign, theta)
    q = torch.stack(reversed_posteriors(logits, *theta0.softmax(1)))

    def divergence(theta: Tensor) -> Tensor:
        p = theta.softmax(1)
        return (kl(p[0], q[0]) + kl(p[1], q[1])) / 2 - jensen_shannon(p[0], p[1])

    torch.testing.assert_close(found, finite_differences(divergence, theta0), atol=1e-8, rtol=1e-6)


def test_lemma_1_of_domain_adaptation():
    domain_adaptation()


def test_lemma_1_of_domain_adaptation_sees_a_term_not_reversed(monkeypatch):
    import unigen_fast.models.adversarial as module

    monkeypatch.setattr(module, "log_discriminator", lambda logits, y, reversed: uf.log_discriminator(logits, y))
    with pytest.raises(AssertionError):
        domain_adaptation()


# ---- Lemma 2: with the perfect discriminator an AAVAE is a VAE -------------------------------------------------------


PIXELS, LATENT, N, CLASSES = 12, 3, 16, 3


class Conditioned(nn.Module):
    """Linear in its input and the label, if there is one."""

    def __init__(self, inputs: int, outputs: int, classes: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs + classes, outputs)
        self.classes = classes

    def forward(self, x: Tensor, *labels: Tensor) -> Tensor:
        return self.linear(torch.cat((x, *(F.one_hot(c, self.classes).to(x.dtype) for c in labels)), -1))


class Encoder(nn.Module):
    """Of next to no variance, so that no noise stands between two passes."""

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        self.mean = Conditioned(PIXELS, LATENT, classes)
        self.logvar = nn.Parameter(torch.full((LATENT,), -60.0))

    def forward(self, x: Tensor, *labels: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.mean(x, *labels).tanh()
        return mean, self.logvar.expand_as(mean)


class Perfect(nn.Module):
    """Knows the data: q_*(y=1|x) = 1 on it and 0 on all else."""

    def __init__(self, data: Tensor) -> None:
        super().__init__()
        self.data = data

    def forward(self, x: Tensor, *labels: Tensor) -> Tensor:
        return torch.where((x.unsqueeze(1) == self.data).all(2).any(1), 1e4, -1e4).to(x.dtype)


def data() -> Tensor:
    torch.manual_seed(5)
    return torch.bernoulli(torch.full((N, PIXELS), 0.3)).double()


def networks(classes: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(6)
    return Encoder(classes).double(), Conditioned(LATENT, PIXELS, classes).double()


def gradients(model: nn.Module, loss: Tensor, names: Sequence[str]) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for name in names for p in getattr(model, name).parameters()])


def lemma_2(base: type[VAE], extended: type[AAVAE], discriminator: nn.Module | None = None) -> None:
    """Half the loss of the base model, and half its gradient."""
    x, labels = data(), torch.arange(N) % CLASSES
    batch: Any = x if base is VAE else (x, labels)
    options: dict[str, Any] = {"latent": LATENT} if base is VAE else {"latent": LATENT, "num_classes": CLASSES}
    updated, classifier = ["encoder", "decoder"], []
    if base is SemiSupervisedVAE:
        batch = x[:5], labels[:5], x[5:]
        updated, classifier = [*updated, "classifier"], [nn.Linear(PIXELS, CLASSES).double()]
    classes = options.get("num_classes", 0)
    model = base(*networks(classes), *classifier, **options)
    expected = model.losses("autoencoder", batch)["loss"]
    expected_gradients = gradients(model, expected, updated)
    activated = extended(*networks(classes), *classifier, discriminator or Perfect(x), **options)
    found = activated.losses("autoencoder", batch)["loss"]
    torch.testing.assert_close(2 * found, expected)
    torch.testing.assert_close(2 * gradients(activated, found, updated), expected_gradients)


LEMMA_2 = [(VAE, AAVAE), (ConditionalVAE, AAConditionalVAE), (SemiSupervisedVAE, AASemiSupervisedVAE)]


@pytest.mark.parametrize(("base", "extended"), LEMMA_2)
def test_lemma_2(base, extended):
    lemma_2(base, extended)


class WeighedByQ(AAVAE):
    """q in place of q^r."""

    def q_reversed(self, *examples: Tensor) -> Tensor:
        return 1 - super().q_reversed(*examples)


class LabelsNotHalved(AASemiSupervisedVAE):
    """The labels' term of the data as it is in an SVAE, though samples are half of the mixture."""

    def autoencoder_phase(self, batch: Any) -> dict[str, Tensor]:
        losses = super().autoencoder_phase(batch)
        x, labels, _ = self.examples(batch)
        return {"loss": losses["loss"] + self.classification_weight * F.cross_entropy(self.classifier(x), labels) / 2}


class Undecided(nn.Module):
    def forward(self, x: Tensor, *labels: Tensor) -> Tensor:
        return x.new_zeros(len(x))


def test_lemma_2_sees_another_weight():
    with pytest.raises(AssertionError):
        lemma_2(VAE, WeighedByQ)
    with pytest.raises(AssertionError):
        lemma_2(SemiSupervisedVAE, LabelsNotHalved)
    for base, extended in LEMMA_2:
        with pytest.raises(AssertionError):
            lemma_2(base, extended, Undecided())


# ---- AAVAE: no gradient through the weights, nor through the fakes ---------------------------------------------------


class WeightsNotDetached(AAVAE):
    def q_reversed(self, *examples: Tensor) -> Tensor:
        return self.discriminator(*examples).flatten().sigmoid()


class FakesNotDetached(AAVAE):
    def fake(self, batch: Tensor) -> tuple[Tensor, ...]:
        return (self.decoder(self.prior(len(batch), self)).sigmoid(),)


def equation_17(model_class: type[AAVAE]) -> None:
    """The gradient against the finite differences of Eq. 17 in θ and η, p_θ0 and D being what they were."""
    x = data()
    torch.manual_seed(7)
    discriminator = nn.Linear(PIXELS, 1).double()
    model = model_class(*networks(), discriminator, latent=LATENT, fakes="mean")
    torch.manual_seed(8)
    with torch.no_grad():
        (fake,) = model.fake(x)
    torch.manual_seed(8)
    loss = model.losses("autoencoder", x)["loss"]
    with torch.no_grad():
        weights = [discriminator(side).sigmoid().flatten() for side in (x, fake)]

    def objective(parameters: Tensor) -> Tensor:
        changed = copy.deepcopy(model)
        nn.utils.vector_to_parameters(parameters, [*changed.encoder.parameters(), *changed.decoder.parameters()])
        total = torch.zeros((), dtype=torch.float64)
        for side, weight in zip((x, fake), weights, strict=True):
            mean, logvar = changed.encoder(side)
            likelihood = F.binary_cross_entropy_with_logits(changed.decoder(mean), side, reduction="none").sum(1)
            divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)
            total = total + 0.5 * (weight * (likelihood + divergence)).mean()
        return total.detach()

    found = gradients(model, loss, ("encoder", "decoder"))
    at = torch.cat([p.detach().flatten() for name in ("encoder", "decoder") for p in getattr(model, name).parameters()])
    torch.testing.assert_close(objective(at), loss.detach())
    torch.testing.assert_close(found, finite_differences(objective, at), atol=1e-7, rtol=1e-5)
    assert all(p.grad is None for p in discriminator.parameters())


def test_weights_reach_neither_discriminator_nor_fakes():
    equation_17(AAVAE)


@pytest.mark.parametrize("broken", [WeightsNotDetached, FakesNotDetached])
def test_equation_17_sees_a_gradient_too_many(broken):
    with pytest.raises(AssertionError):
        equation_17(broken)


def test_aavae_is_the_public_loss():
    """What the class makes in the bound's kernel is `adversary_activated_loss` of both sides' bounds."""
    x = data()
    discriminator = nn.Linear(PIXELS, 1).double()
    model = AAVAE(*networks(), discriminator, latent=LATENT)
    torch.manual_seed(9)
    (fake,) = model.fake(x)
    torch.manual_seed(9)
    found = model.losses("autoencoder", x)["loss"]
    losses = [model.negative_bound(side, reduction="none").loss for side in (x, fake)]
    expected = uf.adversary_activated_loss(
        *losses, real_logits=discriminator(x), fake_logits=discriminator(fake), reduction="mean"
    )
    torch.testing.assert_close(found, expected)


# ---- IWGAN -----------------------------------------------------------------------------------------------------------


def generator_gradients(model_class: type[GAN], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradients of the generator, the discriminator's logits) for a batch of k."""
    torch.manual_seed(10)
    generator, discriminator = nn.Linear(LATENT, PIXELS).double(), nn.Linear(PIXELS, 1).double()
    nn.init.normal_(discriminator.weight, std=2)
    model = model_class(generator, discriminator, latent=LATENT)
    x = data()[:k]
    torch.manual_seed(11)
    loss = model.losses("generator", x)["loss"]
    found = gradients(model, loss, ("generator",))
    torch.manual_seed(11)
    with torch.no_grad():
        logits = discriminator(model.fake(x)[0])
    return loss, found, logits


def one_sample(model_class: type[GAN]) -> None:
    loss, found, _ = generator_gradients(model_class, 1)
    expected_loss, expected, _ = generator_gradients(GAN, 1)
    torch.testing.assert_close(loss, expected_loss, atol=0, rtol=1e-12)
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-12)


def test_iwgan_of_one_sample_is_the_gan():
    one_sample(IWGAN)
    with pytest.raises(AssertionError):  # and of several it is not
        torch.testing.assert_close(generator_gradients(IWGAN, N)[1], generator_gradients(GAN, N)[1])


def test_one_sample_sees_weights_not_normalised():
    class Odds(GAN):
        def generator_loss(self, logits: Tensor, fake: tuple[Tensor, ...]) -> Tensor:
            return (logits.detach().exp() * F.softplus(-logits)).mean()

    with pytest.raises(AssertionError):
        one_sample(Odds)


def test_iwgan_of_the_minibatch_is_the_saturating_gradient_over_the_mean_odds():
    _, found, logits = generator_gradients(IWGAN, N)
    _, saturating, _ = generator_gradients(Saturating, N)
    torch.testing.assert_close(found, saturating / logits.exp().mean())


# ---- wake-sleep ------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(PIXELS, 2 * LATENT)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.network(x).chunk(2, -1)


def wake(kl_weight: float = 0.0, seed: int = 12) -> None:
    """The decoder's gradient in the wake phase against that of a VAE, its reconstruction term alone."""
    x = data()
    found = {}
    for name in ("wake", "autoencoder"):
        torch.manual_seed(6)
        parts = Noisy().double(), nn.Linear(LATENT, PIXELS).double()
        if name == "wake":
            model = WakeSleep(*parts, latent=LATENT)
        else:
            model = VAE(*parts, latent=LATENT, kl_weight=kl_weight)
        torch.manual_seed(seed if name == "wake" else 12)
        loss = model.losses(name, x)["loss"]
        found[name] = torch.cat((loss.detach().view(1), gradients(model, loss, ("decoder",))))
    torch.testing.assert_close(found["wake"], found["autoencoder"], atol=1e-12, rtol=1e-12)


def test_wake_phase_is_the_vae_reconstruction():
    wake()
    with pytest.raises(AssertionError):
        wake(kl_weight=1.0)  # the loss has the KL then
    with pytest.raises(AssertionError):
        wake(seed=13)  # another h


class TwoSources(nn.Module):
    """p(x|h=y): data where y = 1, a generator's samples where y = 0; as logits so large that nothing is drawn."""

    def __init__(self, real: Tensor, fake: Tensor) -> None:
        super().__init__()
        self.both = torch.cat((real, fake))

    def forward(self, y: Tensor) -> Tensor:
        return (2 * self.both - 1) * 1e4


def sleep(y: Tensor) -> None:
    """With h = y, the sleep phase's gradient in λ against that of the GAN's discriminator; p(y) = 1/2 is in it."""
    real, fake = data(), 1 - data().flip(0)
    torch.manual_seed(14)
    discriminator = nn.Sequential(nn.Linear(PIXELS, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    model = WakeSleep(discriminator, TwoSources(real, fake), latent=1, latents="bernoulli")
    model.prior.draw = lambda *shape, device, dtype: y.to(dtype).view(shape)
    loss = model.losses("sleep", torch.cat((real, fake)))["loss"]
    found = gradients(model, loss, ("encoder",))

    class Given(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return fake

    gan = GAN(Given(), discriminator, latent=1)
    expected = gan.losses("discriminator", real)["loss"]
    torch.testing.assert_close(2 * loss, expected)
    torch.testing.assert_close(2 * found, gradients(gan, expected, ("discriminator",)))


def test_sleep_phase_is_the_gan_discriminator():
    y = torch.cat((torch.ones(N), torch.zeros(N)))
    sleep(y)
    with pytest.raises(AssertionError):
        sleep(1 - y)
