"""The file of inference keys: who may ask what, and how much of it. It holds no key, only what tells that one is right."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from sun.readable import readable_json

PREFIX = "sun-"
"""What all keys begin with, so that scanners for leaked secrets can know them."""
Positive = Annotated[int, msgspec.Meta(ge=1)]


class Key(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """One key: its name, the SHA-256 of the key in hexadecimal digits, and its bounds, None for no bound.

    requests_per_minute, tokens_per_minute (prompts and whole answers), max_inflight: of its requests. tasks: those it may ask.
    priority_class: the highest it may ask for.
    """

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    max_inflight: Positive | None = None
    tasks: list[str] | None = None
    priority_class: Literal["high", "normal", "low"] = "normal"


class KeyFile(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The file's content, as JSON."""

    keys: list[Key]


def digest(key: str) -> str:
    """A key's SHA-256, hexadecimal. A key is 256 random bits: nobody tries them all, so no salt and no slow hash is needed."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def read(path: Path) -> list[Key]:
    """The keys in a file. Raises ValueError naming the file and what is wrong with it, OSError if it cannot be read."""
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise ValueError(f"keys: {path} has mode {mode:04o}, others may read or write it; run `chmod 600 {path}`")
        data = file.read()
    try:
        keys = msgspec.json.decode(data, type=KeyFile).keys
    except msgspec.DecodeError as error:
        raise ValueError(f"keys: {path}: {error}") from error
    for field in ("name", "sha256"):
        values = [getattr(key, field) for key in keys]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise ValueError(f"keys: {path}: {field} {twice[0]} is there twice")
    return keys


def add(path: Path, name: str, **bounds: object) -> str:
    """Add a key to a file, which is made if there is none; the key itself, which is kept nowhere. Bounds: see `Key`.

    Raises ValueError naming what is wrong.
    """
    secret = PREFIX + secrets.token_urlsafe(32)
    try:
        key = msgspec.convert({"name": name, "sha256": digest(secret), **bounds}, Key)
    except msgspec.ValidationError as error:
        raise ValueError(f"key: {error}") from error
    with _changing(path) as keys:
        if any(other.name == name for other in keys):
            raise ValueError(f"key {name!r} exists already; to change it, add one of another name, then remove this one")
        keys.append(key)
    return secret


def remove(path: Path, name: str) -> None:
    """Take a key out of a file. Raises ValueError if it is not there."""
    with _changing(path) as keys:
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            raise ValueError(f"there is no key {name!r} in {path}")
        keys[:] = left


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[list[Key]]:
    """The keys of a file, to be changed in place; written as a whole, so that a reader never sees a half, and one at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        keys = read(path) if path.exists() else []
        yield keys
        part = path.with_name(f".{path.name}.part")
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(readable_json(KeyFile(keys)))
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        os.close(folder)
