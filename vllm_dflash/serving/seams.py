"""Where vllm-dflash enters vLLM: all functions, methods and classes of its that something of ours replaces.

One row each: what it is, what of it is relied on, what takes its place, why, where it runs, who knows it
upstream, and when the row can go. :mod:`vllm_dflash.serving.patching` puts them in place, ``vllm-dflash env``
shows their state, docs/dev/seams.md is made from them (``python -m vllm_dflash.serving.seams``), and
tests/helpers/contract.py looks for them in the source of every supported vLLM. Nothing is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: How a row's replacement gets there, and when.
#: ``import``: once, right after vLLM imports the module.
#: ``cpu``, ``cpu hybrid``: once, by ``patching.apply``, where the CPU backend serves a dflash drafter (with
#: recurrent layers).
#: ``several API processes``: the same where a server has them.
#: ``class``: the class of one object becomes our subclass, by ``patching.specialise``.
#: ``object``: an attribute of one object, by ``patching.replace`` or for the while by ``patching.replaced``.
When = Literal["import", "cpu", "cpu hybrid", "several API processes", "class", "object"]

# Where it runs.
FRONT_END = "front end"
ENGINE_CORE = "engine core"
ENGINE_CORE_LEARNING = "engine core, with dflash_learn only"
WORKER = "worker"
TRAINING = "worker, of vllm-dflash train only"
WORKER_V1 = "worker, V1 runner"
WORKER_V1_CPU = "worker, V1 runner, CPU"
WORKER_CPU = "worker, CPU"
WORKER_V2 = "worker, V2 runner"

# Whose gap it is.
NO_HOOK = "no hook for a plugin"
NONE = "none reported"

# When it can go.
V1_GONE = "with the V1 runner"
MENDED = "when that is mended"
NEVER = "stays"
_EVERY_VERIFIER = "when every verifier has the interface"
#: Of what vLLM 0.33 does itself: upstream, until.
_IN_033 = "mended in vLLM 0.33", "when 0.32 is no longer supported"


@dataclass(frozen=True)
class Seam:
    """One place in vLLM.

    Attributes:
        target: ``module:attribute``, the attribute dotted.
        parameters: of its signature that ours relies on; without one of them ours is not put there.
        ours: ``module:function``. Of ``import`` and ``cpu`` rows it gets the original and returns what takes
            its place; of ``class`` rows it gets a class and returns a subclass; of ``object`` rows it is
            where the attribute is replaced. A class stands for itself.
        where: process and runner.
        why: what is not as wanted without.
        upstream: issue or pull request of vLLM, a patch in upstream, or a file in docs/dev/upstream.
        until: when the row can go.
        when: how it gets there.
    """

    target: str
    parameters: tuple[str, ...]
    ours: str
    where: str
    why: str
    upstream: str = NO_HOOK
    until: str = NEVER
    when: When = "import"

    @property
    def module(self) -> str:
        """The vLLM module."""
        return self.target.partition(":")[0]

    @property
    def attribute(self) -> str:
        """Dotted attribute inside it."""
        return self.target.partition(":")[2]

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.target.replace(":", ".")


_OURS = "vllm_dflash.serving."
_FINAL_STATES = f"{_OURS}worker.features.verifier:keeping_final_states"
_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner."
_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner."
_SPECULATOR = "vllm.v1.worker.gpu.spec_decode.dflash.speculator"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler."
_MAMBA = "vllm.model_executor.layers.mamba"
_REJECTION = "vllm.v1.sample.rejection_sampler"
_HYBRIDS = "upstream/mamba2-spec-cpu.patch"
_RUNNER_V1, _OBSERVED = (
    f"{_OURS}worker.v1.model_runner:drafting_runner",
    f"{_OURS}worker.v2.speculator:observed",
)


def _seams(
    owner: str,
    members: str,
    ours: str,
    where: str,
    why: str,
    upstream: str = NO_HOOK,
    until: str = NEVER,
    when: When = "import",
) -> list[Seam]:
    """A row for each of an owner's members: ``member(parameter, ...)``, or ``member`` alone; by ``;``."""
    out = []
    for member in members.split(";"):
        name, _, parameters = member.strip().rstrip(")").partition("(")
        relied = tuple(parameters.split(", ")) if parameters else ()
        out.append(Seam(owner + name, relied, ours, where, why, upstream, until, when))
    return out


