"""Does sparsity pay? A pruned tower on disk, and ways to spend the zeros on time, each measured.

Unstructured zeros save a file's size at once. Time they save only where something can skip them:
whole channels that can go, sparse matrix products, or an engine.
"""

import copy
import json
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..clip import trunk
from ..files import SPARSE, atomic_path, pack_bits
from ..masks import Mask

PRODUCTS = "1x1 convolutions as sparse products"


def save_sparse(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a state dict with one bit a zero: a bit map and the other values of each tensor.

    Tensors of which less than an eighth is 0 are stored as they are. Lossless, except that a
    negative zero becomes 0; :func:`read_state_dict` reads it.
    """
    tensors, shapes = {}, {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        kept = tensor != 0
        if tensor.ndim > 1 and kept.sum() < 7 / 8 * tensor.numel():
            tensors |= {f"{name}|bits": pack_bits(kept), f"{name}|values": tensor[kept]}
            shapes[name] = list(tensor.shape)
        else:
            tensors[name] = tensor.clone()  # safetensors refuses shared memory
    about = {"format": SPARSE, "shapes": json.dumps(shapes)}
    with atomic_path(path) as partial:
        save_file(tensors, partial, metadata=about)


class Trunk(nn.Module):
    """A tower without its attention pool, images (B, 3, H, W) -> the stride-32 map."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> Tensor:
        return trunk(self.visual, images)[-1]


def drop_unread_channels(visual: nn.Module) -> int:
    """Remove, in place, each block's inner channels that no weight reads; returns how many.

    Exact: what nothing reads changes nothing. Only the two inner maps of a bottleneck can lose
    channels; those of its input and output are added to others.
    """
    dropped = 0
    for block in (m for m in visual.modules() if hasattr(m, "conv3") and hasattr(m, "bn3")):
        if block is visual:  # the stem has the same names
            continue
        for writer, norm, reader in (("conv1", "bn1", "conv2"), ("conv2", "bn2", "conv3")):
            conv, bn, after = (getattr(block, name) for name in (writer, norm, reader))
            read = after.weight.detach().ne(0).any(dim=3).any(dim=2).any(dim=0)  # (C,)
            if read.all() or not read.any():
                continue
            dropped += int((~read).sum())
            _slice(conv, "weight", read)
            after.weight = nn.Parameter(after.weight.detach()[:, read].clone(), False)
            for name in ("weight", "bias", "running_mean", "running_var"):
                _slice(bn, name, read)
            conv.out_channels = after.in_channels = bn.num_features = int(read.sum())
    return dropped


class SparseConv1x1(nn.Module):
    """A 1x1 convolution as a product of a sparse matrix (CSR) with the pixels of each image."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        with warnings.catch_warnings():  # that CSR is in beta
            warnings.simplefilter("ignore", UserWarning)
            self.weight = conv.weight.detach().flatten(1).to_sparse_csr()  # (out, in)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.weight @ image for image in x.flatten(2)]  # (out, H·W) each
        return torch.stack(maps).unflatten(2, x.shape[2:])


def sparse_products(visual: nn.Module) -> int:
    """Replace each 1x1 convolution, in place, by :class:`SparseConv1x1`; returns how many."""
    found = [
        (parent, name, child)
        for parent in visual.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1) and child.stride == (1, 1)
    ]
    for parent, name, child in found:
        setattr(parent, name, SparseConv1x1(child))
    return len(found)


def payoff(
    visual: nn.Module, mask: Mask, size: int = 256, repeats: int = 30, seed: int = 0
) -> pd.DataFrame:
    """CPU latency of a trunk under ``mask``, by ways of using it, each beside dense in one run.

    Args:
        visual: a CLIP ResNet tower, dense or pruned; it stays as it is.
        size: side of the one square image, in pixels.
        repeats: timed passes of each way; the ways take turns, so that drift hits all of them.

    Returns:
        way, dense_ms and masked_ms (the fastest pass of a way without and with the mask; NaN where
        it has no dense form), speedup (dense / masked), over_torch (torch's dense / masked), error
        (largest difference to torch's masked output, relative to its largest value), note.
    """
    dense = Trunk(copy.deepcopy(visual)).cpu().float().eval().requires_grad_(False)
    masked = copy.deepcopy(dense)
    mask.apply(masked)
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(1, 3, size, size, generator=generator)
    slim, products = copy.deepcopy(masked), copy.deepcopy(masked)
    dropped = drop_unread_channels(slim.visual)
    replaced = sparse_products(products.visual)
    channels = sum(m.out_channels for m in dense.modules() if isinstance(m, nn.Conv2d))
    ways: list[tuple[str, Callable | None, Callable, str]] = [
        ("torch", dense, masked, "zeros multiplied like any number"),
        ("dead channels removed", None, slim, f"{dropped} of {channels:,} channels"),
        (PRODUCTS, None, products, f"{replaced} convolutions as CSR"),
    ]
    with TemporaryDirectory() as folder, torch.inference_mode():
        if all(find_spec(name) for name in ("onnxruntime", "onnx", "onnxscript")):
            pair = [_onnx(m, images, Path(folder) / f"{m is dense}.onnx") for m in (dense, masked)]
            ways.append(("ONNX Runtime", *pair, "fuses layers, multiplies zeros"))
        else:
            print("ONNX Runtime is left out: pip install onnx onnxruntime onnxscript")
        reference = masked(images)
        calls = {(way, i): f for way, *pair, _ in ways for i, f in enumerate(pair) if f is not None}
        times: dict[tuple, list[float]] = {key: [] for key in calls}
        for turn in tqdm(range(repeats + 2), "latency", leave=False):
            for key, call in calls.items():
                began = time.perf_counter()
                call(images)
                if turn > 1:  # the first two warm up
                    times[key].append(1000 * (time.perf_counter() - began))
        ms = {key: min(values) for key, values in times.items()}
        rows = []
        for way, _, call, note in ways:
            error = (call(images) - reference).abs().max() / reference.abs().max()
            before, after = ms.get((way, 0), float("nan")), ms[way, 1]
            base = ms["torch", 0]
            rows.append({
                "way": way, "dense_ms": before, "masked_ms": after,
                "speedup": (base if before != before else before) / after,
                "over_torch": base / after, "error": float(error), "note": note,
            })  # fmt: skip
    return pd.DataFrame(rows)


def disk_sizes(visual: nn.Module, mask: Mask) -> pd.DataFrame:
    """Megabytes (10^6 bytes) of a pruned trunk (no attention pool) on disk.

    Returns:
        dtype, dense_mb (every zero written), sparse_mb (:func:`save_sparse`), ratio.
    """
    state = {k: v.detach().cpu().clone() for k, v in visual.state_dict().items()}
    mask.apply(state)
    state = {k: v for k, v in state.items() if not k.startswith("attnpool.")}
    rows = []
    with TemporaryDirectory() as folder:
        plain, packed = Path(folder) / "plain.safetensors", Path(folder) / "packed.safetensors"
        for kind in (torch.float32, torch.float16):
            cast = {k: v.to(kind) if v.is_floating_point() else v for k, v in state.items()}
            save_file(cast, plain)
            save_sparse(cast, packed)
            dense, sparse = (path.stat().st_size / 1e6 for path in (plain, packed))
            rows.append((str(kind).removeprefix("torch."), dense, sparse, dense / sparse))
    return pd.DataFrame(rows, columns=["dtype", "dense_mb", "sparse_mb", "ratio"])


def _slice(module: nn.Module, name: str, keep: Tensor) -> None:
    old = getattr(module, name)
    new = old.detach()[keep].clone()
    setattr(module, name, nn.Parameter(new, False) if isinstance(old, nn.Parameter) else new)


def _onnx(model: nn.Module, images: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    """The model in ONNX Runtime, on as many threads as torch uses."""
    import onnxruntime

    torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])
