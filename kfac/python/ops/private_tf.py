"""Every use of TensorFlow internals, each with the reason why it is needed.

Nothing else in the package may touch a private name of TensorFlow or Keras.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def control_flow_context(graph: tf.Graph) -> Any:
    """The v1 control-flow context (a branch of a v1 `tf.cond`) being built, or None.

    Reason: a tensor made in one branch of a v1 conditional must not be cached for
    use in another, and TensorFlow has no public way to tell the branches apart.
    (Branches of v2 conditionals are graphs of their own.)
    """
    return graph._get_control_flow_context()
