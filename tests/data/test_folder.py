"""Class folders: every format, the order, the index, and what is said when they cannot be read."""

import logging
import pickle
import shutil
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor

import ml_collections
import numpy as np
import pytest
from PIL import Image

from advprop_jax.data import file_index
from advprop_jax.data.decode import decode
from advprop_jax.data.folder import open_folder
from advprop_jax.data.loader import evaluation_batches, training_batches
from advprop_jax.data.transforms import evaluation_transform, training_transform
from advprop_jax.errors import InputError
from advprop_jax.experiment import open_split
from tests.class_folders import (
  INDEX,
  add_broken,
  aged,
  animals,
  indexed,
  labels,
  paths,
  pixels,
  save,
  says,
)


def test_classes_are_sorted_and_records_are_the_files(tmp_path):
  source = open_folder(animals(tmp_path), "test")
  assert (source.name, source.split, source.class_names, source.num_classes, len(source)) == (
    "folder", "test", ("cat", "dog"), 2, 7)
  for path, record in zip(paths(source), source, strict=True):
    name, _, file = path.partition("/")
    assert source.class_names[record["label"]] == name
    assert (type(record["label"]), record["image"].dtype) == (int, np.uint8)
    np.testing.assert_array_equal(record["image"], pixels(int(file[:3])))


@pytest.mark.parametrize(("name", "mode"), [
  ("a.png", "RGB"), ("a.png", "L"), ("a.png", "RGBA"), ("a.png", "P"), ("a.png", "1"),
  ("a.bmp", "RGB"), ("a.gif", "P"), ("a.webp", "RGB"), ("a.tiff", "CMYK"), ("a", "RGB"),
  ("a.jpg", "RGB"), ("a.JPEG", "L"), ("a.jpg", "CMYK"),
])
def test_formats_and_colour_modes(tmp_path, name, mode):
  original = Image.fromarray(pixels(0, 16, 24)).convert(mode)
  file = save(tmp_path / "train" / "cat" / name) if "." in name else tmp_path / "train/cat" / name
  file.parent.mkdir(parents=True, exist_ok=True)
  original.save(file, **({"lossless": True} if "webp" in name else {}),
                **({} if "." in name else {"format": "PNG"}))
  image = open_folder(tmp_path)[0]["image"]
  assert (image.shape, image.dtype) == ((16, 24, 3), np.uint8)
  if name.lower().endswith(("jpg", "jpeg")):           # lossy: what Pillow makes of it
    original = Image.open(file)
  np.testing.assert_array_equal(image, np.asarray(original.convert("RGB")))


