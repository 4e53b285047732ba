"""K-FAC as a `tf.compat.v1.train.Optimizer`.

One file for each concern of the step: `update_steps` (momentum, clipping),
`quadratic_model` (step size, predicted change), `damping` (its adaptation),
`scalar_state` (variables), `reporting`; `kfac_optimizer` puts them together.  The
formulas are pure functions in `kfac.python.ops.rules`.
"""

from __future__ import annotations

from kfac.python.ops import config
from kfac.python.ops.optimizer.kfac_optimizer import KfacOptimizer
from kfac.python.ops.rules.quadratic_model import evaluate as _eval_quadratic
from kfac.python.ops.rules.quadratic_model import evaluate_no_c as _eval_quadratic_no_c
from kfac.python.ops.rules.quadratic_model import two_by_two_solve as _two_by_two_solve
from kfac.python.ops.utils import ip, ip_p, sprod, sprod_p

__all__ = [
    "KfacOptimizer",
    "_eval_quadratic",
    "_eval_quadratic_no_c",
    "_two_by_two_solve",
    "ip",
    "ip_p",
    "set_global_constants",
    "sprod",
    "sprod_p",
]


def set_global_constants(include_damping_in_qmodel_change: bool | None = None) -> None:
    """Sets whether the damping term counts in `qmodel_change`; None changes nothing."""
    config.replace(include_damping_in_qmodel_change=include_damping_in_qmodel_change)


config.install_facade(
    __name__,
    {"_INCLUDE_DAMPING_IN_QMODEL_CHANGE": "include_damping_in_qmodel_change"},
)
