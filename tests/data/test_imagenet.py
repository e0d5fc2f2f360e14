"""ImageNet as folders and as TFDS data: always the standard labels, and what is said otherwise."""

import functools
import os
import pathlib
import shutil

import ml_collections
import numpy as np
import pytest
import scipy.io
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from advprop_jax.data.imagenet import LABELS, WNIDS, standard_labels
from advprop_jax.data.imagenet_folder import open_imagenet
from advprop_jax.data.sources import open_source
from advprop_jax.errors import InputError
from advprop_jax.experiment import create_experiment, open_split
from advprop_jax.runtime.config import default_config
from tests import one_block, standin_imagenet
from tests.class_folders import aged, labels, paths
from tests.class_folders import says as says_of_folders
from tests.data.test_sources import edit, write_colours

says = functools.partial(says_of_folders, opens=open_imagenet)
FEW = WNIDS[5::200]                    # 5 of the 1000
JPEG = standin_imagenet.encoded(standin_imagenet.photograph(0, 0, 100))


def place(folder: pathlib.Path, names, file="a.JPEG") -> pathlib.Path:
  """Class folders of one image each; links, as a thousand files would take a second."""
  content = folder.parent / f".{folder.name}.JPEG"
  folder.mkdir(parents=True, exist_ok=True)
  content.write_bytes(JPEG)
  for name in names:
    (folder / name).mkdir()
    os.link(content, folder / name / file)
  return folder


def flat(tmp_path: pathlib.Path, images: int = 8) -> tuple[pathlib.Path, list[str]]:
  """A folder val/ of so many images, and the wnid of each."""
  (tmp_path / "val").mkdir()
  for number in range(1, images + 1):
    (tmp_path / "val" / f"ILSVRC2012_val_{number:08}.JPEG").write_bytes(JPEG)
  return tmp_path, [WNIDS[(number * 389 + 999) % 1000] for number in range(images)]


def by_file(source) -> list[str]:
  """The wnid of each record, by the names of the files."""
  pairs = zip(paths(source), labels(source), strict=True)
  return [source.class_names[label] for _, label in sorted(pairs)]


def test_a_whole_imagenet(tmp_path):
  """Fails where labels are those of the folders that happen to be there, or order is another."""
  place(tmp_path / "train", WNIDS)
  place(tmp_path / "val", FEW)
  train = open_imagenet(tmp_path, "train", training=True)
  assert labels(train) == list(range(1000))
  assert (train.class_names, train.num_classes, len(train)) == (WNIDS, 1000, 1000)
  for split in ("val", "validation", "test"):
    part = open_imagenet(tmp_path, split)
    assert (labels(part), part.class_names) == ([LABELS[wnid] for wnid in FEW], WNIDS)
  with pytest.raises(InputError, match=r"use data.name='imagenet_folder' or 'folder', which read"):
    open_source("imagenet2012", tmp_path)
  says("is no ImageNet to train on: 995 of the 1000 wnids are missing ('n01440764', ",
       "and 985 more)", "data.name='folder'", directory=tmp_path, split="val", training=True)


def test_a_config_trains_on_all_classes_and_evaluates_on_some(tmp_path):
  """Fails where a run's splits are said to differ, or a training split may lack classes."""
  one_block.register()
  place(tmp_path / "train", WNIDS)
  place(tmp_path / "imagenet-a", FEW)
  config = default_config()
  config.model.name, config.data.name, config.data.dir = "one_block", "imagenet_folder", str(
    tmp_path)
  config.data.image_size, config.data.test_split = 8, "imagenet-a"
  experiment = create_experiment(config)
  assert experiment.method.model.num_classes == 1000
  assert labels(experiment.test_source) == [LABELS[wnid] for wnid in FEW]
  config.data.train_split = "imagenet-a"
  with pytest.raises(InputError, match="995 of the 1000 wnids are missing"):
    create_experiment(config)


