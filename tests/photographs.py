"""Made-up photographs and their files, for tests that must not depend on real ones."""

import io
import pathlib

import numpy as np
from PIL import Image, ImageOps


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
  """uint8 (height, width, 3): coloured noise of all sizes, larger ones stronger, and some edges."""
  rng = np.random.default_rng(seed)
  pixels = np.full((height, width, 3), 120.0)
  cell = 1
  while cell < 2 * max(height, width):
    cells = rng.normal(size=(height // cell + 2, width // cell + 2, 3)).astype(np.float32)
    layer = [Image.fromarray(cells[..., channel]).resize((width, height), Image.Resampling.BILINEAR)
             for channel in range(3)]
    grey = np.asarray(layer[0])[..., None]
    pixels += (2 * cell) ** 0.5 * (0.8 * grey + 0.4 * np.stack(layer, axis=-1))
    cell *= 2
  pixels[height // 4:height // 2, width // 3:width // 2] += (60, -20, -60)
  return np.clip(pixels, 0, 255).astype(np.uint8)


def encode(image: np.ndarray | Image.Image, file_format: str = "JPEG", **settings) -> bytes:
  """The content of a file: a JPEG of quality 90 by default."""
  image = image if isinstance(image, Image.Image) else Image.fromarray(image)
  file = io.BytesIO()
  image.save(file, file_format, **({"quality": 90, **settings} if file_format == "JPEG"
                                   else settings))
  return file.getvalue()


def opened(content: bytes) -> Image.Image:
  """The file, as most code reads one."""
  return Image.open(io.BytesIO(content)).convert("RGB")


def jpegs(folder: str | None, number: int = 20, height: int = 375, width: int = 500) -> list[bytes]:
  """JPEGs of one size, quality 90 and 4:2:0, upright ones the other way round.

  Args:
    folder: of photographs, which are scaled and cropped; made-up ones by default.
    number: at most so many.
    height: of the lying ones, in pixels.
    width: of the lying ones, in pixels.
  """
  if folder is None:
    return [encode(photograph(height, width, seed)) for seed in range(number)]
  files = []
  for path in sorted(pathlib.Path(folder).glob("*.jp*g"))[:number]:
    image = opened(path.read_bytes())
    size = (width, height) if image.width >= image.height else (height, width)
    files.append(encode(ImageOps.fit(image, size, Image.Resampling.BICUBIC)))
  return files
