"""What the trainer's engine is told about memory, as vLLM itself understands it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from helpers import tiny, verifiers
from vllm_dflash.config import DrafterConfig

pytestmark = [pytest.mark.engine, pytest.mark.long]

SCRIPT = """
import json, sys
from vllm.v1.engine.llm_engine import LLMEngine
from vllm_dflash.training.config import EngineOptions
from vllm_dflash.training.engine import VerifierEngine

class Seen(Exception):
    pass

def stop(args, **kwargs):
    raise Seen(args)

LLMEngine.from_engine_args = stop
found = []
for folder, drafter, extra in json.loads(sys.argv[1]):
    planned = {"kv_cache_memory_bytes": 2**26, "gpu_memory_utilization": 0.7}
    try:
        VerifierEngine(folder, drafter, EngineOptions(max_len=64, extra=extra), memory=planned)
    except Seen as seen:
        given = seen.args[0]
        # The CPU's engine config has a cache of its own size, whatever is asked for.
        config = given.create_engine_config()
    model = config.model_config
    limits = model.multimodal_config
    found.append({
        "kv_cache": given.kv_cache_memory_bytes,
        "images": None if limits is None else limits.get_limit_per_prompt("image"),
        "reads_images": bool(model.is_multimodal_model),
    })
print("FOUND " + json.dumps(found))
"""


def test_text_only_and_multimodal_verifiers(models, verifier) -> None:
    tokenizer = models / "plan-tokenizer"
    tiny.make_tokenizer().save_pretrained(tokenizer)
    multimodal = verifiers.make(models / "plan-idefics3", "idefics3", tokenizer)
    drafters = [tiny.make_drafter(models / f"plan-{v.name}", v) for v in (verifier, multimodal)]
    assert all(DrafterConfig.from_pretrained(d) for d in drafters)
    jobs = [
        (str(verifier), str(drafters[0]), {}),
        (str(verifier), str(drafters[0]), {"kv_cache_memory_bytes": 2**25}),
        (str(multimodal), str(drafters[1]), {}),
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(jobs)],
        capture_output=True,
        text=True,
        env=tiny.environment(),
        check=False,
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith("FOUND ")]
    assert lines, done.stderr[-3000:]
    text, own, pictures = json.loads(lines[0].removeprefix("FOUND "))
    assert text == {"kv_cache": 2**26, "images": None, "reads_images": False}
    # The user's engine arguments win.
    assert own["kv_cache"] == 2**25
    assert pictures["images"] == 0
