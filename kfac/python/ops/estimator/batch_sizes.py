"""Checks that all factors see as many cases as they should."""

from __future__ import annotations

import contextlib
import numbers
from typing import Any

import tensorflow as tf

from kfac.python.ops import utils
from kfac.python.ops.rules import scalars

tf1 = tf.compat.v1


def checked_argument(batch_size: Any) -> Any:
    """The argument `batch_size`: an int wherever it is a whole number.

    Raises:
      ValueError: something that cannot count cases.
    """
    size = scalars.whole(batch_size)
    if isinstance(size, numbers.Real):
        is_count = isinstance(size, int) and size >= 1
    else:
        shape = tf.TensorShape(getattr(size, "shape", [None]))
        is_count = size is None or shape.rank in (0, None)
    if not is_count:
        raise ValueError(
            f"batch_size counts the cases per replica; it is {batch_size!r}. Give a "
            "positive integer, or a scalar integer tensor."
        )
    return size


@contextlib.contextmanager
def checked(factor: Any, expected: Any, source: str):
    """Ops built inside run after `factor` was found to have `expected` cases.

    Args:
      factor: the factor whose statistics are about to be updated.
      expected: int or scalar integer tensor.
      source: where the expected value comes from, for messages.

    Raises:
      ValueError: static sizes differ, between factor and expectation or inside the
        factor.
    """
    found = factor.batch_size()
    message = (
        f"Factor {factor.name!r} of class {utils.cls_name(factor)} has statistics from "
        f"{_shown(found)} cases, but {_shown(expected)} are expected: {source}. "
        "Probably a tensor was registered with a wrong size, or batch_size, num_uses "
        "or num_timesteps is wrong."
    )
    static = isinstance(found, int) and isinstance(expected, int)
    if static and found != expected:
        raise ValueError(message)
    checks = [factor.check_partial_batch_sizes()]
    if not static:
        checks.append(
            tf1.assert_equal(
                tf.cast(found, tf.int32), tf.cast(expected, tf.int32), message=message
            )
        )
    with tf.control_dependencies(checks):
        yield


def _shown(size: Any) -> Any:
    """A size in a message: what is not known yet shows up when the check fails."""
    return size if isinstance(size, int) else "a dynamic number of"
