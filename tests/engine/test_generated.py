"""Features recorded while responses are generated, and runs that train on them."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import tiny
from vllm_dflash.serving.worker.features.recorder import FeatureRecorder
from vllm_dflash.training.config import TrainConfig
from vllm_dflash.training.feature_store import FeatureStore
from vllm_dflash.training.generated import GeneratedFeatures, ReadFeatures
from vllm_dflash.training.plan import content_key
from vllm_dflash.training.run_folder import RunFolder
from vllm_dflash.verifier import Verifier

BLOCK = 4


def rows_of(token_ids: list[int]) -> torch.Tensor:
    """Features that depend on the tokens alone, as the verifier's do."""
    sums = torch.tensor(token_ids, dtype=torch.float32).cumsum(0)
    return torch.stack([sums, sums.sqrt(), torch.arange(len(token_ids)) + 1.0], dim=-1)


def step(recorder: FeatureRecorder, *parts: tuple[str, list[int], int, int]) -> None:
    """One verifier step: key, tokens, the first position computed, and the last."""
    starts = [0]
    for _, _, first, end in parts:
        starts.append(starts[-1] + end - first)
    recorder.observe(
        request_ids=[key for key, *_ in parts],
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        positions=torch.cat([torch.arange(first, end) for _, _, first, end in parts]),
        features_TF=torch.cat([rows_of(ids)[first:end] for _, ids, first, end in parts]),
        num_rejected=None,
    )


def recording(folder: Path, num_blocks: int = 100) -> GeneratedFeatures:
    store = FeatureStore(2**20, folder)
    return GeneratedFeatures(FeatureRecorder(), store, [1], 24, BLOCK, num_blocks)


def assert_kept(folder: Path, token_ids: list[int]) -> None:
    features, final = FeatureStore(0, folder).get(content_key(token_ids))
    assert torch.equal(features, rows_of(token_ids[:-1]))
    assert final is None


A = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
B = [*A[:8], 7, 7]
C = [*B[:8], 8, 8, 8]


def test_a_cached_prefix_has_the_rows_of_whoever_computed_it(tmp_path) -> None:
    """Of the same step, of one that is still generated, of one that is done, of one in an earlier round."""
    generated = recording(tmp_path)
    recorder = generated.recorder
    generated.watch({"a": A, "b": B, "c": C}, max_tokens=8)
    step(recorder, ("b", B, 4, 10), ("a", A, 0, 10))
    step(recorder, ("a", [*A, 2, 2], 10, 11), ("b", [*B, 2, 2], 10, 11), ("c", C, 8, 11))
    generated.take("a", [2, 2])
    generated.take("b", [2, 3])
    generated.take("c", [1])
    generated.end()
    assert_kept(tmp_path, [*A, 2, 2])
    assert_kept(tmp_path, [*B, 2, 3])
    assert_kept(tmp_path, [*C, 1])

    later = [*C, 1, 6, 6]  # the next turn, which has the first turn's name
    generated.watch({"a": later}, max_tokens=8)
    generated.store.keep([])
    step(recorder, ("a", later, 8, 14))
    generated.take("a", [4])
    generated.end()
    assert_kept(tmp_path, [*later, 4])


def test_what_is_not_whole_is_left_to_extraction(tmp_path) -> None:
    generated = recording(tmp_path, num_blocks=1)
    generated.watch({"a": A, "b": B}, max_tokens=8)
    step(generated.recorder, ("a", A, 0, 10))
    # Two blocks of a's are known, one more than there is room for.
    step(generated.recorder, ("b", B, 4, 10))
    generated.take("a", [2])
    generated.take("b", [2])
    generated.end()
    assert_kept(tmp_path, [*A, 2])
    assert content_key([*B, 2]) not in generated.store


def test_a_response_is_cut_as_its_example_is(tmp_path) -> None:
    generated = recording(tmp_path)
    generated.watch({"a": A}, max_tokens=100)
    whole = [*A, *range(1, 21)]
    step(generated.recorder, ("a", whole, 0, 29))
    generated.take("a", whole[10:])
    generated.end()
    assert_kept(tmp_path, whole[:24])


