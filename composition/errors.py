"""The error for parts that cannot be composed."""


class CompositionError(ValueError):
    """These parts cannot be composed. The message says why, and what would work."""
