"""Results in order, made by threads before they are needed: so a device does not wait for decoding and writing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, repeat, takewhile
from typing import Any, TypeVar, cast

T = TypeVar("T")


def ahead(calls: Iterable[Callable[[], T]], threads: int, count: int) -> Iterator[T]:
    """The results of the calls in their order; `threads` threads make up to `count` results in advance.

    An exception of a call is raised in its place and ends the results: waiting calls are dropped, running calls are waited for.
    The same happens when the caller stops early.
    """
    waiting = iter(calls)
    with ThreadPoolExecutor(threads) as pool:
        made = deque(pool.submit(call) for call in islice(waiting, count))
        try:
            while made:
                result = made.popleft().result()
                made.extend(pool.submit(call) for call in islice(waiting, 1))
                yield result
        finally:
            for future in made:
                future.cancel()


def iterate_ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The items; one thread makes up to `count` of them in advance."""
    iterator, end = iter(items), object()

    def more() -> Any:
        return next(iterator, end)

    return cast("Iterator[T]", takewhile(lambda item: item is not end, ahead(repeat(more), 1, count)))
