"""How the verifier is loaded: template, code of its own, revision, in every command, and nothing is asked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_tokenization import TOOL, conversation_of
from transformers import AutoTokenizer, LlavaConfig

from helpers import tiny
from helpers.refusal import Refused
from vllm_dflash.bench.prompts import load_prompts
from vllm_dflash.training.config import TrainConfig
from vllm_dflash.training.responses import ResponseLog
from vllm_dflash.training.run_folder import RunFolder
from vllm_dflash.training.tokenization import keep_date, prompt_token_ids
from vllm_dflash.verifier import Verifier

FIXED = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n\n' }}{%- endif -%}"
)
DATED = (
    "{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + tiny.CHAT_TEMPLATE
)
CODE = """
from transformers import LlamaConfig, PreTrainedTokenizerFast

class TinyRemoteConfig(LlamaConfig):
    model_type = "tiny_remote"

class TinyRemoteTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def refused(monkeypatch, capsys) -> Refused:
    return Refused(monkeypatch, capsys)


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    def asked(*args):
        raise AssertionError("a command asked something on standard input")

    monkeypatch.setattr("builtins.input", asked)


@pytest.fixture(scope="module")
def drafter(models, verifier) -> Path:
    return tiny.make_drafter(models / "options-drafter", verifier)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module", params=["config", "tokenizer"])
def remote(request, models, verifier) -> Path:
    """A verifier that needs code of its own, for its config or only for its tokenizer."""
    path = models / f"remote-{request.param}"
    shutil.copytree(verifier, path)
    (path / "code.py").write_text(CODE)
    if request.param == "config":
        auto_map = {"AutoConfig": "code.TinyRemoteConfig"}
        edit_json(path / "config.json", model_type="tiny_remote", auto_map=auto_map)
    else:
        auto_map = {"AutoTokenizer": ["code.TinyRemoteTokenizer", None]}
        edit_json(
            path / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="TinyRemoteTokenizer"
        )
    return path


@pytest.fixture(scope="module")
def without_template(models, verifier) -> Path:
    path = models / "without-template"
    shutil.copytree(verifier, path)
    (path / "chat_template.jinja").unlink()
    return path


def commands(verifier, drafter, prompts_file, tmp_path):
    data = ("--data", prompts_file)
    return [
        ("train", verifier, *data, "-o", tmp_path / "out"),
        ("eval", verifier, drafter, *data),
        ("bench", verifier, drafter, *data, "-o", tmp_path / "bench"),
    ]


def test_code_of_the_model_never_runs_unasked(refused, tmp_path, remote, drafter, prompts_file):
    for command in commands(remote, drafter, prompts_file, tmp_path):
        line = refused(*command)
        assert "--trust-remote-code" in line
        assert str(remote) in line
    if "config" in remote.name:
        assert "--trust-remote-code" in refused("inspect", drafter, remote)


@pytest.mark.parametrize(
    "trust", [("--trust-remote-code",), ("--engine-args", '{"trust_remote_code": true}')]
)
def test_code_of_the_model_runs_when_told(refused, tmp_path, remote, drafter, prompts_file, trust):
    """The commands then fail at the next thing that is wrong, the number of prompts or the template."""
    train, evaluate, bench = commands(remote, drafter, prompts_file, tmp_path)
    broken = ("--chat-template", "{% for %}", *trust)
    assert "chat template refuses" in refused(*train, *broken)
    assert "chat template refuses" in refused(*evaluate, *broken)
    assert "--num-prompts is 1000" in refused(*bench, "--num-prompts", "1000", *trust)


@pytest.mark.thorough
def test_inspect_takes_the_same_options(remote, drafter):
    done = tiny.cli("inspect", drafter, remote, "--trust-remote-code")
    assert "fits" in done.stdout


