"""A constrained request only ever produces what its grammar allows, and ends when the grammar does."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pelton.engine.step import EngineRequest
from pelton.runner.grammar import Grammars
from pelton.runner.requests import RequestState
from pelton.runner.sampler import Sampler
from pelton.text.grammar import compile_grammar
from pelton.types import SamplingParams, StructuredOutputsParams

EOS, VOCAB = 0, 270  # logits are wider than the vocabulary, as in many checkpoints


class Vocabulary:
    """A library tokenizer as grammars want it."""

    eos_token_ids = (EOS,)

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.to_json = tokenizer.to_str


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({"<end>": EOS} | {c: i + 1 for i, c in enumerate(alphabet)}, []))
    made.add_special_tokens(["<end>"])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def generate(
    tokenizer: Tokenizer, constraint: dict[str, Any], seed: int, max_tokens: int = 60, **fields: Any
) -> tuple[str, bool]:
    """Text sampled from random logits within the constraint, and whether it came to its end."""
    params = SamplingParams(
        seed=seed, max_tokens=max_tokens, structured_outputs=StructuredOutputsParams(**constraint), **fields
    )
    grammar = compile_grammar(StructuredOutputsParams(**constraint))
    state = RequestState(EngineRequest(1, [5], params, (EOS,), grammar=grammar), 1)
    sampler = Sampler(0, Grammars(lambda: Vocabulary(tokenizer)))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_tokens):
        logits = torch.randn(1, VOCAB, generator=generator)
        again = sampler([state], logits.clone())  # a step that is run twice consumes nothing twice
        sample = sampler([state], logits)[0]
        assert sample == again[0] and isinstance(sample, tuple)
        state.token_ids.append(sample[0])
        if sample[0] == EOS:
            return tokenizer.decode(state.output_ids), True
    return tokenizer.decode(state.output_ids), False


@pytest.mark.parametrize("seed", range(5))
def test_choice_and_regex(tokenizer: Tokenizer, seed: int) -> None:
    assert generate(tokenizer, {"choice": ["yes", "no", "maybé"]}, seed) in [(c, True) for c in ("yes", "no", "maybé")]
    text, ended = generate(tokenizer, {"regex": "[0-9]{3}-[a-f]{2}"}, seed)
    assert ended and len(text) == 6 and text[:3].isdigit() and set(text[4:]) <= set("abcdef")


@pytest.mark.parametrize("seed", range(5))
def test_json_schema(tokenizer: Tokenizer, seed: int) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}}, "required": ["a", "b"],
              "additionalProperties": False}
    text, ended = generate(tokenizer, {"json": schema, "disable_any_whitespace": True}, seed)
    value = json.loads(text)
    assert ended and value["a"] in (1, 2) and value["b"] in (True, False) and " " not in text


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 10}, {"min_tokens": 10, "ignore_eos": True}])
def test_the_end_of_a_grammar_ends_the_text(tokenizer: Tokenizer, fields: dict[str, Any]) -> None:
    assert generate(tokenizer, {"choice": ["a", "b"]}, 0, **fields) in (("a", True), ("b", True))
    text, ended = generate(tokenizer, {"regex": "a+"}, 0, **fields)  # may go on, so min_tokens holds
    assert ended and len(text) >= fields.get("min_tokens", 0)


def test_a_grammar_that_cannot_go_on_fails_alone_and_in_one_line(
    tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = compile_grammar(StructuredOutputsParams(choice=["secret"]))
    broken = RequestState(EngineRequest(1, [5], SamplingParams(), (EOS,), grammar=secret), 1)
    broken.token_ids += tokenizer.encode("sex").ids  # no sampler would: a limit of the library breaks grammars, too
    unusable = RequestState(EngineRequest(2, [5], SamplingParams(), (EOS,), grammar='start: secret'), 1)
    healthy = RequestState(EngineRequest(3, [5], SamplingParams(), (EOS,)), 1)
    sampler = Sampler(0, Grammars(lambda: Vocabulary(tokenizer)))
    one, two, three = sampler([broken, unusable, healthy], torch.zeros(3, VOCAB))
    assert isinstance(one, str) and one.startswith("the grammar cannot go on (")
    assert isinstance(two, str) and two.startswith("the grammar cannot be used (")
    assert isinstance(three, tuple)
    shown = capfd.readouterr()
    for text in (one, two, shown.out, shown.err):
        assert "\n" not in text and "sec" not in text and "sex" not in text


def test_an_engine_without_grammars_does_not_drop_the_constraint() -> None:
    state = RequestState(EngineRequest(1, [5], SamplingParams(), (EOS,), grammar='start: "a"'), 1)
    with pytest.raises(RuntimeError, match="without grammars"):
        Sampler(0)([state], torch.zeros(1, VOCAB))
