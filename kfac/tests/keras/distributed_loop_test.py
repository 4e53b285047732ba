"""`DistributedLoop` in one process, mostly with plain gradient descent.

`distributed_training_test` runs it on replicas and in several processes.
"""

import threading
import time
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from kfac.python.keras.distributed import loop as distributed_loop
from kfac.python.keras.distributed import strategies
from kfac.python.keras.distributed.loop import DistributedLoop, PeerLostError
from kfac.python.keras.optimizers import Kfac

FEATURES = 3
NONE = tf.distribute.get_strategy()


class Descent(tf.Module):
    """Fits outputs to zero; has what `DistributedLoop` wants of an optimizer."""

    def __init__(self, slots=1):
        super().__init__()
        self.iterations = tf.Variable(0, dtype=tf.int64)
        self.seen = tf.Variable(0.0)  # Sum of all first features.
        self.slots = slots

    def build_for(self, model):
        self.model = model
        self.state = [tf.Variable(0.0) for _ in range(self.slots)]

    def step(self, x, y, sample_weight=None):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self.model(x) - y) ** 2)
        (weights,) = self.model.trainable_variables
        weights.assign_sub(0.1 * tape.gradient(loss, weights))
        self.iterations.assign_add(1)
        self.seen.assign_add(tf.reduce_sum(x[:, 0]))
        return {"loss": loss, "rate": 0.1}


def dense(units=2):
    model = keras.Sequential(
        [keras.Input((FEATURES,)), keras.layers.Dense(units, use_bias=False)]
    )
    model.trainable_variables[0].assign(np.ones([FEATURES, units]))
    return model


def dataset(batches=100, units=2):
    """Batches of two cases; the first feature counts the batches from 1."""
    x = np.ones([2 * batches, FEATURES], np.float32)
    x[:, 0] = np.repeat(np.arange(1, batches + 1), 2)
    y = np.zeros([2 * batches, units], np.float32)
    return tf.data.Dataset.from_tensor_slices((x / 100, y)).batch(2)


def make(directory=None, units=2, slots=1, **options):
    return DistributedLoop(NONE, dense(units), Descent(slots), directory, **options)


def quiet(*unused):
    pass


# ---------------------------------------------------------------- training


def test_a_line_is_printed_now_and_then_and_at_the_end(capsys):
    scalars = make().run(dataset(), 25, report_every=10)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["step", str(step), "loss"] for step in (10, 20, 25)
    ]
    assert "rate 0.1" in lines[-1]
    assert f"loss {scalars['loss']:.4g}" in lines[-1]


def test_evaluations_are_due_every_so_often_and_at_the_end():
    seen, reported = [], []
    training = make()

    def evaluate():
        seen.append(int(training.step.numpy()))
        return {"score": float(seen[-1])}

    scalars = training.run(
        dataset(),
        7,
        evaluate=evaluate,
        evaluate_every=3,
        report=lambda step, found: reported.append((step, found.get("score"))),
        report_every=5,
    )
    assert seen == [3, 6, 7]
    # A score is told once, at its step.
    assert reported == [(3, 3.0), (5, None), (6, 6.0), (7, 7.0)]
    assert scalars["score"] == 7.0


def test_one_trace_serves_all_batches():
    training = make()
    count = []
    step = training._optimizer.step
    training._optimizer.step = lambda *batch: count.append(1) or step(*batch)
    whole = dataset(5)
    training.run(whole.concatenate(whole.unbatch().batch(3)), 8, report=quiet)
    assert len(count) == 1


def test_the_last_checkpoints_are_kept(tmp_path):
    make(tmp_path, keep=2).run(dataset(), 8, checkpoint_every=3, report=quiet)
    names = {path.name.split(".")[0] for path in tmp_path.iterdir()}
    assert names == {"checkpoint", "ckpt-6", "ckpt-8"}


@pytest.mark.parametrize("as_function", (False, True))
def test_training_goes_on_from_a_checkpoint_with_the_batches_to_come(
    tmp_path, as_function
):
    asked = []

    def batches(step):
        asked.append(step)
        return dataset().skip(step)

    data = batches if as_function else dataset()
    whole = make()
    whole.run(data, 9, report=quiet)
    make(tmp_path).run(data, 4, report=quiet)
    second = make(tmp_path)
    assert int(second.step.numpy()) == 4
    second.run(data, 9, report=quiet)
    assert int(second.step.numpy()) == int(second._optimizer.iterations.numpy()) == 9
    np.testing.assert_array_equal(
        second._model.get_weights()[0], whole._model.get_weights()[0]
    )
    assert second._optimizer.seen.numpy() == whole._optimizer.seen.numpy()
    assert asked == [0, 0, 4] * as_function


