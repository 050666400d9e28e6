"""The machine code of the kernels, by Triton's compiler, without a GPU.

    python -m kernels.bench --compile-only                                            all, in about 70 minutes
    python -m kernels.bench linear_attention --compile-only --target sm_90 --out results/machine_code.json

Triton's compiler needs the name of a GPU, but no GPU. So the host code of the kernels runs here with CPU
tensors, under a driver that only names the target, and every kernel is compiled where it would be launched.
The machine code shows much of what decides a kernel's speed:

    registers   of a thread, at most 255 (AMD: 512); with more of them, fewer threads share a multiprocessor
    spills      instructions that move values to memory and back because the registers are full
    shared      kB of on-chip memory of a program
    programs    programs that fit a multiprocessor at a time, by registers, shared memory and threads
    matrix      instructions that multiply tiles: HMMA (Ampere), HGMMA (Hopper), UTC*MMA (Blackwell), v_mfma
                (AMD)
    TMA         loads of whole tiles by the copy engine of Hopper and later GPUs
"""

import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kernels import (
    backend,
    configs,
    cross_entropy,
    flash_attention,
    flash_backward,
    flash_bias,
    flash_decoding,
    linear_chunks,
    rmsnorm,
    selected_backward,
    selected_blocks,
)
from kernels.backend import triton
from kernels.grouped_matmul import product_triton, weight_gradient_triton

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# A multiprocessor has so many bytes of shared memory, of which each program takes 1 kB more than it uses, so
# many registers, and room for so many threads.
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024, "gfx942": 64 * 1024}
REGISTERS, THREADS = 65536, 2048
MATRIX = r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b|\bv_mfma"


@dataclass(frozen=True)
class Machine:
    """The machine code of one kernel for one target, in figures: a row of the table."""

    target: str
    operation: str
    case: str
    kernel: str
    registers: int
    spills: int
    shared: int  # bytes
    matrix: str  # as in "16 HGMMA"
    tma: int
    warps: int
    programs: int  # on a multiprocessor at a time; 0 if one alone exceeds the shared memory, or for AMD


def programs(target: str, registers: int, shared: int, warps: int) -> int:
    """Return how many programs of so many warps fit a multiprocessor at a time, 0 for AMD: not computed.

    registers: of a thread. shared: bytes of a program.
    """
    if target.startswith("gfx"):
        return 0
    per_warp = 32 * (registers + -registers % 8)  # a warp gets them in units of 256
    return min(REGISTERS // (per_warp * warps), SHARED[target] // (shared + 1024), THREADS // (32 * warps))


class NamedTarget:
    """The part of a Triton driver that the compiler uses."""

    def __init__(self, target: str):
        from triton.backends.compiler import GPUTarget

        nvidia = target.startswith("sm_")
        self.target = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
        self.device = TARGETS.index(target)  # Triton keeps compiled kernels by device

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compiled_for(target: str, call: Callable[[], None]) -> list[tuple[str, Any]]:
    """Return (name, kernel) of every kernel that call() would launch.

    Afterwards the process has no driver of a GPU, so that it can launch none.
    """
    jit = triton.JITFunction
    run, compiled = jit.run, []

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    triton.runtime.driver.set_active(NamedTarget(target))
    backend._architecture.cache_clear()
    jit.run = compile_only
    try:
        call()
    finally:
        jit.run = run
    return compiled


def inspect(target: str, operation: str, case: str, name: str, kernel) -> Machine:
    """Return the figures of a compiled kernel, from its machine code."""
    if target.startswith("gfx"):
        code = kernel.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{key}:\s+(\d+)", code)[1]) for key in ("vgpr_count", "vgpr_spill_count")
        )
    else:
        cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage, code = (
                subprocess.run(
                    [cuobjdump, flag, file.name], check=True, capture_output=True, text=True
                ).stdout
                for flag in ("-res-usage", "-sass")
            )
        registers = int(re.search(r"REG:(\d+)", usage)[1])
        spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    matrix = ", ".join(f"{n} {name}" for name, n in Counter(re.findall(MATRIX, code)).most_common())
    tma = len(re.findall("UTMALDG", code))
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    fit = programs(target, registers, shared, warps)
    return Machine(
        target, operation, case, name.strip("_"), registers, spills, shared, matrix, tma, warps, fit
    )


# --- what is compiled


