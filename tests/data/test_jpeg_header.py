"""The size of a JPEG by its header, and whether it has its end: Pillow's decoder is the measure."""

import io

import numpy as np
import pytest
from PIL import Image

from advprop_jax.data.jpeg_header import whole_jpeg_size
from tests import standin_imagenet


def size(content: bytes) -> tuple[int, int] | None:
  return whole_jpeg_size(io.BytesIO(content))


def photograph(width=40, height=30) -> Image.Image:
  return standin_imagenet.photograph(3, 5, 100).resize((width, height))


@pytest.mark.parametrize("kind", ["rgb", "grey", "cmyk", "progressive", "exif", "padded"])
def test_sizes_are_those_of_pillow(kind):
  """Fails where width and height change places, or one of the kinds is taken for broken."""
  for width, height in ((40, 30), (1, 9), (300, 7)):
    content = standin_imagenet.encoded(photograph(width, height), kind)
    assert size(content) == Image.open(io.BytesIO(content)).size == (width, height)


def test_long_segments_before_the_frame_are_skipped():
  """Fails where a thumbnail's own frame in EXIF is taken, or only the first kilobytes are read."""
  thumbnail = standin_imagenet.encoded(photograph(8, 6))
  exif = b"Exif\0\0" + thumbnail + bytes(60_000)
  content = standin_imagenet.encoded(photograph())
  segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2) + exif
  assert size(content[:2] + segment * 3 + content[2:]) == (40, 30)
  assert size(content[:2] + b"\xff\xff" + segment + content[2:]) == (40, 30)


@pytest.mark.parametrize("padding", [b"", b"\0" * 200, b"\n", b"\xff", b"\r\n", b" \0\xff\xff"])
def test_padding_behind_the_end(padding):
  """Fails where whole files are taken for cut ones."""
  assert size(standin_imagenet.encoded(photograph()) + padding) == (40, 30)


def test_files_that_end_early():
  """Fails where a file is called whole that has lost its end, at whichever byte."""
  content = standin_imagenet.encoded(photograph())
  for length in [*range(0, len(content), 7), len(content) - 1, len(content) - 2]:
    assert size(content[:length]) is None


@pytest.mark.parametrize("change", [
  lambda content: content + b"<more>",                   # for the decoder to say
  lambda content: content.replace(b"\xff\xc0", b"\xff\xc3", 1),         # lossless
  lambda content: content.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c", 1),    # 12 bits
  lambda content: content[:2] + b"\xff\xe0\0\0" + content[2:],
  lambda content: content[:2] + b"\xff\xff\xff", lambda content: content[:2] + content[-2:],
  lambda content: b"\x89PNG\r\n\x1a\n" + content, lambda content: b"",
])
def test_all_else_is_left_to_the_decoder(change):
  """Fails where something rare or odd is called whole unseen, or with an exception."""
  content = standin_imagenet.encoded(photograph())
  assert size(content) == (40, 30)
  assert size(change(content)) is None


def test_noise_is_no_jpeg():
  """Fails with an exception, or without end."""
  generator = np.random.default_rng(0)
  for length in range(0, 600, 3):
    assert size(b"\xff\xd8" + generator.bytes(length) + b"\xff\xd9") is None
