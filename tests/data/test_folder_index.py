"""The index of class folders: made once, kept, made again where the folder has changed."""

import errno
import os
import pathlib
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from advprop_jax.data import file_index
from advprop_jax.data.folder import open_folder
from tests.class_folders import (
  INDEX,
  aged,
  animals,
  indexed,
  labels,
  paths,
  save,
)


def test_an_unchanged_folder_is_not_read_again(tmp_path, looked_at, cache):
  first = open_folder(aged(animals(tmp_path)))
  assert sorted(looked_at) == sorted(paths(first))
  looked_at.clear()
  written = (tmp_path / INDEX).stat()
  again = open_folder(tmp_path)
  assert looked_at == []
  assert (tmp_path / INDEX).stat().st_ino == written.st_ino
  assert (paths(again), labels(again)) == (paths(first), labels(first))
  assert not list(cache.iterdir())
  assert sorted(os.listdir(tmp_path)) == [INDEX, "test", "train"]


def add(train):
  save(train / "cat" / "new.png")


def remove(train):
  (train / "cat" / "000.png").unlink()


def rename(train):
  (train / "cat" / "000.png").rename(train / "cat" / "new.png")


def replace(train):
  save(train.parent / "new.png", number=5, height=9).replace(train / "cat" / "000.png")


def add_nested(train):
  save(train / "cat" / "deep" / "new.png")


def add_class(train):
  save(train / "cow" / "new.png")


def remove_class(train):
  shutil.rmtree(train / "dog")


def add_unseen(train):
  """By a tool that sets the times back: only the number of entries tells."""
  before = (train / "cat").stat()
  add(train)
  os.utime(train / "cat", ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(("change", "new", "number"), [
  (add, ["cat/new.png"], 8), (remove, [], 6), (rename, ["cat/new.png"], 7),
  (replace, ["cat/000.png"], 7), (add_nested, ["cat/deep/new.png"], 8),
  (add_class, ["cow/new.png"], 8), (remove_class, [], 4), (add_unseen, ["cat/new.png"], 8)])
def test_a_changed_folder_is_read_again_where_it_changed(tmp_path, looked_at, change, new, number):
  shutil.rmtree(animals(tmp_path) / "test")
  assert len(open_folder(aged(tmp_path))) == 7
  looked_at.clear()
  change(tmp_path / "train")
  after = open_folder(tmp_path)
  assert (len(after), looked_at) == (number, new)
  assert len({path.partition("/")[0] for path in paths(after)}) == after.num_classes
  shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns(".*", "copy"))
  assert paths(after) == paths(open_folder(tmp_path / "copy"))
  looked_at.clear()
  assert len(open_folder(tmp_path)) == number
  assert looked_at == []


def test_a_change_within_one_tick_of_the_clock_is_noticed(tmp_path, looked_at):
  train = animals(tmp_path) / "train"
  open_folder(tmp_path)
  before = (train / "cat").stat()
  rename(train)
  os.utime(train / "cat", ns=(before.st_atime_ns, before.st_mtime_ns))
  looked_at.clear()
  assert "cat/new.png" in paths(open_folder(tmp_path))
  assert looked_at == ["cat/new.png"]


def test_a_file_changed_in_place_is_noticed_with_the_next_index(tmp_path, looked_at):
  open_folder(aged(animals(tmp_path)))
  save(tmp_path / "train" / "cat" / "000.png", height=20, width=30)
  looked_at.clear()
  open_folder(tmp_path)
  assert looked_at == []
  add(tmp_path / "train")
  open_folder(tmp_path)
  assert sorted(looked_at) == ["cat/000.png", "cat/new.png"]


