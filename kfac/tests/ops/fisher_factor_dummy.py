"""The smallest dense factor a user can write, with an average set by hand."""

import tensorflow as tf

from kfac.python.ops import fisher_factors as ff


class FixedCov:
    """Stands in for a moving average, as callers may put any `.value` into `_cov`."""

    def __init__(self, value):
        self.value = value


class Dummy(ff.DenseSquareMatrixFactor):
    """The smallest subclass a user can write."""

    def __init__(self, shape, scope="dummy/a_b_c", cov=None):
        self._shape = shape
        self._scope = scope
        super().__init__()
        if cov is not None:
            self._cov = FixedCov(tf.convert_to_tensor(cov))

    _var_scope = property(lambda self: self._scope)
    _cov_shape = property(lambda self: self._shape)
    _num_sources = property(lambda self: 1)
    _num_towers = property(lambda self: 1)
    _dtype = tf.float64

    def _partial_batch_size(self, source=0, tower=0):
        return 1

    def _compute_new_cov(self, source, tower):
        return tf.zeros(self._shape, tf.float64)

    def _get_data_device(self, tower):
        return None
