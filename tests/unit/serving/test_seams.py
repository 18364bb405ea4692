"""How the plugin enters vLLM: quietly, once, and never at vLLM's expense."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import prometheus_client
import pytest
import torch

from vllm_dflash import plugin
from vllm_dflash.checkpoint import save_drafter
from vllm_dflash.config import DrafterConfig
from vllm_dflash.modeling.drafter import Drafter
from vllm_dflash.options import ADDITIONAL_CONFIG_KEY, ENV_DISABLE, Options
from vllm_dflash.serving import patching, seams
from vllm_dflash.serving.frontend import metrics as serving_metrics
from vllm_dflash.serving.frontend.metrics import drafter_metrics_class
from vllm_dflash.serving.frontend.speculative_config import wrap_create_speculative_config
from vllm_dflash.serving.seams import Seam

# ---- register() ----


@pytest.fixture
def fresh(monkeypatch, caplog):
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.delenv(ENV_DISABLE, raising=False)
    # vLLM's logger does not propagate, so caplog's handler goes on ours.
    monkeypatch.setattr(plugin.logger, "handlers", [caplog.handler])
    monkeypatch.setattr(plugin.logger, "propagate", False)
    monkeypatch.setattr(plugin.logger, "level", logging.DEBUG)
    plugin.logger.manager._clear_cache()  # type: ignore[attr-defined]
    return caplog


def patch_install(monkeypatch, result) -> list[int]:
    calls: list[int] = []

    def install():
        calls.append(1)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(patching, "install", install)
    return calls


def test_register_is_idempotent_and_says_one_line(fresh, monkeypatch):
    calls = patch_install(monkeypatch, [])
    for _ in range(3):
        plugin.register()
    assert len(calls) == 1
    assert [r.levelname for r in fresh.records] == ["INFO"]
    assert "registered for method dflash" in fresh.text


@pytest.mark.parametrize("error", [ImportError("no torch"), RuntimeError("x"), KeyError("y")])
def test_register_never_raises(error, fresh, monkeypatch):
    calls = patch_install(monkeypatch, error)
    plugin.register()
    plugin.register()
    assert len(calls) == 1
    assert [r.levelname for r in fresh.records] == ["ERROR"]
    assert "stock vLLM is unchanged" in fresh.text
    assert str(error) in fresh.text


def test_register_names_what_this_vllm_lacks(fresh, monkeypatch):
    patch_install(monkeypatch, ["vllm.v1.gone", "vllm.v2.gone"])
    plugin.register()
    assert [r.levelname for r in fresh.records] == ["WARNING"]
    assert "stock dflash in place: this vLLM lacks vllm.v1.gone, vllm.v2.gone" in fresh.text


def test_register_can_be_switched_off(fresh, monkeypatch):
    calls = patch_install(monkeypatch, [])
    monkeypatch.setenv(ENV_DISABLE, "1")
    plugin.register()
    assert calls == []
    assert ENV_DISABLE in fresh.text
    assert len(fresh.records) == 1


@pytest.mark.thorough
def test_in_a_fresh_process():
    """register() loads no runner; importing one afterwards patches it."""
    code = """
        import json, logging, sys
        logging.basicConfig(level=logging.INFO, stream=sys.stdout)
        import vllm_dflash.plugin as plugin
        light = sorted({m.split(".")[0] for m in sys.modules} & {"vllm", "torch"})
        plugin.register()
        plugin.register()
        hooks = sum(type(f).__name__ == "_PostImport" for f in sys.meta_path)
        runners = sorted(m for m in sys.modules if m.startswith("vllm") and "model_runner" in m)
        import vllm
        import vllm.v1.worker.gpu_model_runner as runner
        import vllm.v1.metrics.loggers as loggers
        from vllm.engine.arg_utils import EngineArgs
        from vllm_dflash.serving.worker.v1.proposer import Proposer
        from vllm_dflash.serving import patching, seams
        print("RESULT", json.dumps({
            "light": light, "hooks": hooks, "runners": runners,
            "proposer": runner.DFlashProposer is Proposer,
            "metrics": loggers.PrometheusStatLogger._spec_decoding_cls.__name__,
            "args": hasattr(EngineArgs.create_speculative_config, "__wrapped__"),
            "architecture": vllm.ModelRegistry.models["DFlashDraftModel"].module_name,
            "probe": patching.probe(),
        }))
    """
    env = {k: v for k, v in os.environ.items() if k != ENV_DISABLE}
    env |= {"VLLM_PLUGINS": "none", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    result = json.loads(line.removeprefix("RESULT"))
    assert result.pop("probe") == {seam.name: "ok" for seam in seams.SEAMS}
    assert result == {
        "light": [],
        "hooks": 1,
        "runners": [],
        "proposer": True,
        "metrics": "DrafterProm",
        "args": True,
        "architecture": "vllm_dflash.serving.worker.drafter_model",
    }
    said = done.stdout + done.stderr
    assert said.count("registered for method dflash") == 1
    assert "stock behaviour" not in said


# ---- one seam ----


def make_module(**attributes) -> ModuleType:
    module = ModuleType("somewhere")
    vars(module).update(attributes)
    return module


class Runner:
    limit = 3

    def propose(self, positions, hidden):
        return positions, hidden

    def wrapped(self, *args, **kwargs):
        return self.propose(*args, **kwargs)


def row(target: str, parameters, ours: str, when="import") -> Seam:
    return Seam(target, tuple(parameters), ours, "worker", "for the test", when=when)


def make_seam(attribute: str = "Runner.propose", parameters=("positions",), ours="wrap") -> Seam:
    return row(f"somewhere:{attribute}", parameters, f"{__name__}:{ours}")


@pytest.mark.parametrize(
    ("attribute", "parameters", "problem"),
    [
        ("Runner.propose", ("positions", "hidden"), None),
        ("Runner.wrapped", ("positions", "hidden"), None),
        ("Runner", (), None),
        ("Runner.limit", (), None),
        ("Walker.propose", (), "somewhere.Walker.propose is missing"),
        ("Runner.draft", (), "somewhere.Runner.draft is missing"),
        (
            "Runner.propose",
            ("positions", "metadata", "spec"),
            "somewhere.Runner.propose has no parameter metadata, spec",
        ),
    ],
)
def test_what_is_wrong_with_a_seam(attribute, parameters, problem):
    assert patching.problem(make_seam(attribute, parameters), make_module(Runner=Runner)) == problem


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(patching.logger, "handlers", [caplog.handler])
    monkeypatch.setattr(patching.logger, "propagate", False)
    monkeypatch.setattr(patching.logger, "level", logging.DEBUG)
    patching.logger.manager._clear_cache()  # type: ignore[attr-defined]
    return caplog


calls: list = []


def wrap(original):
    calls.append(original)
    return lambda self, *args, **kwargs: ("ours", original(self, *args, **kwargs))


def broken(original):
    raise ImportError("renamed in this vLLM")


@pytest.fixture
def runner(monkeypatch) -> type:
    """A class of somebody else's, as it was afterwards."""
    calls.clear()
    monkeypatch.setattr(Runner, "propose", Runner.propose)
    return Runner


