"""What holds for all tests."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator

import pytest

from nbmountd import log

# A shell that starts us in the background has SIGINT ignored, and so would every program that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_secrets_of_other_tests() -> Iterator[None]:
    """What one test calls a secret would be masked in the log lines that another looks for."""
    known = dict(log._secrets)
    yield
    log._secrets.clear()
    log._secrets.update(known)
    log._secret_pattern = log._pattern_of(known)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """File names of any bytes are in what tests print; reports go from process to process as UTF-8."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report
