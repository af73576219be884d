from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from unweave.kernels import attention, cpu
from unweave.kernels.library import load, targets

many = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def inputs(b: int, h: int, g: int, n: int, d: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Queries, keys and values as a model has them: views of `(b, n, heads, d)`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, n, heads, d, generator=generator).to(dtype).transpose(1, 2) for heads in (h, g, g)]


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    wide = [x.double() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*wide, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def compiled() -> bool:
    library = load()
    return library is not None and targets(library)[0] == "avx512" and hasattr(library, "uw_attention_avx512")


@many
@given(
    sizes=st.tuples(st.integers(1, 2), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.integers(1, 70)),
    d=st.sampled_from([16, 48, 64, 80]),
    causal=st.booleans(),
    scale=st.sampled_from([0.05, 0.5]),
)
def test_attention_against_float64(
    backend: str, sizes: tuple[int, tuple[int, int], int], d: int, causal: bool, scale: float
) -> None:
    b, (h, g), n = sizes
    q, k, v = inputs(b, h, g, n, d, seed=n)
    got = attention(q, k, v, scale=scale, causal=causal)
    assert got.shape == (b, n, h, d)
    assert got.dtype == torch.bfloat16
    # Rounded: the weights, at most 1 each and summing to 1, and the output.
    torch.testing.assert_close(got.double(), exact(q, k, v, scale, causal), rtol=1 / 128, atol=0.012)


def test_the_heads_may_be_parts_of_one_product() -> None:
    together = torch.randn(2, 9, 3 * 2 * 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, k, v = (x.view(2, 9, 2, 16).transpose(1, 2) for x in together.split(32, dim=2))
    apart = attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    assert torch.equal(attention(q, k, v, causal=True), apart)
    torch.testing.assert_close(apart.double(), exact(q, k, v, 0.25, True), rtol=1 / 128, atol=0.012)


def test_no_position_sees_what_comes_after_it() -> None:
    q, k, v = inputs(1, 2, 2, 50, 32, seed=3)
    before = attention(q, k, v, causal=True)
    k[:, :, 30:] = 40.0
    v[:, :, 30:] = 40.0
    after = attention(q, k, v, causal=True)
    assert torch.equal(after[:, :30], before[:, :30])
    assert not torch.equal(after[:, 30:], before[:, 30:])


def test_large_scores_do_not_overflow_and_nan_is_not_hidden() -> None:
    q, k, v = inputs(1, 1, 1, 20, 16, seed=4)
    q, k = 300 * q, 300 * k
    torch.testing.assert_close(
        attention(q, k, v, causal=True).double(), exact(q, k, v, 0.25, True), rtol=1 / 128, atol=0.012
    )
    k[0, 0, 3, 2] = torch.nan
    assert attention(q, k, v, causal=True)[0, 3:].isnan().all()


@pytest.mark.parametrize("case", ["fp32", "narrow", "graph", "no library"])
def test_what_the_kernel_does_not_know_goes_through_pytorch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float32 if case == "fp32" else torch.bfloat16
    q, k, v = inputs(1, 2, 1, 6, 12 if case == "narrow" else 16, seed=5, dtype=dtype)
    if case == "no library":
        monkeypatch.setattr(cpu, "has", lambda _: False)
    else:
        monkeypatch.setattr(cpu, "attention", lambda *_: pytest.fail("the kernel was called"))
    q.requires_grad_(case == "graph")
    got = attention(q, k, v, scale=0.25, causal=True)
    assert got.requires_grad == (case == "graph")
    torch.testing.assert_close(got.double(), exact(q, k, v, 0.25, True), rtol=1 / 128, atol=0.012)


@pytest.mark.skipif(not compiled(), reason="needs AVX512-BF16 and the C++ kernels")
def test_the_kernel_is_used_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNWEAVE_KERNELS", raising=False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("PyTorch's was called"))
    attention(*inputs(1, 2, 1, 6, 16, seed=5), causal=True)


@pytest.mark.skipif(not compiled(), reason="no compiled kernel for this processor")
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="no memory for AddressSanitizer")
def test_without_memory_to_work_with_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 MB of output fit below the limit, and the 256 MB that the kernel works with do not."""
    monkeypatch.delenv("UNWEAVE_KERNELS", raising=False)
    program = """
import resource, torch
from pathlib import Path
from unweave.kernels import attention
torch.set_num_threads(1)
small = torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16)
attention(small, small, small, causal=True)
x = torch.zeros(1, 1, 1, 1 << 14, dtype=torch.bfloat16).expand(1, 1, 1 << 12, 1 << 14)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
try:
    attention(x, x, x, causal=True)
except MemoryError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "there is no memory for what attention over rows of 4096 positions works with.\n", done
