"""What the losses cost in a training step, ours against plain PyTorch, and that both give the same values; and what
IWGAN and AAVAE cost beyond GAN and VAE.

The steps themselves are timed, those of `train.py` with our models and with those of `plain.py`: whole, and once more
with networks that only hand out what they were seen to compute, and an optimizer that does nothing. What is left of the
step then is the losses, drawing z and samples of x included.
"""

import copy
import itertools
import operator
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import unigen_fast as uf
from unigen_fast.demo import plain, train
from unigen_fast.demo.networks import Networks
from unigen_fast.demo.train import MODELS
from unigen_fast.models import Model
from unigen_fast.models.adversarial import Discriminated

Call = Callable[[], Any]
Times = list[float]  # milliseconds, one for each round

WEIGHTED = {"IWGAN": "GAN", "AAVAE": "VAE"}  # by what they are without weights


@dataclass
class Agreement:
    """Largest differences between ours and plain PyTorch, relative to the largest value of the phase."""

    loss: float
    gradient: float


@dataclass
class Cost:
    """Median milliseconds of one training step, and of its losses alone, forward and backward."""

    loss_ms: float
    step_ms: float
    plain_loss_ms: float
    plain_step_ms: float

    @property
    def share(self) -> float:
        return self.loss_ms / self.step_ms

    @property
    def plain_share(self) -> float:
        return self.plain_loss_ms / self.plain_step_ms

    @property
    def speedup(self) -> float:
        """Of the whole step."""
        return self.plain_step_ms / self.step_ms

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {"share": self.share, "plain_share": self.plain_share, "speedup": self.speedup}


@dataclass
class ExtraCost:
    """Median milliseconds of a step and of the step of the model it extends; the extra is the median of the rounds'."""

    over: str
    step_ms: float
    over_step_ms: float
    extra_ms: float
    parts_ms: dict[str, float]  # of the extra; "weighting": computing the weights from D's logits, and using them

    @property
    def ratio(self) -> float:
        return self.step_ms / self.over_step_ms

    @property
    def weighting_share(self) -> float:
        """Of the whole step."""
        return self.parts_ms["weighting"] / self.step_ms

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio, "weighting_share": self.weighting_share}


# ---- values ----------------------------------------------------------------------------------------------------------


def agreement(name: str, networks: Networks, x: Tensor, seed: int) -> Agreement:
    """Both steps on the same batch, parameters and noise, without an update."""
    ours = MODELS[name](copy.deepcopy(networks), uf.models)
    plains = MODELS[name](copy.deepcopy(networks), plain)
    if isinstance(plains, plain.VAE):
        # a standard normal, drawn from the same state, is the noise that our step adds
        plains.noise = lambda mean: uf.sample_gaussian(torch.zeros_like(mean), torch.zeros_like(mean))  # type: ignore
    found = []
    for model in (ours, plains):
        torch.manual_seed(seed)
        optimizers: Any = {phase: _Recording(list(model.parameters_of(phase))) for phase in model.phases}
        losses = train.step(model, optimizers, x)
        found.append([(losses[phase]["loss"], optimizers[phase].gradients) for phase in model.phases])
    differences = [[_difference(a, b) for a, b in zip(*phase, strict=True)] for phase in zip(*found, strict=True)]
    return Agreement(*map(max, zip(*differences, strict=True)))


