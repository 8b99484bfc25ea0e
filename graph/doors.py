"""Who may speak to Billhook's servers: their own pages and, where the server is Studio's, Studio's page.

Any page that is open in a browser on this machine can send requests to a server that listens on loopback. Two headers
that no page can set tell them apart. `Host` is the name that the browser asked for: another one than loopback's is a
foreign name that was made to point here (DNS rebinding). `Origin` is the page that asks. CORS headers alone would not
do: they keep answers from a page, but a simple request (a POST of plain text, say) is sent, and done, without asking.
Programs send no `Origin`; who can run one here can read the runs anyway.
"""

import re
from collections.abc import Collection, Sequence

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

STUDIO = "https://smith.langchain.com"
"""The origin of Studio's page, as `langgraph dev` and `graph.studio` print it."""
CLOSED = ("/deploy", "/internal")
"""What `langgraph dev` offers beside its API: to upload the present directory to LangSmith, and to empty its memory."""

FOREIGN_HOST = "refused: this server answers to 127.0.0.1 and localhost alone, not to the name that was asked for"
FOREIGN_ORIGIN = "refused: pages of other origins may not speak to this server"
NO_SUCH_PAGE = "refused: Billhook does not serve this"

LOOPBACK = r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?"
LOOPBACK_ORIGIN = rf"https?://{LOOPBACK}"


def judge(hosts: Sequence[str], origins: Sequence[str], pages: Collection[str] = ()) -> tuple[int, str]:
    """(status, reason) of a refusal, by all `Host` and `Origin` headers of a request; (0, "") where it may pass.

    `pages` are the origins that may ask beside the server's own, which is any of loopback's names with its port.
    """
    asked = re.fullmatch(LOOPBACK, hosts[0].lower()) if len(hosts) == 1 else None
    if asked is None:
        return 400, FOREIGN_HOST
    for origin in origins:
        own = re.fullmatch(LOOPBACK_ORIGIN, origin)
        if origin not in pages and (own is None or own[2] != asked[2]):
            return 403, FOREIGN_ORIGIN
    return 0, ""


class Doors:
    """ASGI middleware that refuses what `judge` refuses, requests and WebSockets alike, before anything is done."""

    def __init__(self, app: ASGIApp, pages: Collection[str] = (), closed: Collection[str] = ()) -> None:
        """`closed` are paths of the app that nobody may ask for, with all beneath them."""
        self._app, self._pages, self._closed = app, pages, closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):  # the server itself, as it starts and ends
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        status, reason = judge(headers.getlist("host"), headers.getlist("origin"), self._pages)
        if not status and any(f"{scope['path']}/".startswith(f"{path}/") for path in self._closed):
            status, reason = 404, NO_SUCH_PAGE
        if not status:
            await self._app(without_network(scope), receive, send)
        elif scope["type"] == "http":
            await PlainTextResponse(f"{reason}\n", status)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": reason})


def without_network(scope: Scope) -> Scope:
    """The scope of a request that passed without the question whether a page of the internet may ask a private network.

    `langgraph dev` answers it for whatever passes; Starlette's CORS, which comes after, would refuse it unanswered.
    """
    asked = b"access-control-request-private-network"
    return {**scope, "headers": [(name, value) for name, value in scope["headers"] if name != asked]}


app = Starlette(middleware=[Middleware(Doors, pages=[STUDIO], closed=CLOSED)])
"""For `langgraph dev`, which puts its own routes behind this app's middleware (see langgraph.json)."""
