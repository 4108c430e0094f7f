"""No check of what comes from outside is an `assert`: under `python -O` the same files and requests are refused."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

# Run by an interpreter without asserts, with the folder of bad files as its argument.
SCRIPT = """
import json, sys
from pathlib import Path
from pelton.errors import PeltonError
from pelton.models import find_model
from pelton.text.chat_template import ChatTemplate
from pelton.text.tokenizer import load_tokenizer
from pelton.types import SamplingParams
from pelton.weights.files import ModelFiles, open_model, text_config
from pelton.weights.inside import child

if __debug__:
    sys.exit("this interpreter keeps its asserts")
folder = Path(sys.argv[1])
llama = {"architectures": ["LlamaForCausalLM"], "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8,
         "num_hidden_layers": 1, "num_attention_heads": 2}
cases = {
    **{path.name: lambda path=path: open_model(path).tensors for path in folder.iterdir()},
    "a name that leads out": lambda: child(folder, "../secret"),
    "tokenizer": lambda: load_tokenizer(ModelFiles(folder / "long-header", (), "safetensors", {}, {})),
    "template": lambda: ChatTemplate("x" * (1 << 20), {}),
    "temperature": lambda: SamplingParams(temperature=-1.0),
    "stop ids": lambda: SamplingParams(stop_token_ids=[-1]),
    **{f"{name} {value}": lambda given={**llama, name: value}: find_model(llama).kv_layers(text_config(given))
       for name, value in [("hidden_size", "8"), ("hidden_size", 1 << 40), ("num_key_value_heads", 3), ("head_dim", 3),
                           ("torch_dtype", "float64"), ("rope_freq_factors", [0.0])]},
}
for name, refuses in cases.items():
    try:
        refuses()
    except PeltonError as error:
        print(f"{name}: {error}")
    else:
        sys.exit(f"{name} was accepted")
"""


def write_bad_models(folder: Path) -> list[str]:
    """One file or folder for each way a checkpoint can be wrong; their names."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}).encode()
    safetensors = {
        "long-header": struct.pack("<Q", 1 << 60) + b"{}",
        "long-tensor": struct.pack("<Q", len(header)) + header + bytes(4),
        "no-json": struct.pack("<Q", 2) + b"[]",
    }
    for name, data in safetensors.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        (folder / name / "tokenizer.json").write_text("{}")
        (folder / name / "model.safetensors").write_bytes(data)
    files = {
        "magic.gguf": b"GGML" + bytes(60),
        "cut.gguf": b"GGUF" + struct.pack("<IQ", 3, 1),
        "counts.gguf": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60),
        "model.bin": pickle.dumps({}),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [*safetensors, *files]


def test_bad_input_is_refused_without_asserts(tmp_path: Path) -> None:
    names = write_bad_models(tmp_path)
    done = subprocess.run([sys.executable, "-O", "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr}")
    assert all(f"{name}: " in done.stdout for name in names)
    assert len(done.stdout.splitlines()) == len(names) + 11
