"""The paper's models: every phase of every class, in the ways that people train."""

import copy
import gc
import io
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_zoo import BATCH, CLASSES, LATENT, PIXELS, ZOO, batch_of, build
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import unigen_fast as uf
from unigen_fast.__main__ import main
from unigen_fast.models import MODELS, Model
from unigen_fast.models._model import Prior
from unigen_fast.models.variational import decode_samples

pytest.importorskip("mlxtend")

# the public contract
NAMES = """GAN ConditionalGAN InfoGAN AdversarialAutoencoder PredictabilityMinimization CycleGAN
AdversarialDomainAdaptation VAE ConditionalVAE SemiSupervisedVAE IWAE VAEGAN WakeSleep ReweightedWakeSleep IWGAN
IWConditionalGAN AAVAE AAConditionalVAE AASemiSupervisedVAE""".split()
PHASES = [(model.__name__, phase) for model in MODELS for phase in model.phases]
BOUNDED = [model.__name__ for model in MODELS if hasattr(model, "bound")]

every_model = pytest.mark.parametrize("name", [model.__name__ for model in MODELS])
every_phase = pytest.mark.parametrize(("name", "phase"), PHASES)


def bounded_batch(name: str) -> Any:
    """What `bound` takes: of the semi-supervised models unlabelled digits."""
    batch = batch_of(name)
    return batch[2] if "SemiSupervised" in name else batch


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def cast(batch: Any, **to: Any) -> Any:
    """A batch on another device or of another dtype; labels keep theirs."""
    if isinstance(batch, tuple):
        return tuple(cast(part, **to) for part in batch)
    return batch.to(**to) if batch.is_floating_point() else batch.to(device=to.get("device", batch.device))


# ---- what every class has --------------------------------------------------------------------------------------------


def test_no_model_is_missing():
    assert sorted(NAMES) == sorted(model.__name__ for model in MODELS) == sorted(ZOO)
    assert set(NAMES) <= set(uf.models.__all__)


@every_phase
def test_a_phase_reaches_its_parameters_and_no_other(name, phase, device):
    model = build(name).to(device)
    losses = model.losses(phase, cast(batch_of(name), device=device))
    losses["loss"].backward()
    expected = {id(p) for p in model.parameters_of(phase)}
    found = {id(p) for p in model.parameters() if p.grad is not None}
    assert found == expected
    assert all(g.isfinite().all() for g in gradients(model).values())
    assert any(g.abs().max() > 0 for g in gradients(model).values())
    for key, value in losses.items():
        assert value.dim() == 0 and value.dtype == torch.float32 and value.isfinite(), key
        assert value.requires_grad == (key == "loss"), key
    assert all(p.requires_grad for p in model.parameters())


@every_model
def test_phases_together_train_every_parameter(name):
    model = build(name)
    trained = {id(p) for phase in model.phases for p in model.parameters_of(phase)}
    assert trained == {id(p) for p in model.parameters()}


def held_out_losses(model: Model, phase: str, name: str) -> list[float]:
    """Of three batches that no test trains on, by the same noise each time."""
    torch.manual_seed(1)
    with torch.no_grad():
        return [model.losses(phase, batch_of(name, start))["loss"].item() for start in (420, 480, 540)]


def train(model: Model, name: str, steps: int, phases: Any = None, lr: float = 1e-3) -> dict[str, dict[str, float]]:
    """A plain loop over the phases, on 300 digits; the last losses of each."""
    optimizers = {phase: torch.optim.Adam(model.parameters_of(phase), lr=lr) for phase in phases or model.phases}
    for step in range(steps):
        last = {}
        for phase, optimizer in optimizers.items():
            losses = model.losses(phase, batch_of(name, step % 5 * BATCH))
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            last[phase] = {key: value.item() for key, value in losses.items()}
    return last


@every_phase
def test_losses_of_a_phase_fall_on_real_digits(name, phase):
    """The other phases learn first, so that there is something to learn from; then this one, and they stay."""
    model = build(name)
    if others := [other for other in model.phases if other != phase]:
        train(model, name, 50, others, lr=2e-3)
    before = held_out_losses(model, phase, name)
    train(model, name, 50, [phase], lr=2e-3)
    after = held_out_losses(model, phase, name)
    assert all(a < b - 0.05 * abs(b) for a, b in zip(after, before, strict=True)), (before, after)


@every_model
def test_phases_train_together(name):
    """The phases in turn, against each other: bounds tighten, what is reconstructed or inferred is so better."""
    torch.manual_seed(0)
    first, last = train(build(name), name, 1), train(model := build(name), name, 80)
    assert all(math.isfinite(value) for phase in last.values() for value in phase.values())
    for key in ("log_likelihood", "log_code", "log_cycle", "log_label", "log_features"):
        for phase in last:
            if key in last[phase] and name != "VAEGAN":  # its features move
                assert last[phase][key] > first[phase][key], key
    if name in BOUNDED:
        assert model.bound(bounded_batch(name)).mean() > build(name).bound(bounded_batch(name)).mean() + 100
    if "discriminator" in last and "real_probability" in last["discriminator"] and "Domain" not in name:
        assert last["discriminator"]["real_probability"] > last["discriminator"]["fake_probability"]


