"""Who may import whom (docs/dev/architecture.md), read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vllm_dflash

ROOT = Path(vllm_dflash.__file__).parent
FILES = sorted(str(f.relative_to(ROOT)) for f in ROOT.rglob("*.py"))
#: Outside serving/ (and bench/) only these start an engine; none touches its internals.
MAY_IMPORT_VLLM = {"training/engine.py"}
#: vLLM's public surface, as used by them.
PUBLIC = {"vllm", "vllm.platforms", "vllm.v1.engine.llm_engine"}


def imports(file: str, *, lazy: bool) -> set[str]:
    """Absolute modules that a file imports; ``lazy`` includes those inside functions."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for other in child.orelse:
                    visit(other)
                continue
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not lazy:
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}: relative import"
                found.add(child.module or "")
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            visit(child)

    visit(ast.parse((ROOT / file).read_text()))
    return found


def below(modules: set[str], *packages: str) -> set[str]:
    return {m for m in modules if any(m == p or m.startswith(f"{p}.") for p in packages)}


def test_the_files_are_found():
    assert {"config.py", "serving/seams.py", "modeling/drafter.py"} <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_only_serving_imports_vllm(file):
    found = below(imports(file, lazy=True), "vllm")
    if file.startswith(("serving/", "bench/")):
        return
    if file not in MAY_IMPORT_VLLM:
        assert not found
    assert {m for m in found if m.rpartition(".")[0] not in PUBLIC and m not in PUBLIC} == set()


@pytest.mark.parametrize("file", ["config.py", "options.py", "plugin.py", "__init__.py"])
def test_what_every_vllm_process_imports_is_light(file):
    heavy = ("torch", "vllm", "transformers", "safetensors", "numpy")
    assert not below(imports(file, lazy=False), *heavy)
    if file in ("config.py", "options.py"):
        assert not below(imports(file, lazy=True), *heavy)


@pytest.mark.parametrize("file", ["serving/seams.py", "serving/patching.py", "serving/__init__.py"])
def test_seams_do_not_import_vllm_before_they_are_asked(file):
    assert not below(imports(file, lazy=False), "vllm", "torch")


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("modeling/")])
def test_modeling_stands_alone(file):
    found = imports(file, lazy=True)
    assert not below(found, "vllm")
    ours = below(found, "vllm_dflash")
    assert below(ours, "vllm_dflash.config", "vllm_dflash.modeling") == ours


def test_the_learner_is_plain_pytorch():
    for file in ("training/learner.py", "training/feature_store.py", "training/config.py"):
        assert not below(imports(file, lazy=True), "vllm", "vllm_dflash.serving")


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("serving/")])
def test_serving_does_not_load_training_by_itself(file):
    assert not below(imports(file, lazy=False), "vllm_dflash.training", "vllm_dflash.bench")


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("serving/worker/v")])
def test_the_two_runners_do_not_know_one_another(file):
    other = {"v1": "v2", "v2": "v1"}[file.split("/")[2]]
    assert not below(imports(file, lazy=True), f"vllm_dflash.serving.worker.{other}")


@pytest.mark.parametrize("file", FILES)
def test_nothing_unpickles(file):
    """But for the mask token's own embedding, which vLLM reads from a .pt: as tensors, without code."""
    tree = ast.parse((ROOT / file).read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    if file == "checkpoint.py":
        loads = [c for c in calls if ast.unparse(c.func) == "torch.load"]
        assert [ast.unparse(k) for c in loads for k in c.keywords if k.arg == "weights_only"] == [
            "weights_only=True"
        ]
        calls = [c for c in calls if ast.unparse(c.func) not in ("torch.load", "torch.save")]
    called = {ast.unparse(c.func) for c in calls}
    assert not called & {"torch.load", "torch.save", "pickle.load", "pickle.loads", "eval", "exec"}
