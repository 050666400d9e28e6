"""What --benchmark and --profile print, and that they leave no run behind."""

import json
import re
import time

import pytest

import gpt
import train
from engine import benchmark
from engine.batches import Batches

GIVEN = {
    "tokens_per_second": 1.0,
    "unit": "tokens",
    "flops_per_second": 1.0,
    "mfu": None,
    "product_flops": None,
    "peak_memory": 1,
}
GIVEN |= {"shares": dict.fromkeys(("batch", "rest", "gradient", "update"), 0.25)}
SMALL = gpt.Config(2, 4, 32, 64, max_seq_len=64, n_kv_heads=2)


@pytest.fixture
def flags(tmp_path, monkeypatch):
    monkeypatch.setitem(gpt.SIZES, "tiny", SMALL)
    monkeypatch.setattr(benchmark, "STEPS", 6)
    (tmp_path / "text.txt").write_text("".join(f"line {i}, {i * i % 97} and so on\n" for i in range(200)))
    flags = f"--model gpt --data {tmp_path / 'text.txt'} --tokenizer bytes --seq-len 16 --batch-size 2 "
    return [*(flags + f"--cache {tmp_path / 'cache'} --out {tmp_path / 'run'}").split()]


def test_the_benchmark_says_how_fast_and_where_the_time_goes(flags, tmp_path, capsys):
    assert train.main([*flags, "--benchmark"]) == 0
    speed, memory, shares = capsys.readouterr().out.strip().splitlines()
    assert float(re.search(r"([\d,]+) tokens/s", speed)[1].replace(",", "")) > 0
    flops, share, of = re.search(
        r"([\d.e+]+) FLOP/s, ([\d.]+)% of the ([\d.e+]+) FLOP/s of a", speed
    ).groups()
    assert float(share) == pytest.approx(100 * float(flops) / float(of), abs=0.06, rel=0.02)
    assert 0.05 < float(re.search(r"([\d.]+) GB", memory)[1]) < 100  # of the whole process
    percents = [float(x) for x in re.findall(r"([\d.]+)%", shares)]
    assert sum(percents[:3]) == pytest.approx(100, abs=0.2) and percents[3] <= percents[2]
    assert not (tmp_path / "run").exists()


def test_no_peak_no_mfu():
    assert "no MFU: peak unknown" in benchmark.describe(GIVEN)
    assert "40.0% MFU" in benchmark.describe(GIVEN | {"mfu": 0.4})
    in_product = benchmark.describe(GIVEN | {"flops_per_second": 2e9, "product_flops": 8e9})
    assert "25.0% of the 8e+09 FLOP/s of a matrix product here" in in_product and "MFU" not in in_product


def test_time_is_put_down_to_the_part_that_took_it(monkeypatch):
    clock = benchmark.Clock("cpu")
    for name, seconds in (("start", 0), ("batch", 0.02), ("gradient", 0.06), ("batch", 0.01)):
        time.sleep(seconds)
        clock(name)
    parts = clock.seconds()
    assert parts.keys() == {"batch", "gradient"}
    assert parts["batch"] >= 0.03 and parts["gradient"] >= 0.06


def test_data_that_comes_late_is_seen(flags, capsys, monkeypatch):
    def late(batches):
        time.sleep(0.1)
        return next_parts(batches)

    next_parts = Batches.next
    monkeypatch.setattr(Batches, "next", late)
    assert train.main([*flags, "--benchmark"]) == 0
    waiting = re.search(r"\(([\d.]+)% waiting for data\)", capsys.readouterr().out)
    assert float(waiting[1]) > 30


def test_time_without_a_kernel_is_that_in_no_interval():
    assert benchmark.idle_share([(10, 20)]) == 0
    assert benchmark.idle_share([(30, 40), (10, 20), (15, 25), (16, 17)]) == 5 / 30  # only 25 to 30
    assert benchmark.idle_share([(0, 100), (10, 20), (90, 100), (150, 200)]) == 50 / 200


def test_kernel_times_are_shares_that_add_up(flags, monkeypatch):
    monkeypatch.setattr(benchmark, "PROFILED", 2)
    args = train.parse_arguments([*flags, "--benchmark"])
    with benchmark.prepared(args, train.prepare) as run:
        figures = benchmark.kernel_times(run, train.gradient, train.descend)
    shares = list(figures["kernels"].values())
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
    assert "aten::mm" in figures["kernels"] and 0 <= figures["idle"] < 1
    text = benchmark.describe(GIVEN | figures)
    assert f"gaps     {figures['idle']:.1%} of the time without a kernel" in text
    assert "gaps" not in benchmark.describe(GIVEN)


def test_the_profile_is_a_trace_and_a_table(flags, tmp_path, capsys):
    assert train.main([*flags, "--profile"]) == 0
    said = capsys.readouterr().out
    assert "aten::" in said and str(tmp_path / "run" / "trace.json") in said
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["trace.json"]
