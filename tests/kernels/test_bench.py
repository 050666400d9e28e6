"""The benchmark counts work correctly, measures real errors, and writes its table, JSON file and chart.

Without a GPU a fixed time replaces the clock, and shapes are tiny.
"""

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_command
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from kernels.attention import visible
from kernels.bench import __main__ as bench
from kernels.bench import cases as bench_cases
from kernels.bench import long_rows

NO_GPU = not torch.cuda.is_available()
TINY = {
    "HEAD_WIDTHS": (16,),
    "WIDTH": 64,
    "TOKENS": 12,
    "LENGTHS": (8, 12),
    "SCORES_FIT": 8,
    "CACHE_LENGTHS": (16, 48),
    "NORM_WIDTHS": (24, 64),
    "NORM_SIZES": (192,),
    "VOCABULARIES": ((16, 40),),
    "ROUTED": 16,
    "EXPERTS": ((4, 2, 16, 24),),
}


@pytest.fixture
def tiny(monkeypatch):
    def replace(module, **values):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)

    replace(bench, MATMUL=64, COPY=1024)
    replace(bench_cases, **TINY)
    replace(long_rows, LONGEST=24)
    if NO_GPU:
        replace(bench, INTERPRETED=False, device_name=lambda: "A GPU")
        replace(bench, median_ms=lambda run: 0.25, extra_mib=lambda run: 1.5)
        # The interpreter's products are correct in float32, not in bfloat16.
        replace(bench_cases, DEVICE="cpu", DTYPE=torch.float32, compiled=lambda f: f)


@pytest.mark.parametrize("T, S", [(7, 7), (1, 9), (5, 12)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4, 50])
def test_attention_counts_the_pairs_that_are_visible(T, S, causal, window):
    pairs = visible(T, S, torch.device("cpu"), causal=causal, window=window).sum().item()
    assert bench_cases.attention_flops(2, T, S, 3, 8, causal, window) == 2 * 3 * pairs * 2 * (2 * 8)


def flops(case, which, backend="reference"):
    inputs, gradients = case.inputs()
    leaves = [x.requires_grad_() for x in inputs]
    with FlopCounterMode(display=False) as counter:
        bench_cases.timed(which, case.backends[backend], leaves, gradients)()
    return counter.get_total_flops()


@pytest.mark.skipif(not NO_GPU, reason="stands in for a GPU")
def test_flops_are_those_that_pytorch_counts(tiny):
    attention = bench_cases.attention_case(2, 8, 8, 4, 4, 16, False)
    assert attention.work["forward"] == flops(attention, "forward")
    # Plain PyTorch keeps the scores; flash attention computes them a second time, half a forward pass more.
    assert attention.work["both"] == flops(attention, "both") + attention.work["forward"] / 2
    assert attention.work["backward"] == attention.work["both"] - attention.work["forward"]
    cross_entropy = bench_cases.cross_entropy_case(16, 8, 40)
    assert cross_entropy.work["both"] == flops(cross_entropy, "both")
    grouped_matmul = bench_cases.grouped_matmul_case(4, 32, 16, 24)
    assert grouped_matmul.work["forward"] == flops(grouped_matmul, "forward", "loop")
    assert grouped_matmul.work["both"] == flops(grouped_matmul, "both", "loop")
    assert grouped_matmul.work["backward"] == grouped_matmul.work["both"] - grouped_matmul.work["forward"]


@pytest.mark.skipif(not NO_GPU, reason="stands in for a GPU")
@pytest.mark.parametrize("residual", [False, True])
def test_bytes_are_those_of_the_tensors(tiny, residual):
    case = bench_cases.rms_norm_case(200, 24, residual)  # 8 rows of 24, without the last 8 numbers
    inputs, gradients = case.inputs()
    results, input_gradients = case.exact(inputs, gradients)
    assert [x.shape for x in inputs] == [x.shape for x in input_gradients]

    def size(*tensors):
        return sum(x.numel() * bench_cases.DTYPE.itemsize for x in tensors)

    x, _, *added = inputs
    assert case.work["forward"] == size(x, *added, *results)
    assert case.work["backward"] == size(x, *gradients, input_gradients[0])  # the sum is as large as x
    linear = long_rows.linear_attention_case(2, 12, 2, 16)
    inputs, gradients = linear.inputs()
    results, input_gradients = linear.exact(inputs, gradients)
    assert linear.work["forward"] == size(*inputs, *results)
    assert linear.work["backward"] == size(*inputs, *gradients, *input_gradients)
    q, k, v = (decoding := bench_cases.attention_case(2, 1, 48, 4, 1, 16, False)).inputs()[0]
    assert decoding.work == {"forward": size(k, v)}


