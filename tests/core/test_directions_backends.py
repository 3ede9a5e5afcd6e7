"""Every back end of the seeded directions gives the same bits, wherever and however it runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.core import directions
from fedsim.core.directions import BASES, calls, combine, dots, perturb, pool
from fedsim.core.errors import ConfigError

from .test_directions import KNOWN, TOP, numbers, vector

needs_numba = pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="needs numba")
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
FAST = pytest.param("numba", marks=needs_numba)
SIZES = (0, 1, 3, 4, 127, 129, 2047, 2049, 4095, 4096, 4097)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROOT = Path(__file__).parents[2]


def test_choice_is_a_function_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: set[str] = set()
    monkeypatch.setattr(calls.importlib.util, "find_spec", lambda name: name in installed or None)
    assert directions.backend() == directions.backend("cuda:1") == "torch"
    w = torch.zeros(5)
    combine(w, [1], [1.0])
    assert w.any()
    with pytest.raises(ConfigError, match="pip install numba"):
        combine(w, [1], [1.0], backend="numba")
    installed |= {"numba", "triton"}
    assert directions.backend() == directions.backend(torch.device("cpu")) == "numba"
    assert directions.backend("cuda") == "triton"


@needs_numba
@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_compiled_philox_knows_the_answers(counter: tuple, key: tuple, answer: str) -> None:
    from fedsim.core.directions.compiled import philox

    words = np.zeros((2, 1), dtype=np.uint64)
    seed, first = (np.uint64(low | high << 32) for low, high in (key, counter[:2]))
    philox(seed, first, 1, np.uint64(counter[2]), np.uint64(counter[3]), words)
    found = words.view(np.uint32).T.ravel().tolist()  # rows a, c and b, d
    assert found == [int(word, 16) for word in answer.split()]


@pytest.mark.parametrize("name", ["torch", FAST])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("basis", BASES)
def test_back_ends_equal_the_reference_bit_for_bit(
    basis: str, dtype: torch.dtype, name: str
) -> None:
    seeds = [*pool(3, 3).tolist(), 0, TOP, 1, 2, 7]
    c = numbers(len(seeds))
    for size in SIZES:
        options = {"basis": basis, "offset": 2**34 + 5 if size % 2 else 0}
        w, delta = vector(size, dtype), vector(size, dtype)
        expected = w.clone()
        combine(expected, seeds, c, backend="numpy", **options)
        combine(w, seeds, c, backend=name, **options)
        assert torch.equal(w, expected), size
        products = dots(delta, seeds, backend="numpy", **options)
        assert torch.equal(dots(delta, seeds, backend=name, **options), products), size


@needs_numba
@pytest.mark.parametrize("basis", BASES)
def test_threads_change_no_bit(basis: str) -> None:
    seeds, c, start = pool(1, 40), numbers(40), vector(300_001)
    expected = start.clone()
    combine(expected, seeds, c, basis=basis, backend="torch")
    products = dots(start, seeds, basis=basis, threads=1)
    for threads in (1, 2, 3, 8):
        w = start.clone()
        combine(w, seeds, c, basis=basis, threads=threads)
        assert torch.equal(w, expected)
        assert torch.equal(dots(start, seeds, basis=basis, threads=threads), products)


@needs_numba
def test_clients_on_threads_do_not_disturb_each_other() -> None:
    expected = torch.zeros(100_000)
    combine(expected, range(64), numbers(64), threads=1)
    models = [torch.zeros(100_000) for _ in range(4)]
    workers = [
        threading.Thread(target=combine, args=(w, range(64), numbers(64)), kwargs={"threads": 2})
        for w in models
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(w, expected) for w in models)


@needs_numba
def test_kernels_release_the_gil() -> None:
    from fedsim.core.directions import compiled

    for kernel in (compiled._combine, compiled._combine_groups, compiled._dots):
        assert kernel.targetoptions["nogil"]


DIGEST = """
import hashlib, sys, torch
from fedsim.core.directions import BASES, combine, dots, pool
digest = hashlib.sha256()
torch.set_num_threads(int(sys.argv[1]))
for basis in BASES:
    w = torch.zeros(50_000)
    combine(w, pool(9, 48), [0.01 * k - 0.2 for k in range(48)], basis=basis)
    digest.update(w.numpy().tobytes() + dots(w, pool(9, 5), basis=basis).numpy().tobytes())