# fmt: off
SEAMS = (
    # ---- front end and configuration ----
    *_seams("vllm.engine.arg_utils:EngineArgs.", "create_speculative_config(target_model_config)",
        f"{_OURS}frontend.speculative_config:wrap_create_speculative_config", FRONT_END,
        "dflash_* options, draft length from the checkpoint, drafter and verifier compared before loading"),
    *_seams("vllm.config.vllm:VllmConfig.", "_dflash_needs_multi_kv_group(self)",
        f"{_OURS}support:not_of_ours", "all processes",
        "vLLM refuses drafters with sliding and full layers on the V1 runner; our proposer serves them there",
        "vLLM issue 50710, upstream/dflash-mixed-v1.patch", V1_GONE),
    *_seams("vllm.config.vllm:VllmConfig.", "_is_dflash_candidate_draft(self)",
        f"{_OURS}support:not_of_ours", "all processes",
        "vLLM refuses drafters with a candidate head on the V1 runner; our proposer walks the selector there",
        until=V1_GONE),
    *_seams("vllm.v1.metrics.loggers:PrometheusStatLogger.",
        "_spec_decoding_cls(speculative_config, labelnames, per_engine_labelvalues)",
        f"{_OURS}frontend.metrics:drafter_metrics_class", FRONT_END,
        "drafter name, tau and chosen lengths in /metrics; a stat_logger_plugins entry point would switch "
        "statistics on in every server"),
    *_seams("vllm.entrypoints.serve.instrumentator.metrics:", "attach_router(app)",
        f"{_OURS}frontend.metrics:wrap_metrics_route", FRONT_END,
        "with several API processes /metrics has what Prometheus shares between them only",
        when="several API processes"),
    *_seams("vllm.v1.engine.output_processor:OutputProcessor.", "process_outputs(engine_core_outputs)",
        "vllm_dflash.bench.engine_process:_watch_steps", "front end, of vllm-dflash bench only",
        "the tokens of each step of a request, which a client can get joined", when="object"),
    # ---- engine core ----
    *_seams("vllm.v1.engine.core:EngineCore.", "_initialize_kv_caches(vllm_config)",
        f"{_OURS}engine_core.start:wrap_initialize_kv_caches", ENGINE_CORE,
        "once the workers are warm: what steps cost there, asked for by collective_rpc. Not __init__, inside "
        "which vLLM loads plugins"),
    *_seams(_SCHEDULER, "__init__(vllm_config, kv_cache_config)",
        f"{_OURS}engine_core.start:wrap_scheduler_init", ENGINE_CORE,
        "the scheduler's class becomes a subclass, by the rows below; scheduler_cls is the user's"),
    *_seams(_SCHEDULER, "add_request(request); schedule; _update_after_schedule(scheduler_output); "
        "update_draft_token_ids(draft_token_ids)",
        f"{_OURS}draft_limits:limiting", ENGINE_CORE,
        "no draft token is verified where it would change what a request says, nor beyond the drafter's "
        "positions, nor while training records",
        "upstream/min-tokens-bonus.patch, upstream/logprob-token-ids.patch, "
        "docs/dev/upstream/seed-and-drafts.md",
        "what is for faults: when those are mended", "class"),
    *_seams(_SCHEDULER, "schedule; _update_after_schedule(scheduler_output); "
        "update_from_output(scheduler_output, model_runner_output); update_draft_token_ids(draft_token_ids)",
        f"{_OURS}engine_core.scheduler:choosing", ENGINE_CORE,
        "draft lengths and draft passes that the scheduler chooses",
        "vLLM PR 32374 has a table by batch size", when="class"),
    *_seams(_SCHEDULER, "update_draft_token_ids(draft_token_ids); make_spec_decoding_stats("
        "request_id, num_draft_tokens, num_accepted_tokens, num_invalid_spec_tokens)",
        f"{_OURS}verified:counting", ENGINE_CORE,
        "what became of drafts, by source: only the scheduler knows", when="class"),
    *_seams("vllm.v1.engine.core:EngineCoreProc.",
        "_process_input_queue(self); _process_engine_step(self); add_request(request)",
        "vllm_dflash.learning.engine_core:learning_core", ENGINE_CORE_LEARNING,
        "slices of training while there is nothing to do", when="class"),
    *_seams(_SCHEDULER, "schedule; _free_request(request)",
        "vllm_dflash.learning.engine_core:capturing", ENGINE_CORE_LEARNING,
        "the tokens of finished requests; short steps for our own", when="class"),
    *_seams("vllm.v1.executor.multiproc_executor:MultiprocExecutor.", "sample_tokens(grammar_output)",
        f"{_OURS}draft_return:keep_drafts", ENGINE_CORE,
        "draft tokens come with the step's output, not by a question after every step", until=V1_GONE),
    *_seams("vllm.v1.executor.multiproc_executor:MultiprocExecutor.", "take_draft_token_ids(self)",
        f"{_OURS}draft_return:answer_from_output", ENGINE_CORE, "as above", until=V1_GONE),
    # ---- worker ----
    *_seams("vllm.v1.worker.gpu_worker:Worker.", "compile_or_warm_up_model(self)",
        f"{_OURS}worker.start:wrap_warm_up", WORKER,
        "measures what steps cost, once the engine can run them and before vLLM watches for compilation"),
    *_seams("vllm.v1.worker.cpu_worker:CPUWorker.", "compile_or_warm_up_model(self)",
        f"{_OURS}worker.start:wrap_warm_up", WORKER, "as above"),
    *_seams("vllm.v1.worker.gpu_worker:Worker.", "_maybe_activate_jit_monitor",
        f"{_OURS}worker.start:wrap_warm_up", WORKER,
        "the moment before that watch begins, while the warm-up runs", when="object"),
    *_seams("vllm.model_executor.models.interfaces:EagleModelMixin.",
        "_maybe_add_hidden_state(aux_hidden_states, layer_idx, hidden_states, residual)",
        f"{_OURS}worker.features.tap:install_tap", WORKER,
        "verifier layers write features into one buffer, instead of a tensor each and a concatenation",
        when="object"),
    *_seams("vllm.model_executor.models.interfaces:SupportsEagle3.", "set_aux_hidden_state_layers(layers)",
        f"{_OURS}worker.features.layer_hooks:adapted", WORKER,
        "verifiers without this interface get it: hooks on their layers, forward returns a mark",
        until=_EVERY_VERIFIER, when="class"),
    *_seams("vllm.model_executor.layers.logits_processor:LogitsProcessor.",
        "_get_logits(hidden_states, lm_head, embedding_bias)",
        f"{_OURS}worker.features.verifier:VerifierLogits", TRAINING,
        "for the kl loss: the verifier's logits of chosen tokens, with its own scales and caps",
        when="object"),
    *_seams(_V1, "execute_model(scheduler_output)", _FINAL_STATES, TRAINING,
        "for the kl loss: the states that lm_head reads; a hook would not see a replayed CUDA graph",
        when="class"),
    *_seams(_V2, "execute_model(scheduler_output)", _FINAL_STATES, TRAINING,
        "as above", when="class"),
    # ---- V1 runner ----
    *_seams("vllm.v1.worker.gpu_model_runner:", "DFlashProposer(vllm_config, device, runner)",
        f"{_OURS}worker.v1.proposer:Proposer", WORKER_V1,
        "a subclass of vLLM's: features, ops, chosen lengths, several KV cache groups", until=V1_GONE),
    *_seams("vllm.v1.spec_decode.dflash:DFlashProposer.",
        "propose(target_positions, target_hidden_states, common_attn_metadata)",
        f"{_OURS}worker.v1.proposer:Proposer", WORKER_V1,
        "overridden there by name; vLLM's runner passes keywords", until=V1_GONE, when="class"),
    *_seams("vllm.model_executor.models.qwen3_dflash2:DFlashGroupedConv.",
        "_convolve(hidden_states, delta, side)", f"{_OURS}worker.dflash2_model:StepConv", WORKER_V1,
        "blocks whose width is the step's, with chosen lengths; vLLM's are as wide as in the configuration",
        until=V1_GONE, when="class"),
    *_seams(_V1, "execute_model(scheduler_output)", _RUNNER_V1, WORKER_V1,
        "when a step begins; context that waits is written before its blocks pass on",
        NO_HOOK, V1_GONE, "class"),
    *_seams(_V1, "_prepare_inputs", _RUNNER_V1, WORKER_V1,
        "a step without drafts is sampled as without speculation", NONE, V1_GONE, "class"),
    *_seams(_V1, "propose_draft_token_ids(scheduler_output, sampled_token_ids, aux_hidden_states, "
        "spec_decode_metadata, common_attn_metadata)", _RUNNER_V1, WORKER_V1,
        "steps around which nothing is drafted do without what vLLM prepares for proposers",
        NO_HOOK, V1_GONE, "class"),
    *_seams(_V1, "_input_fits_in_drafter(common_attn_metadata)", _RUNNER_V1, WORKER_V1,
        "near max_model_len vLLM leaves the proposer out for the whole batch and sends drafts of zeros",
        NONE, V1_GONE, "class"),
    *_seams(_V1, "sample_tokens", _RUNNER_V1, WORKER_V1,
        "the step's output takes the draft tokens along", NO_HOOK, V1_GONE, "class"),
    *_seams(_V1, "take_draft_token_ids", _RUNNER_V1, WORKER_V1,
        "draft tokens take along where they come from", NO_HOOK, V1_GONE, "class"),
    *_seams(_V1, "_sample; _bookkeeping_sync", _RUNNER_V1, WORKER_V1_CPU,
        "a seed and a prompt in chunks end the engine",
        "upstream/seeded-chunks.patch", MENDED, "class"),
    *_seams(f"{_REJECTION}:RejectionSampler.",
        "forward(metadata, draft_probs, logits, sampling_metadata); _get_logprobs_tensors",
        f"{_OURS}worker.v1.sampler:Sampler", WORKER_V1,
        "logprob_token_ids is lost beside drafts, or ends the engine",
        "upstream/logprob-token-ids.patch", MENDED, "class"),
    *_seams("vllm.v1.sample.sampler:Sampler.", "gather_logprobs(logprobs, num_logprobs, token_ids)",
        f"{_OURS}worker.v1.sampler:Sampler", WORKER_V1,
        "those of each position, while the rejection sampler gathers",
        "upstream/logprob-token-ids.patch", MENDED, "object"),
    *_seams("vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.",
        "sync_batch(batch_update); update_state(output_token_ids, spec_token_ids); "
        "apply_to_logits(logits, predict_bonus_token, spec_token_ids); "
        "_find_last_sequence_index(target_list, token_ids)",
        f"{_OURS}worker.v1.thinking_budget:ThinkingBudgets", WORKER_V1,
        "thinking_token_budget is missed beside drafts, and forces tokens in other requests",
        "upstream/thinking-budget-drafts.patch", MENDED, "class"),
    *_seams(f"{_REJECTION}:", "apply_sampling_constraints(logits)",
        f"{_OURS}worker.cpu_sampling:wrap_apply_sampling_constraints", WORKER_V1_CPU,
        "top-k of a batch without draft tokens takes the maximum of nothing and ends the engine",
        "upstream/rejection-sampler-no-drafts.patch", MENDED, "cpu"),
    *_seams(f"{_REJECTION}:",
        "expand_batch_to_tokens(x, cu_num_tokens, num_tokens, replace_from, replace_to)",
        f"{_OURS}worker.cpu_sampling:wrap_expand_batch_to_tokens", WORKER_V1_CPU,
        "it never writes its result there: temperature, top-k and top-p of draft rows are chance",
        "vLLM issue 55005, upstream/cpu-expand-kernel.patch", MENDED, "cpu"),
    *_seams(f"{_MAMBA}.mamba_mixer2:", "causal_conv1d_update(x, conv_state, weight, bias, activation, "
        "conv_state_indices, num_accepted_tokens, query_start_loc)",
        f"{_OURS}worker.cpu_recurrent:wrap_causal_conv1d_update", WORKER_CPU,
        "Mamba-2 layers ignore what was accepted", _HYBRIDS, MENDED, "cpu hybrid"),
    *_seams(f"{_MAMBA}.mamba_mixer2:", "selective_state_update(state, x, dt, A, B, C)",
        f"{_OURS}worker.cpu_recurrent:wrap_selective_state_update", WORKER_CPU,
        "Mamba-2 layers take the table of states for a list", _HYBRIDS, MENDED, "cpu hybrid"),
    *_seams(f"{_MAMBA}.ops.cpu.gdn_attention:", "_spec_forward",
        f"{_OURS}worker.cpu_recurrent:wrap_spec_forward", WORKER_CPU,
        "GDN layers misplace the convolution's tokens in steps of fewer than 1 + K",
        *_IN_033, "cpu hybrid"),
    # ---- V2 runner ----
    *_seams("vllm.v1.worker.gpu.model_runner:", "init_speculator(vllm_config, device)",
        f"{_OURS}worker.v2.speculator:wrap_init_speculator", WORKER_V2,
        "the speculator's class becomes a subclass, by the rows below"),
    *_seams("vllm.v1.worker.gpu.model_runner:", "set_eagle3_aux_hidden_state_layers(model, spec_config)",
        f"{_OURS}worker.v2.speculator:wrap_set_layers", WORKER_V2,
        "called once the verifier is loaded, before the drafter; refuses those without the Eagle3 interface",
        until=_EVERY_VERIFIER),
    *_seams(f"{_SPECULATOR}:DFlashSpeculator.", "load_draft_model(target_model)", _OBSERVED, WORKER_V2,
        "the tap, the drafter's positions, no LoRA", when="class"),
    *_seams(f"{_SPECULATOR}:DFlashSpeculator.",
        "propose(input_batch, num_rejected, dummy_run, skip_attn_for_dummy_run, is_profile)",
        _OBSERVED, WORKER_V2, "features from the tap; no draft pass where the schedule has none",
        when="class"),
    *_seams(f"{_SPECULATOR}:DFlashSpeculator.", "sample_draft(draft_logits)", _OBSERVED, WORKER_V2,
        "the greedy draft token without scattering logits over the verifier's vocabulary",
        NONE, when="class"),
    *_seams(f"{_SPECULATOR}:DFlashSpeculator.",
        "_build_uniform_attn_metadata; _prepare_eplb_forward; _generate_draft", _OBSERVED, WORKER_V2,
        "the context's K/V of a step without a draft pass", *_IN_033, when="class"),
    *_seams(_V2, "execute_model(scheduler_output, dummy_run)",
        f"{_OURS}worker.v2.model_runner:following_runner", WORKER_V2,
        "the speculator follows the step's schedule: in vLLM 0.31 it does not, in 0.32 without effect",
        *_IN_033, when="class"),
    *_seams(f"{_SPECULATOR}:",
        "prepare_dflash_inputs(input_buffers, input_batch, context_slot_mapping, cp_size)",
        f"{_OURS}worker.v2.speculator:wrap_prepare_inputs", WORKER_V2, "one launch for all KV cache groups"),
    *_seams("vllm.v1.worker.gpu.cudagraph_utils:ModelCudaGraphManager.", "_init_candidates(self)",
        f"{_OURS}worker.v2.cudagraphs:wrap_init_candidates", WORKER_V2,
        "full CUDA graphs for steps with few draft tokens or none",
        "vLLM PR 45953 has them for a table by batch size"),
    *_seams("vllm.v1.worker.gpu.cudagraph_utils:", "build_dynamic_sd_schedule_lookup",
        f"{_OURS}worker.v2.cudagraphs:wrap_init_candidates", WORKER_V2,
        "the lengths of those graphs, while vLLM lists them",
        "vLLM PR 45953 has them for a table by batch size", when="object"),
)
# fmt: on