@pytest.mark.skipif(not NO_GPU, reason="stands in for a GPU")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "T, S, causal, window", [(8, 8, True, None), (8, 8, True, 3), (8, 8, False, None), (1, 20, False, None)]
)
def test_every_backend_of_attention_sees_the_same(tiny, T, S, causal, window):
    case = bench_cases.attention_case(2, T, S, 4, 2, 16, causal, window)
    (q, k, v), _ = case.inputs()
    expected = case.backends["reference"](q, k, v)
    for name in ("SDPA flash", "FlexAttention"):
        torch.testing.assert_close(case.backends[name](q, k, v), expected)


@pytest.mark.parametrize(("E", "M"), [(8, 8192), (64, 32768), (128, 32768)])
def test_experts_get_as_uneven_shares_as_a_router_gives(E, M):
    sizes = bench_cases.uneven_sizes(E, M)
    assert sum(sizes) == M and len(sizes) == E and sizes == bench_cases.uneven_sizes(E, M)
    assert M / E / 6 < min(sizes) < M / E / 2.9 and 2 * M / E < max(sizes) < 5 * M / E


def simple_case(backends):
    """Return a case of x * x, whose result and gradient in float64 need no reference."""
    inputs = lambda: ([torch.randn(50)], [torch.randn(50)])  # noqa: E731
    exact = lambda xs, dys: ([xs[0].double() ** 2], [2 * xs[0].double() * dys[0]])  # noqa: E731
    work = {"forward": 4e9, "backward": 8e9, "both": 12e9}
    return bench_cases.Case("square", {"n": 50}, work, "TFLOP/s", inputs, exact, backends)


def rows_of(case, rounds=1):
    with tqdm(disable=True) as bar:
        rows = bench.measure(case, {"TFLOP/s": 100.0}, rounds, bar)
    return {(row["pass"], row["backend"]): row for row in rows}


@pytest.mark.skipif(not NO_GPU, reason="stands in for a GPU")
def test_errors_rates_and_turns(tiny, monkeypatch):
    times = iter(range(1, 100))
    monkeypatch.setattr(bench, "median_ms", lambda run: float(next(times)))
    backends = {
        "reference": lambda x: x * x,
        "off": lambda x: x * x * 1.001,
        "forgets": lambda x: x * x.detach(),
    }
    rows = rows_of(simple_case(backends), rounds=3)
    assert [row["ms"] for row in rows.values()] == [4, 5, 6, 13, 14, 15, 22, 23, 24]  # of 1 4 7, 2 5 8, ...
    for (which, name), row in rows.items():
        assert row["rate"] == pytest.approx({"forward": 4, "backward": 8, "both": 12}[which] / row["ms"])
        assert row["of_limit"] == pytest.approx(row["rate"] / 100)
        assert row["speedup"] == rows[which, "reference"]["ms"] / row["ms"]
        error, grad_error = {"reference": (0, 0), "off": (1e-3, 1e-3), "forgets": (0, 0.5)}[name]
        assert row["error"] == (None if which == "backward" else pytest.approx(error, abs=1e-6))
        assert row["grad_error"] == (None if which == "forward" else pytest.approx(grad_error, abs=1e-6))