def test_phases_of_a_mixin_are_those_of_the_methods_it_runs():
    """A class that changes the weights, put before AA-SVAE, runs AA-SVAE's phase, and so updates its classifier too."""

    class Constant(uf.models.AAVAE):
        def q_reversed(self, *examples: Tensor) -> Tensor:
            return torch.ones(len(examples[0]))

    class ConstantSemiSupervised(Constant, uf.models.AASemiSupervisedVAE):
        pass

    assert ConstantSemiSupervised.phases == uf.models.AASemiSupervisedVAE.phases
    assert list(ConstantSemiSupervised.phases) == list(uf.models.AASemiSupervisedVAE.phases)
    assert Constant.phases == uf.models.AAVAE.phases != uf.models.AASemiSupervisedVAE.phases


@every_model
def test_state_dict(name):
    """Networks and nothing else; loaded, it gives the same losses; so do a copy and a pickle."""
    model, other = build(name), build(name, seed=1)
    children = {key.split(".")[0] for key in model.state_dict()}
    assert children == {network for phase in model.phases.values() for network in phase.updates}
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for same in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for phase in model.phases:
            assert held_out_losses(same, phase, name) == held_out_losses(model, phase, name)


@every_model
def test_sample(name):
    model = build(name)
    if name in ("AdversarialDomainAdaptation", "PredictabilityMinimization", "CycleGAN"):
        with pytest.raises(NotImplementedError, match=f"{name} has no distribution over data to draw from"):
            model.sample(3)
        return
    torch.manual_seed(0)
    x = model.sample(7)
    assert x.shape == (7, PIXELS) and not x.requires_grad and 0 <= x.min() and x.max() <= 1
    torch.manual_seed(0)
    assert torch.equal(model.sample(7), x)
    assert model.sample(0).shape == (0, PIXELS)


@pytest.mark.parametrize("name", ["ConditionalGAN", "IWConditionalGAN", "ConditionalVAE", "AAConditionalVAE"])
def test_conditional_sample(name):
    model = build(name)
    labels = torch.arange(CLASSES).repeat(2)
    torch.manual_seed(0)
    x = model.sample(20, labels)
    torch.manual_seed(0)
    assert not torch.equal(model.sample(20, labels.flip(0)), x)
    model.num_classes = None
    with pytest.raises(ValueError, match="labels: got None, expected one for each sample"):
        model.sample(20)


# ---- values: the formulas in plain PyTorch ---------------------------------------------------------------------------


def bce(logits: Tensor, y: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, y))


def plain_log_likelihood(logits: Tensor, x: Tensor) -> Tensor:
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


def plain_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(-1)


def plain_normal(z: Tensor, mean: Any, logvar: Any) -> Tensor:
    std = torch.exp(0.5 * torch.as_tensor(logvar, dtype=z.dtype))
    return torch.distributions.Normal(torch.as_tensor(mean, dtype=z.dtype), std).log_prob(z).sum(-1)


def tell_apart(discriminator: nn.Module, real: tuple[Tensor, ...], fake: tuple[Tensor, ...]) -> Tensor:
    return bce(discriminator(*real), 1) + bce(discriminator(*fake), 0)


def plain_gan(m: Any, phase: str, x: Tensor) -> Tensor:
    fake = m.generator(torch.randn(len(x), LATENT, dtype=x.dtype))
    if phase == "discriminator":
        return tell_apart(m.discriminator, (x,), (fake,))
    return bce(m.discriminator(fake), 1)


def plain_conditional_gan(m: Any, phase: str, batch: Any) -> Tensor:
    x, labels = batch
    fake = m.generator(torch.randn(len(x), LATENT, dtype=x.dtype), labels)
    if phase == "discriminator":
        return tell_apart(m.discriminator, (x, labels), (fake, labels))
    return bce(m.discriminator(fake, labels), 1)


def plain_info_gan(m: Any, phase: str, x: Tensor) -> Tensor:
    z = torch.randn(len(x), LATENT + CLASSES + 2, dtype=x.dtype)
    category = torch.randint(CLASSES, (len(x),))
    z[:, LATENT : LATENT + CLASSES] = F.one_hot(category, CLASSES).to(x.dtype)
    fake = m.generator(z)
    if phase == "discriminator":
        return tell_apart(m.discriminator, (x,), (fake,))
    logits, mean, logvar = m.inference(fake)
    log_code = -F.cross_entropy(logits, category) + plain_normal(z[:, -2:], mean, logvar).mean()
    return bce(m.discriminator(fake), 1) - log_code


def plain_iwgan(m: Any, phase: str, x: Tensor) -> Tensor:
    if phase == "discriminator":
        return plain_gan(m, phase, x)
    logits = m.discriminator(m.generator(torch.randn(len(x), LATENT, dtype=x.dtype))).flatten()
    odds = (logits.sigmoid() / (1 - logits.sigmoid())).detach()
    return -(odds / odds.sum() * logits.sigmoid().log()).sum()


