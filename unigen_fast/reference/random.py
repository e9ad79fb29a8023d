"""The noise of every layer: Philox4x32-10 (Salmon et al. 2011) and Box-Muller, a function of (seed, offset, index).

Element i of a tensor takes word i % 4 of the block with counter (i // 4, offset) and key seed, so that a kernel can
draw any element alone, and draw it again in backward. Uniforms have 24 bits, which fp32 holds exactly: every layer and
dtype sees the same uniforms, and the normals agree to rounding. The largest normal is sqrt(48 log 2) = 5.77.
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a·b. The int64 product wraps, and its bits are those of the unsigned one."""
    product = b * a
    return (product >> 32) & _MASK, product & _MASK


def philox(rng_state: Tensor, blocks: int) -> Tensor:
    """Words `[blocks, 4]` (in int64) of the counters 0 … blocks - 1 under `rng_state`, int64 `[2]`: (seed, offset)."""
    seed, offset = rng_state.unbind(-1)
    block = torch.arange(blocks, device=rng_state.device, dtype=torch.int64)
    c0, c1 = block & _MASK, block >> 32
    c2, c3 = (offset & _MASK).expand(blocks), ((offset >> 32) & _MASK).expand(blocks)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIER[0], c0)
        high1, low1 = _multiply(_MULTIPLIER[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def philox_normal(rng_state: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Standard normal noise of `shape`, contiguous index order."""
    count = math.prod(shape)
    words = philox(rng_state, (count + 3) // 4)
    radius = (((words[..., 0::2] >> 8) + 1).to(dtype) * 2.0**-24).log().mul(-2).sqrt()
    angle = (words[..., 1::2] >> 8).to(dtype) * (2.0**-24 * 2 * math.pi)
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return normal.reshape(-1)[:count].reshape(shape)
