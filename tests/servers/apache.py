"""Apache httpd with mod_dav: the strict server. Weak ETags in a file's first second, conditions honoured, atomic PUT."""

from __future__ import annotations

import base64
import grp
import hashlib
import os
import pwd
from pathlib import Path

from tests.servers.process import ServerMissing, ServerProcess, program

MODULES = Path("/usr/lib/apache2/modules")
NEEDED = (
    "mpm_event", "authn_core", "authn_file", "authz_core", "authz_user", "auth_basic", "dav", "dav_fs", "dir", "mime", "headers"
)  # fmt: skip
CAPABILITIES = "+dac_override,+dac_read_search,+fowner"

CONFIGURATION = """
ServerName 127.0.0.1
ServerRoot {work}
Listen 127.0.0.1:{port}
PidFile {work}/pid
ErrorLog {work}/error.log
LogLevel warn
LogFormat "%m %U %>s" short
CustomLog {work}/requests.log short
DefaultRuntimeDir {work}
Mutex file:{work}
TypesConfig /dev/null
Timeout 60
KeepAlive On
KeepAliveTimeout 30
MaxKeepAliveRequests 0
StartServers 1
ServerLimit 4
ThreadsPerChild 25
MaxRequestWorkers 100
MinSpareThreads 10
MaxSpareThreads 75
EnableSendfile On
AllowEncodedSlashes NoDecode
LimitRequestBody 0
LimitXMLRequestBody 0
DavLockDB {work}/locks
DocumentRoot {work}
Alias {prefix} {root}/
<Location {prefix}>
  Dav On
  DirectorySlash Off
  {extra}
  AuthType Basic
  AuthName nbmountd
  AuthUserFile {work}/users
  Require valid-user
</Location>
"""


class ApacheServer(ServerProcess):
    """`extra` is put into the section of the share, for tests of odd set-ups."""

    def __init__(
        self, root: Path, work: Path, user: str = "alice", password: str = "wonderland", *, extra: str = ""
    ) -> None:
        self._extra = extra
        super().__init__(root, work, user, password)

    def configure(self) -> None:
        modules = [*NEEDED, "alias"]
        if missing := [name for name in modules if not (MODULES / f"mod_{name}.so").exists()]:
            raise ServerMissing(f"apache2 lacks the modules {missing}; the tests need the Debian package apache2")
        text = "".join(f"LoadModule {name}_module {MODULES}/mod_{name}.so\n" for name in modules)
        text += CONFIGURATION.format(work=self.work, port=self.port, prefix=self.prefix, root=self.root, extra=self._extra)
        (self.work / "apache.conf").write_text(text)
        self.set_password(self.password)
        if os.geteuid() == 0:
            self._hand_over(self.work)

    def set_password(self, password: str) -> None:
        """The password that counts from the next request on; Apache reads the file each time."""
        self.password = password
        digest = base64.b64encode(hashlib.sha1(password.encode(), usedforsecurity=False).digest()).decode()
        users = self.work / "users"
        users.with_suffix(".new").write_text(f"{self.user}:{{SHA}}{digest}\n")
        users.with_suffix(".new").replace(users)

    def command(self) -> list[str]:
        configuration = str(self.work / "apache.conf")
        command = [program("apache2", "apache2"), "-D", "FOREGROUND", "-d", str(self.work), "-f", configuration]
        if os.geteuid() != 0:
            return command
        # Apache refuses to serve as root.
        return [
            program("setpriv", "util-linux"), "--reuid=www-data", "--regid=www-data", "--clear-groups",
            f"--inh-caps={CAPABILITIES}", f"--ambient-caps={CAPABILITIES}", *command,
        ]  # fmt: skip

    def _hand_over(self, directory: Path) -> None:
        uid, gid = pwd.getpwnam("www-data").pw_uid, grp.getgrnam("www-data").gr_gid
        for path in (directory, *directory.iterdir()):
            os.chown(path, uid, gid)
