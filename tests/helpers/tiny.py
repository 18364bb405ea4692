"""Tiny random models, data, and the subprocesses that the engine tests run them in."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from helpers import warm
from helpers.warm import python_path

#: One thread and a small KV cache: the tests share their machine.
CPU_ENV = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "200",
}
WORDS = (
    "the a red blue green small large old new fast slow cat dog bird fish house tree road river "
    "runs sleeps eats sees finds makes breaks opens closes and or but with from into over under"
).split()
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|reserved_0|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB = 384
#: Common to every tiny training run: fp32 throughout, short conversations.
TRAIN_ARGS = (
    "--dtype", "float32", "--autocast", "float32", "--max-len", "160", "--max-tokens", "48",
    "--num-target-layers", "3", "--num-layers", "2", "--block-size", "8",
)  # fmt: skip


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def make_tokenizer() -> Any:
    """Byte-level BPE with a chat template; ids below ``VOCAB``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 16,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [sentence(rng, 12) for _ in range(200)] + ["user assistant system\n"] * 20
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|reserved_0|>", "<|eos|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def make_verifier(
    path: Path,
    *,
    vocab: int = VOCAB,
    tokenizer: bool = True,
    layers: int = 4,
    hidden: int = 64,
    layer_std: float = 0.8,
    head_std: float = 0.4,
    seed: int = 3,
) -> Path:
    """A random Llama in fp32 whose greedy output wanders; saved as a Hugging Face folder."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    path.mkdir(parents=True)
    eos = None
    if tokenizer:
        made = make_tokenizer()
        made.save_pretrained(path)
        assert len(made) <= vocab
        eos = made.eos_token_id
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=vocab,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=0 if tokenizer else None,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                continue
            if "layers" in name:
                weight.normal_(std=layer_std * weight.shape[1] ** -0.5)
            else:
                weight.normal_(std=head_std if "lm_head" in name else 1.4)
    model.save_pretrained(path)
    if eos is not None:
        GenerationConfig(eos_token_id=eos, pad_token_id=0).save_pretrained(path)
    return path


def make_drafter(
    path: Path, verifier: Path, *, fmt: str = "zlab", seed: int = 1, **changes
) -> Path:
    """An untrained drafter for a verifier, in the given format."""
    from transformers import AutoConfig

    from vllm_dflash.checkpoint import save_drafter
    from vllm_dflash.config import DrafterConfig
    from vllm_dflash.modeling.drafter import Drafter

    hf_config = AutoConfig.from_pretrained(verifier)
    given = {"mask_token_id": 5, "num_hidden_layers": 2, "draft_block_size": 8, "num_features": 3}
    made = {k: changes.pop(k) for k in list(changes) if k in (*given, "draft_vocab_size")}
    config = DrafterConfig.for_verifier(
        hf_config, name=str(verifier), dtype="float32", **(given | made)
    ).with_(**changes)
    drafter = Drafter(config)
    generator = torch.Generator().manual_seed(seed)
    drafter.init_weights(std=0.15, generator=generator)
    for name, weight in drafter.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight.data, 0.5, 1.5, generator=generator)
        if "_conv." in name or "candidate_selector." in name:
            # A fresh one changes nothing; codebooks must outweigh a random drafter's logits now and then.
            std = 1.0 if "codebook" in name else 0.15
            weight.data.add_(std * torch.randn(weight.shape, generator=generator))
    weights = dict(drafter.state_dict())
    if config.has_draft_vocab:
        ids = torch.randperm(config.vocab_size, generator=generator)[: config.logits_vocab_size]
        ids = ids.sort().values
        from safetensors.torch import load_file

        weights["d2t"] = ids - torch.arange(len(ids))
        weights["lm_head.weight"] = load_file(verifier / "model.safetensors")["lm_head.weight"][ids]
    save_drafter(path, config, weights, fmt)  # type: ignore[arg-type]
    return path


def write_prompts(path: Path, count: int, seed: int = 0) -> Path:
    """A JSONL file of one-turn requests; every third shares a long system message."""
    rng = random.Random(seed)
    system = {"role": "system", "content": sentence(random.Random(99), 40)}
    rows = [
        {
            "messages": [
                *([system] if i % 3 == 0 else []),
                {"role": "user", "content": sentence(rng, rng.randint(4, 14))},
            ]
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompt_ids(verifier: Path, prompts: Path, count: int | None = None) -> list[list[int]]:
    """The prompts of a file as a server tokenises them."""
    from vllm_dflash.bench.prompts import load_prompts

    return load_prompts(str(verifier), str(prompts), {}, count or 10**6)


# -- subprocesses ------------------------------------------------------------------------------


def environment(**extra: str | None) -> dict[str, str]:
    env = {**os.environ, **CPU_ENV, **{k: v for k, v in extra.items() if v is not None}}
    return {k: v for k, v in env.items() if extra.get(k, "") is not None}


def cli_command(*args: str | Path, v2: bool = False) -> list[str]:
    """``vllm-dflash``, on the V2 runner with interpreted kernels if asked for."""
    if v2:
        return [sys.executable, str(Path(__file__).with_name("interpreted_v2.py")), *map(str, args)]
    return [str(Path(sys.executable).with_name("vllm-dflash")), *map(str, args)]


def cli(
    *args: str | Path,
    code: int = 0,
    timeout: float = 600,
    env: dict[str, str] | None = None,
    v2: bool = False,
    **popen,
) -> subprocess.CompletedProcess[str]:
    """Runs ``vllm-dflash``; its exit code must be ``code``."""
    command, variables = cli_command(*args, v2=v2), environment(**(env or {}))
    if env or popen:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=timeout, **popen
        )
    elif v2:
        script = "from helpers import interpreted_v2\ninterpreted_v2.main()"
        done = warm.run(["-c", script, *map(str, args)], variables, timeout, v2=True)
    else:
        done = warm.run(command, variables, timeout)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def engine_job(
    job: dict[str, Any],
    tmp: Path,
    *,
    env: dict[str, str] | None = None,
    timeout: float = 600,
    module: str = "helpers.engine_jobs",
) -> dict[str, Any]:
    """Runs one engine in a process of its own (see ``engine_jobs.py``) and returns what it says.

    An engine that could not be built gives ``{"error": ..., "error_type": ...}``.
    """
    tmp.mkdir(parents=True, exist_ok=True)
    number = len(list(tmp.glob("job-*.json")))
    job_file, out_file = tmp / f"job-{number}.json", tmp / f"out-{number}.json"
    job_file.write_text(json.dumps(job))
    variables = environment(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", **{"PYTHONPATH": python_path(), **(env or {})}
    )
    command = [module, str(job_file), str(out_file)]
    if "PYTHONPATH" in (env or {}):  # another vLLM
        done = subprocess.run(
            [sys.executable, "-m", *command],
            env=variables,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    else:
        done = warm.run(command, variables, timeout, v2=job.get("runner") == "v2")
    tail = f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert done.returncode == 0, f"exit {done.returncode}\n{tail}"
    assert out_file.is_file(), f"no {out_file}\n{tail}"
    return {**json.loads(out_file.read_text()), "log": done.stdout + done.stderr}
