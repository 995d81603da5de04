"""JupyterLab as a reader has it: the page, its notebook, cells, buttons and widgets, in a headless Chromium.

What is waited for is named; seconds are patience, not sleep: a wait ends as soon as it is so.
"""

import contextlib
import os
import shutil
from pathlib import Path

from cell import PATIENCE_S, Cell
from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    NoSuchElementException,
    StaleElementReferenceException,
    TimeoutException,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from peftlib.runner.notebook_io import load, source_of

WIDTH, HEIGHT = 1400, 900  # pixels of the window
_TALLEST = 15_000  # pixels of a picture that Chromium still draws
_CELLS = ".jp-Notebook .jp-Cell"
_PASSING = (
    ElementClickInterceptedException,
    NoSuchElementException,
    StaleElementReferenceException,
)


@contextlib.contextmanager
def headless_chromium():
    """A Chromium that reaches nothing but this machine; closed at the end."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.add_argument("--headless=new")
    options.add_argument(f"--window-size={WIDTH},{HEIGHT}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.add_argument("--disable-dev-shm-usage")  # containers have little of it
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium gives root none
    options.set_capability("goog:loggingPrefs", {"browser": "SEVERE"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


class Lab:
    """A browser in front of a LabServer. shots: folder that gets the pictures."""

    def __init__(self, server, driver, shots):
        self.server, self.driver, self.shots = server, driver, Path(shots)

    @contextlib.contextmanager
    def opened(self, file_name):
        """A Notebook whose kernel is ready, until the end of the block, which is watched."""
        self.driver.get(f"{self.server.url}lab/tree/{file_name}?reset&token={self.server.token}")
        notebook = Notebook(self, file_name)
        try:
            with notebook.watched():
                self.wait(notebook.is_ready, f"{file_name} and its kernel", seconds=120)
                yield notebook
        finally:
            self.server.end_kernels()

    def theme(self, name):
        """Show JupyterLab in a theme: 'JupyterLab Light' or 'JupyterLab Dark'."""
        change = "jupyterapp.commands.execute('apputils:change-theme', {theme: arguments[0]})"
        self.driver.execute_script(change, name)
        is_there = "return document.body.dataset.jpThemeName === arguments[0]"
        self.wait(lambda: self.driver.execute_script(is_there, name), f"the theme {name}")

    def menu(self, bar, *titles):
        """Click through the menus, as in menu('Run', 'Run All Cells')."""
        self._click("lm-MenuBar-itemLabel", bar)
        for title in titles:
            self._click("lm-Menu-itemLabel", title)

    def wait(self, condition, what, seconds=PATIENCE_S):
        """What `condition()` returns, once that is true. AssertionError: not in `seconds`, or a dialog is in the
        way."""

        def is_so(driver):
            dialogs = driver.find_elements(By.CSS_SELECTOR, ".jp-Dialog")
            assert not dialogs, f"waited for {what}, got a dialog: {dialogs[0].text}"
            return condition()

        try:
            return WebDriverWait(self.driver, seconds, 0.1, _PASSING).until(is_so)
        except TimeoutException:
            raise AssertionError(f"waited {seconds} s in vain for {what}") from None

    def script_errors(self):
        """What scripts of the page complained about since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["source"] != "network"]

    def picture(self, name):
        """Keep the window as it is; returns the picture's path."""
        self.shots.mkdir(parents=True, exist_ok=True)
        path = self.shots / f"{name}.png"
        self.driver.save_screenshot(str(path))
        return path

    def _click(self, css_class, text):
        path = f"//*[contains(concat(' ', @class, ' '), ' {css_class} ')][normalize-space()='{text}']"

        def is_clicked():
            self.driver.find_element(By.XPATH, path).click()
            return True

        self.wait(is_clicked, f"{text!r} to click")