def plain_iw_conditional_gan(m: Any, phase: str, batch: Any) -> Tensor:
    if phase == "discriminator":
        return plain_conditional_gan(m, phase, batch)
    x, labels = batch
    logits = m.discriminator(m.generator(torch.randn(len(x), LATENT, dtype=x.dtype), labels), labels).flatten()
    of_classes = []
    for label in labels.unique():
        mine = logits[labels == label]
        of_classes.append((mine.detach().softmax(0) * F.softplus(-mine)).sum())
    return torch.stack(of_classes).mean()


def plain_adversarial_autoencoder(m: Any, phase: str, x: Tensor) -> Tensor:
    if phase == "discriminator":
        real = torch.randn(len(x), LATENT, dtype=x.dtype)
        return tell_apart(m.discriminator, (real,), (m.encoder(x).detach(),))
    z = m.encoder(x)
    return bce(m.discriminator(z), 1) - plain_log_likelihood(m.decoder(z), x).mean()


def plain_predictability(m: Any, phase: str, x: Tensor) -> Tensor:
    h = m.encoder(x).sigmoid()
    if phase == "predictor":
        h = h.detach()
    others = [[j for j in range(LATENT) if j != i] for i in range(LATENT)]
    predicted = torch.cat([p(h[:, j]) for p, j in zip(m.predictors, others, strict=True)], 1)
    log_predictions = (-0.5 * (h - predicted).square() - 0.5 * math.log(2 * math.pi)).sum(1).mean()
    if phase == "predictor":
        return -log_predictions
    return log_predictions - plain_log_likelihood(m.decoder(h), x).mean()


def plain_cycle_gan(m: Any, phase: str, batch: Any) -> Tensor:
    x, z = batch
    fake_x, fake_z = m.z_to_x(z), m.x_to_z(x)
    if phase == "discriminator":
        of_x = tell_apart(m.discriminator_x, (x,), (fake_x.detach(),))
        return of_x + tell_apart(m.discriminator_z, (z,), (fake_z.detach(),))
    cycle = F.l1_loss(m.x_to_z(fake_x), z) + F.l1_loss(m.z_to_x(fake_z), x) + 2 * math.log(2)
    return bce(m.discriminator_x(fake_x), 1) + bce(m.discriminator_z(fake_z), 1) + 10 * cycle


def plain_domain_adaptation(m: Any, phase: str, batch: Any) -> Tensor:
    source, labels, target = batch
    x1, x0 = m.features(source), m.features(target)
    if phase == "discriminator":
        return tell_apart(m.discriminator, (x1.detach(),), (x0.detach(),))
    reversed_ = bce(m.discriminator(x1), 0) + bce(m.discriminator(x0), 1)
    return reversed_ + F.cross_entropy(m.classifier(x1), labels)


def plain_vae(m: Any, phase: str, batch: Any) -> Tensor:
    x, *condition = batch if isinstance(batch, tuple) else (batch,)
    mean, logvar = m.encoder(x, *condition)
    z = uf.sample_gaussian(mean, logvar)
    return (plain_kl(mean, logvar) - plain_log_likelihood(m.decoder(z, *condition), x)).mean()


def plain_rows(m: Any, x: Tensor, labels: Tensor) -> Tensor:
    """L(x, c), by one draw of z for all of them."""
    mean, logvar = m.encoder(x, labels)
    logits = m.decoder(uf.sample_gaussian(mean, logvar), labels)
    return plain_kl(mean, logvar) - plain_log_likelihood(logits, x) + math.log(CLASSES)


def plain_unlabelled(m: Any, x: Tensor) -> Tensor:
    of_classes = plain_rows(m, x.repeat(CLASSES, 1), torch.arange(CLASSES).repeat_interleave(len(x)))
    q = m.classifier(x).softmax(-1)
    return (q * of_classes.view(CLASSES, -1).t()).sum(-1) + (q * q.log()).sum(-1)


def plain_semi_supervised(m: Any, phase: str, batch: Any, weights: Any = (1.0, 1.0)) -> Tensor:
    x, labels, unlabelled = batch
    of_labels = weights[0] * plain_rows(m, x, labels)
    of_unlabelled = weights[1] * plain_unlabelled(m, unlabelled)
    of_classifier = weights[0] * F.cross_entropy(m.classifier(x), labels, reduction="none")
    return torch.cat((of_labels, of_unlabelled)).mean() + 0.1 * of_classifier.mean()


def plain_iwae(m: Any, phase: str, x: Tensor) -> Tensor:
    mean, logvar = m.encoder(x)
    z = uf.sample_gaussian(mean, logvar, num_samples=5, sample_dim=1)
    log_w = plain_log_likelihood(m.decoder(z), x.unsqueeze(1).expand(-1, 5, -1)) + plain_normal(z, 0.0, 0.0)
    log_w = log_w - plain_normal(z, mean.unsqueeze(1), logvar.unsqueeze(1))
    return -(torch.logsumexp(log_w, 1) - math.log(5)).mean()


