import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import utils

FEW = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
# Multiples of 1/8, so that sums and products are exact.
NUMBERS = st.integers(-1000, 1000).map(lambda n: n / 8)
SHAPES = st.lists(hnp.array_shapes(max_dims=3, max_side=3), min_size=1, max_size=3)


@st.composite
def two_vectors(draw):
    shapes = draw(SHAPES)
    return tuple(
        [draw(hnp.arrays(np.float64, shape, elements=NUMBERS)) for shape in shapes]
        for _ in range(2)
    )


def _flat(tensors):
    return np.concatenate([np.ravel(t) for t in tensors])


@FEW
@hypothesis.given(two_vectors(), NUMBERS)
def test_lists_of_tensors_obey_the_algebra_of_the_stacked_vector(vectors, scalar):
    a, b = vectors
    tensors = [tf.constant(x) for x in b]
    np.testing.assert_allclose(
        utils.ip(a, tensors), _flat(a) @ _flat(b), rtol=1e-12, atol=1e-9
    )
    np.testing.assert_allclose(_flat(utils.sum_(a, tensors)), _flat(a) + _flat(b))
    np.testing.assert_allclose(_flat(utils.sprod(scalar, tensors)), scalar * _flat(b))


@FEW
@hypothesis.given(two_vectors(), NUMBERS)
def test_pairs_obey_the_same_algebra_and_keep_their_variables(vectors, scalar):
    a, b = vectors
    variables = [object() for _ in a]
    pairs_a = list(zip(a, variables, strict=True))
    pairs_b = list(zip([tf.constant(x) for x in b], variables, strict=True))
    np.testing.assert_allclose(utils.ip_p(pairs_a, pairs_b), utils.ip(a, b))
    for result, expected in (
        (utils.sum_p(pairs_a, pairs_b), _flat(a) + _flat(b)),
        (utils.sprod_p(scalar, pairs_b), scalar * _flat(b)),
    ):
        assert isinstance(result, tuple)
        assert [variable for _, variable in result] == variables
        np.testing.assert_allclose(_flat([tensor for tensor, _ in result]), expected)


def test_results_are_tuples():
    assert isinstance(utils.sprod(2.0, [1.0]), tuple)
    assert isinstance(utils.sum_([1.0], [2.0]), tuple)


@pytest.mark.parametrize("combine", [utils.ip_p, utils.sum_p])
def test_pairs_about_other_variables_are_refused(combine):
    # Equal values: only identity may count.
    v, w, equal_to_v = (tf.Variable(1.0, name=name) for name in "vwv")
    left = [(1.0, v), (2.0, w)]
    combine(left, [(3.0, v), (4.0, w)])
    for right in ([(3.0, w), (4.0, v)], [(3.0, equal_to_v), (4.0, w)]):
        with pytest.raises(ValueError, match="same variables"):
            combine(left, right)


@pytest.mark.parametrize("combine", [utils.ip, utils.sum_])
def test_lists_of_unequal_length_are_refused(combine):
    with pytest.raises(ValueError, match="equal length.*1 and 2"):
        combine([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="equal length"):
        utils._check_match_lists_of_pairs([(1.0, None)], [])


def test_inner_product_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        utils.ip([], [])


def test_pairs_without_variables_can_be_combined():
    assert float(utils.ip_p([(2.0, None)], [(3.0, None)])) == 6.0


def test_mismatch_is_reported_by_position_and_by_both_lists():
    v, w = tf.Variable(1.0, name="v"), tf.Variable(1.0, name="w")
    a = [(1.0, v), (1.0, v), (1.0, w)]
    b = [(1.0, v), (1.0, w), (1.0, v)]
    with pytest.raises(ValueError) as caught:
        utils.assert_variables_match_pairs_list(a, b, error_message="Wrong order.")
    message = str(caught.value)
    assert message.startswith("Wrong order.")
    assert "[1, 2]" in message
    assert "['v:0', 'v:0', 'w:0']" in message
    assert "['v:0', 'w:0', 'v:0']" in message


def test_lists_of_unequal_length_are_compared_up_to_the_shorter():
    v, w = tf.Variable(1.0), tf.Variable(1.0)
    utils.assert_variables_match_pairs_list([(1.0, v)], [(1.0, v), (1.0, w)])
