"""A user's `tf.function` may leave AutoGraph on."""

import pathlib
import sys

import tensorflow as tf

import kfac
from kfac.python.ops import fisher_blocks


def test_autograph_does_not_convert_the_library():
    callers = []

    def func():
        callers.append(sys._getframe(1).f_code.co_filename)
        return 0.5

    packaged = fisher_blocks.PackagedFunc(func, "id")
    tf.function(lambda: tf.constant(packaged()), autograph=True)()
    # A converted caller would live in a generated file.
    assert [pathlib.Path(name).parts[-2:] for name in callers] == [
        ("fisher_blocks", "damping.py")
    ]


def test_training_step_works_with_autograph_on():
    w = tf.Variable(tf.ones([4, 2]), name="autograph/w")
    store = kfac.state.VariableStore()

    @tf.function
    def step(x):
        with store.as_default():
            outputs = tf.matmul(x, w)
            layers = kfac.LayerCollection()
            layers.register_fully_connected(w, x, outputs)
            layers.register_squared_error_loss(outputs)
            optimizer = kfac.PeriodicInvCovUpdateKfacOpt(
                learning_rate=0.1, damping=0.1, layer_collection=layers, var_list=[w]
            )
            optimizer.minimize(tf.reduce_mean(outputs**2))
            return optimizer.counter

    assert [int(step(tf.ones([8, 4]))) for _ in range(2)] == [1, 2]
