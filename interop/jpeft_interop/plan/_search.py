"""The largest batch that fits, by bisection over the compiler."""

from collections.abc import Callable

Total = Callable[[int], tuple[bool, int | None]]
"""units of the batch -> whether it fits, and the bytes that it takes, if the compiler says so."""


def largest(total: Total, memory: int, start: int, known: tuple[bool, int | None]) -> int:
    """The largest number of units that fits; 0 if not even one does.

    start: a number that has been tried, with the answer in `known`. What a program takes grows about linearly with its
    batch, so that the line through two answers says where to look; the compiler has the last word, until it has
    accepted one number and refused the next.

    >>> tried = []
    >>> def of(units):
    ...     tried.append(units)
    ...     return 100 + 7 * units <= 1000, 100 + 7 * units
    >>> largest(of, 1000, 4, (True, 128)), tried
    (128, [31, 128, 129])
    """
    answers: dict[int, int] = {}
    low, high = (start, None) if known[0] else (0, start)
    if known[1] is not None:
        answers[start] = known[1]
    while high is None or high - low > 1:
        units = _next(answers, memory, low, high, start)
        fits, size = total(units)
        if size is not None:
            answers[units] = size
        low, high = (units, high) if fits else (low, units)
    return low


def _next(answers: dict[int, int], memory: int, low: int, high: int | None, start: int) -> int:
    guess = _on_the_line(answers, memory)
    if guess is None:
        # One answer: as if all of it grew with the batch, which it does not, so the step is a cautious one.
        alone = answers.get(start)
        guess = start * memory // alone if alone else (2 * low if high is None else (low + high) // 2)
    if guess <= low:
        guess = low + 1
    return guess if high is None else min(guess, high - 1)


def _on_the_line(answers: dict[int, int], memory: int) -> int | None:
    """Where the line through the two largest answers reaches the memory."""
    if len(answers) < 2:
        return None
    (first, small), (second, large) = sorted(answers.items())[-2:]
    if large <= small:
        return None
    return first + (memory - small) * (second - first) // (large - small)
