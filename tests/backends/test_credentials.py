"""Passwords and tokens: found wherever they are put, renewed when they change, never given out after a refusal."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import trio
import trio.testing

from nbmountd.backends.credentials import (
    COMMAND_PAUSE,
    CommandSecret,
    Credential,
    EnvironmentSecret,
    FileSecret,
    InlineSecret,
    anonymous,
    basic,
    bearer,
    credential_for,
)
from nbmountd.config import WebDAVOptions
from nbmountd.errors import ConfigError, Unauthenticated
from nbmountd.log import mask

URL = "https://dav.example/"


async def test_basic_is_the_user_and_password_in_utf_8() -> None:
    header = await basic("Zoë", InlineSecret("pässword", "password")).authorization()

    assert header == "Basic Wm/Dqzpww6Rzc3dvcmQ="


async def test_a_token_file_is_read_without_its_newline_and_again_when_it_is_another(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("first\n")
    credential = bearer(FileSecret(path))
    assert await credential.authorization() == "Bearer first"

    new = tmp_path / "new"
    new.write_text("other\n")  # the same size, and the same time: a mounted secret is swapped so
    os.utime(new, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    new.replace(path)

    assert await credential.authorization() == "Bearer other"


async def test_a_file_behind_a_swapped_symlink_is_seen(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text(name)
    link = tmp_path / "data"
    link.symlink_to("one")
    credential = bearer(FileSecret(link / "token"))
    assert await credential.authorization() == "Bearer one"

    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").replace(link)

    assert await credential.authorization() == "Bearer two"


@pytest.mark.parametrize("content", ["", "\n", "two\nlines", "\0\1\2"])
async def test_a_file_without_a_token_is_unauthenticated_and_its_path_is_told(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)

    with pytest.raises(Unauthenticated, match=str(path)) as caught:
        await bearer(FileSecret(path)).authorization()

    assert not content.strip() or content.strip() not in str(caught.value)


async def test_a_missing_file_is_unauthenticated_until_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "token"
    credential = bearer(FileSecret(path))
    with pytest.raises(Unauthenticated, match=f"write a valid one to {path}"):
        await credential.authorization()

    path.write_text("late")

    assert await credential.authorization() == "Bearer late"


async def test_the_last_token_stays_in_use_while_the_file_is_being_replaced(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("good")
    credential = bearer(FileSecret(path))
    await credential.authorization()

    path.write_text("")
    assert await credential.authorization() == "Bearer good"
    path.unlink()
    assert await credential.authorization() == "Bearer good"
    path.write_text("better")
    assert await credential.authorization() == "Bearer better"


async def test_a_refused_token_is_never_given_out_again(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("old")
    credential = bearer(FileSecret(path))
    credential.refuse(await credential.authorization())

    for _ in range(2):
        with pytest.raises(Unauthenticated, match=str(path)) as caught:
            await credential.authorization()
        assert "old" not in str(caught.value)
    os.utime(path)  # touched, the same token
    with pytest.raises(Unauthenticated):
        await credential.authorization()
    path.write_text("new")
    assert await credential.authorization() == "Bearer new"
    path.write_text("old")
    with pytest.raises(Unauthenticated):
        await credential.authorization()


async def test_an_environment_variable_is_captured_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBMOUNTD_TEST_TOKEN", "captured")
    credential = bearer(EnvironmentSecret("NBMOUNTD_TEST_TOKEN"))
    monkeypatch.delenv("NBMOUNTD_TEST_TOKEN")

    assert await credential.authorization() == "Bearer captured"
    with pytest.raises(Unauthenticated, match="set the environment variable NBMOUNTD_TEST_TOKEN"):
        await bearer(EnvironmentSecret("NBMOUNTD_TEST_TOKEN")).authorization()


async def test_a_command_runs_once_and_again_after_a_refusal(tmp_path: Path) -> None:
    script = _script(tmp_path, 'echo run >> "$0.log"; echo "token$(wc -l < "$0.log")"')
    credential = bearer(CommandSecret([str(script)]))

    assert await credential.authorization() == "Bearer token1"
    assert await credential.authorization() == "Bearer token1"
    credential.refuse("Bearer token1")
    assert await credential.authorization() == "Bearer token2"


@pytest.mark.parametrize(
    ("command", "text"), [("echo hidden; exit 3", "status 3"), ("true", "is empty"), ("echo one; echo two", "one line")]
)
async def test_a_command_without_a_token_is_unauthenticated_and_shows_nothing_of_its_output(
    tmp_path: Path, command: str, text: str
) -> None:
    script = _script(tmp_path, command)

    with pytest.raises(Unauthenticated, match=text) as caught:
        await bearer(CommandSecret([str(script)])).authorization()

    assert str(script) in str(caught.value)
    assert "hidden" not in str(caught.value)


async def test_a_command_that_is_not_there_is_unauthenticated() -> None:
    with pytest.raises(Unauthenticated, match="cannot be run"):
        await bearer(CommandSecret(["/nonexistent/agent", "secret-argument"])).authorization()


async def test_anonymous_sends_nothing_and_says_what_to_give_once_refused() -> None:
    credential = anonymous()
    assert await credential.authorization() is None

    credential.refuse(None)

    with pytest.raises(Unauthenticated, match="password_file"):
        await credential.authorization()


async def test_options_choose_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("s3\n")
    monkeypatch.setenv("NBMOUNTD_TEST_TOKEN", "s3")
    path = str(tmp_path / "secret")
    script = _script(tmp_path, "echo s3")

    async def header(**keys: object) -> str | None:
        return await credential_for(WebDAVOptions(url=URL, **keys)).authorization()  # type: ignore[arg-type]

    by_password = {
        await header(user="a", password="s3"),
        await header(user="a", password_file=path),
        await header(user="a", password_env="NBMOUNTD_TEST_TOKEN"),
    }
    by_token = {
        await header(token_file=path),
        await header(token_env="NBMOUNTD_TEST_TOKEN"),
        await header(token_command=(str(script),)),
    }
    assert by_password == {"Basic YTpzMw=="}
    assert by_token == {"Bearer s3"}
    assert await header() is None


@pytest.mark.parametrize(
    "keys",
    [
        {"user": "a"},
        {"password": "x"},
        {"user": "a:b", "password": "x"},
        {"user": "a", "password": "x", "password_file": "y"},
        {"user": "a", "password": "x", "token_env": "y"},
    ],
)
def test_options_that_do_not_fit_together_are_refused(keys: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        credential_for(WebDAVOptions(url=URL, **keys))  # type: ignore[arg-type]


def test_a_credential_does_not_show_its_secret() -> None:
    credential: Credential = basic("alice", InlineSecret("hidden", "password"))

    assert "hidden" not in repr(credential)


def _script(directory: Path, command: str) -> Path:
    path = directory / "agent"
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


async def test_what_was_read_is_masked_in_logs_from_then_on(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("correct-horse-of-the-test\n")

    header = await basic("alice", FileSecret(path)).authorization()

    assert header is not None
    assert "correct-horse" not in mask("it was correct-horse-of-the-test")
    assert header.removeprefix("Basic ") not in mask(f"sent {header.removeprefix('Basic ')}")


async def test_a_fingerprint_changes_with_the_file_and_only_then_and_tells_nothing(tmp_path: Path) -> None:
    path = tmp_path / "token"
    credential = bearer(FileSecret(path))
    missing = credential.fingerprint()
    path.write_text("first-token")
    first = credential.fingerprint()
    await credential.authorization()
    again = credential.fingerprint()
    new = tmp_path / "new"
    new.write_text("other-token")
    new.replace(path)

    assert first == again
    assert len({missing, first, credential.fingerprint()}) == 3
    assert "token" not in repr(first)


async def test_a_command_is_worth_asking_again_once_a_minute(autojump_clock: trio.testing.MockClock) -> None:
    credential = bearer(CommandSecret(["printf", "token"]))
    now = credential.fingerprint()
    await trio.sleep(COMMAND_PAUSE)

    assert credential.fingerprint() != now
    assert basic("alice", InlineSecret("x", "password")).fingerprint() == anonymous().fingerprint()
