"""The paper's models: every phase of every class, in the ways that people train."""

import copy
import gc
import inspect
import io
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from model_zoo import BATCH, CLASSES, LATENT, PIXELS, ZOO, Pair, batch_of, build
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import unigen_fast as uf
from unigen_fast.__main__ import main
from unigen_fast.models import MODELS, Model, variational, wake_sleep
from unigen_fast.models._likelihoods import Likelihood
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
    batch = batch_of(name, size=2)  # of one block
    torch.manual_seed(0)
    rows = model.bound(batch)
    model.kl_weight = 4.0
    torch.manual_seed(0)
    assert torch.equal(model.bound(batch), rows)
    vae = build("ConditionalVAE" if "Conditional" in name else "VAE")
    vae.load_state_dict(model.state_dict(), strict=False)
    torch.manual_seed(0)
    loss = vae.losses("autoencoder", batch)["loss"]
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


# ---- the memory of bounds --------------------------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """The most bytes of all operations' outputs at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        found = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(found):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.grow(t.untyped_storage().nbytes())
                weakref.finalize(t.untyped_storage(), self.grow, -t.untyped_storage().nbytes())
        return found

    def grow(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


class Enlarge(nn.Module):
    """Images of 3 × 32 × 32 by way of maps that are larger."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Linear(LATENT, 6 * 8 * 8)

    def forward(self, z: Tensor) -> Tensor:
        maps = F.interpolate(self.small(z).unflatten(1, (6, 8, 8)), scale_factor=4).relu()
        return maps[:, :3] - maps[:, 3:]


@pytest.mark.parametrize("name", ["VAE", "SemiSupervisedVAE", "WakeSleep"])
def test_bound_keeps_to_its_memory(name):
    """2500 samples of four images, whatever else the model does; an encoder's share counts as a decoder's does."""
    encoder = nn.Sequential(nn.Flatten(), Pair(nn.Linear(3072, 2 * LATENT)))
    if name == "SemiSupervisedVAE":
        encoder.forward = lambda x, labels: nn.Sequential.forward(encoder, x)
        decoder = Enlarge()
        decoder.forward = lambda z, labels: Enlarge.forward(decoder, z)
        model = uf.models.SemiSupervisedVAE(encoder, decoder, nn.Identity(), latent=LATENT, num_classes=3)
    else:
        model = getattr(uf.models, name)(encoder, Enlarge(), latent=LATENT)
    x = torch.rand(4, 3, 32, 32).round()
    with Alive() as memory:
        of_default = model.bound(x, 2500 if name == "VAE" else 500)
    assert memory.most < 100 * 2**20
    if name == "VAE":
        with Alive() as memory:
            model.bound(x, 200, max_bytes=4 * 2**20)
        assert 1 * 2**20 < memory.most < 5 * 2**20
        compiled = uf.models.VAE(encoder, torch.compile(model.decoder, fullgraph=True, backend="eager"), latent=LATENT)
        torch.testing.assert_close(compiled.bound(x, 100), of_default, atol=30, rtol=0)
    for wrong in (0, 1e9, None):
        with pytest.raises(ValueError, match="max_bytes: got"):
            model.bound(x, max_bytes=wrong)


def test_bound_of_many_examples_keeps_to_its_memory():
    """Their encoder too sees as many at a time as fit."""
    wide = nn.Sequential(nn.Linear(2, 8192), nn.ReLU(), nn.Linear(8192, 4))
    model = uf.models.VAE(Pair(wide), nn.Linear(2, 2), latent=2)
    with Alive() as memory:
        assert model.bound(torch.rand(4000, 2).round()).shape == (4000,)
    assert memory.most < 40 * 2**20


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("num_samples", [1, 12])
def test_chunks_change_no_bound(name, num_samples, monkeypatch):
    """The same noise for each example and sample: the bound of chunks of a row is that of one chunk."""
    model, noise = build(name).double(), {}

    def drawn(example: Tensor, start: int, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(int(example.abs().sum() * 1e6) % 2**40)
        return torch.rand(num_samples, LATENT, dtype=torch.float64, generator=generator)[start : start + n]

    def sample(mean: Tensor, second: Tensor | None, n: int) -> Tensor:
        starts = [noise.setdefault(tuple(row.tolist()), 0) for row in mean]
        for row in mean:
            noise[tuple(row.tolist())] += n
        u = torch.stack([drawn(row, start, n) for row, start in zip(mean, starts, strict=True)])
        if second is None:
            return (u < mean.unsqueeze(1).sigmoid()).double()
        return mean.unsqueeze(1) + second.unsqueeze(1).mul(0.5).exp() * torch.special.ndtri(u)

    def gaussian(mean: Tensor, logvar: Tensor, num_samples: int | None = None, sample_dim: int = 0) -> Tensor:
        z = sample(mean, logvar, num_samples or 1)
        return z if num_samples else z.squeeze(1)

    monkeypatch.setattr(variational, "sample_gaussian", gaussian)
    monkeypatch.setattr(wake_sleep, "sample_gaussian", gaussian)
    if name == "ReweightedWakeSleep":
        monkeypatch.setattr(model, "draw", lambda posterior, n: sample(posterior[0], None, n))
    batch = cast(bounded_batch(name), dtype=torch.float64)
    batch = tuple(t[:3] for t in batch) if isinstance(batch, tuple) else batch[:3]
    found = []
    for max_bytes in (2**60, 10**5, 1):
        noise.clear()
        found.append(model.bound(batch, num_samples, max_bytes=max_bytes))
    torch.testing.assert_close(found[1], found[0], atol=1e-9, rtol=1e-12)
    torch.testing.assert_close(found[2], found[0], atol=1e-9, rtol=1e-12)


@pytest.mark.parametrize("kind", ["IWAE", "VAE", "ReweightedWakeSleep"])
def test_classes_may_be_in_any_dimension_of_samples(kind):
    """`class_dim` counts without the samples, which come before it."""
    found = []
    for dim in (1, -1):
        torch.manual_seed(0)
        linear = nn.Linear(2, 12)

        class Classes(nn.Module):
            def __init__(self, linear: nn.Module, dim: int) -> None:
                super().__init__()
                self.linear, self.dim = linear, dim

            def forward(self, z: Tensor) -> Tensor:
                return self.linear(z).unflatten(1, (3, 4)).movedim(1, self.dim)

        class Codes(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return x[:, :2].float(), x[:, :2].float() - 2

        options = {"num_samples": 3} if kind != "VAE" else {}
        model = getattr(uf.models, kind)(
            Codes(),
            Classes(linear, dim),
            latent=2,
            likelihood="categorical",
            likelihood_options={"class_dim": dim},
            **options,
        )
        x = torch.randint(3, (3, 4))  # as many examples as samples and classes
        torch.manual_seed(1)
        phase = next(iter(model.phases))
        found.append((model.losses(phase, x)["loss"].detach(), model.bound(x, 3), model.sample(5)))
    torch.testing.assert_close(found[0], found[1])


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


# ---- samplers --------------------------------------------------------------------------------------------------------

RED = [0.5, 1.0, -0.5, 0.75, -5.0, -5.5, 2.0, -1.0]  # of two components: logits; means, log-scales, coefficients
# likelihood, the parameters of one site, of numbers that bfloat16 has, and options: every one that a likelihood has
SAMPLED: list[tuple[str, tuple[list[float], ...], dict[str, Any]]] = [
    ("bernoulli", ([0.5],), {}),
    ("gaussian", ([1.5], [0.75]), {}),
    ("gaussian", ([1.5],), {}),
    ("gaussian", ([1.5], [2.0]), {"spread": "std", "clamp_logvar": (-1.0, 0.5)}),
    ("laplace", ([-1.0], [0.5]), {}),
    ("discretized_logistic", ([0.125], [-3.0]), {}),
    ("discretized_logistic", ([0.75], [0.25]), {"bin_width": 0.5, "low": -2.0, "high": 2.0}),
    ("negative_binomial", ([3.0], [2.0]), {}),
    ("negative_binomial", ([300.0], [4.0]), {}),  # counts that bfloat16 does not have
    ("negative_binomial", ([3.0], [2.0]), {"eps": 2**-9}),
    ("zero_inflated_negative_binomial", ([3.0], [2.0], [-0.5]), {}),
    ("zero_inflated_negative_binomial", ([3.0], [2.0], [-0.5]), {"eps": 2**-9}),
    ("categorical", ([1.0, -1.0, 0.5],), {"class_dim": 1}),
    ("discretized_logistic_mixture", ([0.5, 1.0, -0.5, 0.75, -3.0, -1.0],), {"channels": 1}),
    ("discretized_logistic_mixture", ([*RED, 0.25, 0.0, -5, -5.5, 1, 0.5, 0, 0.5, -5, -5.5, -1, 2],), {"channels": 3}),
]
wide_and_narrow = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def test_every_likelihood_and_option_is_sampled():
    for name in uf.objectives.LIKELIHOODS:
        takes = inspect.signature(getattr(uf, f"{name}_log_prob")).parameters
        options = {"channels"} if name.endswith("mixture") else set()
        # a label that is ignored is never drawn
        others = ("x", "event_ndims", "ignore_index", *uf.objectives.LIKELIHOODS[name])
        options |= {key for key in takes if key not in others}
        assert options == {key for sampled, _, given in SAMPLED if sampled == name for key in given}, name


@wide_and_narrow
@pytest.mark.parametrize(("name", "parameters", "options"), SAMPLED)
def test_samples_are_as_frequent_as_their_likelihood_says(name, parameters, options, dtype):
    """The share of each value, of densities that of each cell of the width 1/8, is exp(log p) but for its error."""
    n, width = 100_000, 1 / 8 if name in ("gaussian", "laplace") else None
    likelihood = Likelihood(name, options)
    given = [torch.tensor(p, dtype=dtype).expand(n, -1) for p in parameters]
    torch.manual_seed(0)
    x = likelihood.sample(given)
    assert x.dtype == (torch.int64 if name == "categorical" else torch.float32)
    if width is not None:
        x = (x / width + 0.5).floor() * width  # the middle of its cell; a Laplace's peak is one
    values, counts = x.unique(dim=0, return_counts=True)
    of_values = [torch.tensor(p, dtype=torch.float64).expand(len(values), -1) for p in parameters]
    p = likelihood.log_prob(of_values, values if name == "categorical" else values.double()).exp() * (width or 1)
    assert p.sum().item() == pytest.approx(1, abs=0.05)  # of the colours that were seen; else all but a few
    common = p * n > 10
    error = (p * (1 - p) / n).sqrt()
    excess = ((counts / n - p) / error)[common]
    assert excess.abs().max() < 5
    assert excess.square().mean().item() < 1 + 5 * math.sqrt(2 / len(excess))
    assert excess.numel() > (1 if name == "bernoulli" else 2)


@pytest.mark.parametrize(("name", "parameters", "options"), SAMPLED)
def test_samples_of_half_precision_are_those_of_float32(name, parameters, options):
    """As they are under autocast, and of decoders in float64 in that."""
    likelihood = Likelihood(name, options)

    def draw(dtype: torch.dtype, **how: Any) -> Tensor:
        torch.manual_seed(0)
        return likelihood.sample([torch.tensor(p, dtype=dtype).expand(64, -1) for p in parameters], **how)

    for mean in (False, True):
        x = draw(torch.float32, mean=mean)
        assert torch.equal(draw(torch.bfloat16, mean=mean), x) and torch.equal(draw(torch.float16, mean=mean), x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(draw(torch.bfloat16, mean=mean), x)
        assert draw(torch.float64, mean=mean).dtype == (torch.int64 if name == "categorical" else torch.float64)


@wide_and_narrow
@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize(("name", "parameters", "options"), SAMPLED)
def test_samples_at_the_ends_of_the_random_numbers(name, parameters, options, end, dtype, monkeypatch):
    """`rand` gives 0 once in 2^24 draws, in bfloat16 once in 256: no sample is infinite, nor of probability 0."""
    for function in ("rand", "rand_like"):
        drawn = getattr(torch, function)
        monkeypatch.setattr(torch, function, lambda *a, drawn=drawn, **k: torch.full_like(drawn(*a, **k), end))
    likelihood = Likelihood(name, options)
    given = [torch.tensor(p, dtype=dtype).expand(4, -1) for p in parameters]
    x = likelihood.sample(given)
    assert x.double().isfinite().all()
    assert likelihood.log_prob([t.float() for t in given], x).isfinite().all()


@pytest.mark.parametrize(("name", "parameters", "options"), SAMPLED)
def test_means_are_those_of_the_samples(name, parameters, options):
    torch.manual_seed(0)
    given = [torch.tensor(p).expand(100_000, -1) for p in parameters]
    likelihood = Likelihood(name, options)
    x, mean = likelihood.sample(given).double(), likelihood.sample(given, mean=True)[0]
    if name == "categorical":
        assert mean == given[0][0].argmax()
        return
    slack = 0.5 * options["bin_width"] ** 2 if "bin_width" in options else 1e-3  # rounding to bins is left out
    assert ((x.mean(0) - mean).abs() < 4 * x.std(0) / math.sqrt(len(x)) + slack).all()


def test_a_mean_of_pixels_stays_in_their_range():
    """Whatever the scale: that of what lies beyond counts as the extreme level."""
    mean, log_scale = torch.tensor([-7.0, -0.5, 0.3, 5.0]).repeat(6, 1), torch.linspace(-120, 40, 6).unsqueeze(1)
    found = Likelihood("discretized_logistic", {}).sample((mean, log_scale.expand(6, 4)), mean=True)
    torch.testing.assert_close(found[0], torch.tensor([-1.0, -0.5, 0.3, 1.0]))
    torch.testing.assert_close(found[-1], torch.zeros(4), atol=1e-5, rtol=0)


def test_counts_of_any_mean_are_counts():
    """PyTorch's Poisson of a rate beyond 2^63 is negative; fp16 data end at 65504."""
    mu = torch.tensor([0.0, 1e-30, 1e8, 1e12, 1e25, math.inf]).expand(50, 6)
    x = Likelihood("negative_binomial", {}).sample((mu, torch.tensor(1e6)))
    assert (x >= 0).all() and not x[:, :2].any() and (x[:, 5] == math.inf).all()
    torch.testing.assert_close(x[:, 2:5] / mu[:, 2:5], torch.ones(50, 3), atol=0.01, rtol=0)
    half = Likelihood("negative_binomial", {}).sample((mu, torch.tensor(1e6)), like=mu.half())
    assert half.dtype == torch.float16 and half.isfinite().all()
    byte = Likelihood("negative_binomial", {}).sample((mu, torch.tensor(1e6)), like=mu.to(torch.uint8))
    assert byte.dtype == torch.uint8 and (byte[:, 2:] == 255).all()


def test_channels_of_a_mixture_are_said_where_they_are_not_clear():
    def sample(numbers: int, channels: int | None = None, like: Tensor | None = None) -> int:
        likelihood = Likelihood("discretized_logistic_mixture", {} if channels is None else {"channels": channels})
        return likelihood.sample(torch.zeros(2, 4, 4, numbers), like=like).size(-1)

    assert [sample(n) for n in (3, 15, 10, 50, 100)] == [1, 1, 3, 3, 3]
    assert [sample(30, c) for c in (1, 3)] == [1, 3]
    assert [sample(30, like=torch.zeros(2, 4, 4, c)) for c in (1, 3)] == [1, 3]
    with pytest.raises(
        ValueError, match=r"decoder's params: got 30 for each pixel.*likelihood_options=\{'channels': 1\}"
    ):
        sample(30)
    with pytest.raises(ValueError, match=r"decoder: got samples of shape \(2, 4, 4, 3\), expected \(2, 4, 4, 1\)"):
        sample(30, 3, torch.zeros(2, 4, 4, 1))


def test_fakes_have_the_shape_and_kind_of_the_data():
    vae = uf.models.AAVAE(nn.Identity(), nn.Linear(2, 5), nn.Identity(), latent=2, fakes="mean")
    with pytest.raises(ValueError, match=r"decoder: got samples of shape \(4, 5\), expected \(4, 1, 5\)"):
        vae.losses("discriminator", torch.zeros(4, 1, 5))
    with pytest.raises(ValueError, match=r"batch: got torch\.uint8, expected floating-point data"):
        vae.fake(torch.zeros(4, 5, dtype=torch.uint8))
    vae.fakes = "sample"
    assert vae.fake(torch.zeros(4, 5, dtype=torch.uint8))[0].dtype == torch.uint8
    with pytest.raises(ValueError, match=r"decoder's log_scale: got shape \(4, 3\), expected \(4, 5\) as mean"):
        Likelihood("laplace", {}).sample((torch.zeros(4, 5), torch.zeros(4, 3)))


SEEDS, SITES, NUMBERS = 4, 12, 4
DATA: dict[str, Callable[..., Tensor]] = {
    "bernoulli": lambda *shape: torch.rand(shape).round(),
    "gaussian": torch.randn,
    "laplace": torch.randn,
    "discretized_logistic": lambda *shape: torch.randint(256, shape) / 127.5 - 1,
    "negative_binomial": lambda *shape: torch.poisson(4 * torch.rand(shape)),
    "zero_inflated_negative_binomial": lambda *shape: torch.poisson(4 * torch.rand(shape)),
    "categorical": lambda *shape: torch.randint(NUMBERS, shape),
    "discretized_logistic_mixture": lambda *shape: torch.randint(256, (*shape[:-1], 2, 2, 3)) / 127.5 - 1,
}


class Seeds(nn.Module):
    """As many networks as seeds, each with its own parameters and examples: every fourth."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ParameterList()
        for n, m in ((inputs, 8), (8, outputs)):
            of_seeds = []
            for seed in range(SEEDS):
                torch.manual_seed(seed)
                of_seeds.append(torch.randn(n, m) / math.sqrt(n))
            self.layers.append(torch.stack(of_seeds))

    def forward(self, x: Tensor) -> Tensor:
        x = F.one_hot(x, NUMBERS).float() if not x.is_floating_point() else x
        x = x.flatten(1).unflatten(0, (-1, SEEDS)).transpose(0, 1)
        return ((x @ self.layers[0]).tanh() @ self.layers[1]).transpose(0, 1).flatten(0, 1)


class Parameters(Seeds):
    def __init__(self, likelihood: str) -> None:
        self.numbers = {"categorical": NUMBERS, "discretized_logistic_mixture": 10}.get(likelihood)
        self.names = uf.objectives.LIKELIHOODS[likelihood]
        super().__init__(2, SITES * (self.numbers or len(self.names)))

    def forward(self, z: Tensor) -> Any:
        found = super().forward(z)
        if self.numbers == 10:
            return found[:, : 4 * 10].unflatten(1, (2, 2, 10))
        if self.numbers:
            return found.unflatten(1, (SITES, NUMBERS))
        parts = dict(zip(self.names, found.chunk(len(self.names), 1), strict=True))
        return tuple(F.softplus(t) if name in ("mu", "theta") else t for name, t in parts.items())


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("likelihood", uf.objectives.LIKELIHOODS)
def test_aavae_of_every_likelihood_lives_500_steps(likelihood, autocast):
    """Four seeds, side by side in one batch: parameters of all of them stay finite, and what they learn is better."""
    inputs = SITES * NUMBERS if likelihood == "categorical" else SITES
    model = uf.models.AAVAE(
        Pair(Seeds(inputs, 4)), Parameters(likelihood), Seeds(inputs, 1), latent=2, likelihood=likelihood
    )
    torch.manual_seed(0)
    x = DATA[likelihood](8 * SEEDS, SITES)
    first = model.losses("autoencoder", x)
    optimizers = {phase: torch.optim.Adam(model.parameters_of(phase), lr=3e-3, fused=True) for phase in model.phases}
    for _ in range(500):
        for phase, optimizer in optimizers.items():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                last = model.losses(phase, x)
            optimizer.zero_grad()
            last["loss"].backward()
            optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert last["log_likelihood"] - last["kl"] > first["log_likelihood"] - first["kl"]


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
    with pytest.raises(ValueError, match="categories, continuous: got 0 and 0, expected a code to infer"):
        uf.models.InfoGAN(nn.Identity(), nn.Identity(), nn.Identity(), latent=2)
    with pytest.raises(ValueError, match="predictors: got 1, expected one for each of at least 2 units"):
        uf.models.PredictabilityMinimization(nn.Identity(), nn.Identity(), nn.ModuleList([nn.Identity()]))
    with pytest.raises(ValueError, match="num_samples: got 0, expected an integer of at least 1"):
        uf.models.IWAE(nn.Identity(), nn.Identity(), latent=2, num_samples=0)


# ---- options ---------------------------------------------------------------------------------------------------------


def options_of(model: type[Model]) -> set[str]:
    """The options of the constructor, those included that it hands on to its bases."""
    found: set[str] = set()
    for base in model.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            found |= {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                return found
    raise AssertionError(model)


def shifted(*shape: int, **kind: Any) -> Tensor:
    return torch.randn(*shape, **kind) + 3


# option: another value, and what it changes: losses; what `sample` gives; or, of sizes, what the networks must fit
ANOTHER: dict[str, tuple[Any, str]] = {
    "noise": (shifted, "losses"),
    "kl_weight": (4.0, "losses"),
    "info_weight": (4.0, "losses"),
    "adversary_weight": (4.0, "losses"),
    "predictability_weight": (4.0, "losses"),
    "cycle_weight": (4.0, "losses"),
    "classification_weight": (4.0, "losses"),
    "reconstruction_weight": (4.0, "losses"),
    "likelihood": ("gaussian", "losses"),
    "likelihood_options": ({"spread": "std"}, "losses"),
    "fakes": ("mean", "losses"),
    "per_class": (False, "losses"),
    "group": ("a group", "losses"),
    "estimator": ("elbo", "losses"),
    "estimator_options": ({"num_groups": 1}, "losses"),
    "num_samples": (3, "losses"),
    "latents": ("bernoulli", "sizes"),  # whose encoder gives logits
    "latent": (LATENT + 1, "sizes"),
    "categories": (CLASSES + 1, "sizes"),
    "continuous": (3, "sizes"),
    "num_classes": (2, "sample"),
}
OPTIONS = [(model.__name__, option) for model in MODELS for option in sorted(options_of(model))]


def built(name: str, **options: Any) -> Model:
    """The zoo's model, some of its options others; what an option needs beside it is there in both."""
    init = getattr(uf.models, name).__init__

    def construct(self: Model, *networks: Any, **given: Any) -> None:
        if "latents" in given and "latents" in options:  # reweighted wake-sleep has logits in the zoo
            options["latents"] = "gaussian"
        init(self, *networks, **given | options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(getattr(uf.models, name), "__init__", construct)
        return build(name)


class Twice(nn.Module):
    """A decoder of means and of spreads, which are positive."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        found = self.decoder(*inputs)
        return found, found.square() + 0.5


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_every_option_changes_something(name, option, monkeypatch):
    value, what = ANOTHER[option]
    beside: dict[str, Any] = {
        "likelihood_options": {"likelihood": "gaussian"},
        "estimator_options": {"estimator": "miwae"},
    }.get(option, {})
    usual = {"likelihood_options": {}, "estimator_options": {"num_groups": 5}}.get(option)
    models = [
        built(name, **beside, **({} if usual is None else {option: usual})),
        built(name, **beside, **{option: value}),
    ]
    if option == "likelihood_options":
        for model in models:
            model.decoder = Twice(model.decoder)
    if option == "group":  # of one process; that it reaches across several is seen in test_distributed
        loss = uf.importance_weighted_generator_loss

        def of_group(*, group: Any, **given: Any) -> Tensor:
            assert group == value
            return 2 * loss(**given)

        monkeypatch.setattr(uf.distributed, "importance_weighted_generator_loss", of_group)
    found = []
    for model in models:
        torch.manual_seed(0)
        if what == "sample" and name not in ("SemiSupervisedVAE", "AASemiSupervisedVAE"):
            found.append([model.sample(20)])
            continue
        try:
            found.append([model.losses(phase, batch_of(name))["loss"].detach() for phase in model.phases])
        except (ValueError, RuntimeError, TypeError):
            assert what != "losses" and model is models[1]
            return
    assert any(not torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_model
def test_misspelt_options_are_refused(name):
    for wrong in ("kl_wieght", "likelihood_option", "lattent"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{wrong}'"):
            built(name, **{wrong: 1})


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("IWAE", {"kl_weight": 50.0}, TypeError, "unexpected keyword argument 'kl_weight'"),
        ("IWAE", {"estimator": "iwea"}, ValueError, "estimator: got 'iwea', expected one of 'iwae'"),
        ("IWAE", {"estimator": "miwae"}, ValueError, "num_groups: got none, expected one for estimator 'miwae'"),
        ("IWAE", {"estimator_options": {"beta": 0.5}}, ValueError, "beta: got 0.5 with estimator 'iwae'"),
        ("IWAE", {"estimator_options": {"reduction": "sum"}}, ValueError, "estimator_options: got 'reduction'"),
        (
            "IWAE",
            {"estimator": "miwae", "estimator_options": {"num_groups": 3}},
            ValueError,
            "num_groups: got 3, expected a divisor of the 5 samples",
        ),
        ("VAE", {"likelihood_options": {"spread": "std"}}, ValueError, "got 'spread', expected none for likelihood"),
        ("VAE", {"likelihood": "gaussian", "likelihood_options": {"var": 1}}, ValueError, "got 'var', expected one of"),
        ("WakeSleep", {"likelihood": "gaussian", "likelihood_options": {"spread": "s"}}, ValueError, "spread: got 's'"),
        ("AAVAE", {"likelihood": "negative_binomial", "likelihood_options": {"eps": -1}}, ValueError, "eps: got -1"),
        ("VAE", {"likelihood": "categorical", "likelihood_options": {"class_dim": 1.5}}, TypeError, "class_dim"),
        (
            "VAE",
            {"likelihood": "discretized_logistic_mixture", "likelihood_options": {"channels": 2}},
            ValueError,
            "likelihood_options: got channels 2, expected 1 or 3",
        ),
        ("ConditionalGAN", {"num_classes": 0}, ValueError, "num_classes: got 0, expected an integer of at least 1"),
        ("ConditionalVAE", {"num_classes": 2.0}, ValueError, "num_classes: got 2.0"),
        ("GAN", {"noise": "normal"}, TypeError, r"noise: expected a function like torch\.randn, got str"),
        ("GAN", {"latent": 2.5}, ValueError, r"latent: got 2\.5, expected the positive size of z"),
        ("InfoGAN", {"categories": -1}, ValueError, "categories: got -1, expected an integer of at least 0"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        built(name, **options)


def test_the_kl_weight_of_an_iwae_is_not_set_in_vain():
    model = build("IWAE")
    model.kl_weight = 1.0
    with pytest.raises(AttributeError, match=r"kl_weight: got 50\.0"):
        model.kl_weight = 50.0


def test_patches_have_their_own_importance_weights():
    """Eq. 16 of the samples at every place, per class those of a label; the mean over places and labels."""
    logits, labels = torch.randn(6, 1, 2, 3, dtype=torch.float64), torch.tensor([0, 2, 2, 0, 2, 2])
    fake = (torch.zeros(6, 4), labels)

    def expected(groups: Any) -> Tensor:
        of_places = [torch.stack([(l.softmax(0) * F.softplus(-l)).sum() for l in place]) for place in groups]  # noqa: E741
        return torch.stack(of_places).mean()

    flat = logits.flatten(1).t()
    iwgan, per_class = build("IWGAN"), build("IWConditionalGAN")
    torch.testing.assert_close(iwgan.generator_loss(logits, fake), expected([[l] for l in flat]))  # noqa: E741
    of_labels = [[l[labels == c] for c in (0, 2)] for l in flat]  # noqa: E741
    torch.testing.assert_close(per_class.generator_loss(logits, fake), expected(of_labels))
    one = logits[:1], (fake[0][:1], labels[:1])
    for model in (iwgan, per_class):
        torch.testing.assert_close(model.generator_loss(*one), build("GAN").generator_loss(*one))
    for wrong in (logits[:5], logits.sum()):
        with pytest.raises(
            ValueError, match=r"discriminator: got logits of shape .*, expected \[6, …\], examples first"
        ):
            iwgan.generator_loss(wrong, fake)
    with pytest.raises(ValueError, match=r"batch: got labels of shape \(6, 1\), expected \(6,\) with per_class=True"):
        per_class.generator_loss(logits, (fake[0], labels.unsqueeze(1)))


# ---- the table -------------------------------------------------------------------------------------------------------


def test_table_has_every_phase():
    rows = uf.models.table().splitlines()[2:]
    assert len(rows) == len(PHASES)
    for row, (name, phase) in zip(rows, PHASES, strict=True):
        assert f"| {phase} |" in row and getattr(uf.models, name).phases[phase].minimises.replace("|", "\\|") in row


def test_info_prints_it(capsys):
    assert main(["info", "--models"]) == 0
    assert capsys.readouterr().out == f"{uf.models.table()}\n"