def plain_aavae(m: Any, phase: str, batch: Any) -> Tensor:
    x, *condition = batch if isinstance(batch, tuple) else (batch,)
    fake = torch.bernoulli(m.decoder(torch.randn(len(x), LATENT, dtype=x.dtype), *condition).sigmoid()).detach()
    if phase == "discriminator":
        return tell_apart(m.discriminator, (x, *condition), (fake, *condition))
    both = torch.cat((x, fake)), *(torch.cat((c, c)) for c in condition)
    weights = torch.cat([m.discriminator(side, *condition).sigmoid().flatten() for side in (x, fake)]).detach()
    mean, logvar = m.encoder(*both)
    logits = m.decoder(uf.sample_gaussian(mean, logvar), *both[1:])
    return (weights * (plain_kl(mean, logvar) - plain_log_likelihood(logits, both[0]))).mean()


def plain_aa_semi_supervised(m: Any, phase: str, batch: Any) -> Tensor:
    x, _, unlabelled = batch
    real, n = torch.cat((x, unlabelled)), len(x)
    of_fake = torch.randint(CLASSES, (len(real),))
    fake = torch.bernoulli(m.decoder(torch.randn(len(real), LATENT, dtype=x.dtype), of_fake).sigmoid()).detach()
    if phase == "discriminator":
        return tell_apart(m.discriminator, (real,), (fake,))
    of_real, of_fakes = (m.discriminator(side).sigmoid().flatten().detach() for side in (real, fake))
    of_data = plain_semi_supervised(m, phase, batch, (of_real[:n], of_real[n:]))
    return of_data / 2 + (of_fakes * plain_unlabelled(m, fake)).mean() / 2


def plain_vaegan(m: Any, phase: str, x: Tensor) -> Tensor:
    def code() -> tuple[Tensor, Tensor]:
        mean, logvar = m.encoder(x)
        return uf.sample_gaussian(mean, logvar), plain_kl(mean, logvar).mean()

    def distance(reconstructed: Tensor) -> Tensor:
        return -plain_normal(m.features(x).detach(), m.features(reconstructed), 0.0).mean()

    if phase == "encoder":
        z, kl = code()
        return kl + distance(m.generator(z))
    prior = m.generator(torch.randn(len(x), LATENT, dtype=x.dtype))
    reconstructed = m.generator(code()[0].detach())
    if phase == "discriminator":
        d = nn.Sequential(m.features, m.discriminator)
        return bce(d(x), 1) + 0.5 * (bce(d(prior.detach()), 0) + bce(d(reconstructed.detach()), 0))
    d = nn.Sequential(m.features, m.discriminator)
    return 0.5 * (bce(d(prior), 1) + bce(d(reconstructed), 1)) + distance(reconstructed)


def plain_wake_sleep(m: Any, phase: str, x: Tensor) -> Tensor:
    if phase == "wake":
        h = uf.sample_gaussian(*m.encoder(x)).detach()
        return -plain_log_likelihood(m.decoder(h), x).mean()
    h = torch.randn(len(x), LATENT, dtype=x.dtype)
    mean, logvar = m.encoder(torch.bernoulli(m.decoder(h).sigmoid()).detach())
    return -plain_normal(h, mean, logvar).mean()


def plain_reweighted(m: Any, phase: str, x: Tensor) -> Tensor:
    """h of zeros and ones."""
    if phase == "sleep":
        h = torch.randint(2, (len(x), LATENT)).to(x.dtype)
        dreamt = torch.bernoulli(m.decoder(h).sigmoid()).detach()
        return -plain_log_likelihood(m.encoder(dreamt), h).mean()
    logits = m.encoder(x).unsqueeze(1).expand(-1, 5, -1)
    h = torch.bernoulli(logits.sigmoid()).detach()
    log_q = plain_log_likelihood(logits, h)
    log_p = plain_log_likelihood(m.decoder(h), x.unsqueeze(1).expand(-1, 5, -1)) - LATENT * math.log(2)
    weights = (log_p - log_q).detach().softmax(1)
    bound = (torch.logsumexp(log_p - log_q.detach(), 1) - math.log(5)).mean()
    return -bound - (weights * log_q).sum(1).mean()


PLAIN = {
    "AdversarialDomainAdaptation": plain_domain_adaptation,
    "GAN": plain_gan,
    "ConditionalGAN": plain_conditional_gan,
    "InfoGAN": plain_info_gan,
    "AdversarialAutoencoder": plain_adversarial_autoencoder,
    "PredictabilityMinimization": plain_predictability,
    "CycleGAN": plain_cycle_gan,
    "IWGAN": plain_iwgan,
    "IWConditionalGAN": plain_iw_conditional_gan,
    "VAE": plain_vae,
    "ConditionalVAE": plain_vae,
    "SemiSupervisedVAE": plain_semi_supervised,
    "IWAE": plain_iwae,
    "AAVAE": plain_aavae,
    "AAConditionalVAE": plain_aavae,
    "AASemiSupervisedVAE": plain_aa_semi_supervised,
    "VAEGAN": plain_vaegan,
    "WakeSleep": plain_wake_sleep,
    "ReweightedWakeSleep": plain_reweighted,
}


@every_phase
def test_value_and_gradients_equal_plain_pytorch(name, phase):
    """In float64, drawing the same numbers in the same order."""
    model = build(name).double()
    batch = cast(batch_of(name), dtype=torch.float64)
    found = []
    for compute in (lambda: model.losses(phase, batch)["loss"], lambda: PLAIN[name](model, phase, batch)):
        model.zero_grad()
        torch.manual_seed(3)
        loss = compute()
        wanted = list(model.parameters_of(phase))
        found.append((loss.detach(), torch.autograd.grad(loss, wanted)))
    (loss, grads), (expected, expected_grads) = found
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(grads, expected_grads, atol=1e-10, rtol=1e-8)