@pytest.mark.parametrize("change", [
  lambda content: b"", lambda content: b"{", lambda content: b"\xff" * 999,
  lambda content: content[:len(content) // 2], lambda content: content[:-1],
  lambda content: content[:300] + bytes([content[300] ^ 255]) + content[301:]])
def test_an_index_that_does_not_read_is_made_again(tmp_path, looked_at, change):
  open_folder(aged(animals(tmp_path)))
  looked_at.clear()
  (tmp_path / INDEX).write_bytes(change((tmp_path / INDEX).read_bytes()))
  assert len(open_folder(tmp_path)) == len(looked_at) == 7
  assert len(indexed(tmp_path / INDEX)) == 7


@pytest.mark.parametrize(("name", "value"), [
  ("version", 3), ("entries", np.zeros((3, 4), np.int64)), ("entries", np.zeros((7, 2), np.int64)),
  ("folder_states", np.zeros((1, 2), np.int64)), ("paths", None)])
def test_an_index_of_another_version_is_made_again(tmp_path, looked_at, name, value):
  open_folder(aged(animals(tmp_path)))
  content = dict(np.load(tmp_path / INDEX))
  other = {**content, name: value}
  np.savez(tmp_path / INDEX, **{name: value for name, value in other.items() if value is not None})
  looked_at.clear()
  open_folder(tmp_path)
  assert len(looked_at) == 7
  for name, value in np.load(tmp_path / INDEX).items():
    np.testing.assert_array_equal(value, content[name])


def test_a_folder_that_cannot_be_written_is_indexed_in_the_cache(tmp_path, cache, looked_at):
  """A folder that has the index's name is in the way: of root as well, whom no mode stops."""
  animals(tmp_path)
  (tmp_path / INDEX).mkdir()
  assert len(open_folder(tmp_path)) == len(looked_at) == 7
  assert len(list((cache / "advprop_jax").iterdir())) == 1
  other = animals(tmp_path / "other", cow=2)
  (other / INDEX).mkdir()
  assert len(open_folder(other)) == 2
  assert len(list((cache / "advprop_jax").iterdir())) == 2
  looked_at.clear()
  assert (len(open_folder(tmp_path)), len(open_folder(other)), looked_at) == (7, 2, [])
  assert sorted(os.listdir(tmp_path)) == [INDEX, "other", "test", "train"]


def test_no_place_for_an_index_is_said_and_no_error(tmp_path, monkeypatch, caplog):
  animals(tmp_path)
  (tmp_path / INDEX).mkdir()
  monkeypatch.setenv("XDG_CACHE_HOME", str(save(tmp_path / "a.png")))
  assert len(open_folder(tmp_path)) == 7
  [record] = caplog.records
  assert "can be written to none of" in record.getMessage()


def test_an_index_is_put_in_place_as_a_whole(tmp_path, monkeypatch):
  """While it is written the old one stands; what fails on the way leaves nothing behind."""
  animals(tmp_path)
  open_folder(tmp_path)
  old = (tmp_path / INDEX).read_bytes()
  put = []

  def failing(source, target):
    put.append(indexed(pathlib.Path(source)))
    assert not pathlib.Path(target).exists() or pathlib.Path(target).read_bytes() == old
    raise OSError("no space left")

  add(tmp_path / "train")
  monkeypatch.setattr(os, "replace", failing)
  assert len(open_folder(tmp_path)) == 8
  assert [len(files) for files in put] == [8, 8]       # there, and in the cache
  assert (tmp_path / INDEX).read_bytes() == old
  assert sorted(os.listdir(tmp_path)) == [INDEX, "test", "train"]


def test_many_may_start_at_once(tmp_path, cache):
  animals(tmp_path)
  with ThreadPoolExecutor(8) as threads:
    sources = list(threads.map(lambda _: open_folder(tmp_path), range(16)))
  assert {len(source) for source in sources} == {7}
  assert sorted(os.listdir(tmp_path)) == [INDEX, "test", "train"]
  assert not list(cache.iterdir())


def test_a_full_disk_is_a_warning(tmp_path, monkeypatch, caplog):
  """Fails where a run ends for want of space for the index, or a part of one stays behind."""
  animals(tmp_path)

  def full(self, content):
    with open(self, "wb") as file:
      file.write(bytes(content)[:100])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

  monkeypatch.setattr(pathlib.Path, "write_bytes", full)
  assert len(open_folder(tmp_path)) == 7
  [record] = caplog.records
  assert "can be written to none of" in record.getMessage()
  assert "(No space left on device)" in record.getMessage()
  assert sorted(os.listdir(tmp_path)) == ["test", "train"]


def test_whole_jpegs_are_not_decoded(tmp_path, monkeypatch):
  """Fails where 1.28 million files would take hours; those without their end are decoded."""
  decoded = []
  decode = file_index.decode
  monkeypatch.setattr(file_index, "decode", lambda content: (
    decoded.append(len(content)), decode(content))[1])
  for number in range(5):
    save(tmp_path / "train" / "cat" / f"{number}.jpg", height=90 + number, width=80)
  cut = save(tmp_path / "train" / "cat" / "cut.jpg", height=90, width=80)
  cut.write_bytes(cut.read_bytes()[:-100])
  png = save(tmp_path / "train" / "cat" / "b.JPEG.png").rename(tmp_path / "train/cat/b.JPEG")
  index, faults = file_index.read_index(tmp_path / "train")
  assert sorted(decoded) == sorted([cut.stat().st_size, png.stat().st_size])
  assert list(faults) == ["cat/cut.jpg"]
  assert index.paths == [*(f"cat/{number}.jpg" for number in range(5)), "cat/b.JPEG"]
  assert index.entries[:, 2:].tolist() == [*([80, 90 + number] for number in range(5)), [5, 4]]


def test_paths_in_little_memory():
  """Fails where a name that is no UTF-8, is empty, or has many bytes comes back as another."""
  names = ["cat/1.jpg", "", "ü/ß.png", os.fsdecode(b"\xff\xfe"), "x" * 300]
  packed = file_index.Paths.of(names)
  assert (list(packed), len(packed), packed[-1]) == (names, 5, names[-1])
  with pytest.raises(IndexError):
    packed[5]
  assert not len(file_index.Paths.of([]))
