"""Recording the verifier's features while it runs: the one place where training data comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vllm_dflash.serving.worker.features.verifier import FinalStates

#: Features ``[T, F]`` and, where they are recorded, final states ``[T, H]``.
Rows = tuple[Tensor, Tensor | None]


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
        #: Called at a request's first rows with its key and their first position; gives the rows of a cached
        #: prefix before them, None where there are none.
        self.started: Callable[[str, int], Rows | None] | None = None
        #: Keeps rows in the host's memory as they come, for more requests at once than a device has room for.
        self.on_host = False

    def watch(self, lengths: dict[str, int]) -> None:
        """Asks for the first ``lengths[key]`` rows of the request that is submitted as ``key``."""
        self._lengths.update(lengths)

    @property
    def watching(self) -> bool:
        """Whether any request's rows are wanted."""
        return bool(self._lengths)

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
        num_computed: np.ndarray | None = None,
    ) -> None:
        """Takes the rows of one verifier step.

        Rows are copied without waiting for the device where the CPU knows their positions and no draft was
        verified; otherwise the device is waited for once a step.

        Args:
            request_ids: vLLM's id of each request of the batch, in its order.
            query_start_loc: int ``[B + 1]`` on the CPU, the rows of each request.
            positions: int64 ``[T]`` (or ``[3, T]`` with M-RoPE, whose first row is text time).
            features_TF: concatenated aux hidden states of the step.
            num_rejected: int ``[B]`` draft rows at each request's end that were not accepted; None where
                nothing was drafted.
            num_computed: int ``[B]`` on the CPU, tokens of each request before this step. None where the CPU
                only guesses them (scheduled ahead of the drafts' verification).
        """
        keys = [self._key(request_id) for request_id in request_ids]
        if all(key is None for key in keys):
            return
        starts = query_start_loc.tolist()
        if num_computed is None:
            at = positions[0] if positions.dim() == 2 else positions
            firsts = at[query_start_loc[: len(keys)].clip(max=len(at) - 1)].tolist()
        else:
            firsts = num_computed.tolist()
        rejected = num_rejected.tolist() if num_rejected is not None else [0] * len(keys)
        finals = self.final_states.last if self.final_states is not None else None
        if self.on_host:
            features_TF = features_TF.cpu()
            finals = finals.cpu() if finals is not None else None
        new = []
        for i, key in enumerate(keys):
            if key is None:
                continue
            length, first = self._lengths[key], firsts[i]
            num_rows = min(starts[i + 1] - rejected[i] - starts[i], length - first)
            if num_rows <= 0:
                continue
            if key not in self._buffers:
                self._buffers[key] = features_TF.new_empty(length, features_TF.shape[-1])
                self._filled[key] = torch.zeros(length, dtype=torch.bool)
                new.append((first, key))
            rows, to = slice(starts[i], starts[i] + num_rows), slice(first, first + num_rows)
            self._buffers[key][to] = features_TF[rows]
            self._filled[key][to] = True
            if finals is not None:
                if key not in self._finals:
                    self._finals[key] = finals.new_empty(length, finals.shape[-1])
                self._finals[key][to] = finals[rows]
        if self.started is not None:
            # A prefix may be another's of this same step, which itself goes on from a shorter one.
            for first, key in sorted(new):
                if (prefix := self.started(key, first)) is not None:
                    self._fill(key, first, *prefix)

    def _fill(self, key: str, end: int, features_TF: Tensor, final_TH: Tensor | None) -> None:
        self._buffers[key][:end] = features_TF
        self._filled[key][:end] = True
        if final_TH is not None:
            self._finals[key][:end] = final_TH

    def rows(self, key: str, end: int) -> Rows | None:
        """The first ``end`` rows of a request that is still recorded; None where one is missing."""
        if key not in self._buffers or end > len(self._filled[key]):
            return None
        if not self._filled[key][:end].all():
            return None
        final = self._finals.get(key)
        return self._buffers[key][:end], None if final is None else final[:end]

    def take(
        self,
        key: str,
        length: int | None = None,
        layers: Sequence[int] = (),
        token_ids: Sequence[int] | None = None,
        start: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Hands over a request's features ``[T, F]`` (and final states ``[T, H]``); forgets them.

        Args:
            key: as given to :meth:`watch`.
            length: rows expected, for requests that ended before the watched length.
            layers, token_ids: see :func:`check_features`.
            start: the first row wanted; those before may be missing, as those of a cached prefix are.

        Raises:
            BrokenFeatures: the features cannot be real: zero, constant or repeated.
            ValueError: rows are missing (a prefix-cache hit, or a batch too close to max_model_len
                for vLLM to call the proposer), or not finite.
        """
        watched = self._lengths.pop(key, 0)
        if key not in self._buffers:
            raise ValueError(f"no features were recorded for {key}")
        features, filled = self._buffers.pop(key), self._filled.pop(key)
        final = self._finals.pop(key, None)
        length = watched if length is None else length
        if length > watched:
            raise ValueError(f"{length} feature rows of {key} wanted, {watched} were watched")
        features, filled = features[start:length], filled[start:length]
        final = final[start:length] if final is not None else None
        if not filled.all():
            raise ValueError(
                f"{int((~filled).sum())} of {len(filled)} feature rows of {key} were not recorded"
            )
        try:
            check_features(features, layers, token_ids and token_ids[start:])
        except BrokenFeatures as error:
            raise BrokenFeatures(
                f"features of {key} are {error}. The verifier's hidden states do not reach the drafter; "
                "vLLM's Transformers backend may extract them (--engine-args "
                '\'{"model_impl": "transformers"}\'). Please report it with the verifier\'s name'
            ) from None
        except ValueError as error:
            raise ValueError(f"features of {key} are {error}") from None
        return features, final

    def clear(self) -> None:
        self._lengths.clear()
        self._buffers.clear()
        self._filled.clear()
        self._finals.clear()


class BrokenFeatures(ValueError):
    """Features that no working extraction gives: zero, constant or repeated. Training must stop."""


#: Columns that decide which rows are compared in full.
_PROBES = 8
#: Rows with equal states and different tokens before they count: tokens may share an embedding.
_MIN_REPEATED = 4


def check_features(
    features_TF: Tensor,
    layers: Sequence[int] = (),
    token_ids: Sequence[int] | None = None,
) -> None:
    """Looks for features that cannot be those of a working verifier.

    All-zero and repeated states are what broken extraction produced elsewhere (vLLM #46301), and a
    drafter trained on them looks fine until it is served. Each layer's columns are looked at by themselves.

    Args:
        features_TF: features of one sequence, the layers side by side.
        layers: the verifier layers, ascending, for messages; without them all columns are one layer.
        token_ids: the sequence's tokens. States of equal tokens may be equal (behind a convolution, or where
            nothing but one token precedes them); those of different tokens are not. Without them only
            features that are the same at every position count as repeated.

    Raises:
        BrokenFeatures: a layer is zero in a row after the first, the same in all rows, or repeats rows.
        ValueError: not finite, which a verifier may produce on odd input.
    """
    for i, x_TH in enumerate(features_TF.chunk(max(1, len(layers)), dim=-1)):
        where = f" behind verifier layer {layers[i]}" if layers else ""
        finite_T = torch.isfinite(x_TH).all(-1)
        if not finite_T.all():
            raise ValueError(f"not finite{where} ({_rows(~finite_T)})")
        zero_T = ~x_TH.any(-1)
        # A first token with a zero embedding has nothing else to attend to.
        if zero_T[1:].any() or zero_T.all():
            raise BrokenFeatures(f"zero{where} ({_rows(zero_T)})")
        same = len(x_TH) > 2 and torch.equal(x_TH[1:], x_TH[:-1])
        if same and (token_ids is None or len(set(token_ids[: len(x_TH)])) > 1):
            raise BrokenFeatures(f"the same at every position{where}")
        if token_ids is not None:
            repeated_T, first_T = _repeated(x_TH, token_ids)
            if int(repeated_T.sum()) >= _MIN_REPEATED:
                row = int(repeated_T.nonzero()[0])
                raise BrokenFeatures(
                    f"repeated{where} ({_rows(repeated_T)}): row {row} is row {int(first_T[row])}, of "
                    "another token"
                )


def _rows(bad_T: Tensor) -> str:
    rows = bad_T.nonzero().flatten().tolist()
    return f"{len(rows)} of {len(bad_T)} rows, {rows[0]} to {rows[-1]}"


def _repeated(x_TH: Tensor, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows equal to an earlier row of another token, bool ``[T]``, and those rows, int ``[T]``."""
    probes = torch.linspace(0, x_TH.shape[1] - 1, _PROBES, device=x_TH.device).long()
    _, group_T = x_TH[:, probes].unique(dim=0, return_inverse=True)
    rows_T = torch.arange(len(x_TH), device=x_TH.device)
    first = torch.full_like(rows_T, len(x_TH)).scatter_reduce_(0, group_T, rows_T, "amin")
    first_T = first[group_T]
    tokens_T = torch.tensor(list(token_ids[: len(x_TH)]), device=x_TH.device)
    repeated_T = tokens_T != tokens_T[first_T]
    at = repeated_T.nonzero().flatten()
    repeated_T[at] = (x_TH[at] == x_TH[first_T[at]]).all(-1)
    return repeated_T, first_T
