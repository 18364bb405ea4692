"""Recording the verifier's features while it runs: the one place where training data comes from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vllm_dflash.serving.verifier import FinalStates


class FeatureRecorder:
    """Collects ``[T, F]`` features per request, whatever the scheduler makes of it.

    Rows are written by position into a buffer of the final length, so chunked prefill, mixed
    batches, preemption with recomputation and decoding all give the same buffer.
    """

    def __init__(self) -> None:
        self._lengths: dict[str, int] = {}
        self._buffers: dict[str, Tensor] = {}
        self._filled: dict[str, Tensor] = {}
        self._finals: dict[str, Tensor] = {}
        #: Set to record the verifier's final hidden states too (for the kl loss).
        self.final_states: FinalStates | None = None

    def watch(self, lengths: dict[str, int]) -> None:
        """Asks for the first ``lengths[key]`` rows of the request that is submitted as ``key``."""
        self._lengths.update(lengths)

    def _key(self, request_id: str) -> str | None:
        if request_id in self._lengths:
            return request_id
        # vLLM makes request ids unique inside the engine by appending "-" and 8 random characters
        # (InputProcessor.assign_request_id).
        external, dash = request_id[:-9], request_id[-9:-8]
        return external if dash == "-" and external in self._lengths else None

    def observe(
        self,
        request_ids: Sequence[str],
        query_start_loc: Tensor | np.ndarray,
        positions: Tensor,
        features_TF: Tensor,
        num_rejected: Tensor | None,
    ) -> None:
        """Takes the rows of one verifier step.

        Args:
            request_ids: vLLM's id of each request of the batch, in its order.
            query_start_loc: int ``[B + 1]`` on the CPU, the rows of each request.
            positions: int64 ``[T]`` (or ``[3, T]`` with M-RoPE, whose first row is text time).
            features_TF: concatenated aux hidden states of the step.
            num_rejected: int ``[B]`` draft rows at each request's end that were not accepted.
        """
        if positions.dim() == 2:
            positions = positions[0]
        starts = query_start_loc.tolist()
        rejected = num_rejected.tolist() if num_rejected is not None else None
        for i, request_id in enumerate(request_ids):
            key = self._key(request_id)
            if key is None:
                continue
            first, last = starts[i], starts[i + 1] - (rejected[i] if rejected else 0)
            if last <= first:
                continue
            length = self._lengths[key]
            if key not in self._buffers:
                self._buffers[key] = features_TF.new_empty(length, features_TF.shape[-1])
                self._filled[key] = torch.zeros(length, dtype=torch.bool)
            at = positions[first:last]
            wanted = at < length
            rows = features_TF[first:last]
            if not wanted.all():
                at, rows = at[wanted], rows[wanted]
            self._buffers[key][at] = rows
            self._filled[key][at.cpu()] = True
            if self.final_states is not None and self.final_states.last is not None:
                final = self.final_states.last[first:last][wanted]
                if key not in self._finals:
                    self._finals[key] = final.new_empty(length, final.shape[-1])
                self._finals[key][at] = final

    def take(self, key: str, length: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Hands over a request's features ``[T, F]`` (and final states ``[T, H]``); forgets them.

        Args:
            key: as given to :meth:`watch`.
            length: rows expected, for requests that ended before the watched length.

        Raises:
            ValueError: rows are missing (a prefix-cache hit, or a batch too close to max_model_len
                for vLLM to call the proposer), or the features cannot be real: non-finite, zero or
                constant.
        """
        watched = self._lengths.pop(key, 0)
        if key not in self._buffers:
            raise ValueError(f"no features were recorded for {key}")
        features, filled = self._buffers.pop(key), self._filled.pop(key)
        final = self._finals.pop(key, None)
        if length is not None:
            if length > watched:
                raise ValueError(f"{length} feature rows of {key} wanted, {watched} were watched")
            features, filled = features[:length], filled[:length]
            final = final[:length] if final is not None else None
        if not filled.all():
            raise ValueError(
                f"{int((~filled).sum())} of {len(filled)} feature rows of {key} were not recorded"
            )
        problem = feature_problem(features)
        if problem:
            raise ValueError(f"features of {key} are {problem}")
        return features, final

    def clear(self) -> None:
        self._lengths.clear()
        self._buffers.clear()
        self._filled.clear()
        self._finals.clear()


def feature_problem(features_TF: Tensor) -> str | None:
    """Why features cannot be those of a working verifier, None if they can.

    All-zero and repeated states are what broken extraction produced elsewhere (vLLM #46301), and a
    drafter trained on them looks fine until it is served.
    """
    if not torch.isfinite(features_TF).all():
        return "not finite"
    if not features_TF.any():
        return "all zero"
    if features_TF.shape[0] > 2 and torch.equal(features_TF[1:], features_TF[:-1]):
        return "the same at every position"
    return None
