"""The shapes that docs/user/training.md plans: published configurations, less what a plan does not read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from vllm_dflash.config import DrafterConfig
from vllm_dflash.training.config import EngineOptions, Hyperparameters
from vllm_dflash.training.memory import MemoryPlan, card_bytes, plan_memory
from vllm_dflash.training.verifier_memory import VerifierSizes, verifier_sizes

CONFIGS = Path(__file__).parents[1] / "data" / "verifier_configs"
#: Weights of 4 bits in groups of 32 with a bfloat16 scale each, the embedding as it is.
FOUR_BITS = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}
    },
}


@dataclass(frozen=True)
class Shape:
    """A verifier on ``ranks`` GPUs of ``gigabytes`` each."""

    verifier: str
    gigabytes: int
    ranks: int = 1
    four_bits: bool = False

    @property
    def name(self) -> str:
        bits = ", 4 bits" if self.four_bits else ""
        return f"{self.verifier}{bits}, {self.ranks} x {self.gigabytes} GB"

    @property
    def hf_config(self) -> Any:
        config = AutoConfig.from_pretrained(CONFIGS / self.verifier)
        if self.four_bits:
            config.quantization_config = FOUR_BITS
        return config

    @property
    def drafter(self) -> DrafterConfig:
        return DrafterConfig.for_verifier(self.hf_config, mask_token_id=5)

    @property
    def sizes(self) -> VerifierSizes:
        return verifier_sizes(self.hf_config, None, "auto")

    def plan(self, hparams: Hyperparameters | None = None, **drafter: Any) -> MemoryPlan:
        return plan_memory(
            self.hf_config.get_text_config(),
            self.sizes,
            self.drafter.with_(**drafter),
            hparams or Hyperparameters(),
            EngineOptions(tensor_parallel_size=self.ranks),
            card_bytes(self.gigabytes),
        )


SHAPES = (
    Shape("Qwen3-4B", 24),
    Shape("Qwen3-8B", 80),
    Shape("gemma-4-31B-it", 141),
    Shape("gemma-4-31B-it", 96, ranks=2),
    Shape("gemma-4-31B-it", 48, four_bits=True),
)