def test_a_seam_is_patched_once(said, runner):
    stock = runner.propose
    module, seam = make_module(Runner=runner), make_seam()
    for _ in range(3):
        patching._apply(seam, module)
    assert calls == [stock]
    assert runner().propose(1, 2) == ("ours", (1, 2))
    assert said.records == []


def test_a_changed_seam_is_left_alone_and_named_once(said, runner):
    stock = runner.propose
    module, seam = make_module(Runner=runner), make_seam(parameters=("gone",))
    for _ in range(3):
        patching._apply(seam, module)
    assert calls == []
    assert runner.propose is stock
    assert [r.levelname for r in said.records] == ["WARNING"]
    assert "somewhere.Runner.propose has no parameter gone" in said.text


@pytest.mark.parametrize("ours", ["broken", "nowhere"])
def test_a_patch_that_fails_does_not_reach_vllm(ours, said, runner):
    patching._apply(make_seam(ours=ours), make_module(Runner=runner))
    assert [r.levelname for r in said.records] == ["ERROR"]
    assert "somewhere.Runner.propose" in said.text
    assert {"broken": "renamed in this vLLM", "nowhere": "has no attribute"}[ours] in said.text
    assert runner().propose(1, 2) == (1, 2)


# ---- one object ----


def specialised(cls, word="ours"):
    class Special(cls):
        def propose(self, *args, **kwargs):
            return (word, *super().propose(*args, **kwargs))

    return Special


class Fixed(Runner):
    def propose(self, *args, **kwargs):
        return "fixed"


class Empty(Runner):
    pass


def table(monkeypatch, *rows: Seam) -> None:
    monkeypatch.setattr(patching, "SEAMS", rows)
    monkeypatch.setitem(sys.modules, "somewhere", make_module(Runner=Runner))
    patching._problem.cache_clear()


