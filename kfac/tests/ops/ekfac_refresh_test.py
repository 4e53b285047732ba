"""What happens to bases and moments when the bases are refreshed, and when not."""

import numpy as np
import pytest
import tensorflow as tf

from kfac.python.ops import config, layer_collection
from kfac.python.ops import fisher_blocks as fb
from kfac.tests.ops import ekfac_cases as cases

tf1 = tf.compat.v1

X = np.random.RandomState(0).randn(8, 3)
G = np.random.RandomState(1).randn(8, 2)
CLOSE = dict(rtol=1e-10, atol=1e-12)


class Block:
    """A dense EKFAC block on fed data, in a session of its own."""

    def __init__(self, scaling="examples", decay=0.9):
        self.graph = tf.Graph()
        with self.graph.as_default():
            self.inputs = tf1.placeholder_with_default(X, [None, 3])
            self.grads = tf1.placeholder_with_default(G, [None, 2])
            self.block = fb.FullyConnectedEKFACFB(
                layer_collection.LayerCollection(), scaling=scaling
            )
            self.block.register_additional_tower(self.inputs, self.grads)
            self.block.instantiate_factors(((self.grads,),), cases.DAMPING)
            factors = self.block._factors()
            for factor in factors:
                factor.instantiate_cov_variables()
                factor.instantiate_inv_variables()
            self.factor = self.block.eigenbasis_factor
            self._update = [f.make_covariance_update_op(decay, 1.0) for f in factors]
            self._refresh = self.factor.make_inverse_update_ops()
            self._state = {
                "bases": [tf.identity(basis) for basis in self.factor.get_inv_vars()],
                "moments": self.factor.eigenvalues,
                "matrix": self.block.full_fisher_block(),
                "kfac": fb.KroneckerProductFB.full_fisher_block(self.block),
                "fallbacks": tf.identity(self.factor.fallbacks),
            }
            self._session = tf1.Session()
            self._session.run(tf1.global_variables_initializer())

    def update(self, inputs=X, grads=G):
        self._session.run(self._update, {self.inputs: inputs, self.grads: grads})
        return self

    def refresh(self):
        self._session.run(self._refresh)
        return self

    @property
    def state(self):
        return self._session.run(self._state)


def example_matrix(inputs=X, grads=G):
    """Exact second moment of the gradients of the examples."""
    rows = np.einsum("bi,bo->bio", inputs, grads).reshape(len(inputs), -1)
    return rows.T @ rows / len(rows)


def test_before_the_first_refresh_the_moments_are_the_plain_diagonal():
    state = Block().update().state
    for basis in state["bases"]:
        np.testing.assert_array_equal(basis, np.eye(len(basis)))
    np.testing.assert_allclose(
        state["matrix"], np.diag(np.diag(example_matrix())), **CLOSE
    )


def test_without_statistics_a_refresh_changes_nothing():
    block = Block()
    before, after = block.state, block.refresh().state
    tf.nest.map_structure(np.testing.assert_array_equal, before, after)
    assert after["fallbacks"] == 0


def test_the_bases_are_eigenvectors_of_the_running_factors():
    state = Block().update().refresh().state
    for basis, data in zip(state["bases"], (X, G), strict=True):
        moment = data.T @ data / len(data)
        rotated = basis.T @ moment @ basis
        np.testing.assert_allclose(rotated, np.diag(np.diag(rotated)), atol=1e-12)
        np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=1e-12)


@pytest.mark.parametrize("zero_debias", [True, False])
def test_the_first_refresh_starts_at_kfacs_estimate(zero_debias):
    with config.override(zero_debias=zero_debias):
        state = Block().update().update().refresh().state
    np.testing.assert_allclose(state["matrix"], state["kfac"], **CLOSE)


