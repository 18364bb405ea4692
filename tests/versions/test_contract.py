"""Does a vLLM have all that we rely on? The installed one in every run, all supported ones by source."""

from __future__ import annotations

import pytest
from packaging.specifiers import SpecifierSet

from helpers import vllm_versions
from helpers.contract import ROLES, Contract
from helpers.vllm_source import Module, Parameters, Source
from vllm_dflash.serving.seams import SEAMS


@pytest.fixture(scope="module")
def contract() -> Contract:
    return Contract(Source.installed())


def test_the_installed_vllm(contract) -> None:
    assert contract.problems(contract.reference) == {}
    assert contract.changes(contract.reference) == []


def test_it_is_read_off_our_code(contract) -> None:
    """All kinds, seams and files that enter vLLM; no role that says nothing, no attribute that is nowhere."""
    assert contract.unknown == set()
    kinds = {r.kind for r in contract.requirements}
    assert kinds == {
        "name", "call", "override", "global", "prefix", "members", "passes", "mentions", "env",
    }  # fmt: skip
    paths = {r.path for r in contract.requirements}
    assert {seam.name for seam in SEAMS} <= paths
    assert len(contract.requirements) > 300
    files = {p.partition(":")[0] for places in contract.requirements.values() for p in places}
    assert {key.partition(":")[0] for key in ROLES} <= files | {"training/ranks.py"}
    for key, roles in ROLES.items():
        for expression, path in roles.items():
            assert (key.partition(":")[0], expression) in contract.used_roles, (key, expression)
            assert contract.reference.resolve(path.removeprefix("parameters of ")), path


V1 = "vllm.v1.spec_decode.dflash"
V2 = "vllm.v1.worker.gpu.spec_decode.dflash.speculator"
RUNNER = "vllm.v1.worker.gpu_model_runner"


@pytest.mark.parametrize(
    ("module", "old", "new", "message"),
    [
        # seams
        ("vllm.engine.arg_utils", "def create_speculative_config(", "def make_speculative(",
         "vllm.engine.arg_utils.EngineArgs has no create_speculative_config"),
        (RUNNER, "DFlashProposer", "FlashProposer", f"{RUNNER} has no DFlashProposer"),
        ("vllm.v1.worker.gpu.model_runner", "= init_speculator(", "= spec_decode.init_speculator(",
         "vllm.v1.worker.gpu.model_runner does not use its init_speculator"),
        # methods that we override, and their parameters
        ("vllm.v1.spec_decode.llm_base_proposer", "def _greedy_sample(", "def _sample(",
         f"{V1}.DFlashProposer has no _greedy_sample"),
        (V1, "        num_input_tokens: int,\n        mm_embed",
         "        num_input_tokens: int,\n        is_dummy: bool,\n        mm_embed",
         f"{V1}.DFlashProposer.build_model_inputs_first_pass has the parameters is_dummy, which ours lacks"),
        (V1, "        next_token_ids: torch.Tensor,\n        target_positions: torch.Tensor,\n",
         "        target_positions: torch.Tensor,\n        next_token_ids: torch.Tensor,\n",
         f"{V1}.DFlashProposer.set_inputs_first_pass has its parameters in another order"),
        # attributes of vLLM's objects
        (V1, "_context_slot_mapping_buffer", "_context_slots",
         f"{V1}.DFlashProposer has no _context_slot_mapping_buffer"),
        ("vllm.v1.spec_decode.llm_base_proposer", "self.use_heterogeneous_vocab", "self.hetero",
         f"{V1}.DFlashProposer has no use_heterogeneous_vocab"),
        ("vllm.v1.attention.backend", "seq_lens_cpu_upper_bound", "seq_lens_limit",
         "vllm.v1.attention.backend.CommonAttentionMetadata has no seq_lens_cpu_upper_bound"),
        ("vllm.config.parallel", "pipeline_parallel_size:", "stages:",
         "vllm.config.VllmConfig.parallel_config has no pipeline_parallel_size"),
        # functions that we call or replace
        (V2, "    context_slot_mapping: torch.Tensor,", "    context_slots: torch.Tensor,",
         f"{V2}.prepare_dflash_inputs has other parameters"),
        ("vllm._custom_ops", "def rms_norm(", "def rmsnorm(", "vllm._custom_ops has no rms_norm"),
        ("vllm.v1.sample.rejection_sampler", "expand_batch_to_tokens(", "expand_batch(",
         "vllm.v1.sample.rejection_sampler has no expand_batch_to_tokens"),
        ("vllm.v1.engine.llm_engine", "def has_unfinished_requests(", "def is_busy(",
         "vllm.v1.engine.llm_engine.LLMEngine has no has_unfinished_requests"),
        ("vllm.entrypoints.serve.instrumentator", "from .metrics import attach_router", "from .m import r",
         "does not use its attach_router"),
        # the rest
        (RUNNER, "target_hidden_states=", "hidden_states=", f"{RUNNER} no longer calls by name"),
        ("vllm.model_executor.models.interfaces", "    supports_eagle3: ClassVar",
         "    version: ClassVar[int] = 3\n    supports_eagle3: ClassVar", "also asks for version"),
        ("vllm.compilation.decorators", "do_not_compile", "skip_compile", "no longer sets do_not_compile"),
        ("vllm.envs", '"VLLM_ENABLE_V1_MULTIPROCESSING"', '"VLLM_IN_ONE"', "no VLLM_ENABLE_V1_MULTI"),
    ],
)  # fmt: skip
def test_what_a_vllm_lacks_is_named(contract, module, old, new, message) -> None:
    have = contract.reference.module(module)
    assert old in have.text
    changed = Module(module, have.path, have.text.replace(old, new))
    source = contract.reference.with_module(changed)
    assert any(message in said for said in contract.problems(source)), contract.problems(source)


