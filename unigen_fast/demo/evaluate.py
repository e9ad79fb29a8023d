"""What the trained models are worth: held-out bounds, a classifier's and the discriminators' view of the digits."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unigen_fast as uf
from unigen_fast.demo.data import Digits
from unigen_fast.demo.networks import classifier
from unigen_fast.demo.train import Progress

NUM_SAMPLES = 16  # K of the learning curves' bound
TEST_SAMPLES = 500  # K of the log-likelihood estimate


class Bounds(NamedTuple):
    """Means over the held-out digits, in nats; the ELBO's over 16 draws of z for each, too."""

    elbo: float
    iwae: float
    log_likelihood: float


def held_out_bounds(model: uf.models.VAE, x: Tensor, progress: Progress, title: str) -> Bounds:
    # two digits at a time: 1000 passes through these networks at once are the fastest
    pairs = x.split(2)
    return Bounds(
        elbo=model.bound(x.repeat(NUM_SAMPLES, 1)).mean().item(),
        iwae=model.bound(x, NUM_SAMPLES).mean().item(),
        log_likelihood=torch.cat([model.bound(pairs[i], TEST_SAMPLES) for i in progress(len(pairs), title)])
        .mean()
        .item(),
    )


def on_the_way(model: uf.models.VAE | uf.models.GAN, x: Tensor, batch_size: int) -> dict[str, float]:
    """What the learning curves show beside the losses."""
    if isinstance(model, uf.models.VAE):
        return {"elbo": model.bound(x).mean().item(), "iwae": model.bound(x, NUM_SAMPLES).mean().item()}
    with torch.no_grad():
        return {"ess": effective_samples(model.discriminator(model.sample(8 * batch_size)), batch_size)}


def effective_samples(logits: Tensor, batch_size: int) -> float:
    """Of the weights D/(1-D) of batches of samples, which an IWGAN uses and a GAN does not."""
    batches = logits[: len(logits) // batch_size * batch_size].unflatten(0, (-1, batch_size))
    return uf.effective_sample_size(batches, dim=1).mean().item()


def discriminated(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Mean D(x) of either side and the share that D is right about, from its logits."""
    _, stats = uf.discriminator_loss(real=real, fake=fake, return_stats=True)
    return {
        "real_probability": stats.real_mean_probability.item(),
        "fake_probability": stats.fake_mean_probability.item(),
        "real_accuracy": stats.real_accuracy.item(),
        "fake_accuracy": stats.fake_accuracy.item(),
    }


def train_classifier(
    digits: Digits, epochs: int = 10, batch_size: int = 100, progress: Progress = lambda n, title: range(n)
) -> tuple[nn.Module, float]:
    """(the classifier, its accuracy on the held-out digits)."""
    model = classifier().to(digits.train.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in progress(epochs, "classifier"):
        for batch in torch.randperm(len(digits.train)).to(digits.train.device).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.train[batch]), digits.train_labels[batch]).backward()
            optimizer.step()
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
def generate(generator: nn.Module, z: Tensor) -> Tensor:
    """Digits of these codes, pixels in [0, 1]: a GAN's samples, the means of a VAE's p(x|z)."""
    return torch.cat([generator(chunk).sigmoid() for chunk in z.split(500)])
