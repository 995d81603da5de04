"""The results page in a headless Chromium, from file:// and with nothing else in reach, as a reader uses it."""

import base64
import importlib.util
import json
import os
import random
import shutil
import sys
from pathlib import Path

import fake_study
import pytest

from peftlib.core import config
from peftlib.core.files import read_json, write_json
from peftlib.models.shapes import CARDS, SHAPES
from peftlib.report import build as report
from peftlib.report.site import build
from peftlib.train import estimate

pytestmark = pytest.mark.browser
AXE = Path(sys.prefix) / "axe" / "node_modules" / "axe-core" / "axe.min.js"  # make test-browser puts it there
FIRST_PAINT_S, FILTER_S = 1.0, 0.1  # the page's budget
RUNS, ROWS = 30, 6000
PLANTED = [
    "</script><script>document.title='planted'</script>",
    "<img src=x onerror=\"document.title='planted'\"><svg onload=\"document.title='planted'\">",
    "\u202egnp.exe\u202c javascript:document.title='planted'",
    '=HYPERLINK("http://planted","here")\u2028document.title=\'planted\'',
]


@pytest.fixture(scope="module")
def driver():
    needed = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    needed += [name for name in ("selenium", "vl_convert") if importlib.util.find_spec(name) is None]
    if needed:
        pytest.skip(f"no {', no '.join(needed)}: apt-get install chromium chromium-driver; make test-browser")
    from lab import headless_chromium

    with headless_chromium() as made:
        yield made


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """index.html of a study in which rows, answers, a device and a note hold what would like to run."""
    root = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        study = fake_study.make(root, patch, methods=("base", "qlora", "galore", "hybrid"), seeds=(0, 1), n=48)
        from peftlib import data

        rows = data.load_split(None, "test")
        for row, text in zip(rows, PLANTED):
            row["messages"][0]["content"] = row["messages"][-1]["content"] = text
        for path in sorted((study.folder / "records").glob("*.json")):
            record = {**read_json(path), "device": PLANTED[1]}
            fake_study.write_benchmark(study, record, "arc_easy", [at < 30 for at in range(100)], chance=0.25)
            write_json(path, record)
            answers = [PLANTED[n] if n < len(PLANTED) else a for n, a in enumerate(_answers(rows, record))]
            fake_study.write_predictions(study, record["method"], record["seed"], rows, answers)
        patch.setattr("peftlib.report.site.build.CARDS", {name: CARDS[name] for name in ("t4", "h100")})
        patch.setattr("peftlib.report.site.build.LENGTHS", (512, 1024))
        found = report.scored(study)
        points = [{"factor": f, "test_loss": 3 - f, "general_loss": 3 + f, "rougeL": 0.3 + f / 4} for f in (0, 0.5, 1)]
        points = [{**point, "retention": 0.5 - point["factor"] / 8} for point in points]
        found[-1].__dict__["rewound"] = {"qlora": points}  # as a study has it that was rewound
        patch.setattr("peftlib.report.site.data.scored", lambda _: found)
        return build.build_site([study.folder], root / "page & more")


def _answers(rows, record):
    return fake_study.answers_of(rows, record["method"], record["seed"])


