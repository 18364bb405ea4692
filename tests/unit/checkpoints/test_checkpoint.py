"""Drafter checkpoints: what is written is what is read, and nothing broken gets through."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import tiny
from vllm_dflash.checkpoint import (
    WEIGHTS_FILE,
    check_weights,
    convert,
    expected_shapes,
    load_weights,
    read_config,
    save_drafter,
)
from vllm_dflash.config import DrafterConfig
from vllm_dflash.files import MARK, atomic_folder
from vllm_dflash.modeling.drafter import Drafter

CONFIG = DrafterConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=24,
    vocab_size=40,
    draft_block_size=4,
    target_layer_ids=(1, 2),
    mask_token_id=39,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    dtype="float32",
    verifier="some/verifier",
)
DRAFT_TOKENS = torch.tensor([0, 3, 4, 11, 39])
SMALL_VOCAB = CONFIG.with_(draft_vocab_size=5)


def weights_of(config: DrafterConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drafter = Drafter(config)
    drafter.init_weights(generator=generator)
    weights = {n: p.detach().clone() for n, p in drafter.named_parameters()}
    if config.has_draft_vocab:
        weights["d2t"] = DRAFT_TOKENS - torch.arange(5)
        weights["lm_head.weight"] = torch.randn(5, config.hidden_size, generator=generator)
    return weights


def contents(folder) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def assert_same(left, right) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.fixture
def saved(tmp_path):
    save_drafter(tmp_path / "drafter", CONFIG, weights_of(CONFIG))
    return tmp_path / "drafter"


# ---- what the drafter's modules are named and shaped ----


@pytest.mark.parametrize("config", [CONFIG, CONFIG.with_(attention_bias=True)])
def test_expected_shapes_are_the_modules(config):
    shapes = {n: tuple(p.shape) for n, p in Drafter(config).named_parameters()}
    assert expected_shapes(config) == shapes


# ---- save and load ----


@pytest.mark.parametrize("fmt", ["zlab", "speculators"])
@pytest.mark.parametrize("config", [CONFIG, SMALL_VOCAB, CONFIG.with_(attention_bias=True)])
def test_save_and_load(config, fmt, tmp_path):
    weights = weights_of(config)
    save_drafter(tmp_path / "deep" / "d", config, weights, fmt, {"note.txt": "hello"})
    folder = tmp_path / "deep" / "d"
    assert sorted(contents(folder)) == [MARK, "config.json", WEIGHTS_FILE, "note.txt"]
    assert (folder / "note.txt").read_text() == "hello"
    again = DrafterConfig.from_dict(read_config(folder))
    loaded = load_weights(folder, again)
    if config.has_draft_vocab:
        t2d = loaded.pop("t2d")
        assert t2d.dtype == torch.bool
        assert t2d.nonzero().flatten().tolist() == DRAFT_TOKENS.tolist()
        assert loaded["d2t"].dtype == torch.int64
    assert_same(loaded, weights)
    assert os.listdir(tmp_path / "deep") == ["d"]


def test_floating_tensors_are_stored_in_the_configured_dtype(tmp_path):
    weights = weights_of(SMALL_VOCAB)
    save_drafter(tmp_path / "d", SMALL_VOCAB.with_(dtype="bfloat16"), weights)
    loaded = load_weights(tmp_path / "d", SMALL_VOCAB)
    assert loaded["fc.weight"].dtype == torch.bfloat16
    assert torch.equal(loaded["fc.weight"], weights["fc.weight"].bfloat16())
    assert loaded["d2t"].dtype == torch.int64


def test_unusable_dtype(tmp_path):
    for dtype in ("int8", "bf16", "Tensor"):
        with pytest.raises(ValueError, match=dtype):
            save_drafter(tmp_path / "d", CONFIG.with_(dtype=dtype), weights_of(CONFIG))


def test_saving_replaces_the_whole_folder(saved):
    save_drafter(saved, CONFIG, weights_of(CONFIG), extra_files={"note.txt": "old"})
    save_drafter(saved, CONFIG, weights_of(CONFIG, seed=1))
    assert sorted(contents(saved)) == [MARK, "config.json", WEIGHTS_FILE]
    assert_same(load_weights(saved, CONFIG), weights_of(CONFIG, seed=1))
    assert os.listdir(saved.parent) == ["drafter"]


def test_views_are_stored_as_themselves(tmp_path):
    weights = weights_of(CONFIG)
    big = torch.randn(32, 16)
    weights["fc.weight"] = big.t()
    save_drafter(tmp_path / "d", CONFIG, weights)
    assert torch.equal(load_weights(tmp_path / "d", CONFIG)["fc.weight"], big.t())


# ---- a save that fails leaves what was there ----


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("existed", [True, False])
def test_full_disk_while_writing(existed, saved, monkeypatch):
    target = saved if existed else saved.with_name("other")
    before, beside = contents(saved), os.listdir(saved.parent)

    def half(tensors, file, **kwargs):
        file.write_bytes(b"half")
        no_space()

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(OSError, match="No space"):
        save_drafter(target, CONFIG, weights_of(CONFIG, seed=1))
    assert contents(saved) == before
    assert os.listdir(saved.parent) == beside


@pytest.mark.parametrize("failing", [1, 2], ids=["moving the old", "moving the new"])
def test_failure_while_replacing(failing, saved, monkeypatch):
    before, real, calls = contents(saved), os.replace, []

    def replace(source, target):
        calls.append(source)
        if len(calls) == failing:
            no_space()
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space"):
        save_drafter(saved, CONFIG, weights_of(CONFIG, seed=1))
    assert contents(saved) == before
    assert os.listdir(saved.parent) == ["drafter"]


def test_interrupt_in_the_middle(saved):
    before = contents(saved)

    def interrupted():
        with atomic_folder(saved) as folder:
            (folder / "config.json").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert contents(saved) == before
    assert os.listdir(saved.parent) == ["drafter"]


# ---- refusing to save ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_not_saved(value, saved):
    before, weights = contents(saved), weights_of(CONFIG)
    weights["norm.weight"][3] = value
    with pytest.raises(ValueError, match=r"norm\.weight.*non-finite"):
        save_drafter(saved, CONFIG, weights)
    assert contents(saved) == before


def test_overflow_of_the_stored_dtype_is_not_saved(tmp_path):
    weights = weights_of(CONFIG)
    weights["fc.weight"][0, 0] = 1e6
    with pytest.raises(ValueError, match=r"fc\.weight"):
        save_drafter(tmp_path / "d", CONFIG.with_(dtype="float16"), weights)


def test_misshaped_weights_are_not_saved(saved):
    before = contents(saved)
    with pytest.raises(ValueError, match=r"norm\.weight is \(17,\), not \(16,\)"):
        save_drafter(saved, CONFIG, weights_of(CONFIG) | {"norm.weight": torch.ones(17)})
    assert contents(saved) == before
    assert os.listdir(saved.parent) == ["drafter"]


@pytest.mark.parametrize(
    ("d2t", "words"),
    [
        (None, "missing"),
        (torch.zeros(4, dtype=torch.int64), r"\(4,\)"),
        (torch.zeros(5), "float32"),
        (torch.tensor([0, 0, 0, 0, 36]), "0..40"),
        (torch.tensor([-1, 0, 0, 0, 0]), "-1..4"),
        (torch.tensor([1, 0, 0, 0, 0]), "4 of 5 distinct"),
    ],
)
def test_impossible_draft_vocabulary(d2t, words, tmp_path):
    weights = weights_of(SMALL_VOCAB)
    del weights["d2t"]
    if d2t is not None:
        weights["d2t"] = d2t
    with pytest.raises(ValueError, match=f"d2t .*{words}"):
        save_drafter(tmp_path / "d", SMALL_VOCAB, weights)
    assert not os.listdir(tmp_path)


# ---- refusing to load ----


def rewrite(folder, change) -> None:
    weights = load_file(folder / WEIGHTS_FILE)
    change(weights)
    save_file(weights, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("layers.1.mlp.up_proj.weight"), r"lacks layers\.1\.mlp\.up_proj\.weight"),
        (lambda w: w.update({"layers.2.x": torch.ones(1)}), r"no DFlash drafter has: layers\.2\.x"),
        (
            lambda w: w.update({"fc.weight": torch.ones(16, 48)}),
            r"fc\.weight is \(16, 48\), not \(16, 32\)",
        ),
    ],
    ids=["missing", "unknown", "misshaped"],
)
def test_tensors_that_do_not_fit(change, words, saved):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=words):
        check_weights(saved, CONFIG)
    with pytest.raises(ValueError, match=words):
        load_weights(saved, CONFIG)


def test_optional_and_derived_tensors(saved):
    extra = {
        "embed_tokens.weight": torch.ones(40, 16),
        "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    rewrite(saved, lambda w: w.update(extra))
    loaded = load_weights(saved, CONFIG)
    assert "embed_tokens.weight" in loaded
    assert "layers.0.self_attn.rotary_emb.inv_freq" not in loaded


def test_many_problems_are_not_all_listed(saved):
    rewrite(saved, lambda w: [w.pop(n) for n in list(w) if "mlp" in n])
    with pytest.raises(ValueError, match="and 3 more"):
        check_weights(saved, CONFIG)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(keep, saved):
    data = (saved / WEIGHTS_FILE).read_bytes()
    (saved / WEIGHTS_FILE).write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read.*cut short"):
        load_weights(saved, CONFIG)


def test_non_finite_weights_are_not_loaded(saved):
    rewrite(saved, lambda w: w["hidden_norm.weight"].fill_(float("nan")))
    check_weights(saved, CONFIG)  # headers only
    with pytest.raises(ValueError, match=r"hidden_norm\.weight has non-finite"):
        load_weights(saved, CONFIG)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickle_is_refused_unread(name, saved):
    class Bomb:
        def __reduce__(self):
            return (os._exit, (1,))

    (saved / WEIGHTS_FILE).unlink()
    (saved / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=f"pickled weights .{name}.*safetensors"):
        load_weights(saved, CONFIG)


def test_no_weights(saved):
    (saved / WEIGHTS_FILE).unlink()
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        load_weights(saved, CONFIG)


def test_weights_of_hub_names_are_checked_later():
    check_weights("org/name-that-is-no-folder", CONFIG)


def test_weights_in_several_files(saved):
    weights = load_file(saved / WEIGHTS_FILE)
    (saved / WEIGHTS_FILE).unlink()
    names = sorted(weights)
    for i, part in enumerate((names[:5], names[5:])):
        file = saved / f"model-{i}-of-2.safetensors"
        save_file({n: weights[n] for n in part}, file)
    assert_same(load_weights(saved, CONFIG), weights_of(CONFIG))


# ---- config.json ----


@pytest.mark.parametrize("model", ["/no/such/folder", "./nothing", "a/b/c", "nothing"])
def test_missing_folder(model):
    with pytest.raises(ValueError, match="no such folder"):
        read_config(model)


def test_unreachable_hub_model(monkeypatch):
    from transformers import PretrainedConfig

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", offline)
    with pytest.raises(ValueError, match=r"org/drafter.*no network"):
        read_config("org/drafter")
    found = {"block_size": 4}
    monkeypatch.setattr(
        PretrainedConfig, "get_config_dict", lambda name, revision: (found | {"r": revision}, {})
    )
    assert read_config("org/drafter", "abc") == {"block_size": 4, "r": "abc"}


@pytest.mark.parametrize(
    ("text", "words"), [(None, "there is no"), ("{", "not valid JSON"), ("[1]", "list")]
)
def test_broken_config(text, words, saved):
    (saved / "config.json").unlink()
    if text is not None:
        (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_config(saved)


# ---- conversion ----


@pytest.mark.parametrize("config", [CONFIG, SMALL_VOCAB])
def test_convert_there_and_back(config, tmp_path):
    save_drafter(tmp_path / "zlab", config, weights_of(config))
    there, remarks = convert(tmp_path / "zlab", tmp_path / "speculators", "speculators")
    convert(tmp_path / "speculators", tmp_path / "again", "zlab")
    assert there == config
    assert remarks == []
    raw = json.loads((tmp_path / "speculators" / "config.json").read_text())
    assert raw["speculators_model_type"] == "dflash"
    first = load_file(tmp_path / "zlab" / WEIGHTS_FILE)
    for name in ("speculators", "again"):
        assert_same(load_file(tmp_path / name / WEIGHTS_FILE), first)
    raw, back = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("zlab", "again"))
    assert back == raw


def test_convert_onto_itself(saved):
    before = contents(saved)
    with pytest.raises(ValueError, match="is the drafter itself"):
        convert(saved, saved.parent / "." / "drafter", "speculators")
    assert contents(saved) == before


def test_the_weights_are_as_readable_as_the_config(saved):
    modes = {f.name: f.stat().st_mode & 0o777 for f in saved.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


# ---- what a copy must not lose ----


def give_mask_embedding(folder, seed: int = 5, **changes) -> torch.Tensor:
    """As MiMo's checkpoint has it."""
    embedding = torch.randn(16, generator=torch.Generator().manual_seed(seed))
    state = {"mask_token_id": 39, "embedding": embedding} | changes
    torch.save(state, folder / "mask_embedding.pt")
    return embedding


