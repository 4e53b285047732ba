"""K-FAC whose curvature is updated by background threads of a session."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from kfac.python.ops import optimizer

tf1 = tf.compat.v1

_MAX_NUM_COV_INV_UPDATE_THREADS = 10


class AsyncInvCovUpdateKfacOpt(optimizer.KfacOptimizer):
    """`KfacOptimizer` that trains while threads refresh statistics and inverses.

        train_op = opt.minimize(loss)
        with tf.compat.v1.Session() as sess:
            sess.run(tf.compat.v1.global_variables_initializer())
            opt.run_cov_inv_ops(sess)
            for _ in range(num_steps):
                sess.run(train_op)
            opt.stop_cov_inv_ops(sess)

    Nothing orders the threads' work and the steps: a step uses the inverses as they
    are, zero (hence a zero step for dense factors) before the first ones.  The data
    must come from the graph, since the threads feed nothing.  A failed update stops
    the threads, is logged, and is raised by `stop_cov_inv_ops`.
    """

    def __init__(
        self,
        cov_devices: Sequence[str] | None,
        inv_devices: Sequence[str] | None,
        num_cov_inv_update_threads: int | None = None,
        **kwargs: Any,
    ):
        """Makes the optimizer.

        Args:
          cov_devices: devices for statistics, dealt out in turn; None places nothing.
          inv_devices: devices for inverses, likewise.
          num_cov_inv_update_threads: defaults to half the number of update ops, at
            least 1 and at most 10.
          **kwargs: of `KfacOptimizer`, without `placement_strategy`.

        Raises:
          TypeError: `placement_strategy` is given.
          ValueError: fewer than one thread; see also `KfacOptimizer`.
        """
        if num_cov_inv_update_threads is not None and num_cov_inv_update_threads < 1:
            raise ValueError(
                "num_cov_inv_update_threads must be at least 1, or None; it is "
                f"{num_cov_inv_update_threads!r}."
            )
        super().__init__(
            placement_strategy="round_robin",
            cov_devices=cov_devices,
            inv_devices=inv_devices,
            **kwargs,
        )
        self._num_cov_inv_update_threads = num_cov_inv_update_threads
        self._ops_by_name: dict[str, tf.Operation] | None = None
        self._coord: tf.train.Coordinator | None = None
        self._threads: list[threading.Thread] = []

    def apply_gradients(
        self,
        grads_and_vars: Iterable[tuple[Any, Any]],
        global_step: Any = None,
        name: str | None = None,
    ) -> tf.Operation:
        """Op that takes a step and leaves the curvature alone; once per optimizer.

        Raises:
          RuntimeError: called before, or inside a `tf.function`.
        """
        if not _in_v1_graph():
            raise RuntimeError(
                "AsyncInvCovUpdateKfacOpt runs threads of a tf.compat.v1.Session and "
                "cannot be used in a tf.function; use PeriodicInvCovUpdateKfacOpt."
            )
        if self._ops_by_name is not None:
            raise RuntimeError(
                "minimize/apply_gradients can be called once per "
                "AsyncInvCovUpdateKfacOpt; its update ops exist already."
            )
        cov_thunks, inv_thunks = self.make_vars_and_create_op_thunks()
        train_op = super().apply_gradients(
            grads_and_vars, global_step=global_step, name=name
        )
        self._cov_ops = [thunk() for thunk in cov_thunks]
        inv_ops = [thunk() for thunk in inv_thunks]
        self._ops_by_name = {op.name: op for op in self._cov_ops + inv_ops}
        names = tf.data.Dataset.from_tensor_slices(sorted(self._ops_by_name)).repeat()
        self._next_op_name = tf1.data.make_one_shot_iterator(names).get_next()
        return train_op

    def run_cov_inv_ops(self, sess: tf1.Session) -> None:
        """Starts the threads, after one update of all statistics by the caller.

        (An inverse of statistics that were never taken is meaningless.)

        Raises:
          RuntimeError: there is no train op yet, or the threads run already.
        """
        if self._ops_by_name is None:
            raise RuntimeError("Build the train op (minimize) before starting threads.")
        if any(thread.is_alive() for thread in self._threads):
            raise RuntimeError(
                "The update threads run already; stop_cov_inv_ops(sess) ends them."
            )
        sess.run(self._cov_ops)
        self._coord = tf.train.Coordinator()
        self._threads = [
            threading.Thread(
                target=_run_ops,
                args=(sess, self._coord, self._next_op_name, self._ops_by_name),
                name=f"{self.get_name()}_update_{i}",
                daemon=True,
            )
            for i in range(self._num_threads())
        ]
        for thread in self._threads:
            thread.start()

    def stop_cov_inv_ops(self, sess: tf1.Session) -> None:
        """Ends the threads, and waits for them.

        Raises:
          Exception: whatever a thread's update raised.
        """
        del sess  # The threads know theirs.
        if self._coord is None:
            return
        self._coord.request_stop()
        self._coord.join(self._threads)

    def _num_threads(self) -> int:
        if self._num_cov_inv_update_threads is not None:
            return self._num_cov_inv_update_threads
        half = len(self._ops_by_name) // 2
        return max(1, min(half, _MAX_NUM_COV_INV_UPDATE_THREADS))


def _run_ops(
    sess: tf1.Session,
    coord: tf.train.Coordinator,
    next_name: tf.Tensor,
    ops_by_name: dict[str, tf.Operation],
) -> None:
    """A thread: runs one op after the other until asked to stop.

    A session that is closed without a word ends it too; any other failure is the
    coordinator's to report.
    """
    while not coord.should_stop():
        try:
            name = sess.run(next_name).decode()
            sess.run(ops_by_name[name])
        except Exception as error:
            if not _means_closed(error):
                tf.get_logger().error("Curvature update failed: %s", error)
                coord.request_stop(error)
            return


def _means_closed(error: Exception) -> bool:
    """Whether `error` says no more than that the session was closed."""
    if isinstance(error, tf.errors.CancelledError):
        return True
    closed = ("closed Session", "should_stop requested")
    return isinstance(error, RuntimeError) and any(
        part in str(error) for part in closed
    )


def _in_v1_graph() -> bool:
    with tf.init_scope():
        return not tf.executing_eagerly()
