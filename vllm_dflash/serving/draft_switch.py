"""The worker's side of draft lengths that the scheduler chooses: costs are measured, drafts made if told."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vllm.distributed.parallel_state import get_tp_group

from vllm_dflash.serving import calibration, handover, scheduler
from vllm_dflash.serving.draft_stats import engine_name

logger = logging.getLogger("vllm.vllm_dflash")


def install(runner: Any, speculator: Any) -> None:
    """Measures the costs of steps, hands them to the scheduler, and drafts as that says from now on.

    Nothing happens where the scheduler will not choose.

    Args:
        runner: vLLM's V2 runner, able to run steps.
        speculator: its speculator, ours.
    """
    config = runner.vllm_config
    if not scheduler.chooses(config):
        return
    path = calibration.costs_file(config)
    hand_over(calibration.RunsV2(runner), path.with_name(f"v2-{path.name}"))
    _follow(runner, speculator)


def hand_over(runs: calibration.Runs, path: Path) -> None:
    """Measures the costs of steps, or takes those kept at ``path``, for the scheduler.

    Where they cannot be measured, on any rank, the scheduler gets nothing and schedules a fixed number of
    draft tokens; the log has the error.
    """
    try:
        cost = calibration.measured(runs, path)
    except Exception:
        logger.exception("vllm-dflash cannot measure its steps")
        cost = None
    if not calibration.all_ranks(cost is not None):
        return
    if cost is not None and get_tp_group().rank_in_group == 0:
        name = engine_name(runs.vllm_config)
        assert name is not None  # the scheduler would not choose
        handover.give(name, cost)


def _follow(runner: Any, speculator: Any) -> None:
    """Tells the speculator what the step's schedule says: vLLM 0.31 does not, 0.32 does without effect."""
    execute = runner.execute_model

    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        dummy = kwargs.get("dummy_run", False)
        speculator.num_wanted = None if dummy else scheduler_output.num_spec_tokens_to_schedule
        return execute(scheduler_output, *args, **kwargs)

    runner.execute_model = execute_model
