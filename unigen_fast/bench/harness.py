"""Checks and times one row: fused against eager and `torch.compile` of the same eager function, in one process.

Before anything is timed, the fused values and gradients must equal those of the eager function in float64. Then rounds
run until the time is up, each with the contestants in another order, and medians and quartiles are taken over the
rounds. A step is a forward pass and, where an input has a gradient, `torch.autograd.grad` with a random gradient of the
outputs (of 1 for a loss of a training step); nothing is accumulated from step to step.
"""

import contextlib
import ctypes
import gc
import itertools
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unigen_fast.bench.cases import Row

FUSED, EAGER = "fused", "eager"
# torch.compile's modes: autotuning chooses among CUDA or Triton kernels, on a CPU it only costs time
_COMPILE_MODES: dict[str, dict[str, str | None]] = {
    "cpu": {"compile": None},
    "cuda": {"compile": None, "compile_autotune": "max-autotune-no-cudagraphs"},
}
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}
_LOW_PRECISION = (torch.float16, torch.bfloat16)
_MIN_ROUNDS = 6  # every order of three contestants
_LONG_STEP = 4.0  # seconds; where a step takes longer, two rounds have to do
_MAX_INPUT_SETS = 64
# copied to measure bandwidth: far beyond any cache, and within one
_MEMORY_COPY = {"cpu": 2**28, "cuda": 2**29}
_CACHE_COPY = 2**20

Step = Callable[[], Any]


def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None


_malloc = _glibc()


def contestants(device: torch.device, compiled: bool) -> list[str]:
    return [FUSED, EAGER, *(_COMPILE_MODES[device.type] if compiled else ())]


def peer_function(eager: Callable[..., Any], contestant: str, device: torch.device) -> Callable[..., Any]:
    """Eager as this contestant runs it: as it stands, or compiled."""
    if contestant == EAGER:
        return eager
    return torch.compile(eager, fullgraph=True, dynamic=False, mode=_COMPILE_MODES[device.type][contestant])


def _as_tuple(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Case:
    """A row at one dtype on one device, with its inputs drawn."""

    def __init__(self, row: Row, device: torch.device, dtype: torch.dtype) -> None:
        self.row, self.device, self.dtype = row, device, dtype
        self._generator = torch.Generator(device).manual_seed(0)
        first = self._draw_inputs()
        with torch.no_grad():
            outputs = row.fused(*first)
        self.has_gradient = any(item.gradient for item in row.inputs)
        self._output_like = [(o.shape, o.dtype) for o in _as_tuple(outputs)]
        self._output_is_tensor = isinstance(outputs, Tensor)
        gradients = self._draw_output_gradients()
        leaves = [t for t in first if t.requires_grad]
        self.floor_bytes = _bytes(first) + _bytes(_as_tuple(outputs)) + _bytes(gradients) + _bytes(leaves)
        self.result_bytes = _bytes(_as_tuple(outputs)) + _bytes(leaves)
        self._sets = [(first, gradients)]
        if device.type == "cuda":  # inputs come from memory, not from the L2 cache where the last step left them
            self.outgrow(2 * torch.cuda.get_device_properties(device).L2_cache_size)

    def outgrow(self, cache: int) -> None:
        """As many sets of inputs as, step after step, come from memory: each step takes the next one."""
        for _ in range(len(self._sets), min(_MAX_INPUT_SETS, math.ceil(cache / self.floor_bytes))):
            self._sets.append((self._draw_inputs(), self._draw_output_gradients()))

    def _draw_inputs(self) -> list[Tensor]:
        tensors = []
        for item in self.row.inputs:
            # drawn in float32, so that every dtype has the same values up to rounding
            x = torch.empty(item.shape, device=self.device)
            item.draw(x, self._generator)
            tensors.append(x.to(self.dtype).requires_grad_(item.gradient))
        return tensors

    def _draw_output_gradients(self) -> list[Tensor]:
        if not self.has_gradient:
            return []
        if self.row.trained:
            return [torch.ones(shape, device=self.device, dtype=dtype) for shape, dtype in self._output_like]
        return [
            torch.randn(shape, generator=self._generator, device=self.device).to(dtype)
            for shape, dtype in self._output_like
        ]

    @property
    def first_inputs(self) -> list[Tensor]:
        """Of every set."""
        return [inputs[0] for inputs, _ in self._sets]

    def function(self, contestant: str) -> Callable[..., Any]:
        return self.row.fused if contestant == FUSED else peer_function(self._eager(), contestant, self.device)

    def _eager(self) -> Callable[..., Any]:
        """Below fp32 the fused functions compute in fp32 and return fp32 losses; the same is asked of the peers."""
        eager = self.row.eager
        if self.dtype not in _LOW_PRECISION:
            return eager
        dtypes = [dtype for _, dtype in self._output_like]

        def upcast(*inputs: Tensor) -> Any:
            outputs = eager(*(x.float() for x in inputs))
            if isinstance(outputs, Tensor):
                return outputs.to(dtypes[0])
            return tuple(o.to(dtype) for o, dtype in zip(outputs, dtypes, strict=True))

        return upcast

    def step(self, function: Callable[..., Any]) -> Step:
        """One forward (and backward) pass; each call takes the next set of inputs. Returns what it computed."""
        if not self.has_gradient:
            inputs_of = itertools.cycle([inputs for inputs, _ in self._sets])
            return lambda: function(*next(inputs_of))
        turns = itertools.cycle(
            [
                (inputs, [t for t in inputs if t.requires_grad], gradients[0] if self._output_is_tensor else gradients)
                for inputs, gradients in self._sets
            ]
        )

        def forward_backward() -> Any:
            inputs, leaves, gradients = next(turns)
            outputs = function(*inputs)
            return outputs, torch.autograd.grad(outputs, leaves, gradients)

        return forward_backward

    def check(self) -> None:
        """Raises AssertionError unless the fused values and gradients equal those of eager in float64."""
        inputs, gradients = self._sets[0]
        if (first := self.row.check_first) is not None:
            inputs = [x[:first].detach().requires_grad_(x.requires_grad) for x in inputs]
            gradients = [gradient[:first] for gradient in gradients]
        got = self._values_and_gradients(self.row.fused, inputs, gradients)
        wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
        want = self._values_and_gradients(
            self.row.expected or self.row.eager, wide, [gradient.double() for gradient in gradients]
        )
        for (name, g), (_, w) in zip(got.items(), want.items(), strict=True):
            if g.shape != w.shape:
                raise AssertionError(f"{name}: fused has shape {tuple(g.shape)}, eager {tuple(w.shape)}")
            tolerance = _TOLERANCE[g.dtype]
            bound = tolerance * (w.abs() + w.abs().amax())
            error = (g.double() - w).abs()
            if not bool((error <= bound).all()):  # a NaN is an error too
                worst = error.max().item()
                raise AssertionError(f"{name}: fused differs from eager by {worst:.3g} (tolerance {tolerance:.0e})")

    @staticmethod
    def _values_and_gradients(
        function: Callable[..., Any], inputs: list[Tensor], gradients: list[Tensor]
    ) -> dict[str, Tensor]:
        torch.manual_seed(0)
        outputs = _as_tuple(function(*inputs))
        result = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
        leaves = {f"gradient of input {i}": t for i, t in enumerate(inputs) if t.requires_grad}
        if leaves:
            result |= dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), gradients), strict=True))
        return result


