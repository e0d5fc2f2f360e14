"""Compiled programs that outlive the process: a second start does not compile again.

JAX's own cache finds a program by what tracing gives, and to trace a train step takes longer than
to load it. `Program` looks twice, as ccache does for C: first by all that a trace is made
from, which is what its caller names, the settings of JAX and XLA, and every file of code that was
loaded when the program was made; and if that is not found, by what tracing gives.
"""

import contextlib
import functools
import gc
import hashlib
import json
import math
import os
import pathlib
import pickle
import platform
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from importlib import metadata
from typing import Any

import jax
from jax._src.config import persistent_cache_min_compile_time_secs  # of one thread: not public
from jax.experimental import serialize_executable

from advprop_jax.errors import InputError
from advprop_jax.runtime import agreement, parallel
from advprop_jax.runtime.memory import give_back
from advprop_jax.runtime.metrics import write_bytes

MAX_BYTES = 2**30                      # of JAX's cache, and of ours; what was used longest ago goes
MIN_SECONDS = 0.5                      # of compiling; shorter ones are not worth a file
_SETTLED = 10.0                        # seconds that code is old when this module is loaded
_FORMAT = 3            # of files; to be raised where a function's compiler options change, too
_SETTINGS = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_", "TF_", "FLAX_")   # of the environment
_FOUND = "/jax/compilation_cache/cache_hits"
_START = time.time()
_folders: list[pathlib.Path] = []      # of kept programs; none before `keep_compiled`
_compiling: list[futures.Future] = []  # what threads are at
_heard = threading.local()             # .found: whether JAX's cache had what this thread compiled


def _hear(event: str, **_) -> None:
  if event == _FOUND:
    _heard.found = True


jax.monitoring.register_event_listener(_hear)


def keep_compiled() -> pathlib.Path | None:
  """Lets JAX, and `Program`, keep compiled programs in the user's cache folder.

  JAX' own settings win: JAX_COMPILATION_CACHE_DIR for another folder, of JAX's cache alone,
  JAX_ENABLE_COMPILATION_CACHE=false for none, JAX_COMPILATION_CACHE_MAX_SIZE in bytes. Call it
  before anything is compiled, and only where what runs is this package as it is in its files.

  Returns:
    JAX's folder; None where there is none, or one of the user's own.
  """
  if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
    return None
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  folder, ours = (pathlib.Path(home, "advprop_jax", f"{name}-{_processor()}")
                  for name in ("compiled", "programs"))
  try:
    folder.mkdir(parents=True, exist_ok=True)
    ours.mkdir(exist_ok=True)
  except OSError:                      # a home that cannot be written: compile each time
    return None
  if not (os.access(folder, os.W_OK) and os.access(ours, os.W_OK)):
    return None
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
  if jax.config.jax_compilation_cache_max_size < 0:
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
  _folders[:] = [ours]
  return folder


