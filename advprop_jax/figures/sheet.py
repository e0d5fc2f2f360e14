"""Pictures of a run."""

import dataclasses

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from advprop_jax.benchmarks.contract import Subject, test_pass
from advprop_jax.data import imagenet
from advprop_jax.measure import Measurer
from advprop_jax.method.attack import PIXEL

RIGHT, WRONG, INK, GREY = "#0072b2", "#d55e00", "#111111", "#555555"  # blue, vermilion: Okabe-Ito
CELL, GAP, MARGIN = 128, 12, 16
TEXT = 13
LETTERS = 16                           # of a line to the left of a row, at most


def examples_of(subject: Subject, columns: int = 8) -> dict[str, np.ndarray]:
  """So many test images, spread over all, as `Measurer.look` takes them.

  Raises:
    InputError: there are none, or one cannot be read.
  """
  source = subject.open_test()
  places = np.linspace(0, len(source) - 1, columns).astype(np.int32)
  records = [source[place] for place in places.tolist()]
  return {"image": np.stack([subject.transform(record["image"]) for record in records]),
          "label": np.array([record["label"] for record in records], np.int32), "index": places}


def adversarial_picture(subject: Subject, variables: dict, measurer: Measurer,
                        images: dict[str, np.ndarray]) -> Image.Image:
  """Clean test images, what an attack adds to them, and the adversarial images.

  The attack is that of the evaluation, through the auxiliary batch norms if there are any. Every
  process of a pod has to ask for it.

  Args:
    subject: the network, and its test images.
    variables: of its model.
    measurer: of its model; what it has compiled serves again.
    images: of `examples_of`.
  """
  attack, source = subject.attack, subject.open_test()
  main, domain = subject.main, subject.auxiliary or subject.main
  clean = measurer.look(variables, test_pass(subject), images)
  attacked = measurer.look(variables, test_pass(subject, attack=attack, domain=domain,
                                                restarts=subject.config.eval.restarts), images)
  pixels, labels = images["image"], images["label"]
  names = [imagenet.words(name) for name in source.class_names]

  def lines(said, before):
    return [(f"{before}{names[guess]}", RIGHT if guess == label else WRONG)
            for guess, label in zip(said, labels, strict=True)]

  through = [lines(attacked["said"][main], "main: ")]
  if domain != main:
    through.append(lines(attacked["said"][domain], "auxiliary: "))
  title = f"{attack} of 255, through the {'main' if domain == main else 'auxiliary'} BN"
  adversarial = (attacked["shown"] + 1) / PIXEL
  bounded = attack.ball and attack.norm == "linf"
  largest = attack.epsilon if bounded else float(np.abs(adversarial - pixels).max())
  return panel(pixels, adversarial, largest, title, Captions(
      [[(names[label], INK) for label in labels], lines(clean["said"][main], "main: ")], through))


@dataclasses.dataclass(frozen=True)
class Captions:
  """Lines of (text, colour), one per column, below the clean and the adversarial images."""

  clean: list[list[tuple[str, str]]]
  adversarial: list[list[tuple[str, str]]]


def panel(clean: np.ndarray, adversarial: np.ndarray, epsilon: float, title: str,
          captions: Captions) -> Image.Image:
  """Three rows of images: clean, perturbation, adversarial.

  Args:
    clean: (n, h, w, 3), 0-255.
    adversarial: (n, h, w, 3), 0-255, not rounded.
    epsilon: radius of the perturbation, 0-255 units; the amplification makes it visible.
    title: above all.
    captions: below the images.
  """
  factor = max(int(127 / epsilon), 1) if epsilon > 0 else 1
  perturbation = 128 + factor * (adversarial - clean)
  rows = [Row("clean", clean, captions.clean),
          Row(f"perturbation\nx {factor}, grey is\nno change", perturbation, []),
          Row("adversarial", adversarial, captions.adversarial)]
  return sheet(title, rows, [
      (0, "Below an image: its label, and what the network says through a batch norm.", GREY),
      (4, "blue: right", RIGHT), (5, "vermilion: wrong", WRONG)])


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of images on a sheet.

  Attributes:
    name: to the left of it, in lines of at most LETTERS.
    images: (n, h, w, 3), 0-255.
    lines: below the images, each of one (text, colour) per image.
  """

  name: str
  images: np.ndarray
  lines: list[list[tuple[str, str]]]


def sheet(title: str, rows: list[Row], legend: list[tuple[int, str, str]]) -> Image.Image:
  """Rows of images with captions, which are cut where they are wider than an image.

  Args:
    title: above all.
    rows: from top to bottom.
    legend: (column of images, text, colour) of each text of the line below all; column 0 begins at
      the margin.
  """
  font, side = ImageFont.load_default(TEXT), 112
  heights = [CELL + (TEXT + 5) * len(row.lines) + GAP for row in rows]
  width = MARGIN + side + max(len(row.images) for row in rows) * (CELL + GAP) + MARGIN
  height = 2 * MARGIN + 2 * TEXT + sum(heights) + TEXT + 2 * GAP
  image = Image.new("RGB", (width, height), "white")
  draw = ImageDraw.Draw(image)
  draw.text((MARGIN, MARGIN), title, INK, ImageFont.load_default(TEXT + 2))
  y = MARGIN + 2 * TEXT + GAP
  for row, height in zip(rows, heights, strict=True):
    draw.multiline_text((MARGIN, y), row.name, INK, font)
    for column, pixels in enumerate(row.images):
      x = MARGIN + side + column * (CELL + GAP)
      image.paste(_cell(pixels), (x, y))
      for number, line in enumerate(row.lines):
        text, colour = line[column]
        draw.text((x, y + CELL + 3 + number * (TEXT + 5)), _shorten(text, font), colour, font)
    y += height
  for column, text, colour in legend:
    draw.text((MARGIN + (side + column * (CELL + GAP) if column else 0), y), text, colour, font)
  return image


def _cell(pixels: np.ndarray) -> Image.Image:
  """An image of CELL pixels; of a small one, every pixel can be told from its neighbours."""
  image = Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))
  small = max(image.size) <= CELL
  return image.resize((CELL, CELL), Image.Resampling.NEAREST if small else Image.Resampling.BOX)


def _shorten(text: str, font: ImageFont.FreeTypeFont) -> str:
  if font.getlength(text) <= CELL:
    return text
  while text and font.getlength(text + "...") > CELL:
    text = text[:-1]
  return text + "..."
