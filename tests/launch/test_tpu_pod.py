"""The script for TPU pods: what it would run, and a training on a slice that is taken away.

gcloud is a stand-in that records its calls, keeps the state of one slice in files, and lets each of
two workers be a folder of this machine, in which the very commands that ssh would carry are run.
"""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
GCLOUD = pathlib.Path(__file__).with_name("fake_gcloud.py")
WHERE = ["--name=pod", "--zone=us-west4-a"]
SLICE = [*WHERE, "--accelerator-type=v5litepod-16", "--poll=0.05"]
TRAINING = ["--", "--config=configs/quickstart.py", "--workdir=gs://bucket/run"]

# In place of python: says where it starts, fails, ends, or waits to be told to, as `plan` says.
TRAINER = """#!/bin/bash
trap 'echo saved; exit 0' TERM
printf '%s\\n' "$@" >"$HOME/arguments"
echo "resumes from $(cat "$CLOUD/checkpoint")"
plans="$CLOUD/plans/${HOME: -1}"    # a line for each start, on whatever slice
plan=$(head -n 1 "$plans" 2>/dev/null || echo "exit 0")
sed -i 1d "$plans" 2>/dev/null
[ "${HOME: -1}" = 0 ] && echo 7 >"$CLOUD/checkpoint"    # what both would write, once
case "$plan" in
  wait) while true; do sleep 0.05; done ;;
  *) eval "$plan" ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
  """A folder with the state of the stand-in for the cloud, which has a slice of two workers."""
  folder = tmp_path / "cloud"
  programs = folder / "programs"
  programs.mkdir(parents=True)
  (folder / "checkpoint").write_text("nothing")
  (folder / "plans").mkdir()
  gcloud = programs / "gcloud"
  gcloud.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} "
                    f"{shlex.quote(str(GCLOUD))} \"$@\"\n")
  trainer = folder / "trainer"
  trainer.write_text(TRAINER)
  # What install runs on a worker, but for the packages: a venv whose python is the trainer.
  python3 = programs / "python3"
  python3.write_text('#!/bin/sh\necho "python3 $*" >>"$HOME/installed"\n'
                     'mkdir -p "$HOME/advprop_jax-run/venv/bin"\n'
                     'cp "$CLOUD/trainer" "$HOME/advprop_jax-run/venv/bin/python"\n')
  # gcsfuse ... BUCKET FOLDER: a link to a folder of the cloud; or what `refuses_mounts` says, once
  # for each line of it.
  gcsfuse = programs / "gcsfuse"
  gcsfuse.write_text('#!/bin/bash\nwhy=$(head -n 1 "$CLOUD/refuses_mounts" 2>/dev/null)\n'
                     'sed -i 1d "$CLOUD/refuses_mounts" 2>/dev/null\n'
                     'if [ -n "$why" ]; then echo "$why" >&2; exit 1; fi\n'
                     'for last; do :; done\nrmdir "$last"\nmkdir -p "$CLOUD/bucket"\n'
                     'ln -s "$CLOUD/bucket" "$last"\necho "$*" >"$HOME/mounted"\n')
  mountpoint = programs / "mountpoint"
  mountpoint.write_text('#!/bin/sh\n[ -L "$2" ]\n')
  for program in (gcloud, trainer, python3, gcsfuse, mountpoint):
    program.chmod(0o755)
  return folder


def environment(cloud):
  return {"PATH": f"{cloud / 'programs'}:{os.environ['PATH']}", "HOME": str(cloud),
          "CLOUD": str(cloud), "TMPDIR": str(cloud), "MOUNT_PAUSE": "0.1"}


def pod(cloud, *arguments):
  return subprocess.run(["bash", str(ROOT / "launch" / "tpu_pod.sh"), *arguments], text=True,
                        capture_output=True, check=False, env=environment(cloud), timeout=300)


def calls(cloud):
  """Of gcloud: the words of each call."""
  file = cloud / "calls"
  return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def steps(cloud):
  """The calls that change something, in one word each."""
  kinds = {"create": "create", "delete": "delete", "scp": "send"}
  words = []
  for call in calls(cloud):
    command = next((word for word in call if word.startswith("--command=")), "")
    words += [kinds[word] for word in call[2:4] if word in kinds]
    words += re.findall(r"tpu_worker.sh (install|start|stop)\b", command)
  return words


def plan(cloud, *lines, worker=0):
  """What the trainer of a worker does each time that it is started, on whatever slice."""
  (cloud / "plans" / str(worker)).write_text("".join(f"{line}\n" for line in lines))


def test_a_dry_run_prints_every_command_and_runs_none(cloud):
  """Fails where a command is run, is not shown, or a value with a space becomes two words."""
  ran = pod(cloud, "train", *SLICE, "--spot", "--project=p", "--create-flag=--reserved",
            "--ssh-flag=--internal-ip", "--dry-run", *TRAINING, "--config.data.dir=it's a folder")
  assert (ran.returncode, ran.stderr) == (0, "")
  assert not calls(cloud)
  lines = [shlex.split(line) for line in ran.stdout.splitlines() if not line.startswith("#")]
  assert [" ".join(line[2:5]) for line in lines if line[0] == "gcloud"] == [
    "tpus queued-resources create", "tpus queued-resources describe", "tpus tpu-vm describe",
    "tpus tpu-vm scp", "tpus tpu-vm ssh", "tpus tpu-vm ssh", "tpus queued-resources describe",
    "tpus tpu-vm describe", "tpus tpu-vm ssh", "tpus tpu-vm ssh", "tpus queued-resources delete"]
  assert lines[0][5:] == [
    "pod", "--node-id=pod", "--zone=us-west4-a", "--project=p", "--accelerator-type=v5litepod-16",
    "--runtime-version=v2-alpha-tpuv5-lite", "--quiet", "--spot", "--reserved"]
  assert all("--project=p" in line for line in lines if line[0] == "gcloud")
  started = next(line[-1] for line in lines if "tpu_worker.sh start" in line[-1])
  assert shlex.split(started)[2:] == ["start", *TRAINING[1:], "--config.data.dir=it's a folder"]


@pytest.mark.parametrize("step", ["create", "wait", "install", "start", "status", "logs", "stop",
                                  "delete"])
def test_each_step_has_a_dry_run(cloud, step):
  """Fails where one of the steps needs what another left, or runs something."""
  ran = pod(cloud, step, *SLICE, "--dry-run", *(TRAINING if step == "start" else []))
  assert (ran.returncode, ran.stderr) == (0, "")
  assert ran.stdout.startswith(("gcloud compute tpus ", "tar "))
  assert not calls(cloud)


@pytest.mark.parametrize(("arguments", "says"), [
  ([], "no step is named"), (["--name=pod"], "no step is named"), (["resume"], "no such step"),
  (["train", *SLICE, "--zones=x", *TRAINING], "--zones=x: no such option"),
  (["train", *SLICE, "--name=", *TRAINING], "--name=: no such option, or it lacks its value"),
  (["delete", "--name=pod"], "--zone is not given"),
  (["delete", "--zone=us-west4-a"], "--name is not given"),
  (["delete", "--name=Pod_1", "--zone=us-west4-a"], "--name=Pod_1"),
  (["delete", "--name=pod", "--zone=europe"], "--zone=europe: not of the form"),
  (["create", *WHERE], "--accelerator-type is not given"),
  (["create", *WHERE, "--accelerator-type=h100-8"], "h100-8: not of a known kind"),
  (["wait", *WHERE, "--poll=often"], "--poll=often: not a number"),
  (["wait", *WHERE, "--max-restarts=-1"], "whole numbers, not -1"),
  (["create", *SLICE, *TRAINING], "create takes no arguments behind --"),
  (["train", *SLICE], "needs what to train"),
  (["train", *SLICE, "--", "--config=configs/quickstart.py"], "needs what to train"),
  (["train", *SLICE, "configs/quickstart.py"], "not an option"),
  (["train", *SLICE, "--", "--config=c.py", "--workdir=/tmp/run"], "is lost with the slice")])
def test_what_is_wrong_is_said_before_anything_costs_money(cloud, arguments, says):
  """Fails where a typo is found after the slice was asked for, or ends in more than a sentence."""
  ran = pod(cloud, *arguments)
  assert (ran.returncode, ran.stdout, len(ran.stderr.splitlines())) == (2, "", 1), ran
  assert says in ran.stderr
  assert not calls(cloud)


def test_a_training_from_the_request_to_the_deletion(cloud):
  """Fails where a worker is left out, arguments change on their way, or the slice is kept."""
  odd = ["--config.data.dir=two words", "--config.a='$HOME'", "--config.b=", 'a "b" \\ `c`; *']
  ran = pod(cloud, "train", *SLICE, *TRAINING, *odd)
  assert ran.returncode == 0, ran.stdout + ran.stderr
  assert steps(cloud) == ["create", "send", "install", "start", "delete"]
  assert "resumes from nothing" in ran.stdout
  assert "the training has ended" in ran.stdout
  for worker in (0, 1):
    home = cloud / f"slice1-worker{worker}"
    bucket = home / "advprop_jax-run/buckets/bucket"
    assert (home / "arguments").read_text().splitlines() == [
      "-u", "-m", "advprop_jax.main", TRAINING[1], f"--workdir={bucket}/run", *odd]
    assert (home / "mounted").read_text().split()[-2:] == ["bucket", str(bucket)]
    assert not list((cloud / "bucket").iterdir())
    assert (home / "advprop_jax/advprop_jax/main.py").exists()
    assert "requirements.txt" in (home / "installed").read_text()


@pytest.mark.parametrize("how", ["PREEMPTED", "TERMINATED", "SUSPENDED", "FAILED", "GONE"])
def test_a_lost_slice_is_asked_for_again_and_the_same_command_resumes(cloud, how):
  """Fails where the loop goes on with the dead slice, loses the arguments, or ends."""
  both = 'until [ -e "$CLOUD/slice1-worker1/arguments" ]; do sleep 0.05; done'
  plan(cloud, f'{both}; echo {how} >"$CLOUD/loses"; sleep 60', "exit 0")
  ran = pod(cloud, "train", *SLICE, "--spot", *TRAINING)
  assert ran.returncode == 0, ran.stdout + ran.stderr
  once = ["send", "install", "start"]
  again = ["create"] if how == "GONE" else ["delete", "create"]
  assert steps(cloud) == ["create", *once, *again, *once, "delete"]
  created = [call for call in calls(cloud) if "create" in call]
  assert created[0] == created[1]
  logs = [(cloud / f"slice{number}-worker0/advprop_jax-run/log").read_text() for number in (1, 2)]
  assert logs == ["resumes from nothing\n", "resumes from 7\n"]
  assert ran.stdout.count("restart 1 of at most 100") == 1
  first, second = ((cloud / f"slice{number}-worker1/arguments").read_text() for number in (1, 2))
  assert first.replace("slice1", "slice2") == second


def test_a_training_that_was_told_to_end_is_not_taken_for_finished(cloud):
  """Fails where exit code 0 after SIGTERM, some seconds before the slice is lost, ends the loop."""
  plan(cloud, 'kill -TERM "$PPID"; exit 0', "exit 0")
  ran = pod(cloud, "train", *SLICE, *TRAINING)
  assert ran.returncode == 0, ran.stdout + ran.stderr
  assert steps(cloud) == ["create", *["send", "install", "start"] * 2, "delete"]
  assert "the training was interrupted: restart 1" in ran.stdout


def test_bad_input_ends_the_loop_and_the_slice(cloud):
  """Fails where a typo in a config is tried a hundred times, or the slice goes on costing."""
  plan(cloud, "echo Error: no such config; exit 2")
  ran = pod(cloud, "train", *SLICE, *TRAINING)
  assert ran.returncode == 1
  assert "Error: no such config" in ran.stdout
  assert "refused (exit code 2)" in ran.stderr
  assert steps(cloud) == ["create", "send", "install", "start", "delete"]


def test_a_fault_on_one_worker_of_a_slice_that_goes_is_no_refusal(cloud):
  """Fails where the run of days ends because the bucket's mount went before the machine did."""
  plan(cloud, "exit 143", "exit 0")
  plan(cloud, "exit 2", "exit 0", worker=1)
  ran = pod(cloud, "train", *SLICE, *TRAINING)
  assert ran.returncode == 0, ran.stdout + ran.stderr
  assert "the training was interrupted: restart 1" in ran.stdout


