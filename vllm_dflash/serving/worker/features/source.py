"""What training needs of the object that drafts in vLLM's worker, whichever of its model runners serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from vllm_dflash.serving.worker.features.recorder import FeatureRecorder


@runtime_checkable
class FeatureSource(Protocol):
    """Our proposer of the V1 runner and our speculator of the V2 runner.

    Attributes:
        vllm_config: the engine's configuration.
        recorder: gets the verifier's features of every step, or None.
        drafting: False leaves the draft pass and the drafter's context out of every step. The scheduler must
            not ask for drafts meanwhile (``draft_limits.limiting``).
    """

    vllm_config: Any
    recorder: FeatureRecorder | None
    drafting: bool


def feature_source(runner: Any) -> FeatureSource:
    """The proposer or speculator of one of vLLM's model runners.

    Raises:
        ValueError: it is not ours.
    """
    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    if not isinstance(drafter, FeatureSource):
        raise ValueError(
            f"the engine drafts with {type(drafter).__name__}, which hands no features to training: is the "
            "plugin switched off (VLLM_PLUGINS, VLLM_DFLASH_DISABLE)?"
        )
    return drafter