class Page:
    """A page that is open. Its scripts' complaints fail a test at its end."""

    def __init__(self, driver, path):
        self.driver = driver
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.get_log("browser")
        driver.get(path.as_uri())
        self.wait("return performance.getEntriesByName('peftlib-table').length", "the table")

    def run(self, script, *args):
        return self.driver.execute_script(script, *args)

    def wait(self, script, what, *args, seconds=20):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, 0.05).until(lambda _: self.run(script, *args), f"no {what}")

    def choose(self, css, value):
        """Set a control and say so, as a reader's hand does."""
        self.run(
            "const at = document.querySelector(arguments[0]); at.value = arguments[1];"
            "at.dispatchEvent(new Event('input', {bubbles: true}))",
            css,
            value,
        )

    def click(self, css):
        self.run("document.querySelector(arguments[0]).click()", css)

    def column(self, label):
        """The texts of a column of the table of runs."""
        return self.run(
            "const heads = [...document.querySelectorAll('#table thead th button')].map(b => b.textContent);"
            "return [...document.querySelectorAll('#table tbody tr')].map(r => r.children[heads.indexOf(arguments[0])].textContent)",
            label,
        )

    def drawn(self, name):
        """Wait for a chart to be drawn; returns how often it was."""
        return int(self.wait("return document.getElementById(arguments[0]).dataset.drawn", name, name))

    def explore(self):
        self.click("#explorer > button")
        self.wait("return document.activeElement.type === 'search'", "rows found")

    def faults(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture
def opened(driver, page):
    made = Page(driver, page)
    yield made
    assert made.faults() == []
    assert made.run("return document.title") == "Results of made-up"


def test_filter_and_sort(opened):
    assert opened.column("method") == ["base", "qlora", "qlora", "galore", "galore", "hybrid", "hybrid"]
    opened.choose("#filter", "QLORA")
    assert opened.column("method") == ["qlora", "qlora"]
    assert opened.run("return document.getElementById('count').textContent") == "2 of 7 runs"
    opened.choose("#filter", "")
    for descending in (True, False):
        opened.run("[...document.querySelectorAll('#table th button')].find(b => b.textContent === 'ROUGE-L').click()")
        values = [float(value) for value in opened.column("ROUGE-L")]
        assert values == sorted(values, reverse=descending)
        said = opened.run("return document.querySelector('#table th[aria-sort]').getAttribute('aria-sort')")
        assert said == ("descending" if descending else "ascending")
    opened.run("[...document.querySelectorAll('#table th button')].find(b => b.textContent === 'peak memory').click()")
    assert opened.column("peak memory")[-1] == ""  # base has none, and comes last either way


def test_charts_say_what_they_show_and_follow_the_filter(opened):
    for name in ("pareto", "loss", "source-bars", "bench-bars", "rewind-lines"):
        assert opened.drawn(name)
        assert opened.run("return !!document.querySelector(`#${arguments[0]} svg path`)", name)
    words = "return document.querySelector('#pareto [role=img]').getAttribute('aria-label')"
    assert "qlora" in opened.run(words) and "Pareto front" in opened.run(words)
    before = opened.drawn("pareto")
    opened.choose("#filter", "galore")
    opened.wait("return document.getElementById('pareto').dataset.drawn > arguments[0]", "new chart", before)
    assert "qlora" not in opened.run(words) and "galore" in opened.run(words)
    opened.choose("#pareto-x", "hours")
    opened.wait(
        "return document.querySelector('#pareto [role=img]').ariaLabel.includes('against training time')", "hours"
    )
    opened.choose("#filter", "")
    before = opened.drawn("rewind-lines")
    opened.choose("#rewind-score", "retention")
    opened.wait("return document.getElementById('rewind-lines').dataset.drawn > arguments[0]", "accuracy", before)
    assert "accuracy on retention tasks" in opened.run(words.replace("#pareto", "#rewind-lines"))
    opened.choose("#filter", "galore")
    hidden = "return document.getElementById('rewind').hidden"
    opened.wait(hidden, "end of the chart that has no method left")
    opened.choose("#filter", "")
    opened.wait(f"{hidden} === false", "return of the chart")
    opened.choose("#rewind-score", "rougeL")
    said = "return document.querySelector('#rewind-lines [role=img]').ariaLabel"
    opened.wait(f"{said}.includes('qlora at 0.5: 0.425')", "rewound ROUGE-L")


def test_a_filter_that_leaves_one_seed_shows_its_score_and_not_the_studys_interval(opened):
    opened.drawn("pareto")
    words = "return document.querySelector('#pareto [role=img]').ariaLabel.split(' Unbeaten')[0]"
    assert " to " in opened.run(words)
    score = opened.run(
        "const run = peftlib.data().runs.find((run) => run.method === 'galore' && run.seed === 1);"
        "run.device = 'another'; return run.rougeL"
    )
    before = opened.drawn("pareto")
    opened.choose("#filter", "another")
    opened.wait("return document.getElementById('pareto').dataset.drawn > arguments[0]", "new chart", before)
    assert f"galore {score:.3f} at" in opened.run(words)


def test_a_file_that_was_not_copied_is_named_and_can_be_asked_for_again(driver, page, tmp_path):
    folder = tmp_path / "copied"
    shutil.copytree(page.parent, folder)
    (folder / "data" / "plan.js").unlink()
    opened = Page(driver, folder / "index.html")
    about = "return document.getElementById('about').textContent"
    opened.wait(f"{about}.startsWith('data/plan.js is missing: copy the whole folder')", "words on the planner's file")
    answers = folder / "data" / "answers-0-1.js"
    text = answers.read_bytes()
    answers.unlink()
    opened = Page(driver, folder / "index.html")
    opened.click("#explorer > button")
    said = "return document.querySelector('#explorer > button').textContent"
    opened.wait(f"{said}.startsWith('data/answers-0-1.js is missing')", "words on the missing file")
    answers.write_bytes(text)
    opened.explore()
    opened.faults()


def test_explorer_finds_sorts_marks_and_loads_what_is_asked_for(opened, page):
    asked = "return [...document.querySelectorAll('script[src]')].map(e => e.src).filter(n => /answers-|rows/.test(n))"
    assert opened.run(asked) == []
    opened.explore()
    assert len(opened.run(asked)) == 3  # the rows, and two of seven runs' answers
    gains = "return [...document.querySelectorAll('.found tbody tr')].map(r => Number(r.children[4].textContent))"
    assert opened.run(gains) == sorted(opened.run(gains), reverse=True)
    opened.choose("#explorer label:nth-of-type(5) select", "largest loss")
    assert opened.run(gains) == sorted(opened.run(gains))
    opened.choose("#explorer input[type=search]", "PARIS")
    n = opened.run("return document.querySelector('#explorer output').textContent")
    assert n.endswith("rows") and not n.endswith("of 48 rows")
    assert "paris" in opened.run(
        "return document.querySelector('#explorer .card').parentNode.textContent.toLowerCase()"
    )
    assert opened.run("return document.querySelectorAll('#explorer mark').length") > 1
    opened.choose("#explorer input[type=search]", "no row holds this")
    assert "No row contains this" in opened.run("return document.querySelector('#explorer output').textContent")


def test_planted_text_stays_text(opened):
    opened.explore()
    opened.choose("#explorer label:nth-of-type(5) select", "file order")
    for n, text in enumerate(PLANTED):
        opened.run("document.querySelectorAll('.found th button')[arguments[0]].click()", n)
        shown = opened.run("return [...document.querySelectorAll('#explorer .text')].map(e => e.textContent)")
        assert text in shown[0] and shown[1:] == [text] * 3  # prompt, reference and two answers
    assert opened.run("return document.querySelectorAll('main img, main script, header img').length") == 0
    assert PLANTED[1] in opened.run("return document.getElementById('about').textContent")
    isolated = "return getComputedStyle(document.querySelector('#explorer .text')).unicodeBidi"
    assert opened.run(isolated) == "isolate"
    # The policy stops what the page's own care would miss.
    opened.run("document.body.insertAdjacentHTML('beforeend', arguments[0])", PLANTED[1])
    opened.run(
        "const s = document.createElement('script'); s.textContent = \"document.title='planted'\"; document.body.append(s)"
    )
    assert opened.run("return document.title") == "Results of made-up"
    assert all("Content Security Policy" in fault for fault in opened.faults())


def test_the_calculator_says_what_the_planner_says(opened):
    opened.wait("return document.querySelectorAll('#plans tbody tr').length", "plans")
    for card, model, length, rows in (("t4", "gemma-3-1b", 1024, 5000), ("h100", "gemma-3-4b", 512, 123)):
        for css, value in (("#card", card), ("#model", model), ("#length", length), ("#rows", rows)):
            opened.choose(css, str(value))
        shown = opened.run(
            "return [...document.querySelectorAll('#plans tbody tr')].map(r => [...r.children].map(c => c.textContent))"
        )
        profile = "t4" if card == "t4" else "gpu"
        cfg = config.resolve(profile, model=f"google/{model}-it", max_length=length, train_rows=rows)
        names = [line[0] for line in shown]
        costs = estimate.forecast(cfg, card, CARDS[card], shape=SHAPES[model], names=names).costs
        assert shown == [list(estimate.cells(cost)) for cost in costs]
        said = opened.run("return document.getElementById('settings').textContent").splitlines()
        given = dict(word.split("=") for word in said[-1].split(" -p ")[1:])
        again = config.resolve(said[-1].split()[3], **{k: int(v) if v.isdigit() else v for k, v in given.items()})
        assert (again.model, again.train_rows, again.max_length) == (cfg.model, rows, length)
    opened.choose("#rows", "-3")
    assert opened.run("return document.getElementById('rows').matches(':invalid')")


def test_downloads(opened, tmp_path):
    opened.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path), "eventsEnabled": False}
    )
    opened.drawn("pareto")
    opened.explore()
    for css in ("#runs-csv", *(f"#pareto button:nth-of-type({n})" for n in (1, 2, 3))):
        opened.click(css)
    opened.run("[...document.querySelectorAll('#explorer button')].find(b => b.textContent === 'CSV').click()")
    names = {"runs.csv", "pareto.svg", "pareto.png", "pareto.csv", "answers.csv"}
    for _ in range(200):
        if {path.name for path in tmp_path.iterdir()} == names:
            break
        opened.run("return new Promise(resolve => setTimeout(resolve, 50))")
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG") and b"<svg" in (
        tmp_path / "pareto.svg"
    ).read_bytes()
    runs = (tmp_path / "runs.csv").read_text(encoding="utf-8").splitlines()
    assert runs[0].startswith('"study","method","seed"') and len(runs) == 8
    answers = (tmp_path / "answers.csv").read_text(encoding="utf-8")
    assert "\"'=HYPERLINK(" in answers and '"=HYPERLINK(' not in answers


