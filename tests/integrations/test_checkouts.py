"""VITS, HiFi-GAN and StudioGAN are no packages: ours against their formulas, in a module of the user's."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import cotangents_like
from torch import Tensor

import unigen_fast as uf
from unigen_fast.integrations import _patching, studiogan, vits

BOUND = 1e-10


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def compare(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], tensors: list[Tensor]) -> None:
    found, expected = ours(*tensors), theirs(*tensors)
    assert found.shape == expected.shape and abs(found - expected) <= BOUND * max(1, abs(expected))
    (cotangent,) = cotangents_like([expected])
    gradients = [torch.autograd.grad(loss, tensors, cotangent) for loss in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        assert b.abs().max() > 1e-6
        assert (a - b).abs().max() <= BOUND * max(1, b.abs().max())


# ---- VITS ------------------------------------------------------------------------------------------------------------


def vits_kl(z_p: Tensor, logs_q: Tensor, m_p: Tensor, logs_p: Tensor, mask: Tensor) -> Tensor:
    of_each = logs_p - logs_q - 0.5 + 0.5 * (z_p - m_p) ** 2 * (-2 * logs_p).exp()
    return (of_each * mask).sum() / mask.sum()


def test_vits_kl() -> None:
    mask = torch.ones(3, 1, 7, dtype=torch.float64)
    mask[0, :, 4:] = 0
    mask[2, :, 1:] = 0
    tensors = [draw(3, 5, 7) for _ in range(4)]
    compare(lambda *t: vits.kl_loss(*t, mask), lambda *t: vits_kl(*t, mask), tensors)


def test_vits_kl_in_half_precision_and_without_a_frame() -> None:
    tensors = [draw(2, 5, 7).detach().half().requires_grad_() for _ in range(4)]
    with torch.no_grad():
        tensors[3] -= 7  # e^14 times a square: beyond fp16
    mask = torch.ones(2, 1, 7, dtype=torch.float16)
    loss = vits.kl_loss(*tensors, mask)
    assert loss.dtype == torch.float32 and loss > 65504
    expected = vits_kl(*[t.detach().double() for t in tensors], mask.double())
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert vits.kl_loss(*tensors, torch.zeros_like(mask)) == 0


@pytest.mark.parametrize("half", [False, True])
def test_vits_adversarial_losses(half: bool) -> None:
    shapes = [(4, 1, 9), (4, 30), (4, 2, 3, 5)]
    real, fake = ([draw(*shape) for shape in shapes] for _ in range(2))
    compare(
        lambda *t: vits.discriminator_loss(t[:3], t[3:])[0],
        lambda *t: sum(((1 - r) ** 2).mean() + (f**2).mean() for r, f in zip(t[:3], t[3:], strict=True)),
        [*real, *fake],
    )
    compare(lambda *t: vits.generator_loss(t)[0], lambda *t: sum(((1 - f) ** 2).mean() for f in t), fake)
    real, fake = ([t.detach().half() if half else t.detach() for t in side] for side in (real, fake))
    _, of_real, of_fake = vits.discriminator_loss(real, fake)
    _, of_each = vits.generator_loss(fake)
    for i in range(3):
        assert float(of_real[i]) == pytest.approx(float(((1 - real[i].double()) ** 2).mean()), rel=1e-5)
        assert float(of_fake[i]) == pytest.approx(float((fake[i].double() ** 2).mean()), rel=1e-5)
        assert float(of_each[i]) == pytest.approx(float(((1 - fake[i].double()) ** 2).mean()), rel=1e-5)


# ---- StudioGAN -------------------------------------------------------------------------------------------------------

STUDIOGAN: dict[str, Callable[..., Tensor]] = {
    "d_vanilla": lambda real, fake: -(F.logsigmoid(real) + F.logsigmoid(1 - fake)).mean(),
    "g_vanilla": lambda fake: -F.logsigmoid(fake).mean(),
    "d_ls": lambda real, fake: (0.5 * (real - 1) ** 2 + 0.5 * fake**2).mean(),
    "g_ls": lambda fake: (0.5 * (fake - 1) ** 2).mean(),
    "d_hinge": lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
    "g_hinge": lambda fake: -fake.mean(),
    "d_wasserstein": lambda real, fake: (fake - real).mean(),
    "g_wasserstein": lambda fake: -fake.mean(),
}


@pytest.mark.parametrize("name", STUDIOGAN)
def test_studiogan(name: str) -> None:
    tensors = [draw(6), draw(6)] if name.startswith("d_") else [draw(6)]
    compare(getattr(studiogan, name), STUDIOGAN[name], tensors)


def test_studiogan_set_right() -> None:
    def right(real: Tensor, fake: Tensor) -> Tensor:
        return -(F.logsigmoid(real) + F.logsigmoid(-fake)).mean()

    tensors = [draw(6), draw(6)]
    compare(lambda *t: studiogan.d_vanilla(*t, correct=True), right, tensors)
    with pytest.raises(AssertionError):
        compare(studiogan.d_vanilla, right, tensors)


# ---- putting them there ----------------------------------------------------------------------------------------------


def module(**functions: Any) -> ModuleType:
    made = ModuleType("losses")
    vars(made).update(functions)
    return made


def test_apply_to_a_module() -> None:
    def kl_loss(z_p: Tensor, logs_q: Tensor, m_p: Tensor, logs_p: Tensor, z_mask: Tensor) -> Tensor:
        return vits_kl(z_p, logs_q, m_p, logs_p, z_mask)

    losses = module(kl_loss=kl_loss)
    training = module(kl_loss=kl_loss)  # from losses import kl_loss
    arguments = [draw(2, 3, 4).detach() for _ in range(4)] + [torch.ones(2, 1, 4, dtype=torch.float64)]
    with uf.integrations.apply_to_vits(losses) as patch:
        assert training.kl_loss is losses.kl_loss is not kl_loss
        assert training.kl_loss(*arguments) == pytest.approx(float(kl_loss(*arguments)), rel=1e-12)
        assert patch.calls() == uf.integrations.calls("vits") == {"vits.kl_loss": 1}
        assert uf.integrations.is_patched("vits")
    assert training.kl_loss is losses.kl_loss is kl_loss


def test_studiogan_shapes_that_it_broadcasts_go_to_its_own_function() -> None:
    losses = module(d_ls=lambda d_logit_real, d_logit_fake: STUDIOGAN["d_ls"](d_logit_real, d_logit_fake))
    real, fake = draw(6, 1), draw(6)
    with uf.integrations.apply_to_studiogan(losses):
        assert losses.d_ls(real, fake) == STUDIOGAN["d_ls"](real, fake)
        assert uf.integrations.calls("studiogan")["studiogan.d_ls"] == 0


def test_bad_modules() -> None:
    with pytest.raises(TypeError, match="expected vits's module of losses, got str"):
        uf.integrations.apply_to_vits("losses")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"which has none of kl_loss, discriminator_loss, generator_loss"):
        uf.integrations.apply_to_vits(module(other=len))
    with pytest.raises(ValueError, match=r"got kl_loss\(z, m\) in losses, expected the arguments z_p, logs_q"):
        uf.integrations.apply_to_vits(module(kl_loss=lambda z, m: z))
    assert not _patching.Patch.active