# ---- memory ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """The profiler of some PyTorch builds writes to the file descriptor, past `sys.stderr`."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def peak_bytes(step: Step, device: torch.device) -> int:
    """Most memory that one step holds at any time beyond its inputs: outputs, gradients, and all between.

    GPU: the caching allocator's own peak. CPU: the running sum of PyTorch's allocations and frees, each of which the
    profiler records with its size; exact and repeatable where a process's resident size is neither.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _no_stderr(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


# ---- time ------------------------------------------------------------------------------------------------------------


@dataclass
class _Samples:
    """Seconds per step, one entry a round. On a GPU `host` is the time until the calls return, and `device` the time
    the GPU needs once they are all queued; `seconds` is what a loop sees, the longer of the two."""

    seconds: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return {
            "seconds": statistics.median(self.seconds),
            "quartiles": [first, third],
            "rounds": len(self.seconds),
            "host_seconds": statistics.median(self.host) if self.host else None,
            "device_seconds": statistics.median(self.device) if self.device else None,
        }


def _host_seconds(step: Step, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def _sample_cpu(step: Step, calls: int, samples: _Samples) -> None:
    samples.seconds.append(_host_seconds(step, calls))


def _sample_cuda(step: Step, calls: int, samples: _Samples) -> None:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    host = _host_seconds(step, calls)
    end.record()
    end.synchronize()
    samples.host.append(host)
    samples.seconds.append(start.elapsed_time(end) / 1e3 / calls)
    # hold the GPU back until the steps are queued: few of them, for the queue has an end
    queued = min(calls, 5)
    torch.cuda._sleep(int(2e9 * 2 * queued * host))
    start.record()
    _host_seconds(step, queued)
    end.record()
    end.synchronize()
    samples.device.append(start.elapsed_time(end) / 1e3 / queued)


def _calls_per_sample(step: Step, device: torch.device) -> int:
    """Enough for a sample to dwarf the clock's resolution and, on a GPU, the launch of the first step."""
    shortest, least = (1e-3, 10) if device.type == "cuda" else (3e-4, 1)
    once = _host_seconds(step, 1)
    if once < _LONG_STEP:
        once = min(once, *(_host_seconds(step, 1) for _ in range(2)))
    return max(least, min(1000, math.ceil(shortest / max(once, 1e-7))))