def test_keyboard_alone(opened):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys):
        ActionChains(opened.driver).send_keys(*keys).perform()

    def focused():
        return opened.run("const at = document.activeElement; return at.id || at.textContent.trim() || at.ariaLabel")

    def go_to(name, most=60):
        for _ in range(most):
            press(Keys.TAB)
            if focused() == name:
                return
        raise AssertionError(f"Tab does not reach {name!r}")

    press(Keys.TAB)
    assert focused() == "Skip to the results"
    go_to("filter")
    press("hybrid")
    assert opened.column("method") == ["hybrid", "hybrid"]
    go_to("Columns")
    press(Keys.ENTER)
    assert opened.run("return document.querySelector('.menu').open")
    press(Keys.ESCAPE)
    assert not opened.run("return document.querySelector('.menu').open") and focused() == "Columns"
    go_to("ROUGE-L")
    press(Keys.ENTER)
    assert (
        focused() == "ROUGE-L" and opened.run("return document.querySelector('th[aria-sort]').textContent") == "ROUGE-L"
    )
    go_to("Read the answers to 48 test rows")
    press(Keys.ENTER)
    opened.wait("return document.querySelectorAll('.found tbody tr').length", "rows found")
    press("paris")
    assert opened.run("return document.querySelector('#explorer input[type=search]').value") == "paris"
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert opened.run(outline) != "none"
    go_to("card")


