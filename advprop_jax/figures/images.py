"""Pictures of test images: on the page as cards that wrap, and as one sheet beside it."""

import html
import io
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from advprop_jax.errors import InputError
from advprop_jax.figures import sheet
from advprop_jax.figures.examples import (
  CLIP,
  SEVERITY,
  Examples,
  amplification,
  examples,
  perturbation,
  saliency,
  shown,
)
from advprop_jax.figures.page import Section, data_url, listed
from advprop_jax.figures.runs import Group
from advprop_jax.figures.style import Panel
from advprop_jax.trained import TrainedNetwork

LARGEST = 160           # pixels a side of an image in the page


def sections(groups: Sequence[Group], networks: Mapping[str, TrainedNetwork | str]
             ) -> list[Section]:
  """The panel of images, and the saliency maps."""
  titles = ("Test images, attacked and corrupted", "Saliency: what moves the loss")
  chosen = shown(groups)
  try:
    found = examples(chosen, networks)
  except InputError as error:
    return [Section(title, reason=f"{error}.") for title in titles]
  left = [group.label for group in groups if group not in chosen]
  also = f" Not shown: {listed(left)}." if left else ""
  return [_examples_section(titles[0], found, also), _saliency_section(titles[1], found, also)]


def _examples_section(title: str, found: Examples, also: str) -> Section:
  factor, several = amplification(found), len(found.labels) > 1
  caption = (
      f"{len(found.truth)} of {found.total:,} test images, evenly spread, and what {_who(found)} "
      f"{'say' if several else 'says'} through the main batch norms: ✓ right, ✗ wrong. "
      f"The attack: {found.attack} (of 255, for every network). "
      + ("Each network is attacked on its own, from the same random start, and the other networks "
         "are then shown the same images. " if several else "")
      + f"A perturbation is multiplied by {factor}; grey is no change. ")
  caption += (f"Corruptions are of severity {SEVERITY} of 5." if found.corrupted else
              f"Corrupted images are left out: {found.lacks}.")
  cards = [_card(found, image) for image in range(len(found.truth))]
  return Section(title, [caption + also], [_examples_sheet(found, factor)],
                 f'<div class="cards">{"".join(cards)}</div>', embedded=False)


def _card(found: Examples, image: int) -> str:
  truth = found.classes[found.truth[image]]
  networks = range(len(found.labels))

  def answers(kind):
    return [_answer(found, kind, network, image) for network in networks]

  tiles = [_tile(found.clean[image], f"clean test image of {truth}", "clean", answers("clean"))]
  if found.corrupted:
    pixels, names = found.corrupted
    kind = names[image].replace("_", " ")
    tiles.append(_tile(pixels[image], f"the same image, {kind}", kind, answers("corrupted")))
  else:
    tiles.append("<div></div>")
  for network in networks:
    label = found.labels[network]
    tiles.append(_tile(perturbation(found, network)[image],
                       f"amplified perturbation against {label}", f"what attacks {label}", []))
    tiles.append(_tile(found.adversarial[network][image],
                       f"adversarial image made against {label}", f"made against {label}",
                       answers(network)))
  return (f'<div class="card"><h3>{html.escape(truth)}</h3>'
          f'<div class="tiles">{"".join(tiles)}</div></div>')


def _answer(found: Examples, kind: str | int, network: int, image: int) -> tuple[str, bool]:
  guess = found.says[kind][network][image]
  return f"{found.labels[network]}: {found.classes[guess]}", bool(guess == found.truth[image])


def _tile(pixels, alt, name, answers) -> str:
  said = "".join(f'<span{"" if right else " class=wrong"}>{"✓" if right else "✗"} '
                 f"{html.escape(text)}</span>" for text, right in answers)
  return (f'<figure><img src="{data_url(_png(pixels))}" alt="{html.escape(alt)}">'
          f"<figcaption>{html.escape(name)}{said}</figcaption></figure>")


def _png(pixels: np.ndarray) -> bytes:
  image = Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))
  if max(image.size) > LARGEST:
    image = image.resize((LARGEST, LARGEST), Image.Resampling.BOX)
  file = io.BytesIO()
  image.save(file, "png")
  return file.getvalue()


