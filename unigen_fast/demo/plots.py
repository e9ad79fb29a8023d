"""The demo's pictures."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from PIL import Image
from torch import Tensor

from unigen_fast.demo.costs import Cost, ExtraCost
from unigen_fast.demo.evaluate import NUM_SAMPLES
from unigen_fast.demo.train import Curve

COLORS = {"GAN": "#ddaa33", "IWGAN": "#228833", "VAE": "#4477aa", "AAVAE": "#cc6677"}
OURS, PLAIN = "#4477aa", "#999999"
PARTS = ("#882255", "#cc6677", "#ddcc77", "#88ccee", "black")  # of an extra cost; the last is the weighting's

_CELL = 40  # pixels of a digit with its label


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
    """One sheet of 4 x 16 digits for each model; the two that minimise KL(p || q) above."""
    figure = Figure(figsize=(13, 4.9), layout="constrained")
    for axes, (name, x) in zip(figure.subplots(2, 2).flat, grids.items(), strict=True):
        show(axes, tiles(x[:64], 4, 16), "")
        axes.set_title(f"{name} {captions[name]}", fontsize=10)
    figure.suptitle("The same generator, trained in four ways: the same 64 z, not selected", fontsize=13)
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


def bounds(curves: Mapping[str, Curve], path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, x, label in ((left, "step", "training step"), (right, "seconds", "seconds of training")):
        for name, curve in curves.items():
            kwargs = {"color": COLORS[name], "marker": "o", "markersize": 3.5}
            axes.plot(curve[x], curve["iwae"], label=f"{name}, bound with K = {NUM_SAMPLES}", **kwargs)
            axes.plot(curve[x], curve["elbo"], label=f"{name}, K = 1 (ELBO)", linestyle="--", **kwargs)
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        tidy(axes)
    left.set_ylabel("bound on log p(x), held-out digits\n[nats per digit, higher is better]")
    right.legend(loc="lower right", frameon=False)
    figure.suptitle("Learning curves of VAE and AAVAE: same networks, same seed", fontsize=13)
    save(figure, path)


def adversaries(curves: Mapping[str, Curve], batch_size: int, path: Path) -> None:
    """GAN and IWGAN; of their discriminators, and the AAVAE's, how right they are."""
    figure = Figure(figsize=(14, 3.8), layout="constrained")
    panels = {
        "discriminator.loss": "discriminator loss [nats]",
        "generator.loss": "generator loss, each its own [nats]",
        "accuracy": "discriminator is right, data and samples",
        "ess": f"effective samples of {batch_size}",
    }
    for axes, (key, title) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        for name in ("GAN", "IWGAN", "AAVAE") if key == "accuracy" else ("GAN", "IWGAN"):
            curve = curves[name]
            if key == "accuracy":
                sides = (curve[f"discriminator.{side}_accuracy"] for side in ("real", "fake"))
                values = [(real + fake) / 2 for real, fake in zip(*sides, strict=True)]
            else:
                values = curve[key]
            label = f"{name} (weights not used)" if key == "ess" and name == "GAN" else name
            axes.plot(curve["step"], values, color=COLORS[name], label=label)
        axes.set_xlabel("training step")
        axes.set_title(title, fontsize=11)
        axes.set_ylim(0, {"ess": batch_size, "accuracy": 1}.get(key))
        axes.legend(loc="lower right", frameon=False)
        tidy(axes)
    figure.suptitle("GAN and IWGAN: same networks, same seed, one line of the generator's loss apart", fontsize=13)
    save(figure, path)