@pytest.mark.parametrize("fmt", ["zlab", "speculators"])
def test_the_mask_tokens_own_embedding_is_read_and_carried_along(fmt, saved):
    embedding = give_mask_embedding(saved)
    assert torch.equal(load_weights(saved, CONFIG)["mask_embedding"], embedding)
    _, remarks = convert(saved, saved.parent / "copy", fmt)
    assert torch.equal(load_weights(saved.parent / "copy", CONFIG)["mask_embedding"], embedding)
    state = torch.load(saved.parent / "copy" / "mask_embedding.pt", weights_only=True)
    assert state["mask_token_id"] == 39
    assert any("speculators does not" in r for r in remarks) == (fmt == "speculators")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_token_id": 7}, "7.*39"),
        ({"embedding": torch.zeros(3)}, "16 values"),
        ({"embedding": None}, "NoneType"),
        ({"embedding": torch.full((16,), float("nan"))}, "mask_embedding has non-finite"),
    ],
    ids=str,
)
def test_an_unusable_mask_embedding_is_named(changes, words, saved):
    give_mask_embedding(saved, **changes)
    with pytest.raises(ValueError, match=words):
        load_weights(saved, CONFIG)


def test_a_mask_embedding_that_would_run_code_is_not_loaded(saved):
    (saved / "mask_embedding.pt").write_bytes(pickle.dumps({"embedding": print}))
    with pytest.raises(ValueError, match=r"mask_embedding\.pt cannot be read"):
        load_weights(saved, CONFIG)