def test_the_class_of_one_object_is_changed(said, monkeypatch):
    table(
        monkeypatch,
        row("somewhere:Runner.propose", ("hidden",), f"{__name__}:specialised", "class"),
        row("somewhere:Runner.propose", (), f"{__name__}:Fixed", "class"),
    )
    one, other = Empty(), Empty()
    for _ in range(2):  # the second time it is one already
        assert patching.specialise(one, f"{__name__}:specialised", "mine")
        assert one.propose(1, 2) == ("mine", 1, 2)
    assert isinstance(one, Empty)
    assert other.propose(1, 2) == (1, 2)
    plain = Runner()
    assert patching.specialise(plain, f"{__name__}:Fixed")
    assert type(plain) is Fixed
    assert said.records == []


def test_an_object_of_a_changed_class_is_left_alone(said, monkeypatch):
    table(
        monkeypatch,
        row("somewhere:Runner.propose", ("hidden",), f"{__name__}:specialised", "class"),
        row("somewhere:Runner.sample", (), f"{__name__}:specialised", "class"),
    )
    one = Runner()
    assert not patching.specialise(one, f"{__name__}:specialised")
    assert type(one) is Runner
    assert [r.levelname for r in said.records] == ["WARNING"]
    assert "somewhere.Runner.sample is missing in this vLLM" in said.text


def test_a_subclass_in_the_place_of_a_class_needs_all_that_it_overrides(said, monkeypatch):
    replaced = row("somewhere:Runner", (), f"{__name__}:Fixed")
    table(monkeypatch, replaced, row("somewhere:Runner.sample", (), f"{__name__}:Fixed", "class"))
    module = sys.modules["somewhere"]
    patching._apply(replaced, module)
    assert module.Runner is Runner
    assert "somewhere.Runner.sample is missing" in said.text
    table(monkeypatch, replaced, row("somewhere:Runner.propose", (), f"{__name__}:Fixed", "class"))
    module = sys.modules["somewhere"]
    patching._apply(replaced, module)
    assert module.Runner is Fixed


def test_an_attribute_of_one_object_for_the_while(monkeypatch):
    table(monkeypatch, row("somewhere:Runner.propose", (), "here:it", "object"))
    one, own = Runner(), Runner()
    own.propose = before = lambda: "own"
    for runner, after in ((one, (1, 2)), (own, None)):
        with patching.replaced(runner, "propose", lambda *args: "ours"):
            assert runner.propose(1, 2) == "ours"
        if after:
            assert runner.propose(1, 2) == after
            assert vars(runner) == {}
    assert own.propose is before
    patching.replace(one, "propose", before)
    assert one.propose() == "own"


def test_nothing_is_replaced_without_a_row(monkeypatch):
    table(
        monkeypatch,
        row("somewhere:Runner.propose", (), f"{__name__}:specialised", "class"),
        row("somewhere:Runner.limit.gone", (), "here:it", "object"),
    )
    with pytest.raises(LookupError, match="is not in the table of seams"):
        patching.specialise(Runner(), f"{__name__}:Fixed")
    with pytest.raises(LookupError, match="propose is not in the table of seams"):
        patching.replace(Runner(), "propose", None)
    with pytest.raises(RuntimeError, match=r"somewhere\.Runner\.limit\.gone is missing"):
        patching.replace(Runner(), "gone", None)


def test_module_wide_seams_of_a_kind(package, monkeypatch):
    when = {"runner": "cpu", "other": "cpu hybrid"}
    rows = [row(f"throwaway.{m}:start", ("a",), f"{__name__}:start", w) for m, w in when.items()]
    monkeypatch.setattr(patching, "SEAMS", tuple(rows))
    calls.clear()
    for _ in range(2):
        patching.apply("cpu")
    assert importlib.import_module("throwaway.runner").start(1) == "ours"
    assert calls == ["throwaway.runner"]


def test_the_document_is_made_from_the_table():
    text = (Path(__file__).resolve().parents[3] / "docs" / "dev" / "seams.md").read_text()
    assert text == seams.table(), "python -m vllm_dflash.serving.seams > docs/dev/seams.md"
    for seam in seams.SEAMS:
        owner, _, member = seam.name.rpartition(".")
        assert owner.rpartition(".")[2] in text
        assert member in text


def test_every_row_names_something_of_ours():
    for seam in seams.SEAMS:
        module, _, name = seam.ours.partition(":")
        assert hasattr(importlib.import_module(module), name), seam
        assert seam.why
        assert seam.upstream
        assert seam.until