def test_a_bucket_without_permission(cloud):
  """Fails where it is found out after the first epoch, is tried again, or is not named."""
  (cloud / "refuses_mounts").write_text("Error 403: no storage.objects.list access\n" * 9)
  ran = pod(cloud, "train", *SLICE, *TRAINING)
  assert ran.returncode == 1
  assert "Error 403: no storage.objects.list access" in ran.stdout
  assert "Error: --workdir: the bucket gs://bucket cannot be mounted and written to" in ran.stdout
  assert "refused (exit code 2)" in ran.stderr
  assert not (cloud / "slice1-worker0/arguments").exists()
  assert steps(cloud) == ["create", "send", "install", "start", "delete"]


def test_a_mount_that_fails_for_a_while_is_tried_again(cloud):
  """Fails where a run of days ends since one worker's network was not there yet."""
  (cloud / "refuses_mounts").write_text("dial tcp: lookup: try again\n" * 3)
  ran = pod(cloud, "train", *SLICE, *TRAINING)
  assert ran.returncode == 0, ran.stdout + ran.stderr
  assert steps(cloud) == ["create", "send", "install", "start", "delete"]


def test_processes_that_end_because_another_is_lost_are_no_crash(cloud):
  """Fails where a network that broke a few times in days deletes the slice."""
  plan(cloud, *["exit 3"] * 5, "exit 0")
  plan(cloud, *["exit 134"] * 5, "exit 0", worker=1)
  ran = pod(cloud, "train", *SLICE, "--max-failures=1", *TRAINING)
  assert ran.returncode == 0, ran.stdout + ran.stderr
  assert "restart 5 of at most 100" in ran.stdout


