"""Encoded images -> pixels, and the size of both: the one place that decides how.

JPEGs of the usual kinds go to libjpeg-turbo through simplejpeg, with the exact transform and the
smooth upsampling of colour: bit for bit what Pillow gives, in three quarters of its time. All else
goes to Pillow: other formats whatever their file is called, CMYK, whatever libjpeg-turbo warns of,
and everything where simplejpeg is not installed. Pixels are as they are stored: an orientation in
EXIF is not applied unless asked for, as ImageNet's users have it.
"""

import io
import math

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from advprop_jax.errors import InputError

try:
  import simplejpeg
except ImportError:                    # no wheel for this machine
  simplejpeg = None

JPEG = b"\xff\xd8\xff"
COLOURS = ("Gray", "YCbCr", "RGB")     # of JPEGs for simplejpeg; Pillow knows Adobe's inverted CMYK
FACTORS = (8, 4, 2)                    # by which JPEGs are decoded smaller


class Encoded(bytes):
  """The content of an image file that knows what to say if it is broken.

  Attributes:
    fault: begins the sentence, such as "the file 'cat/1.jpg' does not decode".
    remedy: ends it, such as "mend or remove it".
  """

  fault: str
  remedy: str

  def __new__(cls, content: bytes, fault: str = "", remedy: str = ""):
    encoded = super().__new__(cls, content)
    encoded.fault, encoded.remedy = fault, remedy
    return encoded


class BrokenImage(InputError):
  """An image that does not decode: a sentence for `Encoded`, for other bytes the reason alone."""


def size_of(image: np.ndarray | bytes) -> tuple[int, int]:
  """Height and width in pixels, of an encoded image by its header alone (2 us a JPEG).

  Raises:
    BrokenImage: no image by its header.
  """
  if isinstance(image, np.ndarray):
    return image.shape[0], image.shape[1]
  plain = _plain_jpeg_size(image)
  if plain:
    return plain
  try:
    with Image.open(io.BytesIO(image)) as opened:
      return opened.height, opened.width
  except Exception as error:           # Pillow's plugins raise whatever a broken file makes them
    raise _broken(image, error) from error


def decode(image: np.ndarray | bytes, upright: bool = False) -> np.ndarray:
  """Decodes an image file of any format and colour mode to uint8 (h, w, 3), grey repeated.

  Of 16 bits the upper 8 are taken, and transparency is dropped.

  Args:
    image: the content of the file; pixels are given back as they are.
    upright: turns the image as its EXIF says; else pixels are as they are stored.

  Raises:
    BrokenImage: it cannot be decoded, ends early, or has pixels of 32 bits, whose range nobody
      states.
  """
  if isinstance(image, np.ndarray):
    return image
  return _decode(image, 1, upright)


def decode_at_least(image: np.ndarray | bytes, share: float) -> tuple[np.ndarray, int]:
  """Decodes a JPEG to a half, a quarter or an eighth of its sides, if that is enough: for training.

  libjpeg-turbo leaves the high frequencies out before it transforms. That saves a quarter of the
  time for a half, a third for a quarter, and memory where photographs are large.

  Args:
    image: as `decode` takes it; all but JPEGs are decoded whole.
    share: of the sides' pixels that are needed.

  Returns:
    uint8 (ceil(h / factor), ceil(w / factor), 3) and the factor, 1, 2, 4 or 8, at most 1 / share.
    Its pixel (y, x) shows factor x factor pixels from (factor y, factor x) on.

  Raises:
    BrokenImage: as `decode`.
  """
  factor = next((factor for factor in FACTORS if factor * share <= 1), 1)
  if factor == 1 or isinstance(image, np.ndarray):
    return decode(image), 1
  height, width = size_of(image)
  pixels = _decode(image, factor)
  return pixels, factor if pixels.shape[:2] == (-(-height // factor), -(-width // factor)) else 1


def reason(error: Exception) -> str:
  """Why a file is broken, in a few words."""
  if isinstance(error, UnidentifiedImageError):      # its own words hold an address in memory
    return "of no format that Pillow reads"
  text = " ".join((getattr(error, "strerror", None) or str(error)).split())
  return text[:100] or type(error).__name__


def _broken(image: bytes, error: Exception) -> BrokenImage:
  if isinstance(image, Encoded):
    return BrokenImage(f"{image.fault} ({reason(error)}): {image.remedy}")
  return BrokenImage(reason(error))


def _plain_jpeg_size(image: bytes) -> tuple[int, int] | None:
  """Height and width of a JPEG that simplejpeg decodes as Pillow would; None for all else."""
  if simplejpeg is None or not image.startswith(JPEG):
    return None
  try:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
  except ValueError:
    return None
  small = height * width <= (Image.MAX_IMAGE_PIXELS or math.inf)   # else Pillow warns or refuses
  return (height, width) if colours in COLOURS and small else None


def _decode(image: bytes, factor: int, upright: bool = False) -> np.ndarray:
  size = None if upright else _plain_jpeg_size(image)
  if size:
    least = [-(-side // factor) for side in size] if factor > 1 else (0, 0)
    try:
      return simplejpeg.decode_jpeg(image, min_height=least[0], min_width=least[1],
                                    min_factor=factor)
    except ValueError:                 # an error, or a warning: Pillow tells them apart
      pass
  try:
    return _decode_by_pillow(image, factor, upright)
  except Exception as error:           # as in size_of
    raise _broken(image, error) from error


def _decode_by_pillow(image: bytes, factor: int, upright: bool) -> np.ndarray:
  with Image.open(io.BytesIO(image)) as opened:
    if factor > 1:                     # of a JPEG; of other formats it does nothing
      opened.draft(None, (max(opened.width // factor, 1), max(opened.height // factor, 1)))
    if upright:
      ImageOps.exif_transpose(opened, in_place=True)
    if opened.mode.startswith("I;16"):                # Pillow would clip it at 255: all white
      grey = (np.asarray(opened) >> 8).astype(np.uint8)
      return np.repeat(grey[..., None], 3, axis=2)
    if opened.mode in ("I", "F"):
      raise ValueError(f"its pixels are {'integers' if opened.mode == 'I' else 'floats'} of 32 "
                       "bits: convert them to 8")
    opened.info.pop("transparency", None)             # that of a palette makes Pillow warn
    return np.asarray(opened.convert("RGB"))