# ---- patching right after an import ----


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package ``throwaway`` with modules ``runner`` and ``other``, of which a third imports one."""
    folder = tmp_path / "throwaway"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "runner.py").write_text("def start(a):\n    return 'stock'\n")
    (folder / "other.py").write_text("from throwaway.runner import start\n")
    (folder / "broken.py").write_text("def start(a): ...\nraise RuntimeError('broken itself')\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield "throwaway"
    sys.meta_path[:] = finders
    for name in [n for n in sys.modules if n.split(".")[0] == "throwaway"]:
        del sys.modules[name]


def start(original):
    calls.append(original.__module__)
    return lambda a: "ours"


def hook(monkeypatch, *modules: str, missing=()) -> list[str]:
    """Installs seams on ``<module>.start``; returns the modules patched, in order."""
    calls.clear()
    made = tuple(row(f"{m}:start", ("a",), f"{__name__}:start") for m in (*modules, *missing))
    monkeypatch.setattr(patching, "SEAMS", made)
    return calls


def test_modules_are_patched_when_they_are_imported(package, monkeypatch):
    patched = hook(monkeypatch, "throwaway.runner")
    assert patching.install() == []
    assert patched == []
    other = importlib.import_module("throwaway.other")
    assert patched == ["throwaway.runner"]
    assert other.start(1) == "ours"  # also what other modules import from it
    assert importlib.import_module("throwaway.runner").start(1) == "ours"


def test_modules_that_are_loaded_already_are_patched_at_once(package, monkeypatch):
    runner = importlib.import_module("throwaway.runner")
    patched = hook(monkeypatch, "throwaway.runner")
    patching.install()
    assert patched == ["throwaway.runner"]
    assert runner.start(1) == "ours"


def test_installing_twice(package, monkeypatch):
    patched = hook(monkeypatch, "throwaway.runner")
    patching.install()
    patching.install()
    assert importlib.import_module("throwaway.runner").start(1) == "ours"
    assert patched == ["throwaway.runner"]
    patching.install()
    assert patched == ["throwaway.runner"]


def test_other_modules_import_as_ever(package, monkeypatch):
    hook(monkeypatch, "throwaway.runner")
    patching.install()
    with pytest.raises(ModuleNotFoundError, match=r"throwaway\.nothing"):
        importlib.import_module("throwaway.nothing")
    assert importlib.util.find_spec("throwaway.runner").origin.endswith("runner.py")


def test_a_module_that_fails_by_itself_still_does(package, monkeypatch):
    patched = hook(monkeypatch, "throwaway.broken")
    patching.install()
    with pytest.raises(RuntimeError, match="broken itself"):
        importlib.import_module("throwaway.broken")
    assert patched == []


@pytest.mark.parametrize("gone", ["throwaway.gone", "throwaway.gone.deeper", "nowhere.at.all"])
def test_half_a_plugin_is_worse_than_none(gone, package, monkeypatch):
    patched = hook(monkeypatch, "throwaway.runner", missing=[gone])
    before = list(sys.meta_path)
    assert patching.install() == [gone]
    assert importlib.import_module("throwaway.runner").start(1) == "stock"
    assert patched == []
    assert sys.meta_path == before


def test_probe(package, monkeypatch):
    hook(monkeypatch, "throwaway.runner", "throwaway.broken", "throwaway.nothing")
    (found, broken, nothing) = patching.probe().values()
    assert found == "ok"
    assert broken == "import failed: RuntimeError: broken itself"
    assert nothing.startswith("import failed: ModuleNotFoundError")


# ---- --speculative-config ----

CONFIG = DrafterConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=24,
    vocab_size=40,
    draft_block_size=4,
    target_layer_ids=(1, 2),
    mask_token_id=39,
    dtype="float32",
)
VERIFIER = SimpleNamespace(
    is_hybrid=False,
    model="some/verifier",
    max_model_len=64,
    hf_config=SimpleNamespace(
        hidden_size=16, num_hidden_layers=5, vocab_size=40, pad_token_id=None
    ),
)


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafters") / "mine"
    save_drafter(folder, CONFIG, dict(Drafter(CONFIG).named_parameters()))
    return folder


class Made(str):
    """Stands for a SpeculativeConfig: it takes attributes."""

    def __init__(self, *args):
        self.draft_model_config = SimpleNamespace(hf_config=SimpleNamespace(dflash_config={}))


class Args:
    """The part of vLLM's EngineArgs that matters."""

    def __init__(self, speculative_config=None, method=None, model=None, tokens=None, extra=None):
        self.speculative_config = speculative_config
        self.spec_method, self.spec_model, self.spec_tokens = method, model, tokens
        self.additional_config = extra if extra is not None else {}
        self.tensor_parallel_size = 1
        self.seen: list = []

    def stock(self, target_model_config, target_parallel_config=None):
        self.seen.append((self.speculative_config, target_model_config, target_parallel_config))
        return Made("made")

    create_speculative_config = wrap_create_speculative_config(stock)


