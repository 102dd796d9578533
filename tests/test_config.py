"""The configuration: what is understood, and that whatever is not is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbmountd import log
from nbmountd.config import Config, DirectoryOptions, WebDAVOptions
from nbmountd.configfile import load_config
from nbmountd.configschema import config_schema
from nbmountd.errors import ConfigError

MINIMAL = """
[[mount]]
name = "b2drop"
path = "~/b2drop"
backend = "webdav"
url = "https://b2drop.example/remote.php/webdav"
"""


class Places:
    """A machine of its own: /etc, a home and an environment."""

    def __init__(self, root: Path) -> None:
        self.home = root / "home"
        self.system = root / "etc" / "config.toml"
        self.user = self.home / ".config" / "nbmountd" / "config.toml"
        self.environ = {"HOME": str(self.home)}
        self.system.parent.mkdir(parents=True)
        self.user.parent.mkdir(parents=True)

    def load(self, path: Path | None = None) -> Config:
        return load_config(path, environ=self.environ, system_file=self.system)

    def load_text(self, text: str) -> Config:
        self.user.write_text(text)
        return self.load()

    def error(self, text: str) -> str:
        with pytest.raises(ConfigError) as caught:
            self.load_text(text)
        return str(caught.value)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path)


# --- what is understood ------------------------------------------------------------------------------------------------


def test_a_minimal_mount_gets_the_defaults(places: Places) -> None:
    config = places.load_text(MINIMAL)

    (mount,) = config.mounts
    assert (mount.name, mount.path, mount.backend) == ("b2drop", f"{places.home}/b2drop", "webdav")
    assert mount.options == WebDAVOptions(url="https://b2drop.example/remote.php/webdav")
    assert (mount.freshness, mount.write_back_delay, mount.durability, mount.read_only) == (30.0, 5.0, "local", False)
    assert config.daemon.state_dir == f"{places.home}/.local/state/nbmountd"
    assert config.daemon.cache_dir == f"{places.home}/.cache/nbmountd"
    assert config.source == str(places.user)


def test_sizes_and_durations_are_numbers_or_text_with_a_unit(places: Places) -> None:
    config = places.load_text(
        '[daemon]\ncache_size = "10G"\nunsent_size = "512 MiB"\ndrain_timeout = "2 min"\n'
        + MINIMAL
        + 'freshness = 5\nwrite_back_delay = "250ms"\nrequest_timeout = "1.5s"\nrequest_deadline = 7.5\n'
    )

    assert (config.daemon.cache_size, config.daemon.unsent_size) == (10 * 2**30, 512 * 2**20)
    assert config.daemon.drain_timeout == 120.0
    (mount,) = config.mounts
    assert (mount.freshness, mount.write_back_delay, mount.request_deadline) == (5.0, 0.25, 7.5)
    assert isinstance(mount.options, WebDAVOptions)
    assert mount.options.request_timeout == 1.5


def test_variables_and_home_expand_once(places: Places) -> None:
    places.environ.update(HOST="dav.example", DEEP="${HOST}", DATA="/data")

    config = places.load_text(
        '[daemon]\nstate_dir = "${DATA}/state"\n[[mount]]\nname = "a"\npath = "~/a"\nbackend = "webdav"\n'
        'url = "https://${HOST}/~alice"\nuser = "${DEEP}"\npassword_file = "~/secret"\ntoken_command = ["cat", "${DATA}/t"]\n'
    )

    options = config.mounts[0].options
    assert isinstance(options, WebDAVOptions)
    assert config.daemon.state_dir == "/data/state"
    assert options.url == "https://dav.example/~alice"
    assert options.user == "${HOST}"
    assert options.password_file == f"{places.home}/secret"
    assert options.token_command == ("cat", "/data/t")


def test_a_password_is_taken_as_it_is_and_never_shown(places: Places) -> None:
    places.environ["HOST"] = "x"

    config = places.load_text(MINIMAL + 'password = "~/a${HOST}b-$ecret"\n')

    options = config.mounts[0].options
    assert isinstance(options, WebDAVOptions)
    assert options.password == "~/a${HOST}b-$ecret"
    for shown in (repr(options), str(options), repr(config.mounts[0]), repr(config), f"{config}"):
        assert "ecret" not in shown
        assert "b2drop.example" in shown
    assert "ecret" not in log.mask("the server said ~/a${HOST}b-$ecret is wrong")


def test_the_users_file_wins_key_by_key_and_mount_by_mount(places: Places) -> None:
    daemon = '[daemon]\nlog_level = "debug"\nlog_format = "json"\n'
    places.system.write_text(daemon + MINIMAL + "freshness = 60\nread_only = true\n")
    places.user.write_text(
        '[daemon]\nlog_level = "error"\n[[mount]]\nname = "b2drop"\nfreshness = 10\n'
        '[[mount]]\nname = "shared"\npath = "~/shared"\nbackend = "directory"\nsource = "/srv/shared"\n'
    )

    config = places.load()

    assert (config.daemon.log_level, config.daemon.log_format) == ("error", "json")
    first, second = config.mounts
    assert (first.name, first.freshness, first.read_only) == ("b2drop", 10.0, True)
    assert second.options == DirectoryOptions(source="/srv/shared")
    assert config.source == f"{places.system}, {places.user}"


def test_a_named_file_is_the_only_one_read(places: Places, tmp_path: Path) -> None:
    places.user.write_text("not even TOML")
    named, other = tmp_path / "named.toml", tmp_path / "other.toml"
    named.write_text(MINIMAL)
    other.write_text("")
    places.environ["NBMOUNTD_CONFIG"] = str(other)

    assert [mount.name for mount in places.load(named).mounts] == ["b2drop"]
    assert places.load().mounts == ()
    with pytest.raises(ConfigError, match=r"missing\.toml: cannot be read: No such file"):
        places.load(tmp_path / "missing.toml")


def test_without_a_file_the_environment_of_a_notebook_is_enough(places: Places) -> None:
    places.environ.update(
        WEBDAV_URL="https://b2drop.example/dav", WEBDAV_USER="alice", WEBDAV_PWD="pass word${HOME}", UNKNOWN="x"
    )

    config = places.load()

    (mount,) = config.mounts
    assert (mount.name, mount.path) == ("b2drop", f"{places.home}/b2drop")
    assert mount.options == WebDAVOptions(url="https://b2drop.example/dav", user="alice", password_env="WEBDAV_PWD")
    assert "pass word" not in repr(config)


def test_a_token_in_the_environment_goes_before_a_password(places: Places) -> None:
    places.environ.update(WEBDAV_URL="https://b2drop.example/dav", WEBDAV_TOKEN="token", WEBDAV_PWD="password")

    options = places.load().mounts[0].options

    assert options == WebDAVOptions(url="https://b2drop.example/dav", token_env="WEBDAV_TOKEN")


def test_mounts_of_a_file_go_before_the_environments(places: Places) -> None:
    places.environ.update(WEBDAV_URL="https://b2drop.example/dav")
    mine = '[[mount]]\nname = "mine"\npath = "~/mine"\nbackend = "directory"\nsource = "/srv"\n'

    config = places.load_text(mine)

    assert [mount.name for mount in config.mounts] == ["mine"]


def test_a_file_without_mounts_leaves_them_to_the_environment(places: Places) -> None:
    """An operator's file says where the cache is; what to mount comes from the hub."""
    places.environ.update(WEBDAV_URL="https://b2drop.example/dav")

    config = places.load_text('[daemon]\nlog_level = "debug"\n')

    assert [mount.name for mount in config.mounts] == ["b2drop"]
    assert config.daemon.log_level == "debug"


