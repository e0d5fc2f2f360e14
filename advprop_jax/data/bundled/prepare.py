"""Makes the bundled data set `fashion_mnist_small` from the four idx files of Fashion-MNIST.

This is the only file of the project that needs TensorFlow, as TFDS writes with it. Reading does
not. With tensorflow and tensorflow-datasets installed, from the root of the repository:

    python -m advprop_jax.data.bundled.prepare \
        --idx_dir=/usr/share/datasets/fashion-mnist --data_dir=advprop_jax/data/bundled

The idx files are those of Debian's package dataset-fashion-mnist, or of the link in LICENSE.
Another run gives the same records; the bytes of the files may differ.

*Source:* Xiao, Rasul, Vollgraf, "Fashion-MNIST", arXiv 1708.07747: class names, idx files.
"""

import gzip
import io
import pathlib
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from absl import app, flags
from PIL import Image

_IDX_DIR = flags.DEFINE_string("idx_dir", None, "folder of the idx files", required=True)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "TFDS data_dir to write to", required=True)

CLASS_NAMES = (
  "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
  "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)
FILES = {"train": "train", "test": "t10k"}          # our split -> the idx files' prefix
PER_CLASS = {"train": 1000, "test": 200}
SEED = 2020


def read_idx(path: pathlib.Path) -> np.ndarray:
  """Reads a gzipped idx file of uint8, any number of dimensions."""
  content = gzip.decompress(path.read_bytes())
  dimensions = content[3]                             # two zeros, the type, the dimensions
  shape = np.frombuffer(content, ">u4", dimensions, offset=4)
  return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def choose(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
  """Chooses a class-balanced subset, whose first 10 k records hold k of each class.

  So the first records are balanced too, which evaluations of a part of the test split use.

  Args:
    labels: (n,) in 0..9.
    per_class: how many to take of each class.
    seed: of the choice.

  Returns:
    Indices into labels, (10 * per_class,): class 0, 1, ..., 9, 0, 1, ....
  """
  rng = np.random.default_rng(seed)
  chosen = [rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(10)]
  return np.stack(chosen, axis=1).reshape(-1)


class FashionMnistSmall(tfds.core.GeneratorBasedBuilder):
  """10,000 train and 2,000 test images of Fashion-MNIST, balanced by class."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "1,000 train and 200 test images of each class."}  # noqa: RUF012

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="A class-balanced subset of Fashion-MNIST: 10,000 images of its train split "
                  "and 2,000 of its test split; `id` is the index in that split.",
      features=tfds.features.FeaturesDict({
        "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
        "label": tfds.features.ClassLabel(names=CLASS_NAMES),
        "id": tfds.features.Scalar(np.int64),
      }),
      supervised_keys=("image", "label"),
      homepage="https://github.com/zalandoresearch/fashion-mnist",
      license="MIT",
      disable_shuffling=True,                         # choose() has already put them in order
    )

  def _split_generators(self, _) -> dict[str, Iterator]:
    return {split: self._generate_examples(split) for split in FILES}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
    folder = pathlib.Path(_IDX_DIR.value)
    images = read_idx(folder / f"{FILES[split]}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{FILES[split]}-labels-idx1-ubyte.gz")
    for key, index in enumerate(choose(labels, PER_CLASS[split], SEED)):
      png = io.BytesIO()
      Image.fromarray(images[index]).save(png, "PNG", optimize=True)
      png.seek(0)
      yield key, {"image": png, "label": int(labels[index]), "id": int(index)}


def main(_) -> None:
  builder = FashionMnistSmall(data_dir=_DATA_DIR.value, file_format="array_record")
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(num_shards=1, register_checksums=False))


if __name__ == "__main__":
  app.run(main)
