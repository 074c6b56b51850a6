"""Experts of a layer in 4 bit: packed one expert at a time, unpacked where they are indexed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

BLOCK = 64
"""Weights that share a scale."""

NESTED_BLOCK = 256
"""Scales that share a scale of their own, with double quantization."""


class PackedExperts(nn.Module):
    """How packed experts are unpacked: a parametrization of a layer's uint8 ``(experts, bytes)``.

    Each expert is quantized alone, with the numbers that bitsandbytes gives for its weights; the
    last block is filled up with zeros. The scales are buffers here, kept as bytes, which no cast of
    the model touches.

    Args:
        experts: How many.
        shape: Of one expert's weights.
        dtype: Of the weights before, and of what is unpacked.
        quant_type: "nf4" or "fp4".
        nested: Whether the scales are quantized too (double quantization).
    """

    scale: Tensor

    def __init__(
        self,
        experts: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        quant_type: str = "nf4",
        nested: bool = False,
    ) -> None:
        super().__init__()
        self.experts, self.shape, self.dtype = experts, shape, dtype
        self.quant_type, self.nested = quant_type, nested
        self.flat = False  # whether the weight was a matrix with the experts one below the other
        self.compute_dtype: torch.dtype | None = None  # None: that of the hidden states
        self.count = torch.Size(shape).numel()
        self.blocks = -(-self.count // BLOCK)
        groups = -(-self.blocks // NESTED_BLOCK)
        if nested:
            codes = torch.zeros(experts, groups * NESTED_BLOCK, dtype=torch.uint8)
            self.register_buffer("scale", codes)
            self._keep("nested_scale", experts, groups)
            self._keep("nested_code", 256)
            self._keep("offset", experts)
        else:
            self._keep("scale", experts, self.blocks)

    @classmethod
    def pack(
        cls, weights: Tensor, quant_type: str = "nf4", nested: bool = False
    ) -> tuple[Tensor, PackedExperts]:
        """Quantize ``(experts, ...)`` weights, one expert after the other.

        Returns:
            uint8 ``(experts, bytes)``, and what unpacks it; both on the weights' device.
        """
        from bitsandbytes.functional import quantize_4bit

        shape = tuple(weights.shape[1:])
        self = cls(len(weights), shape, weights.dtype, quant_type, nested).to(weights.device)
        size = (len(weights), self.packed_size)
        packed = torch.empty(size, dtype=torch.uint8, device=weights.device)
        for index, expert in enumerate(weights):
            flat = pad(expert.reshape(-1), (0, self.blocks * BLOCK - self.count))
            data, state = quantize_4bit(flat, blocksize=BLOCK, quant_type=quant_type)
            packed[index] = data.view(-1)
            self._set_scale(index, state.absmax)
        return packed, self

    @property
    def packed_size(self) -> int:
        """Bytes of one packed expert."""
        return self.blocks * BLOCK // 2

    def forward(self, packed: Tensor) -> Tensor:
        """All experts, in the shape and dtype of before."""
        weights = self._unpack(packed, slice(None), self.dtype)
        return weights.flatten(0, 1) if self.flat else weights

    def pick(self, packed: Tensor, experts: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """Some experts, ``(chosen, ...)``; no other is unpacked."""
        return self._unpack(packed[experts], experts, dtype)

    def _unpack(self, packed: Tensor, rows: Any, dtype: torch.dtype) -> Tensor:
        count = packed.shape[0]
        # Rows as long as an expert: bitsandbytes 0.50 on CPU garbles rows narrower than a block.
        flat: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            packed.reshape(-1),
            self._scale(rows).reshape(-1),
            BLOCK,
            self.quant_type,
            [count, self.blocks * BLOCK],
            dtype,
        )
        return flat[:, : self.count].reshape(count, *self.shape)

    def _scale(self, rows: Any) -> Tensor:
        if not self.nested:
            return self._floats("scale")[rows]
        codes = self.scale[rows]
        scale: Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(
            codes.reshape(-1),
            self._floats("nested_scale")[rows].reshape(-1),
            self._floats("nested_code"),
            NESTED_BLOCK,
            torch.float32,
        )
        return scale.view(len(codes), -1)[:, : self.blocks] + self._floats("offset")[rows, None]

    def _set_scale(self, index: int, scale: Tensor) -> None:
        from bitsandbytes.functional import quantize_blockwise

        if not self.nested:
            self._floats("scale")[index] = scale
            return
        offset = scale.mean()
        filled = pad(scale - offset, (0, self.scale.shape[1] - len(scale)))
        codes, state = quantize_blockwise(filled, blocksize=NESTED_BLOCK)
        self.scale[index] = codes
        self._floats("nested_scale")[index] = state.absmax
        self._floats("nested_code")[:] = state.code
        self._floats("offset")[index] = offset

    def _keep(self, name: str, *size: int) -> None:
        """A buffer of so many floats, as bytes."""
        self.register_buffer(name, torch.zeros(*size, dtype=torch.float32).view(torch.uint8))

    def _floats(self, name: str) -> Tensor:
        return self.get_buffer(name).view(torch.float32)
