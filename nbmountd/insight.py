"""Says what a process is doing, for somebody who looks at one that hangs: on SIGUSR1 every trio task and what it waits for.

It knows trio and the log, and nothing of what the tasks do.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import trio

from nbmountd.log import get_logger

Request = tuple[str, int, str, float]
"""(operation, inode, name or nothing, seconds)"""
_log = get_logger(__name__)


async def dump_on_signal(in_flight: Callable[[], list[Request]] = list) -> None:
    """Logs all tasks of this process, and the requests in flight, at each SIGUSR1. Must run in the main thread."""
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        async for _ in signals:
            for operation, inode, name, seconds in in_flight():
                _log.info("request", operation=operation, inode=inode, name=name or None, seconds=round(seconds, 3))
            for line in tasks():
                _log.info("task", at=line)


def tasks() -> Iterator[str]:
    """One line for each task: its name and the frames that it waits in, outermost first."""
    root = trio.lowlevel.current_root_task()
    todo = [] if root is None else [root]
    while todo:
        task = todo.pop()
        frames = []
        coroutine: object = task.coro
        while coroutine is not None:
            frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
            if frame is not None:
                frames.append(f"{frame.f_code.co_name} ({frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno})")
            coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
        yield f"{task.name}: {' > '.join(frames)}"
        for nursery in task.child_nurseries:
            todo.extend(nursery.child_tasks)
