"""Cases of log-likelihoods."""

import unigen_fast as uf
from cases.base import Case, Spec, bce, block

CASES = [
    Case(
        "bernoulli_log_prob",
        lambda x, y: uf.bernoulli_log_prob(x, y),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((rows, n), "binary", differentiable=False)],
        bce,
    ),
    Case(
        "bernoulli_log_prob[soft]",
        lambda x, y: uf.bernoulli_log_prob(x, y),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((rows, n), "unit")],
        bce,
        every_size=False,
    ),
    Case(
        "bernoulli_log_prob[x.unsqueeze(1)]",
        lambda x, y: uf.bernoulli_log_prob(x, y.unsqueeze(1)),
        lambda rows, n: [Spec((rows, 3, n), "logits"), Spec((rows, n), "unit", differentiable=False)],
        lambda x, y: bce(x, y.unsqueeze(1)),
    ),
    Case(
        "bernoulli_log_prob[broadcast x with gradient]",
        lambda x, y: uf.bernoulli_log_prob(x, y),
        lambda rows, n: [Spec((2, rows, n), "logits"), Spec((n,), "unit")],
        bce,
        every_size=False,
        broadcast=True,
    ),
    Case(
        "bernoulli_log_prob[4-D]",
        lambda x, y: uf.bernoulli_log_prob(x, y, event_ndims=3),
        lambda rows, n: [Spec(block(rows, n), "logits"), Spec(block(rows, n), "binary", differentiable=False)],
        lambda x, y: bce(x, y, 3),
        every_size=False,
    ),
    Case(
        "bernoulli_log_prob[elementwise]",
        lambda x, y: uf.bernoulli_log_prob(x, y, event_ndims=0),
        lambda rows, n: [Spec((rows, n), "logits"), Spec((rows, n), "unit")],
        lambda x, y: bce(x, y, 0),
        every_size=False,
    ),
]