class _Recording:
    """In an optimizer's place: keeps the gradients and leaves the parameters alone."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def step(self) -> None:
        self.gradients = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])


def _difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# ---- times -----------------------------------------------------------------------------------------------------------


def measure(
    networks: Mapping[str, Networks], inputs: Mapping[str, Tensor], repeats: int, progress: train.Progress
) -> tuple[dict[str, Cost], dict[str, ExtraCost]]:
    """Of the steps of all models, each training a copy of the networks."""
    x, sides = inputs["AAVAE"], {"ours": uf.models, "plain": plain}
    models = {
        (name, side): MODELS[name](copy.deepcopy(networks[name]), of)
        for name, (side, of) in itertools.product(inputs, sides.items())
    }
    steps = {key: _step(model, inputs[key[0]]) for key, model in models.items()}
    losses = {key: replayed_step(model, inputs[key[0]]) for key, model in models.items()}
    whole = _take_turns(steps | _parts_of_aavae(networks, x), x, repeats, progress)
    alone = _take_turns(losses, x, 2 * repeats, progress)
    weighting = _take_turns(_with_and_without_weights(networks, x), x, 10 * repeats, progress)

    cost = {
        name: Cost(*(statistics.median(times[name, side]) for side in sides for times in (alone, whole)))
        for name in inputs
    }
    parts: dict[str, dict[str, float]] = {
        "IWGAN": {},
        "AAVAE": {
            "discriminator's phase": statistics.median(whole["discriminator"]),
            "batch of twice the size": _median_difference(whole["VAE of both"], whole["VAE", "ours"]),
            "samples": statistics.median(whole["samples"]),
            "D(x)": statistics.median(whole["D(x)"]),
        },
    }
    extra = {}
    for name, over in WEIGHTED.items():
        parts[name]["weighting"] = _median_difference(weighting[name], weighting[over])
        more = _median_difference(whole[name, "ours"], whole[over, "ours"])
        extra[name] = ExtraCost(over, cost[name].step_ms, cost[over].step_ms, more, parts[name])
    return cost, extra


def _take_turns(
    calls: Mapping[Any, Call], x: Tensor, repeats: int, progress: train.Progress, warmup: int = 3
) -> dict[Any, Times]:
    """One call each a round, in an order drawn anew: none always finds the caches as the same other has left them."""
    times: dict[Any, Times] = {key: [] for key in calls}
    order, draw = list(calls), random.Random(0)
    for i in progress(warmup + repeats, "comparison with plain PyTorch"):
        draw.shuffle(order)
        for key in order:
            train.synchronize(x)
            start = time.perf_counter()
            calls[key]()
            train.synchronize(x)
            if i >= warmup:
                times[key].append(1000 * (time.perf_counter() - start))
    return times


def _median_difference(a: Times, b: Times) -> float:
    return statistics.median(map(operator.sub, a, b))


def _step(model: Model, x: Tensor) -> Call:
    optimizers = train.optimizers_of(model)
    return lambda: train.step(model, optimizers, x)


def _parts_of_aavae(networks: Mapping[str, Networks], x: Tensor) -> dict[str, Call]:
    """What an AAVAE's step does beside a VAE's, and a VAE's step with a batch of as many examples as an AAVAE's."""
    aavae, vae = (MODELS[name](copy.deepcopy(networks[name]), uf.models) for name in ("AAVAE", "VAE"))
    of_aavae, of_vae = train.optimizers_of(aavae), train.optimizers_of(vae)
    (fake,) = aavae.fake(x)
    both = torch.cat((x, fake))
    return {
        "discriminator": lambda: train.update(aavae, of_aavae["discriminator"], "discriminator", x),
        "samples": lambda: aavae.fake(x),
        "D(x)": lambda: _discriminate(aavae, x, fake),
        "VAE of both": lambda: train.update(vae, of_vae["autoencoder"], "autoencoder", both),
    }


@torch.no_grad()
def _discriminate(model: Discriminated, *sides: Tensor) -> None:
    for x in sides:
        model.discriminator(x)


def _with_and_without_weights(networks: Mapping[str, Networks], x: Tensor) -> dict[str, Call]:
    """Loss and backward alone, of IWGAN as of GAN, of AAVAE as of VAE: on the same outputs of the networks."""
    gan, iwgan, aavae = (MODELS[name](networks[name], uf.models) for name in ("GAN", "IWGAN", "AAVAE"))
    with torch.no_grad():
        images = iwgan.sample(len(x))
        logits = iwgan.discriminator(images).requires_grad_()
    (fake,) = aavae.fake(x)
    both = torch.cat((x, fake))

    def generator_loss(model: uf.models.GAN) -> None:
        logits.grad = None
        model.generator_loss(logits, (images,)).backward()

    def weighted(model: uf.models.AAVAE) -> None:
        weights = torch.cat((model.q_reversed(x), model.q_reversed(fake)))
        model.negative_bound(both, weights=weights).loss.backward()

    def unweighted(model: uf.models.AAVAE) -> None:
        _discriminate(model, x, fake)
        model.negative_bound(both).loss.backward()

    replay = replayed(aavae, weighted)
    return {
        "GAN": lambda: generator_loss(gan),
        "IWGAN": lambda: generator_loss(iwgan),
        "VAE": lambda: unweighted(replay),
        "AAVAE": lambda: weighted(replay),
    }


# ---- networks that compute nothing -----------------------------------------------------------------------------------


def replayed_step(model: Model, x: Tensor) -> Call:
    """The step with all but its networks and optimizers."""
    idle: Any = dict.fromkeys(model.phases, _Idle())
    replay = replayed(model, lambda copied: train.step(copied, idle, x))
    return lambda: train.step(replay, idle, x)


def replayed(model: Model, run: Callable[[Any], Any]) -> Any:
    """A copy whose networks hand out, in turn, what they gave in `run`."""
    copied = copy.deepcopy(model)
    replays = {name: _Replay() for phase in model.phases.values() for name in phase.updates}
    for name, replay in replays.items():
        getattr(copied, name).register_forward_hook(replay.record)
    run(copied)
    for name, replay in replays.items():
        setattr(copied, name, replay)
    return copied


class _Idle:
    """In an optimizer's place."""

    def zero_grad(self) -> None:
        pass

    def step(self) -> None:
        pass


class _Replay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, ...]] = []
        self.turns = itertools.cycle(self.calls)

    def record(self, network: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        outputs = (output,) if isinstance(output, Tensor) else output
        self.calls.append((torch.zeros_like(inputs[0]), *(t.detach() for t in outputs)))
        # makes the outputs require a gradient, and tells the model its device
        self.parameter = nn.Parameter(outputs[0].new_zeros(()))

    def forward(self, x: Tensor) -> Any:
        outputs = _HandOut.apply(x, self.parameter, *next(self.turns))
        return outputs[0] if len(outputs) == 1 else outputs


class _HandOut(torch.autograd.Function):
    """Recorded outputs; in backward a gradient that is there already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, grad_x: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.grad_x = grad_x
        return tuple(t.view_as(t) for t in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.grad_x, None, None, *(None for _ in grads)
