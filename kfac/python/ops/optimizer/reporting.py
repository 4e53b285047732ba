"""What `KfacOptimizer` says about a step: metrics and printed logs."""

from __future__ import annotations

import tensorflow as tf

from kfac.python.ops import utils

_RULE = "=" * 40


class ReportingMixin:
    """Reads the scalar state after a step."""

    def step_metrics(self) -> dict[str, tf.Tensor]:
        """Scalars of the last step, consistent with each other.

        To be called after `minimize` or `apply_gradients`, whose op they wait for:
        fetching a metric runs the step.

        Returns:
          "loss" (of the mini-batch before the step, if it is known), "damping",
          "learning_rate", "momentum", "rho", "qmodel_change", "counter".  The last
          reduction ratio and predicted change are NaN until they were first computed.

        Raises:
          ValueError: no step was built yet.
        """
        if self._last_train_op is None:
            raise ValueError(
                "step_metrics() describes a step; call minimize or apply_gradients "
                "first."
            )
        with tf.control_dependencies([self._last_train_op]):
            metrics = {
                "damping": self.damping,
                "learning_rate": self.learning_rate,
                "momentum": self.momentum,
                "rho": self.rho,
                "qmodel_change": self.qmodel_change,
                "counter": self.counter,
            }
            if self._loss_tensor is not None:
                metrics["loss"] = tf.identity(self._loss_tensor)
            return {name: tf.identity(value) for name, value in metrics.items()}

    def _maybe_print_logging_info(self) -> tf.Operation:
        """Prints a block about the step if `print_logs`, before it is counted."""
        if not self._print_logs:
            return tf.no_op()
        loss = "not given" if self._loss_tensor is None else self._loss_tensor
        return tf.group(
            utils.multiline_print(
                [
                    (_RULE,),
                    ("Iteration", self.counter),
                    ("mini-batch loss =", loss),
                    (
                        "learning_rate =",
                        self.learning_rate,
                        "| momentum =",
                        self.momentum,
                    ),
                    ("damping =", self.damping),
                    ("rho =", self.rho, "| qmodel_change =", self.qmodel_change),
                    (_RULE,),
                ]
            )
        )