def test_trust_is_one_option_however_it_is_given(verifier):
    given, rest = Verifier.from_options("m", {"trust_remote_code": True, "seed": 1}, revision="r")
    assert given == Verifier("m", revision="r", trust_remote_code=True)
    assert rest == {"seed": 1}
    assert given.engine_args() == {"model": "m", "revision": "r", "trust_remote_code": True}
    with pytest.raises(ValueError, match="trust_remote_code is 'yes'"):
        Verifier("m", trust_remote_code="yes")


def test_every_loader_gets_revision_and_trust(monkeypatch):
    import transformers

    calls = {}
    for name in ("AutoConfig", "AutoTokenizer", "GenerationConfig"):

        def load(model, _name=name, **options):
            calls[_name] = (model, options)
            raise OSError("stop here")

        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", load)
    given = Verifier("org/name", revision="v2", tokenizer="org/other", trust_remote_code=True)
    for load in (given.load_config, given.load_tokenizer):
        with pytest.raises(ValueError, match="stop here"):
            load()
    assert given.load_generation_config() is None
    options = {"revision": "v2", "trust_remote_code": True}
    assert calls == {
        "AutoConfig": ("org/name", options),
        "AutoTokenizer": ("org/other", options),
        "GenerationConfig": ("org/name", {"revision": "v2"}),
    }


# ---- the chat template ----


def test_no_template_is_refused_before_the_engine_starts(
    refused, tmp_path, without_template, drafter, prompts_file
):
    for command in commands(without_template, drafter, prompts_file, tmp_path):
        line = refused(*command)
        assert "no chat template" in line
        assert "--chat-template" in line


@pytest.mark.parametrize("as_text", [False, True])
def test_the_servers_template_is_used(tmp_path, without_template, prompts_file, as_text):
    file = tmp_path / "fixed.jinja"
    file.write_text(FIXED)
    given = Verifier(str(without_template), chat_template=FIXED if as_text else str(file))
    tokenizer = given.load_tokenizer()
    assert tokenizer.chat_template == FIXED
    prompt = load_prompts(given, prompts_file, {}, 1)[0]
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n\n")


@pytest.mark.parametrize("own", [None, "TOK{{ messages[0]['content'] }}"])
def test_a_processors_template_goes_first_where_no_tools_are_given(models, verifier, own):
    """As vLLM's server chooses it, for the older multimodal folders that keep it in chat_template.json."""
    hf = pytest.importorskip("vllm.renderers.hf")
    path = models / f"llava-{own is None}"
    shutil.copytree(verifier, path)
    (path / "chat_template.jinja").unlink()
    text_config = json.loads((path / "config.json").read_text())
    LlavaConfig(text_config=text_config).save_pretrained(path)
    files = {
        "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor"},
        "processor_config.json": {"processor_class": "LlavaProcessor", "patch_size": 14},
        "chat_template.json": {"chat_template": "PROC{{ messages[0]['content'] }}"},
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    if own is not None:
        edit_json(path / "tokenizer_config.json", chat_template=own)

    given = Verifier(str(path))
    tokenizer = given.load_tokenizer()
    config = SimpleNamespace(
        model=str(path),
        tokenizer=str(path),
        tokenizer_revision=None,
        code_revision=None,
        trust_remote_code=False,
        hf_config=given.load_config(),
    )
    plain = AutoTokenizer.from_pretrained(path)
    for tools in (None, [TOOL]):
        conversation = conversation_of("hi", tools=tools)
        served = hf.resolve_chat_template(plain, None, tools, model_config=config)
        assert (served or "PROC")[:4] in ("PROC", "TOK{")
        # A server without a template for tools refuses them; there is nothing to agree with then.
        if served is not None:
            printed = plain.apply_chat_template(
                list(conversation.messages), chat_template=served, tokenize=False
            )
            assert tokenizer.decode(prompt_token_ids(tokenizer, conversation)) == printed
    expected = "PROChi"
    assert tokenizer.decode(prompt_token_ids(tokenizer, conversation_of("hi"))) == expected
    # The template that is given goes before both.
    given = Verifier(str(path), chat_template="GIVEN{{ 1 }}").load_tokenizer()
    assert given.decode(prompt_token_ids(given, conversation_of("hi"))) == "GIVEN1"


