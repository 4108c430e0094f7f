"""A tokenizer from the metadata of a GGUF file: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

The keys are those of the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). What a file
does not say, pre-tokenizer and decoder, follows from `tokenizer.ggml.model` and `tokenizer.ggml.pre`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from pelton.errors import ModelFormatError
from pelton.text.byte_alphabet import BYTE_TO_CHAR
from pelton.text.pre_tokenizers import pre_tokenizer_for
from pelton.weights.fields import shorten

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type
ARCHITECTURES_MERGING_BY_POSITION = ("gemma", "gemma2", "gemma3")
SPACE = "\u2581"  # how SentencePiece spells a space

IntArray = npt.NDArray[np.int64]
HashArray = npt.NDArray[np.uint64]


def build_gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer a GGUF file describes. Raises ModelFormatError naming the field that is wrong."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = read_strings(metadata, "tokenizer.ggml.tokens")
    types = _read_numbers(metadata, "tokenizer.ggml.token_type", len(tokens), default=1)
    if kind == "gpt2":
        backend = _byte_level(metadata, tokens)
    elif kind == "llama":
        backend = _sentencepiece(metadata, tokens)
    else:
        raise ModelFormatError(
            f"tokenizer.ggml.model is {kind!r}, pelton reads 'gpt2' and 'llama'; "
            "give a folder that has a tokenizer.json with --tokenizer"
        )
    _add_special_tokens(backend, metadata, tokens, types.tolist())
    _add_template(backend, metadata, tokens)
    return backend


def read_token_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """The id in tokenizer.ggml.{name}_token_id, checked against the vocabulary; None where the file has none."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ModelFormatError(f"{key} must be an integer, got {value!r}")
    num_tokens = len(metadata["tokenizer.ggml.tokens"])
    if not 0 <= value < num_tokens:
        if value in (-1, 0xFFFFFFFF):  # how some writers say "none"
            return None
        raise ModelFormatError(f"{key} is {value}, but the vocabulary has {num_tokens} tokens")
    return int(value)


def read_strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    """A metadata array of text."""
    value = metadata.get(key)
    if not isinstance(value, (list, tuple, np.ndarray)) or len(value) == 0:
        raise ModelFormatError(f"{key} must be a non-empty array of strings; this file cannot be tokenised")
    values = list(value)
    if set(map(type, values)) != {str}:
        raise ModelFormatError(f"{key} must hold strings only")
    return values


def _read_numbers(
    metadata: Mapping[str, Any], key: str, length: int, default: float | None = None
) -> npt.NDArray[np.float64]:
    value = metadata.get(key)
    if value is None and default is not None:
        return np.full(length, default)
    if not isinstance(value, (list, tuple, np.ndarray)) or len(value) != length:
        raise ModelFormatError(f"{key} must be an array of {length} numbers, one for each token")
    numbers = np.asarray(value)
    if numbers.dtype.kind not in "iuf" or numbers.ndim != 1:
        raise ModelFormatError(f"{key} must hold numbers only")
    numbers = numbers.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise ModelFormatError(f"{key} holds a value that is not finite")
    return numbers


def _read_flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, (bool, np.bool_)):
        raise ModelFormatError(f"tokenizer.ggml.{name} must be true or false, got {value!r}")
    return bool(value)


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for token_id, token in enumerate(tokens) if vocab[token] != token_id)
        raise ModelFormatError(f"tokenizer.ggml.tokens holds {twice!r} more than once")
    return vocab


def _bpe(key: str, **options: Any) -> Tokenizer:
    try:
        return Tokenizer(BPE(**options))
    except Exception as error:  # the library raises nothing more specific
        raise ModelFormatError(f"{key} does not fit the vocabulary: {error}") from error


# --- byte-level BPE -----------------------------------------------------------------------------------------------


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    alphabet = set(BYTE_TO_CHAR)
    spelled = [
        token if alphabet.issuperset(token) else "".join(BYTE_TO_CHAR[byte] for byte in token.encode())
        for token in tokens
    ]
    merges = [tuple(merge.split(" ")) for merge in read_strings(metadata, "tokenizer.ggml.merges")]
    if set(map(len, merges)) != {2}:
        raise ModelFormatError("tokenizer.ggml.merges must hold pairs of tokens with a space between them")
    pre_tokenizer, ignore_merges = pre_tokenizer_for(metadata.get("tokenizer.ggml.pre"))
    backend = _bpe(
        "tokenizer.ggml.merges", vocab=_vocabulary(spelled), merges=merges, ignore_merges=ignore_merges
    )
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend


