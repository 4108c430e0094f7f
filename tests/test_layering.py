"""Imports only point down the path, heavy libraries stay where they belong, and dangerous calls stay out."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "pelton"
FILES = sorted(ROOT.rglob("*.py"))
# From the top of the path to its bottom. A module may import its own layer and those below.
LAYERS = [
    ["pelton.entrypoints", "pelton.__main__"],
    ["pelton.cli"],
    ["pelton.server"],
    ["pelton.llm", "pelton.async_llm", "pelton.door", "pelton.vllm_options", "pelton.progress"],
    ["pelton.build"],
    ["pelton.text"],
    ["pelton.engine"],
    ["pelton.runner"],
    ["pelton.models"],
    ["pelton.layers"],
    ["pelton.quant", "pelton.weights.checkpoint", "pelton.weights.dummy"],
    ["pelton.weights"],
    ["pelton.ops"],
    ["pelton.engine.step"],  # the records that cross between engine and runner
    ["pelton.config"],
    ["pelton.types"],
    ["pelton.errors"],
    ["pelton._cpu"],
]
# layer -> the top-level packages that must not be imported by it, not even inside a function
NEVER = {
    "pelton.engine": {"torch"},
    "pelton.text": {"torch"},
    "pelton.server": {"torch"},
    "pelton.weights.hub": {"torch"},
    "pelton.weights.download": {"torch"},
    "pelton.weights.package_index": {"torch"},
    "pelton.weights.files": {"torch"},
    "pelton.weights.gguf": {"torch"},
    "pelton.weights.safetensors": {"torch"},
}
HTTP_CLIENTS = {"urllib.request", "urllib.error", "http.client", "httpx", "requests", "aiohttp", "urllib3",
                "huggingface_hub", "modelscope"}
MAY_FETCH = {"pelton.weights.hub", "pelton.weights.download", "pelton.weights.package_index", "pelton.cli.bench_serve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_IMPORTS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST, *, typing_only: bool = False) -> Iterator[str]:
    """All modules that are imported, also inside functions; those under `if TYPE_CHECKING` only on request."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing_only:
            continue
        yield from imports(node, typing_only=typing_only)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layer_of(module: str) -> int | None:
    """The layer with the longest name that fits."""
    fits = [(len(name), i) for i, layer in enumerate(LAYERS) for name in layer if is_in(module, name)]
    return max(fits)[1] if fits else None


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    module, tree = name_of(path), ast.parse(path.read_text())
    if module == "pelton":
        return  # the public names, loaded when they are used
    here = layer_of(module)
    assert here is not None, f"{module} is in no layer: add it to LAYERS"
    for imported in imports(tree, typing_only=True):
        there = layer_of(imported)
        assert there is None or there >= here, f"{module} imports {imported}, which is above it"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_libraries_stay_where_they_belong(path: Path) -> None:
    module, found = name_of(path), set(imports(ast.parse(path.read_text())))
    for package, banned in NEVER.items():
        if is_in(module, package):
            assert not {name for name in found if name.split(".")[0] in banned}
    if module not in MAY_FETCH:
        clients = {name for name in found for client in HTTP_CLIENTS if is_in(name, client)}
        assert not clients, f"{module} must not open connections"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_dangerous_constructs_stay_out(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not {name for name in imports(tree) if name.split(".")[0] in FORBIDDEN_IMPORTS}
    invariants = {  # check() states what must always hold; it is called by tests, and when idle
        id(statement)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.lstrip("_").startswith("check")
        for statement in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            assert id(node) in invariants, f"assert in line {node.lineno}: it is gone under python -O"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in FORBIDDEN_CALLS, f"{called} in line {node.lineno}"
            assert called != "os.system", f"{called} in line {node.lineno}"
            assert not any(k.arg == "shell" for k in node.keywords), f"shell= in line {node.lineno}"


def loaded_after(code: str, *names: str) -> set[str]:
    """Which of `names` a fresh interpreter has loaded after `code`."""
    script = f"import sys\n{code}\nprint(*[n for n in {names!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_pelton_is_light() -> None:
    assert not loaded_after("import pelton", "torch", "numpy", "rich", "starlette", "tokenizers")


def test_the_servers_process_has_no_torch() -> None:
    assert not loaded_after("import pelton.server.run, pelton.async_llm, pelton.cli.serve", "torch")


def test_the_python_door_needs_no_server_packages() -> None:
    assert not loaded_after(
        "import pelton; pelton.LLM; import pelton.build",
        "starlette", "uvicorn", "pydantic", "msgpack", "prometheus_client", "rich", "huggingface_hub", "httpx",
    )


def test_help_is_light() -> None:
    assert not loaded_after("import pelton.cli.main", "torch", "numpy", "rich", "dataclasses", "starlette")
