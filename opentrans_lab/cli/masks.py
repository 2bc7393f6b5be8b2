"""``opentrans-lab mask``: masks in files, for people who never open a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional
from tyro.conf import subcommand as named

from ..errors import LabError
from ..files import keep, writable

if TYPE_CHECKING:
    from ..masks import Mask

OURS = ".safetensors"


def _open(path: Path) -> Mask:
    """A mask of this lab (.safetensors) or of the authors (anything else)."""
    from ..masks import Mask

    return Mask.load(path) if path.suffix == OURS else Mask.from_authors(path)


def _may_write(out: Path, force: bool, suffixes: tuple[str, ...]) -> None:
    writable(out, "--out", suffixes)
    if out.exists() and not force:
        raise LabError(f"{out} exists; name another file, or add --force")


@dataclass
class MaskInfo:
    """Density, origin and every layer of a mask."""

    mask: Positional[Path]
    """Of this lab (.safetensors) or the authors' (.pth)."""

    def __call__(self) -> int:
        mask = _open(self.mask)
        about = "".join(f"{key}: {value}\n" for key, value in mask.meta.items())
        print(f"{mask!r}\n{about}{mask.layers().to_string(index=False, float_format='%.4f')}")
        return 0


@dataclass
class MaskApply:
    """Set a checkpoint's pruned weights to 0 and write it as safetensors."""

    mask: Positional[Path]
    """Of this lab (.safetensors) or the authors' (.pth)."""
    checkpoint: Positional[Path]
    """State dict that holds the CLIP tower, anywhere."""
    out: Path
    """Where to write."""
    prefix: str | None = None
    """Of the tower ("backbone.clip_model.visual."); found by itself when left out."""
    partial: bool = False
    """Go on if only some of the mask's tensors are there."""
    compact: bool = False
    """One bit a zero: a pruned tower becomes about a sixth, a whole CLIP, whose text tower stays
    dense, shrinks by a fifth; this lab reads it like any other file."""
    force: bool = False
    """Overwrite."""

    def __call__(self) -> int:
        from safetensors.torch import save_file

        from ..costs import save_sparse
        from ..files import atomic_path, read_state_dict

        def save(out: Path) -> None:
            if self.compact:
                return save_sparse(state, out)
            with atomic_path(out) as path:
                save_file({k: v.contiguous() for k, v in state.items()}, path)

        _may_write(self.out, self.force, (OURS,))
        mask = _open(self.mask)
        state = read_state_dict(self.checkpoint, names=mask)
        state = {k: v.clone() for k, v in state.items()}
        match = mask.apply(state, self.prefix, self.partial)
        keep(self.out, save)
        before, now = (path.stat().st_size / 1e6 for path in (self.checkpoint, self.out))
        print(f"{match}\n{self.out}: {now:.1f} MB ({self.checkpoint.name}: {before:.1f} MB)")
        return 0


@dataclass
class MaskConvert:
    """The authors' masks to this lab's form, or back."""

    mask: Positional[Path]
    """Of this lab (.safetensors) or the authors' (.pth)."""
    out: Positional[Path]
    """Its ending says which form."""
    checkpoint: Path | None = None
    """The tower's weights, which the authors' form holds, too."""
    force: bool = False
    """Overwrite."""

    def __call__(self) -> int:
        from ..files import read_state_dict

        _may_write(self.out, self.force, (OURS, ".pth", ".pt"))
        ours = self.out.suffix == OURS
        if not ours and self.checkpoint is None:
            raise LabError(
                f"{self.out} in the authors' form holds weights, too: name them with --checkpoint "
                f"(for this lab's form, let the name end in {OURS})"
            )
        mask = _open(self.mask)
        weights = {} if ours else read_state_dict(self.checkpoint, names=mask)
        keep(self.out, mask.save if ours else partial(mask.to_authors, weights))
        print(f"{self.out}: {mask!r}")
        return 0


MaskAction = (
    Annotated[MaskInfo, named("info")]
    | Annotated[MaskApply, named("apply")]
    | Annotated[MaskConvert, named("convert")]
)


@dataclass
class MaskCommand:
    """Masks in files: what one is, put it into a checkpoint, exchange it with the authors' code."""

    action: MaskAction

    def __call__(self) -> int:
        return self.action()