def _saliency_section(title: str, found: Examples, also: str) -> Section:
  caption = (
      "The gradient of the cross entropy of the true label by the brightness of each pixel (summed "
      "over the colours), of the same clean images, through the main batch norms with their "
      f"running statistics: {_who(found)}. Grey is 0; brightening a white pixel raises the loss, "
      "brightening a black one lowers it. For each image "
      + ("all networks have one scale: " if len(found.labels) > 1 else "")
      + f"the {CLIP:g}th percentile of |gradient|"
      + (", of all of them together," if len(found.labels) > 1 else "")
      + " is black or white, and what is beyond is cut off; a flat map is one of a loss that moves "
      "little. Below each: its largest |gradient|, in nats for a change from black to white.")
  maps, cards = saliency(found), []
  for image, label in enumerate(found.truth):
    truth = found.classes[label]
    tiles = [_tile(found.clean[image], f"clean test image of {truth}", "clean", [])]
    for network, name in enumerate(found.labels):
      tiles.append(_tile(maps[network][image], f"gradient of {name}",
                         f"{name}: {_largest(found, network, image):.3g}", []))
    cards.append(f'<div class="card"><h3>{html.escape(truth)}</h3>'
                 f'<div class="tiles three">{"".join(tiles)}</div></div>')
  rows = [sheet.Row("clean", found.clean, [_names(found)])]
  for network, name in enumerate(found.labels):
    largest = [(f"largest {_largest(found, network, image):.3g}", sheet.GREY)
               for image in range(len(found.truth))]
    rows.append(sheet.Row(_wrapped(f"gradient, {name}"), maps[network], [largest]))
  picture = _sheet("saliency", "Saliency maps: gradients of the loss", caption, rows, [
      (0, "Gradient by brightness; grey is 0. For each image all networks have one scale.",
       sheet.GREY)])
  return Section(title, [caption + also], [picture],
                 f'<div class="cards">{"".join(cards)}</div>', embedded=False)


def _largest(found: Examples, network: int, image: int) -> float:
  """In nats for a pixel that goes from black to white, which are 2 apart."""
  return 2 * float(np.abs(found.gradients[network][image]).max())


def _examples_sheet(found: Examples, factor: int) -> Panel:
  networks = range(len(found.labels))

  def said(kind):
    lines = []
    for network in networks:
      guesses = found.says[kind][network]
      lines.append([(f"{'' if guess == label else 'x '}{found.classes[guess]}, "
                     f"{found.labels[network]}", sheet.RIGHT if guess == label else sheet.WRONG)
                    for guess, label in zip(guesses, found.truth, strict=True)])
    return lines

  rows = [sheet.Row("clean", found.clean, [_names(found), *said("clean")])]
  if found.corrupted:
    pixels, names = found.corrupted
    kinds = [(name.replace("_", " "), sheet.INK) for name in names]
    rows.append(sheet.Row(f"corrupted,\nseverity {SEVERITY}", pixels, [kinds, *said("corrupted")]))
  for network, label in enumerate(found.labels):
    rows.append(sheet.Row(_wrapped(f"against {label}") + f"\nx {factor}, grey is\nno change",
                          perturbation(found, network), []))
    rows.append(sheet.Row(_wrapped(f"made against {label}"), found.adversarial[network],
                          said(network)))
  return _sheet("examples", f"Each network attacked on its own: {found.attack}, of 255",
                "Test images and what networks say of them.", rows, [
                    (0, "Below an image: what a network says through its main batch norms.",
                     sheet.GREY), (4, "blue: right", sheet.RIGHT),
                    (5, "x, vermilion: wrong", sheet.WRONG)])


def _who(found: Examples) -> str:
  return listed([f"{label} ({name}, {source})" for label, name, source in
                 zip(found.labels, found.names, found.sources, strict=True)])


def _sheet(name, title, alt, rows, legend) -> Panel:
  file = io.BytesIO()
  sheet.sheet(title, rows, legend).save(file, "png")
  return Panel(name, alt, file.getvalue())


def _names(found: Examples) -> list[tuple[str, str]]:
  return [(found.classes[label], sheet.INK) for label in found.truth]


def _wrapped(text: str) -> str:
  return "\n".join(textwrap.wrap(text, sheet.LETTERS))
