"""Work that is begun before its turn comes, so that no core waits for another.

On a CPU one compiled program of small steps keeps one core busy, and JAX runs the
programs of one thread one after the other. Programs of several threads run side by
side, and the host has time for what they left.
"""

import concurrent.futures
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def begin_ahead(
    items: Iterable[_Item], work: Callable[[_Item], _Result]
) -> Iterator[tuple[_Item, _Result]]:
    """Do the work of every item, and hand the results out in order.

    The first item is worked on alone: it compiles what the others share. As many are
    under way then as there are cores, on an accelerator two.

    Args:
        items: in order.
        work: a function of an item alone, whose result holds arrays of JAX.
    """
    cores = os.cpu_count() or 1 if jax.default_backend() == "cpu" else 2

    def finish(item: _Item) -> _Result:
        return jax.block_until_ready(work(item))

    waiting: deque[tuple[_Item, concurrent.futures.Future[_Result]]] = deque()
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        try:
            for number, item in enumerate(items):
                waiting.append((item, pool.submit(finish, item)))
                if number == 0:
                    concurrent.futures.wait([waiting[0][1]])
                if len(waiting) > cores:
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
