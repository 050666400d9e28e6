"""The page: one file, whose numbers are Python's. What it shows is asked of a browser without a window."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

import chinchilla
import page
from chinchilla import LAWS, Law
from plan import DEVICES, PUE, gpu_hours, parameters, shape_for, training_flops

STATES = [
    {"C": C, "law": law, "gpu": gpu, "gpus": gpus, "mfu": mfu}
    for C, law, gpu, gpus, mfu in [
        (1e17, "besiroglu", "h100", 8, 0.4),
        (5.76e23, "besiroglu", "a100", 1024, 0.37),
        (3.8e25, "hoffmann3", "b200", 16384, 0.41),
        (1.23e21, "hoffmann1", "h200", 1, 0.5),
        (1e27, "hoffmann2", "v100", 7, 0.25),
        (1e20, "kaplan", "mi300x", 64, 0.3),
    ]
]

# Runs in copies of the page. A window is never as narrow as a telephone, but a frame is.
PROBE = """
<pre id="probe"></pre>
<script>
const told = {};
const phone = document.createElement("iframe");
phone.style.width = "390px";
phone.onload = () => {
  const inside = phone.contentDocument.documentElement;
  told.widths = [inside.clientWidth, inside.scrollWidth];
  told.start = read();
  told.computed = STATES.map(compute);
  told.shown = STATES.map((state) => {
    change(state);
    return read();
  });
  const C = document.getElementById("C");
  C.value = "ten";
  C.dispatchEvent(new Event("input"));
  told.refused = [C.ariaInvalid, document.getElementById("say").textContent, state.C];
  C.value = "2e21";
  C.dispatchEvent(new Event("input"));
  C.dispatchEvent(new Event("change"));
  told.hash = location.hash;
  told.dots = document.querySelectorAll("#fig-map .pick").length;
  told.half = extra(data.laws.besiroglu.law, compute({ ...state, law: "besiroglu" }), 0.5);
  document.getElementById("probe").textContent = JSON.stringify(told);
};
function read() {
  const values = {};
  for (const node of document.querySelectorAll("[data-key]")) values[node.dataset.key] = node.dataset.value;
  values.far = document.getElementById("far").textContent;
  values.beyond = document.getElementById("far").dataset.value;
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
def told(written):
    """What the page says in each of the states, by one start of the browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is installed")
    probe = PROBE.replace("STATES", json.dumps(STATES))
    copy = written.with_name("probe.html")
    copy.write_text(written.read_text().replace("</body>", probe + "</body>"))
    # Without the switch, a page in a file may not look into a frame with another file.
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
    """The numbers of the page, by Python."""
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
def test_numbers_are_pythons_to_six_digits(told, i):
    shown, computed = told["shown"][i], told["computed"][i]
    for key, value in expected(**STATES[i]).items():
        if value is None:  # a loss that the law does not give, a price that is not known
            assert (shown[key], computed[key]) == ("", None), key
            continue
        assert float(shown[key]) == pytest.approx(value, rel=1e-6), key
        assert computed[key] == pytest.approx(value, rel=1e-6), key


@pytest.mark.parametrize("i", range(len(STATES)))
def test_shape_and_flops_are_those_of_the_plan(told, i):
    computed = told["computed"][i]
    shape = shape_for(computed["N"])
    assert (computed["shape"]["d"], computed["shape"]["layers"]) == (shape.d_model, shape.layers)
    assert computed["shape"]["N"] == parameters(shape)
    parts = computed["parts"]
    # The plan's count leaves out the head, and is of a whole sequence.
    assert sum(parts.values()) - parts["head"] == pytest.approx(
        training_flops(shape) / page.SEQUENCE, rel=1e-12
    )


def test_a_link_brings_its_view_back(told):
    for key, value in expected(1e22, "hoffmann3", "a100", 512, 0.5).items():
        assert float(told["start"][key]) == pytest.approx(value, rel=1e-6), key
    assert told["hash"].startswith("#C=2e21&law=kaplan&gpu=mi300x&gpus=64&mfu=0.3")


def test_says_how_far_it_extrapolates(told):
    by_law = {state["law"]: shown for state, shown in zip(STATES[1:], told["shown"][1:], strict=True)}
    assert "1.6 orders of magnitude above the largest run" in by_law["besiroglu"]["far"]
    assert by_law["hoffmann1"]["far"] == ""
    assert "1.1 orders of magnitude below the smallest run" in told["shown"][0]["far"]
    assert float(by_law["hoffmann3"]["beyond"]) == pytest.approx(3.46583, rel=1e-5)  # log10(3.8e25 / 1.3e22)


def test_a_law_without_loss_has_no_picture_of_it(told):
    for state, shown in zip(STATES, told["shown"], strict=True):
        assert ("not what loss follows" in shown["none"]) == (not isinstance(LAWS[state["law"]].law, Law))
        assert not re.search(r"NaN|Infinity|undefined", shown["svg"])
    assert told["start"]["curves"] > 11  # 10M to 1T in half orders of magnitude, and the frontier


def test_half_the_size_takes_a_quarter_more(told):
    law = LAWS["besiroglu"].law
    N, D = law.optimal(1e21)  # the answer is the same for every budget
    assert told["half"] == pytest.approx(law.tokens_for(N / 2, law.loss(N, D)) / (2 * D) - 1, rel=1e-6)
    assert told["half"] == pytest.approx(0.259, abs=5e-4)


def test_every_model_can_be_reached(told):
    assert told["dots"] == len(page.MODELS)


def test_nonsense_for_compute_is_refused_and_nothing_changes(told):
    invalid, said, compute = told["refused"]
    assert invalid == "true" and "such as 1e22" in said
    assert compute == STATES[-1]["C"]


def test_a_telephone_has_nothing_to_scroll_sideways(told):
    shown, needed = told["widths"]
    assert 370 <= shown <= 390  # less the bar for scrolling down, where there is one
    assert needed <= shown


def test_your_own_points_and_fit(tmp_path):
    law = Law(E=0.6, A=20.0, B=130.0, alpha=0.36, beta=0.35)
    lines = ["N,D,loss"]
    lines += [f"{N},{D},{law.loss(N, D)}" for N in (1e4, 3e4, 1e5, 3e5) for D in (3e6, 1e7, 3e7)]
    points = tmp_path / "<\u2028&.csv"
    points.write_text("\n".join(lines))
    assert chinchilla.main(["fit", str(points), "--bootstrap", "20", "--out", str(tmp_path)]) == 0
    out, given = tmp_path / "page.html", ["--fit", str(tmp_path / "fit.json")]
    for more in ([], ["--points", str(points)]):
        assert chinchilla.main(["page", "--out", str(out), *given, *more]) == 0
        data = json.loads(re.search(r'type="application/json">(.*?)</script>', out.read_text(), re.S)[1])
        assert data["start"]["law"] == "fit" and data["laws"]["fit"]["title"] == f"Your fit of {points.name}"
        # There is no noise, so the fit is as good as its iteration's last step.
        assert data["laws"]["fit"]["law"] == pytest.approx(vars(law), rel=1e-4)
        assert data["laws"]["fit"]["compute"] == pytest.approx([1.8e11, 5.4e13])
        # The axes reach down to the runs, and the budget shown first is one that the slider has.
        assert data["range"]["C"][0] <= 1.8e11 < data["start"]["C"] == pytest.approx(5.4e13)
        assert len(data["points"]) == (12 if more else 240)
    assert data["range"]["N"][0] == 1e4 and data["range"]["D"][0] == 1e6


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
        (["--fit", "{tmp}/bad.csv"], "fit.json"),
        (["--fit", "{tmp}/list.json"], "fit.json"),
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