def create(args: Args, verifier=VERIFIER):
    assert args.create_speculative_config(verifier, target_parallel_config="p") == "made"
    assert args.seen[-1][1:] == (verifier, "p")
    given = args.seen[-1][0]
    if given and "disable_eagle_block_drop" in given:
        # Set for drafters of our class only.
        given = {k: v for k, v in given.items() if k != "disable_eagle_block_drop"}
    return given, Options.from_additional_config(args.additional_config)


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"method": "ngram", "num_speculative_tokens": 3},
        {"method": "ngram", "model": "x/dflash", "dflash_check": 5},
        {"model": "org/eagle3-head"},
    ],
)
def test_other_methods_pass_untouched(config):
    extra = {"a": 1}
    args = Args(config, extra=extra)
    given, _ = create(args)
    assert given is config
    assert args.additional_config is extra
    assert extra == {"a": 1}


def test_other_methods_by_flag_pass_untouched():
    args = Args(None, method="ngram", model="x/dflash")
    assert create(args)[0] is None
    assert args.additional_config == {}


def test_dflash_gets_its_draft_length_and_options(drafter):
    config = {"method": "dflash", "model": str(drafter), "dflash_greedy_draft_vocab": False}
    args = Args(config, extra={"a": 1})
    given, options = create(args)
    assert given == {"method": "dflash", "model": str(drafter), "num_speculative_tokens": 3}
    assert options == Options(greedy_draft_vocab=False)
    assert args.additional_config["a"] == 1
    assert "version" in args.additional_config[ADDITIONAL_CONFIG_KEY]


@pytest.mark.parametrize(
    ("own", "want"), [({}, True), ({"disable_eagle_block_drop": False}, False)]
)
def test_cached_prefixes_are_used_whole_unless_the_user_says_otherwise(drafter, own, want):
    args = Args({"method": "dflash", "model": str(drafter), **own})
    create(args)
    assert args.seen[-1][0]["disable_eagle_block_drop"] is want


def test_a_second_engine_config_from_the_same_arguments_keeps_the_options(drafter):
    args = Args({"method": "dflash", "model": str(drafter), "dflash_check": False})
    first, second = create(args), create(args)
    assert first == second
    assert second[1] == Options(check=False)


def test_flags_and_shorter_drafts(drafter):
    given, _ = create(Args(None, method="dflash", model=str(drafter)))
    assert given == {"num_speculative_tokens": 3}  # vLLM adds its flags itself
    given, _ = create(Args(None, method="dflash", model=str(drafter), tokens=2))
    assert given == {}
    given, _ = create(
        Args({"method": "dflash", "model": str(drafter), "num_speculative_tokens": 1})
    )
    assert given["num_speculative_tokens"] == 1


def test_longer_drafts_than_trained_are_served_with_a_word(drafter, fresh):
    config = {"method": "dflash", "model": str(drafter), "num_speculative_tokens": 4}
    assert create(Args(config))[0]["num_speculative_tokens"] == 4
    assert "num_speculative_tokens is 4" in fresh.text
    assert "blocks of 4, that is 3 tokens" in fresh.text


def test_detected_by_our_own_keys_or_the_name(drafter):
    given, options = create(Args({"model": str(drafter), "dflash-check": True}))
    assert given["num_speculative_tokens"] == 3
    assert options.check
    with pytest.raises(ValueError, match="no such folder"):
        create(Args({"model": "/nowhere/my-DFlash-head"}))


def test_misfits_are_found_before_anything_is_allocated(drafter):
    config = {"method": "dflash", "model": str(drafter)}
    other = SimpleNamespace(**{**vars(VERIFIER.hf_config), "hidden_size": 32})
    verifier = SimpleNamespace(**{**vars(VERIFIER), "hf_config": other})
    args = Args(config)
    with pytest.raises(ValueError, match=r"some/verifier.*width 16.*32"):
        args.create_speculative_config(verifier)
    assert args.seen == []
    create(Args({**config, "dflash_check": False}), verifier)


