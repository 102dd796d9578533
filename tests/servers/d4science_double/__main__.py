"""The double's process: `python __main__.py PORT WORK LOG`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[3])
    from tests.servers.d4science_double.handler import serve

    serve(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
