"""Fields on the spawn page for the user's B2DROP app password (jupyterhub_config.py, or hub.extraConfig of the chart).

The password goes into a Secret of the user's, and from there into a file of the container: into no environment, no pod
specification and no form shown again. "Remember" unticked: the Secret is kept for this server only. Needs for the hub's service
account: create, get, patch and delete of secrets in the notebooks' namespace.
"""

import base64
import html

MOUNTED_AT = "/var/run/secrets/b2drop"
URL = "https://b2drop.eudat.eu/remote.php/webdav"


def secret_name(spawner):
    return f"b2drop-{spawner.user.id}"


def b2drop_form(spawner):
    user = html.escape((spawner.user_options or {}).get("b2drop_user", ""), quote=True)
    return f"""
    <label for="b2drop-user">B2DROP user name (leave empty to go on with what is remembered)</label>
    <input class="form-control" id="b2drop-user" name="b2drop-user" autocomplete="off" value="{user}">
    <label for="b2drop-pwd">B2DROP app password (B2DROP: Settings, Security, "Create new app password")</label>
    <input class="form-control" id="b2drop-pwd" name="b2drop-pwd" type="password" autocomplete="off">
    <label><input type="checkbox" name="b2drop-remember" value="yes" checked> Remember it for my next servers</label>
    """


def b2drop_options(form, spawner):
    """What the hub keeps in its database: never the password, which waits in the spawner's memory for the Secret."""
    user = form.get("b2drop-user", [""])[0].strip()
    spawner.b2drop_password = form.get("b2drop-pwd", [""])[0].strip()
    return {"b2drop_user": user, "b2drop_remember": "b2drop-remember" in form}


def b2drop_secret(spawner):
    """The Secret to be made from the form; None if nothing new was typed in."""
    user, password = spawner.user_options.get("b2drop_user", ""), getattr(spawner, "b2drop_password", "")
    if not user or not password:
        return None
    encoded = {key: base64.b64encode(text.encode()).decode() for key, text in (("user", user), ("password", password))}
    return {
        "apiVersion": "v1", "kind": "Secret", "type": "Opaque", "metadata": {"name": secret_name(spawner)}, "data": encoded,
    }  # fmt: skip


async def b2drop_before_spawn(spawner):
    from kubernetes_asyncio.client.rest import ApiException

    name, secret = secret_name(spawner), b2drop_secret(spawner)
    spawner.b2drop_password = ""
    try:
        if secret is not None:
            await spawner.api.create_namespaced_secret(spawner.namespace, secret)
    except ApiException as exc:
        if exc.status != 409:
            raise
        await spawner.api.patch_namespaced_secret(name, spawner.namespace, secret)
    try:
        remembered = await spawner.api.read_namespaced_secret(name, spawner.namespace)
    except ApiException as exc:
        if exc.status != 404:
            raise
        return  # a user without B2DROP
    volume = {"name": "b2drop", "secret": {"secretName": name, "defaultMode": 0o440}}
    mount = {"name": "b2drop", "mountPath": MOUNTED_AT, "readOnly": True}  # no subPath: that would never be updated
    spawner.volumes = [*(each for each in spawner.volumes if each["name"] != "b2drop"), volume]
    spawner.volume_mounts = [*(each for each in spawner.volume_mounts if each["name"] != "b2drop"), mount]
    spawner.environment = {
        **spawner.environment, "WEBDAV_URL": URL, "WEBDAV_USER": base64.b64decode(remembered.data["user"]).decode(),
        "WEBDAV_PWD_FILE": f"{MOUNTED_AT}/password",
    }  # fmt: skip


async def b2drop_after_stop(spawner):
    if not spawner.user_options.get("b2drop_remember", True):
        await spawner.api.delete_namespaced_secret(secret_name(spawner), spawner.namespace)


c = get_config()  # noqa: F821
c.KubeSpawner.options_form = b2drop_form
c.KubeSpawner.options_from_form = b2drop_options
c.KubeSpawner.pre_spawn_hook = b2drop_before_spawn
c.KubeSpawner.post_stop_hook = b2drop_after_stop