@pytest.mark.parametrize("width, theme", [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_phone_width_themes_and_no_serious_fault_of_accessibility(opened, width, theme):
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    opened.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    opened.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    opened.explore()
    opened.wait("return document.querySelectorAll('#plans tbody tr').length", "plans")
    opened.drawn("bench-bars")
    paper = opened.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper.removeprefix("rgb(").rstrip(")").split(","))) < 380) == (theme == "dark")
    assert opened.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    if "PEFTLIB_SCREENSHOTS" in os.environ:
        keep(opened, Path(os.environ["PEFTLIB_SCREENSHOTS"]) / f"site-{width}-{theme}.png", screen)
    if not AXE.exists():
        pytest.skip(f"no axe-core in {AXE}: make test-browser installs it where there is npm")
    opened.run(AXE.read_text(encoding="utf-8"))
    found = opened.driver.execute_async_script("axe.run({preload: false}).then(arguments[0])")
    assert len(found["passes"]) > 20
    serious = [
        (v["id"], [n["html"][:200] for n in v["nodes"]])
        for v in found["violations"]
        if v["impact"] in ("serious", "critical")
    ]
    assert serious == []


def keep(opened, path, screen):
    """A picture of the whole page."""
    height = opened.run("return document.documentElement.scrollHeight")
    opened.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**screen, "height": height})
    opened.run("return new Promise(resolve => setTimeout(resolve, 500))")
    path.parent.mkdir(parents=True, exist_ok=True)
    shot = opened.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    path.write_bytes(base64.b64decode(shot))
    opened.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


