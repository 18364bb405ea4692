"""Speculation changes speed only: the same tokens when greedy, the same distribution when sampling."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from packaging.version import Version

from helpers import tiny
from helpers.acceptance import chi_square_p
from vllm_dflash.environment import versions

pytestmark = pytest.mark.engine
#: vLLM 0.31 leaves tokens behind a stop string in the output.
OLD_VLLM = Version((versions()["vllm"] or "").split()[0]) < Version("0.32")
MAX_LEN = 192
ENGINE = {"max_model_len": MAX_LEN, "max_num_seqs": 8, "enable_prefix_caching": False}
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 48}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


def cases(prompts: list[list[int]]) -> list[dict[str, Any]]:
    """The runs that every engine must answer alike."""

    def case(name: str, count: int = 8, concurrency: int = 8, **params: Any) -> dict[str, Any]:
        return {
            "name": name,
            "prompts": prompts[:count],
            "params": GREEDY | params,
            "concurrency": concurrency,
        }

    return [
        case("batch of 1", 6, 1),
        case("batch of 4", 12, 4),
        case("batch of 8", 24, 8),
        case("stop strings", 16, stop=["g", "e", "\u0120"]),
        case("stop tokens", 16, stop_token_ids=[97, 215, 257]),
        case("min_tokens", 16, min_tokens=40, max_tokens=45),
        case("max_tokens", 16, max_tokens=5),
        case("one token", 8, max_tokens=1),
        case("ignore_eos", 16, ignore_eos=True),
        case("penalties", 8, repetition_penalty=1.3, frequency_penalty=0.4),
        case("logprobs", 8, logprobs=4),
        case("bad words", 8, bad_words=["a", "the"]),
        case("json schema", 8, structured_outputs={"json": SCHEMA}),
        case("ascii", 24, structured_outputs={"regex": "[ -~]{40,80}"}),
        case("regex", 8, structured_outputs={"regex": "(cat|dog) [a-z]{3,9} [0-9]+"}),
        case("choice", 8, structured_outputs={"choice": ["a red house", "a red river"]}),
        # vLLM refuses n > 1 at temperature 0; top_k=1 is as deterministic.
        case("n=3", 6, n=3, temperature=1.0, top_k=1),
        # To the limit of the model: the last steps have no room for a draft.
        case("max_model_len", 6, max_tokens=MAX_LEN, ignore_eos=True),
    ]


def speculative(trained, **more: Any) -> dict[str, Any]:
    """All the drafter can draft, unless ``dflash_draft_length`` says otherwise."""
    fixed = {"dflash_draft_length": "fixed"}
    return {"method": "dflash", "model": str(trained.drafter), **fixed, **more}


def job(engine: dict[str, Any], runs: list[dict[str, Any]], random: bool) -> dict[str, Any]:
    """``random`` leaves draft lengths, sources and whom to draft for to chance."""
    if random:
        engine["speculative_config"]["dflash_draft_length"] = "auto"
    return {"engine": engine, "runs": runs, "random_lengths": random}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lossless")


@pytest.fixture(scope="module")
def plain(trained, prompts, folder) -> dict[str, Any]:
    """The runs without speculation."""
    engine = {"model": str(trained.verifier), **ENGINE}
    return tiny.engine_job({"engine": engine, "runs": cases(prompts)}, folder)["runs"]


@pytest.fixture(scope="module")
def ours(trained, prompts, folder) -> dict[str, Any]:
    """The same runs with our drafter."""
    engine = {"model": str(trained.verifier), **ENGINE, "speculative_config": speculative(trained)}
    out = tiny.engine_job(job(engine, cases(prompts), random=False), folder)
    assert out["proposer"] == "vllm_dflash.serving.worker.v1.proposer.Proposer"
    assert out["drafter_model"] == "DrafterModel"
    return out["runs"]


@pytest.fixture(scope="module")
def any_length(trained, prompts, folder) -> dict[str, Any]:
    """The same with drafts of random lengths and from both sources."""
    engine = {"model": str(trained.verifier), **ENGINE, "speculative_config": speculative(trained)}
    out = tiny.engine_job(job(engine, cases(prompts), random=True), folder)
    figures = out["lengths"]
    assert min(figures["lengths"]) > 0
    assert min(figures["accepted"].values()) > 0
    assert 0 < figures["drafted_steps"] < figures["steps"]
    return out["runs"]


def tokens(run: dict[str, Any]) -> list[Any]:
    return [
        None if o is None else [(c["token_ids"], c["text"], c["finish"], c["stop"]) for c in o]
        for o in run["outputs"]
    ]


def accepted(run: dict[str, Any]) -> float:
    return run["counters"].get("vllm:spec_decode_num_accepted_tokens_total", 0)


NAMES = [case["name"] for case in cases([])]


def cut_like_plain(run: dict[str, Any], plain: dict[str, Any]) -> list[Any]:
    """Tokens without those behind a stop string in its step, which vLLM 0.31 leaves in for every method."""
    out = []
    for mine, want in zip(tokens(run), tokens(plain), strict=True):
        (ids, *rest), (wanted, *_) = mine[0], want[0]
        assert len(ids) - len(wanted) < 8  # within a block
        out.append([(ids[: len(wanted)], *rest)])
    return out


@pytest.mark.parametrize("name", NAMES)
def test_greedy_output_is_the_verifiers(name, plain, ours) -> None:
    got = tokens(ours[name])
    if name == "stop strings" and OLD_VLLM:
        got = cut_like_plain(ours[name], plain[name])
    assert got == tokens(plain[name])
    # The drafter learned free text: what these grammars force it cannot know.
    if name not in ("one token", "json schema", "regex", "choice"):
        assert accepted(ours[name]) > 0


@pytest.mark.parametrize("name", NAMES)
def test_whatever_the_draft_lengths(name, plain, any_length) -> None:
    assert tokens(any_length[name]) == tokens(plain[name])


def test_the_cases_are_not_empty(plain, ours) -> None:
    """Guards the guards: the outputs differ between prompts, stop where they should, and more."""
    outputs = [o[0] for o in plain["batch of 8"]["outputs"]]
    assert len({tuple(o["token_ids"]) for o in outputs}) > 0.8 * len(outputs)
    assert sum(len(set(o["token_ids"])) > 8 for o in outputs) > len(outputs) / 2
    assert {o["finish"] for o in outputs} == {"stop", "length"}
    assert any(o[0]["stop"] in ("g", "e", "\u0120") for o in plain["stop strings"]["outputs"])
    assert any(o[0]["stop"] in (97, 215, 257) for o in plain["stop tokens"]["outputs"])
    assert all(len(o[0]["token_ids"]) >= 40 for o in plain["min_tokens"]["outputs"])
    assert all(len(o) == 3 for o in plain["n=3"]["outputs"])
    run = ours["batch of 8"]["counters"]
    assert accepted(ours["batch of 8"]) > run["vllm:spec_decode_num_drafts_total"] * 0.5
    assert not any("spec_decode" in k for k in plain["batch of 8"]["counters"])


def test_logprobs_are_the_verifiers(plain, ours) -> None:
    for a, b in zip(plain["logprobs"]["outputs"], ours["logprobs"]["outputs"], strict=True):
        steps = zip(a[0]["logprobs"], b[0]["logprobs"], strict=True)
        for (ids_a, values_a), (ids_b, values_b) in (
            (zip(*x, strict=True), zip(*y, strict=True)) for x, y in steps
        ):
            assert ids_a == ids_b
            torch.testing.assert_close(
                torch.tensor(values_b), torch.tensor(values_a), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("random", [False, True], ids=["all", "any length"])
def test_prefix_caching_and_chunked_prefill(trained, prompts, folder, plain, random) -> None:
    """Long prompts in small chunks, and again with their prefix in the cache."""
    runs = [
        {"name": n, "prompts": prompts, "params": GREEDY, "concurrency": 4}
        for n in ("cold", "warm")
    ]
    engine = {
        "model": str(trained.verifier),
        **ENGINE,
        "enable_prefix_caching": True,
        "block_size": 32,
        "max_num_batched_tokens": 96,
        "speculative_config": speculative(trained),
    }
    out = tiny.engine_job(job(engine, runs, random), folder)["runs"]
    for name in ("cold", "warm"):
        assert tokens(out[name]) == tokens(plain["batch of 8"])
        assert accepted(out[name]) > 0
    assert out["warm"]["counters"]["vllm:prefix_cache_hits_total"] > 0


@pytest.mark.parametrize("random", [False, True], ids=["all", "any length"])
def test_preemption_and_abort(trained, prompts, folder, plain, random) -> None:
    """Too few KV blocks for the batch, then one request of it is aborted in mid-flight."""
    runs: list[dict[str, Any]] = [
        {"name": "preempted", "prompts": prompts, "params": GREEDY, "concurrency": 8},
        {
            "name": "aborted",
            "prompts": prompts[:8],
            "params": GREEDY,
            "concurrency": 8,
            "abort": [2, 5],
        },
        {"name": "after", "prompts": prompts[:8], "params": GREEDY, "concurrency": 4},
    ]
    engine = {
        "model": str(trained.verifier),
        **ENGINE,
        "block_size": 32,
        "num_gpu_blocks_override": 16,
        "speculative_config": speculative(trained),
    }
    out = tiny.engine_job(job(engine, runs, random), folder)["runs"]
    assert out["preempted"]["counters"]["vllm:num_preemptions_total"] > 0
    want = tokens(plain["batch of 8"])
    assert tokens(out["preempted"]) == want
    assert accepted(out["preempted"]) > 0
    assert tokens(out["aborted"]) == [None if i == 2 else w for i, w in enumerate(want[:8])]
    assert accepted(out["aborted"]) > 0
    assert tokens(out["after"]) == want[:8]


# -- sampling ----------------------------------------------------------------------------------

VOCAB = 8
SAMPLES = 6000
NEW = 4


@pytest.fixture(scope="module")
def small(models):
    """A verifier with 8 tokens, and a drafter for it."""
    verifier = tiny.make_verifier(
        models / "small", vocab=VOCAB, tokenizer=False, layers=2, head_std=0.2
    )
    drafter = tiny.make_drafter(
        models / "small-drafter",
        verifier,
        draft_block_size=4,
        draft_vocab_size=6,
        num_features=2,
    )
    return verifier, drafter


def exact_probabilities(
    verifier, prompt: list[int], temperature: float, top_k: int
) -> torch.Tensor:
    """Probability ``[V, V, V]`` of the second, third and fourth token, summed over the first."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(verifier, dtype=torch.float32)
    prefixes = torch.tensor(list(itertools.product(range(VOCAB), repeat=NEW - 1)))
    with torch.no_grad():
        ids = torch.cat([torch.tensor(prompt).expand(len(prefixes), -1), prefixes], dim=1)
        logits = model(ids).logits[:, len(prompt) - 1 :].double()
    if top_k:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = (logits / temperature).softmax(-1)
    joint = probs[:, NEW - 1]
    for k in range(NEW - 1):
        joint = joint * probs[:, k].gather(1, prefixes[:, k : k + 1])
    return joint.view(VOCAB, VOCAB, VOCAB, VOCAB).sum(0)


