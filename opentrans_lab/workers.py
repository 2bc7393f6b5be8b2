"""Jobs on the workers of dask.distributed: of this machine, or of a cluster's scheduler.

Our own scheduler listens on the loopback only, under TLS with keys that live as long as it does:
who can talk to a scheduler can run code.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dask
from distributed import (
    Client,
    KilledWorker,
    Nanny,
    Scheduler,
    Security,
    SpecCluster,
    as_completed,
    get_worker,
)

from .errors import LabError
from .grids import Job, complete
from .job import RunResult, run_job
from .results import run_dir, runs_root

LOOPBACK = "127.0.0.1"
TOPIC = "opentrans-lab"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
Started = Callable[[int, str], None]
Ended = Callable[[int, RunResult], None]


def run_on_workers(
    jobs: dict[int, Job],
    since: float | None,
    until: float | None,
    workers: int,
    scheduler: str,
    started: Started,
    ended: Ended,
) -> None:
    """Run ``jobs`` in their order, as many at a time as there are workers.

    A job whose worker dies is run once more, by another; what has finished lies on disk already.

    Args:
        since, until: as for ``job.run_job``.
        started: told the job's key and its worker when it begins. ended: its key and result.

    Raises:
        LabError: no scheduler answers at the address.
    """
    waiting = dict(jobs)
    with _client(workers, scheduler) as client:
        client.subscribe_topic(TOPIC, lambda event: started(*event[1]))
        running = as_completed(with_results=True, raise_errors=False)
        keys = {}

        def fill() -> None:
            slots = max(1, sum(client.nthreads().values()))
            while waiting and running.count() < slots:
                i, job = next(iter(waiting.items()))
                if (job.after_all and running.count()) or (until and time.time() >= until):
                    return
                del waiting[i]
                what = (i, _absolute(job), since, until, os.getcwd(), str(runs_root()))
                future = client.submit(_work, *what, pure=False)
                keys[future.key] = i
                running.add(future)

        fill()
        for future, result in running:
            i = keys[future.key]
            ended(i, result if future.status == "finished" else _lost(jobs[i], result))
            future.release()  # or dask would run it again if its worker died later
            fill()


def _work(
    i: int, job: Job, since: float | None, until: float | None, cwd: str, runs: str
) -> RunResult:
    """In the worker: the job, where the caller would have run it."""
    worker = get_worker()
    worker.log_event(TOPIC, (i, f" on worker {worker.name}"))
    os.environ["OPENTRANS_RUNS"] = runs
    os.chdir(cwd)
    return run_job(job, since, until)


def _absolute(job: Job) -> Job:
    return job._replace(notebook=Path(job.notebook).resolve())


def _lost(job: Job, error: BaseException | tuple) -> RunResult:
    """A job whose worker died each time, or which the runner itself could not run."""
    error = error[1] if isinstance(error, tuple) else error
    folder = run_dir(job.notebook.stem, complete(*job[:2]))
    if isinstance(error, KilledWorker):
        said = f"{job.notebook.name}: its worker died twice, perhaps for want of memory"
    else:
        said = f"{job.notebook.name}: {type(error).__name__}: {error}"
    return RunResult(job, folder, "failed", error=said, users=isinstance(error, LabError))


@contextmanager
def _client(workers: int, scheduler: str) -> Iterator[Client]:
    if scheduler:
        try:
            client = Client(scheduler, timeout=10)
        except (OSError, ValueError) as error:
            raise LabError(f"no dask scheduler answers at {scheduler} ({error})") from error
        with client:
            yield client
        return
    with dask.config.set({"distributed.scheduler.allowed-failures": 1}):
        security = Security.temporary()
        cluster = SpecCluster(
            scheduler={
                "cls": Scheduler,
                "options": {
                    "host": LOOPBACK,
                    "dashboard": False,
                    "dashboard_address": f"{LOOPBACK}:0",  # any free port: two grids may run
                    "security": security,
                },
            },
            workers={
                i: {"cls": Nanny, "options": _options(i, workers, security)} for i in range(workers)
            },
            security=security,
            silence_logs=logging.CRITICAL,  # what matters of a worker's end is said by us
        )
        with cluster, Client(cluster) as client:
            try:
                yield client
            except BaseException:  # Ctrl-C: closing would wait for the notebooks to end
                for nanny in cluster.workers.values():
                    cluster.sync(nanny.kill, timeout=1)
                raise


def _options(i: int, workers: int, security: Security) -> dict:
    return {
        "nthreads": 1,
        "memory_limit": 0,  # what uses memory is the kernel, which dask does not see
        "host": LOOPBACK,
        "dashboard": False,
        "security": security,
        "silence_logs": logging.CRITICAL,
        "env": share(i, workers),
    }


def share(i: int, workers: int) -> dict[str, str]:
    """Environment of worker ``i`` of ``workers``: its GPUs, or its share of the cores.

    Several GPUs for each where there are more than workers, and several workers for each where
    there are fewer. ``CUDA_VISIBLE_DEVICES`` and ``OMP_NUM_THREADS`` of the user are respected.
    """
    import torch

    cores = max(1, len(os.sched_getaffinity(0)) // workers)
    found = {name: os.environ.get(name, str(cores)) for name in THREADS}
    gpus = [str(k) for k in range(torch.cuda.device_count())]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        gpus = visible.split(",")[: len(gpus)]
    if gpus:
        mine = gpus[i * len(gpus) // workers : (i + 1) * len(gpus) // workers]
        few = len(gpus) < workers
        found["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)] if few else ",".join(mine)
    return found
