"""The documents name only files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"(?<![\w/.~-])((?:[\w.-]+/)*[\w-]+\.(?:py|md|h|cpp|inl|toml|json|txt|sh)|(?:[\w.-]+/)+)(?![\w/*])")
ELSEWHERE = {"config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json", "x.py", "x.inl"}


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_every_path_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    quoted = re.findall(r"`([^`\n]+)`", text) + [line for line in text.splitlines() if re.match(r"^ \d+ ", line)]
    paths = {path for quote in quoted for path in NAMED.findall(quote)}
    assert paths or document == "README.md"
    missing = [
        path for path in sorted(paths)
        if Path(path).name not in ELSEWHERE and not any((base / path).exists() for base in (ROOT, ROOT / "pelton"))
        and not path.startswith(("models/x", "pelton/models/x", "v1/"))
    ]
    assert not missing