def test_where_nothing_is_left_to_do_there_is_an_evaluation(tmp_path):
    make(tmp_path).run(dataset(), 4, report=quiet)
    again, reported = make(tmp_path), []
    before = again._model.get_weights()[0]
    scalars = again.run(
        dataset(),
        4,
        evaluate=lambda: {"score": 1.0},
        report=lambda *args: reported.append(args),
    )
    assert scalars == {"score": 1.0} and reported == [(4, scalars)]
    np.testing.assert_array_equal(again._model.get_weights()[0], before)


def test_hyper_parameters_come_from_the_checkpoint_unless_assigned(tmp_path):
    def kfac_loop(learning_rate):
        model = dense()
        optimizer = Kfac(
            learning_rate=learning_rate, damping=0.5, model=model, loss="mse"
        )
        return DistributedLoop(NONE, model, optimizer, tmp_path), optimizer

    training, _ = kfac_loop(0.25)
    training.run(dataset(), 2, report=quiet)
    training, optimizer = kfac_loop(0.125)
    assert float(optimizer.learning_rate) == 0.25
    optimizer.learning_rate = 0.0
    before = training._model.get_weights()[0]
    training.run(dataset(), 3, report=quiet)
    # Momentum moves on: its steps are of the rate that is now.
    np.testing.assert_array_equal(training._model.get_weights()[0], before)


# ---------------------------------------------------------------- evaluation


def test_evaluation_gives_means_over_cases():
    training = make()
    values = tf.data.Dataset.from_tensor_slices(
        (np.ones([5, FEATURES], np.float32), np.float32([1, 2, 3, 4, 5]))
    ).batch(4)
    found = training.evaluate(
        values, {"target": lambda y, out: y, "output": lambda y, out: out[:, 0]}
    )
    assert found == pytest.approx({"target": 3.0, "output": 3.0})
    assert training.evaluate(values, {"half": lambda y, out: y / 2}) == {"half": 1.5}


def test_what_cannot_be_evaluated_is_said():
    training = make()
    with pytest.raises(ValueError, match="empty"):
        training.evaluate(dataset().take(0), {"y": lambda y, out: y})
    mean = keras.losses.MeanSquaredError()
    with pytest.raises(ValueError, match="'error' is one number.*reduction='none'"):
        training.evaluate(dataset(), {"error": mean})


# ---------------------------------------------------------------- errors


def test_data_that_end_are_told_with_the_step():
    with pytest.raises(ValueError, match="ended after step 3 of 10; repeat"):
        make().run(dataset(3), 10, report=quiet)


def not_built():
    return DistributedLoop(NONE, keras.Sequential([keras.layers.Dense(1)]), Descent())


@pytest.mark.parametrize(
    "build, message",
    [
        (not_built, "built model.*Input"),
        (
            lambda: DistributedLoop(NONE, dense(), keras.optimizers.SGD()),
            "step.*such as Kfac; got SGD",
        ),
        (lambda: make(patience=0.0), "patience is 0.0"),
    ],
)
def test_what_cannot_be_trained_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_model_and_optimizer_must_be_of_the_strategy():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with pytest.raises(ValueError, match="model was not made.*strategy.scope"):
        DistributedLoop(strategy, dense(), Descent())
    with strategy.scope():
        model = dense()
    with pytest.raises(ValueError, match="optimizer was not made.*strategy.scope"):
        DistributedLoop(strategy, model, Descent())
    with strategy.scope():
        optimizer = Descent()
    DistributedLoop(strategy, model, optimizer)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dataset": np.ones([4, FEATURES])}, "got ndarray.*from_tensor_slices"),
        ({"report_every": 0}, "None, None, 0; expected at least 1"),
        ({"evaluate_every": -1}, "None, -1, 10"),
        ({"checkpoint_every": 5}, "checkpoint_every=5.*without a directory"),
    ],
)
def test_nonsense_is_refused_before_training(arguments, message):
    training = make()
    with pytest.raises(ValueError, match=message):
        training.run(**{"dataset": dataset(), "steps": 3, **arguments})
    assert int(training.step.numpy()) == 0


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="'.*file' is a file"):
        make(tmp_path / "file")