def test_templates_that_are_none(refused, tmp_path, verifier, prompts_file):
    train = ("train", verifier, "--data", prompts_file, "-o", tmp_path / "out")
    line = refused(*train, "--chat-template", tmp_path / "none.jinja")
    assert "none.jinja" in line
    assert "no such file" in line
    line = refused(*train, "--chat-template", "{{ raise_exception('not for me') }}")
    assert "not for me" in line
    (tmp_path / "empty.jinja").write_text(" \n")
    assert "is empty" in refused(*train, "--chat-template", tmp_path / "empty.jinja")
    line = refused(*train, "--reasoning-parser", "nope")
    assert "--reasoning-parser is 'nope'" in line
    # No run has begun, so that the mended command is not refused for being another one.
    assert not (tmp_path / "out-run").exists()


def test_the_template_is_part_of_a_runs_identity(tmp_path):
    def identity(**options):
        return TrainConfig(Verifier("m", **options), "no-such-data", tmp_path / "out").identity()

    # As before there were such options, so that an older run is resumed.
    assert identity()["verifier"] == "m"
    assert not {"chat_template", "trust_remote_code", "revision"} & identity().keys()
    folder = RunFolder(tmp_path / "run", identity(chat_template=FIXED))
    folder.new_state_file(1).write_bytes(b"")
    folder.commit_state(1, {})
    del folder  # with its lock
    RunFolder(tmp_path / "run", identity(chat_template=FIXED))
    for other in ({}, {"chat_template": DATED}, {"chat_template": FIXED, "revision": "v2"}):
        with pytest.raises(ValueError, match=r"chat_template|revision"):
            RunFolder(tmp_path / "run", identity(**other))


def test_several_files_of_data(refused, tmp_path, verifier, prompts_file):
    (tmp_path / "b.jsonl").write_text('{"prompt": "hi"}\n')
    two = ("--data", prompts_file, "--data", tmp_path / "b.jsonl")
    line = refused("train", verifier, *two, "--data", tmp_path / "none.jsonl", "-o", tmp_path / "o")
    assert "none.jsonl" in line

    def digest():
        data = (str(prompts_file), str(tmp_path / "b.jsonl"))
        return TrainConfig(Verifier("m"), data, tmp_path / "o").identity()["data_sha256"]

    first = digest()
    assert digest() == first
    (tmp_path / "b.jsonl").write_text('{"prompt": "ho"}\n')
    assert digest() != first
    only = TrainConfig(Verifier("m"), str(prompts_file), tmp_path / "o").identity()
    assert only["data_sha256"] == hashlib.sha256(prompts_file.read_bytes()).hexdigest()


def test_data_of_which_most_is_rejected(refused, tmp_path, verifier, drafter):
    data = tmp_path / "rows.jsonl"
    bad = [{"text": "x"}, {"messages": [{"role": "robot", "content": "x"}]}, {"text": "y"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in [{"prompt": "hi"}, *bad]))
    for command in commands(verifier, drafter, data, tmp_path):
        line = refused(*command)
        assert "3 of 4 rows are rejected" in line
        assert "2 x no 'messages'" in line
        assert "--max-rejected 1" in line
        if command[0] != "eval":  # which has no output here
            (kept,) = tmp_path.glob("*-rejected.jsonl")
            assert str(kept) in line
            assert len(kept.read_text().splitlines()) == 3
            kept.unlink()
    assert {p.name for p in tmp_path.iterdir()} == {"rows.jsonl"}


# ---- the date ----