def test_gcsfuse_is_installed_where_it_is_missing(cloud):
  """Fails where a worker without it cannot mount the bucket."""
  programs = cloud / "programs"
  (programs / "gcsfuse").rename(cloud / "gcsfuse")
  (programs / "curl").write_text('#!/bin/sh\necho "curl $*" >>"$HOME/installed"\n')
  (programs / "sudo").write_text('#!/bin/sh\necho "sudo $*" >>"$HOME/installed"\n'
                                 'cp "$CLOUD/gcsfuse" "$CLOUD/programs/gcsfuse"\n')
  for name in ("curl", "sudo"):
    (programs / name).chmod(0o755)
  ran = pod(cloud, "train", *SLICE, *TRAINING)
  assert ran.returncode == 0, ran.stdout + ran.stderr
  installed = (cloud / "slice1-worker0/installed").read_text()
  assert re.search(r"curl .*/v([\d.]+)/gcsfuse_\1_amd64\.deb", installed)
  assert "sudo apt-get install" in installed


@pytest.mark.parametrize("code", [1, 137])
def test_a_crash_is_tried_again_a_few_times(cloud, code):
  """Fails where one worker that crashed is not seen among those that ended well.

  Nor is one whose training was killed, as where there is no memory: it would be killed again.
  """
  plan(cloud, *[f"exit {code}"] * 9, worker=1)
  ran = pod(cloud, "train", *SLICE, "--max-failures=2", "--keep", *TRAINING)
  assert ran.returncode == 1
  assert "failed more than --max-failures=2 times" in ran.stderr
  assert steps(cloud) == ["create", *["send", "install", "start"] * 3]
  assert "somebody pays for it" in ran.stdout


