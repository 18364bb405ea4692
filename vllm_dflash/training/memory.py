"""The memory plan of a training run on a GPU, by arithmetic from the two configurations.

vLLM, the verifier and the learner share each rank's card. What the learner needs is known before anything
starts, so the engine is given what is left, and a run that cannot fit is refused with the figures.

The learner's step is followed as PyTorch runs it on CUDA under autocast: what autograd keeps of each layer,
the copies of the weights that autocast makes, the logits of a chunk, the gradients as they come. Tests hold
that against fake tensors. Shape suffixes as in modeling/drafter.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vllm_dflash.config import DrafterConfig
from vllm_dflash.modeling.blocks import MAX_CHUNK_QUERIES
from vllm_dflash.modeling.drafter import Drafter
from vllm_dflash.modeling.losses import chunk_anchors, logit_bytes
from vllm_dflash.training.config import EngineOptions, Hyperparameters, StepLayout
from vllm_dflash.training.sharding import freeze, moment_numbers
from vllm_dflash.training.verifier_memory import VerifierSizes, kv_bytes

GIB = 2**30
#: CUDA's context, workspaces of cuBLAS and NCCL, vLLM's graphs: an assumption, not arithmetic.
RUNTIME_BYTES = 2 * GIB
#: Anchors below which a part of a step would no longer fill a GPU.
_FEWEST_ANCHORS = 64


@dataclass(frozen=True)
class LearnerMemory:
    """Bytes of the learner on one rank, that with most of the optimizer's moments.

    Attributes:
        parameters: of the drafter, a number.
        masters, optimizer, average: fp32 weights, this rank's moments, the moving average.
        gradients: all of them, as they are at the end of a step's backward pass.
        copies: of the weights in autocast's dtype.
        activations: what autograd keeps of a part of a step, and the step's features.
        peak: of a step, all that lives together.
    """

    parameters: int
    masters: int
    optimizer: int
    average: int
    gradients: int
    copies: int
    activations: int
    peak: int

    @property
    def states(self) -> int:
        return self.masters + self.optimizer + self.average


def drafter_parameters(config: DrafterConfig) -> dict[str, int]:
    """Numbers of parameters: ``fc``, ``layer`` (one layer's), ``matrices`` of a layer, ``vocabulary``, and
    ``all`` of the drafter's."""
    hidden, dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    matrices = hidden * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    bias = (queries + 2 * keys + hidden) if config.attention_bias else 0
    own = config.vocab_size + config.logits_vocab_size if config.has_own_vocab_weights else 0
    numbers = {
        "fc": config.num_features * hidden,
        "layer": matrices + bias + 2 * hidden + 2 * dim,
        "matrices": matrices,
        "vocabulary": own * hidden,
    }
    layers = config.num_hidden_layers * numbers["layer"]
    return {**numbers, "all": numbers["fc"] + layers + numbers["vocabulary"] + 2 * hidden}


def learner_memory(
    config: DrafterConfig,
    hparams: Hyperparameters,
    layout: StepLayout,
    max_len: int,
    verifier_itemsize: int = 2,
    ranks: int = 1,
) -> LearnerMemory:
    """Follows a step over sequences of ``max_len`` tokens with their anchors at the end: the worst case."""
    numbers = drafter_parameters(config)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    total = numbers["all"]
    frozen = layers * config.head_dim  # k_norm's weights are not trained
    matrices = layers * numbers["matrices"] + numbers["fc"]
    moments = max(_moments(config, hparams.optimizer, ranks))
    size = 2 if hparams.autocast == "bfloat16" else 4
    copies = 0 if size == 4 else 2 * matrices
    block = config.known_block_size("a step's memory depends on it")
    drafted = block - (not config.sample_from_anchor)
    wanted = hparams.num_anchors * hparams.batch_size
    anchors = min(layout.anchors_in_flight or wanted, wanted)
    parts = -(-wanted // anchors)
    sequences = -(-anchors // hparams.num_anchors)
    rows, context = anchors * block, sequences * max_len

    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    per_chunk = max(1, MAX_CHUNK_QUERIES // block)
    chunks = sequences * -(-min(anchors, hparams.num_anchors) // per_chunk)
    chunk_rows = min(per_chunk, anchors) * block
    chunk_keys = -(-(max_len + chunk_rows) // 16) * 16
    # The norms' inputs are kept in fp32 and their outputs in the matrices' dtype; the queries' once more as
    # attention's rows, its output as its own and as o_proj's input; keys and values once for each chunk.
    mlp = 4 * rows * config.intermediate_size * size
    layer = (
        rows * (2 * hidden * (4 + size) + queries * (4 + 3 * size) + keys * 4)
        + rows * config.num_attention_heads * 4
        + context * keys * 4
        + 2 * chunks * chunk_keys * keys * size
        + (0 if layout.checkpoint_mlps else mlp)
    )
    kinds = {(config.layer_window(i), config.layer_causal(i)) for i in range(layers)}
    folded = config.num_attention_heads // config.num_key_value_heads
    shared = (
        context * hidden * (4 + size)  # hidden_norm's input and output
        + rows * hidden * (4 + size)  # the last norm's
        + (rows + context) * config.head_dim * 4  # cosines and sines
        + len(kinds) * chunks * folded * chunk_rows * chunk_keys * size  # attention's biases
    )
    # As they came, and packed.
    features = context * config.num_features * (verifier_itemsize + size)
    activations = layers * layer + shared + features

    dtype = torch.bfloat16 if size == 2 else torch.float32
    vocab = config.logits_vocab_size
    chunk = min(anchors, chunk_anchors(drafted, vocab, dtype, hparams.loss))
    logits = chunk * drafted * vocab * logit_bytes(dtype, hparams.loss)
    hidden_grads = anchors * drafted * hidden * size
    own_head = vocab * hidden if config.has_own_vocab_weights else 0
    logits += hidden_grads + own_head * (4 + (size if size != 4 else 0))
    if size == 4 and not own_head:
        logits += vocab * hidden * 4  # the verifier's head in fp32
    masters = total * 4
    gradients = (total - frozen) * 4
    # The last layer's MLP going backward: its inputs' gradients, and a weight's in both dtypes.
    widest = hidden * config.intermediate_size
    going_back = (
        3 * rows * config.intermediate_size * size
        + 2 * rows * hidden * size
        + widest * (4 + (size if size != 4 else 0))
        + (mlp if layout.checkpoint_mlps else 0)
    )
    before = gradients if parts > 1 else 0
    states = masters + moments * 4 + (masters if hparams.ema_decay else 0)
    loss_point = before + copies + activations + logits
    back_point = before + copies + activations + hidden_grads + own_head * 4 + going_back
    # Layer by layer gradients take the place of activations and copies.
    end_point = gradients + shared + features + layer + copies // max(layers, 1)
    return LearnerMemory(
        parameters=total,
        masters=masters,
        optimizer=moments * 4,
        average=masters if hparams.ema_decay else 0,
        gradients=gradients,
        copies=copies,
        activations=activations,
        peak=states + max(loss_point, back_point, end_point),
    )


def _moments(config: DrafterConfig, optimizer: str, ranks: int) -> list[int]:
    with torch.device("meta"):
        drafter = Drafter(config, factored=True)
    freeze(drafter)
    return moment_numbers(drafter, optimizer, ranks)


@dataclass(frozen=True)
class MemoryPlan:
    """What shares one rank's card.

    Attributes:
        rows: name and bytes, the KV cache last.
        card: bytes that may be used.
        sequences: of the longest length that the KV cache holds.
        kv_cache: its bytes, for vLLM's ``kv_cache_memory_bytes``.
        least: bytes with a KV cache of two sequences, below which nothing works.
        layout: how the learner runs its steps to fit.
        ways_out: what else could be asked for where it does not fit, and the bytes it would need.
        work: what for: ``training`` or ``evaluation``.
    """

    rows: tuple[tuple[str, int], ...]
    card: int
    sequences: int
    kv_cache: int
    least: int
    layout: StepLayout = field(default_factory=StepLayout)
    ways_out: tuple[tuple[str, int], ...] = ()
    work: str = "training"

    @property
    def total(self) -> int:
        return sum(size for _, size in self.rows)

    @property
    def fits(self) -> bool:
        return self.least <= self.card

    def engine_args(self) -> dict[str, Any]:
        """vLLM's ``EngineArgs`` for the engine's part; vLLM refuses to start where less than all is free."""
        return {
            "kv_cache_memory_bytes": self.kv_cache,
            "gpu_memory_utilization": round(min(1.0, self.total / self.card) * (1 - SPARE), 3),
        }

    def refusal(self) -> str:
        """One line: what is needed, and the ways out in their order."""
        rows = ", ".join(f"{name} {size / GIB:.1f}" for name, size in self.rows)
        ways = "; ".join(
            f"{name}: {size / GIB:.1f}{' (fits)' if size <= self.card else ''}"
            for name, size in self.ways_out
        )
        how = ""
        if self.work == "training":
            how = (
                f", with {self.layout.anchors_in_flight} anchors in flight and MLPs computed twice"
            )
        return (
            f"{self.work} needs {self.least / GIB:.1f} GiB of each GPU, which has {self.card / GIB:.1f} for "
            f"it ({rows}){how}. By arithmetic, GiB needed with: {ways}"
        )


#: Of a card that stays unplanned: the allocator rounds and leaves gaps. An assumption.
SPARE = 0.03


def card_bytes(gigabytes: float) -> int:
    """What a card sold with so many GB shows at least: with ECC in graphics memory 15/16 of as many GiB."""
    return int(gigabytes * GIB * 15 / 16)


def plan_memory(
    text: Any,
    sizes: VerifierSizes,
    drafter: DrafterConfig,
    hparams: Hyperparameters,
    engine: EngineOptions,
    card: int,
    replicas: int = 1,
) -> MemoryPlan:
    """The plan of a run: the fastest layout of a step that fits, and the KV cache that is left.

    Args:
        text: the verifier's text configuration.
        sizes: of the verifier.
        drafter, hparams, engine: of the run.
        card: bytes of one GPU.
        replicas: whose ranks share the optimizer's state.
    """
    card = int(card * (1 - SPARE))
    wanted = hparams.num_anchors * hparams.batch_size
    layouts = [StepLayout(wanted), StepLayout(wanted, True)]
    while (fewer := -(-(layouts[-1].anchors_in_flight or 1) // 2)) >= _FEWEST_ANCHORS:
        layouts.append(StepLayout(fewer, True))
    for layout in layouts:
        plan = _plan(text, sizes, drafter, hparams, engine, card, layout, replicas)
        if plan.fits:
            return plan
    smallest = min(
        (
            _plan(text, sizes, drafter, hparams, engine, card, layout, replicas)
            for layout in layouts
        ),
        key=lambda plan: plan.least,
    )

    def least(**changes: Any) -> int:
        given: dict[str, Any] = {
            "sizes": sizes, "drafter": drafter, "hparams": hparams, "engine": engine, **changes
        }  # fmt: skip
        return _plan(text, card=card, layout=smallest.layout, replicas=replicas, **given).least

    ways: list[tuple[str, int]] = []
    if drafter.logits_vocab_size > 32768:
        ways.append(("--draft-vocab 32768", least(drafter=drafter.with_(draft_vocab_size=32768))))
    for layers in (3, 1):
        if layers < drafter.num_hidden_layers and drafter.layer_types is None:
            ways.append(
                (f"--num-layers {layers}", least(drafter=drafter.with_(num_hidden_layers=layers)))
            )
    if hparams.optimizer == "adamw":
        muon = least(hparams=replace(hparams, optimizer="muon"))
        ways.append(("--optimizer muon (one moment for the matrices)", muon))
    ways += engine_ways_out(sizes, engine, least)
    return replace(smallest, ways_out=tuple(way for way in ways if way[1] < smallest.least))


def engine_ways_out(
    sizes: VerifierSizes, engine: EngineOptions, least: Callable[..., int]
) -> list[tuple[str, int]]:
    """What a smaller share of the verifier would need.

    Args:
        sizes: of the verifier.
        engine: as asked for.
        least: bytes needed with other ``engine`` or ``sizes``.
    """
    ranks = 2 * engine.ranks
    more = replace(engine, tensor_parallel_size=ranks, extra={
        k: v for k, v in engine.extra.items() if k != "tensor_parallel_size"
    })  # fmt: skip
    ways = [(f"--tensor-parallel-size {ranks}", least(engine=more))]
    if sizes.weights - sizes.vocabulary > sizes.parameters:
        small = replace(sizes, weights=sizes.vocabulary + int(sizes.parameters * 4.5 / 8))
        ways.append(("a verifier of 4 bits", least(sizes=small)))
    return ways


def _plan(
    text: Any,
    sizes: VerifierSizes,
    drafter: DrafterConfig,
    hparams: Hyperparameters,
    engine: EngineOptions,
    card: int,
    layout: StepLayout,
    replicas: int,
) -> MemoryPlan:
    ranks = replicas * engine.ranks
    learner = learner_memory(
        drafter, hparams, layout, engine.max_len, verifier_itemsize(engine), ranks
    )
    rows = [
        ("drafter: fp32 weights", learner.masters),
        (f"drafter: {hparams.optimizer}'s moments", learner.optimizer),
        ("drafter: moving average", learner.average),
        ("one training step", learner.peak - learner.states),
    ]
    # In the engine sits a drafter of one layer.
    plan = share_card(text, sizes, drafter, engine, card, rows, (1, 1), hparams.batch_size)
    return replace(plan, layout=layout)


def verifier_itemsize(engine: EngineOptions) -> int:
    """Bytes of an activation of the verifier."""
    return 4 if engine.dtype in ("float32", "float") else 2


def feature_rows(
    gib: float, drafter: DrafterConfig, engine: EngineOptions, final_states: bool = False
) -> int:
    """Rows of features (one a token) that a worker has room for.

    Args:
        gib: the room.
        drafter: whose features they are.
        engine: decides their dtype.
        final_states: whether the verifier's last hidden states are kept beside them (the kl loss).
    """
    width = drafter.num_features
    if final_states:
        width += drafter.target_hidden_size or drafter.hidden_size
    return int(gib * GIB) // (width * verifier_itemsize(engine))


def share_card(
    text: Any,
    sizes: VerifierSizes,
    drafter: DrafterConfig,
    engine: EngineOptions,
    card: int,
    beside: list[tuple[str, int]],
    seat: tuple[int, int],
    sequences: int,
) -> MemoryPlan:
    """The engine's part of a card, what is beside it, and the KV cache that is left.

    Args:
        text: the verifier's text configuration.
        sizes: of the verifier.
        drafter: whose features are recorded.
        engine: of the run.
        card: bytes that may be used.
        beside: name and bytes of what is not the engine's.
        seat: layers and draft tokens of the drafter in the engine.
        sequences: whose features are on the card at once.
    """
    ranks, itemsize = engine.ranks, verifier_itemsize(engine)
    budget = int(engine.extra.get("max_num_batched_tokens", engine.max_num_batched_tokens))
    most = int(engine.extra.get("max_num_seqs", engine.max_num_seqs))
    hidden = drafter.target_hidden_size or drafter.hidden_size
    # Every rank learns through all rows of the embedding and the head.
    vocabulary = sizes.vocabulary if ranks > 1 else 0
    if drafter.has_draft_vocab:
        vocabulary += drafter.logits_vocab_size * hidden * itemsize
    feature = drafter.num_features * itemsize
    wide = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    step = budget * (6 * hidden + 3 * wide // ranks) * itemsize
    step += most * int(text.vocab_size) * (itemsize + 2 * 4)
    rows = [
        (f"verifier: {sizes.source}", sizes.weights // ranks),
        ("verifier's embedding and head for the learner", vocabulary),
        ("verifier's step", step),
        ("features: the tap, those being recorded, the next step's", (
            budget + (budget + 2 * engine.max_len) + sequences * engine.max_len
        ) * feature),
        *beside,
        ("CUDA, cuBLAS, NCCL, graphs (assumed)", RUNTIME_BYTES),
    ]  # fmt: skip
    layers, drafted = seat
    tokens = engine.max_len + drafted + 2
    keys = max(1, drafter.num_key_value_heads // ranks) * drafter.head_dim
    of_one = kv_bytes(text, tokens, budget, ranks, itemsize) + 2 * layers * tokens * keys * itemsize
    taken = sum(size for _, size in rows)
    # Room for one is what vLLM insists on, and blocks round up.
    held = max(2, min(most, (card - taken) // of_one))
    rows = [row for row in rows if row[1]]
    rows.append((f"KV cache of {held} sequences of {engine.max_len} tokens", held * of_one))
    return MemoryPlan(tuple(rows), card, held, held * of_one, taken + 2 * of_one)


def plan_table(plan: MemoryPlan) -> tuple[str, list[tuple[str, str]]]:
    """Title and rows of a plan, for people."""
    rows = [(name, f"{size / GIB:.1f}") for name, size in plan.rows]
    rows.append(("together", f"{plan.total / GIB:.1f}"))
    rows.append((f"of a GPU ({SPARE:.0%} kept free)", f"{plan.card / GIB:.1f}"))
    title, layout = "GiB of each GPU, by arithmetic", plan.layout
    if plan.work == "training":
        again = ", MLPs computed again in the backward pass" if layout.checkpoint_mlps else ""
        title += f" ({layout.anchors_in_flight} anchors in flight{again})"
    return title, rows
