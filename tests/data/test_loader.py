"""The stream of batches: order, processes, threads, interruptions; evaluation counts each once."""

import collections
import functools
import itertools
import json
import pickle
import threading

import numpy as np
import pytest

from advprop_jax.data.decode import Encoded
from advprop_jax.data.loader import evaluation_batches, training_batches
from advprop_jax.data.sources import Source, open_source
from advprop_jax.data.transforms import evaluation_transform, training_transform
from advprop_jax.errors import InputError

SIZE = 6


def numbered(length: int) -> Source:
  """Records whose label is their index, with random pixels."""
  images = np.random.default_rng(0).integers(0, 256, (length, SIZE, SIZE, 3)).astype(np.uint8)
  records = [{"image": image, "label": label} for label, image in enumerate(images)]
  return Source("numbered", "train", tuple(map(str, range(length))), records)


def training(source=None, batch_size=8, seed=0, **settings):
  return training_batches(source or numbered(20), batch_size=batch_size, seed=seed,
                          transform=training_transform(SIZE, "crop_flip", padding=2), **settings)


def take(batches, number: int) -> list[dict[str, np.ndarray]]:
  taken = list(itertools.islice(batches, number))
  batches.close()
  return taken


def joined(batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_same(one, other):
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name])


def test_shapes_and_types():
  batch = next(training(batch_size=8, process_count=2))
  assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
    "image": ((4, SIZE, SIZE, 3), "uint8"), "label": ((4,), "int32")}


def test_an_epoch_holds_every_record_once_and_the_next_has_another_order():
  """20 records in batches of 8: epochs end in the middle of batches, and nothing is dropped."""
  labels = joined(take(training(batch_size=8), 10))["label"].reshape(4, 20)
  for epoch in labels:
    assert sorted(epoch) == list(range(20))
  assert len({tuple(epoch) for epoch in labels}) == 4
  assert tuple(range(20)) not in {tuple(epoch) for epoch in labels}


def test_seeds_give_unrelated_streams():
  """Fails if the order's seed is the run's own: Grain shuffles epoch e by seed + e."""
  orders = {seed: joined(take(training(batch_size=20, seed=seed), 3))["label"].reshape(3, 20)
            for seed in (0, 1, 2)}
  assert len({tuple(epoch) for order in orders.values() for epoch in order}) == 9
  again = joined(take(training(batch_size=20, seed=1), 3))["label"].reshape(3, 20)
  np.testing.assert_array_equal(again, orders[1])


def test_augmentation_is_drawn_anew_for_each_image_of_each_epoch():
  """One record, repeated: its crops differ within an epoch of copies and between epochs."""
  image = np.random.default_rng(0).integers(1, 256, (SIZE, SIZE, 3)).astype(np.uint8)
  copies = Source("copies", "train", ("one",), [{"image": image, "label": 0}] * 16)
  epochs = joined(take(training(copies, batch_size=16), 2))["image"].reshape(2, 16, -1)
  kinds = [len({crop.tobytes() for crop in epoch}) for epoch in epochs]
  assert min(kinds) > 8                                       # 50 crops are possible
  assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_hold_the_blocks_of_the_same_global_batches(processes):
  """Fails if processes stride over the records, or seed by their own place."""
  whole = take(training(), 6)
  shares = [take(training(process_index=p, process_count=processes), 6) for p in range(processes)]
  for step, batch in enumerate(whole):
    assert_same(joined([share[step] for share in shares]), batch)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_stream(threads):
  assert_same(joined(take(training(num_threads=threads), 12)),
              joined(take(training(num_threads=0), 12)))


def test_the_batch_size_only_cuts_the_stream():
  """Fails if an image hangs on its neighbours or on its place in the batch."""
  assert_same(joined(take(training(batch_size=4), 6)), joined(take(training(batch_size=12), 2)))


def test_a_second_view_is_its_own_and_leaves_the_first_as_it_is():
  """Fails where the views of an image are one, or where the second one's draws move the first."""
  second = {"second": training_transform(SIZE, "autoaugment", padding=2)}
  both = joined(take(training(more_views=second), 5))
  alone = joined(take(training(), 5))
  assert set(both) == {"image", "label", "second"}
  assert both["second"].shape == both["image"].shape
  assert not np.array_equal(both["second"], both["image"])
  assert_same({name: both[name] for name in alone}, alone)


