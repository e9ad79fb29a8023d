"""One line that puts our losses under the names of the library that one trains with.

    import unigen_fast as uf

    uf.integrations.apply_to_pythae()             # until uf.integrations.unpatch("pythae")
    with uf.integrations.patched("torchrl"):      # or for a while
        ...
    uf.integrations.calls()                       # how often each of ours ran

Each `apply_to_<library>` takes

    check_version: whether to leave a function as it is, with a warning, where its code is none of those that ours was
        compared with (whatever the version's number; layout, comments, docstrings and annotations do not count).
    correct: False: the library's own number to rounding, value and every gradient, mistakes included. True: what is
        known to be wrong in it is right; each docstring says what that changes.

and returns a `Patch`, with `unpatch()`, `is_patched()`, `calls()` and `skipped`, which names the functions left as they
are; a RuntimeError says that nothing could be patched. It is itself a context manager. Patched is the function in
its module or class, and wherever it has been imported to: other modules, tables, attributes of objects made before.
Arguments for which ours is not made (another backend's arrays, a custom function in place of a logarithm) go to the
library's own function, and are not counted. Under `torch.compile` a call counts once for each compilation. An
ImportError says that the library is missing. What the results are made of is checked against the library's functions,
value and all gradients, in tests/integrations.

`unigen_fast.integrations.lightning`, a module of its own since it imports Lightning, has the callback `LossStatistics`.
"""

from unigen_fast.integrations._patching import Patch, calls, is_patched, patched, unpatch
from unigen_fast.integrations.diffusers import apply_to_diffusers
from unigen_fast.integrations.mimicry import apply_to_mimicry
from unigen_fast.integrations.multivae import apply_to_multivae
from unigen_fast.integrations.pyro import apply_to_pyro
from unigen_fast.integrations.pythae import apply_to_pythae
from unigen_fast.integrations.scvi import apply_to_scvi
from unigen_fast.integrations.studiogan import apply_to_studiogan
from unigen_fast.integrations.taming import apply_to_taming
from unigen_fast.integrations.torch_distributions import apply_to_torch_distributions
from unigen_fast.integrations.torchgan import apply_to_torchgan
from unigen_fast.integrations.torchrl import apply_to_torchrl
from unigen_fast.integrations.vits import apply_to_vits

__all__ = [
    "Patch",
    "apply_to_diffusers",
    "apply_to_mimicry",
    "apply_to_multivae",
    "apply_to_pyro",
    "apply_to_pythae",
    "apply_to_scvi",
    "apply_to_studiogan",
    "apply_to_taming",
    "apply_to_torch_distributions",
    "apply_to_torchgan",
    "apply_to_torchrl",
    "apply_to_vits",
    "calls",
    "is_patched",
    "patched",
    "unpatch",
]
