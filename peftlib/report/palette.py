"""The colours and markers of methods, in a light and a dark theme. A method keeps its hue and its marker everywhere."""

from dataclasses import dataclass

from peftlib.methods import BASE, known

_BASES = {BASE: ("#5e5e5e", "#dedede"), "base (cut)": ("#323232", "#acacac")}  # {name: (light, dark)}
_BASE_MARKER, _OTHER_MARKER = "X", "*"


def marker_of(method):
    """matplotlib's marker of a method's points."""
    spec = known(method)
    return spec.marker if spec else _BASE_MARKER if method == BASE else _OTHER_MARKER


@dataclass(frozen=True)
class Theme:
    """Colours of a chart. position: in MethodSpec.colors. other: for unknown methods."""

    name: str
    position: int
    paper: str
    ink: str
    grid: str
    other: str

    def color_of(self, method):
        """The colour of a method's lines, bars and points."""
        spec = known(method)
        pair = spec.colors if spec else _BASES.get(method)
        return pair[self.position] if pair else self.other


# Okabe and Ito's palette if it has a contrast of 3:1 with the background, else its hue made darker or lighter, so that
# every two remain distinct with red, green or blue colour blindness (tested); markers repeat the distinction.
LIGHT = Theme("light", 0, paper="#ffffff", ink="#222222", grid="#d9d9d9", other="#000000")
DARK = Theme("dark", 1, paper="#16181b", ink="#e4e4e4", grid="#3b3f45", other="#ffffff")
THEMES = {theme.name: theme for theme in (LIGHT, DARK)}
