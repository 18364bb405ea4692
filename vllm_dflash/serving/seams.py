"""Where vllm-dflash enters vLLM: the list of seams, how each is checked and patched.

Each seam is one attribute of one vLLM module. It is patched right after vLLM imports that module
(or at once where it already has), and only if it looks as expected; otherwise one warning names it
and stock vLLM stays. docs/dev/architecture.md has the list with the vLLM versions.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

logger = logging.getLogger("vllm.vllm_dflash")
#: The drafter architecture that both public formats resolve to in vLLM.
DRAFTER_ARCH = "DFlashDraftModel"
#: That of those with DFlash 2's head.
HEAD_ARCH = "DFlash2DraftModel"
_PATCHED = "_vllm_dflash_patched"


@dataclass(frozen=True)
class Seam:
    """One patched attribute.

    Attributes:
        module: the vLLM module whose import triggers the patch.
        attribute: dotted attribute inside it.
        parameters: names that its signature must have, else the seam counts as changed.
        patch: gets the module, replaces the attribute.
    """

    module: str
    attribute: str
    parameters: tuple[str, ...]
    patch: Callable[[ModuleType], None]

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.module}.{self.attribute}"

    def problem(self, module: ModuleType) -> str | None:
        """What is wrong with the seam in this vLLM, None if it is as expected."""
        target: Any = module
        for part in self.attribute.split("."):
            target = getattr(target, part, None)
            if target is None:
                return f"{self.name} is missing"
        try:
            have = inspect.signature(target).parameters
        except (TypeError, ValueError):
            return None
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in have.values()):
            return None  # ours, once patched, or another plugin's wrapper
        lost = [p for p in self.parameters if p not in have]
        return f"{self.name} has no parameter {', '.join(lost)}" if lost else None


def _patch_v1_proposer(module: ModuleType) -> None:
    from vllm_dflash.serving.proposer_v1 import Proposer

    module.DFlashProposer = Proposer  # type: ignore[attr-defined]


def _patch_v2_speculator(module: ModuleType) -> None:
    original = module.init_speculator
    set_layers = module.set_eagle3_aux_hidden_state_layers
    serving: list[Any] = []

    @functools.wraps(original)
    def init_speculator(vllm_config, *args, **kwargs):
        make = functools.partial(original, vllm_config, *args, **kwargs)
        spec_config = vllm_config.speculative_config
        if spec_config is None or spec_config.method != "dflash":
            return make()
        from vllm_dflash.serving.speculator_v2 import make_speculator

        speculator = make_speculator(vllm_config, make)
        # Not the speculator: what is kept here outlives the engine.
        serving[:] = [vllm_config, speculator.device]
        return speculator

    @functools.wraps(set_layers)
    def set_eagle3_aux_hidden_state_layers(model, spec_config, *args, **kwargs):
        # Called when the verifier is loaded, before the drafter; refuses those without the interface.
        if serving and spec_config.method == "dflash":
            from vllm_dflash.serving.adapter import adapt_verifier

            adapt_verifier(model, *serving)
        return set_layers(model, spec_config, *args, **kwargs)

    module.init_speculator = init_speculator  # type: ignore[attr-defined]
    module.set_eagle3_aux_hidden_state_layers = set_eagle3_aux_hidden_state_layers  # type: ignore[attr-defined]


def _patch_prepare_inputs(module: ModuleType) -> None:
    from vllm_dflash.serving.speculator_v2 import patch_prepare_inputs

    patch_prepare_inputs(module)


def _patch_graphs(module: ModuleType) -> None:
    from vllm_dflash.serving.graphs import patch_candidates

    patch_candidates(module)


def _patch_engine_args(module: ModuleType) -> None:
    from vllm_dflash.serving.speculative_config import wrap_create_speculative_config

    cls = module.EngineArgs
    cls.create_speculative_config = wrap_create_speculative_config(cls.create_speculative_config)


def _patch_vllm_config(module: ModuleType) -> None:
    cls = module.VllmConfig
    needs_multi_kv_group = cls._dflash_needs_multi_kv_group

    # vLLM refuses such drafters on the V1 runner; our proposer there serves those of our classes.
    @functools.wraps(needs_multi_kv_group)
    def _dflash_needs_multi_kv_group(self):
        return not is_ours(self.speculative_config) and needs_multi_kv_group(self)

    cls._dflash_needs_multi_kv_group = _dflash_needs_multi_kv_group
    needs_selector = getattr(cls, "_is_dflash_candidate_draft", None)
    if needs_selector is not None:

        @functools.wraps(needs_selector)
        def _is_dflash_candidate_draft(self):
            return not is_ours(self.speculative_config) and needs_selector(self)

        cls._is_dflash_candidate_draft = _is_dflash_candidate_draft


def is_ours(speculative_config: Any) -> bool:
    """Whether the drafter is served with a class of ours."""
    draft = getattr(speculative_config, "draft_model_config", None)
    return draft is not None and not {DRAFTER_ARCH, HEAD_ARCH}.isdisjoint(draft.architectures or ())


def _patch_worker(module: ModuleType) -> None:
    cls = next(vars(module)[n] for n in ("CPUWorker", "Worker") if n in vars(module))
    warm_up = cls.compile_or_warm_up_model

    @functools.wraps(warm_up)
    def compile_or_warm_up_model(self):
        runner, chosen = self.model_runner, False

        def choose_lengths() -> None:
            nonlocal chosen
            drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
            choose = getattr(drafter, "choose_lengths", None)
            if choose is not None and not chosen:
                chosen = True
                # Dummy steps are no load that experts are to be balanced by.
                with getattr(getattr(runner, "eplb", None), "suppress", nullcontext)():
                    choose(runner)

        # The first moment at which the engine can run steps, and the last before requests come. vLLM's GPU
        # worker goes on to watch for kernels that are compiled later, so just before that.
        watch = getattr(self, "_maybe_activate_jit_monitor", None)
        if watch is not None:

            def choose_and_watch() -> None:
                choose_lengths()
                watch()

            self._maybe_activate_jit_monitor = choose_and_watch
        try:
            out = warm_up(self)
        finally:
            if watch is not None:
                del self._maybe_activate_jit_monitor
        choose_lengths()
        return out

    cls.compile_or_warm_up_model = compile_or_warm_up_model


def _patch_scheduler(module: ModuleType) -> None:
    from vllm_dflash.serving.scheduler import wrap_init

    module.Scheduler.__init__ = wrap_init(module.Scheduler.__init__)  # type: ignore[attr-defined]


def _patch_executor(module: ModuleType) -> None:
    from vllm_dflash.serving.draft_return import patch_executor

    patch_executor(module)


def _patch_metrics(module: ModuleType) -> None:
    from vllm_dflash.serving.metrics import drafter_metrics_class

    logger_cls = module.PrometheusStatLogger
    logger_cls._spec_decoding_cls = drafter_metrics_class(logger_cls._spec_decoding_cls)


SEAMS = (
    Seam(
        "vllm.engine.arg_utils",
        "EngineArgs.create_speculative_config",
        ("target_model_config",),
        _patch_engine_args,
    ),
    Seam(
        "vllm.config.vllm",
        "VllmConfig._dflash_needs_multi_kv_group",
        ("self",),
        _patch_vllm_config,
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "DFlashProposer.propose",
        ("target_positions", "target_hidden_states", "common_attn_metadata"),
        _patch_v1_proposer,
    ),
    Seam(
        "vllm.v1.worker.gpu.model_runner",
        "init_speculator",
        ("vllm_config", "device"),
        _patch_v2_speculator,
    ),
    Seam(
        "vllm.v1.worker.gpu.spec_decode.dflash.speculator",
        "prepare_dflash_inputs",
        ("input_buffers", "input_batch", "context_slot_mapping", "cp_size"),
        _patch_prepare_inputs,
    ),
    Seam(
        "vllm.v1.worker.gpu.cudagraph_utils",
        "ModelCudaGraphManager._init_candidates",
        ("self",),
        _patch_graphs,
    ),
    Seam(
        "vllm.v1.worker.gpu_worker",
        "Worker.compile_or_warm_up_model",
        ("self",),
        _patch_worker,
    ),
    Seam(
        "vllm.v1.worker.cpu_worker",
        "CPUWorker.compile_or_warm_up_model",
        ("self",),
        _patch_worker,
    ),
    Seam(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.__init__",
        ("vllm_config",),
        _patch_scheduler,
    ),
    Seam(
        "vllm.v1.executor.multiproc_executor",
        "MultiprocExecutor.sample_tokens",
        ("grammar_output",),
        _patch_executor,
    ),
    Seam(
        "vllm.v1.metrics.loggers",
        "PrometheusStatLogger._spec_decoding_cls",
        ("speculative_config", "labelnames", "per_engine_labelvalues"),
        _patch_metrics,
    ),
)


def _apply(seam: Seam, module: ModuleType) -> None:
    """Patches once. Never raises: that would fail vLLM's own import of the module."""
    done: set[str] = module.__dict__.setdefault(_PATCHED, set())
    if seam.name in done:
        return
    done.add(seam.name)
    problem = seam.problem(module)
    if problem:
        logger.warning("vllm-dflash: %s in this vLLM; stock behaviour stays there", problem)
        return
    try:
        seam.patch(module)
    except Exception:
        logger.exception("vllm-dflash cannot patch %s; stock behaviour stays there", seam.name)


