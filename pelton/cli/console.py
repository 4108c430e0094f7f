"""What the commands write: the answer to stdout as it comes, everything else to stderr, colours on terminals only."""

from __future__ import annotations

import logging
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

PIECES = re.compile(r"\n|[^\S\n]+|\S+")
DIM, RESET = "\x1b[2m", "\x1b[0m"


class AnswerWriter:
    """Writes running text. On a terminal words are never broken at the right edge; elsewhere nothing is changed.

    A word is held back until its end is seen. Characters that fill two columns (CJK, emoji) may be broken anywhere.
    """

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.is_terminal = self.out.isatty()
        self._word = ""
        self._column = 0

    def write(self, text: str) -> None:
        """Show what can be shown of `text` now."""
        if self.is_terminal:
            pieces = PIECES.findall(self._word + text)
            self._word = pieces.pop() if pieces and not pieces[-1].isspace() else ""
            if self._word and width(self._word[-1]) == 2:
                pieces, self._word = [*pieces, self._word], ""
            text = "".join(map(self._place, pieces))
        self.out.write(text)
        self.out.flush()

    def end(self) -> None:
        """Show the rest, and end the line if there is one."""
        rest, self._word = self._place(self._word), ""
        self.out.write(rest + ("\n" if self._column or not self.is_terminal else ""))
        self.out.flush()
        self._column = 0

    def _place(self, piece: str) -> str:
        """`piece` with a line break before it where it would cross the right edge."""
        if piece == "\n":
            self._column = 0
            return piece
        columns, size = shutil.get_terminal_size().columns, sum(map(width, piece))
        can_move = size <= columns and not any(width(character) == 2 for character in piece)
        if self._column + size > columns and (piece.isspace() or can_move):
            piece = piece.strip()  # a space at the edge becomes the line break
            self._column = len(piece) and size
            return "\n" + piece
        self._column += size
        if self._column > columns:
            self._column %= columns  # the terminal broke it
        return piece


def width(character: str) -> int:
    """Columns a character fills on a terminal."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def note(text: str) -> None:
    """A line beside the answer."""
    dim, reset = (DIM, RESET) if sys.stderr.isatty() else ("", "")
    print(f"{dim}{text}{reset}", file=sys.stderr)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


@contextmanager
def log_as_notes() -> Iterator[None]:
    """Within, what pelton logs is shown as notes: from INFO on, or as --debug has set it."""
    logger, handler = logging.getLogger("pelton"), _Notes()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    if level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagate
        logger.removeHandler(handler)
