"""Where a password or a token comes from, and the Authorization header made of it; a refused one is never given out again.

It knows nothing of HTTP beyond that header. A secret is read when it is asked for: a file again whenever its (inode,
mtime, size) is another, a command again only after its last token was refused. Secrets appear in no message, and
neither does what a command printed.

Rotation is noticed by a stat by path: before each request, and while the mount is unauthenticated every 1.5 to 3 s
(policy.py). Not by inotify: what the kubelet does to a mounted Secret (it swaps the symlink `..data`) shows no event at the
file, NFS tells of no change by others, and a directory that is not there yet cannot be watched. A stat costs 2 us.
"""

from __future__ import annotations

import base64
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import trio

from nbmountd.config import WebDAVOptions
from nbmountd.errors import ConfigError, Unauthenticated
from nbmountd.log import register_secret

SECRET_LIMIT = 64 * 1024
"""Bytes. Tokens with many group claims reach 10 KiB; anything larger is another kind of file."""

COMMAND_TIMEOUT = 30.0
"""Seconds. A guess: an OIDC agent that has to refresh takes one or two."""

COMMAND_PAUSE = 60.0
"""Seconds after which a command whose token was refused is run again. The same token is not sent again."""


class Secret(Protocol):
    """One place that a secret comes from."""

    async def get(self, *, again: bool) -> str:
        """The secret, not empty, on one line. `again`: the last one was refused, look harder than usual.

        Raises Unauthenticated when there is none, with a text that says what would cure it.
        """

    @property
    def cure(self) -> str:
        """What a person does to bring a new secret in, as an imperative clause."""

    def fingerprint(self) -> object:
        """Something that is another one when `get` may give another secret than before. Never the secret."""


class InlineSecret:
    """A secret that stands in the configuration."""

    def __init__(self, value: str, key: str) -> None:
        self._value = value
        self._key = key

    @property
    def cure(self) -> str:
        return f"change `{self._key}` in the configuration and mount again"

    def fingerprint(self) -> object:
        return None

    async def get(self, *, again: bool) -> str:
        return _one_line(self._value, f"`{self._key}` of the configuration", self.cure)


class EnvironmentSecret:
    """A secret that an environment variable held when this object was made: the environment of a process is fixed."""

    def __init__(self, variable: str) -> None:
        self._variable = variable
        self._value = os.environ.get(variable, "")

    @property
    def cure(self) -> str:
        return f"set the environment variable {self._variable} and start again"

    def fingerprint(self) -> object:
        return None

    async def get(self, *, again: bool) -> str:
        return _one_line(self._value, f"the environment variable {self._variable}", self.cure)


