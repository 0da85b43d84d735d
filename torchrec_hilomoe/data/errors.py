"""The one error that says "your data", not "your settings" and not "our bug"."""

__all__ = ["DataError"]


class DataError(ValueError):
    """Data that is missing, unreadable or worse than the limit on bad rows allows.

    The message names the file, the place in it, and the remedy.
    """