def p_values(samples: list[list[int]], exact: torch.Tensor) -> list[float]:
    """Of each drafted position alone and of each pair of them."""
    ids = torch.tensor(samples)[:, 1:]
    counts = torch.zeros_like(exact)
    counts.index_put_(tuple(ids.T), torch.ones(len(ids), dtype=exact.dtype), accumulate=True)
    out = []
    for keep in ((0,), (1,), (2,), (0, 1), (1, 2), (0, 2)):
        drop = [d for d in range(3) if d not in keep]
        out.append(chi_square_p(counts.sum(drop), exact.sum(drop)))
    return out


def test_chi_square_is_calibrated() -> None:
    probabilities = torch.rand(40, generator=torch.Generator().manual_seed(0)).double()
    probabilities /= probabilities.sum()
    generator = torch.Generator().manual_seed(1)
    values = []
    for _ in range(300):
        drawn = torch.multinomial(probabilities, 4000, True, generator=generator)
        values.append(chi_square_p(torch.bincount(drawn, minlength=40), probabilities))
    assert 0.02 < sum(v < 0.05 for v in values) / 300 < 0.09
    other = probabilities.roll(1)
    drawn = torch.multinomial(other, 4000, True, generator=generator)
    assert chi_square_p(torch.bincount(drawn, minlength=40), probabilities) < 1e-6


