"""Tokenizers give the same ids as transformers', decode what they encoded, and refuse files that are wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from pelton.errors import ConfigError, ModelFormatError, RequestError
from pelton.text.gguf_tokenizer import merges_from_scores
from pelton.text.pre_tokenizers import pre_tokenizer_for
from pelton.text.tokenizer import Tokenizer, load_tokenizer
from pelton.weights.files import ModelFiles

CORPUS: list[str] = json.loads((Path(__file__).parent / "corpus.json").read_text())
FilesOf = Callable[..., ModelFiles]


def test_the_corpus_is_large_enough() -> None:
    assert len(set(CORPUS)) == len(CORPUS) >= 200


@pytest.mark.parametrize("model", ["smollm2", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_ids_and_text_equal_transformers(
    model: str, transformers_tokenizer: Callable[[Path], Any], request: pytest.FixtureRequest
) -> None:
    ours: Tokenizer = request.getfixturevalue(model)
    theirs = transformers_tokenizer(request.getfixturevalue(f"{model}_path"))
    for text in CORPUS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False), text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    assert theirs.eos_token_id in ours.eos_token_ids


@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_text_comes_back(model: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(model)
    for text in CORPUS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        expected = text if model == "smollm2" else text.replace("▁", " ")  # SentencePiece's sign for a space
        assert tokenizer.decode(ids, skip_special_tokens=False) == expected
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == expected


@pytest.mark.parametrize("unit", ["word and more, 123\n", "x", " ", "<", "中", "\n", "ab", "<|im_start|>"])
def test_the_cost_of_encoding_is_linear(smollm2: Tokenizer, gemma3: Tokenizer, unit: str) -> None:
    for tokenizer in (smollm2, gemma3):
        text = unit * (200_000 // len(unit))
        start = time.thread_time()
        tokenizer.encode(text)
        assert time.thread_time() - start < 2


def test_merges_from_scores_are_every_split_best_first() -> None:
    rng = np.random.default_rng(0)
    tokens = sorted({"".join(rng.choice(list("ab▁"), rng.integers(1, 7))) for _ in range(400)})
    scores = rng.integers(-40, 0, len(tokens)).astype(float)
    vocab = {token: i for i, token in enumerate(tokens)}
    splits = [
        (-scores[i], -cut, cut - len(token), i, (token[:cut], token[cut:]))
        for i, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    assert merges_from_scores(tokens, scores) == [split[-1] for split in sorted(splits)]


def test_sentencepiece_prepends_a_space_and_falls_back_to_bytes(tiny_spm: Tokenizer) -> None:
    ids = tiny_spm.encode("hello t é")
    assert [tiny_spm.token_text(i) for i in ids[1:3]] == [" hello", " t"]
    assert ids[0] == tiny_spm.bos_token_id == 1
    assert tiny_spm.decode(ids) == "hello t é"
    assert tiny_spm.decode(ids, skip_special_tokens=False) == "<s> hello t é"
    assert tiny_spm.token_bytes(3 + 0xC3) == b"\xc3"


def test_special_tokens(tiny: Tokenizer) -> None:
    assert tiny.special_tokens == {"<|end|>": 0, "<|user|>": 1}
    assert tiny.encode("<|user|>hello<think>") == [1, tiny.token_id("hello"), 2]
    assert tiny.decode([1, 2, 0]) == "<think>"
    assert tiny.is_special(0) and not tiny.is_special(2)
    assert tiny.eos_token_ids == (0,)
    assert tiny.token_id("nothing") is None


def test_ids_outside_the_vocabulary_have_no_text(tiny: Tokenizer) -> None:
    assert tiny.decode([tiny.vocab_size, -1, 10**9]) == ""
    assert tiny.token_bytes(tiny.vocab_size) == b""
    assert tiny.token_text(-5) == ""


def test_bytes_that_are_not_unicode_become_replacement_characters(tiny: Tokenizer, tiny_spm: Tokenizer) -> None:
    assert tiny.decode([4 + 0xE4, 4 + 0xB8, 4 + 0x68]) == "\ufffdh"
    assert tiny_spm.decode([3 + 0xE4, 3 + 0xB8, 3 + 0xAD, 3 + 0xFF]) == "中\ufffd"


def test_half_of_a_surrogate_pair_is_refused(tiny: Tokenizer) -> None:
    with pytest.raises(RequestError, match="surrogate pair at character 2"):
        tiny.encode("ab\ud83d")


def test_the_separator_is_never_seen(tiny: Tokenizer) -> None:
    ids = tiny.encode(f"hel{tiny.separator}lo<|us{tiny.separator}er|>")
    assert max(ids) < tiny.vocab_size
    assert tiny.decode(ids, skip_special_tokens=False) == "hello<|user|>"
    assert tiny.separator not in tiny.to_json()
    assert Backend.from_str(tiny.to_json()).get_vocab_size() == tiny.vocab_size


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tokenizer.ggml.model", "bert", "tokenizer.ggml.model is 'bert'"),
        ("tokenizer.ggml.model", None, "tokenizer.ggml.model is None"),
        ("tokenizer.ggml.tokens", None, "tokenizer.ggml.tokens must be"),
        ("tokenizer.ggml.tokens", "abc", "tokenizer.ggml.tokens must be"),
        ("tokenizer.ggml.tokens", [1, 2], "tokenizer.ggml.tokens must hold strings"),
        ("tokenizer.ggml.tokens", [], "tokenizer.ggml.tokens must be"),
        ("tokenizer.ggml.token_type", [1], "tokenizer.ggml.token_type must be an array of"),
        ("tokenizer.ggml.token_type", 3, "tokenizer.ggml.token_type must be an array of"),
        ("tokenizer.ggml.merges", None, "tokenizer.ggml.merges must be"),
        ("tokenizer.ggml.merges", ["he"], "tokenizer.ggml.merges must hold pairs"),
        ("tokenizer.ggml.merges", ["a b c"], "tokenizer.ggml.merges must hold pairs"),
        ("tokenizer.ggml.merges", ["he nothing"], "tokenizer.ggml.merges does not fit"),
        ("tokenizer.ggml.pre", "unheard-of", "tokenizer.ggml.pre is 'unheard-of'"),
        ("tokenizer.ggml.eos_token_id", 10**6, "tokenizer.ggml.eos_token_id is 1000000"),
        ("tokenizer.ggml.eos_token_id", "0", "tokenizer.ggml.eos_token_id must be an integer"),
        ("tokenizer.ggml.add_bos_token", 1, "tokenizer.ggml.add_bos_token must be true or false"),
    ],
)
def test_wrong_metadata_is_named(
    byte_level_metadata: dict[str, Any], files_of: FilesOf, field: str, value: Any, message: str
) -> None:
    metadata = byte_level_metadata | {field: value}
    with pytest.raises(ModelFormatError, match=message):
        load_tokenizer(files_of({key: item for key, item in metadata.items() if item is not None}))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "scores must be an array"),
        ([0.0], "scores must be an array of 272 numbers"),
        (["x"] * 272, "scores must hold numbers"),
        ([float("nan")] * 272, "not finite"),
        (np.zeros((272, 2)), "scores must hold numbers"),
    ],
)
def test_wrong_scores_are_named(
    sentencepiece_metadata: dict[str, Any], files_of: FilesOf, value: Any, message: str
) -> None:
    with pytest.raises(ModelFormatError, match=message):
        load_tokenizer(files_of(sentencepiece_metadata | {"tokenizer.ggml.scores": value}))


def test_a_token_twice_is_refused(sentencepiece_metadata: dict[str, Any], files_of: FilesOf) -> None:
    sentencepiece_metadata["tokenizer.ggml.tokens"][-1] = "he"
    with pytest.raises(ModelFormatError, match="tokenizer.ggml.tokens holds 'he' more than once"):
        load_tokenizer(files_of(sentencepiece_metadata))


def test_ends_of_text_come_from_everywhere(byte_level_metadata: dict[str, Any], files_of: FilesOf) -> None:
    files = files_of(byte_level_metadata, generation_config={"eos_token_id": [7, 0]}, config={"eos_token_id": 8})
    assert load_tokenizer(files).eos_token_ids == (7, 0, 8)
    byte_level_metadata["tokenizer.ggml.tokens"][1] = "<|im_end|>"
    byte_level_metadata["tokenizer.chat_template"] = "{{ messages[0].content }}<|im_end|>"
    assert load_tokenizer(files_of(byte_level_metadata)).eos_token_ids == (1, 0)
    within = files_of(byte_level_metadata, config={"eos_token_id": [3, 500], "vocab_size": 400})
    assert load_tokenizer(within).eos_token_ids == (3, 1, 0)
    with pytest.raises(ModelFormatError, match="eos_token_id must be an integer"):
        load_tokenizer(files_of(byte_level_metadata, config={"eos_token_id": "2"}))


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("default", "I'm 1234 x", ["I", "'m", "Ġ1234", "Ġx"]),
        ("smollm", "I'm  1234", ["I", "'m", "Ġ", "Ġ1234"]),
        ("starcoder", "a  12", ["a", "ĠĠ", "1", "2"]),
        ("llama-bpe", "I'M 12345\n\nx", ["I", "'M", "Ġ", "123", "45", "ĊĊ", "x"]),
        ("qwen2", "a 123", ["a", "Ġ", "1", "2", "3"]),
        ("tekken", "camelCase 12", ["camel", "Case", "Ġ", "1", "2"]),
        ("gpt-4o", "camelCase 1234", ["camel", "Case", "Ġ", "123", "4"]),
        ("qwen35", "a 12", ["a", "Ġ", "1", "2"]),
    ],
)
def test_pre_tokenizers(name: str, text: str, pieces: list[str]) -> None:
    assert [piece for piece, _ in pre_tokenizer_for(name)[0].pre_tokenize_str(text)] == pieces


# --- folders ------------------------------------------------------------------------------------------------------


def folder_files(folder: Path) -> ModelFiles:
    return ModelFiles(root=folder, weights=(), format="safetensors", config={}, generation_config={})


@pytest.fixture
def folder(tmp_path: Path, tiny: Tokenizer) -> Path:
    (tmp_path / "tokenizer.json").write_text(tiny.to_json())
    return tmp_path


def test_a_folder_gives_the_same_tokenizer(folder: Path, tiny: Tokenizer) -> None:
    config = {"eos_token": {"content": "<|end|>"}, "bos_token": "<|user|>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder_files(folder))
    assert tokenizer.encode("hello <|end|>") == [1, *tiny.encode("hello <|end|>")]
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (tiny.vocab_size, 1, (0,))
    assert tokenizer.named_tokens == {"bos_token": "<|user|>", "eos_token": "<|end|>"}


def test_added_tokens_of_the_config(folder: Path, tiny: Tokenizer) -> None:
    new = {"content": "<|new|>", "special": True}
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"added_tokens_decoder": {str(tiny.vocab_size): new}}))
    tokenizer = load_tokenizer(folder_files(folder))
    assert tokenizer.encode("<|new|>") == [tiny.vocab_size]
    assert tokenizer.vocab_size == tiny.vocab_size + 1
    path.write_text(json.dumps({"added_tokens_decoder": {"999999": new}}))
    with pytest.raises(ModelFormatError, match="cannot have the id 999999"):
        load_tokenizer(folder_files(folder))


@pytest.mark.parametrize(
    "config",
    [{"bos_token": 3}, {"bos_token": {"content": 3}}, {"bos_token": "\ud800"}, {"add_bos_token": 1},
     {"bos_token": "none", "add_bos_token": True}, {"added_tokens_decoder": []}, {"added_tokens_decoder": {"1": 2}},
     {"added_tokens_decoder": {"²": {"content": "x"}}},
     {"added_tokens_decoder": {"9": {"content": "x", "special": 1}}}],
)
def test_wrong_tokenizer_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFormatError, match=r"tokenizer_config\.json|'none' is to stand around each text"):
        load_tokenizer(folder_files(folder))


def test_wrong_tokenizer_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFormatError, match="is not a tokenizer"):
        load_tokenizer(folder_files(folder))


def test_a_folder_without_tokenizer_json_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ModelFormatError, match=r"has tokenizer.model but no tokenizer.json; .*save_pretrained"):
        load_tokenizer(folder_files(tmp_path))


def test_another_tokenizer(folder: Path, sentencepiece_metadata: dict[str, Any], files_of: FilesOf) -> None:
    files = files_of(sentencepiece_metadata)
    assert load_tokenizer(files, str(folder)).token_id("<|user|>") == 1
    with pytest.raises(ConfigError, match="no such file"):
        load_tokenizer(files, str(folder / "nothing"))


# --- against the original implementation of SentencePiece ---------------------------------------------------------


@pytest.mark.parametrize("add_space", [True, False])
def test_ids_equal_sentencepiece(tmp_path: Path, files_of: FilesOf, add_space: bool) -> None:
    """A vocabulary as Llama 2's, trained here, put into GGUF metadata as llama.cpp's converter does it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join(text for text in CORPUS if text.isprintable()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "sp"),
        model_type="bpe",
        vocab_size=1200,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=add_space,
        num_threads=1,
        minloglevel=2,
    )
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    ids = range(original.vocab_size())
    kinds = [2, 3, 3] + [6 if original.is_byte(i) else 1 for i in ids[3:]]  # <unk> <s> </s>, then bytes and pieces
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [original.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [original.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": add_space,
    }
    ours = load_tokenizer(files_of(metadata))
    for text in CORPUS:
        if not any(special in text for special in ours.special_tokens) and "\0" not in text:
            assert ours.encode(text, add_special_tokens=False) == original.encode(text), text
            assert ours.encode(text)[0] == 1