def test_a_run_keeps_its_first_day():
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = DATED
    keep_date(tokenizer, datetime(2026, 2, 3))
    keep_date(tokenizer, datetime(2024, 2, 29))  # the engine's tokenizer may be used again
    prompt = tokenizer.decode(prompt_token_ids(tokenizer, conversation_of("hi")))
    assert "29 Feb 2024" in prompt


def test_templates_without_a_date_are_left_alone():
    tokenizer = tiny.make_tokenizer()
    before = tokenizer.apply_chat_template
    keep_date(tokenizer, datetime(2024, 2, 29))
    assert tokenizer.apply_chat_template == before


def test_the_first_day_is_kept_in_the_run_folder(tmp_path):
    before = datetime.now().replace(microsecond=0)
    folder = RunFolder(tmp_path / "run", {})
    assert before <= folder.started <= datetime.now()
    del folder  # one process at a time has it
    edit_json(tmp_path / "run" / "run.json", started="2024-02-29T23:59:59")
    assert RunFolder(tmp_path / "run", {}).started == datetime(2024, 2, 29, 23, 59, 59)


@pytest.mark.engine
@pytest.mark.long
def test_resumed_tomorrow_nothing_is_asked_again_and_a_changed_template_is_noticed(
    tmp_path, verifier, prompts_file
):
    dated = tmp_path / "dated"
    shutil.copytree(verifier, dated)
    (dated / "chat_template.jinja").write_text(DATED)
    run = tmp_path / "out-run"
    train = (
        "train", dated, "--data", prompts_file, "--limit", "6", "-o", tmp_path / "out",
        *tiny.TRAIN_ARGS, "--max-steps", "2", "--holdout", "0",
    )  # fmt: skip

    def keys() -> list[str]:
        lines = (run / "responses.jsonl").read_text().splitlines()
        return [json.loads(line).get("key") for line in lines]

    # Two days that never agree, wherever the test runs.
    tiny.cli(*train, env={"TZ": "Pacific/Kiritimati"})
    first = keys()
    assert len(first) == len(set(first)) == 7  # the log's head, and a response for each
    shutil.rmtree(tmp_path / "out")  # else the run is finished
    done = tiny.cli(*train, env={"TZ": "Etc/GMT+12"})
    assert "resuming at step 2" in done.stderr
    assert keys() == first
    shutil.rmtree(tmp_path / "out")

    edit_json(
        run / "run.json", started="2024-02-29T12:00:00"
    )  # what no option keeps: other prompts
    done = tiny.cli(*train, code=1)
    assert "on other token sequences" in done.stderr


def test_other_weights_under_the_same_name_are_told(tmp_path, monkeypatch):
    """The own model, fine-tuned into the same folder; a branch of the hub that moved."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    first = Verifier(str(folder)).weights_version()
    (folder / "config.json").write_text("{ }")
    assert Verifier(str(folder)).weights_version() == first
    os.utime(folder / "model.safetensors", (1, 1))  # a copy
    assert Verifier(str(folder)).weights_version() == first
    (folder / "model.safetensors").write_bytes(b"WEIGHTS")
    assert Verifier(str(folder)).weights_version() not in (first, "")
    cache = tmp_path / "models--org--model"
    (cache / "refs").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for commit in ("a" * 40, "b" * 40):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "refs" / "main").write_text(commit)
        assert Verifier("org/model").weights_version() == commit
    assert Verifier("org/none").weights_version() == ""


def test_responses_of_other_weights_are_not_taken(tmp_path):
    path = tmp_path / "responses.jsonl"
    for weights in (None, "one"):  # a log of before there was a version, then today's
        with ResponseLog(path, {"verifier": "m"} | ({"weights": weights} if weights else {})):
            pass
    path.unlink()
    with ResponseLog(path, {"verifier": "m", "weights": "one"}):
        pass
    with (
        pytest.raises(ValueError, match="weights was 'one', is 'two'"),
        ResponseLog(path, {"verifier": "m", "weights": "two"}),
    ):
        pass
