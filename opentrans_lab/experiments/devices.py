"""One fine-tuning on several devices, from inside a notebook: torchrun on the one training loop.

The notebook's process starts ``torchrun`` as a subprocess, shows its progress, and gets what
``fine_tune`` would have returned. Each process works on its part of every batch; the losses are the
same as those of one process up to rounding (see ``processes``), but batch normalisation in train
mode sees each part by itself. The processes find each other by a file and talk over the loopback
alone; torchrun's usual meeting place would listen on every network of the machine.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from ..device import pick
from ..errors import LabError, OutOfTime
from ..files import atomic_path
from ..pruning import PruneConfig
from ..train import together
from .lab import Lab
from .recipe import Recipe, fine_tune
from .starts import row_start

ENDS = {"LabError": LabError, "OutOfTime": OutOfTime}
PARENT = "OPENTRANS_PARENT"  # the process that waits for the result
MEETING = "OPENTRANS_MEETING"  # the file by which the processes find each other


def spread(lab: Lab, recipe: Recipe, config: PruneConfig, folder: Path) -> dict:
    """``fine_tune`` on ``lab.devices`` devices of this machine.

    Raises:
        LabError, OutOfTime: as ``fine_tune``; or the batch or the machine cannot be shared so.
    """
    check_shares(lab, recipe)
    count, device = lab.devices, pick(lab.device)
    if device.type == "cuda" and count > torch.cuda.device_count():
        raise LabError(
            f"devices={count}, but this process sees {torch.cuda.device_count()} GPUs (the workers "
            "of a grid share them out, and CUDA_VISIBLE_DEVICES names them)"
        )
    row_start(lab, recipe.row, config)  # pruned and distilled once, before anybody asks for it
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of this process, which only waits from here on
    end = folder / "end.json"
    end.unlink(missing_ok=True)
    job = {"lab": asdict(lab), "recipe": asdict(recipe), "config": asdict(config)}
    with atomic_path(folder / "job.json") as path:
        path.write_text(json.dumps(job), encoding="utf-8")
    threads = max(1, torch.get_num_threads() // count)
    about = {"OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "2", PARENT: str(os.getpid())}
    with tempfile.TemporaryDirectory(prefix="opentrans-") as meeting:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}"]
        command += ["--rdzv-backend=c10d", "--rdzv-conf=store_type=file"]
        command += [f"--rdzv-endpoint={meeting}/torchrun", "-m", __name__, str(folder)]
        about |= {MEETING: f"{meeting}/processes"}
        tail = _show(command, _loopback() | os.environ | about)
    ended = json.loads(end.read_bytes()) if end.exists() else {"kind": None, "message": tail}
    end.unlink(missing_ok=True)
    if ended["kind"] == "result":
        return ended["result"]
    raise ENDS.get(ended["kind"], RuntimeError)(ended["message"])


def check_shares(lab: Lab, recipe: Recipe) -> None:
    """Refuse a batch that ``lab.devices`` cannot share; plans ask, too."""
    size, count = recipe.batch_size, lab.devices
    least = 1 if recipe.norm == "eval" or count == 1 else 2
    if size % count == 0 and size >= least * count:
        return
    fits = max(k for k in range(1, count + 1) if size % k == 0 and size >= min(k, 2) * k)
    why = ", for batch normalisation needs two pictures on each" if size % count == 0 else ""
    raise LabError(
        f"batch_size={size} cannot be shared by devices={count}{why}; use devices={fits}, or a "
        f"larger multiple of {count}" + (' (or norm="eval")' if why else "")
    )


def _loopback() -> dict[str, str]:
    """Environment in which torchrun and its processes open no port to the network."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    found = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return found | {f"{kind}_SOCKET_IFNAME": names[0] for kind in ("GLOO", "NCCL") if names}


def _show(command: list[str], environment: dict[str, str]) -> str:
    """Run a command, pass on what it prints as it comes, and return the end of that."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    told = b""
    try:
        while piece := os.read(process.stdout.fileno(), 4096):
            told = (told + piece)[-4000:]
            sys.stderr.write(piece.decode(errors="replace"))
            sys.stderr.flush()
    finally:
        process.terminate()  # nothing to do where it has ended
        process.wait()
    return told.decode(errors="replace")


def main(folder: Path) -> int:
    """One of the processes that torchrun starts."""
    threading.Thread(target=_die_with, args=(int(os.environ[PARENT]),), daemon=True).start()
    job = json.loads((folder / "job.json").read_bytes())
    lab = replace(Lab(**job["lab"]), devices=1)
    backend = "gloo"
    if pick(lab.device).type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        lab, backend = replace(lab, device="cuda"), "nccl"
    rank, count = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    try:
        meeting = f"file://{os.environ[MEETING]}"
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=count)
        result = fine_tune(lab, Recipe(**job["recipe"]), PruneConfig(**job["config"]), folder)
        _tell(folder, {"kind": "result", "result": result})
    except (LabError, OutOfTime) as error:
        _tell(folder, {"kind": type(error).__name__, "message": str(error)}, always=True)
        return int(isinstance(error, LabError))  # then torchrun ends the others, which may wait
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _tell(folder: Path, end: dict, always: bool = False) -> None:
    if always or together()[0] == 0:
        with atomic_path(folder / "end.json") as path:
            path.write_text(json.dumps(end), encoding="utf-8")


def _die_with(parent: int) -> None:
    """A killed notebook cannot end what it started: nobody then waits for the result."""
    with suppress(psutil.NoSuchProcess):
        notebook = psutil.Process(parent)
        while notebook.is_running() and notebook.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
