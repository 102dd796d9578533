"""Blocking calls beside the loop: in worker threads, with limiters of their own, and ended when their caller is cancelled.

It knows nothing of what the calls do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import outcome
import trio

T = TypeVar("T")


async def run_interruptible(call: Callable[[], T], interrupt: Callable[[], None], limiter: trio.CapacityLimiter) -> T:
    """What `call()` returns or raises, run in a worker thread.

    On cancellation `interrupt()` is called once, on the loop; it must make `call` return soon (shut a socket down). This
    function returns only when the thread is done with `call`, so files and buffers that `call` uses may be closed after.
    """
    result: outcome.Outcome[T] | None = None

    async def interrupt_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            if result is None:
                interrupt()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(interrupt_when_cancelled)
        result = await trio.to_thread.run_sync(partial(outcome.capture, call), limiter=limiter)
        nursery.cancel_scope.cancel()
    await trio.lowlevel.checkpoint_if_cancelled()
    return result.unwrap()
