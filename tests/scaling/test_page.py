"""The page: one file, with the same numbers as Python. A headless browser shows what it contains."""

import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

import chinchilla
from chinchilla import LAWS, Law
from scaling import page
from scaling.hardware import DEVICES, PUE, gpu_hours
from scaling.shapes import SEQ_LEN, count_parameters, shape_for, training_flops

STATES = [
    {"C": C, "law": law, "gpu": gpu, "gpus": gpus, "mfu": mfu}
    for C, law, gpu, gpus, mfu in [
        (1e17, "besiroglu", "h100", 8, 0.4),
        (5.76e23, "besiroglu", "a100", 1024, 0.37),
        (3.8e25, "hoffmann3", "b200", 16384, 0.41),
        (1.23e21, "hoffmann1", "h200", 1, 0.5),
        (1e27, "hoffmann2", "v100", 7, 0.25),
        (1.4e22, "besiroglu", "h100", 8, 0.4),  # 0.03 orders above the largest run: as good as within
        (1e20, "kaplan", "mi300x", 64, 0.3),
    ]
]

# Runs in copies of the page. A frame can be as narrow as a telephone; a window cannot.
PROBE = """
<pre id="probe"></pre>
<script>
const observed = {};
const phone = document.createElement("iframe");
phone.style.width = "390px";
phone.onload = () => {
  const inside = phone.contentDocument.documentElement;
  observed.widths = [[inside.clientWidth, inside.scrollWidth]];
  for (const wanted of [STATES[2], STATES[5]]) {
    phone.contentWindow.change(wanted);
    observed.widths.push([inside.clientWidth, inside.scrollWidth]);
  }
  observed.start = read();
  observed.computed = STATES.map(compute);
  observed.shown = STATES.map((state) => {
    change(state);
    return read();
  });
  const type = (id, value) => {
    const input = document.getElementById(id);
    input.value = value;
    input.dispatchEvent(new Event("input"));
    return [input.ariaInvalid, document.getElementById("say").textContent, state[id]];
  };
  observed.refused = Object.fromEntries([["C", "ten"], ["gpus", "2.5"], ["mfu", "0"]].map(([id, value]) => {
    const found = type(id, value);
    document.getElementById(id).dispatchEvent(new Event("change"));
    return [id, found];
  }));
  const dot = document.querySelector("#fig-map .pick"), caption = document.getElementById("model");
  dot.dispatchEvent(new Event("click"));
  observed.captions = [caption.textContent];
  type("C", "2e21");
  document.getElementById("C").dispatchEvent(new Event("change"));
  observed.captions.push(caption.textContent);
  observed.hash = location.hash;
  observed.dots = document.querySelectorAll('#fig-map .pick[tabindex="0"]').length;
  observed.floors = [1e-9, 0.5, 1.8].map((E) => {
    const { yTicks, y } = lossAxis({ ...data.laws.besiroglu.law, E });
    return [yTicks.length, y[0]];
  });
  // Ends which three digits round to what is beyond them: 3.1623e17 and 6.3096e26.
  const slider = document.getElementById("slider");
  data.range.C = [10 ** 17.5, 10 ** 26.8];
  [slider.min, slider.max] = [17.5, 26.8];
  observed.ends = [-99, 99].map((exponent) => {
    slider.value = exponent;
    slider.dispatchEvent(new Event("input"));
    return [state.C, document.getElementById("C").ariaInvalid];
  });
  observed.half = extra(data.laws.besiroglu.law, compute({ ...state, law: "besiroglu" }), 0.5);
  document.getElementById("probe").textContent = JSON.stringify(observed);
};
function read() {
  const values = {};
  values.text = {};
  for (const node of document.querySelectorAll("[data-key]")) {
    values[node.dataset.key] = node.dataset.value;
    values.text[node.dataset.key] = node.textContent;
  }
  values.without = document.getElementById("without").textContent;
  values.far = document.getElementById("far").textContent;
  values.curves = document.querySelectorAll("#fig-loss path").length;
  values.none = document.getElementById("no-loss").textContent;
  values.svg = [...document.querySelectorAll("svg")].map((svg) => svg.outerHTML).join("");
  return values;
}
phone.src = "page.html";
document.body.append(phone);
</script>
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "page.html"
    assert chinchilla.main(["page", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def observed(written):
    """Return what the page shows in each of the states, from a single start of the browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is installed")
    probe = PROBE.replace("STATES", json.dumps(STATES))
    copy = written.with_name("probe.html")
    copy.write_text(written.read_text().replace("</body>", probe + "</body>"))
    # --allow-file-access-from-files: a page in a file may read a frame with another file.
    switches = (
        "--headless --no-sandbox --disable-gpu --allow-file-access-from-files --virtual-time-budget=9000"
    )
    command = [browser, *switches.split(), f"--user-data-dir={written.parent / 'profile'}", "--dump-dom"]
    command.append(f"{copy.as_uri()}#C=1e22&law=hoffmann3&gpu=a100&gpus=512&mfu=0.5")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="probe">(.+?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def expected(C, law, gpu, gpus, mfu):
    """Return the numbers of the page, computed in Python."""
    of = LAWS[law].law
    N, D = of.optimal(C)
    device, hours = DEVICES[gpu], gpu_hours(C, DEVICES[gpu], mfu)
    return {
        "N": N,
        "D": D,
        "ratio": D / N,
        "loss": of.loss(N, D) if isinstance(of, Law) else None,
        "gpu_hours": hours,
        "days": hours / gpus / 24,
        "dollars": device.price and hours * device.price,
        "kwh": hours * device.watts / 1000 * PUE,
    }


def test_the_file_needs_nothing_else(written):
    text = written.read_text()
    assert page.MARK in page.TEMPLATE.read_text() and page.MARK not in text
    links = re.findall(r"""(?:src|href)\s*[=:]\s*["'`](?!#)([^"'`]+)""", text)
    assert links == ["https://arxiv.org/abs/${part}"]  # of a source: nothing is loaded from it
    for loads in ("<link", "@import", "url(", "fetch(", "XMLHttpRequest", "WebSocket", "import(", "<img"):
        assert loads not in text, loads
    assert len(text) < 100_000


def test_its_data_are_those_of_python(written):
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', written.read_text(), re.S)[1])
    assert list(data["laws"]) == list(LAWS) and list(data["devices"]) == list(DEVICES)
    N, D, L = chinchilla.points()
    assert len(data["points"]) == 240
    # Written with 5 digits, of which the last is rounded.
    assert data["points"][100] == pytest.approx([N[100], 6 * N[100] * D[100], L[100]], rel=1e-4)


@pytest.mark.parametrize("i", range(len(STATES)), ids=[f"{s['law']}-{s['C']:g}" for s in STATES])
def test_numbers_are_pythons_to_six_digits(observed, i):
    shown, computed = observed["shown"][i], observed["computed"][i]
    for key, value in expected(**STATES[i]).items():
        if value is None:  # the law has no loss, or the price is unknown
            assert (shown[key], computed[key]) == ("", None), key
            continue
        assert float(shown[key]) == pytest.approx(value, rel=1e-6), key
        assert computed[key] == pytest.approx(value, rel=1e-6), key


@pytest.mark.parametrize("i", range(len(STATES)))
def test_shape_and_flops_are_those_of_the_plan(observed, i):
    computed = observed["computed"][i]
    shape = shape_for(computed["N"])
    assert (computed["shape"]["d"], computed["shape"]["layers"]) == (shape.d_model, shape.layers)
    assert computed["shape"]["N"] == count_parameters(shape)
    parts = computed["parts"]
    assert sum(parts.values()) == pytest.approx(training_flops(shape) / SEQ_LEN, rel=1e-12)
    layers = sum(parts.values()) - parts["head"]
    assert layers == pytest.approx(training_flops(shape, vocab_products=0) / SEQ_LEN, rel=1e-12)
    over = 100 * (sum(parts.values()) / (6 * count_parameters(shape, relative=False)) - 1)
    without = observed["shown"][i]["without"]
    assert float(re.search(r"takes ([\d.-]+) %", without)[1]) == pytest.approx(over, rel=5e-3)


def test_a_link_brings_its_view_back(observed):
    for key, value in expected(1e22, "hoffmann3", "a100", 512, 0.5).items():
        assert float(observed["start"][key]) == pytest.approx(value, rel=1e-6), key
    assert observed["hash"].startswith("#C=2e21&law=kaplan&gpu=mi300x&gpus=64&mfu=0.3")


def test_numbers_as_they_are_read(observed):
    """As scaling/plan_report.py prints them."""
    text = observed["shown"][1]["text"]
    assert (text["N"], text["D"], text["ratio"], text["loss"]) == ("72.2B", "1.33T", "18.4", "1.9744")
    assert (text["gpu_hours"], text["days"]) == ("1.39M", "56.4 days")
    assert (text["dollars"], text["kwh"]) == ("$1.8M", "610 MWh")
    small = observed["shown"][0]["text"]
    assert (small["days"], small["dollars"], small["kwh"]) == ("31.6 s", "$0.21", "54.1 Wh")


@pytest.mark.parametrize("i", range(len(STATES)))
def test_says_how_far_it_extrapolates(observed, i):
    far, (least, most) = observed["shown"][i]["far"], LAWS[STATES[i]["law"]].compute
    beyond = math.log10(max(STATES[i]["C"] / most, least / STATES[i]["C"]))
    if beyond < 0.05:
        assert far == ""
        return
    end = "above the largest run" if STATES[i]["C"] > most else "below the smallest run"
    assert f"{beyond:.1f} orders of magnitude {end}" in far


def test_a_law_without_loss_has_no_picture_of_it(observed):
    for state, shown in zip(STATES, observed["shown"], strict=True):
        assert ("is here an allocation alone" in shown["none"]) == (
            not isinstance(LAWS[state["law"]].law, Law)
        )
        assert not re.search(r"NaN|Infinity|undefined", shown["svg"])
    assert observed["start"]["curves"] > 11  # 10M to 1T in half orders of magnitude, and the frontier


def test_half_the_size_takes_a_quarter_more(observed):
    law = LAWS["besiroglu"].law
    N, D = law.optimal(1e21)  # the answer is the same for every budget
    assert observed["half"] == pytest.approx(law.tokens_for(N / 2, law.loss(N, D)) / (2 * D) - 1, rel=1e-6)
    assert observed["half"] == pytest.approx(0.259, abs=5e-4)


def test_every_model_can_be_reached(observed):
    assert observed["dots"] == len(page.MODELS)


@pytest.mark.parametrize(
    "name, words",
    [("C", "such as 1e22"), ("gpus", "a whole number from 1 to 1,000,000"), ("mfu", "0.01 to 100 %")],
)
def test_nonsense_is_refused_and_nothing_changes(observed, name, words):
    invalid, said, value = observed["refused"][name]
    assert invalid == "true" and words in said
    assert value == STATES[-1][name]


def test_what_a_model_is_stays_said_while_the_budget_changes(observed):
    first, later = observed["captions"]
    assert first.startswith("GPT-3: 175B parameters") and later == first


def test_the_ends_of_the_slider_are_budgets(observed):
    (least, low), (most, high) = observed["ends"]
    assert low == high == "false" and [least, most] == pytest.approx([10**17.5, 10**26.8], rel=1e-12)


def test_a_law_without_a_floor_still_has_an_axis(observed):
    (near_zero, low), (half, _), (usual, bottom) = observed["floors"]
    assert near_zero >= 4 and half >= 4 and usual >= 4
    assert low > 0.01 and bottom == pytest.approx(0.95 * 1.8)


def test_a_telephone_has_nothing_to_scroll_sideways(observed):
    for shown, needed in observed["widths"]:
        assert 370 <= shown <= 390  # less the bar for scrolling down, where there is one
        assert needed <= shown


def test_your_own_points_and_fit(tmp_path):
    law = Law(E=0.6, A=20.0, B=130.0, alpha=0.36, beta=0.35)
    lines = ["N,D,loss"]
    lines += [f"{N},{D},{law.loss(N, D)}" for N in (1e4, 3e4, 1e5, 3e5) for D in (3e6, 1e7, 3e7)]
    points = tmp_path / "<\u2028&.csv"
    points.write_text("\n".join(lines))
    assert chinchilla.main(["fit", str(points), "--bootstrap", "20", "--out", str(tmp_path)]) == 0
    out = tmp_path / "page.html"
    given = ["--fit", str(tmp_path / "fit.json"), "--points", str(points)]
    assert chinchilla.main(["page", "--out", str(out), *given]) == 0
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', out.read_text(), re.S)[1])
    assert data["start"]["law"] == "fit" and data["laws"]["fit"]["title"] == f"Your fit of {points.name}"
    # There is no noise, so the fit is exact up to the last step of its iteration.
    assert data["laws"]["fit"]["law"] == pytest.approx(vars(law), rel=1e-4)
    assert data["laws"]["fit"]["compute"] == pytest.approx([1.8e11, 5.4e13])
    # The axes reach down to the runs, and the first budget is within the slider's range.
    assert data["range"]["C"][0] <= 1.8e11 < data["start"]["C"] == pytest.approx(5.4e13)
    assert len(data["points"]) == 12
    assert data["range"]["N"][0] == 1e4 and data["range"]["D"][0] == 1e6


def test_without_out_the_page_is_a_new_file_in_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert chinchilla.main(["page"]) == 0
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.html")] == [
        "runs/chinchilla-page.html"
    ]
    capsys.readouterr()
    assert chinchilla.main(["page"]) == 2
    error = capsys.readouterr().err
    assert "is there already" in error and error.count("\n") == 1
    assert chinchilla.main(["page", "--out", "runs/chinchilla-page.html"]) == 0


