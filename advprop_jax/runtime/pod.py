"""A pod: how its processes find each other, and how each of them ends.

JAX finds the processes of TPU slices, GKE, Slurm and Open MPI by itself; elsewhere flags name them.
A pod is lost as a whole when one of its processes is: the others notice at once where a connection
breaks (on the CPU), and else within --heartbeat_timeout, by JAX's heartbeats, on which its C++
aborts them. So that a sentence is the last that a person reads then, each process of a pod keeps
a small second process, which says it when the first is gone. One that fails by itself tells the
others before it goes, and they end before JAX would abort them.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from importlib import metadata
from typing import NoReturn

import jax
import ml_collections
from absl import flags

from advprop_jax.errors import FaultError, InputError
from advprop_jax.runtime import agreement
from advprop_jax.runtime.config import flatten
from advprop_jax.runtime.faults import Preempted, leave
from advprop_jax.runtime.workdir import SPEED

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where JAX does not find the processes by itself "
    "(it does on TPU slices, GKE, Slurm, Open MPI).")
_PROCESSES = flags.DEFINE_integer(
    "processes", None, "How many processes there are, with --coordinator; 1 alone: this one, "
    "whatever JAX finds.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0, with --coordinator.", lower_bound=0)
_START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout", 300, "Seconds in which all processes must have come.", lower_bound=1)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout", 60, "Seconds without a sign of life, after which a process is lost.",
    lower_bound=2)

MODES = ("train", "evaluate")   # that a pod can do
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy",
             "libtpu", "jax-cuda13-pjrt", "jax-cuda12-pjrt")
LOST = 3                    # exit code of a process that ends because another is gone
_LEAVING_SECONDS = 10.0     # for others to end for the same reason, or as they hear of it; where
_TOLD_SECONDS = 60.0        # all were told to, each first ends its data workers and what it writes
_FOLLOWING_SECONDS = 4.0    # for one that hears of a failure to come to its own end; process 0 is
_FIRST_FOLLOWS = 12.0       # the last to leave: JAX aborts whoever is there without it
_SHUTDOWN_SECONDS = 600     # process 0 draws pictures when the others have done
_NO_POD = "coordinator_address should be defined"   # what JAX says where it finds none
_OF_ANOTHER = re.compile(r"\bGloo\b|heartbeat|CoordinationService|Socket closed|"
                         "Connection (reset|closed)|Barrier")
_SAYS = """
import signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
line = ""
for line in sys.stdin: pass
if line.strip(): sys.stderr.write(line)
"""


class LastWords:
  """A sentence that is said on stderr when this process is gone, whatever it died of."""

  def __init__(self):
    # A session of its own, or what interrupts the process would interrupt its last words.
    self._watcher = subprocess.Popen([sys.executable, "-I", "-S", "-c", _SAYS], text=True,
                                     stdin=subprocess.PIPE, start_new_session=True)

  def be(self, sentence: str) -> None:
    """Replaces what is to be said; "" for nothing."""
    with contextlib.suppress(OSError):   # nobody is there to say it
      self._watcher.stdin.write(sentence + "\n")
      self._watcher.stdin.flush()


@contextlib.contextmanager
def joined() -> Iterator[None]:
  """Joins the pod that flags or environment name, if any, and leaves it however what is in it ends.

  Call it before JAX's first computation.

  Raises:
    InputError: the flags or the environment do not say all that is needed, or the coordinator does
      not answer; and what is raised within, once every process has raised it. Where another process
      goes on, or is gone, this one exits here.
  """
  words = join(_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value, _START_TIMEOUT.value,
               _HEARTBEAT_TIMEOUT.value)
  if words is None:
    yield
    return
  ending = threading.Event()
  threading.Thread(target=_follow, args=(words, ending), daemon=True).start()
  try:
    yield
    agreement.meet("end")
    ending.set()
  except (InputError, Preempted) as end:
    ending.set()
    if not _all_end(end):
      told = isinstance(end, Preempted)
      _exit(words, end if told else f"Error: {end}", 0 if told else end.code)
    words.be("")
    raise
  except BaseException as error:   # on its way out Python would wait for the others
    ending.set()
    # JAX makes another exception of the same failure where it starts a program than where it waits.
    if isinstance(error, RuntimeError | ValueError) and _OF_ANOTHER.search(str(error)):
      _exit(words, lost(str(error)), LOST)
    _all_end(error)
    _exit(words, traceback.format_exc(), 1)
  words.be("")


def join(coordinator: str | None, processes: int | None, process_id: int | None,
         start_timeout: int, heartbeat_timeout: int) -> LastWords | None:
  """Joins the pod; the arguments are the flags, and errors those of `joined`.

  Returns:
    This process's last words; None where there is no pod.
  """
  given = (coordinator, processes, process_id)
  if given == (None, 1, None):
    return None
  if any(value is not None for value in given):
    _check(*given)
    words = LastWords()
    words.be(f"Error: not all of {processes} processes came to --coordinator={coordinator} within "
             f"{start_timeout} s; start them all, or give a longer --start_timeout")
    _reach(words, coordinator, process_id, start_timeout)
  else:
    words = LastWords()
    words.be("Error: the processes of the pod that the environment names"
             f"{_detected(start_timeout)} did not all start within {start_timeout} s; start them "
             "all, or give --processes=1 to run alone")
  try:
    jax.distributed.initialize(
        *given, initialization_timeout=start_timeout, heartbeat_timeout_seconds=heartbeat_timeout,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS)
  except Exception as error:   # of whatever type: it depends on where JAX looks for processes
    words.be("")
    if _NO_POD in str(error):
      return None
    raise FaultError(f"JAX cannot start this process of a pod ({error}); give --coordinator, "
                     "--processes and --process_id, or --processes=1 to run alone") from error
  index, count = agreement.process()
  words.be(f"Process {index} of {count} has ended before the run did: it was killed, or another "
           f"process of the pod was lost, which takes up to {heartbeat_timeout} s to notice; start "
           "all processes again with the same command, and the run goes on from its newest "
           "checkpoint")
  return words


def _detected(timeout: int) -> str:
  """The coordinator's address as JAX finds it, for a message; "" where it finds none."""
  try:
    from jax._src import clusters  # nothing public names the address

    address, *_ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, timeout)
  except Exception:   # whatever it is, JAX will say it when it joins
    return ""
  return f" (coordinator {address})" if address else ""


