"""Names of 0.1 that 0.2 still takes; to be removed after it."""

from __future__ import annotations

import sys
from typing import Any

from typer.core import TyperCommand

from vllm_dflash.bounds import option_of

_SHAPE = {
    "layers": "num_layers",
    "features": "num_target_layers",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
}
_HPARAMS = {
    "anchors": "num_anchors",
    "sequences": "batch_size",
    "clip": "max_grad_norm",
    "warmup": "warmup_ratio",
    "ema": "ema_decay",
    "max_bad": "max_skipped",
}
FLAGS = {option_of(old): option_of(new) for old, new in (_SHAPE | _HPARAMS).items()}
FLAGS["--from"] = "--init-from"
MODES = {"ours": "plugin"}
_RUN_KEYS = {f"shape.{old}": f"shape.{new}" for old, new in _SHAPE.items()}
_RUN_KEYS |= {f"hparams.{old}": f"hparams.{new}" for old, new in _HPARAMS.items()}


class OldFlags(TyperCommand):
    """A command that also takes the flags of before; ``--help`` shows the new ones only."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        parts = [arg.partition("=") for arg in args]
        new = [FLAGS.get(name, name) + equals + value for name, equals, value in parts]
        if not ctx.resilient_parsing:  # as shell completion does
            announce({name: FLAGS[name] for name, *_ in parts if name in FLAGS})
        return super().parse_args(ctx, new)


def announce(used: dict[str, str]) -> None:
    """One line on the console about old names in use, by the new ones."""
    if used:
        names = ", ".join(f"{old} is now {new}" for old, new in used.items())
        print(f"note: {names}; the next release takes the new names only", file=sys.stderr)


def bench_modes(modes: tuple[str, ...]) -> tuple[str, ...]:
    announce({mode: MODES[mode] for mode in modes if mode in MODES})
    return tuple(MODES.get(mode, mode) for mode in modes)


def run_config(config: dict[str, Any]) -> dict[str, Any]:
    """A run's settings, as ``run.json`` has them, by their names of today."""
    return {_RUN_KEYS.get(key, key): value for key, value in config.items()}
