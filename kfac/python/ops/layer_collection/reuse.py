"""What `reuse` means: a new entry, or one more tower of an existing one."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kfac.python.ops import errors

tf1 = tf.compat.v1

# Value of `reuse` that stands for the ambient variable scope's own `reuse`.
VARIABLE_SCOPE = "VARIABLE_SCOPE"


def is_another_tower(reuse: Any, known: bool) -> bool:
    """Whether a registration adds a tower to an existing entry.

    Args:
      reuse: False or None (new entry), True (existing entry), `tf.AUTO_REUSE` (whatever
        is there), or `VARIABLE_SCOPE` (as the ambient v1 variable scope says; where
        there is none, that is False).
      known: whether the entry exists.

    Raises:
      ArgumentError: `reuse` is none of these.
    """
    if isinstance(reuse, str) and reuse == VARIABLE_SCOPE:
        # Eagerly created scopes carry a `reuse` of their own that nobody asked for.
        reuse = False if tf.executing_eagerly() else tf1.get_variable_scope().reuse
        if reuse is True and _in_replica():
            # The strategy sets it for all replicas but the first.
            reuse = tf1.AUTO_REUSE
    if reuse is tf1.AUTO_REUSE:
        return known
    if reuse is None or isinstance(reuse, (bool, np.bool_)):
        return bool(reuse)
    raise errors.ArgumentError(
        f"reuse={reuse!r} is not understood (a duplicate registration?); give True, "
        "False, tf.compat.v1.AUTO_REUSE or layer_collection.VARIABLE_SCOPE."
    )


def _in_replica() -> bool:
    return tf.distribute.has_strategy() and not (
        tf.distribute.in_cross_replica_context()
    )
