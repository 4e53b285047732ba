import keras
import numpy as np
import tensorflow as tf

from kfac.python.ops.rules import adam


def test_steps_are_those_of_the_keras_optimizer():
    rng = np.random.default_rng(0)
    start = rng.normal(size=[3, 2])
    variable = keras.Variable(start, dtype="float64")
    reference = keras.optimizers.Adam(0.1, epsilon=1e-8)
    mine = adam.Step(tf.constant(start), *(tf.zeros([3, 2], tf.float64),) * 2)
    for count in range(1, 5):
        gradient = tf.constant(rng.normal(size=[3, 2]))
        reference.apply([gradient], [variable])
        mine = adam.step(mine, gradient, count, 0.1)
    # Keras computes with 1 - 0.999 in float32, which is good to 5e-5.
    np.testing.assert_allclose(mine.value - start, variable.numpy() - start, rtol=1e-4)


def test_the_first_step_is_as_long_as_the_rate_whatever_the_gradient():
    gradient = tf.constant([1e-3, -20.0], tf.float64)
    zero = tf.zeros_like(gradient)
    moved = adam.step(adam.Step(zero, zero, zero), gradient, 1, 0.5).value
    np.testing.assert_allclose(moved, [-0.5, 0.5], rtol=1e-4)