class Program:
  """A function of arguments of the same shapes, compiled once, and kept for the next start.

  It is compiled on another thread, from `start` or else the first call on. It is kept where
  `keep_compiled` says so; in a pod JAX compiles and keeps it.
  """

  def __init__(self, function: Callable, name: str, made_of: dict[str, Any] | None = None):
    """Compiles nothing yet.

    Args:
      function: of `jax.jit` or `jax.pmap`; called with arguments of the same shapes each time.
      name: of its files; functions of one name are compiled with the same options (see _FORMAT).
      made_of: what JSON knows; all that the function is made of besides code. None where that is
        not known: each start traces it then, and finds it by what that gives.
    """
    self._function, self._name, self._made_of = function, name, made_of
    self._program: futures.Future | None = None
    self._gives: Any = None

  def __call__(self, *args):
    if not agreement.alone():
      return self._function(*args)
    if self._program is None:
      self.start(*args)
    return self._program.result()(*args)

  def start(self, *args) -> Any:
    """Finds it, or traces it now and compiles it on another thread. Not for processes of a pod.

    Where it was started before, nothing is done.

    Args:
      args: as a call has them, or `jax.ShapeDtypeStruct`s with the same shardings.

    Returns:
      The shapes of what a call gives.
    """
    if self._program is None:
      self._program, self._gives = self._begun(args)
    return self._gives

  def _begun(self, args: tuple) -> tuple[futures.Future, Any]:
    """What will be the program, and the shapes of what it gives."""
    if not _folders:
      lowered = self._traced(args)
      return _beside(lambda give: give(lowered.compile())), lowered.out_info
    settings, shapes, sources = _settings(), _shapes(args), None
    if self._made_of is not None:
      sources = self._file("json", [settings, self._made_of, shapes, _packages()])
      found = _read(_named_by(sources))
      if found is not None:
        program = futures.Future()
        program.set_result(found)
        return program, found.out_info
    lowered = self._traced(args)
    file = self._file("program", [settings, shapes, lowered.as_text()])
    return _beside(lambda give: _keep(lowered, file, sources, give)), lowered.out_info

  def _traced(self, args: tuple) -> Any:
    """As `jax.jit` lowers it. Python does not look for garbage meanwhile: a fifth of the time."""
    looks = gc.isenabled()
    gc.disable()
    try:
      return self._function.lower(*args)
    finally:
      if looks:
        gc.enable()

  def _file(self, kind: str, facts: Any) -> pathlib.Path:
    return _folders[0] / f"{self._name}-{_hash(facts)}.{kind}"


def _beside(work: Callable[[Callable[[Any], None]], None]) -> futures.Future:
  """What the work, which a thread of its own does, gives to the function that it is called with.

  It may go on after that, and Python waits for it before it ends.
  """
  given = futures.Future()

  def run():
    try:
      work(given.set_result)
    except BaseException as error:
      if given.done():                 # nobody would ask again: Python prints it
        raise
      given.set_exception(error)

  threading.Thread(target=run, name="compiles").start()
  _compiling.append(given)
  given.add_done_callback(_compiling.remove)
  return given


def is_compiling() -> bool:
  """Whether a thread compiles. Python would wait for it before it ends, and dies where it is told
  not to: `os._exit` is the way out. (For one that writes a program, a second, it may wait.)
  """
  return any(not future.done() for future in list(_compiling))


def _keep(lowered: Any, file: pathlib.Path, sources: pathlib.Path | None,
          give: Callable[[Callable], None]) -> None:
  """Gives the program of what was traced, and then writes what is missing of its files.

  A program may run while it is written, which takes a second.
  """
  program, is_new = _read(file), False
  if program is None:
    program, is_new = _compiled(lowered)
  give(program)
  if is_new:
    _write_program(file, program)
  code = _code() if sources else {}
  if code and _is_in_files(code):
    _write(sources, json.dumps({"code": code, "program": file.name}).encode())
  _forget_oldest(file.parent)


def _named_by(sources: pathlib.Path) -> pathlib.Path | None:
  """The file of the program that was made of the code that this process runs; None if unknown."""
  try:
    known = json.loads(sources.read_bytes())
    loaded = _code()
    same = _is_in_files(loaded) and _is_loaded(known["code"], loaded)
    os.utime(sources)                  # used last
    return sources.with_name(known["program"]) if same else None
  except (OSError, ValueError, LookupError, TypeError):   # not there, or of another form
    return None


def _read(file: pathlib.Path | None) -> Callable | None:
  """The program in a file; None where there is nothing whole."""
  if file is None or not file.exists():
    return None
  try:
    devices, parts = pickle.loads(file.read_bytes())
    here = {device.id: device for device in jax.local_devices()}
    program = serialize_executable.deserialize_and_load(
        *parts, execution_devices=[here[number] for number in devices])   # not of all, by default
    os.utime(file)                     # used last
  except Exception:                    # of whatever type: what cannot be loaded is compiled
    return None
  give_back()
  return program


