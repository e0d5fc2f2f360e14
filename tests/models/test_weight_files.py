"""Files of weights, broken in every way, and the Hugging Face hub: its real library, a server here.

The library reads its settings from the environment when it is imported, so each look at the hub
here imports it anew, with a cache of the test's own.
"""

import hashlib
import http.server
import json
import os
import pathlib
import re
import struct
import sys
import threading
import time

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from advprop_jax.errors import InputError
from advprop_jax.models import create_model, weights
from advprop_jax.models.weight_files import find, read_tensors
from tests.models.test_torch_file import FORMATS, file_of, tensor

TENSORS = {"a": np.arange(6, dtype="f4").reshape(2, 3), "b": np.zeros((0, 3), "f4"),
           "c": np.array(7, "f4")}
SAFE = save(TENSORS)
HEADER = struct.unpack("<Q", SAFE[:8])[0]
TORCH = {kind: file_of({name: tensor(array, name) for name, array in TENSORS.items()}, kind)
         for kind in FORMATS}
DESCRIPTION = {"architecture": "tf_efficientnet_b0", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)
  return path


def assert_equal(found, expected):
  assert sorted(found) == sorted(expected)
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, strict=True)


def refusal(function, source, named=None):
  """The one sentence of the refusal, which says once which setting and which value are meant."""
  with pytest.raises(InputError) as error:
    function(source)
  message = str(error.value)
  assert len(message.splitlines()) == 1
  assert message.count("config.model.pretrained") == 1
  assert message.startswith(f"config.model.pretrained={str(source)!r}: "
                            if named is None else "config.model.pretrained: ")
  assert str(named or source) in message
  assert ";" in message, "it says what would do"
  return message


# ---- one file

@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int64"])
def test_safetensors_of_every_type(tmp_path, dtype):
  dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
  expected = {name: np.asarray(array * 0.3, dtype) for name, array in TENSORS.items()}
  path = write(tmp_path / "x.safetensors", save(expected))
  assert find(str(path)).description == {}
  assert find(str(path)).name == "x.safetensors"
  assert_equal(read_tensors(find(str(path)).tensors), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_become_a_network(tmp_path, dtype):
  name = "resnet_tiny"
  shapes = jax.eval_shape(create_model(name, 3).init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
  values = np.random.default_rng(0)
  halves = jax.tree.map(lambda leaf: values.normal(size=leaf.shape).astype(
      getattr(ml_dtypes, dtype, dtype)).astype("f4"), dict(shapes))
  published = {key: array.astype(getattr(ml_dtypes, dtype, dtype))
               for key, array in weights.to_timm(name, halves).items()}
  path = write(tmp_path / "x.safetensors", save(published))
  found = weights.from_state_dict(name, read_tensors(path))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), found, halves)


def test_safetensors_cut_anywhere(tmp_path):
  path = tmp_path / "x.safetensors"
  for length in range(len(SAFE)):
    write(path, SAFE[:length])
    refusal(read_tensors, path)
  write(path, SAFE + b"\0")
  refusal(read_tensors, path)


def test_safetensors_with_any_byte_wrong(tmp_path):
  """Either it can be read, or it is refused: nothing else happens."""
  path, values, refused = tmp_path / "x.safetensors", np.random.default_rng(0), 0
  for _ in range(1000):
    content = bytearray(SAFE)
    for place in values.integers(0, 8 + HEADER, values.integers(1, 4)):
      content[place] = values.integers(256)
    write(path, content)
    try:
      read_tensors(path)
    except InputError:
      refused += 1
      refusal(read_tensors, path)
  assert refused > 500


def safe(header):
  return struct.pack("<Q", len(header)) + header


