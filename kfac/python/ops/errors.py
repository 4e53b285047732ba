"""Exceptions that callers may want to tell apart."""


class ArgumentError(ValueError, AssertionError):
    """A bad argument, where the reference API documents an `AssertionError`."""


class MissingTargetsError(ValueError):
    """A loss was evaluated on real targets but was registered without any."""