def _compiled(lowered: Any) -> tuple[Callable, bool]:
  """The program, and whether it is a new one: not one that JAX had kept.

  JAX must not keep it too: a program for the CPU that it has loaded is not whole when it is
  written.
  """
  _heard.found = False
  with persistent_cache_min_compile_time_secs(math.inf):   # on this thread alone
    return lowered.compile(), not _heard.found


def _write_program(file: pathlib.Path, program: Any) -> None:
  """Writes a program; nothing where that cannot be."""
  try:
    devices = [device.id for device in program.runtime_executable().local_devices()]
    content = pickle.dumps((devices, serialize_executable.serialize(program)))
  except Exception:                    # of whatever type: some programs cannot be written
    return
  _write(file, content)


def _write(file: pathlib.Path, content: bytes) -> None:
  """Writes a file in one piece; nothing where that cannot be, as on a full disk."""
  with contextlib.suppress(InputError):
    write_bytes(file, content)


def _forget_oldest(folder: pathlib.Path) -> None:
  """Removes the files that were used longest ago, until the others are MAX_BYTES at most."""
  total = 0
  with contextlib.suppress(OSError):   # another start may do the same
    for file in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True):
      total += file.stat().st_size
      if total > MAX_BYTES:
        file.unlink(missing_ok=True)


def _settings() -> dict[str, Any]:
  """All that decides on a program besides code and arguments."""
  devices = [[device.id, device.platform, device.device_kind] for device in jax.devices()]
  return {
      "format": _FORMAT, "devices": devices, "backend": jax.devices()[0].client.platform_version,
      "cores": parallel.local_cores(), "python": [sys.version, sys.flags],
      "packages": sorted(f"{one.name} {one.version}" for one in metadata.distributions()),
      "jax": {setting: repr(value) for setting, value in jax.config.values.items()},
      "environment": {variable: value for variable, value in os.environ.items()
                      if variable.startswith(_SETTINGS)}}


def _shapes(args: tuple) -> list:
  """What a trace sees of arguments: their structure, and shapes, types and places of arrays."""
  leaves, structure = jax.tree.flatten(args)
  return [str(structure),
          [[str(jax.typeof(leaf)), repr(getattr(leaf, "sharding", None))] for leaf in leaves]]


def _hash(facts: Any) -> str:
  return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _code() -> dict[str, list[str]]:
  """{module: its file, and what is in it}, of all that are loaded."""
  files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
  return {name: [file, _fingerprint(file)] for name, file in files.items() if file}


@functools.cache                       # what changes after it was read is not `_is_in_files`
def _fingerprint(file: str) -> str:
  """Of a source file its bytes, of a library its size and when it changed; "" where it is gone."""
  try:
    if not file.endswith(".py"):
      status = os.stat(file)
      return f"{status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()
  except OSError:
    return ""


def _is_in_files(code: dict[str, list[str]]) -> bool:
  """Whether what is loaded is sure to be what is in the files now: none changed since."""
  return all(_changed(file) < _START - _SETTLED for file, _ in code.values())


def _is_loaded(code: dict[str, list[str]], loaded: dict[str, list[str]]) -> bool:
  """Whether what this process has loaded, or would load, is that code."""
  return all(loaded.get(name, [file, _fingerprint(file)]) == [file, known]
             for name, (file, known) in code.items())


def _packages() -> list[str]:
  """Those that are loaded, without Python's own: any of them might change what others do."""
  return sorted({name.partition(".")[0] for name in list(sys.modules)} - sys.stdlib_module_names)


def _changed(file: str) -> float:
  """When the file got what it holds, or its place, in seconds; infinite where it is gone."""
  return os.stat(file).st_ctime if os.path.exists(file) else math.inf


def _processor() -> str:
  """Tells processors apart: programs for the CPU use what the one that they were made on has."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    features = next(line for line in lines if line.startswith(("flags", "Features")))
  except (OSError, StopIteration):
    features = platform.processor()
  return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]
