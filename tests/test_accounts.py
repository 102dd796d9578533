"""Mounts that users add: what is written for them, for whom it is readable, and that a wrong one changes nothing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nbmountd import accounts
from nbmountd.config import WebDAVOptions
from nbmountd.configfile import accounts_directory, load_config
from nbmountd.errors import ConfigError

DAV = {"backend": "webdav", "path": "~/dav", "url": "https://dav.example/", "user": "ada"}


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path)}


def names(environ: dict[str, str]) -> list[str]:
    return [mount.name for mount in load_config(environ=environ, system_file=Path("/nonexistent")).mounts]


def test_an_account_is_a_mount_with_its_secret_in_a_file_for_its_owner_alone(environ: dict[str, str], tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        where = accounts.add("dav", DAV, "s3cret\n", environ=environ)
    finally:
        os.umask(old)

    (mount,) = load_config(environ=environ, system_file=Path("/nonexistent")).mounts
    assert (mount.name, mount.path) == ("dav", f"{tmp_path}/dav")
    assert isinstance(mount.options, WebDAVOptions) and mount.options.password_file == where
    assert Path(where).read_text() == "s3cret\n"
    directory = accounts_directory(environ)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}
    assert "s3cret" not in (directory / "dav.toml").read_text()


def test_without_a_user_the_secret_is_a_token(environ: dict[str, str]) -> None:
    where = accounts.add("work", {"backend": "d4science", "path": "~/work"}, "token", environ=environ)

    (mount,) = load_config(environ=environ, system_file=Path("/nonexistent")).mounts
    assert getattr(mount.options, "token_file") == where  # noqa: B009


def test_another_secret_or_key_changes_that_alone(environ: dict[str, str]) -> None:
    where = accounts.add("dav", DAV, "first", environ=environ)
    accounts.add("dav", {}, "second", environ=environ)
    assert Path(where).read_text() == "second\n"

    accounts.add("dav", {"read_only": True, "freshness": "5 min"}, None, environ=environ)

    (mount,) = load_config(environ=environ, system_file=Path("/nonexistent")).mounts
    assert mount.read_only and mount.freshness == 300 and getattr(mount.options, "user") == "ada"  # noqa: B009
    assert Path(where).read_text() == "second\n"


@pytest.mark.parametrize(
    "name, keys, secret, problem",
    [
        ("../x", DAV, "s", "cannot be a mount's name"),
        ("new", {}, "s", "say which --backend"),
        ("new", {"backend": "ftp"}, "s", "unknown backend"),
        ("new", {**DAV, "url": "nonsense"}, "s", "url"),
        ("new", {**DAV, "colour": "red"}, "s", "unknown key"),
        ("new", DAV, "two\nlines", "one line"),
        ("new", DAV, " ", "one line"),
        ("file", DAV, "s", "is configured already"),
        ("new", {**DAV, "path": "~"}, "s", "hide the home directory"),
    ],
)
def test_a_wrong_account_changes_nothing(
    environ: dict[str, str], tmp_path: Path, name: str, keys: dict[str, object], secret: str, problem: str
) -> None:
    config = tmp_path / ".config" / "nbmountd" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text('[[mount]]\nname = "file"\npath = "~/file"\nbackend = "directory"\nsource = "/mnt"\n')

    with pytest.raises(ConfigError, match=problem):
        accounts.add(name, keys, secret, environ=environ)

    assert names(environ) == ["file"]
    assert list(accounts_directory(environ).glob("*")) == []


def test_a_removed_account_leaves_neither_keys_nor_secret(environ: dict[str, str]) -> None:
    accounts.add("dav", DAV, "s3cret", environ=environ)
    accounts.add("other", {**DAV, "path": "~/other"}, "s3cret", environ=environ)

    accounts.remove("dav", environ=environ)

    assert names(environ) == ["other"]
    assert sorted(path.name for path in accounts_directory(environ).iterdir()) == ["other.secret", "other.toml"]
    with pytest.raises(ConfigError, match="no account"):
        accounts.remove("dav", environ=environ)


def test_a_directory_that_others_can_write_to_is_not_believed(environ: dict[str, str]) -> None:
    accounts.add("dav", DAV, "s3cret", environ=environ)
    accounts_directory(environ).chmod(0o777)

    with pytest.raises(ConfigError, match="others can write"):
        load_config(environ=environ, system_file=Path("/nonexistent"))