def test_other_ranks_read_what_the_first_has_written(tmp_path) -> None:
    generated, other = recording(tmp_path), ReadFeatures(tmp_path)
    for rank in (other, generated):
        rank.watch({"a": A}, max_tokens=5)
    step(generated.recorder, ("a", [*A, 1, 2], 0, 12))
    content = content_key([*A, 1, 2])
    assert content not in other.store
    for rank in (other, generated):
        rank.take("a", [1, 2])
    # Both ranks end at once: the other's may be before the file is there.
    for rank in (other, generated):
        rank.end()
    assert content in other.store
    torch.testing.assert_close(other.store.get(content)[0], generated.store.get(content)[0])


def test_the_run_folder_knows_them(tmp_path) -> None:
    run = RunFolder(tmp_path / "run", {"seed": 0})
    store = FeatureStore(0, run.features)
    store.put("key", torch.ones(2, 3))
    store.flush()
    del run
    RunFolder.claim(tmp_path / "run", {}, restart=True)
    (tmp_path / "run" / "features" / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        RunFolder.claim(tmp_path / "run", {}, restart=False)
    again = RunFolder(tmp_path / "run", {"seed": 1}, restart=True)
    assert not list(again.path.rglob("*features-*"))
    assert len(FeatureStore(0, again.features)._index) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"on_policy": True},
        {"features_from": "elsewhere"},
    ],
)
def test_what_cannot_be_recorded_is_refused(options) -> None:
    options = {"features_from": "generation"} | options
    with pytest.raises(ValueError, match="--features-from"):
        TrainConfig(Verifier("v"), "prompts.jsonl", Path("out"), **options)


def test_it_is_part_of_a_run_s_identity() -> None:
    plain, recorded = (
        TrainConfig(Verifier("v"), "absent.jsonl", Path("out"), features_from=where).identity()
        for where in ("extraction", "generation")
    )
    assert recorded == plain | {"features_from": "generation"}
    assert "features_from" not in plain


