"""The one place that joins an op's kernel, its reference and autograd.

A kernel is an accelerator of its reference, never the only truth. A `FusedOp`, called, runs the kernel where a kernel
is right, and the reference wherever PyTorch must look inside: `torch.func` transforms, forward-mode AD, tensor
subclasses, dtypes without a kernel. DTensors it gathers. Backward runs the backward kernel or, under
`create_graph=True`, differentiates the reference, so that second derivatives are the reference's for every op. On a
device without kernels an op's closed form takes the kernels' place or, where it has none, the reference under PyTorch's
autograd. The bare ops (`torch.ops.unigen_fast.*`) carry the same formulas for the graphs that hold them directly
(`torch.compile`, `torch.export`), and the reference as their kernel on every device that has no other.
"""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from unigen_fast._private import (
    below_autograd,
    graph_is_kept,
    known_true,
    saved_tensors_are_packed,
    transformed,
    transforms_active,
    with_autograd,
)

LIBRARY = torch.library.Library("unigen_fast", "DEF")
KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
_PLAIN = (Tensor, torch.nn.Parameter)

Tensors = Sequence[Tensor | None]


def _as_tuple(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def mesh_of(*tensors: Tensor | None) -> Any:
    """The device mesh of the DTensors among the tensors; None where there are none."""
    module = sys.modules.get("torch.distributed.tensor")  # it is slow to import, and without it there are none
    if module is not None:
        for t in tensors:
            if isinstance(t, module.DTensor):
                return t.device_mesh
    return None


def beside(x: Tensor, like: Tensor) -> Tensor:
    """Random numbers `x` to be used with `like`: with a DTensor, those of its mesh's first process for all."""
    mesh = mesh_of(like)
    if mesh is None:
        return x
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(x, mesh, [Replicate()] * mesh.ndim)


class ClosedForm(NamedTuple):
    """An op and its gradient in PyTorch's operations, without a graph: a node of autograd for each of them would take
    longer than the operations on a minibatch.

    `forward(tensors…, options…)` takes what the op takes and returns the outputs (the first alone, or all that are ever
    visible) and what is kept for backward beside the op's tensors. It returns None where the reference is to serve.
    `backward(grads, kept, needed, tensors…, options…)` returns a gradient for each tensor; of those that are not
    `needed` any or None. Of several outputs those that took no part in the loss have None for a gradient.
    `recorded(tensors…, options…)` returns the first output by operations that autograd records, where that is faster:
    few operations on few elements. Else it returns None.
    """

    forward: Callable[..., tuple[Any, Sequence[Tensor]] | None] | None
    backward: Callable[..., Sequence[Tensor | None]] | None
    recorded: Callable[..., Tensor | None] | None


class FusedOp:
    """One op: `op(tensors, options…)` returns the outputs that carry gradient (the only one of an op without any).

    `schema` is `name(tensors…, options…) -> outputs`. The tensors come already broadcast to one shape. The first
    `differentiable_outputs` of the outputs carry gradient; those numbered in `saved` are handed to backward.
    `tensor_list`: the op takes one list of tensors, of any length.

    `backward`, if the op has a gradient, is the signature of `name_backward`: gradients of the differentiable outputs,
    tensors, saved outputs, options and, where several tensors are `differentiable`, `int needed`, a bit mask over
    those. It returns a gradient for each of them, laid out as `torch.empty_like` of the tensor, or an empty one where
    it is not needed.

    `reaches`: for each differentiable output the tensors that it has a gradient for, where that is not all of them. A
    tensor that none of the outputs in the loss reaches gets None.

    `gradients`: the op makes the gradients of its first output, one number, along with it. The last of its options is
    `int gradients`, a mask like `needed` of those that are wanted, and its last outputs are these gradients (of which
    the reference knows nothing). Backward hands them over, or runs the backward op where other ones are asked for.

    The option `scale`, where there is one, multiplies the first output.

    Numbers that change from step to step (`float` and `float[]` options) would have a compiled graph made anew for each
    value. There `name.numbers` takes the op's place: the same op with all of these numbers in one tensor, the last
    argument. A `scale` that changes, or that is a tensor, multiplies the result instead.

    `inline_below`: the compiler gets the reference, which it fuses with its neighbours, where the tensors are known to
    have fewer elements than this altogether. An opaque op stops it, and its call takes longer than the work on so few.
    Where that depends on the options, a function of them.
    """

    every: ClassVar[list["FusedOp"]] = []
    # kinds of device that kernels are loaded for
    devices: ClassVar[set[str]] = set()
    load_gpu: ClassVar[Callable[[], None]]  # adds "cuda", if there is anything to load; asks the driver, once
    schemas: ClassVar[list[str]] = []
    closed: ClosedForm | None = None  # what serves where there are no kernels; without one, the reference
    # `_Fused` in C++, where it is loaded. It returns None where the reference is to serve, or an option is a tensor.
    native: Callable[[Tensors, Sequence[Any], int], Any] | None = None

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        *,
        backward: str | None = None,
        tensors: int = 1,
        tensor_list: bool = False,
        differentiable: Sequence[int] = (0,),
        differentiable_outputs: int = 1,
        reaches: Sequence[Sequence[int]] = (),
        saved: Sequence[int] = (),
        gradients: bool = False,
        inline_below: float | Callable[..., float] = 0,
    ) -> None:
        self.name = schema.partition("(")[0]
        self.reference = reference
        self.tensors = tensors
        self.tensor_list = tensor_list
        self.differentiable = tuple(differentiable)
        self.differentiable_outputs = differentiable_outputs if backward else 0
        self.reaches = tuple(tuple(places) for places in reaches)
        self.saved = tuple(saved)
        self.gradients = len(self.differentiable) if gradients else 0
        self.inline_below = inline_below
        self.takes_needed = len(self.differentiable) > 1 and not tensor_list
        FusedOp.every.append(self)
        self.forward = self._define(schema, self._reference_forward, self._fake_forward)
        arguments = _declarations(schema)[1 if tensor_list else tensors :]
        self.option_names = tuple(argument.partition(" ")[2] for argument in arguments)
        self.scale = self.option_names.index("scale") if "scale" in self.option_names else None
        self.numbers = tuple(i for i, argument in enumerate(arguments) if argument.startswith("float"))
        self.number_list = next((i for i in self.numbers if arguments[i].startswith("float[]")), None)
        if backward is not None:
            backward = f"{self.name}_backward{backward}"
            self.backward = self._define(backward, self._reference_backward, self._fake_backward)
            self._register_autograd(self.forward, self._bare_backward)
            self._register_autograd(self.backward, self._bare_double_backward)
        if self.numbers:
            self.forward_of_numbers = self._define_of_numbers(schema, self.forward)
            if backward is not None:
                self.backward_of_numbers = self._define_of_numbers(backward, self.backward)
                self._register_autograd(self.forward_of_numbers, self._bare_backward)
                self._register_autograd(self.backward_of_numbers, self._bare_double_backward)

    # ---- the call ----------------------------------------------------------------------------------------------------

    def __call__(self, tensors: Tensors, *options: Any, visible: int = 0) -> Any:
        """`visible`: how many outputs to return, if more than those that carry gradient.

        Every microsecond here is one in each loss of each step: loops rather than generators.
        """
        visible = visible or self.differentiable_outputs or 1
        if is_compiling():
            return self._compiled(tensors, options, visible)
        if self.native is not None:
            outputs = self.native(tensors, options, visible)
            if outputs is not None:
                return outputs
        if self.scale is not None and isinstance(options[self.scale], Tensor):
            return self._scaled(tensors, options, visible)
        if transformed(*tensors):
            return self._by_reference(tensors, options, visible)
        recorded = False
        for t in tensors:
            if t is not None:
                if type(t) not in _PLAIN or (t.dtype not in KERNEL_DTYPES and t.is_floating_point()):
                    return self._of_foreign(tensors, options, visible)
                recorded = recorded or t.requires_grad
        recorded = recorded and self.differentiable_outputs > 0 and torch.is_grad_enabled()
        if self._served(tensors):
            if recorded:
                return _Fused.apply(self, options, visible, *tensors)
            with below_autograd():
                return _leading(self.forward(*self._pack(tensors), *options), visible)
        closed = self.closed
        if closed is not None and cast(Tensor, tensors[0]).is_cpu:
            if closed.recorded is not None and visible == 1:
                outputs = closed.recorded(*self._pack(tensors), *options)
                if outputs is not None:
                    return outputs
            made = None
            if closed.forward is not None:
                with below_autograd():
                    made = closed.forward(*self._pack(tensors), *options)
            if made is not None and (visible == 1 or not isinstance(made[0], Tensor)):
                outputs = _leading(made[0], visible)
                return _closed(self, options, outputs, made[1], *tensors) if recorded else outputs
        return self._by_reference(tensors, options, visible)

    def _compiled(self, tensors: Tensors, options: Sequence[Any], visible: int) -> Any:
        """The call as a graph of `torch.compile` or `torch.export` takes it in."""
        if self.scale is not None and _changes(options[self.scale]):
            return self._scaled(tensors, options, visible)
        if transforms_active(*tensors) or not self._served(tensors):
            return self._by_reference(tensors, options, visible)
        packed = self._pack(tensors)
        for i in self.numbers:
            if _changes(options[i]):
                others = [option for j, option in enumerate(options) if j not in self.numbers]
                return _leading(self.forward_of_numbers(*packed, *others, self._gathered(options)), visible)
        if self._inline(tensors, options):
            return self._by_reference(tensors, options, visible)
        return _leading(self.forward(*packed, *options), visible)

    def _scaled(self, tensors: Tensors, options: Sequence[Any], visible: int) -> Any:
        """The call with a scale of 1, and the first output times the scale in PyTorch."""
        scale = options[cast(int, self.scale)]
        unscaled = [1.0 if i == self.scale else option for i, option in enumerate(options)]
        outputs = self(tensors, *unscaled, visible=visible)
        first, *rest = _as_tuple(outputs)
        first = (first * scale).to(first.dtype)
        return first if isinstance(outputs, Tensor) else (first, *rest)

    def _gathered(self, options: Sequence[Any]) -> Tensor:
        """All numbers among the options in one tensor, where the kernels read them: on the host."""
        numbers: list[Any] = []
        for i in self.numbers:
            numbers.extend(options[i] if i == self.number_list else (options[i],))
        one = torch.ones((), dtype=torch.float64)  # a product is what the compiler makes of a number that changes
        return torch.stack([(one * number).cpu() for number in numbers])

    def _pack(self, inputs: Tensors) -> Tensors | tuple[list[Tensor | None]]:
        return (list(inputs),) if self.tensor_list else inputs

    def _inline(self, tensors: Tensors, options: Sequence[Any]) -> bool:
        """Whether a graph gets the reference. What the compiler meets here it checks again before each step: little."""
        below = self.inline_below(*options) if callable(self.inline_below) else self.inline_below
        if not below or below == math.inf:
            return below > 0
        elements = 0
        for t in tensors:
            if t is not None:
                elements += t.numel()
        return known_true(elements < below)

    @classmethod
    def _served(cls, tensors: Tensors) -> bool:
        """Whether kernels are loaded for the tensors' device."""
        first = tensors[0]  # no op takes None for it
        if first is None:
            return False
        if first.is_cuda and "cuda" not in cls.devices:
            cls.load_gpu()
        return first.device.type in cls.devices

    def _by_reference(self, tensors: Tensors, options: Sequence[Any], visible: int) -> Any:
        outputs = _leading(self.reference(*self._pack(tensors), *options), visible)
        if visible <= self.differentiable_outputs or isinstance(outputs, Tensor):
            return outputs
        # detached as the kernel's are, tangents too: those go through the reference's no_grad
        return tuple(o if i < self.differentiable_outputs else o.detach() for i, o in enumerate(outputs))

    def _of_foreign(self, tensors: Tensors, options: Sequence[Any], visible: int) -> Any:
        """DTensors are gathered: every process has the whole tensors, and the whole result.

        PyTorch shards few of the references' operations and refuses others in the middle of a backward pass.
        """
        mesh = mesh_of(*tensors)
        if mesh is None:
            return self._by_reference(tensors, options, visible)
        from torch.distributed.tensor import DTensor, Replicate

        whole = [Replicate()] * mesh.ndim
        local: list[Tensor | None] = []
        for t in tensors:
            if t is not None and mesh_of(t) != mesh:
                raise TypeError(
                    f"{self.name}: got a DTensor beside a {type(t).__name__} of shape {tuple(t.shape)} that is not of "
                    "its device mesh, expected all of one mesh (torch.distributed.tensor.distribute_tensor), or none"
                )
            local.append(None if t is None else cast(DTensor, t).redistribute(placements=whole).to_local())
        outputs = self(local, *options, visible=visible)
        if isinstance(outputs, Tensor):
            return DTensor.from_local(outputs, mesh, whole, run_check=False)
        return tuple(DTensor.from_local(o, mesh, whole, run_check=False) for o in outputs)

    # ---- derivatives -------------------------------------------------------------------------------------------------

    def differentiable_gradients(
        self, grads: Tensors, inputs: Tensors, options: Sequence[Any], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of the inputs that are `needed`, None for the others, with a graph of their own."""
        # fresh aliases: one input may be a function of another, and only the direct dependence counts here
        aliases = [None if t is None else t.view_as(t) for t in inputs]
        return self._differentiate(grads, aliases, options, needed, create_graph=True)

    def kernel_gradients(
        self,
        grads: Tensors,
        tensors: Tensors,
        options: Sequence[Any],
        needed: Sequence[bool],
        numbers: Tensor | None = None,
    ) -> Sequence[Tensor | None]:
        """The same by the backward op. `tensors`: the inputs, then the saved outputs. With `numbers`, the options are
        the others."""
        backward, last = (self.backward, ()) if numbers is None else (self.backward_of_numbers, (numbers,))
        if self.tensor_list:
            count = len(needed)
            found = backward(*grads, list(tensors[:count]), *tensors[count:], *options, *last)
            return [g if wanted else None for g, wanted in zip(found, needed, strict=True)]
        if not self.takes_needed:
            return backward(*grads, *tensors, *options, *last), *(None,) * (len(needed) - 1)
        mask = 0
        for bit, i in enumerate(self.differentiable):
            mask |= needed[i] << bit
        found = backward(*grads, *tensors, *options, mask, *last)
        result: list[Tensor | None] = [None] * len(needed)
        for i, grad in zip(self.differentiable, found, strict=True):
            if needed[i]:
                result[i] = grad
        return result

    def made_gradients(
        self, grads: Tensors, made: Sequence[Tensor], options: Sequence[Any], needed: Sequence[bool]
    ) -> list[Tensor | None] | None:
        """Those `made` in the forward pass, by place; None where they are not, or not alone, what is asked for."""
        if not options[-1] or any(g is not None for g in grads[1:]):
            return None
        if any(needed[i] and not options[-1] >> bit & 1 for bit, i in enumerate(self.differentiable)):
            return None
        result: list[Tensor | None] = [None] * len(needed)
        for bit, i in enumerate(self.differentiable):
            if needed[i]:
                result[i] = made[bit]
        return result

    def _differentiate(
        self, grads: Tensors, inputs: Tensors, options: Sequence[Any], needed: Sequence[bool], create_graph: bool
    ) -> list[Tensor | None]:
        """Gradients of `inputs` through the reference."""
        outputs = _as_tuple(self.reference(*self._pack(inputs), *options))[: len(grads)]
        reached = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        wanted = [(i, t) for i, t in enumerate(inputs) if needed[i] and t is not None]
        return _pull_back(reached, wanted, len(inputs), create_graph=create_graph, materialize_grads=True)

    def reached(self, grads: Tensors, needed: Sequence[bool]) -> Sequence[bool]:
        """`needed`, less what no output with a gradient reaches."""
        if not self.reaches:
            return needed
        found = {i for g, places in zip(grads, self.reaches, strict=True) if g is not None for i in places}
        return [n and i in found for i, n in enumerate(needed)]

    def _where(self, inputs: Tensors) -> Sequence[int]:
        return range(len(inputs)) if self.tensor_list else self.differentiable

    # ---- the dispatcher's side: reference kernels, fakes, autograd of the bare ops -----------------------------------

    def _define(self, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
        name = schema.partition("(")[0]
        self.schemas.append(schema)
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"unigen_fast::{name}", fake, lib=LIBRARY)
        name, _, overload = name.partition(".")
        return getattr(getattr(torch.ops.unigen_fast, name), overload or "default")

    def _define_of_numbers(self, schema: str, op: Any) -> Any:
        """The overload of the op that takes its numbers in one tensor. It reads them, and calls the op."""
        arguments = _declarations(schema)
        last = len(arguments) - (op is not self.forward and self.takes_needed)
        first = last - len(self.option_names)
        others = [argument for argument in arguments if not argument.startswith("float")]

        def whole(args: Sequence[Any], numbers: list[float]) -> list[Any]:
            until = last - len(self.numbers)
            return [*args[:first], *self._whole(args[first:until], numbers), *args[until:]]

        def kernel(*args: Any) -> Any:
            return op(*whole(args[:-1], args[-1].tolist()))

        def fake(*args: Any) -> Any:  # no shape hangs on a number, but on how many there are
            made = self._fake_forward if op is self.forward else self._fake_backward
            return made(*whole(args[:-1], [1.0] * args[-1].size(0)))

        name, returns = schema.partition("(")[0], schema.partition(" -> ")[2]
        return self._define(f"{name}.numbers({', '.join([*others, 'Tensor numbers'])}) -> {returns}", kernel, fake)

    def _register_autograd(self, op: Any, backward: Callable[..., Any]) -> None:
        schema = op._schema
        forward, of_numbers = not schema.name.endswith("_backward"), schema.overload_name == "numbers"

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = _as_tuple(output)
            numbers = inputs[-1:] if of_numbers else ()
            arguments = inputs[: len(inputs) - len(numbers)]
            if forward:
                tensors, ctx.options = self._split_forward(arguments)
                kept = [*(outputs[i] for i in self.saved), *outputs[len(outputs) - self.gradients :]]
                ctx.kinds = _kinds(outputs[: self.differentiable_outputs])
                ctx.mark_non_differentiable(*self.without_gradient(tensors, outputs))
            else:
                grads, tensors, ctx.options, ctx.needed = self._split_backward(arguments)
                tensors, kept = [*grads, *tensors], []  # the saved outputs are there for the kernel alone
                ctx.arguments = len(arguments)
            ctx.save_for_backward(*tensors, *kept, *numbers)
            ctx.tensors, ctx.of_numbers = len(tensors), of_numbers
            # None tells an output that took no part in the loss from one whose gradient is zero: gradients made in the
            # forward pass serve the former alone
            ctx.set_materialize_grads(False)

        name = schema.name + (".numbers" if of_numbers else "")
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=LIBRARY)

    def without_gradient(self, inputs: Tensors, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Those of the outputs that carry no gradient, or that no tensor reaches that requires grad."""
        result = list(outputs[self.differentiable_outputs :])
        for output, places in zip(outputs, self.reaches, strict=False):
            if not any((t := inputs[i]) is not None and t.requires_grad for i in places):
                result.append(output)
        return result

    def _split_forward(self, args: Sequence[Any]) -> tuple[list[Tensor | None], list[Any]]:
        """(tensors, options) of the forward op's arguments."""
        if self.tensor_list:
            return list(args[0]), list(args[1:])
        return list(args[: self.tensors]), list(args[self.tensors :])

    def _split_backward(self, args: Sequence[Any]) -> tuple[list[Tensor], list[Tensor | None], list[Any], list[bool]]:
        """(gradients, tensors, options, needed) of the backward op's arguments."""
        n = self.differentiable_outputs
        inputs, rest = self._split_forward(args[n:])
        options = rest[len(self.saved) :]
        mask = options.pop() if self.takes_needed else -1
        return list(args[:n]), inputs, options, self._needed(inputs, mask)

    def _as_schema(self, grads: list[Tensor]) -> Any:
        return grads if self.tensor_list else grads[0] if len(grads) == 1 else tuple(grads)

    def _late(self, inputs: Tensors) -> bool:
        """Whether the first tensors of a GPU have brought kernels for them: the bare ops load none before."""
        return "cuda" not in self.devices and self._served(inputs) and "cuda" in self.devices

    def _reference_forward(self, *args: Any) -> Any:
        if self._late(self._split_forward(args)[0]):
            return self.forward(*args)
        with torch.no_grad():
            outputs = self.reference(*args)
        # an op's outputs are contiguous and alias none of its inputs
        fresh = tuple(torch.empty(o.shape, dtype=o.dtype, device=o.device).copy_(o) for o in _as_tuple(outputs))
        if self.gradients:
            inputs, options = self._split_forward(args)
            one = torch.ones_like(fresh[0])
            # hooks on what a graph saves are meant for the caller's graph, not for the one within
            with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
                fresh += tuple(self._reference_gradients([one], inputs, options, self._needed(inputs, options[-1])))
        return fresh if isinstance(outputs, tuple) else fresh[0]

    def _fake_forward(self, *args: Any) -> Any:
        outputs = self.reference(*args)
        fresh = tuple(o.new_empty(o.shape) for o in _as_tuple(outputs))
        if self.gradients:
            inputs, options = self._split_forward(args)
            fresh += tuple(self._empty_gradients(inputs, self._needed(inputs, options[-1])))
        return fresh if isinstance(outputs, tuple) else fresh[0]

    def _needed(self, inputs: Tensors, mask: int) -> list[bool]:
        """Which of the inputs a mask names."""
        needed = [False] * len(inputs)
        for bit, i in enumerate(self._where(inputs)):
            needed[i] = bool(mask >> bit & 1) and inputs[i] is not None
        return needed

    def _reference_backward(self, *args: Any) -> Any:
        grads, inputs, options, needed = self._split_backward(args)
        if self._late(inputs):
            return self.backward(*args)
        return self._as_schema(self._reference_gradients(grads, inputs, options, needed))

    def _reference_gradients(
        self, grads: Tensors, inputs: Tensors, options: Sequence[Any], needed: Sequence[bool]
    ) -> list[Tensor]:
        """As the backward op returns them; `grads` may be of the first outputs alone."""

        def differentiated() -> list[Tensor | None]:
            leaves = [None if t is None else t.detach().requires_grad_(needed[i]) for i, t in enumerate(inputs)]
            return self._differentiate(grads, leaves, options, needed, create_graph=False)

        found = with_autograd(differentiated)
        result = self._empty_gradients(inputs, needed)
        for i, out in zip(self._where(inputs), result, strict=True):
            grad = found[i]
            if grad is not None:
                out.copy_(grad)
            elif needed[i]:
                out.zero_()
        return result

    def _fake_backward(self, *args: Any) -> Any:
        _, inputs, _, needed = self._split_backward(args)
        return self._as_schema(self._empty_gradients(inputs, needed))

    def _empty_gradients(self, inputs: Tensors, needed: Sequence[bool]) -> list[Tensor]:
        present = next(t for t in inputs if t is not None)
        result = []
        for i in self._where(inputs):
            t = inputs[i]
            result.append(torch.empty_like(t) if t is not None and needed[i] else present.new_empty((0,)))
        return result

    def _bare_backward(self, ctx: Any, *grad_outputs: Tensor | None) -> Any:
        saved, numbers = _unpacked(ctx)
        inputs, given = saved[: ctx.tensors], grad_outputs[: self.differentiable_outputs]
        where, options = self._where(inputs), ctx.options
        wanted = [i in where and t is not None and t.requires_grad for i, t in enumerate(inputs)]
        needed = self.reached(given, wanted)
        nothing = (None,) * (len(options) + ctx.of_numbers)
        differentiably = torch.is_grad_enabled() and not is_compiling()
        if self.gradients:
            saved, made = saved[: -self.gradients], cast(list[Tensor], saved[-self.gradients :])
            if not differentiably:
                found, factor = self.made_gradients(given, made, options, needed), given[0]
                if found is not None and factor is not None:
                    return *(None if g is None else _times(g, factor, owned=False) for g in found), *nothing
        grads = _zero_filled(given, ctx.kinds)
        if differentiably:
            options = options if numbers is None else self._whole(options, numbers.tolist())
            result: Sequence[Tensor | None] = self.differentiable_gradients(grads, inputs, options, needed)
        else:
            result = self.kernel_gradients(grads, saved, options, needed, numbers)
        return *([list(result)] if self.tensor_list else result), *nothing

    def _bare_double_backward(self, ctx: Any, *grad_outputs: Any) -> Any:
        """Derivative of the backward op: the reference, differentiated twice."""
        saved, numbers = _unpacked(ctx)
        of_outputs, needed = self.differentiable_outputs, ctx.needed
        options = ctx.options if numbers is None else self._whole(ctx.options, numbers.tolist())
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            arguments = [None if t is None else t.view_as(t) for t in saved]
            grads, inputs = cast(list[Tensor], arguments[:of_outputs]), arguments[of_outputs:]
            first = self._differentiate(grads, inputs, options, needed, create_graph=True)
        flat = grad_outputs[0] if self.tensor_list else grad_outputs
        reached: list[tuple[Tensor, Tensor | None]] = []
        for i, g in zip(self._where(inputs), flat, strict=True):
            grad = first[i]
            if needed[i] and g is not None and grad is not None and grad.requires_grad:
                reached.append((grad, g))
        wanted = [(i, t) for i, t in enumerate(arguments) if t is not None and t.requires_grad]
        result = _pull_back(reached, wanted, len(arguments), create_graph=create_graph, allow_unused=True)
        of_grads, of_inputs = result[:of_outputs], result[of_outputs:]
        packed = [of_inputs] if self.tensor_list else of_inputs
        rest = ctx.arguments - len(of_grads) - len(packed) + ctx.of_numbers
        return (*of_grads, *packed, *(None,) * rest)

    def _whole(self, options: Sequence[Any], numbers: Sequence[float]) -> list[Any]:
        """All options, of those that are no numbers and the numbers."""
        others, values = iter(options), iter(numbers)
        extra = len(numbers) - len(self.numbers) + 1
        result: list[Any] = []
        for i in range(len(self.option_names)):
            if i == self.number_list:
                result.append([next(values) for _ in range(extra)])
            else:
                result.append(next(values if i in self.numbers else others))
        return result


def _pull_back(
    reached: Sequence[tuple[Tensor, Tensor | None]], wanted: Sequence[tuple[int, Tensor]], count: int, **options: bool
) -> list[Tensor | None]:
    """Gradients of those of `count` tensors that are `wanted`, by place; `reached`: outputs and their gradients."""
    result: list[Tensor | None] = [None] * count
    if reached and wanted:
        found = torch.autograd.grad([o for o, _ in reached], [t for _, t in wanted], [g for _, g in reached], **options)
        for (i, _), grad in zip(wanted, found, strict=True):
            result[i] = grad
    return result


def _unpacked(ctx: Any) -> tuple[list[Tensor | None], Tensor | None]:
    """(saved tensors, numbers) of a bare op's context."""
    saved = list(ctx.saved_tensors)
    return saved, saved.pop() if ctx.of_numbers else None


def _declarations(schema: str) -> list[str]:
    """The arguments of a schema, `type name` each."""
    return schema.partition("(")[2].partition(") -> ")[0].split(", ")


def _changes(number: Any) -> bool:
    """Whether an option is a number that a graph in the making must take as an input."""
    if isinstance(number, (list, tuple)):
        return any(_changes(item) for item in number)
    if isinstance(number, Tensor):
        return True
    # a constant is on one side of any bound; of a symbol that is unknown (a global bound may be a symbol too)
    return not (known_true(number >= 0.7310585786300049) or known_true(number < 0.7310585786300049))


def _leading(outputs: Any, visible: int) -> Any:
    if isinstance(outputs, Tensor):
        return outputs
    return outputs[0] if visible == 1 else outputs[:visible]


def _kinds(outputs: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    return [(o.shape, o.dtype, o.device) for o in outputs]


def _zero_filled(grads: Tensors, kinds: Sequence[tuple[torch.Size, torch.dtype, torch.device]]) -> list[Tensor]:
    """Zeros for the outputs that took no part in the loss: expanded, so they cost no memory."""
    return [
        torch.zeros((), dtype=dtype, device=device).expand(shape) if g is None else g
        for g, (shape, dtype, device) in zip(grads, kinds, strict=True)
    ]


def _times(gradient: Tensor, factor: Tensor, owned: bool) -> Tensor:
    """gradient · factor, 0 for a factor of 0; in the memory of the former where nobody else has it, and as it is for a
    factor of 1."""
    owned = owned and type(gradient) is Tensor and type(factor) is Tensor and not graph_is_kept()
    if factor.device.type == "cpu" and not is_compiling():  # elsewhere one would wait for the number
        number = factor.item()
        if number == 0:
            return torch.zeros_like(gradient)
        if number == 1 and owned:
            return gradient
        return gradient.mul_(factor) if owned else gradient * factor
    product = gradient.mul_(factor) if owned else gradient * factor
    return torch.where(factor == 0, 0.0, product)


class _Fused(torch.autograd.Function):
    """The eager path: a Function in ctx style costs a third of `register_autograd`.

    `csrc/bindings/autograd.cpp` does the same in C++, for the torch it was built with.
    """

    @staticmethod
    def forward(ctx: Any, op: FusedOp, options: tuple[Any, ...], visible: int, *inputs: Tensor | None) -> Any:
        ctx.call = op, options
        with below_autograd():
            outputs = _as_tuple(op.forward(*op._pack(inputs), *options))
        made = outputs[len(outputs) - op.gradients :]
        ctx.owned = op.gradients and not saved_tensors_are_packed()
        ctx.save_for_backward(*inputs, *[outputs[i] for i in op.saved], *made)
        if visible == 1:
            return outputs[0]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*op.without_gradient(inputs, outputs[:visible]))
        ctx.output_kinds = _kinds(outputs[: op.differentiable_outputs])
        return outputs[:visible]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        op, options = ctx.call
        needed = ctx.needs_input_grad[3:]
        if len(grads) > 1:
            grads = grads[: op.differentiable_outputs]
            if all(g is None for g in grads):
                return (None,) * (3 + len(needed))
            needed = op.reached(grads, needed)
        tensors = ctx.saved_tensors  # unpacking them may run the forward pass once more, which needs autograd
        if op.gradients:
            tensors, made = tensors[: -op.gradients], tensors[-op.gradients :]
            if not torch.is_grad_enabled():
                found, factor = op.made_gradients(grads, made, options, needed), grads[0]
                if found is not None and factor is not None:
                    with below_autograd():
                        return None, None, None, *(None if g is None else _times(g, factor, ctx.owned) for g in found)
        if len(grads) > 1:
            grads = tuple(_zero_filled(grads, ctx.output_kinds))
        if torch.is_grad_enabled():  # create_graph=True
            return None, None, None, *op.differentiable_gradients(grads, tensors[: len(needed)], options, needed)
        with below_autograd():
            return None, None, None, *op.kernel_gradients(grads, tensors, options, needed)


class _Closed(torch.autograd.Function):
    """A closed form's outputs, which are there already, as a node of autograd."""

    @staticmethod
    def forward(
        ctx: Any, op: FusedOp, options: tuple[Any, ...], outputs: Any, kept: Sequence[Tensor], *inputs: Tensor | None
    ) -> Any:
        ctx.call = op, options
        ctx.save_for_backward(*inputs, *kept)
        if not isinstance(outputs, Tensor):
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*op.without_gradient(inputs, outputs))
            ctx.output_kinds = _kinds(outputs[: op.differentiable_outputs])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        op, options = ctx.call
        needed: Sequence[bool] = ctx.needs_input_grad[4:]
        if len(grads) > 1:
            grads = grads[: op.differentiable_outputs]
            if all(g is None for g in grads):
                return (None,) * (4 + len(needed))
            needed = op.reached(grads, needed)
        saved = ctx.saved_tensors
        tensors = saved[: len(needed)]
        if torch.is_grad_enabled() or transforms_active(*grads):  # create_graph=True, is_grads_batched=True
            if len(grads) > 1:
                grads = tuple(_zero_filled(grads, ctx.output_kinds))
            with torch.enable_grad():
                found = op.differentiable_gradients(grads, tensors, options, needed)
        else:
            found = op.closed.backward(grads, saved[len(needed) :], needed, *op._pack(tensors), *options)
        return None, None, None, None, *found


# what Function.apply does for `torch.func` beforehand is not needed here
_closed = super(torch.autograd.Function, _Closed).apply
