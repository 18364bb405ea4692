"""The memory plan: its arithmetic against modules, fake tensors and by hand; what train makes of it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from helpers import tiny
from helpers.fake_peak import fake_acceptance_peak, fake_peak
from helpers.plan_shapes import CONFIGS, FOUR_BITS, SHAPES
from vllm_dflash import environment
from vllm_dflash.cli import app
from vllm_dflash.config import DrafterConfig
from vllm_dflash.modeling.drafter import Drafter
from vllm_dflash.training import evaluate as evaluate_module
from vllm_dflash.training import planning
from vllm_dflash.training.config import EngineOptions, Hyperparameters, StepLayout
from vllm_dflash.training.durations import Card, Traffic, durations
from vllm_dflash.training.evaluate import EvalConfig, evaluate
from vllm_dflash.training.evaluation_memory import acceptance_memory, plan_evaluation
from vllm_dflash.training.memory import GIB, card_bytes, learner_memory
from vllm_dflash.training.reporting import Reporter
from vllm_dflash.training.verifier_memory import kv_bytes, verifier_sizes
from vllm_dflash.verifier import Verifier

RESULTS = max((Path(__file__).parents[3] / "benchmarks" / "results").glob("memory-plan_*.json"))
QWEN_8B, GEMMA = SHAPES[1], SHAPES[2]
SMALL = DrafterConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=80,
    vocab_size=70,
    draft_block_size=8,
    target_layer_ids=(1, 3),
    mask_token_id=5,
)


# ---- the learner ----


@pytest.mark.parametrize(
    "shape",
    [pytest.param(s, marks=() if i == 1 else pytest.mark.long) for i, s in enumerate(SHAPES)],
    ids=lambda shape: shape.name,
)
def test_the_learner_needs_what_fake_tensors_need(shape):
    layout = shape.plan().layout
    planned = learner_memory(shape.drafter, Hyperparameters(), layout, 3072, ranks=shape.ranks).peak
    assert planned == pytest.approx(
        fake_peak(shape.drafter, Hyperparameters(), 3072, layout, shape.ranks), rel=0.1
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("changes", "hparams", "layout"),
    [
        ({}, {"autocast": "float32"}, StepLayout()),
        ({}, {"optimizer": "muon", "ema_decay": 0.9}, StepLayout(128)),
        ({"draft_vocab_size": 32768}, {}, StepLayout(None, True)),
        ({}, {"num_anchors": 128, "batch_size": 3}, StepLayout()),
        (
            {
                "layer_types": ("sliding_attention", "full_attention"),
                "sliding_window": 512,
                "num_hidden_layers": 2,
            },
            {},
            StepLayout(),
        ),
    ],
    ids=["float32", "muon, average, parts", "draft vocabulary", "sequences", "sliding"],
)
def test_the_learner_in_other_settings(changes, hparams, layout):
    config, hparams = SHAPES[0].drafter.with_(**changes), Hyperparameters(**hparams)
    planned = learner_memory(config, hparams, layout, 3072).peak
    assert planned == pytest.approx(fake_peak(config, hparams, 3072, layout), rel=0.1)


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        (SHAPES[1], 15),
        pytest.param(SHAPES[0], 7, marks=pytest.mark.long),
        pytest.param(SHAPES[2], 15, marks=pytest.mark.long),
    ],
    ids=["Qwen3-8B", "Qwen3-4B", "gemma-4-31B"],
)
def test_acceptance_needs_what_fake_tensors_need(shape, tokens):
    parameters = learner_memory(shape.drafter, Hyperparameters(), StepLayout(), 3072).parameters
    walked = acceptance_memory(shape.drafter, tokens, 3072)
    # fp32, and a copy as it is served.
    planned = (4 + 2) * parameters + walked
    assert planned == pytest.approx(fake_acceptance_peak(shape.drafter, tokens, 3072), rel=0.1)


def test_committed_figures_are_those_of_today():
    rows = json.loads(RESULTS.read_text())
    assert [row["shape"] for row in rows] == [shape.name for shape in SHAPES]
    for row, shape in zip(rows, SHAPES, strict=True):
        layout = StepLayout(row["anchors_in_flight"], row["checkpoint_mlps"])
        hparams, ranks = Hyperparameters(), shape.ranks
        planned = learner_memory(shape.drafter, hparams, layout, 3072, ranks=ranks).peak
        assert round(planned / GIB, 2) == row["planned_gib"]
        assert row["planned_gib"] == pytest.approx(row["fake_tensor_gib"], rel=0.1)
        assert round(shape.plan().least / GIB, 2) == row["least_gib"]
        assert row["fits"] == (row["least_gib"] <= 0.97 * row["card_gib"])


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        SMALL.with_(attention_bias=True),
        SMALL.with_(hidden_size=24, target_hidden_size=32, draft_vocab_size=50),
    ],
)
def test_parameters_are_counted(config):
    drafter = Drafter(config)
    got = learner_memory(config, Hyperparameters(), StepLayout(), 64)
    assert got.parameters == sum(p.numel() for p in drafter.parameters())
    trained = sum(p.numel() for n, p in drafter.named_parameters() if "k_norm" not in n)
    assert (got.masters, got.optimizer, got.average) == (4 * got.parameters, 8 * trained, 0)
    assert learner_memory(config, Hyperparameters(ema_decay=0.9), StepLayout(), 64).average > 0


# ---- the verifier ----


def test_weights_by_configuration():
    small, large, multimodal = (shape.sizes for shape in SHAPES[:3])
    # The parameters that the model cards give: 4.0 B, 8.2 B, 30.7 B.
    assert small.weights / 2e9 == pytest.approx(4.02, abs=0.01)
    assert large.weights / 2e9 == pytest.approx(8.19, abs=0.01)
    assert multimodal.weights / 2e9 == pytest.approx(30.7, abs=0.01)
    assert large.vocabulary == 2 * 2 * 151936 * 4096
    assert multimodal.vocabulary == 2 * 262144 * 5376  # tied
    config = GEMMA.hf_config
    whole = verifier_sizes(config, None, "float32").weights
    assert whole == 2 * multimodal.weights


def test_quantised_weights(tmp_path):
    config = GEMMA.hf_config
    config.quantization_config = FOUR_BITS
    four = verifier_sizes(config, tmp_path, "auto")
    assert four.weights == pytest.approx(four.vocabulary + four.parameters * 4.5 / 8, rel=1e-3)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 123}}))
    assert verifier_sizes(config, tmp_path, "auto").weights == 123
    config.quantization_config = {"quant_method": "gptq", "bits": 8, "group_size": 128}
    assert "8.125 bits" in verifier_sizes(config, None, "auto").source
    config.quantization_config = {"quant_method": "fp8"}
    assert "of 8 bits" in verifier_sizes(config, None, "auto").source
    config.quantization_config = {"quant_method": "new"}
    with pytest.raises(ValueError, match=r"'new'.*gpu_memory_utilization"):
        verifier_sizes(config, None, "auto")


def test_a_verifier_that_cannot_be_built_names_the_way_out():
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"cannot be told.*gpu_memory_utilization"):
        verifier_sizes(config, None, "auto")


def text(**fields):
    common = {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 64}
    fields = common | fields
    return SimpleNamespace(**fields, to_dict=lambda: fields)


def test_kv_cache_by_hand():
    qwen = QWEN_8B.hf_config.get_text_config()
    assert kv_bytes(qwen, 1000, 4096, 1) == 36 * 2 * 8 * 128 * 2 * 1000
    assert kv_bytes(qwen, 1000, 4096, 2) == 36 * 2 * 4 * 128 * 2 * 1000
    assert kv_bytes(qwen, 1000, 4096, 16) == 36 * 2 * 1 * 128 * 2 * 1000  # replicated
    # Sliding layers hold the window and a step; the others have heads of their own.
    gemma = GEMMA.hf_config.get_text_config()
    want = 50 * 2 * 16 * 256 * 2 * (1024 + 100) + 10 * 2 * 4 * 512 * 2 * 9000
    assert kv_bytes(gemma, 9000, 100, 1) == want
    # One vector for all heads, on every rank.
    latent = text(num_key_value_heads=8, head_dim=8, kv_lora_rank=512, qk_rope_head_dim=64)
    assert kv_bytes(latent, 100, 64, 2) == 4 * 576 * 2 * 100
    hybrid = text(
        num_key_value_heads=2,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_conv_kernel_dim=4,
    )
    state = 4 * 8 * 8 * 4 + (2 * 16 + 32) * 4 * 2
    assert kv_bytes(hybrid, 100, 64, 1) == 2 * state + 2 * 2 * 2 * 16 * 2 * 100


def test_experts_count_as_weights_but_not_all_of_them_compute():
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=50,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )
    sizes = verifier_sizes(config, None, "bfloat16")
    assert sizes.parameters - sizes.active == 2 * 6 * 3 * 32 * 16


# ---- the plan ----


@pytest.mark.parametrize("shape", SHAPES[1:3], ids=lambda shape: shape.name)
def test_defaults_fit(shape):
    plan = shape.plan()
    assert plan.fits
    assert plan.total <= plan.card
    assert plan.layout == StepLayout(512)
    assert plan.sequences >= 4
    args = plan.engine_args()
    # The cache's bytes are those of its sequences, the verifier's and the engine's drafter's.
    of_one = kv_bytes(shape.hf_config.get_text_config(), 3075, 4096, 1)
    seat = 2 * shape.drafter.num_key_value_heads * shape.drafter.head_dim * 2 * 3075
    assert args["kv_cache_memory_bytes"] == plan.sequences * (of_one + seat)
    # vLLM wants this share of the card to be free when it starts.
    share = args["gpu_memory_utilization"] * card_bytes(shape.gigabytes)
    assert share == pytest.approx(plan.total, rel=0.01)


def test_less_memory_is_used_before_anything_is_refused():
    layouts = []
    for gigabytes in (141, 130, 124):
        plan = replace(GEMMA, gigabytes=gigabytes).plan()
        assert plan.fits
        assert plan.total <= plan.card
        layouts.append(plan.layout)
    assert layouts[:2] == [StepLayout(512), StepLayout(512, True)]
    assert layouts[2].checkpoint_mlps
    assert layouts[2].anchors_in_flight in (64, 128, 256)
    needs = [learner_memory(GEMMA.drafter, Hyperparameters(), at, 3072).peak for at in layouts]
    assert needs == sorted(needs, reverse=True)


def test_a_refusal_has_the_figures_and_the_ways_out_in_order():
    plan = SHAPES[-1].plan()
    assert not plan.fits
    message = plan.refusal()
    assert (
        f"needs {plan.least / GIB:.1f} GiB of each GPU, which has {plan.card / GIB:.1f}" in message
    )
    order = ["--num-layers 3", "--num-layers 1", "--optimizer muon", "--tensor-parallel-size 2"]
    assert [message.index(way) for way in order] == sorted(message.index(way) for way in order)
    # What is named does what is said.
    ways = dict(plan.ways_out)
    assert all(size < plan.least for size in ways.values())
    assert SHAPES[-1].plan(num_hidden_layers=1).fits == (ways["--num-layers 1"] <= plan.card)
    assert "4 bits" not in message  # it has
    assert "a verifier of 4 bits" in replace(GEMMA, gigabytes=48).plan().refusal()


def test_train_plans_for_the_machine(monkeypatch):
    verifier = Verifier(str(CONFIGS / "Qwen3-8B"))
    config = QWEN_8B.hf_config
    rest = (verifier, config, QWEN_8B.drafter, Hyperparameters())
    monkeypatch.setattr(planning, "gpu_memory", lambda: [])
    assert planning.plan_of_machine(*rest, EngineOptions()) is None
    monkeypatch.setattr(planning, "gpu_memory", lambda: [(96 * GIB, 90 * GIB), (79 * GIB, GIB)])
    monkeypatch.setattr(torch.version, "cuda", None)
    assert planning.plan_of_machine(*rest, EngineOptions()) is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert planning.plan_of_machine(*rest, EngineOptions()).fits
    for name, value in (("gpu_memory_utilization", 0.5), ("kv_cache_memory_bytes", 2**30)):
        assert planning.plan_of_machine(*rest, EngineOptions(extra={name: value})) is None
    monkeypatch.setattr(planning, "gpu_memory", lambda: [(24 * GIB, 23 * GIB)])
    with pytest.raises(ValueError, match=r"training needs .* GiB of each GPU"):
        planning.plan_of_machine(*rest, EngineOptions())


def evaluation(shape, **changes):
    engine = EngineOptions(tensor_parallel_size=shape.ranks, **changes)
    text = shape.hf_config.get_text_config()
    card = card_bytes(shape.gigabytes)
    return plan_evaluation(text, shape.sizes, shape.drafter, 15, engine, card)


def test_an_evaluation_needs_no_room_for_training():
    plan, training = evaluation(QWEN_8B), QWEN_8B.plan()
    assert plan.fits
    assert plan.least < training.least
    assert plan.sequences > training.sequences
    assert not {name for name, _ in plan.rows} & {"one training step", "drafter: adamw's moments"}
    # The whole drafter sits in the engine, with a KV cache of all its layers.
    sizes = dict(plan.rows)
    assert sizes["drafter: fp32 weights"] == 2 * sizes["drafter in the engine"]
    drafter, tokens = QWEN_8B.drafter, 3072 + 15 + 2
    of_one = kv_bytes(QWEN_8B.hf_config.get_text_config(), tokens, 4096, 1)
    of_one += 2 * 5 * drafter.num_key_value_heads * drafter.head_dim * 2 * tokens
    assert plan.engine_args()["kv_cache_memory_bytes"] == plan.sequences * of_one
    # Where training does not fit an evaluation may.
    assert not SHAPES[0].plan().fits
    assert evaluation(SHAPES[0]).fits


def test_an_evaluation_that_does_not_fit_says_what_would():
    plan = evaluation(replace(QWEN_8B, gigabytes=20))
    assert not plan.fits
    message = plan.refusal()
    assert message.startswith(f"evaluation needs {plan.least / GIB:.1f} GiB of each GPU")
    assert "anchors" not in message
    ways = dict(plan.ways_out)
    assert list(ways) == ["--max-len 1536", "--tensor-parallel-size 2", "a verifier of 4 bits"]
    two = evaluation(replace(QWEN_8B, gigabytes=20, ranks=2))
    assert ways["--tensor-parallel-size 2"] == two.least


def test_eval_starts_its_engine_by_the_plan(verifier, models, prompts_file, monkeypatch):
    drafter = tiny.make_drafter(models / "planned-drafter", verifier)
    config = EvalConfig(
        Verifier(str(verifier)), str(drafter), str(prompts_file), engine=EngineOptions(max_len=160)
    )
    started, tables = [], []

    def engine(*args):
        started.append(args)
        raise RuntimeError("no engine")

    monkeypatch.setattr(evaluate_module, "VerifierEngine", engine)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(planning, "gpu_memory", lambda: [(8 * GIB, 8 * GIB)])
    reporter = Reporter()
    monkeypatch.setattr(reporter, "table", lambda *table: tables.append(table))
    with pytest.raises(RuntimeError, match="no engine"):
        evaluate(config, reporter)
    of_drafter, tokens, memory = started[0][1], started[0][3], started[0][4]
    assert of_drafter == str(drafter)
    plan = planning.evaluation_plan_of_machine(
        config.verifier,
        config.verifier.load_config(),
        DrafterConfig.from_pretrained(drafter),
        tokens,
        config.engine,
    )
    assert memory == plan.engine_args()
    assert ("together", f"{plan.total / GIB:.1f}") in tables[0][1]

    monkeypatch.setattr(planning, "gpu_memory", lambda: [(2 * GIB, 2 * GIB)])
    with pytest.raises(ValueError, match=r"evaluation needs .* GiB of each GPU"):
        evaluate(config, reporter)
    # Users who size the engine are not told what it needs.
    own = replace(config.engine, extra={"gpu_memory_utilization": 0.5})
    with pytest.raises(RuntimeError, match="no engine"):
        evaluate(replace(config, engine=own), reporter)
    assert started[-1][4] is None


def test_the_allocator_is_set_unless_the_user_did(monkeypatch):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    environment.set_gpu_defaults()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    environment.set_gpu_defaults()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


# ---- the command ----


def run_plan(*args: str):
    return CliRunner().invoke(app, ["plan", *args], env={"COLUMNS": "200"})


def test_plan_needs_a_configuration_only():
    done = run_plan(str(CONFIGS / "Qwen3-8B"))
    assert done.exit_code == 0, done.output
    plan = QWEN_8B.plan()
    for name, size in plan.rows:
        assert name in done.output
        assert f"{size / GIB:.1f}" in done.output
    for word in ("responses", "features", "training", "Nothing here is measured", "800 TFLOP/s"):
        assert word in done.output


def test_plan_says_what_would_fit():
    done = run_plan(str(CONFIGS / "Qwen3-8B"), "--gpu", "24")
    assert "together" in done.output
    assert isinstance(done.exception, ValueError)
    assert "--tensor-parallel-size 2" in str(done.exception)
    with pytest.raises(ValueError, match="no such folder"):
        raise run_plan("/nowhere").exception


def test_minutes_follow_the_work():
    plan, args = QWEN_8B.plan(), (QWEN_8B.hf_config.get_text_config(), QWEN_8B.sizes)
    traffic, card = Traffic(1000, 500, 400, 2.0), Card(800e12, 3.3e12)

    def seconds(traffic=traffic, card=card, drafter=QWEN_8B.drafter):
        options = (Hyperparameters(), EngineOptions(), traffic, card)
        return durations(plan, *args, drafter, *options)

    once = seconds()
    twice = seconds(Traffic(2000, 500, 400, 2.0))
    assert all(twice[name] == pytest.approx(2 * once[name]) for name in once)
    faster = seconds(card=Card(1600e12, 6.6e12))
    assert all(faster[name] == pytest.approx(once[name] / 2) for name in once)
    assert seconds(Traffic(1000, 500, 400, 4.0))["training"] == pytest.approx(2 * once["training"])
    # By hand: 900 tokens x 1000 x 2 FLOPs x 6.95 B at half of 800 T.
    assert once["features"] == pytest.approx(900e3 * 2 * 6.945e9 / 400e12, rel=0.01)
    assert (
        seconds(drafter=QWEN_8B.drafter.with_(num_hidden_layers=1))["training"] < once["training"]
    )