# ---- bounds ----------------------------------------------------------------------------------------------------------


class Exact(nn.Module):
    """The posterior of x = W z + noise of variance 1, W's columns orthogonal: a diagonal Gaussian."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        variance = 1 / (1 + self.w.square().sum(0))
        return x @ self.w * variance, variance.log().expand(len(x), -1)


class Linear(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.w.t()


@pytest.mark.parametrize("model_class", [uf.models.VAE, uf.models.WakeSleep])
@pytest.mark.parametrize("num_samples", [2, 7, 3000])
def test_bound_is_exact_where_the_posterior_is(model_class, num_samples):
    """log p(x) = log N(x; 0, W Wᵀ + 1); 3000 samples of 9 examples come in several chunks."""
    torch.manual_seed(0)
    w = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64))[0] * torch.tensor([0.5, 1.0, 2.0])
    model = model_class(Exact(w), Linear(w), latent=3, likelihood="gaussian")
    x = torch.randn(9, 6, dtype=torch.float64)
    covariance = w @ w.t() + torch.eye(6, dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(torch.zeros(6, dtype=torch.float64), covariance).log_prob(x)
    torch.testing.assert_close(model.bound(x, num_samples), expected)


@pytest.mark.parametrize("name", BOUNDED)
def test_more_samples_tighten_the_bound(name):
    model = build(name)
    batch = bounded_batch(name)
    torch.manual_seed(0)
    one, many = (torch.stack([model.bound(batch, k) for _ in range(8)]).mean() for k in (1, 64))
    assert one < many < 0
    rows = model.bound(batch, 2)
    assert rows.shape == (len(batch if isinstance(batch, Tensor) else batch[0]),) and not rows.requires_grad
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="num_samples: got"):
            model.bound(batch, wrong)


@pytest.mark.parametrize("name", ["VAE", "ConditionalVAE", "AAVAE"])
def test_bound_of_one_sample_is_the_loss_without_its_weight(name):
    model = build(name)
    torch.manual_seed(0)
    rows = model.bound(batch_of(name))
    model.kl_weight = 4.0
    torch.manual_seed(0)
    assert torch.equal(model.bound(batch_of(name)), rows)
    vae = build("ConditionalVAE" if "Conditional" in name else "VAE")
    vae.load_state_dict(model.state_dict(), strict=False)
    torch.manual_seed(0)
    loss = vae.losses("autoencoder", batch_of(name))["loss"]
    torch.testing.assert_close(-rows.mean(), loss.detach(), rtol=1e-5, atol=1e-4)


def test_samples_of_an_example_keep_its_condition():
    decoder = build("ConditionalVAE").decoder
    z, labels = torch.randn(7, 3, LATENT), torch.arange(7)
    found = decode_samples(decoder, z, (labels,), 2)
    torch.testing.assert_close(found, torch.stack([decoder(z[:, k], labels) for k in range(3)], 1))


def test_semi_supervised_bounds_sum_over_the_classes():
    """log p(x) from below by every class: the K-sample bound of x is the log of the sum of those of (x, c)."""
    torch.manual_seed(0)
    model = build("SemiSupervisedVAE")
    x = batch_of("SemiSupervisedVAE")[2][:5]
    of_x = model.bound(x, 2000)
    of_pairs = torch.stack([model.bound((x, torch.full((5,), c)), 2000) for c in range(CLASSES)])
    torch.testing.assert_close(of_x, of_pairs.logsumexp(0), atol=0.5, rtol=0)
    assert (of_x > of_pairs).all()


# ---- other likelihoods, shapes ---------------------------------------------------------------------------------------

# name, parameters of a decoder that gives one constant for all x, mean, variance, and the options
MOMENTS: list[tuple[str, tuple[float, ...], float, float, dict[str, Any]]] = [
    ("bernoulli", (0.4,), 0.598688, 0.598688 * 0.401312, {}),
    ("gaussian", (1.5, 0.6), 1.5, math.exp(0.6), {}),
    ("gaussian", (1.5,), 1.5, 1.0, {}),
    ("gaussian", (1.5, 0.3), 1.5, math.exp(0.6), {"spread": "logstd"}),
    ("laplace", (-1.0, 0.2), -1.0, 2 * math.exp(0.4), {}),
    ("discretized_logistic", (0.1, -3.0), 0.1, math.pi**2 / 3 * math.exp(-6), {}),
    ("negative_binomial", (3.0, 2.0), 3.0, 3 + 9 / 2, {}),
    ("zero_inflated_negative_binomial", (3.0, 2.0, -0.4), 3 * 0.598688, 0.598688 * (7.5 + 9) - (3 * 0.598688) ** 2, {}),
]


class Constant(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = nn.ParameterList([torch.tensor(v) for v in values])

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        return tuple(v.expand(len(z), 5) for v in self.values)


@pytest.mark.parametrize(("likelihood", "parameters", "mean", "variance", "options"), MOMENTS)
def test_samples_have_the_moments_of_the_likelihood(likelihood, parameters, mean, variance, options):
    """Draws of p(x | z), their mean and variance; and their log-probability is finite: they are in the support."""
    torch.manual_seed(0)
    model = uf.models.VAE(
        nn.Identity(), Constant(*parameters), latent=2, likelihood=likelihood, likelihood_options=options
    )
    n = 40_000
    x = model.sample(n)
    error = math.sqrt(variance / (5 * n))
    assert abs(x.mean().item() - mean) < 4 * error
    assert x.var().item() == pytest.approx(variance, rel=0.05)
    torch.testing.assert_close(model.sample(3, mean=True), torch.full((3, 5), mean))
    log_p = model.likelihood.log_prob(model.decoder(torch.zeros(n, 2)), x)
    assert log_p.shape == (n,) and log_p.isfinite().all()


def test_classes_are_drawn_by_their_probabilities():
    logits = torch.tensor([[1.0, -1.0, 0.5]])
    model = uf.models.VAE(
        nn.Identity(), nn.Linear(2, 3), latent=2, likelihood="categorical", likelihood_options={"class_dim": 1}
    )
    nn.init.zeros_(model.decoder.weight)
    model.decoder.bias.data.copy_(logits[0])
    torch.manual_seed(0)
    share = torch.bincount(model.sample(50_000)) / 50_000
    torch.testing.assert_close(share, logits[0].softmax(0), atol=0.01, rtol=0)
    assert model.sample(4, mean=True).tolist() == [0, 0, 0, 0]


def test_a_mixture_has_no_sampler_yet():
    model = uf.models.VAE(nn.Identity(), nn.Linear(2, 100), latent=2, likelihood="discretized_logistic_mixture")
    with pytest.raises(
        NotImplementedError, match=r"drawing from p\(x \| z\): got likelihood 'discretized_logistic_mix"
    ):
        model.sample(3)


class Images(nn.Module):
    """Latents and data of several dimensions, and a variance that all pixels share."""

    def __init__(self, decode: bool) -> None:
        super().__init__()
        self.decode = decode
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.logvar = nn.Parameter(torch.tensor(-1.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.decode:
            return F.interpolate(x * self.scale, scale_factor=2), self.logvar
        mean = F.avg_pool2d(x, 2) * self.scale
        return mean, mean * 0 - 1


@pytest.mark.parametrize("kind", ["VAE", "IWAE", "AAVAE", "ReweightedWakeSleep"])
def test_images_and_a_shared_variance(kind):
    parts: dict[str, Any] = {"latent": (1, 4, 4), "likelihood": "gaussian"}
    if kind in ("IWAE", "ReweightedWakeSleep"):
        parts["num_samples"] = 3
    networks = [Images(False), Images(True)]
    if kind == "AAVAE":
        networks.append(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)))
    model = getattr(uf.models, kind)(*networks, **parts)
    x = torch.randn(6, 1, 8, 8)
    for phase in model.phases:
        model.losses(phase, x)["loss"].backward()
    assert model.decoder.logvar.grad.abs() > 0 and model.encoder.scale.grad.abs() > 0
    assert model.sample(2).shape == (2, 1, 8, 8)
    assert model.bound(x, 4).shape == (6,)
    # one example's bound does not depend on its neighbours'
    torch.manual_seed(0)
    assert model.bound(x[:1], 200).item() == pytest.approx(model.bound(x, 200)[0].item(), abs=1.5)


# ---- in the ways that people train -----------------------------------------------------------------------------------


@every_phase
def test_compiles_in_one_graph(name, phase, fresh_dynamo):
    """The same losses and gradients as eager: the noise is drawn by the same calls."""
    model = build(name)
    compiled = torch.compile(model.losses, fullgraph=True, backend="aot_eager")
    found = []
    for losses in (model.losses, compiled):
        model.zero_grad()
        torch.manual_seed(0)
        loss = losses(phase, batch_of(name))["loss"]
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    assert found[0][1].keys() == found[1][1].keys()
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "phase"), [("IWGAN", "generator"), ("AAVAE", "autoencoder")])
def test_compiles_with_inductor(name, phase, fresh_dynamo):
    model = build(name)
    compiled = torch.compile(model.losses, fullgraph=True)
    losses = compiled(phase, batch_of(name))
    losses["loss"].backward()
    assert losses["loss"].isfinite()
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in model.parameters_of(phase)}


@every_phase
def test_autocast(name, phase):
    """Networks in bfloat16, losses in float32, near those without autocast."""
    model = build(name)
    found = []
    for enabled in (False, True):
        model.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = model.losses(phase, batch_of(name))
        losses["loss"].backward()
        assert all(value.dtype == torch.float32 for value in losses.values())
        assert all(g.isfinite().all() for g in gradients(model).values())
        found.append((losses["loss"].detach(), gradients(model)))
    (loss, expected), (half, grads) = found
    assert half.item() == pytest.approx(loss.item(), rel=0.02)
    assert grads.keys() == expected.keys()
    every, of_half = (torch.cat([g.flatten() for g in of.values()]) for of in (expected, grads))
    assert F.cosine_similarity(every, of_half, dim=0) > 0.9


@every_model
def test_autocast_around_all_phases(name):
    """Losses of all phases in one context: what one phase passes as constants is cast anew where it learns."""
    model = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        model.sample(2) if hasattr(model, "prior") else None
        losses = {phase: model.losses(phase, batch_of(name))["loss"] for phase in model.phases}
    for phase, loss in losses.items():
        model.zero_grad()
        loss.backward()
        found = {id(p) for p in model.parameters() if p.grad is not None}
        assert found == {id(p) for p in model.parameters_of(phase)}, phase


class Checkpointed(nn.Module):
    """A network that is run once more in the backward pass, and notes how often it was called."""

    def __init__(self, network: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.network, self.use_reentrant, self.calls = network, use_reentrant, 0

    def forward(self, *inputs: Tensor) -> Any:
        self.calls += 1
        if self.use_reentrant and torch.is_grad_enabled():  # PyTorch's condition for it
            inputs = tuple(
                x if x.requires_grad or not x.is_floating_point() else x.clone().requires_grad_() for x in inputs
            )
        return checkpoint(self.network, *inputs, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    ("name", "phase"),
    [("GAN", "generator"), ("CycleGAN", "generator"), ("VAEGAN", "encoder"), ("VAEGAN", "generator")],
)
def test_activation_checkpointing(name, phase, use_reentrant):
    """Gradients of the phase's networks as without, of those held constant none; what a network notes stays."""
    model = build(name)
    torch.manual_seed(0)
    model.losses(phase, batch_of(name))["loss"].backward()
    expected = gradients(model)
    model.zero_grad()
    networks = [n for n, network in model.named_children() if not isinstance(network, (Prior, nn.ModuleList))]
    for network in networks:
        setattr(model, network, Checkpointed(getattr(model, network), use_reentrant))
    torch.manual_seed(0)
    model.losses(phase, batch_of(name))["loss"].backward()
    found = {key.replace(".network.", ".", 1): g for key, g in gradients(model).items()}
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert sum(getattr(model, network).calls for network in networks) >= 2


