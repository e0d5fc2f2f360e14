"""The bundled set, other TFDS data by the same code, and what is said when they cannot be read."""

import gzip
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from advprop_jax.data.decode import decode
from advprop_jax.data.sources import BUNDLED, open_source
from advprop_jax.errors import InputError

REPOSITORY = pathlib.Path(__file__).parents[2]
VERSION = pathlib.Path(BUNDLED) / "fashion_mnist_small" / "1.0.0"
SHARD = "fashion_mnist_small-test.array_record-00000-of-00001"
IDX = pathlib.Path("/usr/share/datasets/fashion-mnist")     # Debian's dataset-fashion-mnist
SIZES = [(5, 4), (3, 8), (6, 6), (2, 2)]                     # (h, w) of the hand-made records


@pytest.fixture
def fashion(tmp_path):
  """A copy of the bundled set as TFDS data: (data_dir, version's folder)."""
  version = tmp_path / "fashion_mnist_small" / "1.0.0"
  shutil.copytree(VERSION, version)
  return tmp_path, version


def edit(file: pathlib.Path, change) -> None:
  content = json.loads(file.read_text())
  change(content)
  file.write_text(json.dumps(content))


def picture(index: int) -> np.ndarray:
  return np.random.default_rng(index).integers(0, 256, (*SIZES[index], 3)).astype(np.uint8)


