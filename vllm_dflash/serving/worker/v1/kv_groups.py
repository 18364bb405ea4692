"""The KV-cache groups that hold the drafter's layers on the V1 runner; vLLM's own proposer knows one."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class DraftGroup:
    """Draft layers that share a block table and an attention mode.

    Attributes:
        attention: vLLM's ``AttentionGroup`` of the layers.
        row: where the block table comes in ``KVGroups.ids``.
        causal: whether a query sees only earlier positions.
    """

    attention: Any
    row: int
    causal: bool


class KVGroups:
    """Where each draft layer's cache is.

    Attributes:
        ids: vLLM's KV-cache groups with draft layers. The first is the one whose block table comes with the
            metadata of a step.
        groups: the draft layers by cache group and causality.
        layer_rows: for each draft layer in order, which of ``ids`` holds it.
        rows: the requests of the step that are drafted for, None for all.
    """

    rows: Tensor | None = None

    def __init__(self, groups: list[DraftGroup], ids: list[int], layer_names: list[str]) -> None:
        self.groups, self.ids = groups, ids
        rows = {name: group.row for group in groups for name in group.attention.layer_names}
        self.layer_rows = [rows[name] for name in layer_names]

    @property
    def single(self) -> bool:
        """Whether all layers can share one attention metadata, as vLLM takes for granted."""
        return len(self.groups) == 1

    def block_tables(self, runner: Any, metadata: Any) -> list[Tensor]:
        """int32 ``[B, blocks]`` per cache group, for the step that ``metadata`` is of."""
        others = [
            runner.input_batch.block_table[gid].get_device_tensor(metadata.num_reqs)
            for gid in self.ids[1:]
        ]
        return [metadata.block_table_tensor, *others]

    def _drafting_tables(self, runner: Any, block: Any) -> list[Tensor]:
        """Block tables of the requests that are drafted for; the first one comes with ``block``."""
        if self.rows is None:
            return self.block_tables(runner, block)
        num_requests = runner.input_batch.num_reqs
        return [
            block.block_table_tensor,
            *(
                runner.input_batch.block_table[gid].get_device_tensor(num_requests)[self.rows]
                for gid in self.ids[1:]
            ),
        ]

    def attention_metadata(
        self,
        runner: Any,
        block: Any,
        query_slots: Tensor,
        build: Callable[[Any, Any], tuple[list[Any], dict[str, Any]]],
    ) -> tuple[list[Any], dict[str, Any]]:
        """What ``build_per_group_and_layer_attn_metadata`` of vLLM returns, group by group.

        Args:
            block: vLLM's ``CommonAttentionMetadata`` of the drafter's queries, of the first group.
            query_slots: ``[G, >= B*Q]``.
            build: that method of vLLM for one ``AttentionGroup`` and its ``CommonAttentionMetadata``.

        Raises:
            RuntimeError: the attention backend cannot let queries see later positions.
        """
        tables = self._drafting_tables(runner, block)
        per_group: list[Any] = []
        per_layer: dict[str, Any] = {}
        for group in self.groups:
            common = copy(block)
            common.block_table_tensor = tables[group.row]
            common.slot_mapping = query_slots[group.row, : block.num_actual_tokens]
            common.causal = group.causal
            made, of_layers = build(group.attention, common)
            if not group.causal and any(getattr(m, "causal", None) is not False for m in made):
                raise RuntimeError(
                    f"{type(made[0]).__name__} of layer {group.attention.layer_names[0]} has no non-causal "
                    'attention; choose another attention_backend in --speculative-config, e.g. "FLASH_ATTN"'
                )
            per_group += made
            per_layer |= of_layers
        return per_group, per_layer
