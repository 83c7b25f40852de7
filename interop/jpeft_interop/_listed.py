"""Names in an error message."""

from collections.abc import Iterable


def listed(names: Iterable[object], most: int = 5) -> str:
    """The first few of many names, and how many more there are.

    >>> listed(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + rest
