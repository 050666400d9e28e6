"""The kernels go through Triton's compilers, which reject code that the interpreter accepts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Every feature and width of what is used where nothing is measured; results/machine_code.json has all pairs.
CASES = {
    "attention": [
        "bf16, width 64, causal, 4 heads a group",
        "bf16, width 128, bidirectional, no groups",
        "bf16, width 128, window, soft-cap, lengths",
        "bf16, width 256, window, soft-cap, documents",
        "bf16, width 64, bidirectional, no groups, bias",
        "TF32, width 128, causal, 4 heads a group",
    ],
    "rmsnorm": ["bf16, width 768, residual", "bf16, width 16384, residual"],
    "cross_entropy": ["bf16, vocabulary 50257", "float32, vocabulary 50257, soft-cap"],
    "grouped_matmul": [
        "bf16, 1 rows a group, y",
        "bf16, 1024 rows a group, y",
        "bf16, 64 rows a group, dx",
        "bf16, dw",
        "TF32, y",
        "float32, dw",
    ],
}
PROGRAM = """
import json, sys
from dataclasses import asdict
from kernels.bench import machine_code

if __name__ == "__main__":
    chosen, every = json.loads(sys.argv[1]), machine_code.CASES
    machine_code.CASES = {name: {case: every[name][case] for case in cases} for name, cases in chosen.items()}
    print(json.dumps([asdict(machine) for machine in machine_code.compile_all(chosen, ["sm_90"])]))
"""


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    """Compile the kernels for sm_90, without the interpreter."""
    program = tmp_path_factory.mktemp("compile") / "program.py"
    program.write_text(PROGRAM)
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, program, json.dumps(CASES)]
    done = subprocess.run(command, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def attention(machines, *names):
    found = [m for m in machines if m["operation"] == "attention" and m["kernel"] in names]
    assert {m["kernel"] for m in found} == set(names)
    return found


def test_attention_runs_on_hoppers_matrix_units_and_copy_engine(hopper):
    for m in attention(hopper, "forward_kernel", "dkdv_kernel", "dq_kernel", "dbias_kernel"):
        assert m["matrix"].endswith("HGMMA") and m["tma"] > 0, m
    for m in attention(hopper, "split_kernel"):
        assert m["matrix"].endswith("HMMA"), m  # a tile of 16 rows is too small for HGMMA


def test_grouped_products_run_on_hoppers_matrix_units(hopper):
    found = [m for m in hopper if m["operation"] == "grouped_matmul"]
    assert {m["kernel"] for m in found} == {"product_kernel", "weight_kernel"}
    for m in found:  # the tiles for groups of one row are too small for HGMMA
        assert m["matrix"].endswith(" HMMA" if "1 rows" in m["case"] else " HGMMA"), m


def test_nothing_spills(hopper):
    """Except dk and dv at head width 256 with every feature, and a few instructions elsewhere."""
    for m in hopper:
        allowed = 0
        if m["kernel"] == "dkdv_kernel" and "width 256, window" in m["case"]:
            allowed = 40
        elif m["kernel"] in ("delta_kernel", "split_kernel") or "width 16384" in m["case"]:
            allowed = 8
        assert m["spills"] <= allowed, m


def test_programs_fit_the_shared_memory(hopper):
    assert all(m["shared"] <= 227 * 1024 for m in hopper)
