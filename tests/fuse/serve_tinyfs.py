"""`python -m tests.fuse.serve_tinyfs FUSE_FD CONTROL_FD BACKING RESUME AGREEMENT`: serves until CONTROL_FD is closed.

Writes one byte to CONTROL_FD when it is about to answer requests, one for each `p` it gets, and the ending when it stops.
"""

import base64
import pickle
import socket
import sys
from pathlib import Path

import trio

from nbmountd.fuse import session
from tests.fuse.tinyfs import TinyOperations


async def main() -> None:
    fuse_fd, control_fd, backing, resume, agreement = sys.argv[1:]
    control = trio.socket.from_stdlib_socket(socket.socket(fileno=int(control_fd)))
    async with trio.open_nursery() as nursery:

        async def serve(task_status=trio.TASK_STATUS_IGNORED):
            ending = await session.serve(
                TinyOperations(Path(backing)), int(fuse_fd), pickle.loads(base64.b64decode(agreement)),
                resume=resume == "True", task_status=task_status,
            )  # fmt: skip
            await control.send(ending.encode())
            nursery.cancel_scope.cancel()

        await nursery.start(serve)
        await control.send(b"r")
        while await control.recv(1) == b"p":
            await control.send(b"p")
        session.stop()


trio.run(main)