def time_steps(steps: Mapping[str, Step], device: torch.device, seconds: float) -> dict[str, dict[str, Any]]:
    sample = _sample_cuda if device.type == "cuda" else _sample_cpu
    calls = {name: _calls_per_sample(step, device) for name, step in steps.items()}
    samples = {name: _Samples() for name in steps}
    longest = 0.0
    collecting = gc.isenabled()
    gc.disable()
    try:
        deadline = time.perf_counter() + seconds
        # over all permutations nobody always follows the same neighbour, as in a mere rotation
        for count, order in enumerate(itertools.cycle(itertools.permutations(steps))):
            if count >= (_MIN_ROUNDS if longest < _LONG_STEP else 2) and time.perf_counter() >= deadline:
                break
            for name in order:
                steps[name]()  # what the one before has left behind, in caches and of freed memory, is not timed
                sample(steps[name], calls[name], samples[name])
                longest = max(longest, samples[name].seconds[-1])
    finally:
        if collecting:
            gc.enable()
    return {name: of_name.figures() for name, of_name in samples.items()}


def keep_freed_memory(largest: bool = True) -> None:
    """Tells glibc's malloc not to give memory back to the system: of blocks above 32 MiB only with `largest`.

    Whether it does depends on the size, and on what else lies on its heap; and a step that has to be given its pages
    anew each time takes up to twice as long: luck, which one contestant has and another has not. Blocks of gigabytes
    must go back all the same: on a heap, each needs a gap of its size.
    """
    if _malloc is not None:
        trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
        _malloc.mallopt(trim_threshold, 2**31 - 1)
        _malloc.mallopt(mmap_threshold, 2**25)
        _malloc.mallopt(mmap_max, 0 if largest else 65536)


def copy_bandwidth(device: torch.device) -> dict[str, float]:
    """Bytes per second, read plus written, of copying one tensor into another: "memory", and on a CPU "cache"."""
    sizes = {"memory": _MEMORY_COPY[device.type]}
    if device.type == "cpu":
        sizes["cache"] = _CACHE_COPY
    result = {}
    for name, size in sizes.items():
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        figures = time_steps({"copy": lambda s=source, t=target: t.copy_(s)}, device, 0.3)["copy"]  # type: ignore[misc]
        result[name] = 2 * size / (figures["device_seconds"] or figures["seconds"])
    return result


def copies(step: Step, source: Tensor) -> dict[str, float]:
    """How many copies of `source` into existing memory take as long as the step: where the memory of its results
    "exists", freed by a step before, and (of glibc) where that was given back to the system, so that it is "new"."""
    source = source.detach()
    target = torch.empty_like(source)
    steps: dict[str, Step] = {"copy": lambda: target.copy_(source), "exists": step}
    seconds = {name: figures["seconds"] for name, figures in time_steps(steps, source.device, 0.5).items()}
    found = {"exists": seconds["exists"] / seconds["copy"]}
    if _malloc is not None:
        new = []
        for _ in range(25):
            step()
            _malloc.malloc_trim(0)
            new.append(_host_seconds(step, 1))
        found["new"] = statistics.median(new) / seconds["copy"]
    return found


def copies_from_memory(step: Step, sources: Sequence[Tensor]) -> float:
    """The same where the step, as the copy, takes the next of the `sources` each time, so that none is in a cache."""
    pairs = itertools.cycle([(source.detach(), torch.empty_like(source)) for source in sources])

    def copy() -> None:
        source, target = next(pairs)
        target.copy_(source)

    seconds = {
        name: f["seconds"] for name, f in time_steps({"step": step, "copy": copy}, sources[0].device, 0.5).items()
    }
    return seconds["step"] / seconds["copy"]


def copy_level(floor_bytes: int, bandwidth: Mapping[str, float]) -> str:
    """Which copy a row is held against: the one within the cache if the row's bytes would fit there."""
    return "cache" if "cache" in bandwidth and floor_bytes <= 4 * _CACHE_COPY else "memory"