class _PostImport(importlib.abc.MetaPathFinder):
    """Patches a module right after vLLM imports it.

    Finds nothing itself: it asks the other finders and wraps the loader they return.
    """

    def __init__(self, seams: dict[str, Seam]) -> None:
        self.seams = seams

    def find_spec(self, fullname, path=None, target=None):
        seam = self.seams.get(fullname)
        if seam is None:
            return None
        for finder in sys.meta_path:
            # Two of ours (installed twice) would ask each other for ever.
            if isinstance(finder, _PostImport) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                break
        else:
            return None
        if spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _apply(seam, module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is absent
        return False


def install() -> list[str]:
    """Registers the drafter class and hooks every seam; returns the modules this vLLM lacks.

    Where a module is absent nothing is patched at all, since half a plugin is worse than none.
    """
    missing = [seam.module for seam in SEAMS if not _exists(seam.module)]
    if missing:
        return missing
    from vllm import ModelRegistry

    ModelRegistry.register_model(DRAFTER_ARCH, "vllm_dflash.serving.drafter_model:DrafterModel")
    ModelRegistry.register_model(HEAD_ARCH, "vllm_dflash.serving.dflash2_model:HeadDrafterModel")
    pending = {}
    for seam in SEAMS:
        module = sys.modules.get(seam.module)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _apply(seam, module)
        else:
            pending[seam.module] = seam
    if pending:
        sys.meta_path.insert(0, _PostImport(pending))
    return []


def probe() -> dict[str, str]:
    """State of every seam in the installed vLLM, by name: ``ok`` or why not.

    For ``vllm-dflash env``. It imports the runners, so it is not for serving processes.
    """
    out = {}
    for seam in SEAMS:
        try:
            module = importlib.import_module(seam.module)
        except Exception as error:  # an import can fail in any way; the point is to report it
            out[seam.name] = f"import failed: {type(error).__name__}: {error}"
            continue
        out[seam.name] = seam.problem(module) or "ok"
    return out
