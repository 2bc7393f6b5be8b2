"""Empirical spectral densities (ESDs): the eigenvalues of W^T W of a layer, a control, a model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ..checks import choose
from ..errors import LabError
from .layers import Layer, unfit

RESHAPES = ("slices", "flatten", "fft")
CONTROLS = ("permute", "gaussian")
FFT_GRID = 8  # side of the periodic grid on which "fft" views a convolution
CACHE: dict[tuple, np.ndarray | str] = {}  # eigenvalues, or why there are none, by weight content
CACHE_ENTRIES = 8192

_CHUNK = 1 << 18  # matrix entries held as complex128 at a time by "fft" (4 MB, a few times over)


def esd(weight: Tensor, reshape: str = "slices", groups: int = 1) -> Tensor:
    """Eigenvalues of W^T W for the matrices that `reshape` makes of a weight, pooled.

    Args:
        weight: (out, in/groups, *kernel), any float dtype; a linear map has no kernel axes.
        reshape: ``"slices"``: the k*k matrices (out, in) of the kernel taps, eigenvalues times
            0.5 for convolutions (the convention of WeightWatcher, TempBalance and the authors);
            ``"flatten"``: one matrix (out, in*k*k); ``"fft"``: the exact spectrum of the
            convolution as a linear operator (stride 1) on a periodic grid of side
            max(8, kernel), every frequency counted. A 1x1 kernel has the same matrix at every
            frequency and is counted once. Neighbouring frequencies are not independent, so
            sigma is too small there.
        groups: of a grouped convolution: a block-diagonal operator, its blocks are pooled.

    Returns:
        (n_evals,) float64, ascending, on the weight's device (CPU instead of MPS, which has no
        float64). Computed from the float64 Gram matrix on the short side: absolute error about
        1e-16 of the largest eigenvalue of its matrix. Eigenvalues under eps * max(m, n) * the
        largest of all (m, n) matrices are set to exactly 0 (rank deficiency). Tails, where alpha
        lives, agree with an SVD to 1e-10; use an SVD if you need the smallest eigenvalues.
    Raises:
        LabError: unknown reshape, fewer than two axes, groups that do not divide the outputs, or
            a weight that is empty, sparse, without values or not of finite floating point numbers.
    """
    choose("reshape", reshape, RESHAPES)
    if weight.ndim < 2:
        raise LabError(f"a weight of shape {tuple(weight.shape)} has no matrix; give (out, in, …)")
    if reason := unfit(weight):
        raise LabError(f"the weight cannot be analysed: {reason}")
    if groups < 1 or weight.shape[0] % groups:
        raise LabError(f"groups={groups} does not divide {weight.shape[0]} outputs")
    if not torch.isfinite(weight).all():
        raise LabError("the weight contains NaN or Inf; repair or drop this layer")
    weight = weight.detach().cpu() if weight.device.type == "mps" else weight.detach()
    kernel = weight.shape[2:]
    blocks = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)  # (g, o, i, k)
    if reshape == "flatten" or (reshape == "fft" and math.prod(kernel) == 1):
        blocks = blocks.flatten(2)[..., None]  # (g, o, i*k, 1): a single tap
    if reshape == "fft" and blocks.shape[-1] > 1:
        eigs = _operator_eigenvalues(blocks.double(), kernel)
    else:
        eigs = _eigenvalues(blocks.permute(0, 3, 1, 2).flatten(0, 1).double())  # (g*k, min(o, i))
    eigs = eigs.flatten().sort().values * (0.5 if reshape == "slices" and kernel else 1.0)
    cut = torch.finfo(torch.float64).eps * max(blocks.shape[1:3]) * eigs[-1]
    return torch.where(eigs > cut, eigs, 0.0)


def _eigenvalues(matrices: Tensor) -> Tensor:
    """Squared singular values of (b, m, n) float64 or complex128 matrices: (b, min(m, n))."""
    m, n = matrices.shape[-2:]
    gram = matrices.mH @ matrices if n <= m else matrices @ matrices.mH
    del matrices
    return torch.linalg.eigvalsh(gram)  # (b, min(m, n)) ascending


def _operator_eigenvalues(blocks: Tensor, kernel: Sequence[int]) -> Tensor:
    """Spectrum of a (g, o, i, k) convolution on a periodic grid: one matrix per frequency.

    The transfer matrix at -f is the conjugate of the one at f, so half the plane is enough; the
    other half is counted by repeating it.
    """
    side = max(FFT_GRID, *kernel)
    taps = torch.eye(math.prod(kernel), dtype=torch.float64, device=blocks.device)
    axes = tuple(range(1, 1 + len(kernel)))
    waves = torch.fft.rfftn(  # (k, side, …, side // 2 + 1)
        taps.reshape(-1, *kernel), s=[side] * len(axes), dim=axes
    )
    twice = torch.ones(waves.shape[1:], dtype=torch.int64, device=blocks.device)
    twice[..., 1 : (side + 1) // 2] = 2
    waves, twice = waves.flatten(1), twice.flatten()  # (k, f), (f,)
    step = max(1, _CHUNK // blocks[..., 0].numel())
    per_wave = blocks.shape[0] * min(blocks.shape[1:3])
    found = blocks.new_empty(len(twice), per_wave)  # in one piece: pieces would scatter the heap
    for start in range(0, waves.shape[1], step):
        wave = waves[:, start : start + step]
        transfer = torch.complex(blocks @ wave.real, blocks @ wave.imag)  # (g, o, i, f)
        eigs = _eigenvalues(transfer.permute(3, 0, 1, 2).flatten(0, 1))  # (f * g, min(o, i))
        found[start : start + step] = eigs.view(-1, per_wave)
    return found.repeat_interleave(twice, dim=0)


def mp_edge(weight: Tensor, reshape: str = "slices", groups: int = 1) -> float:
    """Upper Marchenko-Pastur edge: where the spectrum of a random weight of this shape and this
    standard deviation s would end, s^2 (sqrt(m) + sqrt(n))^2 for an (m, n) matrix.

    Eigenvalues beyond it cannot be explained by noise. Units and scaling as in :func:`esd`.
    """
    choose("reshape", reshape, RESHAPES)
    out, inner, taps = weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:])
    variance = weight.detach().double().var(correction=0).item()
    if reshape == "flatten":
        return variance * (math.sqrt(out) + math.sqrt(inner * taps)) ** 2
    scale = taps if reshape == "fft" else 0.5 if weight.ndim > 2 else 1.0
    return scale * variance * (math.sqrt(out) + math.sqrt(inner)) ** 2


def randomise(weight: Tensor, control: str, seed: int, name: str = "") -> Tensor:
    """A control of the same shape: the same entries shuffled (``"permute"``), or Gaussian noise
    of the same mean and standard deviation. Depends on (seed, name) and not on the other layers.
    """
    choose("control", control, CONTROLS)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    flat = weight.detach().flatten()
    if control == "permute":
        order = torch.randperm(flat.numel(), generator=generator)
        return flat[order.to(flat.device)].reshape(weight.shape)
    flat = flat.float()
    noise = torch.randn(flat.numel(), generator=generator).to(flat.device)
    return noise.mul_(flat.std(correction=0)).add_(flat.mean()).reshape(weight.shape)


def spectra(
    found: Sequence[Layer],
    reshape: str = "slices",
    control: str | None = None,
    seed: int = 0,
    progress: Callable = iter,
) -> list[np.ndarray | str]:
    """Eigenvalues (n_evals,) float64 of each layer, or the sentence why it has none.

    Cached in this process by the content of the weight: only changed weights are computed again.
    On the CPU, layers run side by side on one core each, which beats one layer on all cores.
    """
    choose("reshape", reshape, RESHAPES)
    if control:
        choose("control", control, CONTROLS)

    def one(layer: Layer) -> np.ndarray | str:
        return layer.reason or _cached(layer, reshape, control, seed)

    order = sorted(range(len(found)), key=lambda i: -_cost(found[i]))  # long ones first
    if any(layer.tensor.device.type == "cuda" for layer in found):
        results = [one(found[i]) for i in progress(order)]
    else:
        threads = torch.get_num_threads()
        workers = min(threads, 3)  # three, because each holds a layer in float64
        try:
            with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as p:
                futures = [p.submit(one, found[i]) for i in order]
                results = [future.result() for future in progress(futures)]
        finally:
            torch.set_num_threads(threads)
    return [result for _, result in sorted(zip(order, results, strict=True), key=lambda p: p[0])]


def _cost(layer: Layer) -> float:
    out, inner = layer.tensor.shape[:2]
    return layer.tensor.numel() * min(out, inner)


def _cached(layer: Layer, reshape: str, control: str | None, seed: int) -> np.ndarray | str:
    weight = layer.weight
    raw = weight.cpu().contiguous().flatten().view(torch.uint8).numpy()
    key = (hashlib.sha1(raw, usedforsecurity=False).digest(), weight.dtype, tuple(weight.shape),
           layer.groups, reshape) + ((control, seed, layer.name) if control else ())
    if key not in CACHE:
        try:
            weight = randomise(weight, control, seed, layer.name) if control else weight
            eigs = esd(weight, reshape, layer.groups).cpu().numpy()
            eigs.setflags(write=False)
            nothing = "all weights are zero, or too small for their squares in float64"
            CACHE[key] = eigs if eigs[-1] > 0 else nothing
        except LabError as error:
            CACHE[key] = str(error)
        except RuntimeError as error:  # of the solver, or no memory: the next call may succeed
            return f"no eigenvalues: {str(error).splitlines()[0]}"
        while len(CACHE) > CACHE_ENTRIES:
            CACHE.pop(next(iter(CACHE)))
    return CACHE[key]
