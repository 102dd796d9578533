"""What holds for all tests."""

from __future__ import annotations

import signal

# A shell that starts us in the background has SIGINT ignored, and so would every program that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