# -- the real engine ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory) -> Path:
    """Tickets behind one long system message; every third goes on for a second turn."""
    file = tmp_path_factory.mktemp("generated") / "dialogues.jsonl"
    rows = []
    system = {
        "role": "system",
        "content": " ".join(tiny.WORDS[i % len(tiny.WORDS)] for i in range(70)),
    }
    for i, line in enumerate(tiny.write_prompts(file, 30).read_text().splitlines()):
        first = json.loads(line)["messages"][-1]
        turns = [{"role": "assistant", "content": "-"}, {"role": "user", "content": "and then?"}]
        rows.append({"messages": [system, first, *(turns if i % 3 == 0 else [])]})
        if i % 3 == 0:
            rows[-1]["messages"].append({"role": "assistant", "content": "-"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


COMPARE_SCRIPT = """
import json, sys
from pathlib import Path
from safetensors.torch import save_file
from vllm_dflash.training.config import EngineOptions, Hyperparameters, SamplingOptions
from vllm_dflash.training.conversations import load_conversations
from vllm_dflash.training.engine import VerifierEngine
from vllm_dflash.training.responses import regenerate

verifier, seat, data, out = sys.argv[1:]
options = EngineOptions(dtype="float32", max_len=300, max_num_seqs=8, max_num_batched_tokens=128)
engine = VerifierEngine(verifier, seat, options)
config = json.load(open(seat + "/config.json"))
layers = config["dflash_config"]["target_layer_ids"]
engine.record_responses(Path(out + "-features"), layers, True, 300)
session = engine.engine.collective_rpc(lambda w: w._vllm_dflash_session)[0]
firsts = []
started = session.generated._started
def noted(key, first):
    firsts.append(first)
    return started(key, first)
session.generated._started = noted
conversations, _ = load_conversations(data, chat_template_kwargs=None)
generate = engine.generator(SamplingOptions(max_tokens=48))
examples, _ = regenerate(
    conversations, engine.tokenizer, generate, Path(out + "-responses.jsonl"), fingerprint={}, max_len=300
)
generated = vars(engine.generated).copy()
engine.call("begin", config, Hyperparameters(loss="kl").as_dict(), None, 1, None, None)
engine.call("register", [(e.id, list(e.token_ids), list(e.loss_mask), "x") for e in examples])
keys = [e.id for e in examples]
recorded = engine.call("recorded", keys)
tensors = {}
def put(name, keys):
    for key in keys:
        sample = session._sample(key)
        tensors[f"{name}/{key}"] = sample.features_TF.clone()
        tensors[f"{name}-final/{key}"] = sample.final_TH.clone()
put("generation", recorded)
session.features.keep([])
session.generated = None
assert not [p for _, p in engine.extract({e.id: e.token_ids for e in examples}) if p]
put("extraction", keys)
save_file(tensors, out)
left = [len(getattr(session.recorder, n)) for n in ("_lengths", "_buffers", "_filled", "_finals")]
result = {"keys": keys, "recorded": recorded, "firsts": firsts, "left": left, "generated": generated}
json.dump(result, open(out + ".json", "w"))
engine.close()
"""


@pytest.mark.engine
@pytest.mark.long
def test_recorded_features_are_the_extracted_ones(verifier, dialogues, tmp_path) -> None:
    seat = tiny.make_drafter(tmp_path / "seat", verifier, draft_block_size=2)
    script, out = tmp_path / "compare.py", tmp_path / "out.safetensors"
    script.write_text(COMPARE_SCRIPT)
    subprocess.run(
        [sys.executable, script, verifier, seat, dialogues, out],
        env=tiny.environment(), check=True, timeout=300,
    )  # fmt: skip
    result = json.loads(Path(f"{out}.json").read_text())
    assert result["recorded"] == result["keys"]
    # Most requests read the system message, second turns the first turn, and none of that is missing.
    assert sum(first > 0 for first in result["firsts"]) > 30
    assert len(set(result["firsts"])) > 2
    assert result["left"] == [0, 0, 0, 0]
    # What the time left is told by, over both rounds.
    responses = Path(f"{out}-responses.jsonl").read_text().splitlines()[1:]
    total = sum(len(json.loads(line)["token_ids"]) for line in responses)
    assert result["generated"] == {
        "tokens": total,
        "finished": len(responses),
        "finished_tokens": total,
    }
    got = load_file(out)
    for key in result["keys"]:
        for kind in ("", "-final"):
            mine, theirs = got[f"generation{kind}/{key}"], got[f"extraction{kind}/{key}"]
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def train(verifier: Path, data: Path, out: Path) -> list[str]:
    args = ("--data", data, "-o", out, *tiny.TRAIN_ARGS[:4], *tiny.TRAIN_ARGS[6:])
    args += ("--max-len", "300", "--max-num-seqs", "2", "--max-steps", "60", "--num-anchors", "16")
    args += ("--features-from", "generation", "--save-minutes", "0")
    return tiny.cli_command("train", verifier, *args)


def kill_when(command: list[str], reached) -> None:
    process = subprocess.Popen(
        command, env=tiny.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None and not reached():
            time.sleep(0.01)
        assert process.poll() is None, "training ended before it could be killed"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def lines(file: Path) -> int:
    return len(file.read_bytes().splitlines()) if file.is_file() else 0


@pytest.mark.engine
@pytest.mark.long
def test_killed_runs_go_on_with_the_same_features(verifier, dialogues, tmp_path) -> None:
    """Killed while it generates, and while it trains; the same bytes as trained in one go on what it kept."""
    out, run = tmp_path / "out", tmp_path / "out-run"
    command = train(verifier, dialogues, out)
    kill_when(command, lambda: lines(run / "responses.jsonl") > 8)
    generated = lines(run / "responses.jsonl") - 1
    assert generated < 40
    assert not list(run.glob("features/features-*"))
    kill_when(command, (run / "state.json").is_file)
    assert lines(run / "responses.jsonl") == 41
    other = tmp_path / "other-run"
    shutil.copytree(run, other)
    (other / "state.json").unlink()

    done = tiny.cli(*command[1:])
    assert "resuming at step" in done.stderr
    recorded, of = map(
        int, re.search(r"features of (\d+) of (\d+) sequences", done.stderr).groups()
    )
    # Those whose features the first kill lost are extracted, and nothing else.
    assert of == 40
    assert of - generated - 2 <= recorded < of
    tokens = map(
        int, re.findall(r"extracting (?:held-out )?features: (\d+) tokens in", done.stderr)
    )
    assert 0 < sum(tokens) < 300 * (of - recorded)

    again = tiny.cli(*train(verifier, dialogues, tmp_path / "other")[1:])
    assert "resuming at step" not in again.stderr
    assert (out / "model.safetensors").read_bytes() == (
        tmp_path / "other" / "model.safetensors"
    ).read_bytes()
