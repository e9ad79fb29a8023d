"""What all models share: phases, each with the KL it minimises beside its code, and the networks it updates."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from unigen_fast import _checks

Losses = dict[str, Tensor]
M = TypeVar("M", bound=Callable[..., Losses])

_SUFFIX = "_phase"


class Phase(NamedTuple):
    """One kind of update of a model."""

    name: str
    updates: tuple[str, ...]  # the model's networks whose parameters it changes
    minimises: str  # the divergence, in the paper's notation


def phase(*, updates: tuple[str, ...], minimises: str) -> Callable[[M], M]:
    """Marks a method `<name>_phase(self, batch)` as the losses of the phase `name`."""

    def mark(method: M) -> M:
        method._phase = Phase(method.__name__.removesuffix(_SUFFIX), updates, minimises)  # type: ignore[attr-defined]
        return method

    return mark


class Model(nn.Module):
    """A model of the paper: which p and q it is made of, and which KL each phase of its training minimises.

    A training step takes the phases in their order, each with an optimizer of `parameters_of(phase)`:

        for phase in model.phases:
            loss = model.losses(phase, batch)["loss"]
            optimizers[phase].zero_grad()
            loss.backward()
            optimizers[phase].step()

    The loss of a phase reaches `parameters_of(phase)` and no other parameter: nothing else gets a gradient, nor does
    backward spend time on one. `DistributedDataParallel(model, find_unused_parameters=True)` is called as `forward`,
    with (phase, batch).
    """

    phases: ClassVar[dict[str, Phase]] = {}  # by name, in the order of a training step
    of_paper: ClassVar[str] = ""  # the equation or section that the model is taken from
    p: ClassVar[str] = ""  # the generative side: what is drawn from
    q: ClassVar[str] = ""  # the inference side, and the discriminator

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        inherited = dict.fromkeys(name for base in cls.__bases__ for name in getattr(base, "phases", ()))
        marks: dict[str, Phase] = {}  # of the methods that Python resolves to; an override without one keeps the old
        for parent in reversed(cls.__mro__):
            found = (getattr(attribute, "_phase", None) for attribute in vars(parent).values())
            marks |= {mark.name: mark for mark in found if isinstance(mark, Phase)}
        cls.phases = {name: marks[name] for name in (*inherited, *marks)}

    def losses(self, phase: str, batch: Any) -> Losses:
        """What a phase minimises, under "loss"; and, detached, what else its pass found.

        Raises:
            ValueError: an unknown phase; a batch or outputs of networks of other shapes than expected.
            TypeError: those of another type.
        """
        _checks.choice("phase", phase, self.phases)
        return getattr(self, phase + _SUFFIX)(batch)

    def forward(self, phase: str, batch: Any) -> Losses:
        """`losses`: so that wrappers which intercept `forward` see every pass."""
        return self.losses(phase, batch)

    def parameters_of(self, phase: str) -> Iterator[nn.Parameter]:
        """The parameters that a phase updates, each once."""
        _checks.choice("phase", phase, self.phases)
        networks = nn.ModuleList([getattr(self, name) for name in self.phases[phase].updates])
        return networks.parameters()

    def sample(self, n: int) -> Tensor:
        """n samples of the model, without a gradient."""
        raise NotImplementedError(f"{type(self).__name__} has no distribution over data to draw from")


# ---- what the models are written with --------------------------------------------------------------------------------


@contextmanager
def constants() -> Iterator[None]:
    """`torch.no_grad` that autocast does not remember.

    In torch 2.10 a weight that it casts without a gradient is kept for the passes to come, which then give it none: the
    decoder that drew the fakes would learn nothing from the bound.
    """
    if torch.compiler.is_compiling():  # where autocast keeps nothing
        with torch.no_grad():
            yield
        return
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(kept)


def frozen(network: nn.Module) -> Callable[..., Any]:
    """The network with its parameters as constants: gradients go through it, none to it."""
    detached = {name: parameter.detach() for name, parameter in network.named_parameters()}
    if torch.compiler.is_compiling():  # where a checkpoint is part of the graph
        return lambda *inputs: torch.func.functional_call(network, detached, inputs)
    held = {f"network.{name}": constant for name, constant in detached.items()}
    return lambda *inputs: torch.func.functional_call(_Copied(network), held, inputs)


class _Copied(nn.Module):
    """Calls a copy of the network that keeps the parameters of now.

    `functional_call` puts the network's own back; a checkpoint within, which runs its part of the network once more in
    the backward pass, is then still of the copy.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Any) -> Any:
        copies = {module: module.__new__(type(module)) for module in self.network.modules()}
        for module, copy in copies.items():
            copy.__dict__ = module.__dict__ | {
                "_parameters": module._parameters.copy(),
                "_modules": {
                    name: child if child is None else copies[child] for name, child in module._modules.items()
                },
            }
        outputs = copies[self.network](*inputs)
        for module, copy in copies.items():  # what its forward pass noted
            noted = {name: value for name, value in copy.__dict__.items() if name not in ("_parameters", "_modules")}
            module.__dict__.update(noted)
        return outputs


