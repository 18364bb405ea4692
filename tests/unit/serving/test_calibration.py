"""What steps cost, measured at start by dummy steps: how much at once, and what if one fails."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

from vllm_dflash.serving.worker import calibration
from vllm_dflash.serving.worker import start as worker_start

SEQUENCES = 16


def config(**parallel):
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=SEQUENCES, max_num_batched_tokens=512),
        model_config=SimpleNamespace(max_model_len=256),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, **parallel),
        lora_config=None,
    )


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One rank, no accelerator."""
    monkeypatch.setattr(calibration, "get_tp_group", lambda: SimpleNamespace(world_size=1))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)


class Model:
    def __init__(self) -> None:
        self.rows: list[int] = []

    def compute_logits(self, hidden) -> None:
        self.rows.append(len(hidden))


def test_no_more_logits_at_once_than_vllm_has_room_for() -> None:
    """Its memory profile has a row a sequence; a step of dummy tokens may have hundreds."""
    model = Model()
    proposer = SimpleNamespace(
        vllm_config=config(),
        max_query_len=8,
        runner=SimpleNamespace(model=model, _dummy_run=lambda n, **_: (torch.zeros(n, 4), None)),
    )
    runner = SimpleNamespace(
        vllm_config=config(),
        decode_query_len=8,
        model=model,
        speculator=SimpleNamespace(),
        kv_connector=SimpleNamespace(set_disabled=lambda disabled: None),
        _dummy_run=lambda n, **_: (torch.zeros(n, 4), torch.zeros(1, 4)),
    )
    for runs in (calibration.RunsV1(proposer), calibration.RunsV2(runner)):
        model.rows.clear()
        runs.step(40)()
        assert model.rows == [16, 16, 8]


def test_the_kv_connector_works_on_after_a_failure() -> None:
    """Else no request of this server ever gets a cache from elsewhere, or passes one on."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    disabled: list[bool] = []

    class Runner(GPUModelRunner):
        def __init__(self) -> None:
            self.vllm_config, self.model = config(), Model()
            self.max_num_reqs, self.max_num_tokens, self.decode_query_len = 16, 512, 8
            self.is_first_pp_rank, self.lora_config = True, None
            self.eplb = SimpleNamespace(step=lambda **kwargs: None)
            self.speculator = SimpleNamespace(num_query_per_req=8, num_extra_query_per_req=7)
            self.kv_connector = SimpleNamespace(set_disabled=disabled.append)

        def execute_model(self, *args, **kwargs):
            raise MemoryError("attention")

    with pytest.raises(MemoryError):
        calibration.RunsV2(Runner()).step(8)()
    assert disabled[0] is True
    assert disabled[-1] is False


class Runs:
    """Dummy steps of a model world, each a piece of joint work of all ranks."""

    width, draft_has_step = 4, False

    def __init__(self, work) -> None:
        self.vllm_config, self.work = config(), work

    def step(self, num_tokens, context=0, blocks=False):
        return lambda: self.work(("step", num_tokens, context))

    def draft(self, num_requests):
        return lambda: self.work(("draft", num_requests, 0))


@pytest.mark.parametrize("fails", [False, True])
def test_memory_is_given_back(fails, monkeypatch, tmp_path) -> None:
    emptied = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: emptied.append(True))

    def work(what) -> None:
        assert not emptied
        if fails and what[0] == "draft":
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        calibration.measured(Runs(work), tmp_path / "costs.json")
    assert emptied == [True]
    assert (tmp_path / "costs.json").exists() is not fails


def test_a_failure_on_one_rank_ends_it_on_all(monkeypatch) -> None:
    """None goes on to joint work that the failed one has left."""
    ranks = threading.local()
    together = threading.Barrier(2, timeout=30)
    said: list = [None, None]

    def all_gather_object(out, value, group=None) -> None:
        said[ranks.number] = value
        together.wait()
        out[:] = said
        together.wait()

    group = SimpleNamespace(world_size=2, cpu_group=None)
    monkeypatch.setattr(calibration, "get_tp_group", lambda: group)
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    errors: list = [None, None]

    def rank(number: int) -> None:
        ranks.number = number

        def work(what) -> None:
            together.wait()  # its layers' all-reduce
            if number == 1 and what[:2] == ("step", 8):
                raise MemoryError("logits")

        try:
            calibration.calibrate(Runs(work))
        except Exception as error:
            errors[number] = error

    threads = [threading.Thread(target=rank, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [type(e) for e in errors] == [RuntimeError] * 2
    assert "on another rank" in str(errors[0])
    assert isinstance(errors[1].__cause__, MemoryError)


def test_costs_that_cannot_be_read_are_measured(tmp_path) -> None:
    path = tmp_path / "costs.json"
    path.mkdir()
    assert calibration._read(path) is None


def patched(worker: type) -> type:
    warm_up = worker.compile_or_warm_up_model  # type: ignore[attr-defined]
    worker.compile_or_warm_up_model = worker_start.wrap_warm_up(warm_up)  # type: ignore[attr-defined]
    return worker


def test_steps_are_measured_before_vllm_watches_for_compilation() -> None:
    """And while expert load balancing does not count."""
    events = []

    class Worker:
        def __init__(self) -> None:
            self.model_runner = SimpleNamespace(
                speculator=SimpleNamespace(measure=lambda r: events.append("measured")),
                eplb=SimpleNamespace(suppress=self.suppress),
            )

        @contextlib.contextmanager
        def suppress(self):
            events.append("suppressed")
            yield
            events.append("counts again")

        def compile_or_warm_up_model(self) -> str:
            events.append("captured")
            self._maybe_activate_jit_monitor()
            return "times"

        def _maybe_activate_jit_monitor(self) -> None:
            events.append("watching")

    worker = patched(Worker)()
    assert worker.compile_or_warm_up_model() == "times"
    assert events == ["captured", "suppressed", "measured", "counts again", "watching"]
    assert "_maybe_activate_jit_monitor" not in vars(worker)


def test_workers_without_that_watch() -> None:
    events = []

    class CPUWorker:
        model_runner = SimpleNamespace(
            drafter=SimpleNamespace(measure=lambda runner: events.append("measured"))
        )

        def compile_or_warm_up_model(self) -> None:
            events.append("warm")

    patched(CPUWorker)().compile_or_warm_up_model()
    assert events == ["warm", "measured"]