def written_fit(path, **changed):
    """Write a file like that of the command fit, with the law of Besiroglu et al."""
    law = vars(LAWS["besiroglu"].law) | {name: changed[name] for name in changed if name != "C"}
    found = {"law": {name: [value, 0, 0] for name, value in law.items()}, "C": changed.get("C", [1e18, 1e22])}
    path.write_text(json.dumps(found | {"file": "mine.csv", "points": 9}))
    return path


def test_the_slider_reaches_a_fit_of_larger_runs(tmp_path):
    fit = page.read_fit(written_fit(tmp_path / "fit.json", C=[1e24, 2e28]))
    data = page.page_data(*chinchilla.points(), {"fit": fit, **LAWS}, "fit")
    assert data["range"]["C"] == pytest.approx([1e17, 10**28.5])
    assert data["start"]["C"] == 2e28
    assert page.page_data(*chinchilla.points(), LAWS)["range"]["C"] == [1e17, 1e27]


@pytest.mark.parametrize(
    "changed",
    [
        {"E": -0.1}, {"E": float("inf")}, {"A": 0}, {"B": float("nan")}, {"alpha": -0.3}, {"beta": 0},
        {"alpha": 0, "beta": 0}, {"A": 10**400}, {"C": [0, 1e22]}, {"C": [1e22, 1e18]},
        {"C": [1e18, float("inf")]},
    ],
)  # fmt: skip
def test_a_fit_out_of_range_is_refused(tmp_path, changed):
    path = written_fit(tmp_path / "fit.json", **changed)
    with pytest.raises(ValueError, match=r"expected the fit\.json"):
        page.read_fit(path)
    assert page.read_fit(written_fit(path, E=0.0)).law.E == 0


def test_a_name_cannot_end_the_data():
    of = LAWS["besiroglu"]
    text = page.html(page.page_data(*chinchilla.points(), LAWS | {"x": replace(of, title="</script>")}))
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.S)[1])
    assert data["laws"]["x"]["title"] == "</script>"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "{tmp}/missing/page.html"], "missing"),
        (["--out", "{tmp}"], "expected a file name"),
        (["--points", "{tmp}/none.csv"], "none.csv"),
        (["--points", "{tmp}/bad.csv"], "line 2"),
        (["--fit", "{tmp}/list.json"], "--fit needs --points, the runs it was fitted to"),
        (["--fit", "{tmp}/bad.csv", "--points", str(chinchilla.HOFFMANN)], "fit.json"),
        (["--fit", "{tmp}/list.json", "--points", str(chinchilla.HOFFMANN)], "fit.json"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, words):
    (tmp_path / "bad.csv").write_text("N,D,loss\n1e6,many,3\n")
    (tmp_path / "list.json").write_text("[]")
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    out = [] if "--out" in given else ["--out", str(tmp_path / "page.html")]
    assert chinchilla.main(["page", *given, *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()
