"""How figures look: a colour for each scheme, markers, hatches and dashes that a grey print keeps.

Figures are small panels, drawn for 380 CSS pixels and 2.5 times as sharp, on white.
"""

import dataclasses
import io
import textwrap
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from advprop_jax.figures.runs import Group

WIDTH, HEIGHT, DPI = 3.8, 2.7, 250      # inches; 100 CSS pixels to the inch
INK, GREY = "#111111", "#555555"
WRONG = "#d55e00"                       # vermilion, which no scheme has
SHORT, WRAP = 26, 46                    # letters: of a label in two columns, of a line in one
DASHES = ("-", "--", "-.", ":")
RC = {
    "font.family": "DejaVu Sans", "font.size": 9.0, "axes.titlesize": 9.5, "axes.labelsize": 9.0,
    "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.fontsize": 8.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "text.color": INK, "axes.edgecolor": GREY, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "lines.linewidth": 1.5, "lines.markersize": 4.5, "legend.frameon": False,
    "hatch.linewidth": 0.7, "figure.facecolor": "white", "axes.titlelocation": "left"}


@dataclasses.dataclass(frozen=True)
class Look:
  """Of one group of runs, in every figure."""

  colour: str
  marker: str
  hatch: str
  dash: str


# Okabe and Ito's colours.
_SCHEMES = {
    "vanilla": ("#000000", "o", "////"),
    "advprop": ("#0072b2", "s", ""),
    "joint": ("#009e73", "^", "...."),
    "adversarial": ("#cc79a7", "v", "xxxx"),
    "fine_grained": ("#e69f00", "D", "\\\\\\\\"),
    "fast_advprop": ("#56b4e9", "P", "++++"),
}
_OTHER = ("#555555", "d", "oooo")       # of a scheme that is not in the list
# Of further groups of one scheme.
_MARKERS = ("", "*", "X", "h", "<", ">")
_HATCHES = ("", "||", "--", "oo", "\\\\", "**")


@dataclasses.dataclass(frozen=True)
class Panel:
  """A figure that is drawn.

  Attributes:
    name: of its file, without .png.
    alt: what it shows, for those who do not see it.
    png: the file.
  """

  name: str
  alt: str
  png: bytes


def look(group: Group) -> Look:
  """Colour by scheme; groups of one scheme differ in marker, hatch and dash."""
  colour, marker, hatch = _SCHEMES.get(group.scheme, _OTHER)
  place = group.place % len(_MARKERS)
  return Look(colour, _MARKERS[place] or marker, hatch + _HATCHES[place], DASHES[place])


def draw(name: str, title: str, alt: str, plot: Callable[[Axes], None], height: float = HEIGHT,
         legend: Sequence[str] = (), left: float | None = None) -> Panel:
  """Draws one panel.

  Args:
    name: of its file.
    title: above the axes.
    alt: for those who do not see it.
    plot: draws into the axes, and names them.
    height: in inches.
    legend: the labels that `plot` gives, for a legend below the axes; it adds to the height.
    left: inches to the left of the axes, for panels whose axes are to be equally wide; None: as
      many as needed.
  """
  columns = 1 if max(map(len, legend), default=0) > SHORT else 2
  words = {label: textwrap.fill(label, WRAP) for label in legend}
  lines = sum(1 + text.count("\n") for text in words.values())
  below = 0.2 * (lines if columns == 1 else -(-lines // columns))
  height += below
  with matplotlib.rc_context(RC):
    figure = Figure(figsize=(WIDTH, height), layout="constrained" if left is None else None)
    axes = figure.subplots()
    if left is not None:
      figure.subplots_adjust(left=left / WIDTH, right=1 - 0.12 / WIDTH, top=1 - 0.28 / height,
                             bottom=(0.55 + below) / height)
    plot(axes)
    axes.set_title(title)
    handles, labels = axes.get_legend_handles_labels()
    if legend and handles:
      where = "lower center" if left is not None else "outside lower center"
      figure.legend(handles, [words[label] for label in labels], loc=where, ncols=columns,
                    handlelength=2.6, columnspacing=1.2, borderaxespad=0.1)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
  return Panel(name, alt, file.getvalue())
