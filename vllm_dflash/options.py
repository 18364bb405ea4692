"""Every option of the plugin: ``dflash_*`` keys of ``--speculative-config``, environment variables.

vLLM's ``SpeculativeConfig`` refuses unknown keys, so the plugin takes the ``dflash_*`` keys out
before vLLM sees them and carries them in ``additional_config["vllm_dflash"]``, which reaches every
worker process and is part of vLLM's compile-cache key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

PREFIX = "dflash_"
#: The drafter architecture that both public formats resolve to in vLLM.
DRAFTER_ARCH = "DFlashDraftModel"
#: That of drafters with DFlash 2's head.
HEAD_ARCH = "DFlash2DraftModel"
#: Key of ``VllmConfig.additional_config`` under which the options travel.
ADDITIONAL_CONFIG_KEY = "vllm_dflash"
#: Set to 1 to leave stock dflash in place although the plugin is installed.
ENV_DISABLE = "VLLM_DFLASH_DISABLE"


@dataclass(frozen=True)
class Options:
    """The plugin's serving options; field names are the keys without ``dflash_``.

    Attributes:
        check: compare the drafter's configuration and weight shapes with the verifier before
            anything is allocated, and its values for NaN and infinity while they load.
        greedy_draft_vocab: take the greedy draft token inside the drafter's own vocabulary instead
            of scattering its logits over the verifier's first. The tokens are the same.
        ops: build blocks, tap the verifier and store the context's K/V with the plugin's ops instead of
            vLLM's sequences of calls. False to compare the two.
        draft_length: "auto" drafts each step as many tokens for each request as pay, at most
            ``num_speculative_tokens``; "fixed" always drafts so many, or what vLLM's batch-size table says.
        lookup: "auto" takes prompt lookup's draft for a request where it promises more than the drafter's;
            "off" leaves it out. Only with ``draft_length`` "auto".
        learn: folder in which the drafter learns from what the server answers; "" for a drafter that stays
            as it is. The further options are for it.
        learn_weights: "all" learns all of them; "decode" those that the context's K/V do not depend on, so
            that running requests and cached prefixes stay as good as they were; "auto" is "all", or "decode"
            under tensor parallelism; "none" leaves it to another server, which has this one's folder as
            ``learn_from``.
        learn_from: the folder of a server whose requests are learned from, and which gets what is learned.
        learn_lr: learning rate, constant; what serves is the average of the last steps' weights.
        learn_slice_ms: milliseconds of training that a request may have to wait for.
        learn_share: of the time of a server that is never idle, for learning; 0 for idle time only.
        learn_gib: host memory of the features of the conversations that are kept.
        learn_store: whether their tokens are kept on "disk" too, at most ``learn_disk_gib`` of them and for
            ``learn_days``.
        learn_filter: ``module:function`` that sees each conversation before it is kept.
    """

    check: bool = True
    greedy_draft_vocab: bool = True
    ops: bool = True
    draft_length: str = field(default="auto", metadata={"allowed": ("auto", "fixed")})
    lookup: str = field(default="auto", metadata={"allowed": ("auto", "off")})
    learn: str = field(default="", metadata={"like": ""})
    learn_weights: str = field(
        default="auto", metadata={"allowed": ("auto", "all", "decode", "none")}
    )
    learn_from: str = field(default="", metadata={"like": ""})
    learn_lr: float = field(default=6e-4, metadata={"like": 1.0, "low": 1e-7, "high": 0.1})
    learn_slice_ms: float = field(default=100.0, metadata={"like": 1.0, "low": 1, "high": 60_000})
    learn_share: float = field(default=0.0, metadata={"like": 1.0, "low": 0, "high": 0.9})
    learn_gib: float = field(default=2.0, metadata={"like": 1.0, "low": 0.01, "high": 2**16})
    learn_store: str = field(default="memory", metadata={"allowed": ("memory", "disk")})
    learn_disk_gib: float = field(default=1.0, metadata={"like": 1.0, "low": 0.01, "high": 2**16})
    learn_days: float = field(default=30.0, metadata={"like": 1.0, "low": 0.001, "high": 36_500})
    learn_filter: str = field(default="", metadata={"like": ""})

    @classmethod
    def from_speculative_config(cls, config: dict[str, Any]) -> tuple[Options, dict[str, Any]]:
        """Splits ``--speculative-config`` into our options and what is vLLM's.

        Raises:
            ValueError: an unknown ``dflash_*`` key or a value of the wrong type.
        """
        allowed = {PREFIX + f.name: f for f in fields(cls)}
        values: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for key, value in config.items():
            name = key.replace("-", "_")
            if not name.startswith(PREFIX):
                rest[key] = value
                continue
            if name not in allowed:
                raise ValueError(
                    f"speculative-config key {key!r} (value {value!r}) is not an option of "
                    f"vllm-dflash; its options are {', '.join(sorted(allowed))}"
                )
            if "like" in allowed[name].metadata:
                values[allowed[name].name] = _checked(key, value, allowed[name].metadata)
                continue
            choices = allowed[name].metadata.get("allowed", (True, False))
            # 1 == True, and is no switch.
            if type(value) is not type(choices[0]) or value not in choices:
                listed = " and ".join(json.dumps(c) for c in choices)
                raise ValueError(
                    f"speculative-config key {key!r} is {value!r}; allowed are {listed}"
                )
            values[allowed[name].name] = value
        return cls(**values), rest

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> Options:
        """The options a worker process finds in its ``VllmConfig``; defaults where none are."""
        carried: Any = None
        if isinstance(additional_config, dict):
            carried = additional_config.get(ADDITIONAL_CONFIG_KEY)
        if not isinstance(carried, dict):
            return cls()
        names = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in carried.items() if k in names})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _checked(key: str, value: Any, wanted: Mapping[str, Any]) -> Any:
    """A text or a number in its bounds; ValueError for anything else."""
    if isinstance(wanted["like"], str):
        if isinstance(value, str):
            return value
        raise ValueError(f"speculative-config key {key!r} is {value!r}; give a text")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not wanted["low"] <= value <= wanted["high"]:
        raise ValueError(
            f"speculative-config key {key!r} is {value!r}; give a number from {wanted['low']} to "
            f"{wanted['high']}"
        )
    return float(value)


def plugin_disabled() -> bool:
    """Whether ``VLLM_DFLASH_DISABLE`` switches the plugin off in this process."""
    return os.environ.get(ENV_DISABLE, "0").lower() not in ("", "0", "false")
