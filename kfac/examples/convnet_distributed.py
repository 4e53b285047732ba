"""K-FAC whose work is shared among threads of one TensorFlow 1 session.

Two ways, both in a `tf.Graph`, in one process and without the network:

* `asynchronous`: the main thread takes steps with the inverses at hand, while threads
  of `kfac.AsyncInvCovUpdateKfacOpt` refresh statistics and inverses all the time.
* `chief_worker`: synchronous data parallelism. Workers compute gradients, each on
  batches of its own; meanwhile the chief updates the statistics on batches of its own
  and one inverse, the next one of a `kfac.op_queue.OpQueue`; then it takes the step.

Why no `tf.distribute.Server`: TensorFlow's server has no authentication and listens on
all network interfaces, whatever address the cluster names.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import tensorflow as tf

import kfac
from kfac.examples import classification, convnet_model, datasets, training

tf1 = tf.compat.v1

MakeModel = Callable[[], convnet_model.ConvNet]

# Seconds after which a run that hangs is given up.
PATIENCE = 60.0


class _Trainer:
    """Graph, session, model and data; the base of both ways."""

    def __init__(
        self,
        make_model: MakeModel,
        data: datasets.ImageData,
        settings: classification.KfacSettings,
        batch_size: int,
        eval_size: int,
        num_workers: int,
        device: str | None,
    ):
        self._data, self._settings = data, settings
        self._batch_size, self._eval_size = batch_size, eval_size
        self._num_workers = num_workers
        self.graph = tf.Graph()
        with self.graph.as_default(), tf.device(device):
            tf1.set_random_seed(settings.seed)
            self.model = make_model()
            self.variables = list(self.model.trainable_variables)
            self._make_scores()
            self.optimizer = self._make_training()
            self.session = tf1.Session(
                config=tf1.ConfigProto(
                    allow_soft_placement=True,
                    operation_timeout_in_ms=int(1000 * PATIENCE),
                )
            )
            self.session.run(tf1.global_variables_initializer())
            self.session.run(tf1.tables_initializer())  # The readers' iterators.

    def _make_training(self) -> kfac.KfacOptimizer:
        raise NotImplementedError

    def _batches(self, seed: int) -> tuple[tf.Tensor, tf.Tensor]:
        """The next batch of a reader of its own."""
        dataset = tf.data.Dataset.from_generator(
            lambda: classification.batches(self._data, self._batch_size, seed),
            output_signature=(classification.IMAGES, classification.LABELS),
        )
        iterator = tf1.data.make_initializable_iterator(dataset.prefetch(2))
        tf1.add_to_collection(tf1.GraphKeys.TABLE_INITIALIZERS, iterator.initializer)
        images, labels = iterator.get_next()
        return (
            tf.ensure_shape(images, [self._batch_size, 28, 28]),
            tf.ensure_shape(labels, [self._batch_size]),
        )

    def _loss(self, images: tf.Tensor, labels: tf.Tensor):
        """Mean loss, and what its registration takes."""
        logits, calls = self.model(images)
        loss = classification.mean_loss(
            self.model, logits, labels, self._settings.l2_reg
        )
        collection = classification.register(
            self.model, logits, calls, labels, self._settings
        )
        return loss, collection

    def _make_scores(self) -> None:
        self._images = tf1.placeholder(tf.float32, [None, 28, 28])
        self._labels = tf1.placeholder(tf.int32, [None])
        logits, _ = self.model(self._images)
        self._scores = (
            classification.mean_loss(self.model, logits, self._labels, l2_reg=0.0),
            classification.accuracy(logits, self._labels),
        )

    def evaluate(self) -> dict[str, float]:
        data, size = self._data, self._eval_size
        parts = ((data.x_train[:size], data.y_train[:size]), (data.x_test, data.y_test))
        return classification.measurements(
            *(
                self.session.run(self._scores, {self._images: x, self._labels: y})
                for x, y in parts
            )
        )

    def run(self) -> training.Run:
        return training.Run(self.step, self.evaluate, self.close)

    def start(self) -> None:
        """Starts the threads."""
        raise NotImplementedError

    def step(self) -> dict[str, float]:
        raise NotImplementedError

    def close(self) -> None:
        self.session.close()


class AsynchronousTrainer(_Trainer):
    """Steps in the main thread, curvature in threads that never wait for each other."""

    def _make_training(self) -> kfac.AsyncInvCovUpdateKfacOpt:
        loss, collection = self._loss(*self._batches(self._settings.seed))
        optimizer = kfac.AsyncInvCovUpdateKfacOpt(
            cov_devices=None,
            inv_devices=None,
            num_cov_inv_update_threads=self._num_workers,
            layer_collection=collection,
            var_list=self.variables,
            **self._settings.fixed(),
        )
        train_op = optimizer.minimize(loss)
        with tf.control_dependencies([train_op]):
            self._step = tf.identity(loss)
        return optimizer

    def start(self) -> None:
        """Starts the threads; the parameters stay until there are inverses."""
        self.optimizer.run_cov_inv_ops(self.session)

    def step(self) -> dict[str, float]:
        return {"loss": self.session.run(self._step)}

    def close(self) -> None:
        try:
            self.optimizer.stop_cov_inv_ops(self.session)
        finally:
            super().close()


class ChiefWorkerTrainer(_Trainer):
    """Workers push gradients into accumulators; the chief takes their mean.

    A worker starts a gradient when it gets a token, which the chief hands out after a
    step, so that all gradients of a step belong to the same parameters.
    """

    def _make_training(self) -> kfac.KfacOptimizer:
        self._tokens = tf1.FIFOQueue(-1, [tf.int64], [()])
        self._accumulators = [
            tf1.ConditionalAccumulator(variable.dtype, variable.shape)
            for variable in self.variables
        ]
        self._push_ops = [self._make_worker(i) for i in range(self._num_workers)]
        seed = self._settings.seed + self._num_workers
        self._loss_tensor, collection = self._loss(*self._batches(seed))
        optimizer = kfac.KfacOptimizer(
            layer_collection=collection,
            var_list=self.variables,
            **self._settings.fixed(),
        )
        cov_thunks, inv_thunks = optimizer.make_vars_and_create_op_thunks()
        self._cov_op = tf.group([thunk() for thunk in cov_thunks])
        self._inv_ops = [thunk() for thunk in inv_thunks]
        self._inv_queue = kfac.op_queue.OpQueue(self._inv_ops, self._settings.seed)
        gradients = [
            accumulator.take_grad(self._num_workers)
            for accumulator in self._accumulators
        ]
        step = tf1.train.get_or_create_global_step()
        train_op = optimizer.apply_gradients(
            list(zip(gradients, self.variables, strict=True)), global_step=step
        )
        with tf.control_dependencies([train_op]):
            self._train_op = self._hand_out_tokens(step.read_value())
        self._first_tokens = self._hand_out_tokens(tf.constant(0, tf.int64))
        self._close_tokens = self._tokens.close()
        self._coordinator = tf.train.Coordinator()
        self._threads: list[threading.Thread] = []
        return optimizer

    def _make_worker(self, index: int) -> tf.Operation:
        """Op that waits for a token and adds a gradient to the accumulators."""
        images, labels = self._batches(self._settings.seed + index)
        token = self._tokens.dequeue()
        with tf.control_dependencies([token]):  # Parameters are read after it.
            logits, _ = self.model(images)
            loss = classification.mean_loss(
                self.model, logits, labels, self._settings.l2_reg
            )
            gradients = tf.gradients(loss, self.variables)
        return tf.group(
            [
                accumulator.apply_grad(gradient, local_step=token)
                for accumulator, gradient in zip(
                    self._accumulators, gradients, strict=True
                )
            ]
        )

    def _hand_out_tokens(self, step: tf.Tensor) -> tf.Operation:
        return self._tokens.enqueue_many(tf.fill([self._num_workers], step))

    def start(self) -> None:
        """Takes the first statistics and inverses, then starts the workers."""
        self.session.run(self._cov_op)
        self.session.run(self._inv_ops)
        self._threads = [
            threading.Thread(target=self._work, args=(op,), daemon=True)
            for op in self._push_ops
        ]
        for thread in self._threads:
            thread.start()
        self.session.run(self._first_tokens)

    def _work(self, push_op: tf.Operation) -> None:
        with self._coordinator.stop_on_exception():
            while not self._coordinator.should_stop():
                self.session.run(push_op)

    def step(self) -> dict[str, float]:
        if self._coordinator.should_stop():
            self._coordinator.join(self._threads)  # Raises what a worker raised.
        # The workers compute gradients at the same time.
        loss, _ = self.session.run([self._loss_tensor, self._cov_op])
        self.session.run(self._inv_queue.next_op(self.session))
        self.session.run(self._train_op)
        return {"loss": loss}

    def close(self) -> None:
        try:
            self._coordinator.request_stop()
            # Workers that wait for a token get an OutOfRangeError, a clean end.
            self.session.run(self._close_tokens)
            self._coordinator.join(self._threads, stop_grace_period_secs=PATIENCE)
        finally:
            super().close()


def asynchronous(*args, **kwargs) -> training.Run:
    """A run of `AsynchronousTrainer`, started."""
    return _started(AsynchronousTrainer(*args, **kwargs))


def chief_worker(*args, **kwargs) -> training.Run:
    """A run of `ChiefWorkerTrainer`, started."""
    return _started(ChiefWorkerTrainer(*args, **kwargs))


def _started(trainer: _Trainer) -> training.Run:
    try:
        trainer.start()
    except Exception:
        trainer.close()
        raise
    return trainer.run()


MODES = {"async": asynchronous, "chief_worker": chief_worker}