@pytest.mark.parametrize("augment", ["autoaugment", "randaugment"])
def test_threads_and_processes_do_not_change_what_is_drawn(augment):
  """Fails where a policy draws from anything but the generator of the image's place."""
  def stream(**settings):
    return training_batches(numbered(20), batch_size=8, seed=0, **settings,
                            transform=training_transform(SIZE, augment, padding=2))

  alone = joined(take(stream(num_threads=0), 6))
  assert_same(alone, joined(take(stream(num_threads=3), 6)))
  parts = [take(stream(process_index=i, process_count=2), 6) for i in range(2)]
  assert_same(alone, joined([part[step] for step in range(6) for part in parts]))


@pytest.mark.parametrize(("settings", "own"), [
    ({"num_threads": 0}, True), ({"num_threads": 2}, False), ({"num_workers": 1}, True)])
def test_who_finishes_batches(settings, own):
  """Fails where a batch is not finished, or twice, or where the thread that trains does what others
  could that read ahead; or where workers, who have no devices, do it."""
  threads = set()

  def finish(batch):
    threads.add(threading.get_ident())
    return {**batch, "label": batch["label"] + 100}

  finished = training(finish=finish, **settings)
  assert np.all(finished.example()["label"] == 100)
  threads.clear()
  for one, other in zip(take(finished, 3), take(training(), 3), strict=True):
    assert_same(one, {**other, "label": other["label"] + 100})
  if own:
    assert threads == {threading.get_ident()}
  else:
    assert threading.get_ident() not in threads


def test_batches_to_evaluate_are_finished():
  batches = evaluation_batches(numbered(12), batch_size=8, transform=evaluation_transform(SIZE),
                               finish=lambda batch: batch["label"] + 100)
  assert np.concatenate(list(batches)).tolist() == [*range(100, 112), *[100] * 4]
  assert batches.example().tolist() == [100] * 8


@pytest.mark.parametrize("taken", [0, 1, 5])
@pytest.mark.parametrize("threads", [0, 2])
def test_resuming_gives_what_was_to_follow(taken, threads):
  """Fails if the state counts what was read ahead."""
  expected = take(training(), taken + 4)[taken:]
  first = training(num_threads=threads)
  list(itertools.islice(first, taken))
  state = json.loads(json.dumps(first.get_state()))
  assert state == {"batches": taken}
  resumed = training(num_threads=threads)
  resumed.set_state(state)
  assert_same(joined(take(resumed, 4)), joined(expected))
  assert_same(joined(take(first, 4)), joined(expected))       # asking changed nothing


def test_an_iterator_can_be_set_back():
  batches = training(num_threads=2)
  state = batches.get_state()
  first = list(itertools.islice(batches, 3))
  batches.set_state(state)
  assert_same(joined(take(batches, 3)), joined(first))


def test_a_state_is_good_for_another_number_of_processes():
  expected = take(training(), 5)[3:]
  two = [training(process_index=p, process_count=2) for p in range(2)]
  for batches in two:
    list(itertools.islice(batches, 3))
  states = [batches.get_state() for batches in two]
  assert states[0] == states[1]
  four = [training(process_index=p, process_count=4) for p in range(4)]
  for batches in four:
    batches.set_state(states[0])
  shares = [take(batches, 2) for batches in four]
  for step, batch in enumerate(expected):
    assert_same(joined([share[step] for share in shares]), batch)


def test_the_bundled_set_comes_through_the_whole_path():
  source = open_source("bundled")
  batches = training_batches(source, batch_size=64, seed=3,
                             transform=training_transform(28, "none"))
  batch = next(batches)
  batches.close()
  assert batch["image"].shape == (64, 28, 28, 3)
  by_pixels = collections.defaultdict(set)
  for record in map(source.__getitem__, range(len(source))):
    by_pixels[record["image"].tobytes()].add(record["label"])
  for image, label in zip(batch["image"], batch["label"], strict=True):
    assert label in by_pixels[image.tobytes()]


