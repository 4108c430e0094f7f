"""Writes a model as a Hugging Face folder in bfloat16, for engines and measurements that do not take GGUF.

    python benchmarks/make_safetensors.py MODEL OUT
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pelton.text.tokenizer import load_tokenizer
from pelton.weights import hub
from pelton.weights.checkpoint import open_checkpoint
from pelton.weights.files import open_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    make_safetensors(hub.resolve(args.model), args.out)


def make_safetensors(source: Path, out: Path) -> None:
    """Dequantise `source` and write weights, configuration and tokenizer; the weights last, when all else is there."""
    files = open_model(source)
    tokenizer = load_tokenizer(files)
    template = files.gguf.metadata.get("tokenizer.chat_template") if files.gguf else None
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", {**files.config, "torch_dtype": "bfloat16"})
    write_json(out / "generation_config.json", files.generation_config)
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.named_tokens, "chat_template": template,
    })  # fmt: skip
    (out / "tokenizer.json").write_text(tokenizer.to_json())
    checkpoint = open_checkpoint(files, torch.bfloat16, torch.device("cpu"))
    weights = {name: checkpoint.tensor(name, stored.shape).contiguous() for name, stored in files.tensors.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
