"""One exact counter: every operation of a forward pass, by module, without a single weight.

``trace`` runs a module on torch's meta device, where tensors have a shape and no memory, and notes
what each operation multiplies. Whatever is published about cost is a sum over that table: ours
(``layer_costs``), or those that fvcore and thop form over the same pass (``fvcore``, ``thop``).
"""

import copy
from typing import NamedTuple

import pandas as pd
import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..clip import MINI, RESNETS, Backbone, build_mini, mini_tokenizer
from ..errors import LabError
from ..heads import build
from ..masks import Mask

OUTSIDE = "outside the forward pass"

# What fvcore adds for an element of an operation's output, besides the MACs of convolutions and
# matrix products (fvcore 0.1.5, default handlers). It knows no ``baddbmm``.
FVCORE = {
    "native_batch_norm": 2,
    "native_layer_norm": 5,
    "native_group_norm": 5,
    "grid_sampler_2d": 4,
    "upsample_bilinear2d": 4,
    "upsample_nearest2d": 1,
}
# What thop counts of a *module*, exactly of this type (thop 0.1.1): MACs, or so many for an element
# of its output. It sees no function, no subclass, and no weight that is read from outside.
THOP_MACS = (nn.Conv2d, nn.Linear)
THOP = {nn.BatchNorm2d: 4, nn.LayerNorm: 4, nn.AvgPool2d: 1}
THOP_HOOKS = {*THOP_MACS, *THOP}


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in eval mode on the meta device; no weight is copied or allocated."""
    memo = {id(t): t.detach().to("meta") for t in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    return copy.deepcopy(model, memo).eval()


class Trace(NamedTuple):
    """A forward pass, written down."""

    rows: pd.DataFrame
    """One an operation, in order: module (the innermost that runs, "" is the model itself), type
    (its class), op ("convolution", "addmm", …), macs (multiply-accumulates) and elements (of the
    operation's output)."""
    read: set[str]
    """Names of the parameters that were read."""


def trace(model: nn.Module, *inputs: Tensor) -> Trace:
    """Run ``model(*inputs)`` on shapes alone and note every operation (views are left out).

    Args:
        model: a module on the meta device (:func:`on_meta`).
        inputs: meta tensors.

    Raises:
        LabError: the forward pass asks for a value, which shapes alone cannot give.
    """
    counter, hooks = _Counter(model), []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(counter.enter(name)))
        hooks.append(module.register_forward_hook(counter.leave, always_call=True))
    try:
        with torch.no_grad(), torch.device("meta"), counter:
            model(*inputs)
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        raise LabError(
            f"{type(model).__name__} cannot be counted without weights: {error}; its forward pass "
            "has to depend on shapes only"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    columns = ["module", "type", "op", "macs", "elements"]
    return Trace(pd.DataFrame(counter.rows, columns=columns), counter.read)


class _Counter(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.rows: list[tuple[str, type, str, int, int]] = []
        self.read: set[str] = set()
        self._running: list[tuple[str, type]] = [("", type(model))]
        self._names = {id(p): name for name, p in model.named_parameters()}

    def enter(self, name: str):
        def hook(module, _) -> None:
            self._running.append((name, type(module)))

        return hook

    def leave(self, *_) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, nn.Parameter) and id(leaf) in self._names:
                self.read.add(self._names[id(leaf)])
        packet = func._overloadpacket
        first = next((x for x in tree_leaves(out) if isinstance(x, Tensor)), None)
        if first is not None and not func.is_view:
            formula = flop_registry.get(packet)  # of torch's own counter: two FLOPs a MAC
            macs = formula(*args, **kwargs, out_val=out) // 2 if formula else 0
            op = packet.__name__
            self.rows.append((*self._running[-1], op, int(macs), first.numel()))
        return out


def products(rows: pd.DataFrame) -> int:
    """Multiply-accumulates without the scores and sums of attention (baddbmm)."""
    return int(rows["macs"][rows["op"] != "baddbmm"].sum())


def convolutions(rows: pd.DataFrame) -> int:
    """Multiply-accumulates of convolutions only."""
    return int(rows["macs"][rows["op"] == "convolution"].sum())


def fvcore(rows: pd.DataFrame) -> int:
    """What fvcore's FlopCountAnalysis says of these operations."""
    per_element = rows["op"].map(FVCORE).fillna(0).astype(int)
    return products(rows) + int((per_element * rows["elements"]).sum())


def thop(rows: pd.DataFrame) -> int:
    """What thop's profile says of these operations."""
    per_element = rows["type"].map(THOP).fillna(0).astype(int)
    own = rows["macs"] * rows["type"].isin(THOP_MACS)
    return int((own + per_element * rows["elements"]).sum())


# --- models -------------------------------------------------------------------------------------


def meta_backbone(name: str = "RN50") -> Backbone:
    """A CLIP ResNet of shapes only, "mini" or a name of open_clip's.

    Raises:
        LabError: unknown name.
    """
    if name != "mini" and name not in RESNETS:
        raise LabError(f"backbone {name!r} is unknown; use mini, {', '.join(RESNETS)}")
    config = MINI if name == "mini" else RESNETS[name]
    with torch.device("meta"):
        return Backbone(build_mini(config), mini_tokenizer(config), name).eval()


def meta_framework(
    framework: str, backbone: str = "RN50", preset: str = "paper", **options
) -> nn.Module:
    """A framework of shapes only: every parameter is on the meta device.

    ``options`` are the framework's own, see ``frameworks.build``.

    Raises:
        LabError: unknown framework, backbone or preset.
    """
    tower = meta_backbone(backbone)
    with torch.device("meta"):
        model = build(framework, tower, preset=preset, **options)
    return model.to("meta").eval()  # some constructors do not ask for the default device


def parse_size(size: str | tuple[int, int]) -> tuple[int, int]:
    """``"800x1216"`` -> (800, 1216): height, then width, as the paper writes it.

    Raises:
        LabError: not two whole numbers, or fewer pixels than the trunk needs.
    """
    parts = size.lower().split("x") if isinstance(size, str) else [str(side) for side in size]
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise LabError(f"size {size!r} is not HEIGHTxWIDTH; write it like 800x1216")
    height, width = map(int, parts)
    if min(height, width) < 32:
        raise LabError(f"size {size!r} is too small; 32x32 is the least")
    return height, width


class Counted(NamedTuple):
    """A model and one forward pass of it: what every number about cost is a sum of."""

    model: nn.Module  # on meta
    tower: str | None  # prefix of its CLIP tower, such as "backbone.visual."
    trace: Trace
    size: tuple[int, int]  # height, width

    def component(self, name: str) -> str:
        """The part that a module or parameter belongs to: trunk, attention pool, or a child."""
        if self.tower is not None and f"{name}.".startswith(self.tower):
            inner = name[len(self.tower) :]
            return "attention pool" if inner.startswith("attnpool") else "trunk"
        return name.split(".")[0] or "rest"

    def within(self, name: str, component: str) -> bool:
        """The same for a component, or the "head": all but trunk and attention pool."""
        own = self.component(name)
        return own == component or component == "head" and own not in ("trunk", "attention pool")

    def rows(self, component: str) -> pd.DataFrame:
        """The operations of a component or of the "head"."""
        return self.trace.rows[self.trace.rows["module"].map(lambda m: self.within(m, component))]

    def parameters(self, component: str) -> dict[str, nn.Parameter]:
        """By name, those that the pass reads, of a component or of the "head"."""
        own = ((n, p) for n, p in self.model.named_parameters() if n in self.trace.read)
        return {name: p for name, p in own if self.within(name, component)}


def count(
    model: nn.Module,
    size: str | tuple[int, int] = "800x1216",
    batch: int = 1,
    training: bool = False,
) -> Counted:
    """Trace ``model(images)`` for ``batch`` pictures of this size. Nothing is allocated.

    Args:
        model: any module that takes images (B, 3, H, W); a copy goes to the meta device if it is
            elsewhere. The first CLIP ResNet in it is the trunk.
        training: the pass of a training step (mask heads then classify after every layer).

    Raises:
        LabError: malformed size, or a forward pass that needs values.
    """
    size = parse_size(size)
    if not all(p.is_meta for p in model.parameters()):
        model = on_meta(model)
    towers = [name for name, m in model.named_modules() if isinstance(m, ModifiedResNet)]
    tower = f"{towers[0]}.".removeprefix(".") if towers else None
    model.training = training  # not its modules: what drops out at random asks for values
    try:
        images = torch.empty(batch, 3, *size, device="meta")
        return Counted(model, tower, trace(model, images), size)
    finally:
        model.training = False


def layer_costs(counted: Counted, mask: Mask | None = None) -> pd.DataFrame:
    """One row a module: component, module, params, macs, sparse_params, sparse_macs.

    Parameters stand with the module that owns them, MACs with the one that runs. A masked layer's
    sparse MACs are its kept weights x output positions. What the forward pass never reads has the
    component "outside the forward pass".

    Raises:
        LabError: the mask is of another model.
    """
    kept, rows = {}, []
    if mask is not None:
        match = mask.find(counted.model, counted.tower)
        kept = {match.prefix + name: int(mask[name].sum()) for name in match.tensors}
    for name, p in counted.model.named_parameters():
        component = counted.component(name) if name in counted.trace.read else OUTSIDE
        module, size = name.rpartition(".")[0], p.numel()
        rows.append((component, module, size, 0, kept.get(name, size), 0))
    for name, macs in counted.trace.rows.groupby("module", sort=False)["macs"].sum().items():
        weight, sparse = f"{name}.weight", macs
        if weight in kept:
            sparse = macs // counted.model.get_parameter(weight).numel() * kept[weight]
        rows.append((counted.component(name), name, 0, int(macs), 0, int(sparse)))
    columns = ["component", "module", "params", "macs", "sparse_params", "sparse_macs"]
    table = pd.DataFrame(rows, columns=columns)
    return table.groupby(["component", "module"], sort=False, as_index=False).sum()
