"""The models of *On Unifying Deep Generative Models*: each a choice of p and q, and of the KL each phase minimises.

They take your own networks and have no trainer:

    model = uf.models.IWGAN(generator, discriminator, latent=100)
    optimizers = {phase: torch.optim.Adam(model.parameters_of(phase), lr=2e-4) for phase in model.phases}
    for x in batches:
        for phase in model.phases:
            loss = model.losses(phase, x)["loss"]
            optimizers[phase].zero_grad()
            loss.backward()
            optimizers[phase].step()
    x = model.sample(64)

Read `adversarial.py` for KL(p ‖ q), θ on the left (GANs), `variational.py` for KL(q ‖ p), θ on the right (VAEs), and
`wake_sleep.py` for one side at a time. `print(uf.models.table())` is the paper's Table 1, made from the classes.
"""

from unigen_fast.models._model import Model, Phase
from unigen_fast.models.adversarial import (
    GAN,
    IWGAN,
    AdversarialAutoencoder,
    AdversarialDomainAdaptation,
    ConditionalGAN,
    CycleGAN,
    InfoGAN,
    IWConditionalGAN,
    PredictabilityMinimization,
)
from unigen_fast.models.variational import (
    AAVAE,
    IWAE,
    VAE,
    VAEGAN,
    AAConditionalVAE,
    AASemiSupervisedVAE,
    ConditionalVAE,
    SemiSupervisedVAE,
)
from unigen_fast.models.wake_sleep import ReweightedWakeSleep, WakeSleep

# in the order in which the paper comes to them
MODELS: tuple[type[Model], ...] = (
    AdversarialDomainAdaptation,
    GAN,
    ConditionalGAN,
    InfoGAN,
    AdversarialAutoencoder,
    PredictabilityMinimization,
    CycleGAN,
    IWGAN,
    IWConditionalGAN,
    VAE,
    ConditionalVAE,
    SemiSupervisedVAE,
    IWAE,
    AAVAE,
    AAConditionalVAE,
    AASemiSupervisedVAE,
    VAEGAN,
    WakeSleep,
    ReweightedWakeSleep,
)

__all__ = ["MODELS", "Model", "Phase", "table", *(model.__name__ for model in MODELS)]


def table() -> str:
    """Model × phase × the KL it minimises, in Markdown: the paper's Table 1, from the classes themselves."""
    lines = ["| model | p | q | phase | updates | minimises | paper |", "|---|---|---|---|---|---|---|"]
    for model in MODELS:
        for i, phase in enumerate(model.phases.values()):
            first = (f"`{model.__name__}`", model.p, model.q) if i == 0 else ("", "", "")
            paper = model.of_paper if i == 0 else ""
            cells = (*first, phase.name, ", ".join(phase.updates), phase.minimises, paper)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)
