"""``opentrans-lab mask``: masks in files, for people who never open a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..costs import save_sparse
from ..errors import LabError
from ..files import atomic_path, keep, read_state_dict, writable
from ..masks import Mask

OURS = ".safetensors"


def open_mask(path: Path) -> Mask:
    """A mask of this lab (.safetensors) or of the authors (anything else)."""
    return Mask.load(path) if path.suffix == OURS else Mask.from_authors(path)


def describe(path: Path) -> str:
    """What a mask is: density, where it comes from, and every layer."""
    mask = open_mask(path)
    about = "".join(f"{key}: {value}\n" for key, value in mask.meta.items())
    return f"{mask!r}\n{about}{mask.layers().to_string(index=False, float_format='%.4f')}"


def apply_to_file(
    mask: Path, checkpoint: Path, out: Path,
    prefix: str | None = None, partial: bool = False, compact: bool = False, force: bool = False,
) -> str:  # fmt: skip
    """Write ``checkpoint`` with the mask's weights at 0 as safetensors; returns what matched.

    Args:
        compact: one bit a zero (``sparse.save_sparse``), which this lab reads like any file.

    Raises:
        LabError: unreadable file, a mask of another backbone, or ``out`` exists without ``force``.
    """
    _may_write(out, force, (OURS,))
    found = open_mask(mask)
    state = {k: v.clone() for k, v in read_state_dict(checkpoint, names=found).items()}
    match = found.apply(state, prefix, partial)
    save = save_sparse if compact else _save_dense
    keep(out, lambda path: save(state, path))
    sizes = [path.stat().st_size / 1e6 for path in (checkpoint, out)]
    return f"{match}\n{out}: {sizes[1]:.1f} MB ({checkpoint.name}: {sizes[0]:.1f} MB)"


def convert(mask: Path, out: Path, checkpoint: Path | None = None, force: bool = False) -> str:
    """The authors' ``.pth`` to this lab's safetensors, or back (which needs the tower's weights).

    Raises:
        LabError: as above, or weights are needed and not given.
    """
    _may_write(out, force, (OURS, ".pth", ".pt"))
    ours = out.suffix == OURS
    if not ours and checkpoint is None:
        raise LabError(
            f"{out} in the authors' form holds weights, too: name them with --checkpoint "
            f"(for this lab's form, let the name end in {OURS})"
        )
    found = open_mask(mask)
    weights = {} if ours else read_state_dict(checkpoint, names=found)
    keep(out, found.save if ours else partial(found.to_authors, weights))
    return f"{out}: {found!r}"


def _may_write(out: Path, force: bool, suffixes: tuple[str, ...]) -> None:
    writable(out, "--out", suffixes)
    if out.exists() and not force:
        raise LabError(f"{out} exists; name another file, or add --force")


def _save_dense(state: Mapping[str, Tensor], out: Path) -> None:
    with atomic_path(out) as path:
        save_file({k: v.contiguous() for k, v in state.items()}, path)