def test_nothing_at_all_is_an_error_that_says_where_it_looked(places: Places) -> None:
    with pytest.raises(ConfigError) as caught:
        places.load()

    for part in (str(places.system), str(places.user), "NBMOUNTD_CONFIG", "WEBDAV_URL"):
        assert part in str(caught.value)


# --- what is refused ---------------------------------------------------------------------------------------------------

A = '[[mount]]\nname = "a"\npath = "~/a"\nbackend = "webdav"\nurl = "https://h/"\n'
B = '[[mount]]\nname = "b"\npath = "~/b"\nbackend = "webdav"\nurl = "https://h/"\n'


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a = ]", ["not TOML", "line 1"]),
        ("[deamon]\n", [":1:", "deamon", 'did you mean "daemon"']),
        ("[[mounts]]\n", [":1:", "mounts", 'did you mean "mount"']),
        ("[mount]\n", [":1:", "[[mount]]"]),
        ("daemon = 3\n", ["[daemon]"]),
        ("[daemon]\n\ncache_sise = 3\n", [":3:", "[daemon]", "cache_sise", 'did you mean "cache_size"']),
        ("[daemon]\ncache_size = 'big'\n", [":2:", "cache_size", "big", "512 MiB"]),
        ("[daemon]\ncache_size = true\n", [":2:", "cache_size", "number"]),
        ("[daemon]\ncache_size = -1\n", [":2:", "cache_size", ">= 0"]),
        ("[daemon]\ndrain_timeout = nan\n", [":2:", "drain_timeout"]),
        ("[daemon]\ndrain_timeout = '5 parsecs'\n", [":2:", "drain_timeout", "parsecs", "30s"]),
        ("[daemon]\nlog_level = 'loud'\n", [":2:", "log_level", '"debug", "info", "warning", "error"']),
        ("[daemon]\nstate_dir = 'state'\n", [":2:", "state_dir", "absolute"]),
        ("[daemon]\nstate_dir = '${NOWHERE}/state'\n", [":2:", "state_dir", "NOWHERE"]),
        ("[daemon]\nstate_dir = 3\n", [":2:", "state_dir", "str"]),
        ("[[mount]]\npath = '~/a'\n", [":1:", "number 1", "name", "missing"]),
        ("[[mount]]\nname = '../a'\n", [":2:", "name", "letters"]),
        ("[[mount]]\nname = 3\n", [":2:", "name", "string"]),
        (A + A, [":7:", 'two mounts named "a"']),
        ("[[mount]]\nname = 'a'\n", [":1:", '"a"', "backend", "missing", "webdav"]),
        ("[[mount]]\nname = 'a'\nbackend = 'webdaw'\n", [":3:", "webdaw", 'did you mean "webdav"']),
        (B + A.replace("path", "pth"), [":8:", '"a"', "pth", 'did you mean "path"']),
        (A + "frehsness = 3\n", [":6:", '[[mount]] "a"', "frehsness", 'did you mean "freshness"']),
        (A + "source = '/x'\n", [":6:", "source", "unknown key"]),
        (A + "durability = 'remote'\n", [":6:", "durability", '"local", "fsync", "close"']),
        (A + "read_only = 'yes'\n", [":6:", "read_only", "bool"]),
        (A + "connections = 0\n", [":6:", "connections", ">= 1"]),
        (A + "exclude = ['a', 3]\n", [":6:", "exclude", "str"]),
        (A + "freshness = '-5s'\n", [":6:", "freshness"]),
        (A + "password_file = 'secret'\n", [":6:", "password_file", "absolute"]),
        (A + "password = 'never-used'\npassword_env = 'X'\n", [":7:", "password_env", "only one of"]),
        (A + "token_file = '/x'\ntoken_command = ['x']\n", [":7:", "only one of"]),
        (A + "password = '${PWD_OF_B2DROP}'\n", [":6:", 'password_env = "PWD_OF_B2DROP"']),
        (A.replace("https://h/", "h/dav"), [":5:", "url", "https://"]),
        (A.replace("https://h/", "https://h:port/"), [":5:", "url"]),
        (A.replace("https://h/", "https://h/?x=1"), [":5:", "url", "%3F"]),
        (A.replace("https://h/", "https://alice:hunter2@h/"), [":5:", "url", "user, password_file"]),
        (A.replace("~/a", "a"), [":3:", "path", "absolute"]),
        (A.replace("~/a", "~"), [":3:", "path", "home"]),
        (A.replace("~/a", "/"), [":3:", "path", "home"]),
        (A.replace("~/a", "~/.cache"), [":3:", "path", "cache_dir"]),
        (A + B.replace("~/b", "~/x/../a/"), [":8:", "path", 'mount "a"']),
        (A + B.replace("~/b", "~/a/b"), [":8:", "path", "inside one another"]),
        (A.replace("~/a", "~/b/a") + B, [":8:", "path", "inside one another"]),
        ("[[mount]]\nname='d'\npath='~/d'\nbackend='directory'\nsource='~/d/x'\n", [":5:", "source", "inside one another"]),
        ("[[mount]]\nname='d'\npath='~/d'\nbackend='directory'\n", [":1:", '"d"', "source", "missing"]),
    ],
)
def test_what_is_wrong_is_refused_and_its_place_named(places: Places, text: str, parts: list[str]) -> None:
    message = places.error(text)

    assert str(places.user) in message
    assert [part for part in parts if part not in message] == [], message
    assert "hunter2" not in message