def test_changes_that_still_fit_are_told(contract) -> None:
    name = "vllm.engine.arg_utils"
    have = contract.reference.module(name)
    head, function, tail = have.text.partition("    def create_speculative_config(\n")
    parameters, end, tail = tail.partition("    ) ->")
    assert function
    assert end
    text = f"{head}{function}{parameters}        *, more: int = 0,\n{end}{tail}"
    source = contract.reference.with_module(Module(name, have.path, text))
    assert contract.problems(source) == {}
    assert contract.changes(source) == [f"{name}.EngineArgs.create_speculative_config: +more"]


# -- reading a source ------------------------------------------------------------------------------

FILES = {
    "vllm/__init__.py": (
        "import typing\nif typing.TYPE_CHECKING:\n    from vllm.a import Engine\n"
        "else:\n    def __getattr__(name): ...\n"
    ),
    "vllm/a.py": (
        "from dataclasses import dataclass\nfrom .b.c import Base as Parent, make\nimport vllm.b as b\n"
        "LIMIT: int = 3\n"
        "@dataclass\nclass Config:\n    size: int\n    inner: 'Config | None' = None\n\n"
        "class Engine(Parent):\n    kind = Parent\n"
        "    def __init__(self, config: Config, *, fast=False):\n"
        "        self.config = config\n        self.again = self.config\n        self.made = make()\n"
        "    @property\n    def view(self) -> Config: ...\n"
        "    def run(self, x, *more, key, **rest): return LIMIT\n"
    ),
    "vllm/b/__init__.py": "from vllm.b.c import Base\n",
    "vllm/b/c.py": (
        "class Base:\n    def step(self, n): self.count = n\n    @staticmethod\n    def free(n): ...\n"
        "try:\n    import nowhere\nexcept ImportError:\n    nowhere = None\n"
        "def make() -> Base: ...\n"
    ),
}  # fmt: skip


@pytest.fixture
def tree(tmp_path) -> Source:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return Source(tmp_path)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("vllm.a", "module"),
        ("vllm.Engine", "class"),
        ("vllm.b.Base", "class"),
        ("vllm.a.b.Base.step", "function"),
        ("vllm.Engine.step", "function"),
        ("vllm.Engine.count", "value"),
        ("vllm.Engine.kind", "class"),
        ("vllm.Engine.config.inner.size", "value"),
        ("vllm.Engine.again.size", "value"),
        ("vllm.Engine.view.size", "value"),
        ("vllm.Engine.made.step", "function"),
        ("vllm.a.make().count", "value"),
        ("vllm.Engine().config", "value"),
        ("vllm.a.LIMIT", "value"),
        ("vllm.b.c.nowhere", "value"),
    ],
)
def test_names_are_found(tree, path, kind) -> None:
    found = tree.resolve(path)
    assert found is not None
    assert found.kind == kind


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("vllm.x", "vllm has no x"),
        ("vllm.Engine.stop", "vllm.Engine has no stop"),
        ("vllm.Engine.config.inner.depth", "vllm.Engine.config.inner has no depth"),
        ("vllm.a.make().depth", "vllm.a.make() has no depth"),
        ("vllm.a.LIMIT.bit_length", "vllm.a.LIMIT has no bit_length"),
    ],
)
def test_names_that_are_not_there(tree, path, message) -> None:
    assert tree.explain(path) == (None, message)


@pytest.mark.parametrize(
    ("path", "want"),
    [
        ("vllm.Engine.run", Parameters(("x",), ("key",), frozenset({"x", "key"}), True, True)),
        ("vllm.b.Base.free", Parameters(("n",), (), frozenset({"n"}))),
        ("vllm.Engine", Parameters(("config",), ("fast",), frozenset({"config"}))),
        ("vllm.a.Config", Parameters(("size", "inner"), (), frozenset({"size"}))),
    ],
)
def test_parameters(tree, path, want) -> None:
    assert tree.parameters(tree.resolve(path)) == want


def test_a_folder_without_vllm(tmp_path) -> None:
    with pytest.raises(ValueError, match="has no package vllm"):
        Source(tmp_path)


# -- versions --------------------------------------------------------------------------------------


def test_the_last_patch_of_each_minor() -> None:
    have = ["0.34.0", "0.33.0", "0.32.1", "0.32.0", "0.31.0.post1", "0.31.0", "0.30.0"]
    wanted = SpecifierSet(">=0.31,<0.34")
    got = vllm_versions.newest_of_each_minor(have, wanted)
    assert got == ["0.31.0.post1", "0.32.1", "0.33.0"]
    assert wanted == vllm_versions.supported()


@pytest.mark.slow
def test_every_supported_version(contract) -> None:
    """By source, fetched with pip."""
    versions = vllm_versions.newest_of_each_minor(
        vllm_versions.released(vllm_versions.GPU), vllm_versions.supported()
    )
    assert len(versions) >= 3
    found = {v: contract.problems(Source(vllm_versions.source(v))) for v in versions}
    assert {v: said for v, said in found.items() if said} == {}