def _distributed(rank: int, file: str, results: Any) -> None:
    """Every phase of every model under DDP, against the mean of what the ranks compute by themselves."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    wrong = []
    for name in ZOO:
        model = build(name)
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        batch = batch_of(name, rank * BATCH)
        for phase in model.phases:
            torch.manual_seed(rank)
            model.zero_grad()
            model.losses(phase, batch)["loss"].backward()
            expected = gradients(model)
            for g in expected.values():
                torch.distributed.all_reduce(g)
                g /= 2
            torch.manual_seed(rank)
            model.zero_grad()
            parallel(phase, batch)["loss"].backward()
            found = gradients(model)
            close = all(torch.allclose(found[key], g, atol=1e-6, rtol=1e-4) for key, g in expected.items())
            unused = [key for key, g in found.items() if key not in expected and g.abs().max() > 0]
            if not close or unused:
                wrong.append((name, phase, unused))
    results.put((rank, wrong))
    del parallel
    gc.collect()  # the cycles of DDP hold the group, whose threads are to end before the process does
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    """Two processes, each with its own digits and noise, end with the mean of their gradients."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    torch.multiprocessing.spawn(_distributed, (str(tmp_path / "rendezvous"), results), nprocs=2)
    assert sorted(results.get() for _ in range(2)) == [(0, []), (1, [])]