def time_and_memory(
    steps: Mapping[str, Step], device: torch.device, seconds: float, missing: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Time and peak memory of each step, warmed up; `missing` takes the compiled ones that do not run, and why."""
    modes, running = _COMPILE_MODES[device.type], dict[str, Step]()
    if modes.keys() & steps:
        torch.compiler.reset()  # none is compiled anew, or for dynamic shapes, because of what was measured before
    for name, step in steps.items():
        try:
            for _ in range(3):
                start = time.perf_counter()
                step()
                if time.perf_counter() - start > _LONG_STEP and name not in modes:  # nothing to compile
                    break
        except Exception as error:
            if name not in modes:
                raise
            missing[name] = _one_line(error)  # no compiler, most often
        else:
            running[name] = step
    figures = time_steps(running, device, seconds)
    for name, step in running.items():
        figures[name]["peak_bytes"] = peak_bytes(step, device)
    return figures


# ---- one row ---------------------------------------------------------------------------------------------------------


def measure(
    row: Row, device: torch.device, dtype: torch.dtype, seconds: float, compiled: bool, bandwidth: Mapping[str, float]
) -> dict[str, Any]:
    """The row's figures (see README.md in benches/), or with "error" set why there are none."""
    result: dict[str, Any] = {
        "row": row.name,
        "family": row.family,
        "dtype": str(dtype).removeprefix("torch."),
        "replaces": row.replaces,
        "shapes": [list(item.shape) for item in row.inputs],
        "floor_bytes": None,
        "result_bytes": None,
        "contestants": {},
        "missing": {},
        "fastest_peer": None,
        "ratio": None,
        "ratios": [],
        "copy_level": None,
        "copy_share": None,
        "copies": None,
        "error": None,
    }
    try:
        _measure(result, row, device, dtype, seconds, compiled, bandwidth)
    except Exception as error:  # whatever is wrong with this row, the others can still be measured
        result["error"] = _one_line(error)
    return result


def _measure(
    result: dict[str, Any],
    row: Row,
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    compiled: bool,
    bandwidth: Mapping[str, float],
) -> None:
    keep_freed_memory(largest=row.check_first is None)
    case = Case(row, device, dtype)
    case.check()
    steps = {name: case.step(case.function(name)) for name in contestants(device, compiled)}
    figures = time_and_memory(steps, device, seconds, result["missing"])
    peer, fused = _fastest_peer(figures), figures[FUSED]
    ratio = figures[peer]["seconds"] / fused["seconds"]
    level = copy_level(case.floor_bytes, bandwidth)
    result.update(
        floor_bytes=case.floor_bytes,
        result_bytes=case.result_bytes,
        contestants=figures,
        fastest_peer=peer,
        ratio=ratio,
        ratios=[ratio],
        copy_level=level,
        copy_share=case.floor_bytes / (fused["device_seconds"] or fused["seconds"]) / bandwidth[level],
    )
    if row.copied and device.type == "cpu":
        result["copies"] = copies(steps[FUSED], case.first_inputs[0])
        case.outgrow(_MEMORY_COPY["cpu"])
        result["copies"]["memory"] = copies_from_memory(case.step(row.fused), case.first_inputs)


def _fastest_peer(figures: Mapping[str, Any]) -> str:
    return min((name for name in figures if name != FUSED), key=lambda name: figures[name]["seconds"])


def once_is_enough(figures: dict[str, Any]) -> bool:
    """Of a row with an error, or whose steps take seconds: there its time has gone into one pass."""
    return figures["error"] is not None or any(c["seconds"] > _LONG_STEP for c in figures["contestants"].values())


def merged(passes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row's figures out of those of its passes, which may have found the machine in other states: medians, and the
    ratio of each."""
    last = passes[-1]
    if len(passes) == 1 or last["error"] is not None:
        return last
    contestants: dict[str, Any] = {}
    for name in last["contestants"]:
        each = [of_pass["contestants"][name] for of_pass in passes if name in of_pass["contestants"]]
        contestants[name] = {
            "seconds": statistics.median(c["seconds"] for c in each),
            "quartiles": [statistics.median(c["quartiles"][i] for c in each) for i in range(2)],
            "rounds": sum(c["rounds"] for c in each),
            **{
                key: None if each[0][key] is None else statistics.median(c[key] for c in each)
                for key in ("host_seconds", "device_seconds")
            },
            "peak_bytes": max(c["peak_bytes"] for c in each),
        }
    peer = _fastest_peer(contestants)
    ratios = [
        of_pass["contestants"][peer]["seconds"] / of_pass["contestants"][FUSED]["seconds"]
        for of_pass in passes
        if peer in of_pass["contestants"]
    ]
    found = [of_pass["copies"] for of_pass in passes]
    return {
        **last,
        "contestants": contestants,
        "fastest_peer": peer,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "copy_share": statistics.median(of_pass["copy_share"] for of_pass in passes),
        "copies": found[0] and {key: statistics.median(c[key] for c in found) for key in found[0]},
    }


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# ---- the machine -----------------------------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    """The model, without vendor and memory size: "H100"; or the CPU's model name."""
    if device.type == "cuda":
        words = torch.cuda.get_device_name(device).replace("-", " ").split()
        return next((word for word in words if any(map(str.isdigit, word))), words[-1])
    try:
        with open("/proc/cpuinfo") as file:
            models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()
