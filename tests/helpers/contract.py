"""What vllm-dflash relies on in vLLM, read off its own code, and whether a version's source has it.

Imports, attributes, calls, overridden methods, replaced globals and environment variables come from the
package by AST, so that they cannot go stale. By hand is only what an ``Any`` hides: ``ROLES`` says which
variables hold which of vLLM's objects. Uses of such objects count where the *reference* has them, the
vLLM that the tests run on (its engine tests say that those work).
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from helpers.vllm_source import Parameters, Source, targets
from vllm_dflash.serving.seams import SEAMS

PACKAGE = Path(__file__).resolve().parents[2] / "vllm_dflash"

_RUNNER = "vllm.v1.worker.gpu_model_runner.GPUModelRunner"
_PROPOSER = "vllm.v1.spec_decode.dflash.DFlashProposer"
_V2 = "vllm.v1.worker.gpu.spec_decode.dflash.speculator"
_SPECULATOR = f"{_V2}.DFlashSpeculator"
_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner.GPUModelRunner"
_SCHEDULER = "vllm.v1.core.sched.scheduler.Scheduler"
_OUTPUT = "vllm.v1.core.sched.output.SchedulerOutput"
_REQUEST = "vllm.v1.request.Request"
_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
_DRAFT_MODEL = "vllm.model_executor.models.qwen3_dflash.DFlashQwen3Model"
_METADATA = "vllm.v1.attention.backend.CommonAttentionMetadata"
_MODEL_CONFIG = "vllm.config.ModelConfig"
_IMPL = "vllm.v1.attention.backends.flash_attn.FlashAttentionImpl"
_PARAMETERS = "parameters of "
#: File, or file:function -> expressions there (``[]``: an item of) -> what they are in vLLM.
ROLES: dict[str, dict[str, str]] = {
    "learning/engine_core.py": {
        "request": _REQUEST, "core": "vllm.v1.engine.core.EngineCoreProc", "config": "vllm.config.VllmConfig",
        "scheduler": _SCHEDULER,
    },
    "learning/start.py": {"engine_args": "vllm.engine.arg_utils.EngineArgs", "verifier": _MODEL_CONFIG},
    "serving/worker/reload.py:_refill": {"inner": _DRAFT_MODEL},
    "serving/worker/features/layer_hooks.py": {"vllm_config": "vllm.config.VllmConfig"},
    "serving/worker/v1/block_inputs.py": {
        "proposer": _PROPOSER, "metadata": _METADATA, "type()": _METADATA,
    },
    "serving/worker/context_kv.py": {
        "self.model": _DRAFT_MODEL, "model": _DRAFT_MODEL, "impl": _IMPL,
        "attn": "vllm.model_executor.layers.attention.Attention",
        "attn.impl": "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl",
    },
    "serving/worker/cpu_recurrent.py": {
        "layer": "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn.QwenGatedDeltaNetAttention",
        "metadata": "vllm.v1.attention.backends.gdn_attn.GDNAttentionMetadata",
        "original": "vllm.model_executor.layers.mamba.mamba_mixer2.selective_state_update",
    },
    "serving/worker/v1/deferred_context.py": {
        "metadata": _METADATA, "scheduler_output": _OUTPUT,
    },
    "serving/worker/v1/draft_controller.py": {"runner": _RUNNER, "metadata": _METADATA},
    "serving/verified.py": {"scheduler": _SCHEDULER},
    "serving/draft_return.py": {"runner": _RUNNER},
    "serving/worker/v1/model_runner.py": {
        "self": _RUNNER, "output": _OUTPUT, "batch": "vllm.v1.worker.gpu_input_batch.InputBatch",
    },
    "serving/worker/v1/model_runner.py:_prepare_inputs": {
        "metadata": "vllm.v1.spec_decode.metadata.SpecDecodeMetadata",
    },
    "serving/worker/v1/model_runner.py:propose_draft_token_ids": {
        "given": f"{_PARAMETERS}{_RUNNER}.propose_draft_token_ids",
    },
    "serving/worker/v2/model_runner.py": {"scheduler_output": _OUTPUT},
    "serving/engine_core/start.py": {
        "vllm_config": "vllm.config.VllmConfig", "spec": "vllm.config.SpeculativeConfig",
    },
    "serving/engine_core/start.py:_initialize_kv_caches": {"self": "vllm.v1.engine.core.EngineCore"},
    "serving/engine_core/start.py:init": {"self": _SCHEDULER},
    "serving/worker/start.py": {"worker": "vllm.v1.worker.gpu_worker.Worker"},
    "serving/support.py": {
        "vllm_config": "vllm.config.VllmConfig", "spec": "vllm.config.SpeculativeConfig",
        "draft": _MODEL_CONFIG,
    },
    "serving/support.py:asked": {"self": "vllm.config.VllmConfig"},
    "serving/draft_limits.py": {
        "draft": _MODEL_CONFIG, "request": _REQUEST, "self": _SCHEDULER, "scheduler": _SCHEDULER,
        "vllm_config": "vllm.config.VllmConfig", "params": "vllm.sampling_params.SamplingParams",
    },
    "serving/worker/v1/sampler.py": {
        "runner": _RUNNER,
        "runner.input_batch": "vllm.v1.worker.gpu_input_batch.InputBatch",
        "sampler": "vllm.v1.sample.sampler.Sampler",
        "sampling_metadata": "vllm.v1.sample.metadata.SamplingMetadata",
        "metadata": "vllm.v1.spec_decode.metadata.SpecDecodeMetadata",
    },
    "serving/worker/v1/thinking_budget.py:_move_on": {
        "self": "vllm.v1.sample.thinking_budget_state.ThinkingBudgetStateHolder",
    },
    "serving/worker/drafter_model.py": {
        "vllm_config": "vllm.config.VllmConfig",
        "shared": "vllm.lora.layers.VocabParallelEmbeddingWithLoRA",
    },
    "serving/worker/v2/cudagraphs.py": {
        "module": _GRAPHS, "config": "vllm.config.VllmConfig",
        "manager": f"{_GRAPHS}.ModelCudaGraphManager", "desc": f"{_GRAPHS}.BatchExecutionDescriptor",
    },
    "serving/worker/v2/cudagraphs.py:_init_candidates": {"self": f"{_GRAPHS}.ModelCudaGraphManager"},
    "serving/worker/v1/kv_groups.py": {
        "runner": _RUNNER, "metadata": _METADATA, "block": _METADATA, "common": _METADATA,
        "runner.input_batch.block_table[]": "vllm.v1.worker.block_table.BlockTable",
        "group.attention": "vllm.v1.worker.utils.AttentionGroup",
    },
    "serving/frontend/metrics.py": {
        "base": "vllm.v1.spec_decode.metrics.SpecDecodingProm",
        "speculative_config": "vllm.config.SpeculativeConfig",
        "spec_decoding_stats": "vllm.v1.spec_decode.metrics.SpecDecodingStats",
        "stats": "vllm.v1.spec_decode.metrics.SpecDecodingStats",
    },
    "serving/worker/features/probe.py": {"vllm_config": "vllm.config.VllmConfig"},
    "serving/worker/v1/proposer.py": {
        "vllm_config": "vllm.config.VllmConfig", "self.runner": _RUNNER, "inner": _DRAFT_MODEL,
        "self.model": "vllm.model_executor.models.qwen3_dflash.DFlashQwen3ForCausalLM",
        "kv_cache_config": "vllm.v1.kv_cache_interface.KVCacheConfig",
        "cache_group": "vllm.v1.kv_cache_interface.KVCacheGroupSpec",
    },
    "serving/worker/v1/proposer.py:propose": {"kwargs": f"{_PARAMETERS}{_PROPOSER}.propose"},
    "serving/worker/calibration.py:_run": {"runner": _RUNNER_V2},
    "serving/worker/calibration.py:costs_file": {"vllm_config": "vllm.config.VllmConfig"},
    "serving/engine_core/scheduler.py": {
        "vllm_config": "vllm.config.VllmConfig", "scheduler": _SCHEDULER, "self.scheduler": _SCHEDULER,
        "cls": _SCHEDULER, "request": _REQUEST, "r": _REQUEST, "output": _OUTPUT,
        "result": "vllm.v1.outputs.ModelRunnerOutput", "scheduler_output": _OUTPUT,
    },
    "serving/frontend/speculative_config.py": {
        "self": "vllm.EngineArgs", "engine_args": "vllm.EngineArgs",
        "target_model_config": _MODEL_CONFIG, "verifier": _MODEL_CONFIG,
    },
    "serving/worker/v2/speculator.py": {
        "cls": _SPECULATOR, "speculator": _SPECULATOR, "inner": _DRAFT_MODEL,
        "vllm_config": "vllm.config.VllmConfig", "batch": "vllm.v1.worker.gpu.input_batch.InputBatch",
    },
    "serving/worker/v2/speculator.py:propose": {"given": f"{_PARAMETERS}{_SPECULATOR}.propose"},
    "serving/worker/v2/speculator.py:prepare_dflash_inputs": {
        "given": f"{_PARAMETERS}{_V2}.prepare_dflash_inputs",
    },
    "serving/worker/v2/speculator.py:_build_block": {
        "given": f"{_PARAMETERS}{_V2}.prepare_dflash_inputs",
        "tables": "vllm.v1.worker.gpu.block_table.BlockTables",
    },
    "serving/worker/features/tap.py": {
        "vllm_config": "vllm.config.VllmConfig",
        "inner[]": "vllm.model_executor.models.interfaces.EagleModelMixin",
    },
    "serving/worker/features/tap.py:_tap_layer": {
        "self": "vllm.model_executor.models.interfaces.EagleModelMixin"
    },
    "serving/draft_stats.py:make_stats": {
        "vllm_config": "vllm.config.VllmConfig", "spec": "vllm.config.SpeculativeConfig",
    },
    "serving/worker/features/verifier.py:_check": {
        "processor": "vllm.model_executor.layers.logits_processor.LogitsProcessor",
    },
    "serving/worker/features/verifier.py:_unsharded": {
        "module": "vllm.model_executor.layers.vocab_parallel_embedding.VocabParallelEmbedding",
        "group": "vllm.distributed.parallel_state.GroupCoordinator",
    },
    "serving/worker/features/verifier.py:execute_model": {"self": _RUNNER_V2},
    "training/worker.py": {"self": "vllm.v1.worker.gpu_worker.Worker"},
    "training/session.py": {"runner": _RUNNER},
    "training/engine.py": {
        "self.engine": "vllm.v1.engine.llm_engine.LLMEngine",
        "client": "vllm.v1.engine.core_client.InprocClient",
        "client.engine_core": "vllm.v1.engine.core.EngineCore", "output": "vllm.RequestOutput",
        "done": "vllm.CompletionOutput", "output.outputs[]": "vllm.CompletionOutput",
        "current_platform": "vllm.platforms.interface.Platform",
    },
    "training/ranks.py": {"group": "vllm.distributed.parallel_state.GroupCoordinator"},
    "bench/engine_process.py": {
        "engine": "vllm.v1.engine.async_llm.AsyncLLM", "output": "vllm.RequestOutput",
        "completion": "vllm.CompletionOutput",
    },
    "bench/engine_process.py:_watch_steps": {
        "output_processor": "vllm.v1.engine.output_processor.OutputProcessor",
        "output": "vllm.v1.engine.EngineCoreOutput",
    },
    "bench/engine_process.py:process_outputs": {"output": "vllm.v1.engine.EngineCoreOutput"},
}  # fmt: skip
#: What no expression of ours shows: paths that must be there, and why.
BY_HAND = {
    # serving/worker/context_kv.py knows the layout of their caches by the class's name.
    "vllm.v1.attention.backends.flash_attn.FlashAttentionImpl": "serving/worker/context_kv.py: _PAGED",
    "vllm.v1.attention.backends.triton_attn.TritonAttentionImpl": "serving/worker/context_kv.py: _PAGED",
    "vllm.v1.attention.backends.flashinfer.FlashInferImpl": "serving/worker/context_kv.py: _PAGED",
    "vllm.config.SpeculativeConfig.num_speculative_tokens": "serving/frontend/speculative_config.py",
}
#: Attributes that vLLM sets on whatever class, with the module that does: an identifier in it.
MENTIONED = {
    "vllm.compilation.decorators": ("do_not_compile",),
    "vllm.model_executor.models.qwen3_next": ("use_sequence_parallel",),
    # Replaced on the instance while the verifier's logits are computed for the kl loss.
    "vllm.model_executor.layers.logits_processor": ("_get_logits",),
    # Looked at on the instance by the benchmark.
    "vllm.v1.engine.async_llm": ("process_outputs",),
}


@dataclass(frozen=True, order=True)
class Requirement:
    """One thing that a vLLM must have.

    Attributes:
        kind: ``name`` (is there), ``call`` (takes these arguments), ``override`` (our method takes what
            vLLM's does), ``global`` (is read by functions of its module, so replacing it has an effect),
            ``prefix`` (parameters in this order), ``members`` (an interface asks for no others), ``passes``
            (a call somewhere in the module gives all these by name and nothing by position), ``mentions``
            (the module has these identifiers), ``env``.
        path: in vLLM.
        names: keywords, parameters or members.
        count: positional arguments.
        open: what is not listed is passed on.
    """

    kind: str
    path: str
    names: tuple[str, ...] = ()
    count: int = 0
    open: bool = False

    def problem(self, source: Source) -> str | None:
        """What is wrong with it in this source, None if nothing."""
        if self.kind == "env":
            module = source.module("vllm.envs")
            known = module is not None and f'"{self.path}"' in module.text
            return None if known else f"vllm.envs has no {self.path}"
        found, where = source.explain(self.path)
        if found is None:
            return where
        if self.kind == "global":
            owner, _, name = self.path.rpartition(".")
            module = source.resolve(owner)
            used = module is not None and name in module.module.read_names
            # Or a function of its package imports it, each time it runs.
            package = source.module(owner.rpartition(".")[0])
            used = used or (package is not None and self.path in package.late_imports)
            return None if used else f"{owner} does not use its {name}"
        if self.kind == "members":
            have = {m for cls in source.mro(found) for m in source.own_members(cls)}
            new = sorted(have - set(self.names) - {"__init__"})
            return f"{self.path} also asks for {', '.join(new)}" if new else None
        if self.kind == "mentions":
            words = {n.attr for n in ast.walk(found.module.tree) if isinstance(n, ast.Attribute)}
            lost = sorted(set(self.names) - words)
            return f"{self.path} no longer sets {', '.join(lost)}" if lost else None
        if self.kind == "passes":
            return self._passes_problem(found.module.tree)
        parameters = source.parameters(found)
        if self.kind == "name" or parameters is None:
            return None
        return getattr(self, f"_{self.kind}_problem")(parameters)

    def _passes_problem(self, tree: ast.Module) -> str | None:
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and not n.args]
        if any({k.arg for k in n.keywords} >= set(self.names) for n in calls):
            return None
        return f"{self.path} no longer calls by name with {', '.join(self.names)}"

    def _call_problem(self, have: Parameters) -> str | None:
        lost = [] if have.more_keywords else [n for n in self.names if n not in have.names]
        if lost:
            return f"{self.path} has no parameter {', '.join(lost)}"
        if self.count > len(have.positional) and not have.more_positional:
            return (
                f"{self.path} takes {len(have.positional)} arguments by position, not {self.count}"
            )
        given = {*self.names, *have.positional[: self.count]}
        needed = [] if self.open else sorted(have.required - given)
        return f"{self.path} also needs {', '.join(needed)}" if needed else None

    def _override_problem(self, have: Parameters) -> str | None:
        ours = self.names
        new = [n for n in have.names if n not in ours]
        if new and not self.open:
            return f"{self.path} has the parameters {', '.join(new)}, which ours lacks"
        order = [n for n in have.positional if n in ours[: self.count]]
        if order != list(ours[: len(order)]):
            return f"{self.path} has its parameters in another order: {', '.join(have.positional)}"
        return None

    def _prefix_problem(self, have: Parameters) -> str | None:
        known = have.positional[: len(self.names)]
        return (
            None if known == self.names else f"{self.path} has other parameters: {', '.join(known)}"
        )


class Contract:
    """The requirements of our code, each with the places that it comes from."""

    def __init__(self, reference: Source, package: Path = PACKAGE) -> None:
        self.reference = reference
        self.requirements: dict[Requirement, set[str]] = {}
        #: File and expression of every role that an expression of the file had.
        self.used_roles: set[tuple[str, str]] = set()
        #: Attributes of vLLM's objects that neither the reference nor any code of ours defines.
        self.unknown: set[str] = set()
        self.ours = {name for names in MENTIONED.values() for name in names}
        for file in package.rglob("*.py"):
            self.ours |= _defined(ast.parse(file.read_text()))
        for seam in SEAMS:
            names = tuple(n for n in seam.parameters if n != "self")
            self.add(Requirement("call", seam.name, names, 0, True), "serving/seams.py: SEAMS")
            if seam.when != "class" and "." not in seam.attribute:
                self.add(Requirement("global", seam.name), "serving/seams.py: SEAMS")
        self._add_by_hand(package)
        for file in sorted(package.rglob("*.py")):
            _File(self, file, file.relative_to(package).as_posix()).read()

    def add(self, requirement: Requirement, where: str) -> None:
        self.requirements.setdefault(requirement, set()).add(where)

    def _add_by_hand(self, package: Path) -> None:
        for path, reason in BY_HAND.items():
            self.add(Requirement("name", path), reason)
        for path, names in MENTIONED.items():
            self.add(Requirement("mentions", path, names), "by hand")
        file = "serving/worker/v2/speculator.py"
        order = _literal(package / file, "_PREPARE_PARAMETERS")
        self.add(Requirement("prefix", f"{_V2}.prepare_dflash_inputs", order), file)
        self.add(Requirement("call", f"{_SPECULATOR}.propose", ("is_profile",), 0, True), file)
        file = "serving/worker/features/layer_hooks.py"
        made = _function(package / file, "_interface")
        given = sorted({k for n in ast.walk(made) if isinstance(n, ast.Dict) for k in _keys(n)})
        interface = "vllm.model_executor.models.interfaces.SupportsEagle3"
        self.add(Requirement("members", interface, tuple(given)), file)
        # Our propose reads its arguments by name.
        file = "serving/worker/v1/proposer.py"
        reads = sorted(
            n.slice.value
            for n in ast.walk(_function(package / file, "propose"))
            if isinstance(n, ast.Subscript)
            and ast.unparse(n.value) == "kwargs"
            and isinstance(n.slice, ast.Constant)
        )
        module = _RUNNER.rpartition(".")[0]
        self.add(Requirement("passes", module, tuple(dict.fromkeys(reads))), file)

    def problems(self, source: Source) -> dict[str, list[str]]:
        """What is wrong in a source: message -> places in our code."""
        out: dict[str, set[str]] = {}
        for requirement, places in sorted(self.requirements.items()):
            message = requirement.problem(source)
            if message:
                out.setdefault(message, set()).update(places)
        return {message: sorted(places) for message, places in out.items()}

    def changes(self, source: Source) -> list[str]:
        """What we rely on and is not as in the reference, though it may still fit: signatures and bodies."""
        out, seen = [], set()
        for path in sorted({r.path for r in self.requirements if r.kind != "env"}):
            old, new = self.reference.resolve(path), source.resolve(path)
            if old is None or new is None or old.kind not in ("function", "class"):
                continue
            if old.node in seen:  # by another name
                continue
            seen.add(old.node)
            before, after = self.reference.parameters(old), source.parameters(new)
            if before is None or after is None:
                continue
            gone = [f"-{n}" for n in before.names if n not in after.names]
            come = [f"+{n}" for n in after.names if n not in before.names]
            if gone or come:
                out.append(f"{path}: {' '.join(gone + come)}")
            elif old.kind == "function" and ast.dump(old.node) != ast.dump(new.node):
                out.append(f"{path}: same parameters, other body")
        return out


class _File:
    """Reads the requirements off one file of ours."""

    def __init__(self, contract: Contract, file: Path, name: str) -> None:
        self.contract, self.file, self.name = contract, file, name
        self.dotted = name.removesuffix(".py").replace("/", ".")
        self.source = contract.reference
        self.tree = ast.parse(file.read_text())
        self.imports: dict[str, str] = {}

    def read(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                for alias in node.names:
                    path = f"{node.module}.{alias.name}"
                    self.imports[alias.asname or alias.name] = path
                    self._add(node, "name", path)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                name = node.value
                if (
                    name.startswith("VLLM_")
                    and name.isupper()
                    and "DFLASH" not in name
                    and " " not in name
                ):
                    self._add(node, "env", name)
        self._visit_body(self.tree, dict(self.imports), "")

    def _add(self, node: ast.AST, kind: str, path: str, *rest, strict: bool = True) -> None:
        where = f"{self.name}:{getattr(node, 'lineno', 0)}"
        if strict or self.source.resolve(path) is not None:
            self.contract.add(Requirement(kind, path, *rest), where)
            return
        owner, _, name = path.rpartition(".")
        found = self.source.resolve(owner)
        special = name.startswith("__") and name.endswith("__")
        ours = special or name in self.contract.ours or hasattr(nn.Module, name)
        if found is not None and found.kind == "class" and not ours:
            self.contract.unknown.add(f"{path} ({where})")

    # -- scopes ----------------------------------------------------------------------------------

    def _roles(self, function: str) -> dict[str, str]:
        out = {}
        for key in (self.name, f"{self.name}:{function}"):
            for expression, path in ROLES.get(key, {}).items():
                out[expression] = path
        return out

    def _visit_body(
        self, scope: ast.AST, names: dict[str, str], function: str, base: str = "", own=()
    ) -> None:
        names = names | self._roles(function)
        for seam in SEAMS:
            module, _, ours = seam.ours.partition(":")
            if ours == function and module == f"vllm_dflash.{self.dotted}":
                # Our function in the table gets vLLM's.
                if seam.when == "class":
                    names.setdefault("cls", seam.name.rpartition(".")[0])
                else:
                    names.setdefault("original", seam.name)
        visitor = _Visitor(self, names, base, own)
        for child in ast.iter_child_nodes(scope):
            visitor.visit(child)
        for inner in visitor.inner:
            if isinstance(inner, ast.ClassDef):
                self._visit_class(inner, visitor)
            else:
                self._visit_body(inner, dict(visitor.names), inner.name, base, own)

    def _visit_class(self, cls: ast.ClassDef, outer: _Visitor) -> None:
        paths = [p for b in cls.bases if (p := outer.path_of(b)) and self.source.resolve(p)]
        if not paths:
            self._visit_body(cls, dict(outer.names), "")
            return
        (base,) = paths
        own = set()
        for node in cls.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                own.add(node.name)
                found = self.source.resolve(f"{base}.{node.name}")
                if found is not None and found.kind == "function":
                    ours = Parameters.of(node, bound=True)
                    self._add(
                        node, "override", f"{base}.{node.name}", ours.names, len(ours.positional),
                        ours.more_keywords,
                    )  # fmt: skip
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                own |= {t.id for t in targets(node) if isinstance(t, ast.Name)}
        own |= {
            t.attr
            for n in ast.walk(cls)
            if isinstance(n, ast.stmt)
            for t in targets(n)
            if isinstance(t, ast.Attribute) and ast.unparse(t.value) == "self"
        }
        for name in own:
            self._add(cls, "name", f"{base}.{name}", strict=False)
        for node in cls.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self._visit_body(node, outer.names | {"self": base}, node.name, base, own)


class _Visitor(ast.NodeVisitor):
    """Expressions of one scope; functions and classes in it are left to :class:`_File`."""

    def __init__(self, file: _File, names: dict[str, str], base: str, own: set[str]) -> None:
        self.file, self.names, self.base, self.own = file, names, base, own
        self.inner: list[ast.AST] = []
        self.dicts: dict[str, list[str]] = {}
        found = file.source.resolve(base) if base else None
        self.closed = found is not None and file.source.is_closed(found)

    def visit_FunctionDef(self, node) -> None:
        self.inner.append(node)

    visit_AsyncFunctionDef = visit_ClassDef = visit_FunctionDef

    def path_of(self, node: ast.expr) -> str | None:
        """The vLLM object that an expression is, as far as we say or its source does."""
        form = _form(node)
        if form is not None and form in self.names:
            self.file.contract.used_roles.add((self.file.name, form))
            return self.names[form]
        if isinstance(node, ast.Attribute):
            owner = self.path_of(node.value)
            return f"{owner}.{node.attr}" if owner and not owner.startswith(_PARAMETERS) else None
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id == "super":
                return self.base or None
            function = self.path_of(node.func)
            return f"{function}()" if function and not function.startswith(_PARAMETERS) else None
        return None

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for to, value in pairs:
                if isinstance(to, ast.Name):
                    if isinstance(value, ast.Dict):
                        self.dicts[to.id] = _keys(value)
                    path = self.path_of(value)
                    if path and to.id not in self.names and self.file.source.resolve(path):
                        self.names[to.id] = path
                elif isinstance(to, ast.Attribute):
                    owner = self.path_of(to.value)
                    found = self.file.source.resolve(owner) if owner else None
                    if found is not None and found.kind == "module":
                        self.file._add(to, "global", f"{owner}.{to.attr}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        owner, path = self.path_of(node.value), self.path_of(node)
        if owner is None or path is None:
            return
        mine = owner == self.base and _form(node.value) in ("self", "super()")
        strict = self._imported(node) or (mine and self.closed and node.attr not in self.own)
        self.file._add(node, "name", path, strict=strict)

    def _imported(self, node: ast.expr) -> bool:
        """Whether it is an attribute of something imported, nothing guessed in between."""
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id in self.file.imports

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.generic_visit(node)
        if isinstance(node.slice, ast.Constant) and isinstance(node.ctx, ast.Load):
            self._key(node, node.value, node.slice.value, True)

    def _key(self, node: ast.AST, holder: ast.expr, key: object, strict: bool) -> None:
        path = self.path_of(holder)
        if path is not None and path.startswith(_PARAMETERS) and isinstance(key, str):
            function = path.removeprefix(_PARAMETERS)
            found = self.file.source.resolve(function)
            have = self.file.source.parameters(found) if found else None
            if strict or (have is not None and key in have.names):
                self.file._add(node, "call", function, (key,), 0, True)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else None
        if name in ("getattr", "hasattr", "setattr") and isinstance(node.args[1], ast.Constant):
            owner = self.path_of(node.args[0])
            if owner is not None and not owner.startswith(_PARAMETERS):
                self.file._add(node, "name", f"{owner}.{node.args[1].value}", strict=False)
            return
        if isinstance(node.func, ast.Attribute) and node.func.attr == "get" and node.args:
            argument = node.args[0]
            self._key(node, node.func.value, getattr(argument, "value", None), False)
        path = self.path_of(node.func)
        found = self.file.source.resolve(path) if path else None
        if path is None or path == self.base or found is None:
            return
        keywords, more = [k.arg for k in node.keywords if k.arg], False
        for keyword in (k for k in node.keywords if k.arg is None):
            if isinstance(keyword.value, ast.Dict):
                keywords += _keys(keyword.value)
            elif isinstance(keyword.value, ast.Name):
                keywords += self.dicts.get(keyword.value.id, [])
            more = True
        count = sum(not isinstance(a, ast.Starred) for a in node.args)
        more = more or count < len(node.args)
        # Taken from a class: self comes with the arguments.
        count -= found.bound and bool(node.args) and _form(node.args[0]) == "self"
        self.file._add(node, "call", path, tuple(sorted(keywords)), count, more)


def _defined(tree: ast.Module) -> set[str]:
    """Names that a file defines or sets, of whatever."""
    out = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            out.add(node.name)
        elif isinstance(node, ast.stmt):
            for target in targets(node):
                out |= {t.attr for t in [target] if isinstance(t, ast.Attribute)}
                out |= {t.id for t in [target] if isinstance(t, ast.Name)}
        elif isinstance(node, ast.Dict):
            out |= set(_keys(node))
    return out


def _function(file: Path, name: str) -> ast.FunctionDef:
    nodes = ast.walk(ast.parse(file.read_text()))
    return next(n for n in nodes if isinstance(n, ast.FunctionDef) and n.name == name)


def _literal(file: Path, name: str) -> tuple[str, ...]:
    """A constant of one of our files, which need not be importable."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise ValueError(f"{file} has no {name}")


def _keys(node: ast.Dict) -> list[str]:
    return [k.value for k in node.keys if isinstance(k, ast.Constant) and isinstance(k.value, str)]


def _form(node: ast.expr) -> str | None:
    """``a.b[].c()`` of an expression: without indices and arguments."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = _form(node.value)
        return f"{owner}.{node.attr}" if owner else None
    if isinstance(node, (ast.Subscript, ast.Call)):
        owner = _form(node.value if isinstance(node, ast.Subscript) else node.func)
        return f"{owner}{'[]' if isinstance(node, ast.Subscript) else '()'}" if owner else None
    return None
