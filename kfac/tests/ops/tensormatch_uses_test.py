"""How many uses rows hold, and in which order."""

import pytest
import tensorflow as tf

from kfac.python.ops.tensormatch import uses
from kfac.python.ops.tensormatch.uses import Uses

tf1 = tf.compat.v1


@pytest.fixture(autouse=True)
def graph_fixture():
    with tf.Graph().as_default():
        yield


def dense_uses(tensor, batch_size=None, features=4):
    return uses.uses_of_rows(tensor, features, 2, batch_size)


def data(*shape, dtype=tf.float32):
    return tf1.placeholder(dtype, shape)


@pytest.mark.parametrize(
    ("shape", "batch_size", "expected"),
    [
        ([None, 5, 4], None, Uses(5, True)),  # Only the batch is unknown.
        ([7, None, 4], None, Uses(7, False)),
        ([7, 5, 4], 7, Uses(5, True)),  # The batch size tells.
        ([7, 5, 4], 5, Uses(7, False)),
        ([7, 5, 4], None, Uses(7, False)),  # The order of registrations.
        ([7, 5, 4], 3, Uses(7, False)),
        ([5, 5, 4], 5, Uses(5, False)),
        ([None, 5, 4], 7, Uses(5, True)),
        ([None, 5, 4], 5, Uses(5, True)),
    ],
)
def test_sequences(shape, batch_size, expected):
    assert dense_uses(data(*shape), batch_size) == expected


@pytest.mark.parametrize(
    ("shape", "batch_size", "expected"),
    [
        ([None, 5, 4], None, Uses(5, True)),
        ([None, 5, 6, 4], None, Uses(30, True)),
        ([7, None, 4], None, Uses(7, False)),
        ([7, 5, 4], 7, Uses(5, True)),
        ([7, 5, 4], 5, Uses(7, False)),
        ([7, 5, 4], None, Uses(1, False)),  # As if it had never had other axes.
        ([None, 1, 4], None, Uses(1, True)),
    ],
)
def test_sequences_that_were_reshaped_to_rows(shape, batch_size, expected):
    assert dense_uses(tf.reshape(data(*shape), [-1, 4]), batch_size) == expected


def test_rows_of_unknown_shape_are_known_by_what_was_reshaped():
    x = data(None, 5, 4)
    rows = tf.reshape(x, data(2, dtype=tf.int32))
    assert rows.shape.as_list() == [None, None]
    assert dense_uses(tf.identity(rows)) == Uses(5, True)


def test_flattening_features_makes_no_uses():
    assert dense_uses(tf.reshape(data(None, 5, 4), [-1, 20]), features=20).count == 1
    assert dense_uses(data(None, 20), features=20) == Uses(1, False)


@pytest.mark.parametrize("shape", [[None, None, 4], [None, 5, None, 4]])
def test_an_unknown_number_of_uses_is_an_error_that_says_what_to_do(shape):
    rows = tf.reshape(data(*shape), [-1, 4])
    with pytest.raises(ValueError, match="static length"):
        dense_uses(rows)


def test_an_unknown_length_is_no_obstacle_if_all_rows_are_known():
    rows = tf.ensure_shape(tf.reshape(data(None, None, 4), [-1, 4]), [35, 4])
    assert dense_uses(rows, batch_size=7).count == 5


def test_ids():
    def id_uses(tensor, batch_size=None):
        return uses.uses_of_rows(tensor, None, 1, batch_size)

    assert id_uses(data(None, dtype=tf.int32)) == Uses(1, False)
    assert id_uses(data(None, 5, dtype=tf.int32)) == Uses(5, True)
    assert id_uses(data(7, 5, dtype=tf.int32), 5) == Uses(7, False)
    assert id_uses(data(35, dtype=tf.int32), 5) == Uses(7, False)
    folded = tf.reshape(data(None, 5, dtype=tf.int32), [-1])
    assert id_uses(folded) == Uses(5, True)


def test_the_batch_in_the_middle_is_an_error():
    with pytest.raises(ValueError, match="cases and uses"):
        dense_uses(tf.reshape(data(3, None, 5, 4), [-1, 4]))


def test_images():
    assert uses.uses_of_images(data(15, 2, 2, 1), 5).count == 3
    assert uses.uses_of_images(data(None, 2, 2, 1), 5).count == 1
    assert uses.uses_of_images(data(15, 2, 2, 1), None).count == 1


def test_the_batch_size_may_be_a_tensor():
    x = data(35, 4)
    assert dense_uses(x, tf.constant(7)).count == 5
    unknown = tf1.placeholder(tf.int32, [])
    assert dense_uses(x, unknown).count == 1
    assert uses.uses_of_images(data(15, 2, 2, 1), unknown).count == 1
    assert dense_uses(data(None, 5, 4), unknown) == Uses(5, True)
