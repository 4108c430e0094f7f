"""Text to token ids and back. One class for all vocabularies: `tokenizers` cuts, bytes put together again.

Decoding is defined over bytes: every token stands for some bytes, a text is their concatenation read as UTF-8, and
what is not UTF-8 becomes U+FFFD. So a text can be decoded token by token, and the parts add up to the whole.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from pelton.errors import ConfigError, ModelFormatError, RequestError
from pelton.text.byte_alphabet import CHAR_TO_BYTE
from pelton.text.gguf_tokenizer import build_gguf_tokenizer, read_token_id, set_template
from pelton.weights.fields import Fields, read_json, shorten
from pelton.weights.files import MAX_SIZES, ModelFiles, open_model

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|eot|>")
_ID = re.compile(r"[0-9]{1,9}")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A model's tokenizer.

    vocab_size: the highest id + 1. eos_token_ids: the ids that end a text. special_tokens: text -> id of the tokens
    that control the model. named_tokens: "bos_token", "eos_token" ... -> text, the variables of chat templates.
    """

    def __init__(
        self,
        backend: Backend,
        vocab_size: int,
        named_tokens: Mapping[str, str],
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self._backend = backend
        self.vocab_size = vocab_size
        self.named_tokens = dict(named_tokens)
        self.special_tokens = {
            token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        }
        self.bos_token_id = self.token_id(named_tokens.get("bos_token", ""))
        own_eos = self.token_id(named_tokens.get("eos_token", ""))
        eos_ids = [*eos_token_ids, *([] if own_eos is None else [own_eos])]
        self.eos_token_ids = tuple(dict.fromkeys(eos_ids))
        self._special_ids = frozenset(self.special_tokens.values())
        self._bytes_of, self._strips_space = _byte_speller(backend)
        self._bytes: dict[int, bytes] = {}
        # A token that nobody can write by accident: it separates what stands around it, then it is left out.
        self.separator = f"\ue000{secrets.token_hex(8)}\ue001"
        backend.no_truncation()
        backend.no_padding()
        backend.add_tokens([AddedToken(self.separator, normalized=False)])
        self._separator_id = backend.token_to_id(self.separator)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; text that spells a special token becomes that token.

        add_special_tokens: also put what the model expects around a text, such as a token for its beginning.
        Raises RequestError for text that is not Unicode (half of a surrogate pair).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text holds half of a surrogate pair at character {error.start}; send valid Unicode", "prompt"
            ) from None
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        if self.separator in text:
            return [token_id for token_id in ids if token_id != self._separator_id]
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Ids outside the vocabulary have no text."""
        skip = self._special_ids if skip_special_tokens else frozenset()
        data = b"".join(self.token_bytes(token_id) for token_id in token_ids if token_id not in skip)
        text = data.decode("utf-8", "replace")
        return text[1:] if self._strips_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; nothing for an id outside the vocabulary."""
        data = self._bytes.get(token_id)
        if data is None:
            token = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
            data = self._bytes[token_id] = b"" if token is None else self._bytes_of(token)
            if len(self._bytes) > self.vocab_size:
                self._bytes.clear()  # ids outside the vocabulary must not fill the memory
        return data

    def token_text(self, token_id: int) -> str:
        """A token as shown in logprobs; U+FFFD stands for the half of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def to_json(self) -> str:
        """The tokenizer in the form of a tokenizer.json file."""
        data = json.loads(self._backend.to_str())
        data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != self.separator]
        return json.dumps(data, ensure_ascii=False)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary, such as "<think>"."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def is_special(self, token_id: int) -> bool:
        """Whether a token controls the model and has no text of its own."""
        return token_id in self._special_ids


def _byte_speller(backend: Backend) -> tuple[Any, bool]:
    """(token -> bytes, whether decoding takes away one leading space), as the tokenizer's decoder defines it."""
    if backend.decoder is None:
        raise ModelFormatError("tokenizer.json has no decoder; pelton reads byte-level BPE and SentencePiece")
    state: Any = backend.decoder.__getstate__()
    decoder = json.loads(state)
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {str(step["type"]) for step in steps}
    if "ByteLevel" in kinds:
        return _byte_level_bytes, False
    if not kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} or not kinds & {"Replace", "Metaspace"}:
        raise ModelFormatError(
            f"tokenizer.json: decoder {', '.join(sorted(kinds))} is not supported; "
            "pelton reads byte-level BPE and SentencePiece"
        )
    strips = any(
        (step["type"] == "Strip" and step["start"] > 0)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
    return _sentencepiece_bytes, strips


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([CHAR_TO_BYTE[char] for char in token])
    except KeyError:  # an added token that is spelled as it reads
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()


# --- loading ------------------------------------------------------------------------------------------------------


def load_tokenizer(files: ModelFiles, override: str | None = None) -> Tokenizer:
    """The tokenizer of a model, or of another path (`--tokenizer`: a folder with tokenizer.json, or a GGUF file).

    Raises ModelFormatError, or ConfigError if `override` leads to no tokenizer.
    """
    eos_ids = _eos_ids(files)
    if override is not None:
        path = Path(override).expanduser()
        if (path / "tokenizer.json").is_file():
            return _from_folder(path, eos_ids)
        if not path.exists():
            raise ConfigError(f"--tokenizer {override}: no such file or folder")
        files = open_model(path)
    if files.gguf is not None:
        return _from_gguf(files.gguf.metadata, eos_ids)
    return _from_folder(files.root, eos_ids)


def _eos_ids(files: ModelFiles) -> list[int]:
    """Ids that end a text, from generation_config.json and config.json (each one id or a list).

    Ids beyond the model's vocabulary are left out: they have no logit, so they never come.
    """
    ids: list[int] = []
    vocab_size = Fields(files.config).int("vocab_size", 1 << 31)
    for where, config in (("generation_config.json", files.generation_config), ("config.json", files.config)):
        ids += Fields(config, where).optional_ints("eos_token_id") or []
    return [token_id for token_id in ids if token_id < vocab_size]


def _from_gguf(metadata: Mapping[str, Any], eos_ids: Sequence[int]) -> Tokenizer:
    backend = build_gguf_tokenizer(metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {
        name: read_token_id(metadata, key)
        for name, key in zip(_NAMED, ("bos", "eos", "unknown", "padding"), strict=True)
    }
    named = {name: tokens[token_id] for name, token_id in ids.items() if token_id is not None}
    return Tokenizer(backend, len(tokens), named, [*eos_ids, *_turn_ends(metadata, backend)])


def _turn_ends(metadata: Mapping[str, Any], backend: Backend) -> list[int]:
    """Ids that end a turn of a chat: a GGUF file often names only one end, its template writes another."""
    template = metadata.get("tokenizer.chat_template")
    special = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    return [special[end] for end in _TURN_ENDS if end in special and isinstance(template, str) and end in template]


def _from_folder(folder: Path, eos_ids: Sequence[int]) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        others = [name for name in ("tokenizer.model", "vocab.json", "tiktoken.model") if (folder / name).exists()]
        raise ModelFormatError(
            f"{folder} has {'/'.join(others) or 'no tokenizer'} but no tokenizer.json; make one with transformers: "
            f'AutoTokenizer.from_pretrained("{folder}").save_pretrained("{folder}")'
        )
    backend = _parse(path)
    fields = Fields(read_tokenizer_config(folder), "tokenizer_config.json")
    _add_missing_tokens(backend, fields)
    named = {name: token for name in _NAMED if (token := _token_text(fields, name)) is not None}
    if "add_bos_token" in fields.values or "add_eos_token" in fields.values:
        set_template(
            backend,
            bos=named.get("bos_token") if fields.bool("add_bos_token", False) else None,
            eos=named.get("eos_token") if fields.bool("add_eos_token", False) else None,
        )
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if vocab_size > MAX_SIZES["vocab_size"]:
        raise ModelFormatError(f"{path} has the token id {vocab_size - 1}, more than any model's")
    return Tokenizer(backend, vocab_size, named, eos_ids)


def _parse(path: Path) -> Backend:
    data = path.read_bytes()
    try:
        return Backend.from_buffer(data)
    except BaseException as error:  # the library raises nothing more specific; its Rust code may also panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelFormatError(f"{path} is not a tokenizer: {shorten(str(error), 200)}") from error


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, or {}."""
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _token_text(fields: Fields, name: str) -> str | None:
    """A token that may be written as text or as {"content": text}."""
    is_object = isinstance(fields.values.get(name), dict)
    return fields.object(name).optional_str("content") if is_object else fields.optional_str(name)


def _add_missing_tokens(backend: Backend, fields: Fields) -> None:
    """Added tokens that tokenizer_config.json has and tokenizer.json lacks."""
    added = fields.optional_object("added_tokens_decoder") or Fields({})
    if not all(_ID.fullmatch(key) for key in added.values):
        raise fields.error("added_tokens_decoder", "must map ids to tokens")
    known = backend.get_added_tokens_decoder()
    for key in sorted(added.values, key=int):
        entry = added.object(key)
        content = entry.str("content")
        if int(key) in known:
            continue
        flags = {name: entry.bool(name, False) for name in _FLAGS}
        (backend.add_special_tokens if flags["special"] else backend.add_tokens)([AddedToken(content, **flags)])
        if backend.token_to_id(content) != int(key):
            raise entry.error("content", f"is {shorten(content)}, which cannot have the id {key}")