def test_broken_options_name_the_key(drafter):
    with pytest.raises(ValueError, match="dflash_chek"):
        create(Args({"method": "dflash", "model": str(drafter), "dflash_chek": False}))


def rewrite(folder, tmp_path, dflash=None, weights=False, **changes):
    """A copy with other keys, None for absent; ``dflash`` are those of dflash_config."""
    copy = tmp_path / "copy"
    copy.mkdir()
    raw = json.loads((folder / "config.json").read_text()) | changes
    raw["dflash_config"] = {**raw["dflash_config"], **(dflash or {})}
    raw = {k: v for k, v in raw.items() if v is not None}
    (copy / "config.json").write_text(json.dumps(raw))
    if weights:
        shutil.copy(folder / "model.safetensors", copy)
    return str(copy)


@pytest.mark.parametrize("place", ["s3://bucket", "gs://bucket/drafters", "az://box"])
def test_drafters_in_object_storage_are_served_as_vllm_fetches_them(place, drafter, fresh):
    """Their configuration is on this machine once vLLM has made its own."""

    class Fetching(Args):
        def stock(self, *args, **kwargs):
            made = Args.stock(self, *args, **kwargs)
            made.draft_model_config.model = str(drafter)
            return made

        create_speculative_config = wrap_create_speculative_config(stock)

    config = {"method": "dflash", "model": f"{place}/mine"}
    with pytest.raises(ValueError, match=r"object storage.*give num_speculative_tokens"):
        create(Fetching(config))
    config["num_speculative_tokens"] = 2
    args = Fetching(config | {"dflash_greedy_draft_vocab": False})
    given, options = create(args)
    assert given == config
    assert options == Options(greedy_draft_vocab=False)
    assert args.additional_config[ADDITIONAL_CONFIG_KEY]["target_layer_ids"] == [1, 2]
    assert f"{place}/mine unchecked" in fresh.text


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LiLiCorrDraftModel"], "dflash": {"lilicorr_num_layers": 2}},
        {"architectures": ["DFlashNovelForCausalLM"]},
        {"speculators_model_type": "xpress"},
        {"dflash": {"markov_rank": 8}},
        {"dflash": {"use_aux_hidden_state": False}},
        {"architectures": ["LiLiCorrDraftModel"], "verifier": {"a": 1}, "block_size": "many"},
        {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2, 1]}},
    ],
    ids=[
        "LiLiCorr",
        "novel",
        "speculators",
        "DSpark by its keys",
        "without features",
        "LiLiCorr of other types",
        "multimodal positions",
    ],
)
def test_relatives_are_left_to_vllm(changes, drafter, tmp_path, fresh):
    model = rewrite(drafter, tmp_path, **changes)
    given, _ = create(Args({"method": "dflash", "model": model}))
    assert given == {"method": "dflash", "model": model}
    assert f"leaves the drafter {model} to vLLM" in fresh.text


@pytest.mark.parametrize("beside", [False, True], ids=["in config.json", "beside it"])
def test_of_quantised_drafters_the_weights_are_not_compared(beside, drafter, tmp_path):
    quantised = {"quantization_config": {"quant_method": "fp8"}}
    model = rewrite(drafter, tmp_path, **({} if beside else quantised))
    if beside:
        text = json.dumps({"quantization": {"quant_algo": "NVFP4"}})
        (Path(model) / "hf_quant_config.json").write_text(text)
    given, _ = create(Args({"method": "dflash", "model": model}))
    assert given["num_speculative_tokens"] == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"block_size": None, "dflash": {"block_size": 4}},
        {"dflash": {"block_size": 4}},
        {"dflash": {"num_anchors": 64, "loss_decay_gamma": 7.0}},
        {"dflash": {"attention_sink_bias": False, "use_swa": False}, "draft_vocab_size": None},
        {"dflash": {"causal": None}, "sliding_window": None},
        {"num_target_layers": 6},
        {"vocab_size": 38, "dflash": {"mask_token_id": 37}},
    ],
    ids=str,
)
def test_what_stock_serves_is_served(changes, drafter, tmp_path):
    model = rewrite(drafter, tmp_path, weights=True, **changes)
    given, _ = create(Args({"method": "dflash", "model": model}))
    assert given["num_speculative_tokens"] == 3


def test_a_larger_vocabulary_than_the_verifiers_is_refused(drafter, tmp_path):
    model = rewrite(drafter, tmp_path, weights=True, vocab_size=42)
    with pytest.raises(ValueError, match=r"42 tokens, the verifier's 40"):
        create(Args({"method": "dflash", "model": model}))


