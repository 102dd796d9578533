"""Log-in Flow v2 of a Nextcloud: a person agrees in a browser, wherever that is, and we get a password of our own.

It knows nothing of where the password is kept. An app password costs the server less than the one for the web pages, and she
can revoke it alone. What the server answers is hostile input: it may send us nowhere but to itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import trio

from nbmountd.backends.credentials import anonymous
from nbmountd.backends.http import HTTPClient
from nbmountd.backends.http_errors import error_of
from nbmountd.backends.http_exchange import Answer
from nbmountd.backends.nextcloud import split_address
from nbmountd.config import WebDAVOptions
from nbmountd.errors import RemoteProtocolError, RemoteTimeout, RemoteUnavailable, Unauthenticated
from nbmountd.log import register_secret

PATIENCE = 20 * 60.0
"""Seconds for which the server keeps an offer."""

POLL = 2.0
"""Seconds between questions."""


@dataclass(frozen=True)
class Granted:
    """What the person has granted. `user` is the name to log in with."""

    user: str
    password: str


async def log_in(options: WebDAVOptions, show: Callable[[str], None], *, poll: float = POLL) -> Granted:
    """A new app password for the server of `options.url`; `show` gets the address of the page where to agree.

    Raises RemoteTimeout when nobody did, RemoteError when the server does not offer it.
    """
    base = split_address(urlsplit(options.url).path)[0]
    http = HTTPClient(
        options.url, credential=anonymous(), connections=1, timeout=options.request_timeout, ca_bundle=options.ca_bundle
    )
    try:
        answer = await http.request("POST", f"{http.origin}{base}/index.php/login/v2", body=b"")
        if answer.status in (404, 405):
            raise RemoteProtocolError(f"{http.origin} offers no log-in for programs: it is no Nextcloud, or it is switched off")
        if answer.status >= 300:
            raise error_of(answer, "POST login/v2")
        offer = _parsed(answer)
        asking = offer.get("poll")
        if not isinstance(asking, dict):
            raise RemoteProtocolError("an answer to the log-in that lacks something")
        page, endpoint, token = (_text(each) for each in (offer.get("login"), asking.get("endpoint"), asking.get("token")))
        for address in (page, endpoint):
            parts = urlsplit(address)
            if f"{parts.scheme}://{parts.netloc}" != http.origin or not address.isprintable() or " " in address:
                raise RemoteProtocolError(f"{http.origin} sends us elsewhere to log in; its configured address may be wrong")
        register_secret(token)
        show(page)
        with trio.move_on_after(PATIENCE):
            return await _granted(http, endpoint, token, poll)
        raise RemoteTimeout("nobody has agreed in time; begin again")
    finally:
        await http.aclose()


async def _granted(http: HTTPClient, endpoint: str, token: str, poll: float) -> Granted:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    while True:
        try:
            answer = await http.request("POST", endpoint, headers=form, body=f"token={quote(token, safe='')}".encode())
        except (RemoteUnavailable, RemoteTimeout):
            answer = Answer(404, {})  # the line is bad: it is asked again
        if answer.status == 200:
            told = _parsed(answer)
            user, password = _text(told.get("loginName")), _text(told.get("appPassword"))
            register_secret(password)
            return Granted(user, password)
        if answer.status not in (404, 429) and answer.status < 500:
            raise Unauthenticated(f"the server ends the log-in (status {answer.status}); begin again")
        await trio.sleep(poll)


def _parsed(answer: Answer) -> dict[str, object]:
    try:
        found = json.loads(answer.body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RemoteProtocolError("an answer to the log-in that makes no sense")
    return found


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or len(value) > 4096 or not value.isprintable():
        raise RemoteProtocolError("an answer to the log-in that lacks something")
    return value
