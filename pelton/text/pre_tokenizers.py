"""How byte-level BPE vocabularies cut text before merging: `tokenizer.ggml.pre` of a GGUF file.

The patterns are part of the vocabularies: they are those of the models' published tokenizer.json files.
"""

from __future__ import annotations

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from pelton.errors import ModelFormatError

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED_WORD = (  # a word, cut where lower case is followed by upper case
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_WORD_AND_MARKS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"

LLAMA3 = rf"{_CONTRACTION}|{_WORD_AND_MARKS}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
QWEN2 = rf"{_CONTRACTION}|{_WORD_AND_MARKS}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
TEKKEN = rf"{_CASED_WORD[0]}|{_CASED_WORD[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
GPT4O = (
    rf"{_CASED_WORD[0]}{_CONTRACTION}?|{_CASED_WORD[1]}{_CONTRACTION}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)

_SPLIT = {
    LLAMA3: ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx",
             "smaug-bpe", "jina-v5-nano"),
    QWEN2: ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"),
    QWEN35: ("qwen35",),
    TEKKEN: ("tekken",),
    GPT4O: ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
}
_PATTERNS = {name: pattern for pattern, names in _SPLIT.items() for name in names}
_GPT2 = ("default", "gpt-2", "mpt", "olmo", "jais", "phi-2", "roberta-bpe", "smollm")
_DIGITS_THEN_GPT2 = ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva")
_WHOLE_TOKENS_FIRST = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
                       "tekken")
"""A piece of text that is a token as it stands is taken whole, even where merging would not lead to it."""


def pre_tokenizer_for(name: object) -> tuple[PreTokenizer, bool]:
    """(pre-tokenizer, ignore_merges) for a value of `tokenizer.ggml.pre`; None is "default".

    "smollm" is read as transformers reads it. The original also splits digits off first, which differs only for
    two or more spaces before a digit and for numerals outside ASCII.
    """
    name = "default" if name is None else name
    if name in _PATTERNS:
        split = pre_tokenizers.Split(Regex(_PATTERNS[str(name)]), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, byte_level]), name in _WHOLE_TOKENS_FIRST
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _GPT2:
        return gpt2, False
    if name in _DIGITS_THEN_GPT2:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]), False
    raise ModelFormatError(
        f"tokenizer.ggml.pre is {name!r}, which pelton does not know; "
        "give a folder that has the model's tokenizer.json with --tokenizer"
    )