@pytest.mark.parametrize("name", ["IWGAN", "VAE", "AAVAE"])
def test_lightning(name, tmp_path):
    """Inside a LightningModule, the phases by manual optimization: the parameters of a plain loop, to the bit."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.model = build(name)

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.Adam(self.model.parameters_of(phase), lr=1e-3) for phase in self.model.phases]

        def training_step(self, batch: Any, step: int) -> None:
            optimizers = self.optimizers()
            optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
            for phase, optimizer in zip(self.model.phases, optimizers, strict=True):
                losses = self.model.losses(phase, batch)
                optimizer.zero_grad()
                self.manual_backward(losses["loss"])
                optimizer.step()
                self.log_dict({f"{phase}/{key}": value for key, value in losses.items()})

    batches = [batch_of(name, step % 5 * BATCH) for step in range(4)]
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    torch.manual_seed(5)
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert set(trainer.logged_metrics) >= {f"{phase}/loss" for phase in module.model.phases}

    plain = build(name)
    torch.manual_seed(5)
    torch.empty((), dtype=torch.int64).random_()  # the seed that the loader takes
    train(plain, name, 4)
    for key, value in plain.state_dict().items():
        assert torch.equal(module.model.state_dict()[key], value), key


# ---- errors ----------------------------------------------------------------------------------------------------------

X, LABELS = torch.zeros(4, PIXELS), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("name", "phase", "batch", "error", "message"),
    [
        ("GAN", "generators", X, ValueError, "phase: got 'generators', expected one of 'discriminator', 'generator'"),
        ("GAN", "generator", "digits", TypeError, r"batch: expected tensors \(x\), got str"),
        ("GAN", "generator", (X, LABELS), ValueError, r"shapes \(4, 784\), \(4,\), expected \(x\)"),
        ("ConditionalGAN", "generator", X, ValueError, r"shapes \(4, 784\), expected \(x, labels\), examples first"),
        ("ConditionalVAE", "autoencoder", (X, LABELS[:3]), ValueError, "expected as many examples of each"),
        ("SemiSupervisedVAE", "autoencoder", (X, LABELS), ValueError, r"expected \(x_labelled, labels, x_unlabelled\)"),
        ("CycleGAN", "generator", (X, "x"), TypeError, r"got \(Tensor, str\)"),
        ("VAE", "autoencoder", torch.tensor(1.0), ValueError, "examples first"),
    ],
)
def test_bad_batches(name, phase, batch, error, message):
    with pytest.raises(error, match=message):
        build(name).losses(phase, batch)


def test_bad_networks():
    encoder, decoder = nn.Linear(PIXELS, 2 * LATENT), nn.Linear(LATENT, PIXELS)
    with pytest.raises(TypeError, match=r"encoder: expected a pair of tensors \(mean, logvar\), got Tensor"):
        uf.models.VAE(encoder, decoder, latent=LATENT).losses("autoencoder", X)
    with pytest.raises(ValueError, match=r"encoder: got shapes \(4, 8\), \(4, 8\), expected \(mean, logvar\), each"):
        uf.models.VAE(ZOO["VAE"].build().encoder, decoder, latent=LATENT + 1).losses("autoencoder", X)
    with pytest.raises(ValueError, match=r"encoder: got shape \(4, 16\), expected logits \(4, 8\)"):
        uf.models.WakeSleep(encoder, decoder, latent=LATENT, latents="bernoulli").losses("wake", X)
    with pytest.raises(TypeError, match="encoder: expected the logits of h, got tuple"):
        pair = ZOO["VAE"].build().encoder
        uf.models.WakeSleep(pair, decoder, latent=LATENT, latents="bernoulli").losses("wake", X)
    patches = ZOO["AAVAE"].build()
    patches.discriminator = nn.Linear(PIXELS, 9)
    with pytest.raises(ValueError, match=r"discriminator: got logits of shape \(4, 9\), expected one for each of 4"):
        patches.losses("autoencoder", X)
    info = ZOO["InfoGAN"].build()
    info.inference = nn.Linear(PIXELS, CLASSES)
    with pytest.raises(ValueError, match=r"inference: got 1 tensors, expected \(logits, mean, logvar\)"):
        info.losses("generator", X)
    semi = ZOO["SemiSupervisedVAE"].build()
    semi.classifier = nn.Linear(PIXELS, 3)
    with pytest.raises(ValueError, match=r"classifier: got shape \(4, 3\), expected \[N, 10\]"):
        semi.losses("autoencoder", (X, LABELS, X))
    units = ZOO["PredictabilityMinimization"].build()
    units.encoder = nn.Linear(PIXELS, 3)
    with pytest.raises(ValueError, match=r"encoder: got shape \(4, 3\), expected \[N, 8\]"):
        units.losses("predictor", X)
    cycle = ZOO["CycleGAN"].build()
    cycle.z_to_x = nn.Linear(PIXELS, 5)
    cycle.x_to_z = nn.Linear(5, PIXELS)
    with pytest.raises((ValueError, RuntimeError)):
        cycle.losses("generator", (X, X))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent": 0}, "latent: got 0, expected the positive size of z"),
        ({"latent": (3, 0)}, r"latent: got \(3, 0\)"),
        ({"latent": 2, "likelihood": "normal"}, "likelihood: got 'normal', expected one of 'bernoulli'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        uf.models.VAE(nn.Identity(), nn.Identity(), **options)


def test_other_bad_options():
    with pytest.raises(ValueError, match="fakes: got 'means', expected one of 'sample', 'mean'"):
        uf.models.AAVAE(nn.Identity(), nn.Identity(), nn.Identity(), latent=2, fakes="means")
    with pytest.raises(ValueError, match="expected none below 0 and a code to infer"):
        uf.models.InfoGAN(nn.Identity(), nn.Identity(), nn.Identity(), latent=2)
    with pytest.raises(ValueError, match="predictors: got 1, expected one for each of at least 2 units"):
        uf.models.PredictabilityMinimization(nn.Identity(), nn.Identity(), nn.ModuleList([nn.Identity()]))
    with pytest.raises(ValueError, match="num_samples: got 0, expected an integer of at least 1"):
        uf.models.IWAE(nn.Identity(), nn.Identity(), latent=2, num_samples=0)


# ---- the table -------------------------------------------------------------------------------------------------------


def test_table_has_every_phase():
    rows = uf.models.table().splitlines()[2:]
    assert len(rows) == len(PHASES)
    for row, (name, phase) in zip(rows, PHASES, strict=True):
        assert f"| {phase} |" in row and getattr(uf.models, name).phases[phase].minimises.replace("|", "\\|") in row


def test_readme_has_the_table():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert f"<!-- models -->\n{uf.models.table()}\n<!-- /models -->\n" in readme


def test_info_prints_it(capsys):
    assert main(["info", "--models"]) == 0
    assert capsys.readouterr().out == f"{uf.models.table()}\n"
