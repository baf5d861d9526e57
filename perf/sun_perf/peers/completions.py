"""The OpenAI completions protocol, streamed, as llama.cpp and vLLM speak it; http.client, because a heavier one would take the peer's cores."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable, Iterator

TIMEOUT_S = 600.0


def stream(port: int, prompt: list[int], tokens: int, **more: object) -> Iterator[int]:
    """Ask a server on this machine; for each piece 0, and at last the number of tokens that the server says it made.

    prompt: token ids. more: further fields of the request. Greedy, and the end-of-sequence token does not end it.
    Raises RuntimeError with the server's own words if it refuses.
    """
    body = {
        "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, **more}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"port {port} answered {response.status}: {response.read(2000).decode(errors='replace')}")
        yield from pieces(response)
    finally:
        connection.close()


def pieces(lines: Iterable[bytes]) -> Iterator[int]:
    """Server-sent events -> 0 for each that carries text, the number of generated tokens for the one with the usage.

    Raises RuntimeError on an error event, and if the stream ends without [DONE] or without usage.
    """
    used, done = None, False
    for line in lines:
        field, _, data = line.decode().strip().partition(":")
        if field == "error" or (field == "data" and '"error"' in data and "choices" not in data):
            raise RuntimeError(f"the server broke the stream off: {data.strip()[:400]}")
        if field != "data":
            continue
        if data.strip() == "[DONE]":
            done = True
            break
        event = json.loads(data)
        if event.get("choices"):
            yield 0
        used = (event.get("usage") or {}).get("completion_tokens", used)
    if not done or used is None:
        raise RuntimeError("the stream ended without " + ("its usage" if done else "[DONE]"))
    yield used