@pytest.mark.skipif(not NO_GPU, reason="stands in for a GPU")
def test_what_fails_says_why_in_its_row(tiny):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * x

        @staticmethod
        def backward(ctx, dy):
            raise NotImplementedError

    def no_memory(x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB.\nSee the manual.")

    def no_kernel(x):
        warnings.warn(
            "Flash attention kernel not used because: (Triggered internally at a.cpp:1.)", stacklevel=1
        )
        warnings.warn(
            "Flash Attention does not support masks. (Triggered internally at a.cpp:2.)", stacklevel=1
        )
        raise RuntimeError("No available kernel. Aborting execution.")

    rows = rows_of(
        simple_case(
            {"no memory": no_memory, "fine": torch.square, "broken": Broken.apply, "no kernel": no_kernel}
        )
    )
    for which in ("forward", "backward", "both"):
        assert rows[which, "no memory"]["failed"] == "CUDA out of memory. Tried to allocate 16.00 GiB."
        assert rows[which, "no kernel"]["failed"] == "Flash Attention does not support masks."
        fine, broken = rows[which, "fine"], rows[which, "broken"]
        assert fine["failed"] is None and fine["ms"] == 0.25 and fine["speedup"] is None
        assert broken["failed"] == (None if which == "forward" else "NotImplementedError")
    failed = rows["backward", "broken"]
    assert failed["ms"] is failed["rate"] is failed["extra_mib"] is None
    assert "  backward broken         NotImplementedError\n" in bench.table(list(rows.values()))


@pytest.mark.skipif(not NO_GPU, reason="stands in for a GPU")
def test_float64_out_of_memory_leaves_the_errors_open(tiny):
    def exact(*_):
        raise torch.OutOfMemoryError

    case = simple_case({"reference": torch.square})
    case.exact = exact
    row = rows_of(case)["both", "reference"]
    assert row["ms"] == 0.25 and row["failed"] is row["error"] is row["grad_error"] is None


def check_run(out, expected_failures):
    content = json.loads(out.read_text())
    assert content.keys() >= {"command", "commit", "device", "torch", "triton", "limits", "results"}
    assert content["limits"].keys() == {"TFLOP/s", "GB/s"}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {path.suffix for path in out.parent.iterdir()} == {".json", ".png"}
    for row in content["results"]:
        if row["failed"]:
            assert row["backend"] in expected_failures, row
            continue
        assert row["ms"] > 0 and row["rate"] > 0 and row["extra_mib"] >= 0, row
        for key, not_of in (("error", "backward"), ("grad_error", "forward")):
            if row["pass"] != not_of:
                assert row[key] < (1e-6 if NO_GPU else 2e-2), row
    return content


@pytest.mark.skipif(not NO_GPU, reason="stands in for a GPU")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("rendered")
def test_a_whole_run(tiny, tmp_path, capsys):
    out = tmp_path / "kernels.json"
    assert bench.main(["--rounds", "1", "--out", str(out)]) == 0
    content = check_run(out, {"SDPA cuDNN", "FlexAttention"})  # no gradients on a CPU
    assert content["command"] == f"python -m kernels.bench --rounds 1 --out {out}"
    assert content["device"] == "A GPU" and content["limits"]["GB/s"] == 2 * 1024 / 0.25 / 1e6

    rows = content["results"]
    attention = [row for row in rows if row["operation"] == "attention"]
    backends = ["plinth", "reference", "SDPA flash", "SDPA cuDNN", "FlexAttention"]
    # Two lengths, causal and not, grouped and windowed; without the reference for the longer.
    assert len(attention) == 3 * (4 * 5 + 2 * 4) + 2 * 5
    assert [row["backend"] for row in attention[:5]] == backends
    assert all(row["failed"] for row in attention if row["backend"] == "SDPA cuDNN")
    decoding = [row for row in attention if row["shape"]["T"] == 1]
    assert {(row["unit"], row["shape"]["S"]) for row in decoding} == {("GB/s", 16), ("GB/s", 48)}
    linear = [row for row in rows if row["operation"] == "linear_attention"]
    assert len(linear) == 3 * (3 + 2 + 2) and {row["unit"] for row in linear} == {"GB/s"}
    norms = [row for row in rows if row["operation"] == "rmsnorm"]
    assert len(norms) == 2 * 2 * 2 * 4 and {row["unit"] for row in norms} == {"GB/s"}
    losses = [row for row in rows if row["operation"] == "cross_entropy"]
    assert [row["backend"] for row in losses] == ["plinth", "reference", "torch", "compiled"]
    products = [row for row in rows if row["operation"] == "grouped_matmul"]
    assert [row["backend"] for row in products] == 3 * ["plinth", "loop", "F.grouped_mm"]

    said = capsys.readouterr().out
    assert (
        said.startswith("A GPU, torch ")
        and "attention, float32: T 8, S 8, B 1, H 4, G 4, K 16, causal\n" in said
    )
    tables = [line for line in said.splitlines() if line.startswith("  ")]
    failed = [row for row in rows if row["failed"]]
    whole = [line for line in tables if not any(row["failed"] in line for row in failed)]
    assert {len(line) for line in whole} == {97} and len(whole) == len(rows) - len(failed) + said.count(
        "speed-up"
    )


@pytest.mark.gpu
@pytest.mark.usefixtures("rendered")
def test_a_whole_run_on_a_gpu(tiny, tmp_path, a_gpu_itself):
    out = tmp_path / "kernels.json"
    assert bench.main(["--rounds", "1", "--out", str(out)]) == 0
    check_run(out, {"SDPA flash", "SDPA cuDNN", "FlexAttention"})


@pytest.mark.skipif(not NO_GPU, reason="stands in for a GPU")
def test_ctrl_c_keeps_what_is_measured(tiny, tmp_path, monkeypatch):
    measure, out = bench.measure, tmp_path / "kernels.json"

    def measure_one(case, *rest):
        if case.shape["residual"]:
            raise KeyboardInterrupt
        return measure(case, *rest)

    monkeypatch.setattr(bench, "measure", measure_one)
    assert bench.main(["rmsnorm", "--out", str(out)]) == 130
    assert len(json.loads(out.read_text())["results"]) == 2 * 2 * 4


def test_without_a_gpu_one_line_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ended = run_command("-m", "kernels.bench", "attention")
    assert ended.code == 2 and not ended.out
    assert ended.err == (
        "error: there is no GPU to measure; `python -m kernels.bench --compile-only` shows what can be seen "
        "without one\n"
    )


def test_mistakes_are_one_line(tiny, capsys, tmp_path):
    def error(*argv):
        assert bench.main([*map(str, argv)]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out
        return said.err

    assert "--rounds 0" in error("--rounds", 0)
    assert "--target names what" in error("--target", "sm_90")
    assert "file.txt" in error("--out", tmp_path / "file.txt")
    assert "missing" in error("--compile-only", "--out", tmp_path / "missing" / "file.json")


def test_compiling_only_is_left_to_machine_code(monkeypatch, capsys):
    asked = []
    module = SimpleNamespace(TARGETS=("sm_80", "sm_90"), report=lambda *given: asked.append(given))
    monkeypatch.setitem(sys.modules, "kernels.bench.machine_code", module)
    monkeypatch.setattr(bench, "INTERPRETED", False)
    assert bench.main(["--compile-only"]) == 0
    assert bench.main(["rmsnorm", "--compile-only", "--out", "x.json"]) == 0
    assert bench.main(["rmsnorm", "--compile-only", "--target", "sm_90"]) == 0
    both = ("sm_80", "sm_90")
    assert asked == [(None, None, both), ("rmsnorm", Path("x.json"), both), ("rmsnorm", None, ("sm_90",))]


def test_compiled_rows_take_the_place_of_those_before(tmp_path, monkeypatch):
    """Of the same operation and target; the rows of another compiler are not mixed with them."""
    from kernels.bench import machine_code

    def machines(names, targets):
        cases = [(target, name) for target in targets for name in names]
        return [machine_code.Machine(*case, "a case", "a_kernel", *numbers) for case in cases]

    numbers, out = (1, 0, 0, "", 0, 4, 1), tmp_path / "machine_code.json"
    monkeypatch.setattr(machine_code, "compile_all", machines)
    machine_code.report("rmsnorm", out)
    numbers = 2, *numbers[1:]
    machine_code.report("rmsnorm", out, ("sm_90",))
    content = json.loads(out.read_text())
    rows = [(row["target"], row["operation"], row["registers"]) for row in content["results"]]
    names, targets = ("rmsnorm", "rms_norm_backward"), machine_code.TARGETS
    others = [(target, name, 1) for target in targets for name in names if target != "sm_90"]
    assert rows == [*others, *(("sm_90", name, 2) for name in names)]
    with pytest.raises(ValueError, match="--target sm_1: expected one of sm_80"):
        machine_code.report("rmsnorm", out, ("sm_1",))
    out.write_text(json.dumps(content | {"triton": "0"}))
    with pytest.raises(ValueError, match=r"compiled by .*'0'.*name another file"):
        machine_code.report("rmsnorm", out)


@pytest.mark.parametrize("operation", bench.CASES)
def test_an_operation_is_compiled_with_all_of_its_configurations(operation, monkeypatch):
    from kernels.bench import machine_code

    asked, belongs = [], {"rms_norm_backward": "rmsnorm", "linear_cross_entropy": "cross_entropy"}

    def machines(names, targets):
        asked.extend(names)
        return [machine_code.Machine("sm_90", operation, "a case", "a_kernel", 1, 0, 0, "", 0, 4, 1)]

    monkeypatch.setattr(machine_code, "compile_all", machines)
    machine_code.report(operation, None)
    for name in machine_code.CASES:
        of = belongs.get(name, name).replace("gathered", "selected").removesuffix(", configured")
        assert (name in asked) == (of.removesuffix("_forward").removesuffix("_backward") == operation), name
