"""What a person sees of a run: metrics.jsonl, TensorBoard, progress, tables and JSON files."""

import contextlib
import errno
import fcntl
import io
import json
import os
import pathlib
import pty
import signal
import struct
import subprocess
import sys
import termios
import time

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog

from advprop_jax.errors import FaultError, InputError
from advprop_jax.runtime.metrics import MetricsWriter, Progress, table, write_json
from tests.conftest import ROOT


def read_lines(workdir: pathlib.Path) -> list[dict]:
  def refuse(word):
    raise ValueError(f"{word} is no JSON")
  text = (workdir / "metrics.jsonl").read_text()
  assert text == "" or text.endswith("\n")
  return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def masked_crc(data: bytes) -> int:
  crc = crc32c(data)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_events(workdir: pathlib.Path) -> list[Event]:
  """All events of all files in the order of their names, as TensorBoard reads; checks each CRC."""
  events = []
  for path in sorted((workdir / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:
      (length, length_crc) = struct.unpack("<QI", data[:12])
      content, (content_crc,) = data[12:12 + length], struct.unpack("<I", data[12 + length:][:4])
      assert (length_crc, content_crc) == (masked_crc(data[:8]), masked_crc(content))
      events.append(Event.FromString(content))
      data = data[16 + length:]
  return events


def shown_scalars(workdir: pathlib.Path) -> dict[tuple[int, str], float]:
  """What TensorBoard shows: a start of a session makes it forget the steps from there on."""
  scalars = {}
  for event in read_events(workdir):
    if event.session_log.status == SessionLog.START:
      scalars = {key: value for key, value in scalars.items() if key[0] < event.step}
    for value in event.summary.value:
      scalars[event.step, value.tag] = value.simple_value
  return scalars


# ------------------------------------------------------------------------------------ MetricsWriter


def test_scalars_are_in_both_files(tmp_path):
  with MetricsWriter(tmp_path / "new" / "run") as writer:
    writer.write(10, {"train/loss": 2.5, "images/s": np.float32(3)})
    writer.write(20, {"train/loss": jnp.float32(0.25)})
  assert read_lines(tmp_path / "new" / "run") == [
      {"step": 10, "train/loss": 2.5, "images/s": 3.0}, {"step": 20, "train/loss": 0.25}]
  assert shown_scalars(tmp_path / "new" / "run") == {
      (10, "train/loss"): 2.5, (10, "images/s"): 3.0, (20, "train/loss"): 0.25}
  assert read_events(tmp_path / "new" / "run")[0].file_version == "brain.Event:2"


def test_values_that_are_not_finite_are_still_json(tmp_path, capfd):
  with MetricsWriter(tmp_path) as writer:
    writer.write(1, {"nan": float("nan"), "inf": jnp.inf, "loss": 1.0})
  assert read_lines(tmp_path) == [{"step": 1, "nan": None, "inf": None, "loss": 1.0}]
  shown = shown_scalars(tmp_path)
  assert np.isnan(shown[1, "nan"])
  assert shown[1, "inf"] == np.inf
  assert capfd.readouterr() == ("", "")


def test_an_image_is_in_tensorboard(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
  with MetricsWriter(tmp_path) as writer:
    writer.write_image(3, "adversarial", image)
  (event,) = [event for event in read_events(tmp_path) if event.summary.value]
  (value,) = event.summary.value
  assert (event.step, value.tag) == (3, "adversarial")
  decoded = Image.open(io.BytesIO(value.image.encoded_image_string))
  np.testing.assert_array_equal(np.asarray(decoded), image)


@pytest.mark.parametrize(("start_step", "kept"), [
    (0, []), (1, [0]), (15, [0, 10]), (20, [0, 10, 20]), (99, [0, 10, 20, 30])])
def test_resuming_drops_what_will_be_done_again(tmp_path, start_step, kept):
  with MetricsWriter(tmp_path) as writer:
    for step in (0, 10, 20, 30):
      writer.write(step, {"loss": step})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 5, "loss')   # killed while it wrote
  with MetricsWriter(tmp_path, start_step) as writer:
    writer.write(100, {"loss": 0.5})
  assert [line["step"] for line in read_lines(tmp_path)] == [*kept, 100]
  assert sorted(step for step, _ in shown_scalars(tmp_path)) == [*kept, 100]
  aside = [] if start_step else ["metrics.before.jsonl"]    # a run from scratch loses no old one
  assert sorted(path.name for path in tmp_path.iterdir()) == [*aside, "metrics.jsonl",
                                                              "tensorboard"]


def test_starting_again_twice_loses_no_lines(tmp_path):
  for step in (1, 2, 3):
    with MetricsWriter(tmp_path) as writer:
      writer.write(step, {"loss": 1})
  found = {path.name: json.loads(path.read_text())["step"] for path in tmp_path.glob("*.jsonl")}
  assert found == {"metrics.before.jsonl": 1, "metrics.before1.jsonl": 2, "metrics.jsonl": 3}


def test_a_whole_last_line_without_its_newline_is_not_trusted(tmp_path):
  """12 may be the beginning of 123."""
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 12}')
  MetricsWriter(tmp_path, start_step=2).close()
  assert [line["step"] for line in read_lines(tmp_path)] == [1]


def test_nothing_is_lost_when_the_process_is_killed(tmp_path):
  """Fails with tensorboardX's SummaryWriter, whose thread still holds events after a flush."""
  code = f"""
import os, signal
from advprop_jax.runtime.metrics import MetricsWriter
writer = MetricsWriter({str(tmp_path)!r})
for step in range(1, 31):
  writer.write(step, {{"loss": step / 2, "accuracy": step / 4}})
os.kill(os.getpid(), signal.SIGKILL)
"""
  process = subprocess.run([sys.executable, "-c", code], check=False,
                           env=os.environ | {"PYTHONPATH": str(ROOT)})
  assert process.returncode == -signal.SIGKILL
  assert read_lines(tmp_path) == [{"step": step, "loss": step / 2, "accuracy": step / 4}
                                  for step in range(1, 31)]
  assert len(shown_scalars(tmp_path)) == 60


def test_two_writers_within_a_second_do_not_share_a_file(tmp_path):
  for step in (1, 2, 3):
    with MetricsWriter(tmp_path, start_step=step - 1) as writer:
      writer.write(step, {"loss": step})
  assert shown_scalars(tmp_path) == {(1, "loss"): 1, (2, "loss"): 2, (3, "loss"): 3}


def test_a_workdir_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match=r"file/run cannot be written \(Not a directory\)") as raised:
    MetricsWriter(tmp_path / "file" / "run")
  assert raised.value.code == 2          # at 75, who starts jobs would try for ever


# ----------------------------------------------------------------------------------------- Progress


class Clock:
  """Time that passes only when told to."""

  def __init__(self):
    self.now = 100.0

  def __call__(self) -> float:
    return self.now


def test_speed_leaves_out_the_first_step_and_pauses():
  clock = Clock()
  progress = Progress(100, start_step=10, images_per_step=32, stream=io.StringIO(), clock=clock)
  assert progress.images_per_second() is None
  with progress.paused():
    clock.now += 7
  clock.now += 60   # compiling
  progress.update(11, loss=1.0)
  assert progress.images_per_second() is None
  for step in range(12, 22):
    clock.now += 0.5
    progress.update(step, loss=1.0)
  assert progress.images_per_second() == pytest.approx(64)
  with progress.paused():
    clock.now += 1000
  assert progress.images_per_second() == pytest.approx(64)
  clock.now += 5
  assert progress.images_per_second() == pytest.approx(64)   # it stays after the last update
  progress.update(31, loss=1.0)
  assert progress.images_per_second() == pytest.approx(64)


def test_plain_lines_now_and_then_and_at_the_end():
  clock, stream = Clock(), io.StringIO()
  with Progress(1000, images_per_step=8, stream=stream, clock=clock) as progress:
    for step in range(1, 1001):
      clock.now += 0.03
      progress.update(step, loss=2 / step, accuracy=0.5)
    progress.note("done")
  assert stream.getvalue().splitlines() == [
      "step 1/1000: loss 2, accuracy 0.5",
      "step 335/1000: loss 0.00597, accuracy 0.5, 266.7 images/s, 0:00:20 left",
      "step 669/1000: loss 0.00299, accuracy 0.5, 266.7 images/s, 0:00:10 left",
      "step 1000/1000: loss 0.002, accuracy 0.5, 266.7 images/s, 0:00:00 left",
      "done"]


def test_time_left_counts_the_steps_of_this_run_only():
  clock, stream = Clock(), io.StringIO()
  progress = Progress(40_000, start_step=30_000, images_per_step=1, stream=stream, clock=clock)
  progress.update(30_001)
  clock.now += 999
  progress.update(31_000)
  assert stream.getvalue().splitlines() == [
      "step 30001/40000", "step 31000/40000: 1 images/s, 2:30:00 left"]


def test_a_terminal_gets_a_bar():
  master, slave = pty.openpty()
  fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
  with (os.fdopen(slave, "w") as stream,
        Progress(20, start_step=5, images_per_step=16, stream=stream) as progress):
    for step in range(6, 21):
      time.sleep(0.01)
      progress.update(step, loss=0.5)
    progress.note("a line")
  output = b""
  with contextlib.suppress(OSError):   # Linux says EIO at the end
    while chunk := os.read(master, 4096):
      output += chunk
  os.close(master)
  output = output.decode()
  frames = [frame for frame in output.replace("\n", "\r").split("\r") if "|" in frame]
  assert "5/20" in frames[0]
  assert "100%" in frames[-1]
  assert "20/20, loss 0.5, " in frames[-1]
  assert "images/s, 0:00:00 left" in frames[-1]
  assert max(map(len, frames)) <= 100
  assert "\ra line" in output
  assert "step" not in output


# ----------------------------------------------------------------------------------- table and JSON


def test_table():
  rows = [["clean", 0.8512, 2000], ["adversarial, main BN", None, 12], ["speed", 12345.678, None]]
  assert table(rows, ["test", "value", "images"]).splitlines() == [
      "test                   value  images",
      "--------------------  ------  ------",
      "clean                 0.8512    2000",
      "adversarial, main BN       -      12",
      "speed                  12346       -"]
  assert table([], ["a", "bc"]).splitlines() == ["a  bc", "-  --"]
  assert table([[np.float32(0.5), "x"]], ["n", "text"]).splitlines() == [
      "  n  text", "---  ----", "0.5  x"]
  with pytest.raises(ValueError, match=r"shorter|longer"):
    table([["a"]], ["a", "b"])


def test_write_json(tmp_path):
  path = tmp_path / "summary.json"
  write_json(path, {"old": 1})
  write_json(path, {"top1": np.float32(0.5), "loss": float("nan"), "steps": (1, jnp.int32(2)),
                    "nested": {"array": np.arange(3), 4: None, "yes": True, "text": "ä"}})
  assert json.loads(path.read_text()) == {
      "top1": 0.5, "loss": None, "steps": [1, 2],
      "nested": {"array": [0, 1, 2], "4": None, "yes": True, "text": "ä"}}
  assert path.read_text().endswith("}\n")
  with pytest.raises(TypeError):
    write_json(path, {"function": print})
  assert json.loads(path.read_text())["top1"] == 0.5   # the old file is there, and whole
  assert [each.name for each in tmp_path.iterdir()] == ["summary.json"]
  with pytest.raises(InputError, match=r"nowhere/a.json cannot be written \(No such file"):
    write_json(tmp_path / "nowhere" / "a.json", {})


def test_a_reader_never_sees_half_a_json_file(tmp_path):
  """Who has opened the old file reads it to its end; fails when the file is written in place."""
  path = tmp_path / "config.json"
  write_json(path, {"values": [1] * 50_000})
  with path.open() as reader:
    beginning = reader.read(100)
    write_json(path, {"values": [2]})
    assert json.loads(beginning + reader.read()) == {"values": [1] * 50_000}
  assert json.loads(path.read_text()) == {"values": [2]}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said_in_one_sentence(tmp_path):
  """Fails where closing the file, on the way out, raises what hides it."""
  def write():
    with MetricsWriter(tmp_path) as writer:
      writer._lines.close()
      writer._lines = open("/dev/full", "a", encoding="utf-8")   # noqa: SIM115  close() is its end
      writer.write(2, {"loss": 1.0})

  with pytest.raises(FaultError, match=r"cannot be written \(No space left"):
    write()


def test_a_full_disk_leaves_the_old_json_file_and_no_other(tmp_path, monkeypatch):
  path = tmp_path / "config.json"
  write_json(path, {"old": 1})

  def full(_):
    raise OSError(errno.ENOSPC, "No space left on device")
  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(FaultError, match=r"config.json cannot be written \(No space left"):
    write_json(path, {"new": 2})
  assert json.loads(path.read_text()) == {"old": 1}
  assert [each.name for each in tmp_path.iterdir()] == ["config.json"]