def attention(K: int, dtype: torch.dtype, *, group: int = 4, documents: bool = False, **masks) -> None:
    """Launch forward, backward and decoding at head width K."""
    torch.set_float32_matmul_precision("high")
    q = torch.zeros(1 if documents else 2, 1024, 8, K, dtype=dtype)
    k = torch.zeros(q.shape[0], 1024, 8 // group, K, dtype=dtype)
    cu_seqlens = torch.tensor([0, 500, 1024], dtype=torch.int32) if documents else None
    seqlens_k = torch.tensor([500, 1024]) if masks.get("lengths") else None
    options = (
        masks.get("causal", True),
        masks.get("window"),
        masks.get("softcap"),
        0.1,
        cu_seqlens,
        seqlens_k,
        torch.zeros(8, 257) if masks.get("bias") else None,
    )
    out, lse = flash_attention.forward(q, k, k, *options)
    flash_backward.backward(out, q, k, k, out, lse, *options)
    if masks.get("bias"):
        flash_bias.gradient(out, q, k, k, out, lse, *options)
    if not documents:
        flash_decoding.forward(q[:, :1], k, k, *options)


def linear(K: int, dtype: torch.dtype, *, forward: bool = True, backward: bool = True) -> None:
    """Launch linear attention at head width K."""
    torch.set_float32_matmul_precision("high")
    x, state = torch.zeros(2, 1024, 8, K, dtype=dtype), torch.zeros(2, 8, K, K)
    if forward:
        linear_chunks.forward(x, x, x, torch.zeros(8), state)
    if backward:
        linear_chunks.backward(x, state, x, x, x, torch.zeros(8), state)


def selected(K: int, dtype: torch.dtype, by_query: bool, *, forward: bool = True, backward: bool = True):
    """Launch attention over selected blocks at head width K, as in native sparse attention or as in MoBA."""
    torch.set_float32_matmul_precision("high")
    H, C, N, n = (32, 2, 64, 16) if by_query else (8, 8, 512, 3)
    q, k = torch.zeros(1, 256, H, K, dtype=dtype), torch.zeros(1, 256, 2, K, dtype=dtype)
    blocks = torch.zeros(1, 256, C, n, dtype=torch.int64)
    if forward:
        selected_blocks.forward(q, k, k, blocks, N, 0.1, None)
    if backward:
        selected_backward.backward(q, q, k, k, blocks, q, torch.zeros(1, 256, H), N, 0.1, None)


def norm(D: int) -> None:
    """Launch forward with a residual, and backward, at width D."""
    x, weight = torch.zeros(64, D, dtype=torch.bfloat16), torch.ones(D)
    y, h, rstd = rmsnorm.launch_forward(x, weight, x, 1e-6)
    rmsnorm.launch_backward(y, y, h, weight, rstd, True)


def cross_entropy_rows(dtype: torch.dtype, softcap: float | None) -> None:
    """Launch the kernel of cross entropy on 64 rows of GPT-2's vocabulary."""
    logits, row = torch.zeros(64, 50304, dtype=dtype)[:, :50257], torch.zeros(64)
    cross_entropy.to_gradient_triton(
        logits, torch.zeros(64, dtype=torch.int64), row, row, -100, softcap, 0.0, True
    )


def grouped(result: str, rows: int, dtype: torch.dtype, precision: str = "high") -> None:
    """Launch the kernel of one result, y, dx or dw, for 8 groups of `rows` rows on average."""
    torch.set_float32_matmul_precision(precision)
    x, y, w = (
        torch.zeros(*shape, dtype=dtype) for shape in ((8 * rows, 512), (8 * rows, 768), (8, 768, 512))
    )
    offsets = torch.zeros(8, dtype=torch.int32)
    if result == "y":
        product_triton(x, w.mT, offsets)
    elif result == "dx":
        product_triton(y, w, offsets)
    else:
        weight_gradient_triton(y, x, offsets)


BF16, FP32 = torch.bfloat16, torch.float32
ATTENTION = {
    "causal, 4 heads a group": {},
    "bidirectional, no groups": {"causal": False, "group": 1},
    "window, soft-cap, lengths": {"window": 256, "softcap": 30.0, "lengths": True},
    "window, soft-cap, documents": {"window": 256, "softcap": 30.0, "documents": True},
}
CASES = {
    "attention": {
        **{
            f"bf16, width {K}, {name}": partial(attention, K, BF16, **masks)
            for K in (64, 128, 256)
            for name, masks in ATTENTION.items()
        },
        # T5 has heads of these widths. At 256, the gradient of k and v spills 7 instructions.
        **{
            f"bf16, width {K}, bidirectional, no groups, bias": partial(
                attention, K, BF16, causal=False, group=1, bias=True
            )
            for K in (64, 128)
        },
        **{f"TF32, width {K}, causal, 4 heads a group": partial(attention, K, FP32) for K in (64, 128)},
    },
    "linear_attention": {
        **{f"bf16, width {K}": partial(linear, K, BF16) for K in (64, 128)},
        "TF32, width 128": partial(linear, 128, FP32),
    },
    "selected_attention": {
        **{
            f"bf16, width {K}, {'16 heads' if by_query else 'a head'} a choice": partial(
                selected, K, BF16, by_query
            )
            for K in (64, 128)
            for by_query in (True, False)
        },
        "TF32, width 128, 16 heads a choice": partial(selected, 128, FP32, True),
        "TF32, width 128, a head a choice": partial(selected, 128, FP32, False),
    },
    "rmsnorm": {f"bf16, width {D}, residual": partial(norm, D) for D in (768, 2048, 4096, 8192, 16384)},
    "cross_entropy": {
        "bf16, vocabulary 50257": partial(cross_entropy_rows, BF16, None),
        "float32, vocabulary 50257, soft-cap": partial(cross_entropy_rows, FP32, 30.0),
    },
    "grouped_matmul": {
        **{f"bf16, {rows} rows a group, y": partial(grouped, "y", rows, BF16) for rows in (1, 64, 1024)},
        **{f"bf16, {rows} rows a group, dx": partial(grouped, "dx", rows, BF16) for rows in (64, 1024)},
        "bf16, dw": partial(grouped, "dw", 1024, BF16),
        **{f"TF32, {result}": partial(grouped, result, 1024, FP32) for result in ("y", "dx", "dw")},
        **{
            f"float32, {result}": partial(grouped, result, 1024, FP32, "highest")
            for result in ("y", "dx", "dw")
        },
    },
}
SHIPPED = tuple(CASES)  # these compile the defaults; those below compile the alternatives of configs.py


def attention_configured(operation: str, name: str, K: int) -> None:
    """Launch the forward pass or the gradient of causal attention under a configuration."""
    q, lse = torch.zeros(2, 1024, 8, K, dtype=BF16), torch.zeros(2, 8, 1024)
    options = (True, None, None, 0.1, None, None)
    with configs.timed(operation, configs.CONFIGS[operation][name]):
        if operation == "attention_forward":
            flash_attention.forward(q, q, q, *options)
        else:
            flash_backward.backward(q, q, q, q, q, lse, *options)


def linear_configured(operation: str, name: str, K: int) -> None:
    """Launch the forward pass or the gradient of linear attention under a configuration."""
    forward = operation == "linear_attention_forward"
    with configs.timed(operation, configs.CONFIGS[operation][name]):
        linear(K, BF16, forward=forward, backward=not forward)


def selected_configured(operation: str, name: str, K: int) -> None:
    """Launch the forward pass or the gradient of attention over selected blocks under a configuration."""
    by_query, forward = operation.startswith("selected"), operation.endswith("forward")
    with configs.timed(operation, configs.CONFIGS[operation][name]):
        selected(K, BF16, by_query, forward=forward, backward=not forward)


def norm_configured(name: str, D: int) -> None:
    """Launch RMSNorm's backward pass at width D under a configuration."""
    h, weight, rstd = torch.zeros(8192, D, dtype=BF16), torch.ones(D), torch.ones(8192)
    with configs.timed("rms_norm_backward", configs.CONFIGS["rms_norm_backward"][name]):
        rmsnorm.launch_backward(h, h, h, weight, rstd, True)


def cross_entropy_configured(name: str) -> None:
    """Launch the kernel of cross entropy under a configuration."""
    with configs.timed("linear_cross_entropy", configs.CONFIGS["linear_cross_entropy"][name]):
        cross_entropy_rows(BF16, None)


def grouped_configured(name: str, result: str) -> None:
    """Launch the kernel of one result of the grouped product, y, dx or dw, under a configuration."""
    with configs.timed("grouped_matmul", configs.CONFIGS["grouped_matmul"][name]):
        grouped(result, 1024, BF16)


CASES |= {
    **{
        operation: {
            f"width {K}: {name}": partial(attention_configured, operation, name, K)
            for K in (64, 128)
            for name in configs.CONFIGS[operation]
        }
        for operation in ("attention_forward", "attention_backward")
    },
    **{
        operation: {
            f"width {K}: {name}": partial(linear_configured, operation, name, K)
            for K in (64, 128)
            for name in configs.CONFIGS[operation]
        }
        for operation in ("linear_attention_forward", "linear_attention_backward")
    },
    **{
        operation: {
            f"width {K}: {name}": partial(selected_configured, operation, name, K)
            for K in (64, 128)
            for name in configs.CONFIGS[operation]
        }
        for operation in configs.CONFIGS
        if operation.startswith(("selected", "gathered"))
    },
    "rms_norm_backward": {
        f"width {D}: {name}": partial(norm_configured, name, D)
        for D in (768, 4096)
        for name in configs.CONFIGS["rms_norm_backward"]
    },
    "linear_cross_entropy": {
        name: partial(cross_entropy_configured, name) for name in configs.CONFIGS["linear_cross_entropy"]
    },
    "grouped_matmul, configured": {
        f"{result}: {name}": partial(grouped_configured, name, result)
        for result in ("y", "dx", "dw")
        for name in configs.CONFIGS["grouped_matmul"]
    },
}
# The names of an operation's cases begin so, where not with the name of the operation.
BEGINNINGS = {
    "rmsnorm": ("rmsnorm", "rms_norm"),
    "cross_entropy": ("cross_entropy", "linear_cross_entropy"),
    "selected_attention": ("selected_attention", "gathered_attention"),
}


def compile_case(target: str, operation: str, case: str) -> list[Machine]:
    """Compile one case for one target."""
    compiled = compiled_for(target, CASES[operation][case])
    return [inspect(target, operation, case, name, kernel) for name, kernel in compiled]


def compile_all(operations: Iterable[str] = CASES, targets: tuple[str, ...] = TARGETS) -> list[Machine]:
    """Compile every case of these operations in one process per core, the alternatives of configs.py for
    Hopper only. Raises ValueError if TRITON_INTERPRET is set."""
    if backend.INTERPRETED:
        raise ValueError("--compile-only: TRITON_INTERPRET=1 is set, so nothing would be compiled; unset it")
    work = [
        (target, operation, case)
        for target in targets
        for operation in operations
        if operation in SHIPPED or target == "sm_90"
        for case in CASES[operation]
    ]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        done = [pool.submit(compile_case, *job) for job in work]
        bar = tqdm(done, desc="compile", unit="case")
        return list(dict.fromkeys(machine for future in bar for machine in future.result()))


def report(operation: str | None, out: Path | None, targets: tuple[str, ...] = TARGETS) -> None:
    """Print the table of an operation with its configurations, or of all; write it as JSON if `out` is given.

    Where that file exists, the new rows take the place of those of the same operations and targets. Raises
    ValueError if it is of other versions, or if a target is unknown.
    """
    names = [name for name in CASES if name.startswith(BEGINNINGS.get(operation, operation or ""))]
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    before = json.loads(out.read_text(encoding="utf-8")) if out and out.exists() else None
    if before and (found := {key: before[key] for key in versions}) != versions:
        raise ValueError(f"--out {out}: compiled by {found}, not {versions}; name another file")
    if unknown := set(targets) - set(TARGETS):
        raise ValueError(f"--target {min(unknown)}: expected one of {', '.join(TARGETS)}")
    machines = compile_all(names, targets)
    case = max(len(m.case) for m in machines)
    print(f"{'':37}{'':{case}}  registers spills shared TMA  matrix instructions")
    for m in machines:
        print(f"{m.target:6} {m.operation:14} {m.case:{case}} {m.kernel:18}", end="")
        print(f"{m.registers:7} {m.spills:6} {m.shared // 1024:3} kB {m.tma:3}  {m.matrix}")
    if out:
        command = " ".join(["python -m kernels.bench", *filter(None, [operation]), "--compile-only"])
        kept = before["results"] if before else []
        kept = [row for row in kept if row["target"] not in targets or row["operation"] not in names]
        rows = [*kept, *map(asdict, machines)]
        content = {"command": before["command"] if before else command, **versions, "results": rows}
        new = out.with_name(out.name + ".new")
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        new.replace(out)
