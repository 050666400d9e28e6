"""The law to explore: one HTML file that computes in the browser and needs no other file.

    python chinchilla.py page                                   runs/chinchilla-page.html
    python chinchilla.py page --points mine.csv --fit fit.json  with your own runs, and the law fitted to them

scaling/page.html is the template. Laws, devices and points are written into it as JSON, so that every figure
has a single source. Its JavaScript repeats the formulas of `Law` and of scaling/plan.py, in float64 too.
"""

import json
import math
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, fields
from pathlib import Path

from chinchilla import DEFAULT_LAW, LAWS, MANY_TOKENS, Law, Published, points
from formats import command
from formats.atomic import replace_file
from scaling.hardware import DEFAULT_MFU, DEVICES, PUE
from scaling.points import read_points
from scaling.shapes import SEQ_LEN, Shape

TEMPLATE = Path(__file__).with_name("page.html")
OUT = Path("runs/chinchilla-page.html")
MARK = "__DATA__"  # where the template takes the data
GOPHER = 5.76e23  # FLOPs: the budget at which Chinchilla was trained

MODELS = [  # name, N, D
    ("GPT-3", 175e9, 300e9),
    ("Gopher", 280e9, 300e9),
    ("MT-NLG", 530e9, 270e9),
    ("Chinchilla", 70e9, 1.4e12),
    ("Llama 1 65B", 65e9, 1.4e12),
    ("Llama 2 70B", 70e9, 2e12),
    ("Llama 3 8B", 8e9, 15e12),
    ("Llama 3 70B", 70e9, 15e12),
    ("Llama 3 405B", 405e9, 15.6e12),
]
SOURCES = (
    "Models: GPT-3, Gopher, MT-NLG and Chinchilla in table 1 of Hoffmann et al.; Llama 1 in "
    "arXiv 2302.13971; Llama 2 in arXiv 2307.09288; Llama 3 in arXiv 2407.21783.",
    "Shapes, and the FLOPs of their parts: Hoffmann et al., table A9 and appendix F, with embeddings looked "
    "up at no cost.",
    "GPU-hours = C / (peak × MFU × 3600), where MFU is the share of the peak that goes into 6 N D; "
    f"kWh = GPU-hours × kW × {PUE:g}, as in section 6 of Touvron et al. 2023 (LLaMA, arXiv 2302.13971). "
    "Peaks (dense bf16) and watts from the makers' data sheets, prices on demand, May 2026 (B200: March); "
    "scaling/hardware.py cites them.",
    "Many tokens per parameter: Sardana and Frankle 2024, arXiv 2401.00448.",
)


def span(low: float, high: float, values) -> list[float]:
    """Return the ends of an axis: low and high, or the next half power of ten where values go beyond."""
    least, most = 2 * math.log10(min(values)), 2 * math.log10(max(values))
    return [min(low, 10.0 ** (math.floor(least) / 2)), max(high, 10.0 ** (math.ceil(most) / 2))]


def page_data(N, D, L, laws: dict[str, Published], start: str = DEFAULT_LAW) -> dict:
    """Return all that the template shows, for JSON.

    N, D, L: the runs, float64 (n,) each. laws: those to choose from. start: name of the law shown first."""
    C = 6 * N * D
    # The axes reach all points, and the optima at both ends of the compute of laws from your own runs.
    yours = [(p.law, budget) for name, p in laws.items() if name not in LAWS for budget in p.compute]
    optima = [law.optimal(budget) for law, budget in yours]
    ends = {
        "C": span(1e17, 1e27, [*C, *(budget for _, budget in yours)]),
        "N": span(1e7, 1e13, [*N, *(best_N for best_N, _ in optima)]),
        "D": span(1e9, 10**14.5, [*D, *(best_D for _, best_D in optima)]),
    }
    return {
        "laws": {
            name: {
                "title": p.title,
                "source": p.source,
                "note": p.note,
                "compute": p.compute,
                "law": asdict(p.law),
            }
            for name, p in laws.items()
        },
        "devices": {name: asdict(device) for name, device in DEVICES.items()},
        "models": [{"name": name, "N": size, "D": tokens} for name, size, tokens in MODELS],
        "points": [[float(f"{value:.5g}") for value in run] for run in zip(N, C, L, strict=True)],
        "range": ends,
        "start": {
            "C": GOPHER if start in LAWS else laws[start].compute[1],
            "law": start,
            "gpu": "h100",
            "gpus": 1024,
            "mfu": DEFAULT_MFU,
        },
        "transformer": {"vocabulary": Shape.vocab, "sequence": SEQ_LEN},
        "pue": PUE,
        "trusted_ratio": MANY_TOKENS,
        "sources": SOURCES,
    }


def html(data: dict) -> str:
    """Return the page. Raises ValueError for a number that is not finite, which JSON cannot hold."""
    # Escape "</": "</script>" in a title would end the element that holds the data.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")
    return TEMPLATE.read_text(encoding="utf-8").replace(MARK, text)


def read_fit(path: Path) -> Published:
    """Return the law in a fit.json that `chinchilla.py fit` wrote. Raises ValueError for any other file, for
    numbers out of range, and for a law that its points do not determine."""
    names = {field.name for field in fields(Law)}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        law = Law(**{name: float(values[0]) for name, values in found["law"].items() if name in names})
        least, most = (float(C) for C in found["C"])
        title, source = f"Your fit of {found['file']}", f"{found['points']} points"
        if not (0 <= law.E < math.inf and least <= most):
            raise ValueError(f"E is {law.E:g}, C {least:g} to {most:g}")
        for x in (law.A, law.B, law.alpha, law.beta, least, most):
            if not 0 < x < math.inf:
                raise ValueError(f"{x:g} is not positive and finite")
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path}: expected the fit.json that `chinchilla.py fit` writes ({error})") from None
    if reasons := found.get("undetermined"):
        raise ValueError(f"{path}: its points do not determine a law, so there is none to show: {reasons[0]}")
    return Published(law, title, source, (least, most))


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=command.path,
        metavar="FILE",
        help=f"where to write the page (default {OUT}, if it is new)",
    )
    parser.add_argument(
        "--points", type=command.path, help="CSV of your runs: N, D or C, loss (default: Hoffmann's)"
    )
    parser.add_argument("--fit", type=command.path, help="fit.json of `chinchilla.py fit`: show your law too")


def main(args: Namespace) -> int:
    """Write the page and return the exit code."""
    out = args.out or OUT
    if args.out is None and out.exists():
        raise ValueError(f"{out} is there already: name another file by --out, or replace it by --out {out}")
    if args.out and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"--out {out}: expected a file name in a directory that exists")
    laws = dict(LAWS)
    if args.fit and args.points is None:
        raise ValueError(f"--fit {args.fit}: --fit needs --points, the runs it was fitted to")
    if args.fit:
        laws = {"fit": read_fit(args.fit), **laws}
    runs = read_points(args.points) if args.points else points()
    text = html(page_data(*runs, laws, next(iter(laws))))
    out.parent.mkdir(exist_ok=True)
    with replace_file(out) as new:
        new.write_text(text, encoding="utf-8")
    print(f"{out}: {len(text) // 1000} kB; open it in a browser")
    return 0
