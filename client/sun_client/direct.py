"""HTTP to a server of ours without the environment's proxies: with `http_proxy` set, urllib would ask the proxy even for 127.0.0.1."""

from __future__ import annotations

import urllib.request
from http.client import HTTPResponse

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def urlopen(request: str | urllib.request.Request, timeout: float) -> HTTPResponse:
    """As `urllib.request.urlopen`, whose errors it raises. timeout: in seconds."""
    return _opener.open(request, timeout=timeout)
