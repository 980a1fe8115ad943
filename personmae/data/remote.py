"""Stores of files that are named by addresses: s3://, gs://, https://, file:// and whatever else fsspec knows. The one file that knows fsspec.

Keys and passwords come from where each store's own tools look for them (its environment variables and files, and fsspec's configuration). An address
may hold some nevertheless, so what is shown or written is always `redacted`.
"""

from __future__ import annotations

import os
import posixpath
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import unquote

from personmae.configs import UserError

Result = TypeVar("Result")

BLOCK_BYTES = 8 << 20
_LONGEST_PAUSE_SECONDS = 30.0
# Questions to a store at the same time: each is a round trip and nothing else.
_QUESTIONS_AT_ONCE = 16
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_USER = re.compile(r"(?<=://)[^/\s]*@")
_QUERY = re.compile(r"""(://[^\s?#'"]*)[?#][^\s'")>]*""")
_WEB = ("http", "https")
_PACKAGES = {
    **dict.fromkeys(["s3", "s3a"], "s3fs"),
    **dict.fromkeys(["gs", "gcs"], "gcsfs"),
    **dict.fromkeys(["az", "abfs", "abfss", "adl"], "adlfs"),
    **dict.fromkeys(["sftp", "ssh"], "paramiko"),
    **dict.fromkeys(_WEB, "aiohttp requests"),
}


class StoreError(Exception):
    """A store does not give what it was asked for. lasting: asking again would not help. The message holds no password."""

    def __init__(self, message: str, *, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


def is_address(source: str | Path) -> bool:
    """Whether a source is the address of a store, such as s3://bucket/pack, and no path."""
    return isinstance(source, str) and _SCHEME.match(source) is not None


def redacted(text: str) -> str:
    """A text with the user, password and query of every address in it replaced by stars. Of an ordinary path nothing changes."""
    return _QUERY.sub(r"\1?***", _USER.sub("***@", text))


def retried(attempt: Callable[[], Result], retries: int, pause: float, sleep: Callable[[float], object] = time.sleep) -> Result:
    """What `attempt()` gives, tried again after a pause when it raises StoreError, each pause twice as long. The last error is passed on."""
    for _ in range(retries):
        try:
            return attempt()
        except StoreError as error:
            if error.lasting:
                raise
        sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    return attempt()


class Store:
    """The files below an address. It connects when it is first asked, each process for itself, and can be sent to another.

    label: the address as it may be shown, without a slash at its end.
    """

    def __init__(self, address: str) -> None:
        scheme = _SCHEME.match(address)
        if scheme is None:
            raise ValueError(f"{redacted(address)} is no address")
        self._protocol = scheme[1].lower()
        # The query of a web address belongs behind the names of its files.
        base, mark, query = address.partition("?") if self._protocol in _WEB else (address, "", "")
        self._base, self._query = base.rstrip("/"), mark + query
        self.label = redacted(self._base)
        user = _USER.search(address)
        secrets = [query, *(user[0][:-1].partition(":")[::2] if user else ())]
        self._secrets = [word for secret in secrets for word in (secret, unquote(secret)) if len(word) > 3]
        self._connected: tuple[int, Any, str] | None = None

    def __repr__(self) -> str:
        return f"Store({self.label!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connected": None}

    def blocks(self, name: str, num_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
        """The content of a file, in order, at most `num_bytes` at a time. Raises StoreError."""
        filesystem, root = self._connect()
        # Without a cache of fsspec's own each read is one request for just that range.
        options = {"block_size": num_bytes, "cache_type": "none"}
        with _Explaining(self, name), filesystem.open(f"{root}/{name}{self._query}", "rb", **options) as file:
            while block := file.read(num_bytes):
                yield block

    def sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """Name -> bytes (None if the store does not tell) of those of these files that are there. Raises StoreError."""
        filesystem, root = self._connect()
        filesystem.invalidate_cache()
        listed: dict[str, int | None] = {}
        if self._protocol not in _WEB:
            # One request for a thousand files. A store may forbid listing and still answer for each file.
            try:
                with _Explaining(self, ""):
                    listed = {posixpath.basename(entry["name"]): entry.get("size") for entry in filesystem.ls(root, detail=True)}
            except StoreError:
                listed = {}
        wanted = list(names)

        def ask(name: str) -> tuple[str, bool, int | None]:
            try:
                with _Explaining(self, name):
                    return name, True, filesystem.info(f"{root}/{name}{self._query}").get("size")
            except StoreError as error:
                if not error.lasting:
                    raise
                return name, False, None

        with ThreadPoolExecutor(_QUESTIONS_AT_ONCE, thread_name_prefix="store") as pool:
            answers = pool.map(ask, [name for name in wanted if listed.get(name) is None])
            asked = {name: size for name, there, size in answers if there}
        known = {name: size for name in wanted if (size := listed.get(name)) is not None}
        return {name: known.get(name, asked.get(name)) for name in wanted if name in known or name in asked}

    def hide(self, text: str) -> str:
        """A text without the secrets of this address."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return redacted(text)

    def _connect(self) -> tuple[Any, str]:
        # Clients with threads of their own do not live through a fork.
        if self._connected is None or self._connected[0] != os.getpid():
            fsspec = _import_fsspec()
            try:
                with _Explaining(self, ""):
                    filesystem, root = fsspec.core.url_to_fs(self._base)
            except ImportError as error:
                package = _PACKAGES.get(self._protocol)
                cure = f"pip install {package}" if package else "install it"
                raise UserError(f"{self.label} needs a package that is not installed ({error}): {cure}") from error
            except ValueError as error:
                raise UserError(f"{self.label} cannot be used: {self.hide(str(error))}; give s3://, gs://, https:// or file://") from None
            self._connected = os.getpid(), filesystem, root.rstrip("/")
        return self._connected[1], self._connected[2]


class _Explaining:
    """Turns what a store's client raises into StoreError.

    Every client has errors of its own and they have no base in common, so they are told from mistakes of ours by where they are from: outside of
    Python's built-in classes, OSError and EOFError aside. The original is not kept: its text may hold a password.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, OSError | EOFError) or (isinstance(error, Exception) and type(error).__module__ != "builtins"):
            missing = isinstance(error, FileNotFoundError)
            reason = "it is not there" if missing else f"{type(error).__name__}: {self._store.hide(' '.join(str(error).split()))}".rstrip(": ")
            raise StoreError(f"{self._store.label}/{self._name}: {reason}".replace("/:", ":"), lasting=missing) from None


def _import_fsspec() -> Any:
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise UserError("reading from an address needs fsspec, which is not installed: pip install fsspec") from error
    return fsspec
