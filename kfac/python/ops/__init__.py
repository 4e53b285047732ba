"""The graph-level core: losses, factors, blocks, estimator, optimizers."""

from kfac.python.ops import private_tf

private_tf.exclude_from_autograph("kfac.python")
