"""The verifier as the user gave it, and everything that is loaded from it.

Every command loads the same model in several places: its config, its tokenizer and chat template, its
generation config, and the engine itself. They must agree on what is loaded (revision, tokenizer, code of
the model's own) and with the server that the drafter is for (chat template, reasoning parser).
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_dflash.settings import option

#: What vLLM takes for the text of a template, not for the name of a file.
_TEMPLATE_CHARACTERS = "{}\n"
#: Parts of a file of weights, and bytes of each, that tell it from another of its size: all of a shard takes
#: seconds to read, and its time is another one where it was copied.
_SAMPLES, _SAMPLE_BYTES = 32, 1 << 15
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
#: Beginnings of model types that vLLM tokenizes or renders with code of its own. Of Mistral's only those
#: with the official tokenizer files, which vLLM looks for.
_OWN_TYPES = ("deepseek_v32", "deepseek_v4", "kimi_k3", "kimi_audio", "inkling", "gpt_oss")
_OWN_FAMILY = "stral"


@dataclass(frozen=True)
class Verifier:
    """A model and how it is loaded and served; the fields are named as vLLM's options are.

    Attributes:
        model: folder or hub name.
        chat_template: as for ``vllm serve``; kept as the text.
        revision: None for the default branch.
        tokenizer: folder or hub name.
        tokenizer_revision: of another tokenizer; None for ``revision``.
        tokenizer_mode: as vLLM's engine argument.

    Raises:
        ValueError: an option cannot mean anything.
    """

    model: str
    chat_template: str | None = option(
        None, "The server's chat template: a file, or the text itself.", panel="Data"
    )
    reasoning_parser: str | None = option(
        None,
        "The server's, as vLLM's: splits thinking from the answer in replies that become history. "
        "Default: at the markers that tokenizer and template show.",
        panel="Data",
    )
    trust_remote_code: bool = option(
        False, "Let Python code that comes with the verifier run.", panel="Engine"
    )
    revision: str | None = option(
        None, "Branch, tag or commit of a verifier named on the Hub.", panel="Engine"
    )
    tokenizer: str | None = option(None, "Another tokenizer than the verifier's.", panel="Engine")
    tokenizer_revision: str | None = None
    tokenizer_mode: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.trust_remote_code, bool):
            raise ValueError(f"trust_remote_code is {self.trust_remote_code!r}; give true or false")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("model", "trust_remote_code") and not isinstance(
                value, str | None
            ):
                raise ValueError(f"{field.name} is {value!r}; give text")
        if self.chat_template is not None:
            object.__setattr__(self, "chat_template", _template_text(self.chat_template))

    def __str__(self) -> str:
        return self.model

    def __fspath__(self) -> str:
        return self.model

    @classmethod
    def of(cls, verifier: Verifier | str | Path) -> Verifier:
        """The verifier itself, or that of a plain path or hub name."""
        return verifier if isinstance(verifier, cls) else cls(str(verifier))

    @classmethod
    def from_options(
        cls, model: str, engine_args: Mapping[str, Any], **options: Any
    ) -> tuple[Verifier, dict[str, Any]]:
        """The verifier of a command line, and the engine arguments that are left.

        An option of the verifier may also stand among the engine arguments, which then win.
        """
        names = {field.name for field in fields(cls)} - {"model"}
        given = {name: value for name, value in engine_args.items() if name in names}
        rest = {name: value for name, value in engine_args.items() if name not in names}
        return cls(model, **(options | given)), rest

    # -- what is loaded --------------------------------------------------------------------------

    def load_config(self) -> Any:
        """The transformers config.

        Raises:
            ValueError: there is none at that path or name, or it needs code that may not run.
        """
        from transformers import AutoConfig

        path = Path(self.model)
        looks_local = path.is_absolute() or self.model.startswith(".") or self.model.count("/") != 1
        if path.exists():
            if not (path / "config.json").is_file():
                raise ValueError(f"verifier {self} has no config.json; it is not a model folder")
        elif looks_local:
            raise ValueError(f"verifier {self} does not exist: no such folder")
        try:
            return AutoConfig.from_pretrained(
                self.model, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        except Exception as error:
            # Whatever a file that is no model's configuration leads transformers into.
            raise self._unreadable(f"verifier {self}", error) from error

    def load_tokenizer(self) -> Any:
        """The tokenizer, with the server's chat template.

        It is vLLM's own for verifiers whose chats the server may render without a template
        (:func:`~vllm_dflash.serving.frontend.prompts.served_tokenizer`).

        Raises:
            ValueError: there is none, or it needs code that may not run.
        """
        from transformers import AutoTokenizer

        name = self.tokenizer or self.model
        if self._asks_vllm():
            from vllm_dflash.serving.frontend.prompts import load_served_tokenizer

            try:
                served = load_served_tokenizer(self.engine_args(), self.chat_template)
            except (OSError, ValueError, ImportError, RuntimeError) as error:
                raise self._unreadable(f"the tokenizer of {name}", error) from error
            return self.with_template(served)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name,
                revision=self.tokenizer_revision or self.revision,  # as vLLM does
                trust_remote_code=self.trust_remote_code,
            )
        except (OSError, ValueError, ImportError) as error:
            raise self._unreadable(f"the tokenizer of {name}", error) from error
        return self.with_template(tokenizer)

    def with_template(self, tokenizer: Any) -> Any:
        """The tokenizer itself (of transformers or of an engine), its template that of the server."""
        if hasattr(tokenizer, "server_prompts"):
            return tokenizer
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        elif hasattr(tokenizer, "chat_template") and (own := self._vllms_template(tokenizer)):
            tokenizer.chat_template = own
        return tokenizer

    def load_generation_config(self) -> dict[str, Any] | None:
        """``generation_config.json``, None where the model has none."""
        from transformers import GenerationConfig

        try:
            return GenerationConfig.from_pretrained(self.model, revision=self.revision).to_dict()
        except OSError:
            return None

    def weights_version(self) -> str:
        """Tells these weights from others that were or will be under the same name: the commit in the hub's
        cache, else a digest of names, sizes and samples of the files. Empty where they are elsewhere."""
        path = Path(self.model)
        if path.exists():
            digest = hashlib.sha256()
            for file in [path] if path.is_file() else sorted(path.iterdir()):
                if file.suffix in _WEIGHT_SUFFIXES:
                    _sample(file, digest)
            return digest.hexdigest()[:16]
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(
                snapshot_download(self.model, revision=self.revision, local_files_only=True)
            ).name
        except LocalEntryNotFoundError:
            return ""

    def engine_args(self) -> dict[str, Any]:
        """The part of vLLM's ``EngineArgs`` that says what is loaded."""
        names = (
            "revision", "tokenizer", "tokenizer_revision", "tokenizer_mode", "trust_remote_code",
        )  # fmt: skip
        return {"model": self.model} | {n: v for n in names if (v := getattr(self, n))}

    def identity(self) -> dict[str, Any]:
        """What decides a run's tokens and features, for JSON; what is not given is left out."""
        out = {o.name: v for o in fields(self) if (v := getattr(self, o.name))}
        out["verifier"] = out.pop("model")
        if self.chat_template is not None:
            digest = hashlib.sha256(self.chat_template.encode("utf-8", "replace")).hexdigest()
            out["chat_template"] = f"sha256 {digest[:16]}"
        return out

    # -- helpers ---------------------------------------------------------------------------------

    def _unreadable(self, what: str, error: Exception) -> ValueError:
        if "trust_remote_code" in str(error) and not self.trust_remote_code:
            return ValueError(
                f"{what} needs Python code that comes with the model; read it, and give "
                "--trust-remote-code to let it run"
            )
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return ValueError(f"{what} cannot be read: {first}")

    def _asks_vllm(self) -> bool:
        """Whether only vLLM knows how chats are rendered: its tokenizer may not be that of transformers."""
        if importlib.util.find_spec("vllm") is None:
            return False
        if self.tokenizer_mode not in (None, "auto"):
            return True
        config = self._config()
        model_type = "" if config is None else str(config.model_type)
        return model_type.startswith(_OWN_TYPES) or _OWN_FAMILY in model_type

    def _config(self) -> Any:
        """The config; None where it cannot be read: who needs it says what is wrong with it."""
        try:
            return self.load_config()
        except ValueError:
            return None

    def _vllms_template(self, tokenizer: Any) -> Any:
        """The template that vLLM takes where it may be another than the tokenizer's; else None."""
        if importlib.util.find_spec("vllm") is None or (config := self._config()) is None:
            return None
        has_processor = config.get_text_config() is not config
        if tokenizer.chat_template is not None and not has_processor:
            return None
        from vllm_dflash.serving.frontend.chat import served_template

        where = SimpleNamespace(
            model=self.model,
            tokenizer=self.tokenizer or self.model,
            tokenizer_revision=self.tokenizer_revision or self.revision,
            code_revision=None,
            trust_remote_code=self.trust_remote_code,
            hf_config=config,
        )
        return served_template(tokenizer, where)


def _template_text(given: str) -> str:
    """The text of a chat template as vLLM finds it: a file, the text itself, or one of vLLM's own."""
    if any(character in given for character in _TEMPLATE_CHARACTERS):
        return given
    candidates = [Path(given).expanduser()]
    vllm = importlib.util.find_spec("vllm")
    if vllm is not None and vllm.origin is not None:
        own = Path(vllm.origin).parent / "transformers_utils" / "chat_templates"
        candidates.append(own / given)
    for path in candidates:
        if path.is_file():
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"--chat-template {given} cannot be read: {error}") from error
            if text.strip():
                return text
            raise ValueError(f"--chat-template {given} is empty")
    raise ValueError(
        f"--chat-template {given!r}: there is no such file, and it is not the text of a template"
    )


def _sample(file: Path, digest: Any) -> None:
    size = file.stat().st_size
    digest.update(f"{file.name} {size}\n".encode())
    with file.open("rb") as data:
        for part in range(_SAMPLES):
            data.seek(part * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
            digest.update(data.read(_SAMPLE_BYTES))