def weights(
    x: Tensor,
    of_iwgan: Tensor,
    ess: float,
    sides: Mapping[str, Tensor],
    of_aavae: Mapping[str, Tensor],
    path: Path,
) -> None:
    """Left a minibatch of the IWGAN and its weights `[N]`, which sum to 1; right what the AAVAE's examples count, D(x).

    Heaviest first; the digits below are in the order of the bars.
    """
    figure = Figure(figsize=(13, 8.4), layout="constrained")
    left, right = figure.subfigures(1, 2, wspace=0.03)  # type: ignore[misc]
    count = len(x)
    axes = _weighted_digits(left, {"samples": (x, 100 * of_iwgan)}, {"samples": COLORS["IWGAN"]}, "{:.1f} %")
    axes.axhline(100 / count, color="black", linewidth=1, linestyle="--", label="equal weights (GAN)")
    axes.set_ylabel("weight [%]")
    axes.legend(frameon=False)
    left.suptitle(f"IWGAN: D/(1-D) of a minibatch, normalised; {ess:.1f} effective samples of {count}", fontsize=11)
    pairs = {side: (pixels, of_aavae[side]) for side, pixels in sides.items()}
    axes = _weighted_digits(right, pairs, {"data": COLORS["AAVAE"], "samples": "#882255"}, "{:.2f}")
    axes.axhline(1, color="black", linewidth=1, linestyle="--", label="VAE: 1 on data, 0 on samples")
    axes.set_ylim(0, 1.3)
    axes.set_ylabel("D(x)")
    axes.legend(frameon=False, loc="upper right", ncols=3)
    right.suptitle("AAVAE: D(x) of data and of samples, the weight of each in the bound", fontsize=11)
    save(figure, path)


def _weighted_digits(
    part: SubFigure, sides: Mapping[str, tuple[Tensor, Tensor]], colors: Mapping[str, str], label: str
) -> Axes:
    """Bars of 64 weights, and the digits below."""
    axes, sheet = part.subplots(2, 1, height_ratios=(2.2, 6))
    bars, images = 0, []
    for side, (pixels, values) in sides.items():
        order = values.argsort(descending=True)
        heights = values[order].tolist()
        axes.bar(range(bars, bars + len(order)), heights, color=colors[side], label=side)
        for i, value in enumerate(heights, bars):
            x, y = _CELL * (i % 8 + 0.5), _CELL * (i // 8) + 11
            sheet.text(x, y, label.format(value), fontsize=8, color=colors[side], ha="center", va="bottom")
        bars += len(order)
        images.append(pixels[order].cpu().unflatten(1, (28, 28)))
    cells = torch.ones(8, 8, _CELL, _CELL)
    cells[:, :, 12:40, 6:34] = torch.cat(images).unflatten(0, (8, 8))
    show(sheet, cells.transpose(1, 2).flatten(2).flatten(0, 1), "")
    axes.set_xlim(-1, bars)
    axes.set_xticks([])
    tidy(axes)
    return axes


def costs(found: Mapping[str, Cost], extra: Mapping[str, ExtraCost], path: Path) -> None:
    """Left bars relative to the plain step, solid the losses, pale all the rest; right what weights add to a step."""
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    left, right = figure.subfigures(1, 2, wspace=0.03)  # type: ignore[misc]
    axes = left.subplots()
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
    axes.set_xlim(0, 1.35 * max(100, *(100 / c.speedup for c in found.values())))
    axes.set_xlabel("one training step [% of the step with plain PyTorch losses]")
    axes.spines[["top", "right"]].set_visible(False)
    left.legend(loc="outside lower center", ncols=2, frameon=False)
    left.suptitle("Share of the training step that the losses take", fontsize=13)
    _extra_costs(right, extra)
    save(figure, path)


def _extra_costs(part: SubFigure, extra: Mapping[str, ExtraCost]) -> None:
    axes = part.subplots()
    names: list[str] = []
    longest = max(e.step_ms for e in extra.values())
    for name, e in extra.items():
        axes.barh(len(names), e.over_step_ms, 0.6, color=COLORS[e.over])
        axes.text(e.over_step_ms + 0.01 * longest, len(names), f"{e.over_step_ms:.1f} ms", va="center", fontsize=9)
        start = e.over_step_ms
        axes.barh(len(names) + 1, start, 0.6, color=COLORS[name], alpha=0.4)
        for (what, ms), color in zip(e.parts_ms.items(), PARTS[-len(e.parts_ms) :], strict=True):
            label = what if len(e.parts_ms) == len(PARTS) else None
            axes.barh(len(names) + 1, ms, 0.6, left=start, color=color, label=label)
            start += ms
        text = f"{e.step_ms:.1f} ms\nweighting {e.weighting_share:.2%}"
        axes.text(max(start, e.step_ms) + 0.01 * longest, len(names) + 1, text, va="center", fontsize=9)
        names += [e.over, name]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * longest)
    axes.set_xlabel("one training step [ms]; pale: as of the model above")
    axes.spines[["top", "right"]].set_visible(False)
    part.legend(loc="outside lower center", ncols=3, frameon=False)
    part.suptitle("What IWGAN and AAVAE add to a step of GAN and VAE", fontsize=13)