class Prior(nn.Module):
    """p(z): `draw(*shape, device=…, dtype=…)` of one shape; without parameters, so nothing in the state dict."""

    def __init__(self, shape: int | tuple[int, ...], draw: Callable[..., Tensor] = torch.randn) -> None:
        super().__init__()
        self.shape = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
        self.draw = draw
        if not self.shape or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.shape):
            raise ValueError(f"latent: got {shape!r}, expected the positive size of z, or its shape")
        if not callable(draw):
            raise TypeError(f"noise: expected a function like torch.randn, got {type(draw).__name__}")

    def extra_repr(self) -> str:
        return f"{self.shape}, {getattr(self.draw, '__name__', self.draw)}"

    def forward(self, n: int, like: nn.Module) -> Tensor:
        """n codes, where the parameters of `like` are."""
        return self.draw(n, *self.shape, **_kind(like))


def _kind(like: nn.Module) -> dict[str, Any]:
    """Device and dtype of the network's parameters, if it has any."""
    parameter = next(like.parameters(), None)
    return {} if parameter is None else {"device": parameter.device, "dtype": parameter.dtype}


def tensors(batch: Any, *names: str) -> tuple[Tensor, ...]:
    """The tensors of a batch of examples, as many and as long as `names` says."""
    found = (batch,) if isinstance(batch, Tensor) else tuple(batch) if isinstance(batch, (tuple, list)) else None
    if found is None or not all(isinstance(t, Tensor) for t in found):
        got = type(batch).__name__ if found is None else f"({', '.join(type(t).__name__ for t in found)})"
        raise TypeError(f"batch: expected tensors ({', '.join(names)}), got {got}")
    if len(found) != len(names) or not all(t.dim() for t in found):
        shapes = ", ".join(str(tuple(t.shape)) for t in found)
        raise ValueError(f"batch: got tensors of shapes {shapes}, expected ({', '.join(names)}), examples first")
    return found


def same_length(**parts: Tensor) -> None:
    """Raises where the tensors hold different numbers of examples."""
    if len({len(t) for t in parts.values()}) > 1:
        got = ", ".join(f"{name} {tuple(t.shape)}" for name, t in parts.items())
        raise ValueError(f"batch: got {got}, expected as many examples of each")


def conditioned(batch: Any) -> tuple[Tensor, Tensor]:
    """(x, labels) of one length."""
    x, labels = tensors(batch, "x", "labels")
    same_length(x=x, labels=labels)
    return x, labels


def draw_labels(n: int, num_classes: int | None, like: nn.Module) -> Tensor:
    """n labels, all classes alike probable."""
    if num_classes is None:
        raise ValueError("labels: got None, expected one for each sample: this model was given no num_classes")
    return torch.randint(num_classes, (n,), device=_kind(like).get("device"))


def positive(name: str, value: int, *, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}, expected an integer of at least {least}")
    return value