def test_probabilities_of_two_widths_are_refused(drafter, tmp_path):
    model = rewrite(drafter, tmp_path, weights=True, vocab_size=38, dflash={"mask_token_id": 37})
    config = {"method": "dflash", "model": model, "draft_sample_method": "probabilistic"}
    with pytest.raises(ValueError, match=r"probabilistic.*38.*40"):
        create(Args(config))


def test_the_server_may_have_to_say_the_block_size(drafter, tmp_path):
    model = rewrite(drafter, tmp_path, weights=True, block_size=None)
    with pytest.raises(ValueError, match="give num_speculative_tokens"):
        create(Args({"method": "dflash", "model": model}))
    given, _ = create(Args({"method": "dflash", "model": model, "num_speculative_tokens": 2}))
    assert given["num_speculative_tokens"] == 2
    create(Args({"model": model, "method": "dflash"}, tokens=2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dflash": {"block_size": 8}}, ["block_size says 4", "dflash_config.block_size says 8"]),
        (
            {"eagle_aux_hidden_state_layer_ids": [1, 2]},
            [
                "eagle_aux_hidden_state_layer_ids",
                "[0, 1]",
                "dflash_config.target_layer_ids",
                "[1, 2]",
            ],
        ),
    ],
    ids=str,
)
def test_two_places_that_differ(changes, words, drafter, tmp_path, fresh):
    """vLLM reads one of them and serves, so ours says it and does too; unless it needs the value itself."""
    model = rewrite(drafter, tmp_path, weights=True, **changes)
    with pytest.raises(ValueError, match="give num_speculative_tokens") as error:
        create(Args({"method": "dflash", "model": model}))
    assert all(word in str(error.value) for word in words), str(error.value)
    given, _ = create(Args({"method": "dflash", "model": model, "num_speculative_tokens": 2}))
    assert given["num_speculative_tokens"] == 2
    assert all(word in fresh.text for word in words), fresh.text


def test_windows_that_vllm_does_not_find_are_refused(drafter, tmp_path):
    kinds = {"layer_types": ["sliding_attention"], "sliding_window": 16, "use_sliding_window": None}
    model = rewrite(drafter, tmp_path, weights=True, **kinds)
    with pytest.raises(ValueError, match="use_sliding_window true"):
        create(Args({"method": "dflash", "model": model}))


def test_unchecked_drafters_may_be_unreadable(drafter, tmp_path):
    model = rewrite(drafter, tmp_path, dflash={"mask_token_id": "novel"})
    with pytest.raises(ValueError, match="novel"):
        create(Args({"method": "dflash", "model": model}))
    given, _ = create(Args({"method": "dflash", "model": model, "dflash_check": False}))
    assert given == {"method": "dflash", "model": model}


def test_missing_weights_are_found(drafter, tmp_path):
    model = rewrite(drafter, tmp_path)
    with pytest.raises(ValueError, match="safetensors"):
        create(Args({"method": "dflash", "model": model}))


# ---- metrics ----


@pytest.fixture
def metrics(monkeypatch):
    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    real = prometheus_client.Gauge

    def gauge(*args, **kwargs):
        return real(*args, **kwargs, registry=registry)

    monkeypatch.setattr(prometheus_client, "Gauge", gauge)
    return registry


class Base:
    def __init__(self, speculative_config, labelnames, per_engine_labelvalues, *args, **kwargs):
        self.observed = []

    def observe(self, stats, engine_idx=0):
        self.observed.append((stats, engine_idx))


def spec(method="dflash"):
    return SimpleNamespace(method=method, model="org/drafter", num_speculative_tokens=7)


def stats(drafts, accepted):
    """Of one step: drafts of 7 tokens, of which the first ``accepted / drafts`` are accepted."""
    each = [min(drafts, max(accepted - k * drafts, 0)) for k in range(7)]
    return SimpleNamespace(
        num_drafts=drafts,
        num_draft_tokens=7 * drafts,
        num_accepted_tokens=accepted,
        num_accepted_tokens_per_pos=each,
    )


