"""README's pictures of the notebooks, from a finished study of the demo: python tests/browser/pictures.py STUDY FOLDER

STUDY: its folder, such as runs/demo. A copy of it is opened in a JupyterLab of its own, and 02_qlora trains once more,
to be looked at half way. Needs what `make test-browser` needs.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS / "fakes"), str(_TESTS), str(_TESTS.parent)]

from lab import Lab, headless_chromium
from lab_server import LabServer
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from peftlib.models.packaged import packaged_folder
from peftlib.report.site.build import build_site

_HALF_WAY = r"step (?:1[0-9])/"


class _Server(LabServer):
    def _environment(self):
        cache = {"PEFTLIB_CACHE": str(packaged_folder().parent), "OMP_NUM_THREADS": str(os.cpu_count())}
        return {**super()._environment(), **cache}


def take(lab, study, folder):
    """Write panel.png, form.png, explorer.png, charts.png and chat.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(study, lab.server.runs / "demo", ignore=shutil.ignore_patterns("notebooks", "checkpoints"))
    shutil.copytree(study / "data", lab.server.runs / "again" / "data")
    shutil.copy(study / "config.json", lab.server.runs / "again")
    with lab.opened(lab.server.put("01_data", fields={"profile": "demo", "study": "new"})) as opened:
        _run_to(opened, "study_form(", folder / "form.png", "method")
    with lab.opened(lab.server.put("02_qlora", fields={"profile": "demo", "study": "again"})) as opened:
        _run_to(opened, "train_live(", folder / "panel.png", _HALF_WAY)
    with lab.opened(lab.server.put("04_eval", fields={"profile": "demo", "study": "demo"})) as opened:
        _run_to(opened, "show_charts(", folder / "charts.png", "")
        _run_to(opened, "explore(", folder / "explorer.png", "reference")
    with lab.opened(lab.server.put("05_hybrid", fields={"profile": "demo", "study": "demo"})) as opened:
        for words in ("# Parameters", "setup(", "chat_box("):
            opened.cell(words).run()
        chat = opened.cell("chat_box(")
        chat.enter("you", "Explain in one sentence why leaves are green.")
        chat.press("Send")
        chat.wait_for("Greedy decoding", seconds=200)
        _keep(opened, chat, folder / "chat.png")


def take_page(driver, study, folder):
    """Write page.png, the upper part of the study's results page, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        size = {"width": 1200, "height": 980, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(build_site([study], Path(place) / "page").as_uri())
        is_drawn = "return document.getElementById('loss').dataset.drawn"
        WebDriverWait(driver, 60).until(lambda _: driver.execute_script(is_drawn))
        driver.save_screenshot(str(folder / "page.png"))
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    _fewer_bytes(folder / "page.png", colors=200)


def _run_to(opened, words, path, pattern):
    """Run all above the cell that holds `words`, then that cell until its output says `pattern`; keep what it shows."""
    cell = opened.cell(words)
    opened.run_above(cell, seconds=400)
    assert not opened.problems(), opened.problems()
    cell.start()
    cell.wait_for(pattern or ".", seconds=200)
    _keep(opened, cell, path)


def _keep(opened, cell, path):
    area = cell.element.find_element(By.CSS_SELECTOR, ".jp-Cell-outputArea")
    with opened.tall_window():
        opened.driver.execute_script("arguments[0].scrollIntoView({block: 'start'})", area)
        images = area.find_elements(By.TAG_NAME, "img")
        opened.lab.wait(lambda: all(image.get_property("complete") for image in images), "images")
        area.screenshot(str(path))
    _fewer_bytes(path)


def _fewer_bytes(path, colors=64):
    with Image.open(path) as shot:
        shot.convert("RGB").quantize(colors).save(path, optimize=True)  # a third of the bytes, nothing to be seen


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    with (
        tempfile.TemporaryDirectory() as place,
        _Server(Path(place) / "server") as server,
        headless_chromium() as driver,
    ):
        take_page(driver, args.study, args.folder)
        take(Lab(server, driver, args.folder), args.study, args.folder)


if __name__ == "__main__":
    main(sys.argv[1:])