@pytest.mark.parametrize(
    ("method", "temperature", "top_k", "lengths"),
    [
        ("greedy", 1.0, 0, "fixed"),
        ("greedy", 0.7, 5, "any"),
        ("probabilistic", 0.7, 5, "fixed"),
        ("probabilistic", 1.0, 0, "any"),
        # Chosen by the scheduler, a step ahead.
        ("greedy", 0.7, 5, "scheduled"),
        ("probabilistic", 1.0, 0, "scheduled"),
    ],
)
def test_sampled_output_has_the_verifiers_distribution(
    small, folder, method, temperature, top_k, lengths
) -> None:
    verifier, drafter = small
    prompt = [1, 5, 3, 0, 4, 2, 7, 7]
    run: dict[str, Any] = {
        "prompts": [prompt] * (SAMPLES // 50),
        "params": {
            "temperature": temperature,
            "top_k": top_k,
            "max_tokens": NEW,
            "n": 50,
            "detokenize": False,
        },
        "concurrency": 4,
    }
    engine = {
        "model": str(verifier),
        "skip_tokenizer_init": True,
        "max_model_len": 64,
        "max_num_seqs": 200,
        "seed": 7,
        "speculative_config": {
            "method": "dflash",
            "model": str(drafter),
            "draft_sample_method": method,
            "dflash_draft_length": "fixed",
        },
    }
    runs = [{**run, "name": "right"}, {**run, "name": "wrong", "sampler": "accept_all"}]
    given = job(engine, runs, lengths != "fixed")
    if lengths == "scheduled":
        given |= {"async": True, "costs": [1.0, 0.001, 0.001]}
    served = tiny.engine_job(given, folder)
    assert served["batches"] == 1 + (lengths == "scheduled")
    out = served["runs"]
    exact = exact_probabilities(verifier, prompt, temperature, top_k)
    assert abs(float(exact.sum()) - 1) < 1e-9
    right, wrong = (
        [c["token_ids"] for o in out[name]["outputs"] for c in o] for name in ("right", "wrong")
    )
    counters = out["right"]["counters"]
    assert accepted(out["right"]) > 300
    assert accepted(out["right"]) < 0.9 * counters["vllm:spec_decode_num_draft_tokens_total"]
    assert len(right) == len(wrong) == SAMPLES
    # Tokens that top-k excludes have probability 0: not one may appear.
    seen = torch.tensor(right)[:, 1:]
    assert float(exact[tuple(seen.T)].min()) > 0
    # Six tests a case: a false alarm in one of 10^5 runs.
    assert min(p_values(right, exact)) > 1e-6, p_values(right, exact)
    assert min(p_values(wrong, exact)) < 1e-12, "a sampler that accepts every draft went unnoticed"
