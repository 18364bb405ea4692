"""What training takes for a source of features; engines are in test_train_engine.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm.v1.spec_decode.dflash import DFlashProposer

from vllm_dflash.serving.worker.features.source import FeatureSource, feature_source
from vllm_dflash.serving.worker.v1.proposer import Proposer
from vllm_dflash.serving.worker.v2.speculator import observed


class Speculator:
    """What every speculator of vLLM has."""

    vllm_config: Any = None

    def propose(self, input_batch: Any) -> None:
        pass


def made(cls: type, **attributes: Any) -> Any:
    """An object without its constructor, which wants an engine."""
    thing = cls.__new__(cls)
    vars(thing).update(attributes)
    return thing


def test_both_runners_have_one() -> None:
    proposer: FeatureSource = made(Proposer, vllm_config=None, recorder=None, drafting=True)
    assert feature_source(SimpleNamespace(drafter=proposer)) is proposer
    speculator: FeatureSource = made(observed(Speculator))
    assert speculator.drafting
    assert feature_source(SimpleNamespace(speculator=speculator)) is speculator


@pytest.mark.parametrize(
    ("runner", "name"),
    [
        (SimpleNamespace(drafter=made(DFlashProposer, vllm_config=None)), "DFlashProposer"),
        (SimpleNamespace(speculator=Speculator()), "Speculator"),
        (SimpleNamespace(speculator=None), "NoneType"),
    ],
    ids=["V1", "V2", "none"],
)
def test_vllms_own_are_refused(runner, name) -> None:
    with pytest.raises(ValueError, match=rf"drafts with {name}, .*VLLM_DFLASH_DISABLE"):
        feature_source(runner)