class FileSecret:
    """A secret in a file that others replace or rewrite at any time.

    While the file is missing, empty or unreadable the last good secret stays in use: a writer that removes and creates,
    or truncates and writes, leaves such gaps. A half-written one cannot be told from a whole one; it is refused by the
    server, and the whole one is another file state, so it is read then.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._seen: tuple[int, int, int] | None = None
        self._value: str | None = None

    @property
    def cure(self) -> str:
        return f"write a valid one to {self._path}"

    def fingerprint(self) -> object:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    async def get(self, *, again: bool) -> str:
        try:
            self._read(always=again)
        except (OSError, Unauthenticated) as exc:
            if self._value is None:
                reason = exc.strerror if isinstance(exc, OSError) else str(exc)
                raise Unauthenticated(f"{self._path}: {reason}; {self.cure}") from None
        assert self._value is not None
        return self._value

    def _read(self, *, always: bool) -> None:
        # Opened by path each time: a mounted secret is a symlink that is swapped, and an old descriptor sees the old file.
        status = self._path.stat()
        state = (status.st_ino, status.st_mtime_ns, status.st_size)
        if state == self._seen and not always:
            return
        with self._path.open("rb") as file:
            opened = os.fstat(file.fileno())
            data = file.read(SECRET_LIMIT + 1)
        self._value = _one_line(data.decode("utf-8", "replace"), "the file", self.cure)
        self._seen = (opened.st_ino, opened.st_mtime_ns, len(data))


class CommandSecret:
    """A secret that a command prints. It runs once, and again when its secret was refused."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = tuple(command)
        self._value: str | None = None

    @property
    def cure(self) -> str:
        return f"make the command `{self._command[0]}` print a valid one"

    def fingerprint(self) -> object:
        """Another one every COMMAND_PAUSE: only running the command would tell."""
        return int(trio.current_time() // COMMAND_PAUSE)

    async def get(self, *, again: bool) -> str:
        if self._value is None or again:
            self._value = await self._run()
        return self._value

    async def _run(self) -> str:
        name = f"the command `{self._command[0]}`"
        try:
            with trio.fail_after(COMMAND_TIMEOUT):
                done = await trio.run_process(
                    list(self._command), capture_stdout=True, stderr=subprocess.DEVNULL, stdin=b"", check=False
                )
        except trio.TooSlowError:
            raise Unauthenticated(f"{name} did not end within {COMMAND_TIMEOUT:.0f} s; {self.cure}") from None
        except OSError as exc:
            raise Unauthenticated(f"{name} cannot be run ({exc.strerror}); {self.cure}") from None
        if done.returncode != 0:
            raise Unauthenticated(f"{name} ended with status {done.returncode}; {self.cure}")
        return _one_line(bytes(done.stdout or b"").decode("utf-8", "replace"), name, self.cure)


class Credential:
    """The Authorization header of one mount.

    `scheme` makes the header value of the secret. `secret` None: nothing is sent. `header_name` is for services that want
    it in a header of their own.
    """

    def __init__(
        self, secret: Secret | None, scheme: Callable[[str], str], *, header_name: str = "Authorization"
    ) -> None:
        self.header_name = header_name
        self._secret = secret
        self._scheme = scheme
        self._refused: set[str] = set()
        self._masked = ""

    async def authorization(self) -> str | None:
        """The header value to send now, None for anonymous access.

        Raises Unauthenticated when there is no secret, or none that was not refused already.
        """
        if self._secret is None:
            if self._refused:
                raise Unauthenticated(
                    "the server asks for a log-in; give `user` with `password_file`, or `token_file`, to this mount"
                )
            return None
        header = self._header(await self._secret.get(again=False))
        if header in self._refused:
            header = self._header(await self._secret.get(again=True))
        if header in self._refused:
            raise Unauthenticated(f"the server refuses the credential (401); {self._secret.cure}")
        return header

    def _header(self, secret: str) -> str:
        header = self._scheme(secret)
        if header != self._masked:  # in logs, from now on
            register_secret(secret)
            register_secret(header.partition(" ")[2])
            self._masked = header
        return header

    def fingerprint(self) -> object:
        """Equal as long as there is no other secret to try. Never the secret."""
        return None if self._secret is None else self._secret.fingerprint()

    def refuse(self, header: str | None) -> None:
        """Notes that the server answered 401 to `header`: it is never given out again."""
        self._refused.add(header or "")


def basic(user: str, secret: Secret) -> Credential:
    """HTTP Basic with `user` and the password in `secret` (RFC 7617, UTF-8)."""

    def header(password: str) -> str:
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode("ascii")

    return Credential(secret, header)


def bearer(secret: Secret) -> Credential:
    """A bearer token (RFC 6750)."""
    return Credential(secret, lambda token: f"Bearer {token}")


def anonymous() -> Credential:
    """No Authorization header at all."""
    return Credential(None, lambda _: "")


def credential_for(options: WebDAVOptions) -> Credential:
    """The credential that a WebDAV mount is configured with. Raises ConfigError when the keys do not fit together."""
    secrets: list[tuple[str, Secret]] = []
    if options.password is not None:
        secrets.append(("password", InlineSecret(options.password, "password")))
    if options.password_file is not None:
        secrets.append(("password", FileSecret(options.password_file)))
    if options.password_env is not None:
        secrets.append(("password", EnvironmentSecret(options.password_env)))
    if options.token_file is not None:
        secrets.append(("token", FileSecret(options.token_file)))
    if options.token_env is not None:
        secrets.append(("token", EnvironmentSecret(options.token_env)))
    if options.token_command:
        secrets.append(("token", CommandSecret(options.token_command)))
    if not secrets and options.user is None:
        return anonymous()
    if len(secrets) != 1:
        raise ConfigError("webdav: give exactly one of password, password_file, password_env, token_file, token_env, "
                          "token_command")
    kind, secret = secrets[0]
    if kind == "token":
        return bearer(secret)
    if options.user is None:
        raise ConfigError("webdav: a password needs `user`")
    if ":" in options.user:
        raise ConfigError("webdav: `user` must not contain a colon (RFC 7617)")
    return basic(options.user, secret)


def _one_line(text: str, where: str, cure: str) -> str:
    """`text` without the newline and blanks around it. Raises Unauthenticated if that is not one printable line."""
    secret = text.strip()
    if not secret:
        raise Unauthenticated(f"{where} is empty; {cure}")
    if len(secret) > SECRET_LIMIT or not secret.isprintable():
        raise Unauthenticated(f"{where} does not hold one line of text; {cure}")
    return secret
