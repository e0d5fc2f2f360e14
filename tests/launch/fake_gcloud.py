"""Stands in for gcloud in test_tpu_pod.py: one slice of two workers, each a folder.

Files in the folder $CLOUD are the state:
  calls     one line per call, a JSON list of its words
  slices    how many slices were made; the newest one is there as long as `slice` is
  slice     the state of the request, and that of the VMs
  loses     what takes the slice away, written by whoever wants that
  silent    this many calls get no answer
  refuses   what every call ends with
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

CLOUD = pathlib.Path(os.environ["CLOUD"])
WORKERS = 2


def fail(message):
  sys.exit(f"ERROR: (gcloud) {message}")


def read(name):
  file = CLOUD / name
  return file.read_text().strip() if file.exists() else ""


def home(worker):
  return CLOUD / f"slice{read('slices')}-worker{worker}"


def end(worker):
  """A machine that goes away: what runs on it is killed, without a word."""
  group = home(worker) / "advprop_jax-run" / "supervisor"
  if group.exists():
    with contextlib.suppress(ProcessLookupError):
      os.killpg(int(group.read_text().split()[0]), signal.SIGKILL)


def lose(how):
  (CLOUD / "loses").unlink()
  for worker in range(WORKERS):
    end(worker)
  if how == "GONE":
    (CLOUD / "slice").unlink()
  elif how in ("SUSPENDED", "FAILED"):
    (CLOUD / "slice").write_text(f"{how} ABSENT")
  else:
    (CLOUD / "slice").write_text(f"ACTIVE {how}")


def create():
  if read("slice"):
    fail("ALREADY_EXISTS: it is there already")
  (CLOUD / "slices").write_text(str(int(read("slices") or 0) + 1))
  for worker in range(WORKERS):
    home(worker).mkdir()
  (CLOUD / "slice").write_text("WAITING_FOR_RESOURCES ABSENT")


def describe(kind):
  request, vms = read("slice").split() or ("ABSENT", "ABSENT")
  state = request if kind == "queued-resources" else vms
  # Of a slice that was asked for, each look sees a step more.
  later = {"WAITING_FOR_RESOURCES ABSENT": "PROVISIONING CREATING",
           "PROVISIONING CREATING": "ACTIVE CREATING", "ACTIVE CREATING": "ACTIVE READY"}
  if read("slice") in later:
    (CLOUD / "slice").write_text(later[read("slice")])
  if state == "ABSENT":
    fail("NOT_FOUND: there is none of that name")
  print(state)


def workers(options):
  chosen = options["--worker"]
  return range(WORKERS) if chosen == "all" else [int(chosen)]


def on_each(options, act):
  if read("slice") != "ACTIVE READY":
    fail("could not connect")
  codes = [act(worker) for worker in workers(options)]
  sys.exit(next((code for code in codes if code), 0))


def ssh(options):
  def act(worker):
    env = {**os.environ, "HOME": str(home(worker))}
    return subprocess.run(["bash", "-c", options["--command"]], cwd=home(worker), env=env,
                          check=False).returncode
  on_each(options, act)


def scp(options, source, target):
  def act(worker):
    shutil.copy(source, home(worker) / target.partition(":")[2])
    return 0
  on_each(options, act)


def main(words):
  with (CLOUD / "calls").open("a") as file:
    file.write(json.dumps(words) + "\n")
  if read("refuses"):
    fail(read("refuses"))
  if int(read("silent") or 0):
    (CLOUD / "silent").write_text(str(int(read("silent")) - 1))
    fail("the network is unreachable")
  if read("loses") and "queued-resources" in words:    # not between the two looks of one poll
    lose(read("loses"))
  options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
  kind, verb, *names = [word for word in words[2:] if not word.startswith("--")]
  if verb == "create":
    create()
  elif verb == "describe":
    describe(kind)
  elif verb == "delete":
    for worker in range(WORKERS):
      end(worker)
    (CLOUD / "slice").unlink()
  elif verb == "ssh":
    ssh(options)
  elif verb == "scp":
    scp(options, *names)


main(sys.argv[1:])
