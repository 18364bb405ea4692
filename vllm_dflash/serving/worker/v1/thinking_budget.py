"""``thinking_token_budget`` on vLLM's V1 runner: what a budget forces, at each position of a draft."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

_FORCED = 1e9


class ThinkingBudgets(ThinkingBudgetStateHolder):
    """vLLM's state of the budgets, moved on token by token as without a drafter.

    vLLM's own is right as long as a step brings one token. With drafts it moves on as if all of them were
    accepted, and where some requests have none it forces tokens in rows of others. Here the state follows the
    tokens written, and a copy of it the drafts. With or without drafts, vLLM's leaves the state of a finished
    request to one without a budget that moves into its row, and begins anew with one that was preempted.
    """

    #: By row: at each draft token, and behind them. Replaced by each step.
    _forced: dict[int, list[int | None]] = {}  # noqa: RUF012

    def sync_batch(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._state, batch_update, self._new_state)

    def _new_state(self, params: Any, prompt: list[int] | None, output: list[int]) -> Any:
        budget = params.thinking_token_budget
        return None if budget is None else self._init_state_entry(prompt, budget)

    def update_state(
        self,
        output_token_ids: list[list[int]],
        spec_token_ids: list[list[int]] | None,
        repeat_indices: Tensor | None = None,
    ) -> None:
        self._forced = {}
        for row, state in self._state.items():
            if row >= len(output_token_ids):
                continue
            output = output_token_ids[row]
            drafts = spec_token_ids[row] if spec_token_ids and row < len(spec_token_ids) else []
            written = len(output)
            # Token by token too for a request that is back from preemption: it may have been made to end.
            for end in range(state.get("num_seen", -1) + 1, written):
                self._move_on(state, output[:end])
            forced = [self._move_on(state, output)]
            state["num_seen"] = written
            ahead = dict(state)
            for end in range(1, len(drafts) + 1):
                forced.append(self._move_on(ahead, [*output, *drafts[:end]]))
            self._forced[row] = forced

    def _move_on(self, state: dict[str, Any], output: list[int]) -> int | None:
        """The token that must come behind these, if any."""
        state["output_tok_ids"], state["spec_token_ids"], state["force_index"] = output, [], []
        self._update_think_state(state)
        ids, at = self.think_end_token_ids, state["end_count"]
        forcing = state["in_end"] and state["force_index"] and at < len(ids)
        return ids[at] if forcing else None

    def _find_last_sequence_index(  # type: ignore[override]
        self, target_list: list[int], token_ids: list[int]
    ) -> int:
        # vLLM's compares at every position, in Python: too slow for each token of a draft.
        backwards, at = target_list[::-1], -1
        while token_ids:
            try:
                at = backwards.index(token_ids[-1], at + 1)
            except ValueError:
                break
            start = len(target_list) - at - len(token_ids)
            if start >= 0 and target_list[start : start + len(token_ids)] == token_ids:
                return start
        return -1

    def apply_to_logits(
        self,
        logits: Tensor,
        predict_bonus_token: bool,
        spec_token_ids: list[list[int]] | None,
    ) -> Tensor:
        """Forces in rows ``[requests, V]``, or those of the draft tokens ``[sum of drafts, V]``."""
        drafts = spec_token_ids or []
        # Steps without drafts go to the sampler that has one row a request.
        one_each = predict_bonus_token or not any(drafts)
        rows: list[int] = []
        tokens: list[int] = []
        start = 0
        for row in range(max(len(drafts), *self._forced, 0) + 1):
            forced = self._forced.get(row, [])
            num_drafts = len(drafts[row]) if row < len(drafts) else 0
            first, here = (row, forced[-1:]) if one_each else (start, forced[:num_drafts])
            for i, token in enumerate(here):
                if token is not None and first + i < logits.shape[0]:
                    rows.append(first + i)
                    tokens.append(token)
            start += num_drafts
        if rows:
            index = tuple(
                async_tensor_h2d(x, dtype=torch.long, device=logits.device) for x in (rows, tokens)
            )
            logits.index_put_(index, logits.new_tensor(_FORCED))
        return logits
