"""The colours and markers of methods, in a light and a dark theme. A method keeps its hue and its marker everywhere."""

from dataclasses import dataclass, field

MARKERS = {"base": "X", "qlora": "o", "galore": "s", "hybrid": "D", "lora": "^", "full": "v", "apollo": "P"}
OTHER_MARKER = "*"


@dataclass(frozen=True)
class Theme:
    """Colours of a chart. colors: {method: colour}; other: of methods that are not in it."""

    name: str
    paper: str
    ink: str
    grid: str
    other: str
    colors: dict = field(repr=False)

    def color_of(self, method):
        """The colour of a method's lines, bars and points."""
        return self.colors.get(method, self.other)


# Okabe and Ito's palette where it has a contrast of 3:1 with the paper, else its hue made darker or lighter, so that
# every two still differ to those who see no red, no green or no blue (tested); markers repeat the distinction.
_CORE = {"qlora": "#0072b2", "galore": "#d55e00", "hybrid": "#009e73"}
LIGHT = Theme(
    "light",
    paper="#ffffff",
    ink="#222222",
    grid="#d9d9d9",
    other="#000000",
    colors={
        "base": "#5e5e5e",
        "base (cut)": "#323232",
        **_CORE,
        "lora": "#1b4a7a",
        "full": "#c875a4",
        "apollo": "#6b4a10",
    },
)
DARK = Theme(
    "dark",
    paper="#16181b",
    ink="#e4e4e4",
    grid="#3b3f45",
    other="#ffffff",
    colors={
        "base": "#dedede",
        "base (cut)": "#acacac",
        **_CORE,
        "lora": "#56b4e9",
        "full": "#b968a0",
        "apollo": "#f0b050",
    },
)
THEMES = {theme.name: theme for theme in (LIGHT, DARK)}