def test_neighbours_with_a_common_beginning_are_not_inside_one_another(places: Places) -> None:
    assert len(places.load_text(A.replace("~/a", "~/data") + B.replace("~/b", "~/data2")).mounts) == 2


def test_a_wrong_key_of_a_merged_mount_is_found_in_its_own_file(places: Places) -> None:
    places.system.write_text(A + "freshness = 'soon'\n")
    places.user.write_text('[[mount]]\nname = "a"\nread_only = true\n')

    with pytest.raises(ConfigError, match=rf"{places.system}:6: .*freshness"):
        places.load()


# --- schema ------------------------------------------------------------------------------------------------------------


def test_the_schema_describes_the_file_as_it_is_written() -> None:
    schema = json.loads(json.dumps(config_schema()))

    daemon, mounts = schema["properties"]["daemon"], schema["properties"]["mount"]["items"]["oneOf"]
    webdav = next(mount for mount in mounts if mount["properties"]["backend"] == {"const": "webdav"})
    assert "required" not in daemon
    assert {each["type"] for each in daemon["properties"]["cache_size"]["anyOf"]} == {"integer", "string"}
    assert set(webdav["required"]) == {"name", "path", "backend", "url"}
    assert "options" not in webdav["properties"]
    assert webdav["additionalProperties"] is False
    assert webdav["properties"]["durability"]["default"] == "local"
