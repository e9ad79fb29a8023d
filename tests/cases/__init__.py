"""One table of cases, which every generic test goes through.

A `Case` is a public function with its options fixed, a description of its tensors, and an oracle: an independent
formula in float64, from `torch.distributions` or PyTorch's own losses where they have one. A new op is a new row in the
table of its family.
"""

from cases import adversarial, categorical, divergence, importance, likelihood, objectives, pairwise
from cases.base import Case

CASES: list[Case] = [
    *importance.CASES,
    *adversarial.CASES,
    *divergence.CASES,
    *likelihood.CASES,
    *categorical.CASES,
    *pairwise.CASES,
    *objectives.CASES,
]
