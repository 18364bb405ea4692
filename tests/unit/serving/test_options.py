"""The plugin's options, from ``--speculative-config`` to the worker."""

from __future__ import annotations

import pytest

from vllm_dflash.options import ADDITIONAL_CONFIG_KEY, ENV_DISABLE, Options, plugin_disabled


def test_our_keys_are_taken_out():
    given = {"method": "dflash", "dflash_check": False, "num_speculative_tokens": 3}
    options, rest = Options.from_speculative_config(given)
    assert options == Options(check=False, greedy_draft_vocab=True)
    assert rest == {"method": "dflash", "num_speculative_tokens": 3}
    assert "dflash_check" in given  # the caller's dict is his


def test_dashes_are_underscores():
    options, rest = Options.from_speculative_config({"dflash-greedy-draft-vocab": False})
    assert options == Options(greedy_draft_vocab=False)
    assert rest == {}


def test_vllms_keys_stay_as_they_are():
    given = {"draft-tensor-parallel-size": 1, "model": "x/dflash_check", "dflash": 1}
    assert Options.from_speculative_config(given) == (Options(), given)


@pytest.mark.parametrize("key", ["dflash_chek", "dflash_", "dflash-window"])
def test_unknown_keys_name_key_value_and_allowed(key):
    with pytest.raises(ValueError, match="not an option") as error:
        Options.from_speculative_config({key: 17})
    for word in (repr(key), "17", "dflash_check, dflash_draft_length"):
        assert word in str(error.value)


@pytest.mark.parametrize("value", ["false", 0, 1, None, [True]])
def test_wrong_values_name_key_value_and_allowed(value):
    with pytest.raises(ValueError, match="dflash_check") as error:
        Options.from_speculative_config({"dflash_check": value})
    assert f"is {value!r}; allowed are true and false" in str(error.value)


def test_choices():
    options, _ = Options.from_speculative_config(
        {"dflash_draft_length": "fixed", "dflash_lookup": "off"}
    )
    assert options == Options(draft_length="fixed", lookup="off")
    assert Options().draft_length == Options().lookup == "auto"
    for value in ("Auto", 7, True, None):
        with pytest.raises(ValueError, match='allowed are "auto" and "fixed"') as error:
            Options.from_speculative_config({"dflash_draft_length": value})
        assert f"'dflash_draft_length' is {value!r}" in str(error.value)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("greedy", [True, False])
def test_options_reach_the_worker(check, greedy):
    options = Options(check=check, greedy_draft_vocab=greedy)
    carried = {"other": 1, ADDITIONAL_CONFIG_KEY: {"version": "0.1.0", **options.as_dict()}}
    assert Options.from_additional_config(carried) == options


@pytest.mark.parametrize("config", [None, {}, object(), {ADDITIONAL_CONFIG_KEY: None}, "text"])
def test_defaults_where_nothing_is_carried(config):
    assert Options.from_additional_config(config) == Options()
    assert Options.from_additional_config({ADDITIONAL_CONFIG_KEY: config}) == Options()


@pytest.mark.parametrize(
    ("value", "disabled"),
    [(None, False), ("", False), ("0", False), ("False", False), ("1", True), ("true", True)],
)
def test_switching_the_plugin_off(value, disabled, monkeypatch):
    monkeypatch.delenv(ENV_DISABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(ENV_DISABLE, value)
    assert plugin_disabled() == disabled