@pytest.fixture(scope="module")
def large(page, tmp_path_factory):
    """The page with RUNS runs and ROWS rows of about 250 words in prompt, reference and answer."""
    folder = tmp_path_factory.mktemp("large") / "page"
    shutil.copytree(page.parent, folder)
    rng = random.Random(0)
    words = [f"{rng.choice('bdfgklmnprst')}{rng.choice('aeiou')}{rng.randint(0, 999)}" for _ in range(3000)]

    def text(n):
        return " ".join(rng.choices(words, k=n))

    def put(name, value):
        (folder / "data" / f"{name}.js").write_text(build.script_of(name, value), encoding="utf-8")

    known = (folder / "data" / "runs.js").read_text(encoding="utf-8")
    data = json.loads(known[known.index(",") + 1 : -3])
    trained = [run for run in data["runs"] if run["method"] != "base"]
    curve = [(step, 2 + 1 / step, 2.0) for step in range(1, 201)]
    data["runs"] = [{**trained[n % 6], "seed": n, "rougeL": rng.random(), "curve": curve} for n in range(RUNS)]
    data["answers"] = [
        {"study": "made-up", "run": f"run {n}", "method": "qlora", "file": f"answers-0-{n}"} for n in range(RUNS)
    ]
    put("runs", data)
    put(
        "rows",
        {
            "rows": [[f"row-{n}", "tulu"] for n in range(ROWS)],
            "prompts": [text(50) for _ in range(ROWS)],
            "references": [text(100) for _ in range(ROWS)],
        },
    )
    scores = {key: [rng.random() for _ in range(ROWS)] for key in ("rougeL", "bleu4")}
    run = {
        "answers": [text(100) for _ in range(ROWS)],
        "marks": [[5, 5]] * ROWS,
        "tokens": [100] * ROWS,
        "cut": [0] * ROWS,
        **scores,
    }
    for n in range(RUNS):
        put(f"answers-0-{n}", run)
    return folder / "index.html"


def test_first_paint_and_filters_are_within_the_budget(driver, large, capsys):
    opened, paints, filters, finds = Page(driver, large), [], [], []
    timed = (
        "const at = document.querySelector(arguments[0]), from = performance.now(); at.value = arguments[1];"
        "at.dispatchEvent(new Event('input', {bubbles: true})); document.body.offsetHeight; return performance.now() - from"
    )
    for _ in range(5):
        opened = Page(driver, large)
        paint = opened.wait("return performance.getEntriesByName('first-contentful-paint')[0]?.startTime", "paint")
        table = opened.run("return performance.getEntriesByName('peftlib-table')[0].startTime")
        paints.append(max(paint, table) / 1000)
    opened.drawn("loss")
    filters += [opened.run(timed, "#filter", word) / 1000 for word in ("qlora", "galore", "", "hybrid 3")]
    opened.explore()
    search = "#explorer input[type=search]"
    finds += [opened.run(timed, search, word) / 1000 for word in ("ba1", "zzz", "", "ka2 ", "e")]
    said = [
        f"{what}: {max(times):.3f} s at most, {max(times) / budget:.2f} of the budget of {budget} s"
        for what, times, budget in (
            ("first paint with the table", paints, FIRST_PAINT_S),
            ("filter of runs", filters, FILTER_S),
            ("search in rows", finds, FILTER_S),
        )
    ]
    with capsys.disabled():
        print(f"\n{RUNS} runs x {ROWS} rows: {'; '.join(said)}")
    assert sorted(paints)[2] <= FIRST_PAINT_S and sorted(filters)[2] <= FILTER_S and sorted(finds)[2] <= FILTER_S
    assert opened.faults() == []
