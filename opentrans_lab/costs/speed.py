"""What a training step really costs when layers are frozen: time, memory and energy, measured.

Beside it stand the savings on paper. Freezing a layer in the middle spares the gradient of its
weight and nothing else; the gradient that passes through it is needed all the same. How much of a
saving on paper is one in seconds depends on the machine.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from tqdm.auto import tqdm

from ..checks import Positive, checked
from ..device import PRECISIONS, memory_format, pick, use_bf16
from ..finetuning import freeze, unfreeze
from ..train import Batch, to_device
from .cost import training_cost

COLUMNS = ("step_s", "images_per_second", "memory_MB", "energy_J")


@checked
def step_costs(
    model: nn.Module,
    objective: Callable[[Batch], dict[str, Tensor]],
    batch: Batch,
    frozen: Mapping[str, Sequence[str]],
    repeats: Positive = 5,
    device: str | torch.device = "auto",
    precision: Annotated[str, PRECISIONS] = "auto",
) -> pd.DataFrame:
    """Time whole training steps (forward, backward, AdamW) on one batch, selection by selection.

    The selections take turns, ``repeats`` times, so that a machine whose speed drifts slows all of
    them. ``model`` goes to the device and is trained a little; what ``freeze`` has frozen in it
    trains again afterwards.

    Args:
        objective: of a batch, returns ``loss``.
        frozen: names of layers or stages by selection, as ``freeze`` takes them; the first one is
            what the others are held against.
        precision: see ``train.TrainConfig``.

    Returns:
        One row a selection: select, trainable (weights), step_s (median), images_per_second,
        step_saving (percent of the first selection's step, median over the turns), memory_MB (on a
        GPU the peak of a step, else what forward keeps for backward, 10^6 bytes), energy_J of a
        step (NaN where no NVIDIA GPU tells it through nvidia-ml-py).
    """
    device = pick(device)
    layout = memory_format(device, batch["images"].shape[-1])
    model.to(device, memory_format=layout).train()
    batch = to_device(batch, device)
    bf16 = use_bf16(precision, device)
    optimizers, taken = {}, {select: [] for select in frozen}
    for turn in tqdm(range(repeats + 1), desc="steps", leave=False):  # the first one warms up
        order = list(frozen)
        for select in order[turn % len(order) :] + order[: turn % len(order)]:
            unfreeze(model)
            freeze(model, frozen[select])
            free = [p for p in model.parameters() if p.requires_grad]
            if turn == 0:
                optimizers[select] = torch.optim.AdamW(free, 1e-5, fused=device.type != "mps")
            measured = _step(model, objective, batch, optimizers[select], device, bf16)
            images = len(batch["images"]) / measured[0]
            if turn:
                taken[select].append((measured[0], images, *measured[1:]))
    unfreeze(model)
    first = np.array([line[0] for line in taken[next(iter(frozen))]])
    rows = []
    for select, lines in taken.items():
        seconds = np.array([line[0] for line in lines])
        median = dict(zip(COLUMNS, np.median(lines, axis=0), strict=True))
        free = sum(p.numel() for group in optimizers[select].param_groups for p in group["params"])
        saving = 100 * float(np.median(1 - seconds / first))
        rows.append({"select": select, "trainable": free, **median, "step_saving": saving})
    return pd.DataFrame(rows)


def savings(
    framework: str,
    frozen: Mapping[str, Sequence[str]],
    measured: pd.DataFrame,
    **about,
) -> pd.DataFrame:
    """``measured`` beside what the two formulas of ``training_cost`` promise, in percent of a step.

    ``paper_saving`` is the paper's formula, which leaves the head's backward pass out;
    ``full_saving`` counts it. Both are of a step after the freezing.

    Args:
        about: of the model, as ``training_cost`` takes it (size, mask, backbone, preset).
    """
    paper = training_cost(framework, frozen=frozen, images=1, warmup=0, **about)
    promised = {
        f"{name}_saving": (100 * (1 - paper[name] / paper[name].iloc[0])).to_numpy()
        for name in ("paper", "full")
    }
    return measured.assign(layers=paper["frozen"].to_numpy(), **promised)


def _step(
    model: nn.Module,
    objective: Callable[[Batch], dict[str, Tensor]],
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    bf16: bool,
) -> tuple[float, float, float]:
    """Seconds, megabytes and joules of one step."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    before = _joules(device)
    began = time.perf_counter()
    cast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    with cast, nullcontext() if cuda else kept_for_backward(model) as kept:
        loss = objective(batch)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    energy = _joules(device) - before
    memory = torch.cuda.max_memory_allocated(device) if cuda else kept[0]
    return seconds, memory / 1e6, energy


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[list[int]]:
    """Counts what forward passes of ``model`` within it keep for backward, its weights aside.

    The list holds the bytes when the block has ended.
    """
    own, found = {p.untyped_storage()._cdata for p in model.parameters()}, []
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no other takes a storage's place

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor.detach()

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found
    found.append(sum(storage.nbytes() for key, storage in kept.items() if key not in own))
    kept.clear()  # backward frees them one by one


def _joules(device: torch.device) -> float:
    """Energy that the GPU has used so far, NaN where nobody tells."""
    if device.type == "cuda" and find_spec("pynvml"):
        import pynvml

        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        except pynvml.NVMLError:
            pass  # an older GPU, or a container that hides it
    return float("nan")
