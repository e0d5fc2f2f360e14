"""Weights from the Hugging Face hub: its real library, a server here.

The library reads its settings from the environment when it is imported, so each look at the hub
here imports it anew, with a cache of the test's own.
"""

import hashlib
import http.server
import json
import os
import pathlib
import re
import sys
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import save

from advprop_jax.errors import InputError
from advprop_jax.models.weight_files import find, read_tensors
from tests.weight_samples import (
  DESCRIPTION,
  SAFE,
  TENSORS,
  TORCH,
  assert_equal,
  refusal,
)

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