def test_restarts_are_limited(cloud):
  """Fails where a slice that is lost at once, each time, is asked for without end."""
  plan(cloud, *['echo PREEMPTED >"$CLOUD/loses"; sleep 60'] * 9)
  ran = pod(cloud, "train", *SLICE, "--max-restarts=2", *TRAINING)
  assert ran.returncode == 1
  assert "more than --max-restarts=2 times" in ran.stderr
  assert steps(cloud).count("create") == 3


def test_train_started_again_watches_the_training_that_runs(cloud):
  """Fails where it is installed over, started twice, or a stop is taken for a preemption."""
  plan(cloud, "wait")
  plan(cloud, "wait", worker=1)
  first = subprocess.Popen(
    # Where the tests run in the background, the signal would be ignored.
    ["env", "--default-signal=INT", "bash", str(ROOT / "launch" / "tpu_pod.sh"), "train", *SLICE,
     *TRAINING],
    env=environment(cloud), text=True, stdout=subprocess.PIPE, start_new_session=True)
  until = time.monotonic() + 60
  while not all((cloud / f"slice1-worker{worker}/arguments").exists() for worker in (0, 1)):
    assert time.monotonic() < until
    time.sleep(0.05)
  os.killpg(first.pid, signal.SIGINT)
  said, _ = first.communicate(timeout=300)
  assert first.returncode == 130
  assert "the slice goes on, and so does the training" in said
  stopper = subprocess.Popen(["bash", "-c", 'sleep 1; exec "$@"', "-", "bash",
                              str(ROOT / "launch" / "tpu_pod.sh"), "stop", *WHERE],
                             env=environment(cloud), stdout=subprocess.DEVNULL)
  ran = pod(cloud, "train", *SLICE, *TRAINING)
  stopper.wait(timeout=300)
  assert ran.returncode == 0, ran.stdout + ran.stderr
  assert steps(cloud) == ["create", "send", "install", "start", "stop", "delete"]
  assert "saved" in ran.stdout


