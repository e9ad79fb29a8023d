"""docs/moving.md: what stands before and after is the same loss, with the same gradients."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor

TEXT = (Path(__file__).parent.parent / "docs" / "moving.md").read_text()
SECTIONS = {part.split("\n", 1)[0]: part for part in TEXT.split("\n## ")[1:]}


def code(text: str, kind: str) -> str:
    (found,) = re.findall(rf"```python{kind}\n(.*?)```", text, re.DOTALL)
    return found


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def constant(x: Tensor) -> Tensor:
    return x.detach()


def vae() -> dict[str, Any]:
    return {"logits": draw(5, 7), "x": constant(draw(5, 7).sigmoid()), "mu": draw(5, 3), "logvar": draw(5, 3)}


def images() -> dict[str, Any]:
    return {
        "logits": draw(5, 1, 28, 28),
        "x": constant(draw(5, 1, 28, 28).sigmoid()),
        "mu": draw(5, 3),
        "logvar": draw(5, 3),
    }


def critic() -> dict[str, Any]:
    return {"real": draw(6, 1), "fake": draw(6, 1)}


def vits() -> dict[str, Any]:
    mask = (torch.arange(6) < torch.tensor([6, 4, 2])[:, None])[:, None].double()
    found = {name: draw(3, 4, 6) for name in ("z_p", "logs_q", "m_p", "logs_p")}
    sides = {side: [draw(2, 5), draw(2, 9), draw(2, 4, 3)] for side in ("reals", "fakes")}
    return {**found, **sides, "z_mask": mask}


def counts() -> dict[str, Any]:
    positive = {name: draw(5, 7).exp().detach().requires_grad_() for name in ("mu", "theta", "qv")}
    return {**positive, "x": torch.poisson(torch.full((5, 7), 3.0)).double(), "qm": draw(5, 7)}


INPUTS: dict[str, Callable[[], dict[str, Any]]] = {
    "VAE of pytorch/examples": vae,
    "DCGAN of pytorch/examples": critic,
    "β-VAE": images,
    "VQGAN and latent diffusion's autoencoder": lambda: {"moments": draw(3, 8, 2, 4), **critic()},
    "VITS, HiFi-GAN": vits,
    "DreamerV3": lambda: {"posterior": 2 * draw(2, 3, 4, 6).detach(), "prior": 2 * draw(2, 3, 4, 6).detach()},
    "scVI": counts,
}


def test_every_section_is_run() -> None:
    assert list(SECTIONS) == list(INPUTS)


@pytest.mark.parametrize("section", INPUTS)
def test_before_is_after(section: str) -> None:
    torch.manual_seed(0)
    inputs = INPUTS[section]()
    if section == "DreamerV3":
        inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    leaves = [t for x in inputs.values() for t in (x if isinstance(x, list) else [x]) if t.requires_grad]
    found = {}
    for kind in ("before", "after"):
        scope = dict(inputs)
        exec(code(TEXT.split("\n## ")[0], "") + code(SECTIONS[section], f" {kind}"), scope)
        found[kind] = [scope["loss"], *torch.autograd.grad(scope["loss"], leaves)]
    for before, after in zip(found["before"], found["after"], strict=True):
        assert before.dtype == after.dtype == torch.float64 and before.abs().max() > 0
        assert_close(after, before, 1e-10)
