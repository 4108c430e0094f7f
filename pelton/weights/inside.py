"""File names taken from a checkpoint must not lead out of its folder."""

from __future__ import annotations

from pathlib import Path

from pelton.errors import ModelFormatError
from pelton.weights.fields import shorten


def child(folder: Path, name: str) -> Path:
    """The file `name` in `folder`; ModelFormatError if the name is a path or a link that leads elsewhere.

    One kind of link is expected: in the cache of Hugging Face, `snapshots/<revision>/<name>` points to `blobs/<hash>`.
    """
    if not name or name in (".", "..") or any(char in name for char in "/\\:\0"):
        raise ModelFormatError(f"{shorten(name)} is not the plain name of a file in {folder}")
    path = folder / name
    real, root = path.resolve(), folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if real.parent not in (root, blobs):
        raise ModelFormatError(f"{name} in {folder} is a link that leads out of the folder; copy the file instead")
    if not real.is_file():
        raise ModelFormatError(f"{name} is missing in {folder}; is the download complete?")
    return path


def optional_child(folder: Path, name: str) -> Path | None:
    """The file `name` in `folder`, or None if there is nothing of that name."""
    path = folder / name
    return child(folder, name) if path.exists() or path.is_symlink() else None