def test_a_bare_mask_embedding_is_read(saved):
    torch.save(torch.ones(1, 16), saved / "mask_embedding.pt")
    assert torch.equal(load_weights(saved, CONFIG)["mask_embedding"], torch.ones(16))


@pytest.mark.parametrize("said", ["bfloat16", None])
def test_conversion_keeps_every_bit_and_says_its_dtype(said, saved):
    """Also where config.json says another dtype than the tensors have, or none (speculators' own place)."""
    raw = json.loads((saved / "config.json").read_text())
    raw["dtype"] = said
    (saved / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    converted, _ = convert(saved, saved.parent / "copy", "speculators")
    assert converted.dtype == "float32"
    assert_same(load_weights(saved.parent / "copy", CONFIG), weights_of(CONFIG))
    assert json.loads((saved.parent / "copy" / "config.json").read_text())["dtype"] == "float32"


def test_speculators_says_its_dtype_at_the_top(saved):
    convert(saved, saved.parent / "spec", "speculators")
    raw = json.loads((saved.parent / "spec" / "config.json").read_text())
    del raw["transformer_layer_config"]["dtype"]
    assert DrafterConfig.from_dict(raw).dtype == "float32"


def test_conversion_keeps_where_the_drafter_came_from(saved):
    (saved / "dflash_training.json").write_text('{"tau_heldout": {"tau": 3.0}}')
    convert(saved, saved.parent / "copy", "speculators")
    assert (
        saved.parent / "copy" / "dflash_training.json"
    ).read_text() == '{"tau_heldout": {"tau": 3.0}}'


def test_conversion_to_speculators_needs_the_verifiers_name(tmp_path):
    nameless = CONFIG.with_(verifier=None)
    save_drafter(tmp_path / "d", nameless, weights_of(nameless))
    with pytest.raises(ValueError, match="--verifier"):
        convert(tmp_path / "d", tmp_path / "spec", "speculators")
    assert os.listdir(tmp_path) == ["d"]
    convert(tmp_path / "d", tmp_path / "spec", "speculators", verifier="org/name")
    raw = json.loads((tmp_path / "spec" / "config.json").read_text())
    assert raw["speculators_config"]["verifier"]["name_or_path"] == "org/name"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (
            {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 9},
            "read them as causal",
        ),
        (
            {"layer_types": ("sliding_attention",) * 2, "sliding_window": 9},
            "from the anchor by speculators",
        ),
        ({"target_hidden_size": 24}, "speculators 0.9 cannot load"),
        ({}, None),
    ],
    ids=str,
)
def test_conversion_says_what_other_readers_do_otherwise(changes, word, tmp_path):
    config = CONFIG.with_(**changes)
    save_drafter(tmp_path / "d", config, weights_of(config))
    _, remarks = convert(tmp_path / "d", tmp_path / "spec", "speculators")
    assert word is None or any(word in r for r in remarks), remarks
    assert remarks == [] or word is not None
    again = DrafterConfig.from_dict(read_config(tmp_path / "spec"))
    layers = range(config.num_hidden_layers)
    assert [again.layer_causal(i) for i in layers] == [config.layer_causal(i) for i in layers]


