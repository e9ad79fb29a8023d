"""The ops in closed form: what runs on a CPU for which no kernels are loaded.

The closed form of an op are the functions `name`, `name_backward` and `name_recorded` in the module of its family, as
`ClosedForm` has them. They are eager PyTorch in the dtype of their inputs, in fewer passes than the reference takes:
where a result is no number they return None, and the reference, which knows every exception, serves. On other devices
to ask would mean to wait.
"""

from collections.abc import Iterable

from unigen_fast._fused import ClosedForm, FusedOp
from unigen_fast.closed_forms import (
    adversarial,
    categorical,
    divergence,
    importance,
    likelihood,
    objectives,
    pairwise,
)

_FAMILIES = (importance, adversarial, divergence, likelihood, categorical, pairwise, objectives)


def attach(ops: Iterable[FusedOp]) -> None:
    """Gives each op its closed form, if there is one."""
    for op in ops:
        for family in _FAMILIES:
            found = [getattr(family, op.name + suffix, None) for suffix in ("", "_backward", "_recorded")]
            if any(found):
                op.closed = ClosedForm(*found)
