"""What instructions a device has."""

from __future__ import annotations

import torch

_BFLOAT16_TESTS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def fast_bfloat16(device: str = "cpu") -> bool:
    """Whether a `cpu` (AVX-512 BF16 or AMX) or `cuda` device has bfloat16 instructions."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    tests = (getattr(torch.cpu, name, None) for name in _BFLOAT16_TESTS)
    return any(bool(test()) for test in tests if test is not None)
