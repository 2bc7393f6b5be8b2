"""The one training loop: mini CLIP, pruning and fine-tuning all go through ``fit``.

Set up (optimiser, mask, resume), then loop; nothing else trains in this project. Only this module
touches accelerate, so the same loop runs on a CPU, a GPU, or many under plain ``torchrun``.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..checks import Count, Factor, Positive, Seed, check
from ..device import PRECISIONS, memory_format, pick, seed_everything, use_bf16
from ..errors import LabError, OutOfTime, deadline
from ..files import writable_folder
from ..masks import Mask
from .processes import average, picture_seeds, same_buffers

SCHEDULES = ("constant", "cosine")
Batch = dict
Objective = Callable[[nn.Module, Batch], dict[str, Tensor]]


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Learning rates are AdamW's; steps are optimiser updates."""

    steps: Positive
    """Number of updates in all."""
    batch_size: Positive = 16
    """Images an update, over all processes."""
    lr: Factor = 1e-4
    """Peak learning rate."""
    backbone_lr: Factor = 1.0
    """Multiplier of ``lr`` for parameters under ``backbone.``."""
    weight_decay: Factor = 0.05
    """Of matrices and convolutions; vectors (BN, biases, scalars) have none."""
    schedule: Annotated[str, SCHEDULES] = "constant"
    """``"constant"`` or ``"cosine"`` (to zero at the last step)."""
    warmup: Count = 0
    """Steps of linear warm-up before the schedule."""
    clip_grad: Factor = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    precision: Annotated[str, PRECISIONS] = "auto"
    """``"bf16"`` (autocast), ``"fp32"``, or ``"auto"``: bf16 where the hardware has it."""
    seed: Seed = 0
    checkpoint_every: Positive = 200
    """Steps between checkpoints (with an ``out`` folder)."""

    def __post_init__(self) -> None:
        check(self)

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at ``step``: a function of the step alone."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class Fit:
    """What a training run leaves: losses a step, and how fast it went."""

    history: pd.DataFrame = field(repr=False)  # step, lr, loss and its parts, norm of the gradient
    images_per_second: float = float("nan")  # of the steps done in this process
    resumed_at: int = 0


def fit(
    model: nn.Module,
    objective: Objective,
    batches: Callable[[int], Iterator[Batch]],
    config: TrainConfig,
    out: Path | None = None,
    mask: Mask | None = None,
    at: Mapping[int, Callable[[nn.Module], None]] | None = None,
    device: str | torch.device = "auto",
    title: str = "train",
    side: int = 0,
) -> Fit:
    """Train ``model`` in place with AdamW on ``objective(model, batch)["loss"]``.

    Args:
        objective: returns a dict of scalar tensors; ``loss`` is minimised, the rest is logged.
        batches: ``batches(start)`` iterates over batches from step ``start`` on; what step s
            gives must depend on s alone, then resuming is exact.
        out: folder for checkpoints. If it holds one, training goes on from there: model,
            optimiser, random state and data position are restored.
        mask: held after every update.
        at: actions on the model before a step, by step. When resuming past one, it is called
            again before anything is loaded, so an action must be repeatable.
        side: of the pictures in pixels, where it is known: how maps lie best hangs on it.

    Losses also go to TensorBoard, where ``OPENTRANS_TENSORBOARD`` names a folder.

    Raises:
        LabError: the loss or the norm of its gradient is not finite (names the step), the config
            is unknown, or ``out`` cannot be written.
        OutOfTime: the time in ``OPENTRANS_DEADLINE`` has come (a checkpoint is in ``out``).
    """
    # --- set up
    out = None if out is None else writable_folder(out)
    seed_everything(config.seed)
    where = pick(device)
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)  # accelerate takes the current one
    AcceleratorState._reset_state(reset_partial_state=int(os.environ.get("WORLD_SIZE", 1)) == 1)
    accelerator = Accelerator(cpu=where.type == "cpu")
    layout = memory_format(accelerator.device, side)
    model.to(accelerator.device, memory_format=layout).train()
    optimizer = _optimizer(model, config, accelerator.device)
    if mask is not None:
        mask.apply(model)
        held = mask.keep(model, optimizer)
    actions, start, rows = dict(at or {}), 0, []
    last = _latest(out)
    if last is not None:
        start = int(last.name.split("-")[1])
        for step in sorted(s for s in actions if s < start):
            actions[step](model)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if last is not None:
        accelerator.load_state(str(last))
        rows = json.loads((last / "history.json").read_bytes())
    bf16 = use_bf16(config.precision, accelerator.device)
    until = deadline()

    # --- fit
    bar = tqdm(total=config.steps, initial=start, desc=title, unit="step", leave=False,
               disable=not accelerator.is_main_process)  # fmt: skip
    board = _board(title, start) if accelerator.is_main_process else None
    began, pending = time.perf_counter(), []
    stream = batches(start) if start < config.steps else iter(())
    for step in range(start, config.steps):
        if step in actions:
            actions[step](model)
            wrapped, optimizer = _frozen_apart(accelerator, model, optimizer)
        batch = next(stream)
        batch["seeds"] = picture_seeds(config.seed, step, len(batch["images"]))
        batch = to_device(_shard(batch, accelerator), accelerator.device)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * config.rate(step)
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16):
            losses = objective(wrapped, batch)
        accelerator.backward(losses["loss"])
        norm = accelerator.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pending.append({"step": step, "lr": config.lr * config.rate(step)}
                       | _detach(losses | {"gradient": norm}))  # fmt: skip

        done = step + 1
        last_one, late = done == config.steps, out is not None and _late(until, accelerator.device)
        save = out is not None and (last_one or late or done % config.checkpoint_every == 0)
        if done % 10 == 0 or last_one or save:
            rows += _log(pending, bar, began, (done - start) * config.batch_size, last, board)
            pending = []
        if save:
            last = _save(accelerator, out, done, rows)
        if late and not last_one:
            raise OutOfTime(f"{title}: stopped at step {done} of {config.steps}")
    bar.close()
    if board:
        board.close()
    accelerator.free_memory()
    if mask is not None:
        held.remove()
    same_buffers(model)
    seconds = time.perf_counter() - began
    speed = (config.steps - start) * config.batch_size / seconds if start < config.steps else 0.0
    return Fit(pd.DataFrame(rows), speed or float("nan"), start)


