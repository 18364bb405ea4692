"""A scheduler of the user's own: ``scheduler_cls`` of a test."""

from vllm.v1.core.sched.scheduler import Scheduler


class OwnScheduler(Scheduler):
    """vLLM's, under another name."""