ONE = b'{"a":{"dtype":"F32","shape":%s,"data_offsets":[0,4]}}'
OTHER_FILES = {
    "empty": (b"", "no safetensors file, and it is empty"),
    "garbage": (bytes(range(256)) * 4, "no safetensors file"),
    "short": (b"weights", "no safetensors file"),
    "web_page": (b"<!DOCTYPE html><html></html>", "a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "no_json": (safe(b"{" * 99), "no whole safetensors"),
    "deep_json": (safe(b'{"a":' * 100_000), "no whole safetensors"),
    "other_json": (safe(b'{"a":1}'), "no whole safetensors"),
    "no_data": (safe(ONE % b"[1]"), "no whole safetensors"),
    "negative": (safe(ONE % b"[-1]") + b"1234", "no whole safetensors"),
    "too_large": (safe(ONE % b"[18446744073709551615,2]") + b"1234", "no whole safetensors"),
    "axes": (safe(ONE % json.dumps([1] * 65).encode()) + b"1234", "no whole safetensors"),
    "no_type": (safe(ONE.replace(b"F32", b"Q32") % b"[1]") + b"1234", "no whole safetensors"),
    "float8": (safe(ONE.replace(b"F32", b"F8_E4M3") % b"[4]") + b"1234", "no whole safetensors"),
    "no_tensors": (safe(b'{"__metadata__":{"a":"b"}}'), "have no tensors"),
    **{f"length_{length}": (struct.pack("<Q", length) + SAFE[8:], "no whole safetensors")
       for length in (0, 1, HEADER - 1, HEADER + 1, 10**8 + 1, 2**32, 2**63, 2**64 - 1)},
}


@pytest.mark.parametrize("name", list(OTHER_FILES))
def test_what_else_a_safetensors_file_may_be(tmp_path, name):
  content, said = OTHER_FILES[name]
  assert said in refusal(read_tensors, write(tmp_path / "x.safetensors", content))


@pytest.mark.parametrize("content", [SAFE, *TORCH.values()], ids=["safetensors", *TORCH])
@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pth", "x.pt", "x"])
def test_the_content_says_what_a_file_is(tmp_path, monkeypatch, name, content):
  path = write(tmp_path / name, content)
  assert_equal(read_tensors(find(str(path)).tensors), TENSORS)
  monkeypatch.chdir(tmp_path)
  assert_equal(read_tensors(f"./{name}"), TENSORS)


def test_refusals_of_torch_files_name_the_file_once(tmp_path, monkeypatch):
  path = write(tmp_path / "x.pth", b"weights")
  assert "torch.save did not write it" in refusal(read_tensors, path)
  assert str(path) not in refusal(read_tensors, path).partition(": ")[2]
  monkeypatch.chdir(tmp_path)
  with pytest.raises(InputError, match=r"^config.model.pretrained='x.pth': torch.save did not"):
    read_tensors("./x.pth")


def test_what_cannot_be_read(tmp_path):
  assert "No such file" in refusal(read_tensors, tmp_path / "x.safetensors")
  assert "directory" in refusal(read_tensors, tmp_path)


# ---- a path

@pytest.mark.parametrize(("name", "content"), [("model.safetensors", SAFE),
                                               ("pytorch_model.bin", TORCH["zip"])])
def test_folder_as_the_hub_has_it(tmp_path, name, content):
  folder = tmp_path / "weights"
  write(folder / name, content)
  assert find(str(folder)).description == {}
  write(folder / "config.json", json.dumps(DESCRIPTION).encode())
  for source in (folder, folder / name):
    found = find(str(source))
    assert (found.tensors, found.name, found.description) == (folder / name, name, DESCRIPTION)
    assert_equal(read_tensors(found.tensors), TENSORS)


def test_safetensors_come_first(tmp_path):
  write(tmp_path / "pytorch_model.bin", b"")
  path = write(tmp_path / "model.safetensors", SAFE)
  assert find(str(tmp_path)).tensors == path


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_broken_description(tmp_path, content):
  write(tmp_path / "model.safetensors", SAFE)
  description = write(tmp_path / "config.json", content)
  assert "is no JSON" in refusal(find, str(tmp_path), named=description)


def test_description_of_something_else(tmp_path):
  write(tmp_path / "model.safetensors", SAFE)
  write(tmp_path / "config.json", b"[1]")
  assert find(str(tmp_path)).description == {}


def test_paths_without_weights(tmp_path):
  assert "model.safetensors or pytorch_model.bin" in refusal(find, str(tmp_path))
  for source in (str(tmp_path / "nothing"), str(tmp_path / "nothing.safetensors"), "./nothing",
                 "../nothing/at.all", "owner/nothing.pth", "nothing", "a\0b",
                 "https://huggingface.co/owner/name"):
    with pytest.raises(InputError, match="there is no such file, and it is no id") as error:
      find(source)
    assert f"config.model.pretrained={source!r}: " in str(error.value)
  assert "cannot be looked for (File name too long)" in refusal(find, "x" * 5000)


def test_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  path = write(tmp_path / "weights" / "model.safetensors", SAFE)
  assert find("~/weights").tensors == find("~/weights/model.safetensors").tensors == path
  assert "no such file" in refusal(find, "~/nothing.safetensors")
  assert "home directory" in refusal(find, "~nobody_of_that_name/weights")


# ---- the hub

REPOSITORY = "timm/tf_efficientnet_b0.ap_in1k"
OTHER = {"a": np.ones(3, "f4")}
REPOSITORIES = {
    REPOSITORY: {
        "main": {"model.safetensors": SAFE, "config.json": json.dumps(DESCRIPTION).encode()},
        "v1": {"model.safetensors": save(OTHER), "config.json": b'{"architecture": "other"}'}},
    "owner/torch": {"main": {"pytorch_model.bin": TORCH["legacy"]}},
    "owner/zip": {"main": {"pytorch_model.bin": TORCH["zip"], "config.json": b"{}"}},
    "owner/empty": {"main": {"README.md": b"# Nothing"}},
    "owner/broken": {"main": {"model.safetensors": SAFE[:-1], "config.json": b"{"}},
    "owner/short": {"main": {"model.safetensors": SAFE}},
}


class Handler(http.server.BaseHTTPRequestHandler):
  """The part of the hub that downloads need; weights come from another host, as they do there."""

  def log_message(self, *_):
    pass

  def answer(self, status, content=b"", **headers):
    self.send_response(status)
    for name, value in {"Content-Length": len(content), **headers}.items():
      self.send_header(name.replace("_", "-"), str(value))
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(content)

  def do_GET(self):
    place = re.fullmatch(r"/(.+/.+)/(resolve|content)/([^/]+)/([^/]+)", self.path)
    if not place:
      self.answer(404)
      return
    repository, what, revision, name = place.groups()
    if (self.command, what) != ("GET", "resolve"):   # which redirects
      self.server.asked.append((self.command, name))
    revisions = REPOSITORIES.get(repository, {})
    files = revisions.get(revision, {})
    commit = hashlib.sha1(f"{repository} {revision}".encode()).hexdigest()
    etag = hashlib.sha256(files.get(name, b"")).hexdigest()
    if self.server.status:
      self.answer(self.server.status)
    elif not revisions:   # as the hub does: it does not tell what is not there from what is private
      self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
    elif not files:
      self.answer(404, X_Error_Code="RevisionNotFound")
    elif name not in files:
      self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
    elif what == "resolve" and name != "config.json":
      more = 1 if repository == "owner/short" else 0
      self.answer(302, X_Repo_Commit=commit, X_Linked_Etag=f'"{etag}"',
                  X_Linked_Size=len(files[name]) + more, Location=(
                      f"http://localhost:{self.server.server_port}"
                      f"{self.path.replace('resolve', 'content')}"))
    else:
      if name == "config.json" and self.command == "GET":
        self.server.asked.append((self.command, name))
      self.answer(200, files[name], X_Repo_Commit=commit, ETag=f'"{etag}"')

  do_HEAD = do_GET


class Hub(http.server.ThreadingHTTPServer):
  """A hub on this machine, and a look at it as this program does it."""

  def __init__(self, monkeypatch, cache):
    super().__init__(("127.0.0.1", 0), Handler)
    self.asked, self.status = [], None
    self.url, self.cache = f"http://127.0.0.1:{self.server_port}", cache
    self._monkeypatch = monkeypatch
    threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

  def find(self, source, **environment):
    for name, value in environment.items():
      self._monkeypatch.setenv(name, value)
    forget_library()
    return find(source)

  def refusal(self, source, **environment):
    return refusal(lambda name: self.find(name, **environment), source)

  def fetched(self):
    found = [name for method, name in self.asked if method == "GET"]
    self.asked.clear()
    return found

  def close(self):
    self.shutdown()
    self.server_close()


def forget_library():
  return {name: sys.modules.pop(name) for name in list(sys.modules)
          if name.partition(".")[0] == "huggingface_hub"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
  for name in list(os.environ):
    if name.upper().startswith(("HF_", "HUGGING", "TRANSFORMERS_")) or "PROXY" in name.upper():
      monkeypatch.delenv(name)
  hub = Hub(monkeypatch, tmp_path / "home" / "hub")
  for name, value in {"HF_HOME": tmp_path / "home", "HF_ENDPOINT": hub.url, "NO_PROXY": "*",
                      "HF_HUB_DISABLE_PROGRESS_BARS": 1, "HF_HUB_DISABLE_TELEMETRY": 1,
                      "HF_HUB_ETAG_TIMEOUT": 2, "HF_HUB_DOWNLOAD_TIMEOUT": 2}.items():
    monkeypatch.setenv(name, str(value))
  monkeypatch.chdir(tmp_path)
  before = forget_library()
  yield hub
  hub.close()
  forget_library()
  sys.modules.update(before)


@pytest.fixture
def waited(monkeypatch):
  """The seconds that the library meant to wait between attempts; it does not wait here."""
  seconds = []
  monkeypatch.setattr(time, "sleep", seconds.append)
  return seconds


def test_hub(hub):
  found = hub.find(REPOSITORY)
  assert (found.name, found.description) == (REPOSITORY, DESCRIPTION)
  assert found.tensors.read_bytes() == SAFE
  assert found.tensors.is_relative_to(hub.cache)
  assert_equal(read_tensors(found.tensors), TENSORS)
  assert hub.fetched() == ["model.safetensors", "config.json"]
  for source in (REPOSITORY, f"hf-hub:{REPOSITORY}", f"hf_hub:{REPOSITORY}", f"{REPOSITORY}@main"):
    assert hub.find(source) == found
    assert hub.asked, "whether there is something newer"
    assert hub.fetched() == []


def test_revision_of_the_hub(hub):
  main = hub.find(REPOSITORY)
  for source in (f"{REPOSITORY}@v1", f"hf-hub:{REPOSITORY}@v1"):
    found = hub.find(source)
    assert_equal(read_tensors(found.tensors), OTHER)
    assert found.description == {"architecture": "other"}
    assert found.name == REPOSITORY
  hub.close()
  assert hub.find(f"{REPOSITORY}@v1") == found
  assert hub.find(REPOSITORY) == main


@pytest.mark.parametrize("repository", [REPOSITORY, "owner/torch", "owner/zip"])
@pytest.mark.parametrize("cut_off", ["closed", "offline", "error"])
def test_cache_alone(hub, waited, repository, cut_off):
  """Faults: that a repository has no config.json, or no model.safetensors, is forgotten."""
  found = hub.find(repository)
  assert_equal(read_tensors(found.tensors), TENSORS)
  assert found.description == (DESCRIPTION if repository == REPOSITORY else {})
  hub.asked.clear()
  if cut_off == "closed":
    hub.close()
  hub.status = 503 if cut_off == "error" else None
  assert hub.find(repository, **({"HF_HUB_OFFLINE": "1"} if cut_off == "offline" else {})) == found
  assert hub.fetched() == []
  if cut_off != "error":
    assert not waited


def test_what_the_hub_has_not(hub, waited):
  assert "holds neither model.safetensors nor pytorch_model.bin" in hub.refusal("owner/empty")
  for source in ("owner/nothing", f"{REPOSITORY}@v2", "owner/double--dash"):
    message = hub.refusal(source)
    assert f"there is no such path, and the hub {hub.url} has no such repository" in message
    assert "hf auth login" in message
  assert not waited


def test_broken_files_of_the_hub(hub):
  with pytest.raises(InputError, match=r"^config.model.pretrained: '.*config.json'.* is no JSON"):
    hub.find("owner/broken")
  path = next(hub.cache.glob("models--owner--broken/snapshots/*/model.safetensors"))
  assert "no whole safetensors file" in refusal(read_tensors, path)
  assert "Consistency check failed" in hub.refusal("owner/short")


def assert_says_what_to_do(hub, message, name="model.safetensors", repository=REPOSITORY):
  assert f"{name} of {repository} is not in the hub's cache ({hub.cache})" in message
  assert f"{hub.url} was tried" in message
  assert "a local path works too" in message


def test_no_network(hub, waited):
  hub.close()
  message = hub.refusal(REPOSITORY)
  assert_says_what_to_do(hub, message)
  assert "Connection refused" in message
  assert not waited
  assert not pathlib.Path(hub.cache).exists()


def test_offline(hub, waited):
  message = hub.refusal(REPOSITORY, HF_HUB_OFFLINE="1")
  assert_says_what_to_do(hub, message)
  assert "HF_HUB_OFFLINE" in message
  assert not hub.asked
  assert not waited


def test_network_lost_after_the_weights(hub, waited):
  """Without the description they might be read wrongly: that is no repository without one."""
  hub.find(REPOSITORY)
  for path in hub.cache.glob("models--timm*/snapshots/*/config.json"):
    path.unlink()
  hub.close()
  assert_says_what_to_do(hub, hub.refusal(REPOSITORY), "config.json")
  assert not waited


def test_hub_in_trouble(hub, waited):
  """It answers: then the library's patience is right."""
  hub.status = 503
  message = hub.refusal(REPOSITORY)
  assert_says_what_to_do(hub, message)
  assert "503" in message
