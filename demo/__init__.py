"""The demo: compose, train on real pictures, reload in a fresh process, and show that the pictures were read."""


class DemoError(RuntimeError):
    """The demo ran, but did not show what it is to show. The message says what failed."""