# --- SentencePiece BPE --------------------------------------------------------------------------------------------


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    # Files of Gemma spell the tokens that are runs of spaces with real spaces, all other tokens with SPACE.
    tokens = [SPACE * len(token) if token.startswith(" ") and token.isspace() else token for token in tokens]
    if metadata.get("general.architecture") in ARCHITECTURES_MERGING_BY_POSITION:
        scores = -np.arange(len(tokens), dtype=np.float64)  # their scores do not give the order of merging
    else:
        scores = _read_numbers(metadata, "tokenizer.ggml.scores", len(tokens))
    unknown = read_token_id(metadata, "unknown")
    backend = _bpe(
        "tokenizer.ggml.scores",
        vocab=_vocabulary(tokens),
        merges=merges_from_scores(tokens, scores),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    add_space = _read_flag(metadata, "add_space_prefix", True)
    # The space comes at the beginning of a text and after each special token, also where there is one already.
    prefix = [normalizers.Prepend(SPACE)] if add_space else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def merges_from_scores(tokens: Sequence[str], scores: npt.NDArray[np.float64]) -> list[tuple[str, str]]:
    """All (left, right) with left, right and left + right in the vocabulary, best score of left + right first.

    SentencePiece merges the pair with the best score; as a list of merges that is this order, ties going to the
    longer left part. Substrings are compared by a rolling hash of 64 bits, so the work is linear in the characters
    (times a binary search), whatever the lengths of the tokens.
    """
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    substring_hash = _substring_hasher("".join(tokens))
    token_hashes = substring_hash(starts, ends)
    order = np.argsort(token_hashes)
    sorted_hashes = token_hashes[order]

    def find(hashes: HashArray) -> tuple[IntArray, npt.NDArray[np.bool_]]:
        at = np.minimum(np.searchsorted(sorted_hashes, hashes), len(order) - 1)
        return order[at], sorted_hashes[at] == hashes

    whole = np.repeat(np.arange(len(tokens)), lengths)  # the token each character belongs to
    cut = np.flatnonzero(np.arange(len(whole)) != starts[whole])  # every place inside a token
    left, found = find(substring_hash(starts[whole[cut]], cut))
    cut, left = cut[found], left[found]
    right, found = find(substring_hash(cut, ends[whole[cut]]))
    cut, left, right = cut[found], left[found], right[found]
    score_rank = np.unique(-scores, return_inverse=True)[1]
    longest = int(lengths.max()) + 1
    key = ((score_rank[whole[cut]] + 1) * longest - lengths[left]) * longest - lengths[right]
    best_first = np.argsort(key, kind="stable")
    text = tokens.__getitem__
    return list(zip(map(text, left[best_first].tolist()), map(text, right[best_first].tolist()), strict=True))


def _substring_hasher(text: str) -> Any:
    """A function (starts, ends) -> hashes of text[start:end]: sum of code * BASE**(i - start), modulo 2**64."""
    base, inverse = 0x9E3779B97F4A7C15, 0xF1DE83E19937733D  # their product is 1 modulo 2**64
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    powers = np.cumprod(np.full(len(codes), base, np.uint64), dtype=np.uint64)
    unpowers = np.cumprod(np.full(len(codes) + 1, inverse, np.uint64), dtype=np.uint64)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((codes + np.uint64(1)) * powers, dtype=np.uint64)])
    return lambda starts, ends: (sums[ends] - sums[starts]) * unpowers[starts]


# --- both ---------------------------------------------------------------------------------------------------------


def _add_special_tokens(
    backend: Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[float]
) -> None:
    """Tokens that are found in text as a whole: control tokens, and those the file marks as user-defined."""
    special = {token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL}
    for name in ("bos", "eos", "unknown", "padding"):
        token_id = read_token_id(metadata, name)
        if token_id is not None:
            special.add(tokens[token_id])
    user_defined = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    known = [token for token in special if backend.token_to_id(token) is not None]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in sorted(known)])
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=False)
            for token in user_defined
            if token not in special and backend.token_to_id(token) is not None
        ]
    )


def _add_template(backend: Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str]) -> None:
    """Which tokens `encode` puts around a text."""
    starts_with_bos = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    bos = read_token_id(metadata, "bos") if _read_flag(metadata, "add_bos_token", starts_with_bos) else None
    eos = read_token_id(metadata, "eos") if _read_flag(metadata, "add_eos_token", False) else None
    set_template(backend, None if bos is None else tokens[bos], None if eos is None else tokens[eos])


def set_template(backend: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Make `encode` put `bos` before and `eos` after a text. ModelFormatError if they are no tokens."""
    around = [(token, backend.token_to_id(token)) for token in (bos, eos) if token]
    for token, token_id in around:
        if token_id is None:
            raise ModelFormatError(f"{shorten(token)} is to stand around each text, but is not in the vocabulary")
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    try:
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
    except Exception as error:  # the library raises nothing more specific
        raise ModelFormatError(f"{shorten(around)} cannot stand around each text: {error}") from error
