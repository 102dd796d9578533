"""What the tests of the Onedata backend share: a double that stays up, a space for each test, a backend on it."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from nbmountd.backends.onedata import OnedataBackend
from nbmountd.config import OnedataOptions
from tests.servers.onedata_double import DoubleOutside, OnedataDouble

VARIABLE = "ONEDATA_TOKEN_OF_A_TEST"
_numbers = itertools.count(1)


def new_space(double: OnedataDouble, **values: Any) -> DoubleOutside:
    return double.add_space(f"s{next(_numbers)}", **values)


def options(double: OnedataDouble, space: str | None, **values: Any) -> OnedataOptions:
    """Onezone and Krakow, with the token that the test has put into VARIABLE."""
    given = {
        "onezone": double.zone_host, "oneprovider": double.krakow_host, "space": space, "token_env": VARIABLE,
        "ca_bundle": double.ca_bundle,
    }  # fmt: skip
    return OnedataOptions(**{**given, **values})


@asynccontextmanager
async def connected(double: OnedataDouble, space: str | None, **values: Any) -> AsyncIterator[OnedataBackend]:
    backend = OnedataBackend(options(double, space, **values))
    try:
        await backend.connect()
        yield backend
    finally:
        await backend.aclose()
