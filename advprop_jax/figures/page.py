"""The page: one HTML file with everything inside, that asks nobody for anything."""

import base64
import dataclasses
import html
import re
import shlex
from collections.abc import Sequence

from advprop_jax.figures.runs import Run
from advprop_jax.figures.style import Panel

PROGRAM = "python -m advprop_jax.main"


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the page.

  Attributes:
    title: its heading.
    captions: paragraphs, plain text.
    panels: figures, each of which is a file too.
    body: HTML between captions and panels.
    reason: why there is no figure, in place of all else.
    embedded: whether the panels are in the page; their images are in `body` otherwise.
  """

  title: str
  captions: Sequence[str] = ()
  panels: Sequence[Panel] = ()
  body: str = ""
  reason: str | None = None
  embedded: bool = True


def evaluate_command(run: Run, benchmarks: str) -> str:
  """Which command would measure what is missing, as the end of a sentence."""
  return (f"this would measure it: {PROGRAM} --mode=evaluate --config=CONFIG "
          f"--workdir={shlex.quote(run.name)} --config.eval.benchmarks={benchmarks}")


def render(title: str, intro: Sequence[str], sections: Sequence[Section], command: str) -> str:
  """The page as HTML; all text is escaped but `body` of sections."""
  parts = [f"<h1>{html.escape(title)}</h1>", *map(paragraph, intro)]
  for section in sections:
    parts.append(f"<section><h2>{html.escape(section.title)}</h2>")
    if section.reason:
      parts.append(f'<p class="missing">Left out: {_with_commands(section.reason)}</p></section>')
      continue
    parts += map(paragraph, section.captions)
    parts.append(section.body)
    if section.panels and section.embedded:
      parts.append('<div class="panels">' + "".join(
          f'<figure><img src="{data_url(panel.png)}" alt="{html.escape(panel.alt)}" width="380">'
          "</figure>" for panel in section.panels) + "</div>")
    parts.append("</section>")
  parts.append(f"<footer><p>This page again (any config will do, each run has its own):</p>"
               f"<pre>{_flags(command)}</pre></footer>")
  return ("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
          '<meta name="viewport" content="width=device-width, initial-scale=1">'
          f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
          f"<title>{html.escape(title)}</title><style>{CSS}</style></head>\n<body>\n"
          + "\n".join(parts) + "\n</body></html>\n")


def paragraph(text: str) -> str:
  """Plain text as a paragraph."""
  return f"<p>{_with_commands(text)}</p>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
  """A table that scrolls in a box of its own; a line break within a cell begins small print."""
  def cell(tag, text, scope=""):
    first, *rest = str(text).split("\n")
    small = "".join(f"<small>{html.escape(line)}</small>" for line in rest)
    return f"<{tag}{scope}>{html.escape(first)}{small}</{tag}>"

  head = "".join(cell("th", name, ' scope="col"') for name in header)
  body = "".join(
      "<tr>" + cell("th", row[0], ' scope="row"') + "".join(cell("td", text) for text in row[1:])
      + "</tr>" for row in rows)
  return (f'<div class="scroll" tabindex="0"><table{" class=numbers" if numbers else ""}>'
          f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>")


def data_url(png: bytes) -> str:
  """An image inside of the page."""
  return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def listed(words: Sequence[str]) -> str:
  """ "a, b and c" """
  return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _with_commands(text: str) -> str:
  """Escaped; a command of this program becomes code."""
  plain, parts = 0, []
  for found in re.finditer(rf"{re.escape(PROGRAM)}(?: {_FLAG})*", text):
    parts += [html.escape(text[plain:found.start()]), f"<code>{_flags(found[0])}</code>"]
    plain = found.end()
  return "".join(parts) + html.escape(text[plain:])


def _flags(command: str) -> str:
  """A command in HTML: lines break between flags, within one only if it is wider than the page."""
  words = re.split(rf" (?={_FLAG})", command)
  return " ".join([html.escape(words[0]), *(f"<span>{html.escape(word)}</span>"
                                            for word in words[1:])])


# A flag of a command in a sentence, perhaps with a value in quotes; no full stop after it.
_FLAG = r"--[\w.]+=(?:'[^']*'|\S*[^\s.;])"
CSS = """
:root { color-scheme: light dark; --ink: #111; --soft: #555; --line: #ccc; --paper: #fff;
  --box: #f4f4f4; --wrong: #b34700; }
@media (prefers-color-scheme: dark) { :root { --ink: #eee; --soft: #b5b5b5; --line: #555;
  --paper: #161616; --box: #242424; --wrong: #ff9a52; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 1260px; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
p, pre { max-width: 75ch; margin: .5rem 0; }
code, pre { font: 14px/1.5 ui-monospace, monospace; background: var(--box); border-radius: 4px; }
code span, pre span { display: inline-block; max-width: 100%; }
code { padding: .1em .3em; } pre { padding: .6rem; white-space: pre-wrap; }
.panels { display: grid; gap: 1rem; align-items: start; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(380px, 100%), 1fr)); }
figure { margin: 0; }
.panels figure { background: #fff; border: 1px solid var(--line); border-radius: 6px;
  padding: 6px; max-width: 394px; }
.panels img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; max-width: 100%; margin: .75rem 0; }
table { border-collapse: collapse; font-size: 15px; overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0;
  border-bottom: 1px solid var(--line); font-weight: 400; white-space: nowrap; }
tbody th { white-space: normal; min-width: 8.5rem; max-width: 16rem; }
thead th { font-weight: 600; } .numbers td, .numbers thead th + th { text-align: right;
  font-variant-numeric: tabular-nums; }
small { display: block; font-size: 13px; color: var(--soft); }
.missing { border-left: 4px solid var(--line); padding-left: .75rem; color: var(--soft); }
.cards { display: grid; gap: 1rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(360px, 100%), 1fr)); }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .6rem; }
.card h3 { font-size: 15px; margin: 0 0 .4rem; }
.tiles { display: grid; gap: .6rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
.three { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.tiles figure { font-size: 13px; line-height: 1.35; }
.tiles img { display: block; width: 100%; image-rendering: pixelated; background: #808080; }
.tiles span { display: block; } .wrong { color: var(--wrong); font-weight: 600; }
summary { cursor: pointer; } footer { margin-top: 3rem; border-top: 1px solid var(--line); }
"""
