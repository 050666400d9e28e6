"""What was measured, what failed, what is left, and the aims beside what was reached."""

from collections.abc import Callable, Iterable

Rows = list[dict]
LONGEST = "width 128, T 16384, causal"


# --- the aims


def ratio(rows: Rows, name: str, which: str, theirs: str) -> float | None:
    """Return how many times as fast as `theirs` our kernel is, in a pass of a measurement of attention."""
    times = {r["backend"]: r["ms"] for r in results(rows, "attention", name) if r["pass"] == which}
    ours, other = times.get("plinth"), times.get(theirs)
    return other / ours if ours and other else None


def norm_share(rows: Rows, which: str) -> float | None:
    """Return the smallest share of the copy bandwidth that RMSNorm of a large tensor reaches in a pass."""
    shares = [r["of_limit"] for row in rows if row["step"] == "operations" and "RMSNorm" in row["name"]
              for r in row.get("results", []) if r["backend"] == "plinth" and r["pass"] == which]  # fmt: skip
    return min((share for share in shares if share), default=None)


def figure(rows: Rows, step: str, name: str, key: str) -> float | None:
    """Return a figure of a measurement, None where there is none."""
    return next((row.get(key) for row in rows if (row["step"], row["name"]) == (step, name)), None)


def results(rows: Rows, step: str, name: str) -> list[dict]:
    """Return the results of a measurement, one for each backend and pass."""
    return figure(rows, step, name, "results") or []


def auto_over_torch(rows: Rows) -> float | None:
    """Return how many times as fast gpt trains with --kernels auto as with --kernels torch."""
    auto, torch = (
        figure(rows, "training", f"gpt, --kernels {k}", "tokens_per_second") for k in ("auto", "torch")
    )
    return auto / torch if auto and torch else None


# What is aimed at, the least value that meets the aim, a function that finds what was reached, and figures of
# others.
AIMS: list[tuple[str, float, Callable[[Rows], float | None], str]] = [
    (f"attention forward, {LONGEST}, over SDPA flash", 1.3,
     lambda rows: ratio(rows, LONGEST, "forward", "SDPA flash"),
     "TFLOP/s on an H100 by the FA3 paper: FA2 335, cuDNN 539, FA3 616"),
    (f"attention forward, {LONGEST}, over SDPA cuDNN", 0.85,
     lambda rows: ratio(rows, LONGEST, "forward", "SDPA cuDNN"), ""),
    (f"attention both passes, {LONGEST}, over SDPA flash", 1.1,
     lambda rows: ratio(rows, LONGEST, "both", "SDPA flash"), ""),
    ("RMSNorm forward, share of copy bandwidth", 0.88, lambda rows: norm_share(rows, "forward"), ""),
    ("RMSNorm backward, share of copy bandwidth", 0.88, lambda rows: norm_share(rows, "backward"), ""),
    ("gpt 124m, T 1024, MFU of 989 TFLOP/s", 0.50,
     lambda rows: figure(rows, "training", "gpt, --kernels auto", "mfu"),
     "tokens/s on an H100: 580k are 50 %; llm.c 468k, modded-nanogpt's readable trainer 448k"),
    ("gpt 124m, --kernels auto over --kernels torch, both compiled", 1.0, auto_over_torch, ""),
]  # fmt: skip


def aims(rows: Rows) -> str:
    """Return the table of the aims."""
    lines = [f"{'aim':66} {'at least':>8} {'reached':>8}"]
    for what, least, reached, beside in AIMS:
        value = reached(rows)
        shown = "" if value is None else f"{value:.2f}"
        verdict = "" if value is None else "yes" if value >= least else "no"
        lines.append(f"{what:66} {least:8.2f} {shown:>8} {verdict:3}  {beside}".rstrip())
    return "\n".join(lines)


# --- the rows


def headline(row: dict) -> str:
    """Return the most important figures of a row, in one line."""
    if row["failed"]:
        return "FAILED: " + row["failed"].splitlines()[-1][:150]
    if "mfu" in row:
        mfu = f"{row['mfu']:.1%} MFU, " if row["mfu"] else ""
        top = "; ".join(f"{name[:40]} {share:.0%}" for name, share in list(row["kernels"].items())[:3])
        return (
            f"{row['tokens_per_second']:,.0f} {row.get('unit', 'tokens')}/s, {mfu}"
            f"{row['peak_memory'] / 1e9:.1f} GB, {row['idle']:.1%} without a kernel; most in {top}"
        )
    if "results" in row and "ratio" in row["results"][0]:
        return ", ".join(f"{r['side']} {r['tokens_per_second']:,.0f} tokens/s" for r in row["results"])
    if "results" in row:
        return "; ".join(
            of_pass(row["results"], which) for which in dict.fromkeys(r["pass"] for r in row["results"])
        )
    if "val_loss" in row:
        return f"validation loss {row['val_loss']:.3f} after {row['tokens']:,} tokens"
    if "ms" in row:
        return f"{row['ms']:.3f} ms, {row['rate']:,.0f} {row['unit']}"
    if "metrics" in row:
        return f"{len(row['metrics'])} metrics"
    if "ended" in row:
        failed = f", {row['n_failed']} failed" * bool(row["n_failed"])
        return f"{row['passed']} tests passed{failed}" + ", not all within the time" * (not row["ended"])
    numbers = {name: value for name, value in row.items() if isinstance(value, float) and name != "seconds"}
    return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())


def of_pass(rows: Rows, which: str) -> str:
    """Return the rate of our kernel in a pass, and how many times as fast as the others it is."""
    times = {r["backend"]: r["ms"] for r in rows if r["pass"] == which and r["ms"]}
    ours = next(r for r in rows if r["pass"] == which and r["backend"] == "plinth")
    others = ", ".join(f"{ms / ours['ms']:.2f}x {name}" for name, ms in times.items() if name != "plinth")
    limit = f" ({ours['of_limit']:.0%})" if ours["of_limit"] else ""
    return f"{which} {ours['rate']:,.0f} {ours['unit']}{limit}, {others}"


def summary(rows: Rows, left: Iterable[str]) -> str:
    """Return all tables as text: the rows, what failed, what is left, the aims."""
    width = max([len(f"{row['step']}: {row['name']}") for row in rows], default=0)
    lines = [f"{row['step'] + ': ' + row['name']:{width}}  {headline(row)}" for row in rows]
    failed = [f"{row['step']}: {row['name']}" for row in rows if row["failed"]]
    left = list(left)
    lines += ["", f"failed: {', '.join(failed) or 'nothing'}", f"left: {', '.join(left) or 'nothing'}", ""]
    return "\n".join(lines) + aims(rows)


# --- the configurations that are kept


def winners(rows: Rows, within: float = 1.03) -> dict[str, dict[str, str]]:
    """Return for each operation and key the first configuration, in the order of the list, which begins with
    the simplest, whose time is within 3 percent of the best."""
    timed: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["step"] in ("tuning", "more tuning") and not row["failed"]:
            timed.setdefault((row["operation"], row["key"]), {})[row["config"]] = row["ms"]
    chosen: dict[str, dict[str, str]] = {}
    for (operation, key), times in timed.items():
        best = min(times.values())
        chosen.setdefault(operation, {})[key] = next(n for n, ms in times.items() if ms <= within * best)
    return chosen
