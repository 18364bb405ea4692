"""Draft tokens travel with the step's output; the engine core asks for none that it has."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, DraftTokenIds, ModelRunnerOutput

from vllm_dflash.serving import draft_return
from vllm_dflash.serving.worker.v1.model_runner import drafting_runner


class Runner:
    """As vLLM's V1 runner."""

    def __init__(self) -> None:
        self.drafter = SimpleNamespace(lengths=SimpleNamespace(sent={}))
        self.output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
        self.drafts: DraftTokenIds | None = DraftTokenIds(["a"], [[1, 2]])

    def sample_tokens(self, grammar_output):
        return self.output

    def take_draft_token_ids(self):
        return self.drafts

    def propose_draft_token_ids(self, scheduler_output): ...


class MultiprocExecutor:
    """As vLLM's: outputs and answers are pickled on their way from the worker."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.asked = runner, 0

    def sample_tokens(self, grammar_output, non_block=False):
        return pickle.loads(pickle.dumps(self.runner.sample_tokens(grammar_output)))

    def take_draft_token_ids(self):
        self.asked += 1
        return pickle.loads(pickle.dumps(self.runner.take_draft_token_ids()))


def made(sending: bool) -> tuple[Runner, MultiprocExecutor]:
    class Executor(MultiprocExecutor):
        pass

    Executor.sample_tokens = draft_return.keep_drafts(Executor.sample_tokens)
    Executor.take_draft_token_ids = draft_return.answer_from_output(Executor.take_draft_token_ids)
    runner = drafting_runner(Runner)() if sending else Runner()
    return runner, Executor(runner)


def test_drafts_come_with_the_output() -> None:
    runner, executor = made(sending=True)
    for drafts in ([[1, 2]], [[]], [[3]]):
        runner.drafts = DraftTokenIds(["a"], drafts)
        runner.output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
        executor.sample_tokens(None)
        taken = executor.take_draft_token_ids()
        assert (taken.req_ids, taken.draft_token_ids) == (["a"], drafts)
    assert executor.asked == 0
    # Once only: they are the latest step's.
    executor.take_draft_token_ids()
    assert executor.asked == 1


def test_without_them_the_worker_is_asked() -> None:
    runner, executor = made(sending=False)
    executor.sample_tokens(None)
    assert executor.take_draft_token_ids().draft_token_ids == [[1, 2]]
    assert executor.asked == 1
    runner, executor = made(sending=True)
    runner.output = EMPTY_MODEL_RUNNER_OUTPUT
    executor.sample_tokens(None)
    assert executor.take_draft_token_ids().draft_token_ids == [[1, 2]]
    assert executor.asked == 1
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, draft_return._DRAFTS)


def test_no_drafts_of_the_step_before() -> None:
    runner, executor = made(sending=True)
    executor.sample_tokens(None)
    runner.output, runner.drafts = EMPTY_MODEL_RUNNER_OUTPUT, None
    executor.sample_tokens(None)
    assert executor.take_draft_token_ids() is None
