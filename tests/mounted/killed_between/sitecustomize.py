"""Found by Python at its start where test_killed_between.py puts this directory on PYTHONPATH; the product knows nothing of it.

A worker kills itself when it has carried out the request whose name a file in KILL_BETWEEN bears, and has not answered it yet.
"""

import os
import signal
from contextlib import suppress
from functools import wraps
from typing import Any


def _install(place: str) -> None:
    from nbmountd.fuse.operations import Operations

    def dies(verb: str) -> Any:
        handler = getattr(Operations, verb)

        @wraps(handler)
        async def carried_out(self: Operations, *arguments: Any) -> Any:
            answer = await handler(self, *arguments)
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(place, verb))  # once: the next worker gets the same request
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        return carried_out

    for verb in ("create", "mkdir", "mknod", "symlink", "link", "unlink", "rmdir", "rename", "setattr", "open", "write"):
        setattr(Operations, verb, dies(verb))


if "KILL_BETWEEN" in os.environ:
    _install(os.environ["KILL_BETWEEN"])