def require_same_start(mode: str, config: ml_collections.ConfigDict, workdir: str) -> None:
  """Raises an InputError where the processes of a pod were not started for the same thing.

  Fields that change nothing but the speed may differ.
  """
  if agreement.alone():
    return
  if mode not in MODES:
    raise InputError(f"--mode={mode}: is for one process; start it on one machine, with "
                     "--processes=1")
  fields = {f"config.{path}": value for path, value in flatten(config).items()
            if path not in SPEED}
  versions = {name: _version(name) for name in _PACKAGES}
  agreement.require_same({
      "--mode": mode, "--workdir": workdir, **fields, "code of advprop_jax": code(), **versions,
      "python": platform.python_version(), "devices": jax.local_device_count(),
      "kind of device": jax.devices()[0].device_kind})


def _version(package: str) -> str | None:
  """None where it is not there."""
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None


def code() -> str:
  """A fingerprint of this package's source files."""
  root = pathlib.Path(__file__).parents[1]
  digest = hashlib.blake2b(digest_size=6)
  for path in sorted(root.rglob("*.py")):
    digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
  return digest.hexdigest()


def _check(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
  """Raises an InputError where the three flags do not name a process of a pod."""
  missing = [name for name, value in {"coordinator": coordinator, "processes": processes,
                                      "process_id": process_id}.items() if value is None]
  if missing:
    raise InputError(f"--{missing[0]}: not given; --coordinator, --processes and --process_id go "
                     "together")
  if process_id >= processes:
    raise InputError(f"--process_id={process_id}: there are {processes} processes; give 0 to "
                     f"{processes - 1}")
  _, _, port = coordinator.rpartition(":")
  if not re.fullmatch(r".+:\d{1,5}", coordinator) or not 0 < int(port) < 2**16:
    raise InputError(f"--coordinator={coordinator}: give HOST:PORT, such as 10.0.0.2:8476")


def _reach(words: LastWords, coordinator: str, process_id: int, seconds: int) -> None:
  """Waits until the coordinator listens, or makes sure that it can.

  JAX would abort the process where it cannot be reached.
  """
  host, _, port = coordinator.rpartition(":")
  if process_id == 0:
    try:
      with socket.create_server(("", int(port))):
        return
    except OSError as error:
      words.be("")
      raise InputError(f"--coordinator={coordinator}: process 0 cannot listen there "
                       f"({error.strerror}); give another port") from error
  deadline, why = time.monotonic() + seconds, "timed out"
  while time.monotonic() < deadline:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=min(seconds, 5)).close()
      return
    except OSError as error:
      why = error.strerror or str(error)
      time.sleep(min(0.5, max(deadline - time.monotonic(), 0)))
  words.be("")
  raise FaultError(f"--coordinator={coordinator}: it did not answer within {seconds} s ({why}); "
                   "start process 0 there, or give its address, or a longer --start_timeout")


def lost(error: str) -> str:
  """The sentence of a process that ends because another is gone."""
  index, count = agreement.process()
  reasons = "; ".join(agreement.told_ends()) or error.strip().splitlines()[0][:200]
  return (f"Process {index} of {count}: another process of the pod is gone ({reasons}); start all "
          "processes again with the same command, and the run goes on from its newest checkpoint")


def _all_end(end: BaseException) -> bool:
  """Tells the others; whether all processes end now, as they do where a config is wrong."""
  told = isinstance(end, Preempted)
  known = told or isinstance(end, InputError)
  reason = end if known else f"{type(end).__name__}: {end}"
  seconds = _TOLD_SECONDS if told else _LEAVING_SECONDS
  try:
    agreement.tell_end(f"process {agreement.process()[0]}: {reason}", failed=not told)
    agreement.store().wait_at_barrier("advprop_jax/all_end", int(seconds * 1000))
  except jax.errors.JaxRuntimeError:
    return False
  return True


def _follow(words: LastWords, ending: threading.Event) -> None:
  """Ends this process when another has told that it fails, and it does not itself.

  It may wait for the other, in a program or at a meeting: for ever, or until JAX aborts it.
  """
  seconds = _FIRST_FOLLOWS if agreement.is_first() else _FOLLOWING_SECONDS
  while not ending.wait(1.0):
    reasons = agreement.told_failures()
    if reasons and not ending.wait(seconds):
      _exit(words, lost("; ".join(reasons)), LOST)


def _exit(words: LastWords, sentence: object, code: int) -> NoReturn:
  """Ends this process at once: a shutdown would wait for processes that do not come."""
  words.be("")
  try:
    print(sentence, file=sys.stderr)
  finally:                             # also where nobody reads any more
    leave(code)