@pytest.mark.parametrize("zero_debias", [True, False])
def test_a_refresh_on_the_same_statistics_changes_nothing(zero_debias):
    with config.override(zero_debias=zero_debias):
        block = Block(decay=0.5).update().refresh().update().update()
        before, after = block.state, block.refresh().state
    np.testing.assert_allclose(after["matrix"], before["matrix"], **CLOSE)
    assert not np.allclose(after["matrix"], after["kfac"], rtol=1e-2)


def test_a_later_refresh_keeps_the_best_diagonal_of_the_old_estimate():
    block = Block().update().refresh().update()
    rng = np.random.RandomState(7)
    block.update(rng.randn(8, 3), rng.randn(8, 2))
    before, after = block.state, block.refresh().state
    basis = np.kron(*after["bases"])
    assert not np.allclose(np.abs(basis), np.abs(np.kron(*before["bases"])), atol=0.1)
    np.testing.assert_allclose(
        after["moments"].ravel(), np.diag(basis.T @ before["matrix"] @ basis), **CLOSE
    )
    np.testing.assert_allclose(after["moments"].sum(), before["moments"].sum(), **CLOSE)


def test_moments_follow_eigenvectors_that_change_places():
    x = np.diag([1.0, 2.0, 3.0])
    g = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    block = Block(decay=0.5).update(x, g).refresh().update(x, g)
    for _ in range(60):  # The order of the inputs' second moments reverses.
        block.update(x[:, ::-1], g)
    before, after = block.state, block.refresh().state
    np.testing.assert_allclose(after["matrix"], before["matrix"], **CLOSE)


def test_after_a_refresh_new_batches_are_measured_in_the_new_bases():
    state = Block(decay=0.0).update().refresh().update().state
    basis = np.kron(*state["bases"])
    np.testing.assert_allclose(
        state["moments"].ravel(), np.diag(basis.T @ example_matrix() @ basis), **CLOSE
    )


def test_products_stay_up_to_date_between_refreshes():
    rng = np.random.RandomState(7)
    new = rng.randn(8, 3), rng.randn(8, 2)
    state = Block("product", decay=0.0).update().refresh().update(*new).state
    left, right = (
        np.diag(basis.T @ data.T @ data @ basis) / len(data)
        for basis, data in zip(state["bases"], new, strict=True)
    )
    np.testing.assert_allclose(state["moments"], np.outer(left, right), **CLOSE)


@pytest.mark.parametrize("scaling", ["examples", "product"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_batch_keeps_the_last_good_basis_and_moments(scaling, bad):
    block = Block(scaling).update().refresh().update()
    before = block.state
    broken = X.copy()
    broken[2, 1] = bad
    after = block.update(broken).state
    np.testing.assert_allclose(after["moments"], before["moments"], **CLOSE)
    assert after["fallbacks"] == 1
    # The running factors are spoilt for good, the bases are not.
    after = block.refresh().state
    np.testing.assert_array_equal(after["bases"][0], before["bases"][0])
    np.testing.assert_array_equal(after["bases"][1], before["bases"][1])
    np.testing.assert_allclose(after["matrix"], before["matrix"], **CLOSE)
    assert after["fallbacks"] == 2
    # Moments of good batches still count.
    after = block.update(2 * X).state
    assert np.all(np.isfinite(after["matrix"]))
    assert after["moments"].sum() > before["moments"].sum()


def test_variables_and_their_bytes_are_reported():
    block = Block()
    state = block.factor.cov_variables() + block.factor.inverse_variables()
    names = {v.op.name.rpartition("/")[2] for v in state}
    assert names == {
        "var",
        "total_weight",
        "input_basis",
        "output_basis",
        "refreshes",
    }
    description = block.block.description()
    assert description.approximation == "ekfac"
    assert description.factor_sides == ((3, 3), (2, 2), (3, 2))
    assert description.factor_bytes == 8 * (9 + 4 + 6)
    assert description.inverse_bytes == 8 * (9 + 4)
    assert description.uses == 1
