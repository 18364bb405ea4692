"""speculators 0.9 as ``trainers.py`` runs it: with the Python of its own environment, on a CPU.

    python -m venv ENV
    ENV/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    ENV/bin/pip install --no-deps speculators==0.9.0 hs-connectors==0.9.0
    ENV/bin/pip install "transformers>=5,<=5.19" "datasets>=4,<=5.1" "numpy<=2.4.6" "loguru<=0.7.3,>=0.7.2" \\
        aiohttp click httpx huggingface-hub "openai>=2" protobuf psutil pydantic pydantic-settings rich \\
        safetensors "tqdm<=4.70.1" "typer>=0.12"

(``--no-deps``, since it wants torchvision and torchaudio, which its trainer never imports, and a CUDA torch.)
Its model, losses, data set, packing, collate, trainer, optimizers and schedules are its own. As released the
trainer ends on a CPU with "Cannot access accelerator device when none is available". What is patched:

1. ``get_local_rank`` is "cpu" (an int means a CUDA device);
2. ``Trainer.device_type`` is "cpu" (it falls back to "cuda");
3. ``torch.accelerator.synchronize`` does nothing (its step timer calls it);
4. ``get_current_device`` of the checkpointer is "cpu";
5. no progress bar.

And what its own options choose: eager losses (the default is Triton), ``--draft-attn-impl sdpa`` (the default
is compiled flex attention), no loader processes. AdamW is not fused there; that is left as it is.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path
from statistics import median

warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import speculators.train.checkpointer as checkpointer  # noqa: E402
import speculators.train.trainer as trainer  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from speculators.losses import resolve_loss_config  # noqa: E402
from speculators.models.dflash import core  # noqa: E402
from speculators.train.cli import create_transformer_layer_config  # noqa: E402
from speculators.train.data import ArrowDataset, CollateFn  # noqa: E402
from speculators.train.dataloader import _setup_dataloader  # noqa: E402
from speculators.train.trainer import TrainerConfig  # noqa: E402

torch.accelerator.synchronize = lambda *args, **kwargs: None
checkpointer.get_current_device = lambda: "cpu"
trainer.get_local_rank = lambda: "cpu"
trainer.tqdm = lambda batches, **kwargs: batches
logging.getLogger("speculators").setLevel(logging.ERROR)
logging.getLogger("speculators.metrics").setLevel(logging.ERROR)

#: Its defaults are Muon, linear decay after 1 % of warm-up, D-PACE, causal layers with a window of 2048.
#: ``same`` has full layers and what ``make demo`` trains with.
RECIPES = {
    "default": {
        "lr": 1e-3, "optimizer": "muon", "muon_lr": 1e-3, "weight_decay": 0.01, "muon_weight_decay": 0.1,
        "scheduler_type": "linear",
    },
    "default, AdamW": {
        "lr": 1e-3, "optimizer": "adamw", "weight_decay": 0.01, "scheduler_type": "linear",
    },
    "same": {
        "lr": 1.5e-3, "optimizer": "adamw", "weight_decay": 0.0, "scheduler_type": "cosine",
        "scheduler_warmup_ratio": 0.04,
    },
}  # fmt: skip


class CpuTrainer(trainer.Trainer):
    def setup_trainer(self):
        self.device_type = "cpu"
        super().setup_trainer()


def make_model(setting: dict, full: bool):
    layers = setting["num_layers"]
    ids = torch.tensor(setting["draft_token_ids"])
    known = torch.zeros(setting["vocab_size"], dtype=torch.bool)
    known[ids] = True
    config = create_transformer_layer_config(
        setting["verifier"], layers, "qwen3", "silu", 2048, list(range(layers)) if full else []
    )
    return core.DFlashDraftModel.from_training_args(
        config,
        t2d=known,
        d2t=ids - torch.arange(len(ids)),
        draft_vocab_size=len(ids),
        block_size=setting["block_size"],
        verifier_name_or_path=setting["verifier"],
        target_layer_ids=setting["aux_layer_ids"],
        mask_token_id=setting["mask_token_id"],
        draft_attn_impl="sdpa",
    )


def one_batch(work: Path, setting: dict) -> None:
    """Logits, loss and gradients of the first conversation, with the weights and anchors of ours."""
    given = load_file(work / "batch-in.safetensors")
    anchors = given.pop("anchors")
    model = make_model(setting, full=True).train()
    _, unexpected = model.load_state_dict(given, strict=False)
    assert not unexpected, unexpected
    core.select_anchors = lambda *args: (anchors, torch.ones(len(anchors), dtype=torch.bool))
    rows = load_file(work / "data" / "hidden_states" / "hs_0.safetensors")
    states = rows["hidden_states"].float()
    length = len(states)
    mask = json.loads((work / "examples.json").read_text())["train"][0]["loss_mask"]
    item = {
        "hidden_states": states[:, :-1].flatten(1),
        "input_ids": rows["token_ids"],
        "verifier_last_hidden_states": states[:, -1],
        "loss_mask": torch.tensor(mask).bool(),
        "lengths": torch.tensor([length]),
        "position_ids": torch.arange(length),
    }
    collate = CollateFn(
        setting["row_tokens"], states.shape[-1], num_target_layers=states.shape[1] - 1,
        dtype=torch.float32,
    )  # fmt: skip
    batch = collate([item])
    batch.pop("error_records")
    with torch.no_grad():
        inputs = {k: v for k, v in batch.items() if k != "lengths"}
        _, logits, targets, valid, _ = model._backbone_forward(**inputs, max_anchors=len(anchors))
    _, loss, _ = model(
        **batch,
        loss_config=resolve_loss_config("ce", "eager"),
        max_anchors=len(anchors),
        per_position_loss_weight="dpace",
        dpace_alpha=0.5,
    )
    loss.backward()
    out = {f"grad.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    shape = (len(anchors), setting["block_size"], -1)
    out["logits"] = logits.view(shape)[:, 1:].contiguous()
    out["labels"] = targets.argmax(-1).view(shape[:2])[:, 1:].contiguous()
    out["valid"] = valid.view(shape[:2])[:, 1:].bool().contiguous()
    save_file({**out, "loss": loss.detach()}, work / "batch-theirs.safetensors")


def train(work: Path, setting: dict, recipe: str, steps: int, seed: int, out: Path) -> None:
    """Trains for some steps; prints CPU seconds, its loader's included."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    dtype = getattr(torch, setting["dtype"])
    model = make_model(setting, full=recipe == "same")
    data = ArrowDataset(
        max_len=setting["row_tokens"],
        datapath=str(work / "data"),
        on_missing="raise",
        hidden_states_dtype=dtype,
    )
    loader = _setup_dataloader(
        data,
        setting["row_tokens"],
        setting["hidden_size"],
        num_workers=0,
        num_target_layers=len(setting["aux_layer_ids"]),
        seed=seed,
    )
    train_kwargs, val_kwargs = core.DFlashDraftModel.get_trainer_kwargs(
        loss_fn="ce",
        loss_implementation="eager",
        max_anchors=setting["num_anchors"],
        per_position_loss_weight="dpace",
        dpace_alpha=0.5,
    )
    shutil.rmtree(out, ignore_errors=True)
    config = TrainerConfig(
        num_epochs=10**6,
        save_path=str(out),
        train_call_kwargs=train_kwargs,
        val_call_kwargs=val_kwargs,
        hidden_states_dtype=dtype,
        max_steps=steps,
        log_freq=10**6,
        **RECIPES[recipe],
    )
    run = CpuTrainer(model, config, loader, None)
    clock = [time.process_time()]
    epoch = 0
    while run.global_step < steps:
        run.train_epoch(epoch, step_callback=lambda: clock.append(time.process_time()))
        epoch += 1
    run.checkpointer.save_checkpoint(model, run.optimizers, 0)
    spent = [b - a for a, b in pairwise(clock)]
    report = {"cpu_seconds": clock[-1] - clock[0], "step_seconds": median(spent[2:] or spent)}
    print(json.dumps(report), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    work = Path(sys.argv[2])
    setting = json.loads((work / "setting.json").read_text())
    if sys.argv[1] == "batch":
        one_batch(work, setting)
    else:
        recipe, steps, seed, out = sys.argv[3:]
        train(work, setting, recipe, int(steps), int(seed), Path(out))


if __name__ == "__main__":
    main()
