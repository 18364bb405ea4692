"""``register()``, the ``vllm.general_plugins`` entry point.

vLLM calls it in every process, before it resolves model or worker classes. It must be cheap and
must not import vLLM's runners (that would initialise devices in the wrong process), so the seams
are patched when vLLM itself imports their modules.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.vllm_dflash")
_registered = False


def register() -> None:
    """Puts our dflash proposer, speculator and drafter class in place of vLLM's.

    Idempotent. Never raises: a failure is logged and stock vLLM stays as it is, because an
    exception here would end every vLLM process of the environment, whatever method it serves.
    """
    global _registered
    if _registered:
        return
    _registered = True
    try:
        from vllm_dflash import __version__
        from vllm_dflash.options import ENV_DISABLE, plugin_disabled

        if plugin_disabled():
            logger.info("vllm-dflash %s is switched off by %s", __version__, ENV_DISABLE)
            return
        from vllm_dflash.serving.patching import install

        missing = install()
        if missing:
            logger.warning(
                "vllm-dflash %s leaves stock dflash in place: this vLLM lacks %s",
                __version__,
                ", ".join(missing),
            )
        else:
            logger.info("vllm-dflash %s registered for method dflash", __version__)
    except Exception:
        logger.exception("vllm-dflash could not register; stock vLLM is unchanged")
