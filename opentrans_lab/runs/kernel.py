"""The cells of one notebook, run by a kernel of this interpreter, and what went wrong in words."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import papermill
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from papermill.iorw import papermill_io

from ..files import linked
from ..records import load, place, read_notebook


class Files:
    """Papermill's way to read and write what it is given as ``file://``.

    In a path it would take braces for parameters, and text with names that are no UTF-8 it could
    not write.
    """

    def read(self, uri: str) -> str:
        return self._path(uri).read_text(encoding="utf-8")

    def write(self, text: str, uri: str) -> None:
        # In JSON, a lone surrogate that is replaced so is the same surrogate.
        self._path(uri).write_text(text, encoding="utf-8", errors="backslashreplace")

    def pretty_path(self, uri: str) -> str:
        return uri

    def _path(self, uri: str) -> Path:
        return Path(linked(uri.removeprefix("file://")))


papermill_io.register("file://", Files())


def execute(
    notebook: Path, output: Path, changed: dict, told: dict[str, str], gone: Callable[[], bool]
) -> tuple[str, str]:
    """Run the cells; returns what went wrong in words and its kind, both "" for nothing.

    ``LabError`` is for the user to mend and ``OutOfTime`` no error; anything else is a bug.

    Args:
        changed: parameters that differ from the defaults.
        told: environment variables that the kernel gets beside this process's.
        gone: whether it is to end now.
    """
    nbformat.write(read_notebook(notebook), output)  # with what papermill and others look for
    try:
        done = papermill.execute_notebook(
            output.as_uri(),
            output.as_uri(),
            changed,
            kernel_name="python3",
            language="python",
            kernel_manager_class=_kernels(told, gone),
            progress_bar=sys.stderr.isatty(),
            iopub_timeout=60,  # s for a cell's last outputs; on a busy machine 4 are too few
        )
    except PapermillExecutionError as error:
        if error.ename in ("LabError", "OutOfTime"):
            return error.evalue, error.ename
        at = place(notebook, error.source)
        if error.ename == "SystemExit":
            return _left(notebook, at, error.evalue), error.ename
        trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).strip().splitlines()
        where = f"{notebook.name}, cell {at} (In [{error.exec_count}]): {error.ename}"
        return framed(where, trace), error.ename
    except DeadKernelError as error:
        return f"{notebook.name}: its kernel died, perhaps for want of memory ({error})", "dead"
    except RuntimeError as error:  # nbclient's, of a kernel that died or said nothing at its start
        return f"{notebook.name}: no kernel could be started ({error})", "dead"
    cells = [cell for cell in done.cells if cell.cell_type == "code"]
    left = next((cell for cell in cells if cell.metadata.papermill.exception), None)
    if left is None or (left is cells[-1] and load(output.parent)):  # at its very end, and saved
        return "", ""
    return _left(notebook, place(notebook, left.source), "0"), "SystemExit"  # papermill lets it be


def _left(notebook: Path, at: int | str, status: str) -> str:
    return (
        f"{notebook.name} leaves in cell {at} by exit({status}) and has not finished; let it run "
        "to its end, or raise an error that says what is wrong"
    )


def framed(where: str, trace: list[str]) -> str:
    """The end of a traceback under a line that says whose it is."""
    return "\n  | ".join([where, *trace[-14:]])


def _kernels(told: dict[str, str], gone: Callable[[], bool]) -> type[AsyncKernelManager]:
    """Kernels of this very interpreter, whatever kernels are registered on the machine."""

    class ThisPython(AsyncKernelManager):
        transport_encryption = "auto"  # other users of the machine cannot listen in

        @property
        def kernel_spec(self) -> KernelSpec:
            # Its own log says only that it was interrupted, which is how kernels are ended.
            # Left to itself, exit() would let the cells go on until the kernel is gone.
            leave = "--IPKernelApp.exec_lines=get_ipython().ask_exit = __import__('sys').exit"
            command = get_kernel_dict(["--log-level=CRITICAL", leave])
            return KernelSpec(resource_dir=RESOURCES, **command | {"env": told})

        async def _async_is_alive(self) -> bool:  # nbclient asks every second
            if gone() and self.has_kernel:
                await self.provisioner.kill()
            return await super()._async_is_alive()

    return ThisPython