class Notebook:
    """An open notebook. Cells count from 0, texts included, as in the file."""

    def __init__(self, lab, file_name):
        self.lab, self.driver, self.file_name = lab, lab.driver, file_name
        self.path = lab.server.notebooks / file_name
        self._content = load(self.path)["cells"]

    @contextlib.contextmanager
    def watched(self):
        """Where the block fails, pictures and texts are kept."""
        try:
            yield
        except BaseException:
            self.keep_for_a_look(f"failed-{self.path.stem}")
            raise

    @property
    def cells(self):
        """All cells of the file, in order; not the empty one that JupyterLab adds below the last that is run."""
        found = self.driver.find_elements(By.CSS_SELECTOR, _CELLS)[: len(self._content)]
        return [Cell(self, number, element) for number, element in enumerate(found)]

    @property
    def code_cells(self):
        """Those of code, in order."""
        return [cell for cell in self.cells if self._content[cell.number]["cell_type"] == "code"]

    def cell(self, words):
        """The one code cell whose source holds these words, in the file: the page draws only lines that are in view."""
        code = [(n, cell) for n, cell in enumerate(self._content) if cell["cell_type"] == "code"]
        [number] = [n for n, cell in code if words in source_of(cell)]
        return self.cells[number]

    def is_ready(self):
        """Whether all cells are there, and a kernel that has nothing to do."""
        idle = ".jp-Notebook-ExecutionIndicator[data-status='idle']"
        return len(self.cells) == len(self._content) and bool(self.driver.find_elements(By.CSS_SELECTOR, idle))

    def run_all(self, seconds):
        """Run > Run All Cells; back once all have run, or one has failed and the rest was given up."""
        before = self._prompts()
        self.lab.menu("Run", "Run All Cells")
        self.lab.wait(lambda: self._is_over(before), f"the end of {self.file_name}", seconds)

    def run_above(self, cell, seconds):
        """Run > Run All Above Selected Cell; back once they have run, or one has failed."""
        before = self._prompts()
        cell.select()
        self.lab.menu("Run", "Run All Above Selected Cell")
        self.lab.wait(lambda: self._is_over(before), f"the end of the cells above cell {cell.number}", seconds)

    def interrupt(self):
        """Press the toolbar's square."""
        self.toolbar("notebook:interrupt-kernel").click()

    def save(self):
        """Press the toolbar's disk; back once the file is written."""
        self.toolbar("docmanager:save").click()
        self.lab.wait(lambda: not self.driver.find_elements(By.CSS_SELECTOR, ".jp-mod-dirty"), "the file saved")

    def toolbar(self, command):
        """The button of the notebook's toolbar that runs a command of JupyterLab."""
        return self.driver.find_element(By.CSS_SELECTOR, f".jp-NotebookPanel-toolbar [data-command='{command}']")

    def problems(self):
        """['cell n: what a reader sees there that should not be', ...]."""
        return [f"cell {cell.number}: {problem}" for cell in self.code_cells for problem in cell.problems()]

    @contextlib.contextmanager
    def tall_window(self):
        """A window in which the whole notebook is in view, for the length of the block."""
        for _ in range(3):  # what was out of view takes its real height once it is in view
            tall = self.driver.execute_script(
                "const cells = [...document.querySelectorAll(arguments[0])].map(cell => cell.getBoundingClientRect());"
                "return cells.length ? Math.ceil(cells.at(-1).bottom - cells[0].top) + 200 : 0",
                _CELLS,
            )
            size = {"width": WIDTH, "height": max(HEIGHT, min(tall, _TALLEST)), "deviceScaleFactor": 1, "mobile": False}
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def picture(self, name):
        """Keep the notebook from top to bottom; returns the picture's path."""
        with self.tall_window():
            return self.lab.picture(name)

    def picture_in_both_themes(self, name):
        """Keep pictures NAME-dark and NAME-light, where somebody asked for them by PEFTLIB_SCREENSHOTS."""
        if "PEFTLIB_SCREENSHOTS" in os.environ:
            for theme in ("Dark", "Light"):
                self.lab.theme(f"JupyterLab {theme}")
                self.picture(f"{name}-{theme.lower()}")

    def keep_for_a_look(self, name):
        """Pictures of the window and of the whole notebook, and the texts of its outputs; says where they are."""
        self.lab.picture(f"{name}-window")
        self.picture(name)
        said = [f"--- cell {cell.number} {cell.prompt}\n{cell.text}" for cell in self.code_cells]
        (self.lab.shots / f"{name}.txt").write_text("\n".join(said), encoding="utf-8")
        print(f"pictures and texts: {self.lab.shots / name}*")

    def _prompts(self):
        """'[3]:' and the like, of each code cell."""
        read = "return [...document.querySelectorAll(arguments[0])].map(prompt => prompt.textContent.trim())"
        return self.driver.execute_script(read, f"{_CELLS}.jp-CodeCell .jp-InputPrompt")

    def _is_over(self, before):
        # All are marked as waiting at once, so when the first has run, none of the others is still to be marked.
        now = self._prompts()
        return now[0] not in (before[0], "[ ]:") and not any("*" in prompt for prompt in now)
