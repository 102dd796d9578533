"""Which token is shown to whom, what is minted and when, and what a person is told when nothing helps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from nbmountd.backends.credentials import FileSecret
from nbmountd.backends.onedata import OnedataBackend
from nbmountd.backends.onedata_tokens import LIFETIME, RENEW_BEFORE, Chain, Minting, Source, Tokens
from nbmountd.backends.policy import PolicyBackend
from nbmountd.errors import RemoteUnavailable, Unauthenticated
from nbmountd.model import Health, Place
from tests.backends.onedata_fixtures import VARIABLE, connected, new_space, options
from tests.backends.suite import at, free, read, upload
from tests.servers.onedata_double import KRAKOW, OnedataDouble


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnedataDouble]:
    with OnedataDouble(tmp_path_factory.mktemp("onedata")) as server:
        assert isinstance(server, OnedataDouble)
        yield server


@pytest.fixture
def double(running: OnedataDouble) -> OnedataDouble:
    running.do("clear")
    return running


async def test_a_token_for_oneclient_alone_is_refused_and_the_error_says_what_would_cure_it(
    double: OnedataDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "alice-oneclient")
    space = new_space(double)
    missing = tmp_path / "secrets" / "access_token"
    backend = OnedataBackend(options(double, space.base, checkin_token_file=str(missing)))

    with pytest.raises(Unauthenticated) as caught:
        await backend.connect()
    await backend.aclose()

    text = str(caught.value)
    assert f"{VARIABLE} is limited to oneclient" in text
    assert str(missing) in text
    assert "ONEZONE_ACCESS_TOKEN" in text
    assert "alice-oneclient" not in text
    assert sum(line.endswith(" 401") for line in double.records()) == 1


async def test_beside_a_token_for_oneclient_one_for_onezone_is_enough(
    double: OnedataDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "alice-oneclient")
    monkeypatch.setenv("ONEZONE_TOKEN_OF_A_TEST", "alice-onezone")
    space = new_space(double)
    known = len(double.do("minted"))

    async with connected(double, space.base, onezone_token_env="ONEZONE_TOKEN_OF_A_TEST") as backend:
        await upload(backend, free("file"), b"content")

    [minted] = double.do("minted")[known:]
    assert space.read("file") == b"content"
    assert (minted["interface"], minted["services"]) == ("rest", [f"opw-{KRAKOW}"])
    assert abs(minted["valid_until"] - time.time() - LIFETIME) < 60


async def test_a_checkin_token_in_a_file_is_enough_and_another_one_is_noticed(
    double: OnedataDouble, tmp_path: Path
) -> None:
    token = tmp_path / "access_token"
    token.write_text("checkin-expired\n")
    space = new_space(double)
    backend = OnedataBackend(options(double, space.base, token_env=None, checkin_token_file=str(token)))
    before = backend.credential_fingerprint()

    with pytest.raises(Unauthenticated):
        await backend.connect()
    token.write_text("checkin-alice\n")
    after = backend.credential_fingerprint()
    await backend.connect()
    await upload(backend, free("file"), b"content")
    await backend.aclose()

    assert before != after
    assert space.read("file") == b"content"


async def test_a_token_revoked_in_mid_upload_is_replaced_and_the_body_starts_again(
    double: OnedataDouble, tmp_path: Path
) -> None:
    token = tmp_path / "access_token"
    token.write_text("checkin-alice")
    space = new_space(double)

    async with connected(double, space.base, token_env=None, checkin_token_file=str(token)) as backend:
        old = await upload(backend, free("file"), b"old")
        double.fault("^POST .*children", "call", then={"operation": "revoke_minted"})
        await upload(backend, at(old), b"n" * 3_000_000, old.version)

    assert space.read("file") == b"n" * 3_000_000
    assert sum(line.endswith(" 401") for line in double.records()) == 1


async def test_a_configured_token_that_is_refused_is_not_shown_again(
    double: OnedataDouble, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("alice-rest")
    space = new_space(double)

    async with connected(double, space.base, token_env=None, token_file=str(token)) as backend:
        double.do("token", text="second", user="alice")
        double.do("token", text="alice-rest", user="alice", revoked=True)
        for _ in range(3):
            with pytest.raises(Unauthenticated, match="has been revoked"):
                await backend.stat(Place())
        refused = sum(line.endswith(" 401") for line in double.records())
        token.write_text("second")
        await backend.stat(Place())
    double.do("token", text="alice-rest", user="alice")

    assert refused == 1


async def test_a_readonly_token_makes_everything_unwritable(double: OnedataDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "alice-readonly")
    space = new_space(double)
    space.write("file", b"content")

    async with connected(double, space.base) as backend:
        [entry] = await backend.list(Place())
        content = await read(backend, at(entry), entry.version, 0, 7)

    assert not entry.writable
    assert content == b"content"


async def test_without_onezone_the_provider_itself_tells_the_spaces(
    double: OnedataDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "alice-rest")
    space = new_space(double, name="By the provider alone")
    elsewhere = new_space(double, name="Elsewhere", supports={"prov-paris": False})

    async with connected(double, None, onezone=None) as backend:
        names = {entry.name for entry in await backend.list(Place())}

    assert "By the provider alone" in names
    assert "Elsewhere" not in names
    assert {space.provider, elsewhere.provider} == {KRAKOW, "prov-paris"}


async def test_no_token_is_in_a_url_or_an_error(double: OnedataDouble, tmp_path: Path) -> None:
    token = tmp_path / "access_token"
    token.write_text("checkin-alice")
    space = new_space(double)

    async with connected(double, space.base, token_env=None, checkin_token_file=str(token)) as backend:
        double.fault("data", "status", count=3, status=500, body="<html>temporary- checkin-alice</html>")
        with pytest.raises(RemoteUnavailable) as caught:
            await backend.stat(Place())
    secrets = ["checkin-alice", *(minted["text"] for minted in double.do("minted"))]

    texts = [*double.records(), str(caught.value), repr(backend)]
    assert not [secret for secret in secrets for text in texts if secret in text]


async def test_a_mount_without_a_usable_token_comes_alive_when_the_file_appears(
    double: OnedataDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "alice-oneclient")
    token = tmp_path / "access_token"
    driver = OnedataBackend(options(double, new_space(double).base, checkin_token_file=str(token)))
    backend = PolicyBackend(driver, credential=driver.credential_fingerprint)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.run)
        with pytest.raises(Unauthenticated):
            await backend.connect()
        health, reason = backend.health, backend.health_reason
        token.write_text("checkin-alice")
        with trio.fail_after(20):
            while backend.health is not Health.LIVE:
                await backend.wait_health_change()
        entry = await backend.stat(Place())
        nursery.cancel_scope.cancel()
    await backend.aclose()

    assert health is Health.UNAUTHENTICATED
    assert str(token) in reason
    assert entry.writable


# --- without a server ---


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def tokens_of(tmp_path: Path, clock: Clock, minted: list[float], *, away: list[bool]) -> Tokens:
    (tmp_path / "token").write_text("for-onezone")

    async def mint(token: str, provider: str, until: float) -> str:
        if away:
            raise RemoteUnavailable("Onezone is away")
        minted.append(until)
        return f"minted-{len(minted)}"

    chain = Chain([Source("a file", FileSecret(tmp_path / "token"))])
    return Tokens("p", [], Minting(chain, mint), "do something", wall_clock=clock)


async def test_a_temporary_token_is_used_until_shortly_before_its_end(tmp_path: Path) -> None:
    clock, minted = Clock(), list[float]()
    tokens = tokens_of(tmp_path, clock, minted, away=[])

    first = await tokens.get()
    clock.now += LIFETIME - RENEW_BEFORE - 1
    still = await tokens.get()
    clock.now += 2
    second = await tokens.get()

    assert (first, still, second) == ("minted-1", "minted-1", "minted-2")


async def test_while_onezone_is_away_the_old_token_serves_to_its_end(tmp_path: Path) -> None:
    clock, minted, away = Clock(), list[float](), list[bool]()
    tokens = tokens_of(tmp_path, clock, minted, away=away)
    await tokens.get()
    away.append(True)

    clock.now += LIFETIME - 1
    still = await tokens.get()
    clock.now += 2

    assert still == "minted-1"
    with pytest.raises(RemoteUnavailable):
        await tokens.get()
