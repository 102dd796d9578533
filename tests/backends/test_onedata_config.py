"""How a mount of EGI DataHub is configured: by a file, or by what the environment of an EGI notebook holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbmountd.config import OnedataOptions
from nbmountd.configfile import load_config
from nbmountd.errors import ConfigError

HUB = {
    "ONEPROVIDER_HOST": "plg-cyfronet-01.datahub.egi.eu",
    "ONEZONE_URL": "https://datahub.egi.eu",
    "ONECLIENT_ACCESS_TOKEN": "for-oneclient",
    "ONEZONE_ACCESS_TOKEN": "for-onezone",
    "ONEDATA_USER": "abc",
}
"""What EGI's hub puts into a notebook (egi-notebooks-hub: onedata.py)."""


def options_from(environ: dict[str, str], home: Path) -> OnedataOptions:
    config = load_config(environ={"HOME": str(home), **environ}, system_file=home / "none.toml")
    [mount] = config.mounts
    assert (mount.name, mount.path) == ("datahub", str(home / "datahub"))
    assert isinstance(mount.options, OnedataOptions)
    return mount.options


def test_the_environment_of_an_egi_notebook_is_enough(tmp_path: Path) -> None:
    options = options_from(HUB | {"SECRETS_MOUNT_PATH": "/run/secrets/egi"}, tmp_path)

    assert options == OnedataOptions(
        onezone="https://datahub.egi.eu",
        oneprovider="plg-cyfronet-01.datahub.egi.eu",
        token_env="ONECLIENT_ACCESS_TOKEN",
        onezone_token_env="ONEZONE_ACCESS_TOKEN",
        checkin_token_file="/run/secrets/egi/access_token",
    )
    assert "for-one" not in repr(options)


def test_without_tokens_in_the_environment_the_mounted_secret_is_used(tmp_path: Path) -> None:
    options = options_from({"ONEZONE_URL": "https://datahub.egi.eu"}, tmp_path)

    assert (options.token_env, options.onezone_token_env) == (None, None)
    assert options.checkin_token_file == "/var/run/secrets/egi.eu/access_token"


def test_the_names_of_onedatas_own_clients_are_understood(tmp_path: Path) -> None:
    environ = {
        "ONEDATA_ONEZONE_HOST": "zone.example.org", "ONEDATA_TOKEN": "t", "ONEDATA_PREFERRED_PROVIDERS": "a.example, b.example",
    }  # fmt: skip
    options = options_from(environ, tmp_path)

    assert (options.onezone, options.oneprovider, options.token_env) == ("zone.example.org", "a.example", "ONEDATA_TOKEN")


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ('token_env = "T"', "needs `onezone` or `oneprovider`"),
        ('onezone = "zone.example"\nfolder = "a/b"', "folder: needs `space`"),
        ('onezone = "zone.example?x=1"', "onezone:"),
        ('onezone = "https://user:secret@zone.example"', "onezone: must not hold user or password"),
        ('onezone = "zone.example"\ntoken_env = "A"\ntoken_file = "/b"', "only one of token_file, token_env"),
        ('onezone = "zone.example"\nonezone_token_file = "relative"', "onezone_token_file:"),
        ('onezone = "zone.example"\nspcae = "x"', 'did you mean "space"'),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path: Path, keys: str, problem: str) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'[[mount]]\nname = "hub"\npath = "/mnt/hub"\nbackend = "onedata"\n{keys}\n')

    with pytest.raises(ConfigError) as caught:
        load_config(file, environ={"HOME": str(tmp_path)})

    assert problem in str(caught.value)
    assert "secret@" not in str(caught.value)
