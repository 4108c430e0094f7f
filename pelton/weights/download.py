"""Fetches files over HTTP: streaming, resumable, checked by SHA-256. The one place that opens connections.

Safe against interruption (a partial file is continued), against a full disk (asked before), and, with `locked`,
against two processes that want the same file at once.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import http.client
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from pelton.errors import ModelNotFoundError

CHUNK_BYTES = 1 << 20
TRIES = 5
TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}


class TransferError(Exception):
    """A transfer that will not succeed by trying again; the message says why."""


@dataclass(frozen=True)
class Client:
    """How to reach servers: what pip's configuration says on certificates, proxy and time limit."""

    cert: str | None = None  # file of certificate authorities
    client_cert: str | None = None
    proxy: str | None = None
    trusted_hosts: tuple[str, ...] = ()  # "host" or "host:port" whose certificate is not checked
    timeout: float = 60.0  # seconds without a byte
    retry_seconds: float = 0.5  # pause before the second try; doubled for each further one

    def open(self, url: str, headers: dict[str, str] | None = None) -> Any:
        """An open response. Credentials in the URL go to its own host only, never along a redirect."""
        url, credentials = _split_credentials(url)
        if urlsplit(url).scheme not in ("http", "https", "file"):
            raise TransferError(f"{url} is no http, https or file address")
        request = urllib.request.Request(url, headers={"User-Agent": "pelton", **(headers or {})})
        if credentials:
            request.add_unredirected_header("Authorization", credentials)
        handlers: list[urllib.request.BaseHandler] = [
            urllib.request.HTTPSHandler(context=self._tls(urlsplit(url).netloc))
        ]
        if self.proxy:
            handlers.append(urllib.request.ProxyHandler({"http": self.proxy, "https": self.proxy}))
        return urllib.request.build_opener(*handlers).open(request, timeout=self.timeout)

    def _tls(self, netloc: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.cert)
        if self.client_cert:
            context.load_cert_chain(self.client_cert)
        if netloc in self.trusted_hosts or netloc.split(":")[0] in self.trusted_hosts:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def download(
    client: Client, url: str, path: Path, sha256: str | None, on_bytes: Callable[[int], None] | None = None
) -> None:
    """Fetch `url` to `path`, continuing `path`.part if it is there; `on_bytes` gets the bytes present so far.

    TransferError when the server refuses, stays away for TRIES tries in a row, or the SHA-256 is not the expected one.
    """
    part = path.with_name(path.name + ".part")
    resumed = part.exists() and part.stat().st_size > 0
    _fetch_with_retries(client, url, part, on_bytes)
    if sha256 and file_sha256(part) != sha256:
        part.unlink()
        if not resumed:
            raise TransferError(f"{public(url)} has not the SHA-256 its index gives; something altered it on the way")
        download(client, url, path, sha256, on_bytes)  # the partial file was of something else: start over, once
        return
    part.replace(path)


def _fetch_with_retries(client: Client, url: str, part: Path, on_bytes: Callable[[int], None] | None) -> None:
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            return _fetch(client, url, part, on_bytes)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in TRANSIENT_STATUS:
                raise TransferError(f"{public(url)} answers {error.code} {error.reason}") from error
            problem: Exception = error
        except (OSError, http.client.HTTPException) as error:
            problem = error
        after = part.stat().st_size if part.exists() else 0
        failures = 1 if after > before else failures + 1
        if failures >= TRIES:
            raise TransferError(f"{public(url)}: {problem}") from problem
        time.sleep(client.retry_seconds * 2 ** (failures - 1))


def _fetch(client: Client, url: str, part: Path, on_bytes: Callable[[int], None] | None) -> None:
    """One try: from where `part` ends if the server can do that, else from the start."""
    done = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    try:
        response = client.open(url, headers)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        error.close()  # nothing after `done`: the file is complete or of something else; its SHA-256 tells
        return
    with response:
        if getattr(response, "status", None) != 206:
            done = 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        if total is not None:
            need_disk(part.parent, total - done)
        with part.open("r+b" if done else "wb") as file:
            file.seek(done)
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                done += len(chunk)
                if on_bytes:
                    on_bytes(done)
    if total is not None and done < total:
        raise ConnectionError(f"the connection ended after {done:,} of {total:,} bytes")


def need_disk(folder: Path, num_bytes: int) -> None:
    """ModelNotFoundError, with the figures, unless `folder` has room for `num_bytes` more."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ModelNotFoundError(
            f"{folder} has {free / 1e6:,.0f} MB free and {num_bytes / 1e6:,.0f} MB are needed; make room, or set "
            "PELTON_CACHE or --download-dir to a larger disk"
        )


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; another process waits here until it is released, also by a crash."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def public(url: str) -> str:
    """`url` as it may be shown: without credentials."""
    return _split_credentials(url)[0]


def _split_credentials(url: str) -> tuple[str, str | None]:
    parts = urlsplit(url)
    if parts.username is None:
        return url, None
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return bare, "Basic " + base64.b64encode(login.encode()).decode()
