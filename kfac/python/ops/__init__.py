"""The graph-level core: losses, factors, blocks, estimator, optimizers."""
