"""``eval --engine``: a server's engine in a child, once the first one has gone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from helpers import tiny

pytestmark = [pytest.mark.engine, pytest.mark.long]

SCRIPT = """
import json, os, sys, weakref
from vllm_dflash.bench import engine_process
from vllm_dflash.training import evaluate
from vllm_dflash.training.config import EngineOptions, EvalConfig
from vllm_dflash.training.reporting import Reporter
from vllm_dflash.verifier import Verifier

before, seen, held, at_once = {}, {}, [], []

class Engine(evaluate.VerifierEngine):
    def __init__(self, *args):
        before.update(os.environ)  # with what importing vLLM sets, which any server has, too
        super().__init__(*args)

    def close(self):
        session = self.engine.collective_rpc(lambda w: w._vllm_dflash_session)[0]
        parts = (session.verifier, session.learner, session.features, session.source)
        held.extend(map(weakref.ref, parts))
        del session, parts
        super().close()

    def call(self, command, *args):
        if command == "walk":
            session = self.engine.collective_rpc(lambda w: w._vllm_dflash_session)[0]
            at_once.append(sum(key in session.features for key in session.examples))
        return super().call(command, *args)

class Child(engine_process.EngineProcess):
    def start(self):
        environment = self._environment()
        seen["alive"] = [repr(type(ref())) for ref in held if ref() is not None]
        seen["changed"] = sorted(
            k for k in before.keys() | environment.keys() if before.get(k) != environment.get(k)
        )
        super().start()

evaluate.default_feature_gib = lambda ranks: 1e-4  # room for the features of one or two
evaluate.VerifierEngine, engine_process.EngineProcess = Engine, Child
verifier, drafter, data, out = sys.argv[1:]
options = EngineOptions(dtype="float32", max_len=160, extra={"enforce_eager": True})
config = EvalConfig(
    Verifier(verifier), drafter, data, through_engine=True, limit=6, engine=options, max_tokens=48
)
seen |= evaluate.evaluate(config, Reporter())
json.dump({**seen, "held": len(held), "at_once": at_once}, open(out, "w"))
"""


def test_the_first_engine_is_gone_before_the_second_starts(trained, tmp_path) -> None:
    script, out = tmp_path / "evaluate.py", tmp_path / "out.json"
    script.write_text(SCRIPT)
    command = [sys.executable, script, trained.verifier, trained.drafter, trained.prompts, out]
    subprocess.run(command, env=tiny.environment(), check=True, timeout=300)
    got = json.loads(out.read_text())
    assert (got["held"], got["alive"]) == (4, [])
    assert len(got["at_once"]) > 2
    assert max(got["at_once"]) <= 2
    # One that keeps numba from waiting for idle threads, no more.
    assert got["changed"] == ["NUMBA_NUM_THREADS"]
    assert got["engine"]["num_drafts"] == pytest.approx(got["offline"]["num_drafts"], rel=0.02)
    assert got["engine"]["tau"] == pytest.approx(got["offline"]["tau"], rel=0.02)