@pytest.mark.parametrize("length", [1, 7, 16, 17])
@pytest.mark.parametrize(("batch_size", "processes"), [(1, 1), (4, 1), (4, 2), (8, 4), (32, 4)])
def test_evaluation_counts_every_image_once_and_in_order(length, batch_size, processes):
  source = numbered(length)
  shares = [evaluation_batches(source, batch_size=batch_size, transform=evaluation_transform(SIZE),
                               process_index=p, process_count=processes) for p in range(processes)]
  steps = -(-length // batch_size)
  assert [len(share) for share in shares] == [steps] * processes
  globals_ = [joined(list(blocks)) for blocks in zip(*shares, strict=True)]
  assert [len(batch["mask"]) for batch in globals_] == [batch_size] * steps
  everything = joined(globals_)
  np.testing.assert_array_equal(everything["index"], np.arange(steps * batch_size))
  mask = everything["mask"]
  assert mask.dtype == bool
  assert everything["index"].dtype == np.int32
  np.testing.assert_array_equal(everything["label"][mask], np.arange(length))
  np.testing.assert_array_equal(everything["image"][mask], [r["image"] for r in source])
  assert not everything["image"][~mask].any()
  assert not everything["label"][~mask].any()


def test_evaluation_can_be_run_again_and_in_part():
  evaluate = functools.partial(evaluation_batches, numbered(20), batch_size=8,
                               transform=evaluation_transform(SIZE))
  batches = evaluate()
  next(iter(batches))                                         # a pass that is broken off
  assert_same(joined(list(batches)), joined(list(batches)))
  part = joined(list(evaluate(limit=11)))
  assert part["mask"].sum() == 11
  np.testing.assert_array_equal(part["label"][part["mask"]], np.arange(11))
  assert len(evaluate(limit=100)) == len(batches)


def test_what_worker_processes_need_can_be_pickled():
  source = open_source("bundled", split="test")
  first = source[0]
  copy = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(copy[0]["image"], first["image"])
  assert (len(copy), copy.class_names) == (len(source), source.class_names)
  assert len(pickle.dumps(source)) < 20_000                   # kept images do not travel


@pytest.mark.parametrize("batches", [
  training,
  functools.partial(evaluation_batches, numbered(4), transform=evaluation_transform(SIZE)),
])
def test_a_batch_that_processes_cannot_share(batches):
  with pytest.raises(InputError, match=r"data\.batch_size=10 .* 4 processes.*such as 8"):
    batches(batch_size=10, process_count=4)
  with pytest.raises(InputError, match=r"data\.batch_size=0 .*such as 2"):
    batches(batch_size=0, process_count=2)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_record_that_cannot_be_read_stops_the_stream_with_its_sentence(threads):
  class Broken(list):
    def __getitem__(self, index):
      if index == 3:
        raise InputError("record 3 does not decode")
      return super().__getitem__(index)

  source = Source("broken", "train", ("one",), Broken(numbered(8).records))
  with pytest.raises(InputError, match="record 3 does not decode"):
    take(training(source, batch_size=8, num_threads=threads), 2)


def test_a_broken_image_gives_way_to_the_next_one(caplog):
  """data.broken='skip', for what no index can see; fails where a run ends, or keeps silent."""
  whole = np.full((4, 4, 3), 7, np.uint8)
  broken = Encoded(b"no image", "record 1 of x does not decode", "mend it")
  records = [{"image": image, "label": i} for i, image in enumerate((whole, broken, whole))]
  source = Source("x", "train", ("a", "b", "c"), records)
  settings = {"batch_size": 3, "transform": training_transform(4, "none"), "seed": 0}
  batches = training_batches(source, **settings, num_threads=0, skip_broken=True)
  batch = next(batches)
  assert sorted(batch["label"].tolist()) == [0, 2, 2]
  assert np.all(batch["image"] == 7)
  next(batches)
  warnings = [record.message for record in caplog.records if "left out" in record.message]
  assert len(warnings) == 1
  assert "record 1 of x does not decode" in warnings[0]
  with pytest.raises(InputError, match="record 1 of x does not decode"):
    next(training_batches(source, **settings, num_threads=0))
