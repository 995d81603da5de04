"""One cell of an open notebook: its outputs in words, and its widgets, to be used as a reader does."""

import re

from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

PATIENCE_S = 60
_OUTPUTS = ".jp-OutputArea-output"
_ERROR = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|KeyboardInterrupt)\b.*")
# What stands where a widget, a figure or a table should be.
_FALLBACK = re.compile(
    r"Error (?:displaying|creating) widget.*|Loading widget.*|"
    r"^\s*(?:<[\w.]+:?(?: [^>]*)?>|(?:[A-Z]\w*Box|HTML|Button|Dropdown|Output|Image|Tab|interactive)\(.*\))\s*$",
    re.MULTILINE,
)


class Cell:
    """A cell of a lab.Notebook."""

    def __init__(self, notebook, number, element):
        self.notebook, self.lab, self.driver = notebook, notebook.lab, notebook.driver
        self.number, self.element = number, element

    @property
    def prompt(self):
        """'[3]:' after it ran, '[*]:' while it runs or waits, '[ ]:' before."""
        return self.element.find_element(By.CSS_SELECTOR, ".jp-InputPrompt").get_property("textContent").strip()

    @property
    def text(self):
        """All that its outputs say, widgets included."""
        return "\n".join(self.texts())

    def texts(self):
        """What each of its outputs says."""
        found = self.element.find_elements(By.CSS_SELECTOR, _OUTPUTS)
        return [output.get_property("textContent") for output in found]

    def select(self):
        """Click beside its text."""
        prompt = self.element.find_element(By.CSS_SELECTOR, ".jp-InputPrompt")
        self._into_view(prompt)
        prompt.click()
        self.lab.wait(lambda: "jp-mod-selected" in self.element.get_attribute("class"), f"cell {self.number} selected")

    def start(self):
        """Select it and press the toolbar's triangle; returns its prompt of before, at once."""
        before = self.prompt
        self.select()
        self.notebook.toolbar("notebook:run-cell-and-select-next").click()
        return before

    def run(self, seconds=PATIENCE_S):
        """Start it; back once it is over."""
        self.wait_until_over(self.start(), seconds)

    def wait_until_over(self, before, seconds=PATIENCE_S):
        """before: what `start` returned."""
        self.lab.wait(lambda: self.prompt not in (before, "[*]:"), f"the end of cell {self.number}", seconds)

    def wait_for(self, pattern, seconds=PATIENCE_S):
        """The match of a regular expression in what its outputs say, once there is one."""
        return self.lab.wait(lambda: re.search(pattern, self.text), f"{pattern!r} in cell {self.number}", seconds)

    def wait_for_alt(self, pattern):
        """As wait_for, in the words of its picture."""
        return self.lab.wait(
            lambda: re.search(pattern, self.alt_texts()[0]), f"{pattern!r} in cell {self.number}'s alt text"
        )

    def wait_for_change(self, before):
        """What its outputs say, once that differs from `before`."""
        self.lab.wait(lambda: self.text != before, f"another text in cell {self.number}")
        return self.text

    def type_at_end(self, text):
        """Click into its editor and type below what stands there."""
        editor = self.element.find_element(By.CSS_SELECTOR, ".cm-content")
        self._into_view(editor)
        editor.click()
        ActionChains(self.driver).key_down(Keys.CONTROL).send_keys(Keys.END).key_up(Keys.CONTROL).perform()
        ActionChains(self.driver).send_keys(Keys.ENTER, text).perform()

    def alt_texts(self):
        """The words of each picture in its outputs, '' where there are none."""
        images = self.element.find_elements(By.CSS_SELECTOR, f"{_OUTPUTS} img")
        return [image.get_attribute("alt") or "" for image in images]

    def links(self):
        """[the name under which a link in its outputs saves a file, ...]."""
        found = self.element.find_elements(By.CSS_SELECTOR, f"{_OUTPUTS} a[download]")
        return [link.get_attribute("download") for link in found]

    def parts(self, css):
        """What each element of its outputs says that a CSS selector finds."""
        found = self.element.find_elements(By.CSS_SELECTOR, f"{_OUTPUTS} {css}")
        return [part.get_property("textContent") for part in found]

    def has_widgets(self):
        """Whether a widget stands in its outputs."""
        return self.parts(".jupyter-widgets") != []

    def problems(self):
        """What a reader sees in its outputs that should not be: errors, text in a widget's place, figures without
        words."""
        found = [f"an error: {error[0]}" for error in map(_ERROR.match, self.texts()) if error]
        found += [f"instead of a widget or figure: {text[0].strip()}" for text in _FALLBACK.finditer(self.text)]
        return found + ["a figure without alt text" for alt in self.alt_texts() if not alt]

    def choose(self, label, option):
        """Take an option of a dropdown by its text."""
        Select(self._field(label)).select_by_visible_text(option)

    def options(self, label):
        """What a dropdown offers."""
        return [option.text for option in Select(self._field(label)).options]

    def tick(self, label, is_ticked):
        """Tick a box, or clear it."""
        box = self._field(label)
        if box.is_selected() != is_ticked:
            box.click()

    def enter(self, label, text):
        """Type over what stands in a field, and leave it."""
        self._field(label).send_keys(Keys.CONTROL, "a")
        self._field(label).send_keys(str(text) or Keys.DELETE, Keys.TAB)

    def value(self, label):
        """What stands in a field."""
        return self._field(label).get_property("value")

    def press(self, title):
        """Press a widget's button by its text."""
        self._widget(f".//button[normalize-space()='{title}']", f"the button {title!r}").click()

    def _field(self, label):
        holder = "[contains(@class, 'widget-inline-hbox') or contains(@class, 'widget-checkbox')]"
        labelled = f".//*{holder}[.//label[normalize-space()='{label}']]"
        return self._widget(f"{labelled}//*[self::select or self::input or self::textarea]", f"the field {label!r}")

    def _widget(self, path, what):
        found = self.lab.wait(lambda: self.element.find_element(By.XPATH, path), f"{what} in cell {self.number}")
        self._into_view(found)
        return found

    def _into_view(self, element):
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