def test_imagenet_c_is_a_path_below_the_folder(tmp_path):
  """Fails where a split may hold no "/", a part cannot be taken, or severities are classes."""
  for corruption in ("gaussian_noise", "shot_noise", "fog"):
    for severity in range(1, 6):
      place(tmp_path / corruption / str(severity), FEW)
  source = open_imagenet(tmp_path, "gaussian_noise/3")
  assert (len(source), source.split, labels(source)[0]) == (5, "gaussian_noise/3", LABELS[FEW[0]])
  assert len(open_imagenet(tmp_path, "fog/1[:2]+fog/1[4:]")) == 3
  assert len(open_imagenet(tmp_path / "fog", "5[20%:]")) == 4
  says("split='gausian_noise/3'", "there is 'fog', 'gaussian_noise' and 'shot_noise' (did you mean "
       "'gaussian_noise'?)", directory=tmp_path, split="gausian_noise/3")
  says("fog'", "there is '1', '2', '3', '4' and '5'", directory=tmp_path, split="fog/6")
  says("has no class folders, but folders that do", "'fog/1'", directory=tmp_path, split="fog")


def test_imagenet_v2_has_folders_of_indices(tmp_path):
  """Fails where '10' < '2' makes the labels, or a data set of digits is taken for ImageNet."""
  place(tmp_path / "v2", map(str, range(1000)))
  source = open_imagenet(tmp_path, "v2")
  assert [(path, label) for path, label in zip(paths(source), labels(source), strict=True)] == [
    (f"{label}/a.JPEG", label) for label in range(1000)]
  assert source.class_names == WNIDS
  place(tmp_path / "digits", map(str, range(10)))
  says("10 of its 10 folders are no wnids", directory=tmp_path, split="digits")


def test_what_is_no_imagenet(tmp_path):
  """Fails where more than ten are named, or either side is left out."""
  place(tmp_path / "train", [*WNIDS[:3], *(f"class{number:02}" for number in range(13))])
  message = says("is no ImageNet to train on: 13 of its 16 folders are no wnids", "'class09'",
                 "and 3 more) and 997 of the 1000 wnids are missing ('n01491361'",
                 directory=tmp_path, training=True)
  assert "class10" not in message
  assert WNIDS[13] not in message
  assert "missing" not in says("is no ImageNet: 13 of its 16", directory=tmp_path)
  place(tmp_path / "val", FEW[:1])
  says("holds class folders itself: set it to", "the split to 'val'", directory=tmp_path / "val")
  (tmp_path / "test").mkdir()
  says("no images at all in 'test'", directory=tmp_path, split="test")
  (tmp_path / "val" / FEW[1]).mkdir()
  says(f"no image of class '{FEW[1]}' in 'val'", directory=tmp_path, split="val")
  says("needs data.dir", directory=None)
  says("does not exist", directory=tmp_path / "gone")
  says("is a file", directory=tmp_path / ".val.JPEG")
  says("is not what TFDS would write", directory=tmp_path, split="val[:x]")
  for split in ("", "..[", "dev"):
    says(f"split={split!r}", directory=tmp_path, split=split)


def write_kaggle(folder, wnids):
  rows = [f"ILSVRC2012_val_{number:08},{wnid} 1 2 3 4 {wnid} 5 6 7 8 "
          for number, wnid in enumerate(wnids, 1)]
  (folder / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows[::-1]]))


def write_wnids(folder, wnids):
  (folder / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(wnids) + "\n")


def write_caffe(folder, wnids):
  (folder / "val.txt").write_text("".join(
    f"ILSVRC2012_val_{number:08}.JPEG {LABELS[wnid]}\n" for number, wnid in enumerate(wnids, 1)))


