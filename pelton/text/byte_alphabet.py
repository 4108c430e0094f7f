"""The alphabet of byte-level BPE (GPT-2): each byte is spelled as one printable character."""

from __future__ import annotations


def _byte_to_char() -> str:
    """Printable Latin-1 bytes stand for themselves, the other bytes for the characters from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


BYTE_TO_CHAR = _byte_to_char()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}
