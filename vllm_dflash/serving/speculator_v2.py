"""The V2 speculator (vLLM's default runner on GPUs): vLLM's own, observed.

The V2 runner needs Triton and does not start on vLLM's CPU backend: this file has been read against
vLLM's source and unit-tested with a stand-in speculator, but not run on a GPU yet.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


class ObservedSpeculator:
    """Mixin in front of vLLM's ``DFlashSpeculator``: hands what it sees to a recorder.

    ``propose`` is passed through whole, because its parameters change from release to release.
    """

    recorder: Any = None

    def propose(self, input_batch: Any, *args, **kwargs) -> Tensor:
        propose = super().propose  # type: ignore[misc]
        if self.recorder is not None:
            # Real steps pass these by position, dummy runs by name.
            given = inspect.signature(propose).bind(input_batch, *args, **kwargs).arguments
            if not given.get("dummy_run", False):
                self._observe(input_batch, given["aux_hidden_states"], given["num_rejected"])
        return propose(input_batch, *args, **kwargs)

    def _observe(self, batch: Any, aux_hidden_states: list[Tensor], num_rejected: Tensor) -> None:
        num_tokens = batch.num_tokens
        self.recorder.observe(
            request_ids=batch.req_ids,
            query_start_loc=batch.query_start_loc_np[: batch.num_reqs + 1],
            positions=batch.positions[:num_tokens],
            features_TF=torch.cat([h[:num_tokens] for h in aux_hidden_states], dim=-1),
            num_rejected=num_rejected[: batch.num_reqs],
        )


def adopt(speculator: Any) -> None:
    """Puts :class:`ObservedSpeculator` in front of a speculator's own class.

    The instance is changed, not vLLM's class: DFlash 2, LiLiCorr and DSpark inherit from that.
    """
    cls = type(speculator)
    speculator.__class__ = type(cls.__name__, (ObservedSpeculator, cls), {})
