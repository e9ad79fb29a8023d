"""Loads `unigen_fast/_private.py` with one of torch's private names taken away, and runs what relies on it.

A process for each. The name is back for the rest of the package: torch itself needs it.
"""

import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ["UNIGEN_FAST_DISABLE"] = sys.argv[1]

import torch
from torch.autograd import forward_ad

PRIVATE = Path(__file__).parents[1] / "unigen_fast" / "_private.py"
NAMES: list[tuple[Any, ...]] = [
    (torch._C, "_AutoDispatchBelowAutograd"),
    (torch._C, "_are_functorch_transforms_active"),
    (torch._C._autograd, "_get_current_graph_task_keep_graph"),
    (torch._C._autograd, "_top_saved_tensors_default_hooks"),
    (torch._C, "DispatchKeySet"),
    (torch._C, "DispatchKey"),
    (torch._C, "_ForceDispatchKeyGuard"),
    (torch._C, "_dispatch_tls_local_include_set"),
    (torch._C, "_dispatch_tls_local_exclude_set"),
    (forward_ad, "_current_level"),
]


def check() -> None:
    import unigen_fast as uf
    from unigen_fast import _private

    assert _private is sys.modules["unigen_fast._private"]
    torch.manual_seed(0)
    mean, logvar, x = (torch.randn(5, 4, dtype=torch.float64) for _ in range(3))
    leaves = [t.clone().requires_grad_() for t in (mean, logvar)]

    def loss(m: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return uf.gaussian_kl(m, v) + uf.elbo_loss(x, x.sigmoid(), m, v).loss

    def plain(m: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        kl = 0.5 * (v.exp() - 1 - v + m.square()).sum(-1)
        return 2 * kl.mean() - (x.sigmoid() * x - torch.nn.functional.softplus(x)).sum(-1).mean()

    def same(got: Any, expected: Any) -> None:
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)

    value, right = loss(*leaves), plain(*leaves)
    same([value], [right])
    gradients = torch.autograd.grad(right, leaves, create_graph=True)
    same(torch.autograd.grad(value, leaves, retain_graph=True), gradients)
    same(torch.autograd.grad(value, leaves), gradients)
    seconds = torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)
    found = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    same(torch.autograd.grad(sum(g.square().sum() for g in found), leaves), seconds)
    plain_gradients = [g.detach() for g in gradients]
    # with hooks that keep what is saved
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or len(kept) - 1, lambda i: kept[i]):
        hooked = loss(*leaves)
    copies = [k.clone() for k in kept]
    same(torch.autograd.grad(3 * hooked, leaves), [3 * g for g in plain_gradients])
    same(kept, copies)
    # torch.func
    same(torch.func.grad(loss, argnums=(0, 1))(mean, logvar), plain_gradients)
    rows = torch.vmap(lambda m, v: uf.gaussian_kl(m, v))(mean, logvar)
    same([rows], [uf.gaussian_kl(mean, logvar, reduction="none")])
    # forward mode
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.ones_like(t)) for t in (mean, logvar)]
        tangent = forward_ad.unpack_dual(loss(*duals)).tangent
    same([tangent], [sum(g.sum() for g in plain_gradients)])
    # the bare op, whose kernel may be the reference
    bare = torch.ops.unigen_fast.log_mean_exp(leaves[0], 1)[0]
    same(torch.autograd.grad(bare.sum(), leaves[:1]), [torch.softmax(mean, 1)])


def main() -> None:
    warnings.simplefilter("ignore")
    for names in ([name] for name in NAMES):
        run(names)
    run(NAMES)


def run(names: list[tuple[Any, ...]]) -> None:
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(", ".join(name for _, name in names), "exit", status, flush=True)
        if status:
            sys.exit(1)
        return
    code = 1
    try:
        taken = [(owner, name, getattr(owner, name)) for owner, name in names]
        for owner, name, _ in taken:
            delattr(owner, name)
        spec = importlib.util.spec_from_file_location("unigen_fast._private", PRIVATE)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # which the package finds there
        spec.loader.exec_module(module)
        for owner, name, value in taken:
            setattr(owner, name, value)
        check()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