def _optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith("backbone."), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "peak": config.lr * (config.backbone_lr if in_backbone else 1.0),
                "weight_decay": config.weight_decay if matrix else 0.0,
            }
            for (in_backbone, matrix), parameters in sorted(groups.items())
        ],
        lr=config.lr,
        fused=device.type in ("cpu", "cuda"),
    )


def _frozen_apart(
    accelerator: Accelerator, model: nn.Module, optimizer: AcceleratedOptimizer
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Forget the optimiser's moments of what no longer trains, and wrap anew what does."""
    plain = optimizer.optimizer
    for parameter in [p for p in plain.state if not p.requires_grad]:
        del plain.state[parameter]
    accelerator.free_memory()  # several processes would wait for gradients that do not come
    return accelerator.prepare(model, plain)


def _shard(batch: Batch, accelerator: Accelerator) -> Batch:
    """This process's share of the global batch (vocabularies, which are tuples, stay whole)."""
    if accelerator.num_processes == 1:
        return batch
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    return {k: v[mine] if isinstance(v, (Tensor, list)) else v for k, v in batch.items()}


def to_device(value, device: torch.device):
    """A batch, or a part of one, with its tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    return [to_device(v, device) for v in value] if isinstance(value, list) else value


def _detach(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in losses.items()}


def _log(
    pending: list[dict], bar: tqdm, began: float, images: int, last: Path | None, board
) -> list[dict]:
    """Turn logged tensors into numbers, the means over all processes; here, every few steps, the
    device is waited for."""
    rows = [
        {k: float(average(v)) if isinstance(v, Tensor) else v for k, v in row.items()}
        for row in pending
    ]
    for row in rows:
        if wrong := [n for n in ("loss", "gradient") if not math.isfinite(row[n])]:
            raise LabError(
                f"the {wrong[0]} is {row[wrong[0]]} at step {row['step']}: lower the learning "
                f"rate, or set precision='fp32'; the last good checkpoint: {last or 'none'}"
            )
    for row in rows if board else ():
        for name in row.keys() - {"step"}:
            board.add_scalar(name, row[name], row["step"])
    if rows:
        speed = images / (time.perf_counter() - began)
        bar.set_postfix_str(f"loss {rows[-1]['loss']:.3f}, {speed:.0f} images/s", refresh=False)
    bar.update(len(rows))
    return rows


def _board(title: str, start: int):
    """TensorBoard's writer, where ``OPENTRANS_TENSORBOARD`` names a folder for it."""
    if not (folder := os.environ.get("OPENTRANS_TENSORBOARD")):
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise LabError(
            "OPENTRANS_TENSORBOARD is set, but TensorBoard is missing: pip install tensorboard"
        ) from error
    folder = writable_folder(folder, "OPENTRANS_TENSORBOARD")
    return SummaryWriter(folder / re.sub(r"[^\w.]+", "-", title), purge_step=start)


def _late(until: float, device: torch.device) -> bool:
    """Whether the deadline has come for any process: all of them must stop together."""
    if math.isinf(until):
        return False
    return bool(average(torch.tensor(float(time.time() > until), device=device)) > 0)


def _latest(out: Path | None) -> Path | None:
    found = list(Path(out).glob("step-*")) if out is not None else []
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def _save(accelerator: Accelerator, out: Path, step: int, rows: list[dict]) -> Path:
    """Write ``out/step-N`` whole or not at all, then drop the older ones."""
    accelerator.wait_for_everyone()
    final, partial = Path(out) / f"step-{step}", Path(out) / f".partial-{step}"
    accelerator.save_state(str(partial))  # each process adds its own random state
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "history.json").write_text(json.dumps(rows), encoding="utf-8")
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        for old in Path(out).glob("step-*"):
            if old != final:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final
