"""What is under docker/ for Kubernetes and compose: it is what the schemas and KubeSpawner itself take, and it keeps its word.

Kubernetes' JSON schemas come with the package kubernetes-validate; pods are made by the real KubeSpawner from the values.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbmountd.configfile import load_config

kubernetes_validate = pytest.importorskip("kubernetes_validate")
yaml = pytest.importorskip("yaml")
kubespawner = pytest.importorskip("kubespawner")
kube_config = pytest.importorskip("kubernetes_asyncio.config.kube_config")

CLUSTER = {
    "apiVersion": "v1", "kind": "Config", "current-context": "none", "users": [{"name": "none", "user": {}}],
    "contexts": [{"name": "none", "context": {"cluster": "none", "user": "none"}}],
    "clusters": [{"name": "none", "cluster": {"server": "http://127.0.0.1:9"}}],
}  # fmt: skip
"""KubeSpawner wants to know a cluster; it is never asked."""

DOCKER = Path(__file__).parents[1] / "docker"
HERE = DOCKER / "kubernetes"
MODES = ("a", "d", "f", "p", "s")

TRAITS = {
    "uid": "uid", "fsGid": "fs_gid", "allowPrivilegeEscalation": "allow_privilege_escalation",
    "lifecycleHooks": "lifecycle_hooks",
    "extraPodConfig": "extra_pod_config", "extraEnv": "environment", "extraContainers": "extra_containers",
}  # fmt: skip
"""Keys of the chart's `singleuser` -> KubeSpawner's names of them (the chart's jupyterhub_config.py)."""


def check(resource: dict[str, Any]) -> None:
    """Fails if Kubernetes would not know a key or take a value."""
    kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def values(mode: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((HERE / f"values-mode-{mode}.yaml").read_text())
    return found


def spawner_for(given: dict[str, Any]) -> Any:
    """A KubeSpawner as the chart would configure it. A key of `values` that is unknown here is an error."""
    settings = dict(given["hub"]["config"]["KubeSpawner"])
    single = dict(given["singleuser"])
    image, storage = single.pop("image"), single.pop("storage")
    resource = single.pop("extraResource", {"limits": {}, "guarantees": {}})
    single.pop("extraFiles")
    settings |= {TRAITS[key]: value for key, value in single.items()}
    settings |= {
        "image": f"{image['name']}:{image['tag']}", "pvc_name_template": "claim-{username}{servername}",
        "extra_resource_limits": resource["limits"], "extra_resource_guarantees": resource["guarantees"],
        "volumes": [{"name": "volume-{username}{servername}",
                     "persistentVolumeClaim": {"claimName": "claim-{username}{servername}"}}, *storage.pop("extraVolumes")],
        "volume_mounts": [{"name": "volume-{username}{servername}", "mountPath": "/home/jovyan"},
                          *storage.pop("extraVolumeMounts")],
    }  # fmt: skip
    assert storage == {}
    unknown = [name for name in settings if not kubespawner.KubeSpawner.class_traits().get(name)]
    assert unknown == []
    spawner = make_spawner(**settings)
    spawner.cmd = ["jupyterhub-singleuser"]
    return spawner


def make_spawner(**settings: Any) -> Any:
    async def make() -> Any:
        return kubespawner.KubeSpawner(_mock=True, namespace="hub", user=User("ada", 7), **settings)

    with tempfile.NamedTemporaryFile("w") as file:
        json.dump(CLUSTER, file)
        file.flush()
        before, kube_config.KUBE_CONFIG_DEFAULT_LOCATION = kube_config.KUBE_CONFIG_DEFAULT_LOCATION, file.name
        try:
            return asyncio.run(make())
        finally:
            kube_config.KUBE_CONFIG_DEFAULT_LOCATION = before


@dataclass
class User:
    name: str
    id: int
    url: str = "/user/ada/"


def pod_of(spawner: Any) -> dict[str, Any]:
    from kubernetes_asyncio.client import ApiClient

    async def make() -> dict[str, Any]:
        pod = await spawner.get_pod_manifest()
        async with ApiClient() as client:
            plain: dict[str, Any] = client.sanitize_for_serialization(pod)
        return plain

    return asyncio.run(make())


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- values ------------------------------------------------------------------------------------------------------------


def test_the_values_of_each_mode_make_a_pod_that_kubernetes_takes(mode: str) -> None:
    pod = pod_of(spawner_for(values(mode)))

    check(pod)
    names = {volume["name"] for volume in pod["spec"]["volumes"]}
    for container in pod["spec"]["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= names, container["name"]


def test_each_mode_asks_for_what_it_needs_and_no_more(mode: str) -> None:
    pod = pod_of(spawner_for(values(mode)))
    notebook = next(each for each in pod["spec"]["containers"] if each["name"] == "notebook")
    security, limits = notebook["securityContext"], notebook.get("resources", {}).get("limits", {})

    assert ("squat.ai/fuse" in limits) == (mode in "adf")
    assert security["allowPrivilegeEscalation"] is (mode in "af")
    assert security.get("capabilities") == ({"add": ["SYS_ADMIN"]} if mode in "af" else {"drop": ["ALL"]})
    assert (security.get("runAsUser", pod["spec"].get("securityContext", {}).get("runAsUser")) == 0) == (mode == "f")
    assert "privileged" not in security
    assert not any("hostPath" in volume for volume in pod["spec"]["volumes"]) or mode == "p"
    assert not any(variable["name"].endswith(("PWD", "TOKEN")) and "WEBDAV" in variable["name"] for variable in notebook["env"])


def test_there_is_time_to_send_what_is_unsent(mode: str, tmp_path: Path) -> None:
    given = values(mode)
    grace = given["hub"]["config"]["KubeSpawner"]["delete_grace_period"]
    hook = given["singleuser"]["lifecycleHooks"]["preStop"]["exec"]["command"]

    assert hook[:2] == ["nbmountctl", "sync"] and int(hook[-1].rstrip("s")) < grace
    assert given["singleuser"]["extraPodConfig"]["terminationGracePeriodSeconds"] == grace
    file = tmp_path / "config.toml"
    file.write_text(given["singleuser"]["extraFiles"]["nbmountd"]["stringData"])
    environ = {"HOME": "/home/jovyan", "WEBDAV_URL": "https://b2drop.eudat.eu/remote.php/webdav", "WEBDAV_PWD_FILE": "/x"}
    config = load_config(environ=environ, system_file=file)
    assert config.daemon.drain_timeout < grace
    assert config.daemon.state_dir.startswith("/home/jovyan/"), "what is unsent has to outlive the pod"
    assert config.daemon.cache_dir.startswith("/var/cache/nbmountd/"), "the cache has no business on the home's NFS"
    assert [mount.name for mount in config.mounts] == ["b2drop"], "a file without mounts leaves them to the environment"
    volume = next(each for each in given["singleuser"]["storage"]["extraVolumes"] if each["name"] == "nbmountd-cache")
    assert config.daemon.cache_size < int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) * 2**30


@pytest.mark.parametrize("name", ["mount-helper.yaml", "fuse-device-plugin.yaml"])
def test_the_daemon_sets_are_valid(name: str) -> None:
    for resource in yaml.safe_load_all((HERE / name).read_text()):
        check(resource)
        labels = resource["spec"]["template"]["metadata"]["labels"]
        assert resource["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_helper_and_notebooks_meet_at_the_same_socket_and_the_helper_takes_its_command() -> None:
    from nbmountd.cli import _daemon_group

    helper = yaml.safe_load((HERE / "mount-helper.yaml").read_text())["spec"]["template"]["spec"]
    notebook = values("p")["singleuser"]

    program, verb, *arguments = helper["containers"][0]["command"]
    parsed = _daemon_group.commands[verb].make_context(verb, list(arguments)).params
    assert program == "nbmountd"
    assert str(parsed["path"]) == notebook["extraEnv"]["NBMOUNTD_MOUNT_HELPER"]
    assert (parsed["uids"], parsed["prefixes"]) == ((1000,), ("/home/jovyan",))
    theirs = next(each for each in notebook["storage"]["extraVolumes"] if each["name"] == "nbmountd-helper")
    assert helper["volumes"][0]["hostPath"] == theirs["hostPath"]
    assert "hostPID" not in helper and "hostNetwork" not in helper


# --- the spawn page ----------------------------------------------------------------------------------------------------


class Secrets:
    """Kubernetes' API as far as Secrets go."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, str]] = {}

    async def create_namespaced_secret(self, _namespace: str, secret: dict[str, Any]) -> None:
        from kubernetes_asyncio.client.rest import ApiException

        check(secret)
        if secret["metadata"]["name"] in self.kept:
            raise ApiException(status=409)
        self.kept[secret["metadata"]["name"]] = secret["data"]

    async def patch_namespaced_secret(self, name: str, _namespace: str, secret: dict[str, Any]) -> None:
        self.kept[name] = secret["data"]

    async def read_namespaced_secret(self, name: str, _namespace: str) -> SimpleNamespace:
        from kubernetes_asyncio.client.rest import ApiException

        if name not in self.kept:
            raise ApiException(status=404)
        return SimpleNamespace(data=self.kept[name])

    async def delete_namespaced_secret(self, name: str, _namespace: str) -> None:
        del self.kept[name]


@pytest.fixture
def spawner() -> Iterator[Any]:
    """A KubeSpawner with the snippet as its configuration."""
    from traitlets.config import Config

    config = Config()
    exec(compile((HERE / "kubespawner_b2drop.py").read_text(), "snippet", "exec"), {"get_config": lambda: config})
    single = spawner_for(values("d"))
    made = make_spawner(config=config, volumes=single.volumes)
    made.api = Secrets()
    yield made


def submit(spawner: Any, **fields: str) -> dict[str, Any]:
    spawner.user_options = spawner.run_options_from_form({name.replace("_", "-"): [value] for name, value in fields.items()})
    asyncio.run(spawner.pre_spawn_hook(spawner))
    return pod_of(spawner)


def variables(pod: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in pod["spec"]["containers"][0]["env"]}


def test_the_password_goes_from_the_form_into_a_secret_and_a_file_and_nowhere_else(spawner: Any) -> None:
    spawner.user_options = {"b2drop_user": '<b>"ada'}
    form = spawner.options_form(spawner)
    assert 'name="b2drop-pwd" type="password"' in form and "<b>" not in form

    pod = submit(spawner, b2drop_user="ada", b2drop_pwd="app pass word", b2drop_remember="yes")

    check(pod)
    (data,) = spawner.api.kept.values()
    assert base64.b64decode(data["password"]) == b"app pass word"
    everything = json.dumps(pod) + json.dumps(spawner.user_options)
    assert "app pass word" not in everything and data["password"] not in everything
    assert variables(pod)["WEBDAV_USER"] == "ada"
    mounts = {each["name"]: each for each in pod["spec"]["containers"][0]["volumeMounts"]}
    assert variables(pod)["WEBDAV_PWD_FILE"] == mounts["b2drop"]["mountPath"] + "/password"
    assert "subPath" not in mounts["b2drop"]
    config = load_config(environ={**variables(pod), "HOME": "/home/jovyan"}, system_file=Path("/nowhere"))
    assert [(mount.name, mount.path) for mount in config.mounts] == [("b2drop", "/home/jovyan/b2drop")]


def test_what_is_remembered_needs_no_typing_and_what_is_not_is_gone(spawner: Any) -> None:
    submit(spawner, b2drop_user="ada", b2drop_pwd="first", b2drop_remember="yes")
    again = submit(spawner, b2drop_user="", b2drop_pwd="", b2drop_remember="yes")
    assert variables(again)["WEBDAV_USER"] == "ada"

    submit(spawner, b2drop_user="ada", b2drop_pwd="second")
    (data,) = spawner.api.kept.values()
    assert base64.b64decode(data["password"]) == b"second"
    asyncio.run(spawner.post_stop_hook(spawner))

    assert spawner.api.kept == {}


def test_a_user_without_b2drop_starts_as_well(spawner: Any) -> None:
    pod = submit(spawner, b2drop_user="", b2drop_pwd="")

    check(pod)
    assert "WEBDAV_URL" not in variables(pod)


# --- compose and the images --------------------------------------------------------------------------------------------


def test_the_compose_file_leads_to_files_that_exist_and_gives_the_notebook_what_it_needs() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())

    services = compose["services"]
    for name, service in services.items():
        context = (DOCKER / service["build"]["context"]).resolve()
        assert (context / service["build"]["dockerfile"]).is_file(), name
        assert (context / (service["build"]["dockerfile"] + ".dockerignore")).is_file(), name
        for volume in service.get("volumes", ()):
            assert volume.partition(":")[0] in compose["volumes"]
        assert set(service.get("depends_on", ())) <= services.keys()
    notebook = services["notebook"]
    assert "/dev/fuse" in notebook["devices"] and notebook["cap_add"] == ["SYS_ADMIN"]
    assert int(notebook["stop_grace_period"].rstrip("s")) > 30 + 10, "longer than the drain and what comes after it"


def test_what_the_images_copy_exists_and_is_not_ignored() -> None:
    import fnmatch

    root = DOCKER.parent
    for dockerfile in (DOCKER / "Dockerfile", DOCKER / "doubles" / "Dockerfile"):
        ignored = Path(f"{dockerfile}.dockerignore").read_text().splitlines()
        allowed = [line[1:].removesuffix("/**") for line in ignored if line.startswith("!")]
        for line in dockerfile.read_text().splitlines():
            if line.startswith("COPY ") and "--from" not in line:
                for source in line.split()[1:-1]:
                    assert (root / source).exists(), source
                    assert any(fnmatch.fnmatch(source, each) or source.startswith(each + "/") for each in allowed), source


def test_the_remotes_to_try_out_start_and_their_configuration_is_right() -> None:
    import subprocess
    import time

    with tempfile.TemporaryDirectory() as place:
        child = subprocess.Popen([sys.executable, DOCKER / "doubles" / "serve.py", place], stdin=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 60
            while not (Path(place) / "config.toml").exists():
                assert child.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            config = load_config(Path(place) / "config.toml", environ={"HOME": "/home/jovyan"})
        finally:
            child.terminate()
            child.wait(20)

    assert [mount.path for mount in config.mounts] == [f"/home/jovyan/{name}" for name in ("b2drop", "datahub", "workspace")]


def test_the_snippet_is_python_of_the_oldest_hubs() -> None:
    ast.parse((HERE / "kubespawner_b2drop.py").read_text(), feature_version=(3, 9))
