"""From the tower's four maps to the maps that a mask framework decodes: two pixel decoders.

``"msda"`` is transformers' Mask2Former's own, with deformable attention over strides 8, 16 and 32;
``"fpn"`` is its MaskFormer's feature pyramid, convolutions only.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
    Mask2FormerPixelDecoderOutput,
)
from transformers.models.maskformer.modeling_maskformer import MaskFormerPixelDecoder

PIXEL_DECODERS = ("msda", "fpn")
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")


class FPN(MaskFormerPixelDecoder):
    """MaskFormer's pyramid, handing on what Mask2Former's decoder asks for.

    Args:
        channels: of the maps at stride 4, 8, 16 and 32. dim: of all that comes out.
    """

    def __init__(self, channels: Sequence[int], dim: int) -> None:
        *lateral, last = channels
        super().__init__(last, lateral, feature_size=dim, mask_feature_size=dim)

    def forward(self, maps: list[Tensor]) -> Mask2FormerPixelDecoderOutput:
        coarse = self.fpn.stem(maps[-1])
        found = [coarse]
        for layer, left in zip(self.fpn.layers, maps[-2::-1], strict=True):
            found.append(layer(found[-1], left))
        pixels = self.mask_projection(found[-1])
        return Mask2FormerPixelDecoderOutput(tuple(found[:3]), pixels)


class DeformableAttention(Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention):
    """transformers' own, but on a CPU its sampling is one sparse product.

    Sampled map by map, most of the time goes into copies of every sampled feature: of each point,
    where a product has one number. No map is masked, for the pictures of a batch are of one size.
    """

    @classmethod
    def instead(cls, decoder: Mask2FormerPixelDecoder) -> None:
        """Let the layers of ``decoder`` be of this class; no weight or name of it changes."""
        for layer in decoder.encoder.layers:
            layer.self_attn.__class__ = cls

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Tensor,
        reference_points: Tensor,
        spatial_shapes_list: list[tuple[int, int]],
        **others,
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers'; returns (B, S, dim), and no weights on a CPU."""
        if hidden_states.device.type != "cpu":
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                reference_points=reference_points,
                spatial_shapes_list=spatial_shapes_list,
                **others,
            )
        asked = hidden_states + position_embeddings
        images, cells = asked.shape[:2]
        points = (images, cells, self.n_heads, self.n_levels, self.n_points)
        sizes = torch.tensor(spatial_shapes_list, dtype=torch.int32).flip(1)  # (levels, 2) w, h
        places = self.sampling_offsets(asked).view(*points, 2) / sizes[:, None]
        places = reference_points[:, :, None, :, None] + places
        shares = self.attention_weights(asked).view(*points[:3], -1).softmax(-1).view(points)
        # In rows of the values (images x cells x heads, d); a query is one row of the matrix.
        columns, shares = corners(places, shares, sizes)
        first = torch.arange(images, dtype=torch.int32)[:, None, None] * cells * self.n_heads
        first = first + torch.arange(self.n_heads, dtype=torch.int32)  # (images, 1, heads)
        columns = first[..., None, None, None] + columns * self.n_heads
        values = self.value_proj(hidden_states).view(-1, self.d_model // self.n_heads)
        found = SparseProduct.apply(
            columns.flatten(0, 2).flatten(1), shares.flatten(0, 2).flatten(1), values
        )
        return self.output_proj(found.view(asked.shape)), None


def corners(places: Tensor, shares: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The four cells around each point and their bilinear shares; those outside of a map have 0.

    Args:
        places: (…, L, P, 2), x and y from 0 to 1 on each level's map. shares: (…, L, P) of a point.
        sizes: (L, 2) int32, width and height; the maps lie one behind the other.

    Returns:
        cells (…, L, P, 4) int32, counted over all maps, and shares of that shape.
    """
    width, height = sizes[:, :1, None], sizes[:, 1:, None]  # (L, 1, 1)
    first = F.pad(sizes.prod(1).cumsum(0)[:-1], (1, 0)).int()[:, None, None]
    # The steps of grid_sample, to the last digit: points may lie on the border of two cells.
    places = (2 * places - 1 + 1) * (sizes / 2)[:, None] - 0.5
    low = places.detach().floor()
    right, below = (places - low).unbind(-1)
    below, above = shares * below, shares * (1 - below)
    shares = [above * (1 - right), above * right, below * (1 - right), below * right]
    x, y = low[..., None].int().unbind(-2)
    x = x + torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    y = y + torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    cells = (first + y * width + x).where(inside, 0)
    return cells, torch.stack(shares, dim=-1) * inside


class SparseProduct(torch.autograd.Function):
    """A sparse matrix with K entries a row times a dense one, on a CPU; torch's own sparse products
    sort for the gradient, which takes longer than all else."""

    @staticmethod
    def forward(ctx, columns: Tensor, entries: Tensor, dense: Tensor) -> Tensor:
        """columns (N, K) int32 and entries (N, K) x dense (S, D) -> (N, D)."""
        ctx.save_for_backward(columns, entries, dense)
        return F.embedding_bag(columns, dense, per_sample_weights=entries, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        columns, entries, dense = ctx.saved_tensors
        grad = grad.contiguous()
        ends = torch.arange(0, columns.numel() + 1, columns.shape[1], dtype=torch.int32)
        parts = entries.flatten(), columns.flatten(), ends
        matrix = scipy.sparse.csr_array(
            tuple(part.numpy() for part in parts), (len(columns), len(dense))
        )
        to_dense = torch.from_numpy(matrix.T @ grad.numpy())
        pattern = torch.sparse_csr_tensor(
            ends, parts[1], torch.zeros_like(parts[0]), matrix.shape,
            check_invariants=False,
        )
        to_entries = torch.sparse.sampled_addmm(pattern, grad, dense.T).values()
        return None, to_entries.view_as(entries), to_dense