print(digest.hexdigest())
"""
GOLDEN = "53a009b710a54fe15b7628857c782a181454f00ad68de2012126820783b213af"


def run(code: str, *arguments: str, **environment: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_fresh_processes_give_the_recorded_bits() -> None:
    """K5, across processes and machines: other bits would break every journal of seeds."""
    assert run(DIGEST, "1") == run(DIGEST, "2") == GOLDEN


@needs_numba
@pytest.mark.slow
@pytest.mark.parametrize("features", ["", "+sse4.2,+avx,+avx2,+fma,+bmi,+bmi2"])
def test_other_processors_give_the_recorded_bits(features: str, tmp_path: Path) -> None:
    """Compiled for processors without AVX-512, without and with fused multiply-adds."""
    machine = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features}
    assert run(DIGEST, "1", NUMBA_CACHE_DIR=str(tmp_path), **machine) == GOLDEN


def test_global_random_states_are_untouched() -> None:
    numpy_state = np.random.get_state
    before = torch.get_rng_state(), numpy_state()[1].copy()
    w = vector(1000)
    for basis in BASES:
        combine(w, [1, 2], [1.0, 1.0], basis=basis)
        perturb(w, 3, 1.0, basis=basis)
        dots(w, [1], basis=basis)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(numpy_state()[1], before[1])


@needs_numba
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_memory_is_a_fiftieth_of_the_model(basis: str, dtype: torch.dtype) -> None:
    w, seeds, c = torch.zeros(10_000_000, dtype=dtype), pool(1, 64), numbers(64)
    wide = 2 * 4 * calls.HALF_PIECE * (dtype == torch.bfloat16)  # torch's memory is not traced
    combine(w[:10], seeds, c, basis=basis)
    dots(w[:10], seeds, basis=basis)
    tracemalloc.start()
    try:
        combine(w, seeds[:8], c[:8], basis=basis, threads=2)
        dots(w, seeds[:4], basis=basis, threads=2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak + wide < 0.02 * w.nbytes


INTERPRETED = """
import sys, torch
from fedsim.core.directions import combine, dots, pool
seeds = [*pool(1, 34)[2:].tolist(), 2**64 - 1, 5]
c = torch.linspace(-1, 1, len(seeds))
for dtype in (torch.float32, torch.float64, torch.float16):
    for offset, size in ((0, 1300), (2**34 + 7, 5)):
        w, blocks = torch.linspace(-1, 1, size).to(dtype), [offset, size]
        v, kw = w.clone(), {"basis": sys.argv[1], "offset": offset, "blocks": blocks}
        combine(w, seeds, [c.tolist()] * 2, **kw)
        combine(v, seeds, [c.tolist()] * 2, backend="triton", **kw)
        assert torch.equal(v, w), (dtype, offset)
        x, y = dots(w, seeds, **kw), dots(w, seeds, backend="triton", **kw)
        assert (x - y).abs().max() <= 1e-6 * x.abs().max(), (dtype, offset)
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("basis", BASES)
def test_triton_kernels_give_the_same_values_in_its_interpreter(basis: str) -> None:
    run(INTERPRETED, basis, TRITON_INTERPRET="1")


GENERATED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fedsim.core.directions import cuda, layout

names = "w size index stream seeds coefficients count series".split()
types = "*fp32 i64 i64 i32 *i64 *fp32 i32 *fp32".split()
for basis, code in layout.CODES.items():
    rows, columns = cuda._tile(code)
    fixed = dict(BASIS=code, TAG=layout.TAGS[code], ROWS=rows, COLUMNS=columns)
    signature = dict(zip(names, types)) | dict.fromkeys(fixed, "constexpr")
    source = ASTSource(cuda._combine, signature, fixed)
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=cuda.OPTIONS).asm["ptx"]
    assert "fma" not in text and "sqrt.approx" not in text and "mul.hi.u32" in text, basis
    assert "sqrt.rn" in text or basis != "gaussian"
"""


@needs_triton
@pytest.mark.slow
def test_code_for_the_gpu_rounds_every_operation_once() -> None:
    run(GENERATED)
