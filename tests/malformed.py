"""Calls of the bare ops with one argument that does not fit: each has to raise. test_bare_ops.py runs it."""

import faulthandler
import sys
from collections.abc import Iterator
from typing import Any

import torch
from cases import CASES
from helpers import as_tuple, make, recorded_ops, value_and_gradients
from torch import Tensor

# arguments whose sizes nothing else determines: points of two sets, the number of samples, of classes, of columns
FREE_ROWS = {"mmd": {0, 1}}
FREE_COLUMNS = {"categorical_log_prob": {0}, "categorical_log_prob_backward": {1}, "categorical_kl_backward": {1},
                "bernoulli_kl_backward": {1}}  # fmt: skip
for samples in ("importance_weighted_generator_loss", "iwae_loss", "log_mean_exp", "log_variance_loss",
                "power_bound_loss", "tvo_loss"):  # fmt: skip
    FREE_ROWS[f"{samples}_backward"] = FREE_COLUMNS[f"{samples}_backward"] = {1}


def more(x: Tensor) -> Tensor:
    return torch.cat([x, x[:1]])


def misfits(name: str, place: int, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors that do not fit where `x` does."""
    yield "of another dtype", x.to(torch.int32 if x.is_floating_point() else torch.float32)
    if not x.dim():
        return
    if place not in FREE_ROWS.get(name, ()):
        yield "of one dimension more", x[None].expand(2, *x.shape)
        yield "of one row more", more(x)
        yield "empty", x[:0]
        if x.size(0) > 1:
            yield "of one row less", x[1:]
    if place not in FREE_COLUMNS.get(name, ()):
        yield "of another last size", torch.cat([x, x[..., :1]], -1)


def malformed(name: str, args: tuple[Any, ...]) -> Iterator[tuple[str, list[Any]]]:
    tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    sized = [i for i in tensors if args[i].dim()]
    for i in tensors:
        alone = sized == [i]
        for what, misfit in misfits(name, i, args[i]):
            if alone and what != "of another dtype":
                continue  # it is what the others would have to fit
            yield f"argument {i} {what}", [*args[:i], misfit, *args[i + 1 :]]
    for i, a in enumerate(args):
        if isinstance(a, list) and a and isinstance(a[0], Tensor):
            yield f"argument {i} empty", [*args[:i], [], *args[i + 1 :]]
            wrong = [a[0].to(torch.int32), *a[1:]]
            yield f"argument {i} of another dtype", [*args[:i], wrong, *args[i + 1 :]]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def main() -> None:
    faulthandler.enable()
    count, seen, passed = 0, set(), []
    for case in CASES:
        if case.composed:
            continue
        with recorded_ops() as calls:
            value_and_gradients(case, make(case, 3, 4, dtype=torch.float32, layout="contiguous"))
        for name, overload, args in calls:
            key = name, *(a for a in args if isinstance(a, str)), *(a is None for a in args)
            if key in seen:
                continue
            seen.add(key)
            plain = [a.detach() if isinstance(a, Tensor) else a for a in args]
            for what, wrong in malformed(name, tuple(plain)):
                print(name, what, file=sys.stderr, flush=True)
                count += 1
                try:
                    results = as_tuple(overload(*wrong))
                except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
                    continue
                if all(map(same_bits, results, as_tuple(overload(*plain)))):
                    continue  # an argument that the kernel does not read
                passed.append(f"{name}: {what}, in the case {case}")
    if passed:
        sys.exit("not refused:\n" + "\n".join(passed))
    print(f"{count} malformed calls, each refused")


if __name__ == "__main__":
    main()
