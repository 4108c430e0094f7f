"""Seeded mutations of tokenizer.json, tokenizer_config.json and generation_config.json: they are read, or refused
with one line that says why."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pelton.errors import PeltonError
from pelton.text.chat_template import load_chat_template
from pelton.text.prompt import default_sampling_params
from pelton.text.tokenizer import Tokenizer, load_tokenizer
from pelton.weights.fields import parse_json_object
from pelton.weights.files import ModelFiles

MUTATIONS = 1500
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 64, 10**30, -0.5, 0.5, 1e308, float("inf"),
    float("nan"), "", "x", "a b", "²", "<|end|>", "\ud800", "é", "{{", "{% for %}", [], [1], ["a", "b"], [None], [[]],
    {}, {"x": 1}, {"content": 3}, {"content": "<|new|>"}, {"type": "Sequence"}, {"type": "BPE"}, {"id": 999},
]
CONFIG = {
    "unk_token": None, "add_bos_token": True, "add_eos_token": False, "model_max_length": 1024,
    "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
}
GENERATION = {"eos_token_id": [0, 1], "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1,
              "repetition_penalty": 1.1, "max_new_tokens": 10}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each (container, key) inside a JSON value; of long lists and objects the first entries."""
    keys = list(value)[:20] if isinstance(value, dict) else range(min(len(value), 20))
    for key in keys:
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


def mutate(value: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """One or two places are dropped, set to something odd, or to what stands in another place."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2])):
        found = list(places(value))
        if not found:
            break
        container, key = rng.choice(found)
        if rng.random() < 0.2:
            del container[key]
        elif rng.random() < 0.2:
            other, other_key = rng.choice(found)
            if other_key in other if isinstance(other, dict) else other_key < len(other):
                container[key] = copy.deepcopy(other[other_key])
        else:
            container[key] = copy.deepcopy(rng.choice(ODD))
    return value


def read(folder: Path) -> None:
    """All that a door reads of a tokenizer's files; then a text there and back."""
    generation = parse_json_object((folder / "generation_config.json").read_bytes(), "generation_config.json")
    files = ModelFiles(folder, (), "safetensors", {}, generation)
    tokenizer = load_tokenizer(files)
    load_chat_template(files, tokenizer)
    default_sampling_params(generation)
    tokenizer.decode(tokenizer.encode("hello <|end|> 中"))
    tokenizer.to_json()


@pytest.mark.parametrize(("name", "bos", "eos"), [("tiny", "<|user|>", "<|end|>"), ("tiny_spm", "<s>", "</s>")])
def test_mutated_tokenizers(name: str, bos: str, eos: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    config = {**CONFIG, "bos_token": bos, "eos_token": {"content": eos, "special": True},
              "added_tokens_decoder": {str(tokenizer.token_id(eos)): {"content": eos, "special": True}}}
    seeds = {"tokenizer.json": json.loads(tokenizer.to_json()), "tokenizer_config.json": config,
             "generation_config.json": GENERATION}
    for file, value in seeds.items():
        (tmp_path / file).write_text(json.dumps(value))
    num_read = 0
    for number in range(MUTATIONS):
        rng = random.Random(number)
        file = rng.choice(list(seeds))
        (tmp_path / file).write_text(json.dumps(mutate(seeds[file], rng)))
        try:
            read(tmp_path)
            num_read += 1
        except PeltonError as error:
            assert "\n" not in str(error) and len(str(error)) < 400, f"mutation {number} of {file}: {error}"
        except BaseException as error:  # also a panic of the library, which is no Exception
            pytest.fail(f"mutation {number} of {file}: {type(error).__name__}: {error}")
        (tmp_path / file).write_text(json.dumps(seeds[file]))
    assert MUTATIONS / 10 < num_read < MUTATIONS * 0.9