def write_kit(folder, wnids):
  """As the kit has it: IDs in an order of their own, and classes above 1000 that have no images."""
  kit = folder if folder.name == "val" else folder / "ILSVRC2012_devkit_t12" / "data"
  kit.mkdir(parents=True, exist_ok=True)
  order = np.random.default_rng(0).permutation(1000)
  rows = [(number, WNIDS[label]) for number, label in enumerate(order, 1)] + [(1001, "n00001740")]
  synsets = np.zeros((len(rows), 1), [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
  for row, (number, wnid) in enumerate(rows):
    synsets[row, 0] = (np.array([[number]], np.uint16), wnid, "words, of it")
  scipy.io.savemat(kit / "meta.mat", {"synsets": synsets})
  numbers = {wnid: number for number, wnid in rows}
  (kit / "ILSVRC2012_validation_ground_truth.txt").write_text(
    "".join(f"{numbers[wnid]}\n" for wnid in wnids))


@pytest.mark.parametrize("write", [write_kaggle, write_wnids, write_caffe, write_kit])
@pytest.mark.parametrize("inside", [False, True])
def test_a_flat_folder_and_its_ground_truth(tmp_path, write, inside):
  """Fails where an ILSVRC2012_ID is taken for a label, lines for sorted files, or the ground truth
  for a broken image."""
  directory, wnids = flat(tmp_path)
  write(directory / "val" if inside else directory, wnids)
  assert by_file(open_imagenet(directory, "val")) == wnids
  os.remove(directory / "val" / "ILSVRC2012_val_00000003.JPEG")
  (directory / "val" / "ILSVRC2012_val_00000004.JPEG").write_bytes(b"")
  if write in (write_kaggle, write_caffe):             # by name: each keeps its own
    assert by_file(open_imagenet(directory, "val", broken="skip")) == wnids[:2] + wnids[4:]
  else:
    says("has 8 labels, where 7 images are in", "50000 in ImageNet", directory=directory,
         split="val", broken="skip")


def test_ground_truths_that_do_not_fit(tmp_path):
  """Fails with a traceback, or with labels that are shifted."""
  directory, wnids = flat(tmp_path)
  says("neither class folders nor a ground truth", "LOC_val_solution.csv", "meta.mat",
       directory=directory, split="val")
  write_kit(directory, wnids)
  os.remove(directory / "ILSVRC2012_devkit_t12" / "data" / "meta.mat")
  says("its numbers mean nothing without the development kit's meta.mat", directory=directory,
       split="val")
  write_caffe(directory, wnids[:7])
  says("says nothing of 1 of the 8 images", "'ILSVRC2012_val_00000008.JPEG'", directory=directory,
       split="val")
  (directory / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG 1000\n")
  says("val.txt' does not read (labels such as 1000, not 0 to 999)", directory=directory,
       split="val")
  write_wnids(directory, [*wnids[:7], "cat"])
  says("does not read ('cat' is no wnid", directory=directory, split="val")
  for wrong in (wnids[:7], [*wnids, wnids[0]]):
    write_wnids(directory, wrong)
    says(f"has {len(wrong)} labels, where 8 images are in", directory=directory, split="val")
  write_wnids(directory, wnids)
  (directory / "val" / "ILSVRC2012_val_00000008.JPEG").rename(directory / "val" / "cat.JPEG")
  says("goes by numbers, which 1 of the files", "'cat.JPEG'", directory=directory, split="val")
  (directory / "val").rename(directory / "test")
  (directory / "test" / "cat.JPEG").rename(directory / "test" / "ILSVRC2012_test_00000001.JPEG")
  says("whose labels are not public", directory=directory, split="test")


def test_a_list_of_all_50000_serves_a_part_of_the_images(tmp_path):
  """Fails where the first lines are given to the images that there are, whatever their numbers."""
  wnids = [WNIDS[number % 1000] for number in range(50_000)]
  write_wnids(tmp_path, wnids)
  (tmp_path / "val").mkdir()
  for number in (7, 1234, 50_000):
    (tmp_path / "val" / f"ILSVRC2012_val_{number:08}.JPEG").write_bytes(JPEG)
  assert by_file(open_imagenet(tmp_path, "val")) == [wnids[6], wnids[1233], wnids[-1]]


def test_wnids_in_the_names_of_files(tmp_path):
  """As Hugging Face has it; fails where they are looked for in a ground truth."""
  (tmp_path / "val").mkdir()
  for number, wnid in enumerate(FEW):
    (tmp_path / "val" / f"ILSVRC2012_val_{number:08}_{wnid}.JPEG").write_bytes(JPEG)
  assert by_file(open_imagenet(tmp_path, "val")) == list(FEW)
  (tmp_path / "val" / "n99999999_1.JPEG").write_bytes(JPEG)
  says("not of ImageNet's 1000 classes: 'n99999999'", directory=tmp_path, split="val")


def test_a_stand_in_with_all_kinds_of_files(tmp_path):
  """Fails where grey, CMYK, PNG, EXIF or padding is refused, or a broken file is not named."""
  whole = standin_imagenet.make(tmp_path, train=4, val=2, broken_files=3, largest=120,
                                wnids=FEW)
  assert whole == 30
  kinds = {standin_imagenet.kind(number) for number in range(30)}
  assert kinds == {"rgb", *standin_imagenet.KINDS.values()}
  names = [f"'{FEW[number * 7 % 5]}/{FEW[number * 7 % 5]}_broken{number}.JPEG'"
           for number in range(3)]
  says("3 of 23 files", "data.broken='skip'", *names, directory=tmp_path)
  data = ml_collections.ConfigDict({"name": "imagenet_folder", "dir": str(tmp_path),
                                    "broken": "skip"})
  train, val = open_split(data, "train"), open_split(data, "val")
  assert (len(train), len(val)) == (20, 10)
  images = {record["image"].tobytes() for record in train} | {
    record["image"].tobytes() for record in val}
  assert len(images) == 30
  for record in train:
    assert record["image"].shape[2] == 3
    assert 50 < max(record["image"].shape[:2]) <= 121
  assert not list((tmp_path / "val").rglob("*broken*"))


@pytest.mark.slow
def test_the_whole_stand_in(tmp_path, looked_at):
  """Of 1000 classes, as the tool makes it."""
  assert standin_imagenet.make(tmp_path, broken_files=3, largest=300) == 3000
  aged(tmp_path)
  for _ in range(2):
    assert len(open_imagenet(tmp_path, "train", "skip", training=True)) == 2000
    assert labels(open_imagenet(tmp_path, "val")) == list(range(1000))
  assert len(looked_at) == 3003 + 3                      # the broken ones are tried again


def write_tfds(version: pathlib.Path, names) -> None:
  """Records with the labels 0, 1 and 999, of TFDS data whose classes have those names."""
  write_colours(version)
  for shard in version.glob("*.array_record*"):
    shard.unlink()
  writer = ArrayRecordWriter(str(version / "colours-train.array_record-00000-of-00001"),
                             "group_size:1")
  for label in (0, 1, 999):
    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(JPEG)
    example.features.feature["label"].int64_list.value.append(label)
    writer.write(example.SerializeToString())
  writer.close()
  edit(version / "features.json", lambda content: content["featuresDict"]["features"]["label"]
       ["classLabel"].update(numClasses=str(len(names))))
  edit(version / "dataset_info.json", lambda info: info["splits"][0].update(shardLengths=["3"]))
  (version / "label.labels.txt").write_text("\n".join(names) + "\n")


def test_tfds_in_another_order_gets_the_standard_labels(tmp_path):
  """As TFDS' imagenet_resized, by ILSVRC2012_ID; fails where its own labels are kept."""
  shuffled = [WNIDS[label] for label in np.random.default_rng(0).permutation(1000)]
  for name, names in (("own", shuffled), ("standard", WNIDS), ("other", [*"abc", *WNIDS[3:]])):
    write_tfds(tmp_path / name / "colours" / "1.0.0", names)
  own, standard, other = (open_source("colours", tmp_path / name)
                          for name in ("own", "standard", "other"))
  assert own.class_names == standard.class_names == WNIDS
  assert labels(own) == [LABELS[shuffled[label]] for label in (0, 1, 999)]
  assert labels(standard) == labels(other) == [0, 1, 999]
  assert other.class_names[:3] == ("a", "b", "c")
  assert standard_labels(FEW) is None


def test_the_labels_of_tfds_are_the_standard_ones():
  """Fails with a TFDS that has another order; then `standard_labels` maps it."""
  import tensorflow_datasets as tfds

  file = pathlib.Path(tfds.__file__).parent / "datasets" / "imagenet2012" / "labels.txt"
  assert tuple(file.read_text().split()) == WNIDS


def test_a_half_written_array_record_is_refused(tmp_path):
  """Fails where a shard that TFDS has not closed is read as if it were whole."""
  version = tmp_path / "colours" / "1.0.0"
  write_tfds(version, WNIDS)
  shard = next(version.glob("*.array_record*"))
  content = shard.read_bytes()
  shard.write_bytes(content[:-100])
  with pytest.raises(InputError, match=r"cut short \(. of 3 records"):
    open_source("colours", tmp_path)
  shutil.move(shard, shard.with_name(f"incomplete.{shard.name}"))
  with pytest.raises(InputError, match="is missing"):
    open_source("colours", tmp_path)


def test_a_bucket_that_cannot_be_reached_is_one_sentence():
  """Fails with a traceback, as without gcsfs, or without rights."""
  with pytest.raises(InputError, match=r"data.dir='gs://no_such_bucket_/data' (cannot be reached|"
                     "does not exist)"):
    open_source("imagenet2012", "gs://no_such_bucket_/data")