def test_quantised_checkpoints_are_not_computed_with(saved):
    (saved / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    with pytest.raises(ValueError, match="NVFP4"):
        convert(saved, saved.parent / "copy", "speculators")


@pytest.mark.thorough
def test_a_hub_name_is_as_good_as_a_folder(saved, tmp_path):
    """As `hf download` leaves it; without a network what is not there is an error."""
    cache = tmp_path / "models--org--drafter"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    shutil.copytree(saved, cache / "snapshots" / "abc")
    env = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    to = ("--to", "speculators", "-o", tmp_path / "made")
    tiny.cli("convert", "org/drafter", *to, env=env)
    assert_same(load_weights(tmp_path / "made", CONFIG), weights_of(CONFIG))
    (cache / "snapshots" / "abc" / WEIGHTS_FILE).unlink()
    refused = tiny.cli(
        "convert", "org/drafter", "--to", "zlab", "-o", tmp_path / "b", code=1, env=env
    )
    assert "has no *.safetensors weights" in refused.stderr


def test_names_that_vllm_takes_for_others(saved):
    weights = load_file(saved / WEIGHTS_FILE)
    weights["encoder.fc.weight"] = weights.pop("fc.weight")
    weights["encoder.output_norm_enc.weight"] = weights.pop("hidden_norm.weight")
    save_file(weights, saved / WEIGHTS_FILE)
    assert_same(load_weights(saved, CONFIG), weights_of(CONFIG))
