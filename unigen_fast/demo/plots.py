"""The demo's pictures."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from unigen_fast.demo.costs import Cost
from unigen_fast.demo.train import NUM_SAMPLES, AdversarialCurve, BoundCurve

COLORS = {"VAE": "#4477aa", "IWAE": "#cc6677", "GAN": "#ddaa33", "IWGAN": "#228833"}
OURS, PLAIN = "#4477aa", "#999999"


def save(figure: Figure, path: Path) -> None:
    """With a palette of 128 colours, which the eye does not miss here, the file is a third of its size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, facecolor="white", format="png")
    Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def tiles(x: Tensor, rows: int, columns: int) -> Tensor:
    """`[rows · columns, 784]` as one image, with a thin gap between the digits."""
    images = x.detach().cpu().clamp(0, 1).reshape(rows, columns, 28, 28)
    sheet = images.new_full((rows, columns, 30, 30), 0.35)
    sheet[:, :, 1:-1, 1:-1] = images
    return sheet.permute(0, 2, 1, 3).reshape(rows * 30, columns * 30)


def show(axes: Axes, image: Tensor, title: str) -> None:
    axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=11)
    axes.set_axis_off()


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def samples(grids: Mapping[str, Tensor], captions: Mapping[str, str], path: Path) -> None:
    """One sheet of 8 x 8 digits for each model."""
    figure = Figure(figsize=(13, 4.0), layout="constrained")
    for axes, (name, x) in zip(figure.subplots(1, len(grids)), grids.items(), strict=True):
        show(axes, tiles(x[:64], 8, 8), f"{name}\n{captions[name]}")
    figure.suptitle("Generated digits, not selected (VAE, IWAE: means of p(x|z))", fontsize=13)
    save(figure, path)


def reconstructions(rows: Mapping[str, Tensor], path: Path) -> None:
    """Held-out digits above what each autoencoder makes of them."""
    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(0.62 * columns + 1.5, 0.72 * len(rows) + 0.5), layout="constrained")
    for axes, (name, x) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        show(axes, tiles(x, 1, columns), "")
        axes.text(-0.01, 0.5, name, transform=axes.transAxes, ha="right", va="center", fontsize=11)
    figure.suptitle("Reconstructions of held-out digits", fontsize=13)
    save(figure, path)


def bounds(curves: Mapping[str, BoundCurve], path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, x, label in ((left, "step", "training step"), (right, "seconds", "seconds of training")):
        for name, curve in curves.items():
            kwargs = {"color": COLORS[name], "marker": "o", "markersize": 3.5}
            axes.plot(getattr(curve, x), curve.iwae, label=f"{name}, bound with K = {NUM_SAMPLES}", **kwargs)
            axes.plot(getattr(curve, x), curve.elbo, label=f"{name}, K = 1 (ELBO)", linestyle="--", **kwargs)
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        tidy(axes)
    left.set_ylabel("bound on log p(x), held-out digits\n[nats per digit, higher is better]")
    right.legend(loc="lower right", frameon=False)
    figure.suptitle(f"Learning curves: VAE (trained with K = 1) and IWAE (trained with K = {NUM_SAMPLES})", fontsize=13)
    save(figure, path)


def adversaries(curves: Mapping[str, AdversarialCurve], batch_size: int, path: Path) -> None:
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    panels = (
        ("discriminator", "discriminator loss [nats]"),
        ("generator", "generator loss, each its own [nats]"),
        ("ess", f"effective samples of {batch_size}"),
    )
    for axes, (attribute, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, curve in curves.items():
            label = f"{name} (weights not used)" if attribute == "ess" and name == "GAN" else name
            axes.plot(curve.step, getattr(curve, attribute), color=COLORS[name], label=label)
        axes.set_xlabel("training step")
        axes.set_title(title, fontsize=11)
        axes.set_ylim(0, batch_size if attribute == "ess" else None)
        axes.legend(loc="lower left", frameon=False)
        tidy(axes)
    figure.suptitle("GAN and IWGAN: same networks, same seed, one line of the generator's loss apart", fontsize=13)
    save(figure, path)


def weights(x: Tensor, values: Tensor, ess: float, path: Path) -> None:
    """One minibatch of the IWGAN, heaviest first: `x` `[N, 784]` and its weights `[N]`, which sum to 1."""
    order = values.argsort(descending=True)
    percent = (100 * values[order]).tolist()
    columns = 16
    rows = -(-len(percent) // columns)
    figure = Figure(figsize=(12, 3.0 + 0.95 * rows), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2.6, 0.95 * rows))  # type: ignore[misc]
    axes = above.subplots()
    axes.bar(range(1, len(percent) + 1), percent, color=COLORS["IWGAN"])
    axes.axhline(100 / len(percent), color="black", linewidth=1, linestyle="--", label="equal weights (plain GAN)")
    axes.set_xlim(0, len(percent) + 1)
    axes.set_xlabel("generated digits of one minibatch, heaviest first")
    axes.set_ylabel("weight [%]")
    axes.legend(frameon=False)
    tidy(axes)
    above.suptitle(
        "Weights of a minibatch in the IWGAN's generator loss: D/(1-D), normalised; "
        f"{ess:.1f} effective samples of {len(percent)}",
        fontsize=13,
    )
    tiles = below.subplots(rows, columns)
    for tile in tiles.flat:
        tile.set_axis_off()
    for tile, i, weight in zip(tiles.flat, order.tolist(), percent, strict=False):
        tile.imshow(x[i].detach().cpu().reshape(28, 28).numpy(), cmap="gray", vmin=0, vmax=1)
        tile.set_title(f"{weight:.1f} %", fontsize=8, pad=2)
    save(figure, path)


def costs(found: Mapping[str, Cost], path: Path) -> None:
    """Bars relative to the plain step; solid: the losses, pale: all the rest of the step."""
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    axes = figure.subplots()
    names = list(found)
    for i, name in enumerate(names):
        c = found[name]
        sides: Sequence[tuple[str, float, float, str, float]] = (
            ("plain PyTorch", c.plain_loss_ms, c.plain_step_ms, PLAIN, -0.2),
            ("unigen_fast", c.loss_ms, c.step_ms, OURS, 0.2),
        )
        for label, loss_ms, step_ms, color, offset in sides:
            loss, rest = (100 * ms / c.plain_step_ms for ms in (loss_ms, step_ms - loss_ms))
            labels = (f"{label}: losses", f"{label}: networks, optimizer") if i == 0 else (None, None)
            axes.barh(i + offset, loss, 0.36, color=color, label=labels[0])
            axes.barh(i + offset, rest, 0.36, left=loss, color=color, alpha=0.3, label=labels[1])
            text = f"{step_ms:.1f} ms, losses {loss_ms / step_ms:.1%}"
            axes.text(loss + rest + 1, i + offset, text, va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(100, *(100 / c.speedup for c in found.values())))
    axes.set_xlabel("one training step [% of the step with plain PyTorch losses]")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Share of the training step that the losses take", fontsize=13)
    save(figure, path)