_HEAD = """\
# Seams in vLLM

Every function, method and class of vLLM that something of vllm-dflash takes the place of.

Made by `python -m vllm_dflash.serving.seams > docs/dev/seams.md` from the table in that file;
`serving/patching.py` puts them in place. How: `import` right after vLLM imports the module, `cpu` where the
CPU backend serves a drafter, `class` by a subclass, mostly under one object, `object` on one object. In
brackets are the parameters that are relied on. Public interfaces of vLLM that the plugin uses (plugin entry
point, `ModelRegistry`, `additional_config`, `worker_extension_cls`) are not here.
"""


def table() -> str:
    """docs/dev/seams.md."""
    lines = [_HEAD]
    for where in dict.fromkeys(seam.where for seam in SEAMS):
        lines += [f"## {where[0].upper()}{where[1:]}", ""]
        lines += ["| of vLLM | ours | how | why | upstream | until |", "|---|---|---|---|---|---|"]
        rows: dict[tuple[str, ...], list[str]] = {}
        for seam in (seam for seam in SEAMS if seam.where == where):
            owner, _, member = seam.target.rpartition("." if "." in seam.attribute else ":")
            ours = seam.ours.removeprefix("vllm_dflash.")
            key = (owner, ours, seam.when, seam.why, seam.upstream, seam.until)
            relied = f"({', '.join(seam.parameters)})" if seam.parameters else ""
            rows.setdefault(key, []).append(f"`{member}{relied}`")
        for (owner, ours, *rest), members in rows.items():
            cells = (f"`{owner}`: {', '.join(members)}", f"`{ours}`", *rest)
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
