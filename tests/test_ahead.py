"""Results that threads make before they are asked for: their order, their number, and what an error or an early end leaves."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from mgd_pipeline.ahead import ahead, iterate_ahead


@pytest.mark.parametrize(("threads", "count"), [(1, 1), (3, 2), (2, 100)])
def test_results_come_in_order(threads: int, count: int) -> None:
    started = [threading.Event() for _ in range(20)]

    def call(i: int) -> int:
        started[i].set()
        if threads > 1 and i % 2 == 0 and i + 1 < len(started) and count > 1:
            assert started[i + 1].wait(10), "the next one runs beside it, and ends before it"
        return i

    assert list(ahead((partial(call, i) for i in range(20)), threads, count)) == list(range(20))


def test_an_item_is_made_while_the_one_before_is_used_and_no_more_than_allowed() -> None:
    made: list[int] = []
    second = threading.Event()

    def items() -> Iterator[int]:
        for i in range(50):
            made.append(i)
            if i == 1:
                second.set()
            yield i

    for asked, item in enumerate(iterate_ahead(items(), 4), 1):
        assert item == asked - 1 and len(made) <= asked + 4 and second.wait(10)
    assert made == list(range(50))


def test_an_error_comes_in_its_place_and_ends_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("the second")

    results = iterate_ahead(items(), 5)
    assert next(results) == 1
    with pytest.raises(ValueError, match="the second"):
        next(results)
    assert list(results) == []


def test_stopping_early_leaves_no_thread_and_starts_nothing() -> None:
    before, made = set(threading.enumerate()), []
    calls = (partial(made.append, i) for i in range(1000))
    for start in (lambda: ahead(calls, 2, 10), lambda: iterate_ahead(iter(range(1000)), 10)):
        unfinished = start()
        next(unfinished)
        del unfinished
        gc.collect()
        assert set(threading.enumerate()) <= before and len(made) <= 12