def test_a_stop_before_the_training_can_hear_it_is_the_end(cloud):
  """Fails where train, which watches, takes it for an interruption and starts again."""
  plan(cloud, "exec sleep 60")
  plan(cloud, "exec sleep 60", worker=1)
  stopper = subprocess.Popen(
    ["bash", "-c", 'until [ -e "$CLOUD/slice1-worker1/arguments" ]; do sleep 0.05; done; '
     'sleep 0.5; exec "$@"', "-", "bash", str(ROOT / "launch" / "tpu_pod.sh"), "stop", *WHERE],
    env=environment(cloud), stdout=subprocess.DEVNULL)
  ran = pod(cloud, "train", *SLICE, *TRAINING)
  stopper.wait(timeout=300)
  assert ran.returncode == 0, ran.stdout + ran.stderr
  assert steps(cloud) == ["create", "send", "install", "start", "stop", "delete"]


def test_gcloud_that_does_not_answer_is_named(cloud):
  """Fails where somebody who is not logged in waits for ever."""
  (cloud / "refuses").write_text("You do not currently have an active account selected.")
  ran = pod(cloud, "train", *SLICE, *TRAINING)
  assert ran.returncode == 1
  assert "You do not currently have an active account" in ran.stderr
  assert not steps(cloud)


def test_an_hour_without_network_is_outlived(cloud):
  """Fails where one call without an answer ends a run of days, or is taken for a lost slice."""
  plan(cloud, 'echo 3 >"$CLOUD/silent"; sleep 0.5')
  ran = pod(cloud, "train", *SLICE, *TRAINING)
  assert ran.returncode == 0, ran.stdout + ran.stderr
  assert steps(cloud) == ["create", "send", "install", "start", "delete"]


@pytest.mark.parametrize(("boots", "says"), [("one", "running"), ("two", "gone")])
def test_a_machine_that_has_booted_again_runs_no_training(tmp_path, boots, says):
  """Fails where another process that has the old one's number is taken for it."""
  script = tmp_path / "advprop_jax" / "launch" / "tpu_worker.sh"
  script.parent.mkdir(parents=True)
  script.write_text((ROOT / "launch" / "tpu_worker.sh").read_text())
  boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text() if boots == "one" else "other"
  kept = tmp_path / "advprop_jax-run"
  kept.mkdir()
  (kept / "supervisor").write_text(f"{os.getpid()} {boot}")
  ran = subprocess.run(["bash", str(script), "status"], text=True, capture_output=True, check=True)
  assert ran.stdout == f"status: {says}\n"


def test_the_readme_shows_what_a_dry_run_prints():
  """Fails where a command of the script was changed, and its page was not."""
  text = (ROOT / "launch" / "README.md").read_text()
  command = re.search(r"^    (launch/tpu_pod\.sh train (?:.*\\\n)*.*)\n", text, re.MULTILINE)[1]
  shown = re.search(r"<!-- dry run -->\n\n((?:    .*\n)+)", text)[1]
  words = shlex.split(command.replace("\\\n", ""))
  words.insert(words.index("--"), "--dry-run")
  ran = subprocess.run(["bash", *words], cwd=ROOT, capture_output=True, text=True, check=True)
  assert ran.stdout == re.sub(r"^    ", "", shown, flags=re.MULTILINE)