def test_metrics(metrics):
    made = drafter_metrics_class(Base)(spec(), ["model_name"], {0: ["m"], 1: ["m1"]})
    info = {"model_name": "m", "drafter": "org/drafter", "num_speculative_tokens": "7"}
    assert metrics.get_sample_value("vllm_dflash:drafter_info", info) == 1
    made.observe(stats(0, 0))
    for drafts, accepted in ((2, 5), (0, 0), (3, 1)):
        made.observe(stats(drafts, accepted))
    made.observe(stats(4, 4), engine_idx=1)
    labels = {"drafter": "org/drafter"}
    tau = [
        metrics.get_sample_value("vllm_dflash:acceptance_length", {"model_name": m, **labels})
        for m in ("m", "m1")
    ]
    assert tau == pytest.approx([1 + 6 / 5, 2.0])
    # Drafts of one length: by position it is the same.
    tau = [
        metrics.get_sample_value(
            "vllm_dflash:drafter_acceptance_length", {"model_name": m, **labels}
        )
        for m in ("m", "m1")
    ]
    assert tau == pytest.approx([1 + 6 / 5, 2.0])
    assert len(made.observed) == 5


def test_trimmed_drafts_say_nothing_by_position(metrics):
    """vLLM's adaptive verification counts tokens as drafted that it left out."""
    config = spec()
    config.enable_adaptive_verification = True
    made = drafter_metrics_class(Base)(config, ["model_name"], {0: ["m"]})
    made.observe(stats(5, 6))
    labels = {"model_name": "m", "drafter": "org/drafter"}
    assert metrics.get_sample_value("vllm_dflash:acceptance_length", labels) == 1 + 6 / 5
    assert metrics.get_sample_value("vllm_dflash:drafter_acceptance_length", labels) is None


def test_figures_of_each_engine(metrics, monkeypatch, tmp_path):
    """Data parallel engines publish their own; one has not begun."""
    monkeypatch.setattr(serving_metrics, "stats_file", lambda name: tmp_path / f"{name}.json")
    config = spec()
    config.dflash_stats = "server"
    names, values = ["model_name", "engine"], {i: ["m", str(i)] for i in range(3)}
    drafter_metrics_class(Base)(config, names, values)
    sources = {"drafter": 4, "lookup": 1}
    for engine in (0, 2):
        raw = {
            "steps": 10 + engine,
            "drafted_steps": 5,
            "lengths": [3, 0, engine],
            "seconds": 2.0,
            "plain_seconds": 3.0,
            "compared": [2] * 7,
            "right": [1] * 7,
            **dict.fromkeys(("drafts", "proposed", "accepted", "expected"), sources),
        }
        (tmp_path / f"server-{engine}.json").write_text(json.dumps(raw))

    def value(name, engine, **labels):
        labels |= {"model_name": "m", "engine": str(engine)}
        return metrics.get_sample_value(f"vllm_dflash:{name}", labels)

    assert [value("steps_total", i) for i in range(3)] == [10, None, 12]
    assert value("draft_length_total", 2, length="2") == 2
    assert value("accepted_tokens_total", 0, source="lookup") == 1
    assert value("estimated_speedup", 0) == 1.5


def test_metrics_of_a_second_engine_in_the_process(metrics):
    for _ in range(2):
        made = drafter_metrics_class(Base)(spec(), ["model_name"], {0: ["m"]})
    made.observe(stats(1, 3))
    labels = {"model_name": "m", "drafter": "org/drafter"}
    assert metrics.get_sample_value("vllm_dflash:acceptance_length", labels) == 4


@pytest.mark.parametrize("config", [None, spec("ngram")])
def test_no_metrics_for_other_methods(config, metrics):
    made = drafter_metrics_class(Base)(config, ["model_name"], {0: ["m"]})
    made.observe(stats(1, 1))
    assert list(metrics.collect()) == []
    assert len(made.observed) == 1


def test_vllms_own_metrics_class_is_a_base():
    from vllm.v1.spec_decode.metrics import SpecDecodingProm

    made = drafter_metrics_class(SpecDecodingProm)(None, [], {})
    assert not made.spec_decoding_enabled
    assert made._tau is None


def test_the_drafter_checks_values_while_loading():
    """Only the generator is ours; vLLM's loader below it is replaced."""
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3ForCausalLM

    from vllm_dflash.serving.worker.drafter_model import DrafterModel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DFlashQwen3ForCausalLM, "load_weights", lambda self, w: dict(w))
        model = DrafterModel.__new__(DrafterModel)
        good = {"fc.weight": torch.ones(2), "d2t": torch.tensor([1])}
        assert DrafterModel.load_weights(model, good.items()) == good
        broken = good | {"norm.weight": torch.tensor([1.0, float("nan")])}
        with pytest.raises(ValueError, match=r"norm\.weight"):
            DrafterModel.load_weights(model, broken.items())
