"""The remotes of docker/compose.yaml: the test servers of tests/servers with something in them, and a configuration for them.

    python docker/doubles/serve.py DIRECTORY      # from the top of the repository; until it is ended

DIRECTORY is shared with the notebook's container: `config.toml` is there when everything answers.
"""

import sys
import threading
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.servers.d4science_double import D4ScienceServer
from tests.servers.fake_nextcloud import FakeNextcloud
from tests.servers.onedata_double import DoubleOutside, OnedataDouble

CONFIG = """
[[mount]]
name = "b2drop"
path = "~/b2drop"
backend = "nextcloud"
url = "{nextcloud.origin}"
user = "{nextcloud.user}"
password_file = "{place}/password"

[[mount]]
name = "datahub"
path = "~/datahub"
backend = "onedata"
onezone = "{onedata.zone_host}"
oneprovider = "{onedata.krakow_host}"
checkin_token_file = "{place}/checkin"
ca_bundle = "{place}/authority.pem"

[[mount]]
name = "workspace"
path = "~/workspace"
backend = "d4science"
url = "{storagehub.url}"
token_file = "{place}/workspace"
"""


def main() -> None:
    place = Path(sys.argv[1])
    with ExitStack() as stack:
        nextcloud = stack.enter_context(FakeNextcloud(place / "b2drop", place / "nextcloud"))
        onedata = stack.enter_context(OnedataDouble(place / "onedata"))
        storagehub = stack.enter_context(D4ScienceServer(place / "storagehub"))
        (nextcloud.root / "welcome.txt").write_text("This is B2DROP's place.\n")
        onedata.add_space("ocean", "Ocean")
        DoubleOutside(onedata, "ocean").write("welcome.txt", b"This is a space of DataHub.\n")
        user = storagehub.new_user("ada")
        user.write("welcome.txt", b"This is the workspace.\n")
        secrets = {
            "password": nextcloud.password, "checkin": "checkin-alice", "workspace": user.token,
            "authority.pem": Path(onedata.ca_bundle).read_text(),
            "config.toml": CONFIG.format(place=place, nextcloud=nextcloud, onedata=onedata, storagehub=storagehub),
        }  # fmt: skip
        for name, text in secrets.items():
            (place / f".{name}").write_text(text)
            (place / f".{name}").chmod(0o644)  # another uid reads it; nothing here is secret
            (place / f".{name}").rename(place / name)
        threading.Event().wait()


if __name__ == "__main__":
    main()