@pytest.mark.parametrize(
    "other", ({"units": 3}, {"slots": 2}), ids=("model", "optimizer")
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, other):
    make(tmp_path).run(dataset(), 2, report=quiet)
    with pytest.raises(ValueError, match="ckpt-2' does not fit.*another directory"):
        make(tmp_path, **other)


def test_a_damaged_checkpoint_is_told(tmp_path):
    make(tmp_path).run(dataset(), 2, report=quiet)
    (tmp_path / "ckpt-2.index").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="ckpt-2' does not fit"):
        make(tmp_path)


def failing(training, error, monkeypatch):
    """Lets the third step fail as a collective does."""
    train = training._train

    def fail(batches):
        if int(training.step.numpy()) == 2:
            raise error
        return train(batches)

    monkeypatch.setattr(training, "_train", fail)
    return training


LOST = tf.errors.UnavailableError(None, None, "Collective ops is aborted: peer gone")


def test_an_error_of_one_process_is_raised_as_it_is(monkeypatch):
    with pytest.raises(tf.errors.UnavailableError):
        failing(make(), LOST, monkeypatch).run(dataset(), 5, report=quiet)


@pytest.mark.parametrize("directory", (False, True))
def test_a_lost_peer_is_told_with_what_to_do(monkeypatch, tmp_path, directory):
    training = make(tmp_path if directory else None)
    monkeypatch.setattr(strategies, "is_multi_worker", lambda strategy: True)
    resolver = types.SimpleNamespace(task_type="worker", task_id=1)
    monkeypatch.setattr(
        training, "_strategy", types.SimpleNamespace(cluster_resolver=resolver)
    )
    data = dataset()
    monkeypatch.setattr(training, "_batches", lambda *unused: iter(data))
    values = {"loss": tf.constant(1.0)}
    monkeypatch.setattr(training, "_train", lambda batches: values)
    failing(training, LOST, monkeypatch)
    with pytest.raises(PeerLostError) as caught:
        training.run(data, 5, checkpoint_every=1 if directory else None, report=quiet)
    told = str(caught.value)
    assert told.startswith("worker 1, after step 2: another worker died, hung")
    assert "Collective ops is aborted: peer gone" in told
    assert ("ckpt-2" in told) == directory
    assert ("no directory" in told) != directory


# ---------------------------------------------------------------- the watchdog


@pytest.fixture
def exits(monkeypatch):
    """Exit codes, instead of an end of this process."""
    codes = []

    def leave(code):
        codes.append(code)
        raise SystemExit  # Ends the thread.

    monkeypatch.setattr(distributed_loop.os, "_exit", leave)
    return codes


# The watchdog's thread, by `leave`.
ENDED = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)


def wait_until(happens, patience=20.0):
    deadline = time.monotonic() + patience
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.01)
    return happens()


@ENDED
def test_a_process_that_hangs_is_ended_with_a_message(exits, capsys):
    with distributed_loop._Watchdog(0.05, lambda: "worker 1, after step 7") as dog:
        assert wait_until(lambda: exits)
        dog._thread.join()
    assert exits == [75]
    told = capsys.readouterr().err
    assert told.startswith("worker 1, after step 7: no step was completed for 0 sec")
    assert "start all workers again" in told


def test_a_process_that_goes_on_is_left_alone(exits):
    with distributed_loop._Watchdog(5.0, lambda: "") as dog:
        for _ in range(30):
            dog.pat()
            time.sleep(0.01)
    assert not exits and not dog._thread.is_alive()


def test_the_watchdog_is_off_after_training():
    before = threading.active_count()
    make().run(dataset(), 1, report=quiet)
    assert threading.active_count() == before


@ENDED
def test_the_loop_watches_its_steps(exits, monkeypatch):
    training = make()
    training.run(dataset(), 1, report=quiet)
    train = training._train

    def hang(batches):
        assert wait_until(lambda: exits)
        return train(batches)

    monkeypatch.setattr(training, "_train", hang)
    monkeypatch.setattr(training, "_patience", 0.1)
    training.run(dataset(), 2, report=quiet)
    assert exits == [75]
