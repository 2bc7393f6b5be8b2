"""Jobs on the workers of dask.distributed: of this machine, or of a cluster's scheduler.

Our own scheduler listens on the loopback only, under TLS with keys that live as long as it does:
who can talk to a scheduler can run code. On a scheduler of someone else's, workers should have one
thread each, since a job sets its process's folder and variables.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from uuid import uuid4

import dask
from dask.system import CPU_COUNT
from distributed import (
    Client,
    Future,
    KilledWorker,
    Nanny,
    Scheduler,
    Security,
    SpecCluster,
    Worker,
    get_worker,
)
from tqdm.auto import tqdm

from ..errors import LabError
from ..files import DATA_VARIABLES
from ..records import runs_root
from .grids import Job
from .job import RunResult, run_job

LOOPBACK = "127.0.0.1"
OURS = {  # of the scheduler that we start
    "distributed.scheduler.allowed-failures": 1,  # a job whose worker dies is run once more
    "distributed.scheduler.http.routes": [],  # its pages would be in clear, for all users
    "distributed.worker.http.routes": [],
}
POLL = 2  # seconds between looks for workers that have joined
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
    """Run ``jobs`` in their order, as many at a time as there are workers, whenever they join.

    A job whose worker dies is run once more, by another; what has finished lies on disk already.
    When this process ends before its jobs, so do their kernels.

    Args:
        since, until: as for ``job.run_job``.
        started: told the job's key and its worker when it begins. ended: its key and result.

    Raises:
        LabError: no scheduler answers at the address, or no longer.
    """
    waiting, running = dict(jobs), {}
    topic = f"opentrans-lab-{uuid4()}"  # another grid may run on the same scheduler
    ends: Queue[Future] = Queue()
    told = {k: v for k, v in os.environ.items() if _told(k)} | {"OPENTRANS_RUNS": str(runs_root())}

    with _client(workers, scheduler) as client:
        client.subscribe_topic(topic, lambda event: started(*event[1]))

        def fill() -> None:
            slots = sum(client.nthreads().values())
            while waiting and len(running) < slots:
                i, job = next(iter(waiting.items()))
                if (job.after_all and running) or late():
                    return
                del waiting[i]
                job = job._replace(notebook=Path(job.notebook).resolve())
                future = client.submit(
                    _work, topic, i, job, since, until, os.getcwd(), told, pure=False
                )
                running[future] = i
                future.add_done_callback(ends.put)

        def late() -> bool:
            return until is not None and time.time() >= until

        if not client.nthreads():
            tqdm.write(f"waiting for a worker at {client.scheduler.address} …")
        while running or (waiting and not late()):
            with _answering(scheduler):
                fill()
            try:
                future = ends.get(timeout=POLL)
            except Empty:
                continue
            i = running.pop(future)
            with _answering(scheduler):
                if future.status in ("cancelled", "lost"):
                    raise OSError("it has forgotten this grid")
                fine = future.status == "finished"
                result = future.result() if fine else _lost(jobs[i], future.exception())
            ended(i, result)
            future.release()  # or dask would run it again if its worker died later


@contextmanager
def _answering(scheduler: str) -> Iterator[None]:
    """A scheduler that dies under a grid is said to have done so, with what to do."""
    try:
        yield
    except OSError as error:
        if not scheduler:  # our own is a part of this process
            raise
        for name in ("distributed", "distributed.client"):  # which would bury it in tracebacks
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        raise LabError(
            f"the scheduler at {scheduler} no longer answers ({error}); start it and its workers "
            "again and run the same command, which goes on after what has finished"
        ) from error


def _told(variable: str) -> bool:
    """Whether workers are to have this variable as it is here, or not at all where it is not."""
    return variable.startswith("OPENTRANS_") or variable in DATA_VARIABLES


def _work(
    topic: str,
    i: int,
    job: Job,
    since: float | None,
    until: float | None,
    cwd: str,
    told: dict[str, str],
) -> RunResult:
    """In the worker: the job, as the caller would have run it."""
    worker = get_worker()
    key = worker.get_current_task()
    worker.log_event(topic, (i, f" on worker {worker.name}"))
    for name in filter(_told, [*os.environ]):
        os.environ.pop(name)
    os.environ.update(told)
    os.chdir(cwd)
    return run_job(job, since, until, lambda: _cancelled(worker, key))


def _cancelled(worker: Worker, key: str) -> bool:
    """Whether nobody waits for a task that is being run: its client has ended or was lost."""
    task = worker.state.tasks.get(key)
    return task is None or task.state != "executing"


def _lost(job: Job, error: BaseException) -> RunResult:
    """A job whose worker died each time, or which the runner itself could not run."""
    if isinstance(error, KilledWorker):
        times = error.allowed_failures + 1
        said = f"its worker died {times} times, perhaps for want of memory"
    else:
        said = f"{type(error).__name__}: {error}"
    users = isinstance(error, LabError)
    return RunResult(job, job.folder, "failed", error=f"{job.notebook.name}: {said}", users=users)


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
    with dask.config.set(OURS):
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

    cores = max(1, CPU_COUNT // workers)
    found = {name: os.environ.get(name, str(cores)) for name in THREADS}
    gpus = [str(k) for k in range(torch.cuda.device_count())]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        gpus = visible.split(",")[: len(gpus)]
    if gpus:
        mine = gpus[i * len(gpus) // workers : (i + 1) * len(gpus) // workers]
        few = len(gpus) < workers
        found["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)] if few else ",".join(mine)
    return found