def write_colours(version: pathlib.Path, encode_image=None) -> pathlib.Path:
  """TFDS data of colour images of several sizes, written by hand in two shards."""
  def encode(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()

  version.mkdir(parents=True)
  for shard in range(2):
    writer = ArrayRecordWriter(
      str(version / f"colours-train.array_record-0000{shard}-of-00002"), "group_size:1")
    for index in (2 * shard, 2 * shard + 1):
      example = tf_example_pb2.Example()
      example.features.feature["image"].bytes_list.value.append(
        (encode_image or encode)(picture(index)))
      example.features.feature["label"].int64_list.value.append(index % 2)
      writer.write(example.SerializeToString())
    writer.close()
  shutil.copy(VERSION / "features.json", version)

  def features(content):
    content["featuresDict"]["features"].pop("id")
    image = content["featuresDict"]["features"]["image"]["image"]
    image["shape"]["dimensions"] = ["-1", "-1", "3"]
    content["featuresDict"]["features"]["label"]["classLabel"]["numClasses"] = "2"

  edit(version / "features.json", features)
  (version / "label.labels.txt").write_text("even\nodd\n")
  (version / "dataset_info.json").write_text(json.dumps({
    "name": "colours", "version": version.name, "fileFormat": "array_record", "splits": [{
      "name": "train", "shardLengths": ["2", "2"], "numBytes": "1000",
      "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}]}))
  return version


@pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("test", 200)])
def test_bundled_set_is_balanced_in_every_first_part(split, per_class):
  source = open_source("bundled", split=split)
  assert (len(source), source.num_classes, source.name, source.split) == (
    10 * per_class, 10, "bundled", split)
  assert source.class_names[:2] == ("T-shirt/top", "Trouser")
  labels = [record["label"] for record in source]
  assert labels == list(range(10)) * per_class
  record = source[3]
  assert (record["image"].shape, record["image"].dtype, type(record["label"])) == (
    (28, 28, 3), np.uint8, int)
  assert (record["image"] == record["image"][..., :1]).all()    # grey
  assert not record["image"].flags.writeable


def test_bundled_train_and_test_share_no_image():
  train, test = ({record["image"].tobytes() for record in open_source("bundled", split=split)}
                 for split in ("train", "test"))
  assert len(train) > 9990
  assert len(test) > 1990
  assert len(train & test) <= 2       # the official splits may share a few


def test_licence_and_script_lie_beside_the_bundled_set():
  licence = (VERSION.parents[1] / "LICENSE").read_text()
  assert "The MIT License" in licence
  assert "Copyright (c) 2017 Zalando SE" in licence
  assert "Permission is hereby granted, free of charge" in licence
  assert (VERSION.parents[1] / "prepare.py").exists()


@pytest.mark.skipif(not IDX.exists(), reason="needs Debian's dataset-fashion-mnist")
@pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
def test_bundled_images_are_those_of_the_idx_files(split, prefix):
  pixels = gzip.decompress((IDX / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
  labels = gzip.decompress((IDX / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())
  images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28)
  source = open_source("bundled", split=split, keep_in_memory=0)
  chosen = set()
  for index in range(0, len(source), 10 if split == "train" else 4):
    identity = source.records.encoded[index]["id"]
    record = source[index]
    np.testing.assert_array_equal(record["image"][..., 0], images[identity])
    assert record["label"] == labels[8 + identity]
    chosen.add(identity)
  assert len(chosen) == len(range(0, len(source), 10 if split == "train" else 4))


def test_kept_records_are_the_records():
  kept, read = (open_source("bundled", split="test[:50]", keep_in_memory=b) for b in (2**28, 0))
  assert len(kept) == len(read) == 50
  for index in (0, 7, 0, 49):
    np.testing.assert_array_equal(kept[index]["image"], decode(read[index]["image"]))
    assert kept[index]["label"] == read[index]["label"]
  assert kept[7]["image"] is kept[7]["image"]
  assert read[7]["image"] is not read[7]["image"]


def test_other_data_goes_by_the_same_code(tmp_path):
  write_colours(tmp_path / "colours" / "1.2.0")
  newest = write_colours(tmp_path / "colours" / "1.10.0")
  (newest / "label.labels.txt").write_text("even\nnewest\n")
  for name, directory, names in [("colours", tmp_path, ("even", "newest")),
                                 ("colours:1.2.0", str(tmp_path), ("even", "odd")),
                                 ("colours", tmp_path / "colours" / "1.2.0", ("even", "odd"))]:
    source = open_source(name, directory)
    assert (source.class_names, len(source)) == (names, 4)
    for index, record in enumerate(source):
      np.testing.assert_array_equal(decode(record["image"]), picture(index))
      assert record["label"] == index % 2


def test_own_copy_of_the_bundled_name_is_preferred_when_a_folder_is_given(fashion):
  root, version = fashion
  edit(version / "dataset_info.json", lambda info: info["splits"].pop())
  assert len(open_source("fashion_mnist_small", root)) == 10_000
  with pytest.raises(InputError):
    open_source("fashion_mnist_small", root, "test")
  assert len(open_source("fashion_mnist_small", split="test")) == 2000
  with pytest.raises(InputError, match="is not read with data"):
    open_source("bundled", root, "test")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "LA"])
def test_every_colour_mode_becomes_rgb(mode):
  file = io.BytesIO()
  original = Image.fromarray(picture(0)).convert(mode)
  original.save(file, "TIFF" if mode == "CMYK" else "PNG")
  image = decode(file.getvalue())
  assert (image.shape, image.dtype) == ((5, 4, 3), np.uint8)
  np.testing.assert_array_equal(image, np.asarray(original.convert("RGB")))


def test_neither_tensorflow_nor_warnings(tmp_path):
  """A `tensorflow` that says so when it is imported lies first on the path."""
  (tmp_path / "tensorflow").mkdir()
  (tmp_path / "tensorflow" / "__init__.py").write_text(
    "import sys; print('TensorFlow was imported', file=sys.stderr); raise ImportError('not here')")
  code = """
from advprop_jax.data import loader, sources, transforms
source = sources.open_source('bundled', split='test')
batches = loader.training_batches(
  source, batch_size=4, seed=0, transform=transforms.training_transform(28))
print(next(batches)['image'].shape)
"""
  ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                       env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"})
  assert (ran.returncode, ran.stdout, ran.stderr) == (0, "(4, 28, 28, 3)\n", "")


def says(*parts: str, name="fashion_mnist_small", directory=None, split="train") -> str:
  """Opens what cannot be opened; the message is one line that holds the parts."""
  with pytest.raises(InputError) as caught:
    open_source(name, directory, split)
  message = str(caught.value)
  assert "\n" not in message
  for part in parts:
    assert part in message
  return message


def test_a_folder_is_needed():
  says("data.name='cifar10'", "data.dir is not set", "data.name='bundled'", name="cifar10")


def test_a_folder_that_is_not_there(tmp_path):
  says("data.dir=", "gone", "does not exist", "data.name='bundled'", name="cifar10",
       directory=tmp_path / "gone")


def test_a_folder_without_data(tmp_path):
  (tmp_path / "colours" / "incomplete.ABC_1.0.0").mkdir(parents=True)
  says("data.dir=", str(tmp_path), "data.name='colours'", "dataset_info.json", "'bundled'",
       name="colours", directory=tmp_path)


def test_an_unknown_data_set_or_version_lists_what_is_there(fashion):
  root, version = fashion
  write_colours(root / "colours" / "small" / "1.0.0")
  says("data.name='cifar10'", "'colours' and 'fashion_mnist_small'", name="cifar10", directory=root)
  says("data.name='colours'", "there is 'colours/small'", name="colours", directory=root)
  says("data.name='fashion_mnist_small:9.0.0'", "there is 'fashion_mnist_small:1.0.0'",
       name="fashion_mnist_small:9.0.0", directory=root)
  assert len(open_source("colours/small", root)) == 4
  says("data.dir=", "folder of 'fashion_mnist_small'", "data.name='cifar10'", name="cifar10",
       directory=version)


@pytest.mark.parametrize("split", ["validation", "", "train[", "train[:x]", "train+dev"])
def test_an_unknown_split_lists_those_that_exist(split):
  says(f"split={split!r}", "data.name='bundled'", "'train' and 'test'", name="bundled", split=split)


def test_an_empty_split():
  says("split='train[:0]'", "data.name='bundled'", "another split", name="bundled",
       split="train[:0]")


def test_tfrecord_says_how_to_prepare(fashion):
  root, version = fashion
  edit(version / "dataset_info.json", lambda info: info.update(fileFormat="tfrecord"))
  says("data.name='fashion_mnist_small'", "tfrecord", "file_format=array_record", directory=root)


@pytest.mark.parametrize("feature", ["image", "label"])
def test_a_data_set_of_something_else(fashion, feature):
  root, version = fashion
  edit(version / "features.json",
       lambda content: content["featuresDict"]["features"].pop(feature))
  says("data.name='fashion_mnist_small'", f"no feature '{feature}'", "'id' and ", directory=root)


def test_images_that_are_not_uint8(fashion):
  root, version = fashion
  edit(version / "features.json", lambda content: content["featuresDict"]["features"]["image"]
       ["image"].update(dtype="uint16"))
  says("data.name='fashion_mnist_small'", "uint16", "uint8", directory=root)


def test_a_description_that_is_cut_short(fashion):
  root, version = fashion
  info = version / "dataset_info.json"
  info.write_bytes(info.read_bytes()[:200])
  says("data.name='fashion_mnist_small'", "description", str(version), "prepare it again",
       directory=root)


@pytest.mark.parametrize("size", [0, 100, 65536, 700_000, 1_310_720])
def test_a_shard_that_is_cut_short(fashion, size):
  root, version = fashion
  os.truncate(version / SHARD, size)
  says("data.name='fashion_mnist_small'", SHARD, "cut short", "of 2000 records", directory=root,
       split="test")
  assert len(open_source("fashion_mnist_small", root, "train")) == 10_000


def test_a_shard_that_is_missing(fashion):
  root, version = fashion
  (version / SHARD).unlink()
  says("data.name='fashion_mnist_small'", SHARD, "is missing", directory=root, split="test")


def test_a_record_that_does_not_decode_is_named(tmp_path):
  write_colours(tmp_path / "colours" / "1.0.0", encode_image=lambda image: b"no image at all")
  source = open_source("colours", tmp_path)
  with pytest.raises(InputError, match=r"^record 2 of colours train .* does not decode \(of no "
                                       r"format.*\): prepare the data set again$"):
    decode(source[2]["image"])


def test_records_that_are_damaged_in_the_middle(tmp_path):
  """The end of a shard holds its index, so that it opens; fails where reading ends in a traceback.
  """
  folder = tmp_path / "fashion_mnist_small"
  shutil.copytree(BUNDLED / "fashion_mnist_small", folder)
  shard = next(path for path in folder.rglob("*array_record*") if "train" in path.name)
  content = bytearray(shard.read_bytes())
  middle = len(content) // 2
  content[middle:middle + 5000] = bytes(5000)
  shard.write_bytes(content)
  source = open_source("fashion_mnist_small", str(tmp_path), "train", keep_in_memory=0)
  with pytest.raises(InputError, match=r"record \d+ of .* cannot be read \(.*prepare the data set"):
    for _ in source:
      pass
