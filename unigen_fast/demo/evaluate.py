"""What the trained models are worth: held-out bounds, and a classifier's view of generated digits."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unigen_fast as uf
from unigen_fast.demo.data import Digits
from unigen_fast.demo.networks import Adversaries, Autoencoder, classifier
from unigen_fast.demo.train import NUM_SAMPLES, bound, update

TEST_SAMPLES = 500  # K of the log-likelihood estimate
CHUNK = 20  # digits at a time: their 20 · 500 · 784 logits are 31 MB


class Bounds(NamedTuple):
    """Means over the held-out digits, in nats; effective sample sizes of K = 16 and K = 500 weights."""

    elbo: float
    iwae: float
    log_likelihood: float
    ess_16: float
    ess_500: float


@torch.no_grad()
def held_out_bounds(model: Autoencoder, x: Tensor) -> Bounds:
    """All from the same 500 samples per digit; the K = 16 figures are means over 31 groups of 16 of them."""
    log_w = torch.cat([bound(model, chunk, TEST_SAMPLES).log_w for chunk in x.split(CHUNK)])
    groups = log_w[:, : TEST_SAMPLES // NUM_SAMPLES * NUM_SAMPLES].unflatten(1, (-1, NUM_SAMPLES))
    return Bounds(
        elbo=log_w.mean().item(),
        iwae=uf.log_mean_exp(groups, dim=2).mean().item(),
        log_likelihood=uf.log_mean_exp(log_w, dim=1).mean().item(),
        ess_16=uf.effective_sample_size(groups, dim=2).mean().item(),
        ess_500=uf.effective_sample_size(log_w, dim=1).mean().item(),
    )


def train_classifier(digits: Digits, epochs: int = 10, batch_size: int = 100) -> tuple[nn.Module, float]:
    """(the classifier, its accuracy on the held-out digits)."""
    model = classifier().to(digits.train.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(digits.train)).to(digits.train.device).split(batch_size):
            update(optimizer, F.cross_entropy(model(digits.train[batch]), digits.train_labels[batch]))
    model.eval()
    with torch.no_grad():
        accuracy = (model(digits.test).argmax(1) == digits.test_labels).float().mean().item()
    return model, accuracy


@torch.no_grad()
def classifier_score(model: nn.Module, x: Tensor) -> float:
    """exp(mean KL(p(label|x) || p(label))), 1 to 10: the inception score of a digit classifier."""
    log_p = torch.cat([model(chunk) for chunk in x.split(500)]).log_softmax(1)
    p = log_p.exp()
    return (p * (log_p - p.mean(0).log())).sum(1).mean().exp().item()


@torch.no_grad()
def generate(model: Adversaries, n: int) -> tuple[Tensor, Tensor]:
    """n generated digits, pixels in [0, 1], and the discriminator's logits of them. In eval mode."""
    training = model.training
    model.eval()
    pairs = [(x, model.discriminator(x)) for x in map(model.generator, model.noise(n).split(500))]
    model.train(training)
    pixels, logits = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return (pixels + 1) / 2, logits