def test_of_sixteen_bits_the_upper_eight_are_taken(tmp_path):
  deep = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)
  (tmp_path / "train" / "cat").mkdir(parents=True)
  Image.fromarray(deep).save(tmp_path / "train" / "cat" / "deep.png")
  image = open_folder(tmp_path)[0]["image"]
  np.testing.assert_array_equal(image, np.repeat((deep // 256)[..., None], 3, axis=2))


def test_floats_are_refused_and_a_transparent_palette_is_no_warning(tmp_path):
  file = tmp_path / "train" / "cat" / "a.png"
  file.parent.mkdir(parents=True)
  Image.fromarray(pixels(0)).convert("P").save(file, transparency=bytes([0, 128]))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert len(open_folder(tmp_path)) == 1
  Image.fromarray(np.ones((4, 4), np.float32)).save(file.with_name("b.tiff"))
  says("'cat/b.tiff' (its pixels are floats of 32 bits", directory=tmp_path)


def test_nested_hidden_and_linked_files(tmp_path):
  animals(tmp_path)
  train = tmp_path / "train"
  save(train / "dog" / "deep" / "deeper" / "a.png", number=9)
  for hidden in ("dog/.DS_Store", "dog/Thumbs.db", ".DS_Store", "dog/.cache/a.png", "README.txt",
                 ".ipynb_checkpoints/a.png"):
    (train / hidden).parent.mkdir(exist_ok=True)
    (train / hidden).write_bytes(b"no image")
  elsewhere = save(tmp_path / "elsewhere" / "b.png", number=8).parent
  (train / "dog" / "link").symlink_to(elsewhere)
  (train / "dog" / "round").symlink_to(train / "dog")
  source = open_folder(tmp_path)
  assert source.class_names == ("cat", "dog")
  assert sorted(paths(source)) == [
    *(f"cat/00{i}.png" for i in range(4)), *(f"dog/00{i}.png" for i in range(3)),
    "dog/deep/deeper/a.png", "dog/link/b.png"]
  np.testing.assert_array_equal(source[paths(source).index("dog/link/b.png")]["image"], pixels(8))


def test_a_link_to_nothing_and_a_folder_in_a_class_that_sorts_between(tmp_path):
  """'a-b/x' < 'a/x', and yet class 'a' comes before class 'a-b'."""
  animals(tmp_path, **{"a": 3, "a-b": 1})
  assert paths(open_folder(tmp_path)) == ("a/000.png", "a/001.png", "a-b/000.png", "a/002.png")
  (tmp_path / "train" / "a" / "gone.png").symlink_to(tmp_path / "gone")
  says("1 of 5 files", "'a/gone.png' (No such file", directory=tmp_path)


def test_every_slice_holds_the_classes_in_their_shares(tmp_path, monkeypatch):
  monkeypatch.setattr(file_index, "CHUNK", 4)
  source = open_folder(animals(tmp_path, ant=20, bee=10, cow=5))
  assert labels(source)[:7] == [0, 1, 0, 2, 0, 1, 0]
  for start in range(0, 35, 7):
    assert np.bincount(labels(source)[start:start + 7]).tolist() == [4, 2, 1]
  for label in range(3):
    own = [path for path in paths(source) if path.startswith(source.class_names[label])]
    assert own == sorted(own)


@pytest.mark.parametrize(("split", "places"), [
  ("train[:20%]", range(7)), ("train[10:20]", range(10, 20)), ("train[50%:]", range(18, 35)),
  ("train[-5:]", range(30, 35)), ("train[:-30]", range(5)),
  ("train[:2]+train[33:]", (0, 1, 33, 34)),
])
def test_slices_are_those_of_tfds(tmp_path, split, places):
  whole = paths(open_folder(animals(tmp_path, ant=20, bee=10, cow=5)))
  part = open_folder(tmp_path, split)
  assert paths(part) == tuple(whole[place] for place in places)
  assert part.split == split
  assert part.class_names == ("ant", "bee", "cow")


@pytest.mark.parametrize("name", ["val", "validation"])
def test_validation_stands_in_for_test(tmp_path, name):
  (animals(tmp_path) / "test").rename(tmp_path / name)
  assert len(open_folder(tmp_path, "test[:3]")) == 3
  assert len(open_folder(tmp_path, name)) == 7
  save(tmp_path / "test" / "cat" / "a.png")
  save(tmp_path / "test" / "dog" / "a.png")
  assert len(open_folder(tmp_path, "test")) == 2


def test_a_single_split_is_enough(tmp_path):
  shutil.rmtree(animals(tmp_path) / "train")
  assert open_folder(str(tmp_path), "test").class_names == ("cat", "dog")


def test_small_data_are_kept_decoded_by_the_size_of_the_part(tmp_path):
  animals(tmp_path)
  size = 4 * 5 * 3
  for split, limit, kept in [("train", 7 * size, True), ("train", 7 * size - 1, False),
                             ("train[:3]", 3 * size, True), ("train", 0, False)]:
    source = open_folder(tmp_path, split, keep_in_memory=limit)
    assert (source[1]["image"] is source[1]["image"]) == kept


def test_pickling_and_threads(tmp_path):
  for source in (open_folder(animals(tmp_path)), open_folder(tmp_path, keep_in_memory=0)):
    images = [record["image"] for record in source]
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.class_names, labels(copy)) == (source.class_names, labels(source))
    with ThreadPoolExecutor(4) as threads:
      for image, record in zip(images * 5, threads.map(copy.__getitem__, [*range(7)] * 5),
                               strict=True):
        np.testing.assert_array_equal(decode(image), decode(record["image"]))


def test_images_of_all_sizes_go_through_the_loader(tmp_path):
  sizes = [(8, 8), (5, 20), (30, 9), (3, 3)]
  for name in ("cat", "dog"):
    for i, (height, width) in enumerate(sizes):
      save(tmp_path / "train" / name / f"{i}.png", number=i, height=height, width=width)
  source = open_folder(tmp_path)
  assert [record["image"].shape[:2] for record in source] == [s for s in sizes for _ in range(2)]
  batches = training_batches(source, batch_size=8, seed=0, transform=training_transform(8, "none"))
  batch = next(batches)
  batches.close()
  assert (batch["image"].shape, batch["image"].dtype) == ((8, 8, 8, 3), np.uint8)
  assert sorted(batch["label"]) == [0] * 4 + [1] * 4
  assert (batch["image"] == pixels(0, 8, 8)).all(axis=(1, 2, 3)).sum() == 2
  ordered = next(iter(evaluation_batches(source, batch_size=8, transform=evaluation_transform(8))))
  np.testing.assert_array_equal(ordered["image"][0], pixels(0, 8, 8))
  assert ordered["label"].tolist() == [0, 1] * 4


def test_a_config_opens_class_folders(tmp_path):
  add_broken(animals(tmp_path))
  data = {"name": "folder", "dir": str(tmp_path), "broken": "skip"}
  assert len(open_split(ml_collections.ConfigDict(data), "train")) == 7
  with pytest.raises(InputError, match="4 of 11 files"):
    open_split(ml_collections.ConfigDict({**data, "broken": "fatal"}), "train")


def test_broken_files_are_named(tmp_path):
  names = add_broken(animals(tmp_path))
  message = says("4 of 11 files", "set data.broken='skip'", *map(repr, names), directory=tmp_path)
  assert "'cat/text.jpg' (of no format that Pillow reads)" in message
  assert len(open_folder(tmp_path, "test")) == 7


def test_at_most_ten_broken_files_are_named(tmp_path):
  animals(tmp_path)
  for i in range(13):
    (tmp_path / "train" / "dog" / f"z{i:02}.jpg").write_bytes(b"")
  message = says("13 of 20 files", "'dog/z09.jpg'", "and 3 more;", directory=tmp_path)
  assert "z10" not in message


def test_broken_files_can_be_skipped(tmp_path, caplog):
  names = add_broken(animals(tmp_path))
  aged(tmp_path)
  for _ in range(2):                   # from the files, from the index
    caplog.clear()
    source = open_folder(tmp_path, broken="skip")
    assert len(source) == 7
    assert not set(names) & set(paths(source))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    for part in ("4 of 11 files", "left out", *map(repr, names)):
      assert part in record.getMessage()
  says("4 of 11 files", directory=tmp_path)


def test_a_broken_file_that_is_mended_in_place_counts(tmp_path):
  add_broken(animals(tmp_path))
  assert len(open_folder(aged(tmp_path), broken="skip")) == 7
  Image.fromarray(pixels(0)).save(tmp_path / "train" / "cat" / "text.jpg")
  assert len(open_folder(tmp_path, broken="skip")) == 8
  assert "cat/text.jpg" in indexed(tmp_path / INDEX)


@pytest.mark.parametrize("keep", [0, 2**28])
def test_a_file_that_breaks_later_is_named_when_it_is_read(tmp_path, keep):
  file = animals(tmp_path) / "train" / "cat" / "000.png"
  source = open_folder(tmp_path, keep_in_memory=keep)
  file.write_bytes(b"no image")
  with pytest.raises(InputError, match=r"cat/000.png' does not decode \(of no format that Pillow"):
    decode(source[0]["image"])
  file.unlink()
  with pytest.raises(InputError, match=r"cat/000.png' cannot be read any longer \(No such file"):
    source[0]


def test_a_folder_is_needed(tmp_path):
  says("data.name='folder' needs data.dir", "train/CLASS/", directory=None)
  says("data.dir=", "gone", "does not exist", directory=tmp_path / "gone")
  says("data.dir=", "a.png", "is a file, not a folder", directory=save(tmp_path / "a.png"))


@pytest.mark.parametrize("split", ["dev", "", "train+test", "train/cat", "..", "val[:3]"])
def test_an_unknown_split_lists_those_that_exist(tmp_path, split):
  animals(tmp_path)
  says(f"split={split!r}", str(tmp_path), "there is 'test' and 'train'", directory=tmp_path,
       split=split)


@pytest.mark.parametrize(("split", "parts"), [
  ("train[", ["is not what TFDS would write", "'train[:90%]'"]),
  ("train[:x]", ["is not what TFDS would write"]),
  ("train[:8]", ["is no part of the 7 images", "use 'train'"]),
  ("train[:2]+test", ["is no part of the 7 images"]),
  ("train[:0]", ["is empty", "another split"]), ("train[5:2]", ["is empty"]),
])
def test_a_part_that_cannot_be_taken(tmp_path, looked_at, split, parts):
  says(f"split={split!r}", *parts, directory=animals(tmp_path), split=split)
  assert len(looked_at) == (0 if "TFDS" in parts[0] else 7)   # what need not wait does not


def test_other_classes_than_in_train(tmp_path):
  animals(tmp_path)
  (tmp_path / "test" / "dog").rename(tmp_path / "test" / "cow")
  says("other class folders in 'test' than in 'train'",
       "'cow' in 'test' alone and 'dog' in 'train' alone", directory=tmp_path, split="test")
  shutil.rmtree(tmp_path / "test" / "cow")
  assert "in 'test' alone" not in says("'dog' in 'train' alone", directory=tmp_path, split="test")
  for i in range(12):
    save(tmp_path / "test" / f"new{i:02}" / "a.png")
  assert "new10" not in says("'new09' and 2 more in 'test' alone", directory=tmp_path, split="test")
  assert len(open_folder(tmp_path, "train")) == 7


def test_classes_without_images(tmp_path):
  animals(tmp_path)
  (tmp_path / "train" / "cow" / "deep").mkdir(parents=True)
  says("no image of class 'cow' in 'train'", directory=tmp_path)
  (tmp_path / "train" / "cow" / "a.jpg").write_bytes(b"")
  says("no image of class 'cow'", "(1 broken files are left out)", directory=tmp_path,
       broken="skip")
  says("'cow/a.jpg'", directory=tmp_path)


def test_no_images_at_all(tmp_path):
  (tmp_path / "train" / "cat").mkdir(parents=True)
  (tmp_path / "train" / "dog").mkdir()
  says("no images at all in 'train'", directory=tmp_path)
  (tmp_path / "test").mkdir()
  save(tmp_path / "test" / "a.png")
  says("no class folders in 'test'", "test/CLASS/", directory=tmp_path, split="test")


@pytest.mark.slow
def test_cifar10_is_whole_and_every_part_is_balanced(tmp_path, shared, looked_at):
  with tarfile.open(shared / "data" / "cifar10-jpeg.tar") as tar:
    tar.extractall(tmp_path, [member for member in tar if member.name.startswith("test")],
                   filter="data")
  source = open_folder(tmp_path, "test[25%:75%]")
  assert (len(source), source.num_classes, len(looked_at)) == (5000, 10, 10_000)
  assert labels(source) == list(range(10)) * 500
  assert {record["image"].shape for record in source} == {(32, 32, 3)}
