#!/usr/bin/env bash
# Trains on a slice of a TPU pod: asks for it, installs, runs on all workers, starts again after a
# preemption, deletes it.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/tpu_pod.sh STEP --name=NAME --zone=ZONE [options] [-- ARGUMENTS...]

Steps:
  train     all of the following, and again after each preemption, until the training has ended
  create    ask for the slice, by a queued resource
  wait      until its VMs are ready
  install   send this folder's code to all workers, and install what it needs
  start     python -m advprop_jax.main ARGUMENTS on all workers; it goes on when you log out
  status    whether it runs, or how it ended
  logs      follow the log of one worker
  stop      a checkpoint at the next step, then the end
  delete    give the slice back, running or not

Options:
  --name=NAME               of the queued resource and of the slice
  --zone=ZONE               such as us-west4-a
  --project=PROJECT         (gcloud's default)
  --accelerator-type=TYPE   such as v5litepod-256, v6e-64, v4-128; for create and train
  --runtime-version=VERSION (the one that goes with the type)
  --spot                    cheaper, and may be taken away at any time
  --worker=N                whose log is shown (0)
  --poll=SECONDS            between two looks (30)
  --max-restarts=N          how often a training that was interrupted is started again, and how
                            often a lost slice is asked for, together (100)
  --max-failures=N          how often a training that crashed, or whose disk was full, is started
                            again, in all (3)
  --keep                    train leaves the slice when it ends; somebody pays for it
  --create-flag=FLAG        a further flag for gcloud's create, such as --create-flag=--reserved
  --ssh-flag=FLAG           a further flag for gcloud's ssh and scp, such as
                            --ssh-flag=--internal-ip; both may be given several times
  --any-workdir             accept a workdir that is no bucket: a disk that all workers share, and
                            that is still there when the slice is gone
  --dry-run                 print the commands, run nothing
  --help                    this text

ARGUMENTS are those of advprop_jax.main. The workdir lies in a bucket, where each new slice finds
the checkpoints of the last one:

  launch/tpu_pod.sh train --name=b0 --zone=us-west4-a --accelerator-type=v5litepod-32 --spot -- \
    --config=configs/imagenet_efficientnet.py:b0,chips=32 --workdir=gs://BUCKET/b0 \
    --config.data.dir=gs://BUCKET/tfds

Started again, train looks first: a training that still runs is only watched.
TEXT
}

fail() {
  echo "tpu_pod.sh: $1" >&2
  exit "${2:-2}"
}

name="" zone="" project="" accelerator="" runtime="" worker=0 poll=30
max_restarts=100 max_failures=3 spot=false keep=false any_workdir=false dry_run=false
create_flags=() ssh_flags=() training=()
step="${1:-}"
case "$step" in
  train|create|wait|install|start|status|logs|stop|delete) shift ;;
  --help|-h) usage; exit 0 ;;
  ""|-*) fail "no step is named first, such as train; see --help" ;;
  *) fail "$step: no such step; see --help" ;;
esac
while [[ $# -gt 0 ]]; do
  case "$1" in
    --name=?*) name="${1#*=}" ;;
    --zone=?*) zone="${1#*=}" ;;
    --project=?*) project="${1#*=}" ;;
    --accelerator-type=?*) accelerator="${1#*=}" ;;
    --runtime-version=?*) runtime="${1#*=}" ;;
    --worker=?*) worker="${1#*=}" ;;
    --poll=?*) poll="${1#*=}" ;;
    --max-restarts=?*) max_restarts="${1#*=}" ;;
    --max-failures=?*) max_failures="${1#*=}" ;;
    --create-flag=-?*) create_flags+=("${1#*=}") ;;
    --ssh-flag=-?*) ssh_flags+=("${1#*=}") ;;
    --spot) spot=true ;;
    --keep) keep=true ;;
    --any-workdir) any_workdir=true ;;
    --dry-run) dry_run=true ;;
    --help|-h) usage; exit 0 ;;
    --) shift; training=("$@"); break ;;
    -*) fail "$1: no such option, or it lacks its value; see --help" ;;
    *) fail "$1: not an option; what is for advprop_jax.main stands behind --" ;;
  esac
  shift
done

# All that could be wrong is looked for before anything costs money.
check() {
  local number workdir="" config="" argument
  [[ -n "$name" ]] || fail "--name is not given; see --help"
  [[ "$name" =~ ^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$ ]] ||
    fail "--name=$name: give small letters, digits and hyphens, a letter first"
  [[ -n "$zone" ]] || fail "--zone is not given, such as --zone=us-west4-a"
  [[ "$zone" =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "--zone=$zone: not of the form us-west4-a"
  for number in "$worker" "$max_restarts" "$max_failures"; do
    [[ "$number" =~ ^[0-9]+$ ]] ||
      fail "--worker, --max-restarts and --max-failures are whole numbers, not $number"
  done
  [[ "$poll" =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--poll=$poll: not a number of seconds"
  if [[ "$step" == train || "$step" == create ]]; then
    [[ -n "$accelerator" ]] ||
      fail "--accelerator-type is not given, such as --accelerator-type=v5litepod-32"
    choose_runtime
  fi
  if [[ "$step" != train && "$step" != start ]]; then
    [[ ${#training[@]} -eq 0 ]] || fail "$step takes no arguments behind --"
    return
  fi
  for argument in ${training[@]+"${training[@]}"}; do
    case "$argument" in
      --config=?*) config="$argument" ;;
      --workdir=?*) workdir="${argument#*=}" ;;
    esac
  done
  [[ -n "$config" && -n "$workdir" ]] ||
    fail "$step needs what to train behind --: at least --config=FILE and --workdir=FOLDER, with ="
  [[ "$workdir" == gs://?* ]] || "$any_workdir" ||
    fail "--workdir=$workdir: is lost with the slice; give gs://BUCKET/FOLDER, or --any-workdir"
}

# Source: Cloud TPU's documentation, "TPU software versions", for JAX.
choose_runtime() {
  case "$accelerator" in
    v5litepod-[1-9]*) : "${runtime:=v2-alpha-tpuv5-lite}" ;;
    v5p-[1-9]*) : "${runtime:=v2-alpha-tpuv5}" ;;
    v6e-[1-9]*) : "${runtime:=v2-alpha-tpuv6e}" ;;
    v[234]-[1-9]*) : "${runtime:=tpu-ubuntu2204-base}" ;;
    *) [[ -n "$runtime" ]] ||
         fail "--accelerator-type=$accelerator: not of a known kind (v2, v3, v4, v5litepod, v5p, \
v6e, then a hyphen and a number); for another one give --runtime-version too" ;;
  esac
}

# The words of a command, so that a shell reads them as they are: --flag='a value'.
quoted() {
  local word flag text="" quote="'" escaped="'\\''"
  for word in "$@"; do
    if [[ ! "$word" =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
      flag=""
      if [[ "$word" =~ ^(--[a-z._-]+=)(.*)$ ]]; then
        flag="${BASH_REMATCH[1]}" word="${BASH_REMATCH[2]}"
      fi
      word="$flag'${word//$quote/$escaped}'"
    fi
    text+="$word "
  done
  printf '%s\n' "${text% }"
}

say() {
  printf '# %s %s\n' "$(date '+%F %T')" "$*"
}

run() {
  quoted "$@"
  "$dry_run" || "$@"
}

# Like run, for commands whose output is read, and which may fail; not shown, they are too many.
ask() {
  if "$dry_run"; then
    quoted "$@" >&3
  else
    "$@" 2>"$scratch/error"
  fi
}

create() {
  local flags=()
  if "$spot"; then flags+=(--spot); fi
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" \
    --accelerator-type="$accelerator" --runtime-version="$runtime" --quiet \
    ${flags[@]+"${flags[@]}"} ${create_flags[@]+"${create_flags[@]}"}
}

delete() {
  # --force: with its VMs.
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

# ssh WORKERS COMMAND, by `run` or `ask`.
ssh_command() {
  local by="$1" workers="$2"
  "$by" gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$workers" --quiet \
    ${ssh_flags[@]+"${ssh_flags[@]}"} --command="$3"
}

on_worker() {
  printf 'bash advprop_jax/launch/tpu_worker.sh %s' "$(quoted "$@")"
}

# What lies in the folder is sent, committed or not.
install() {
  run tar -czf "$scratch/advprop_jax.tar.gz" --exclude=__pycache__ advprop_jax configs launch \
    requirements.txt &&
  run gcloud compute tpus tpu-vm scp "$scratch/advprop_jax.tar.gz" "$name:advprop_jax.tar.gz" \
    "${where[@]}" --worker=all --quiet ${ssh_flags[@]+"${ssh_flags[@]}"} &&
  ssh_command run all "rm -rf advprop_jax && mkdir advprop_jax && \
tar -xzf advprop_jax.tar.gz -C advprop_jax && $(on_worker install)"
}

start() {
  ssh_command run all "$(on_worker start "${training[@]}")"
}

# Of a worker to which nothing was sent yet, too.
status() {
  ssh_command ask all "if [ -e advprop_jax/launch/tpu_worker.sh ]; then $(on_worker status); \
else echo status: none; fi"
}

# describe KIND FIELD: ABSENT where there is none, UNKNOWN where gcloud does not say.
describe() {
  local state
  if state=$(ask gcloud compute tpus "$1" describe "$name" "${where[@]}" --format="value($2)"); then
    echo "${state:-UNKNOWN}"
  elif grep -q NOT_FOUND "$scratch/error"; then
    echo ABSENT
  else
    echo UNKNOWN
  fi
}

# Of the request until it is active, then of the VMs; READY where they can be used.
slice_state() {
  local state
  state=$(describe queued-resources state.state)
  if [[ "$state" == ACTIVE ]] || "$dry_run"; then
    state=$(describe tpu-vm state)
    # A request stays active for a while after its VMs are gone.
    if [[ "$state" == ABSENT ]]; then state=PREEMPTED; fi
  fi
  echo "$state"
}

is_lost() {
  case "$1" in
    FAILED|SUSPENDED|PREEMPTED|TERMINATED|STOPPED|HIDDEN) true ;;
    *) false ;;
  esac
}

unanswered=0 answered=false last_state="" had_slice=false
# A run of days must outlive an hour without network; a first question without answer is an error.
no_answer() {
  unanswered=$((unanswered + 1))
  if ! "$answered" || [[ $unanswered -gt 120 ]]; then
    fail "gcloud does not say what the slice does: $(tail -n 1 "$scratch/error")" 1
  fi
}

# Sets state, and says when it is another one.
look() {
  state=$(slice_state)
  if [[ "$state" == UNKNOWN ]]; then
    no_answer
    return
  fi
  answered=true unanswered=0
  if [[ "$state" != "$last_state" ]]; then say "slice $name: $state"; fi
  last_state="$state"
}

wait_ready() {
  local state=""
  if "$dry_run"; then
    slice_state >/dev/null
    return
  fi
  while look; [[ "$state" != READY ]]; do
    if [[ "$state" == ABSENT ]] || is_lost "$state"; then
      fail "slice $name: $state; delete it, and create it again" 1
    fi
    sleep "$poll"
  done
}

restarts=0
count_restart() {
  restarts=$((restarts + 1))
  if [[ $restarts -gt $max_restarts ]]; then
    finish || true
    fail "slice $name: lost or interrupted more than --max-restarts=$max_restarts times" 1
  fi
  say "$1: restart $restarts of at most $max_restarts"
}

# Until the slice is there and ready; a lost one is deleted, and asked for again.
acquire() {
  local state=""
  while look; [[ "$state" != READY ]]; do
    if [[ "$state" == ABSENT ]]; then
      if "$had_slice"; then count_restart "slice $name is asked for again"; fi
      create || "$had_slice" || fail "the slice could not be asked for; gcloud says why above" 1
      had_slice=true
    elif is_lost "$state"; then
      had_slice=true
      delete || count_restart "deleting failed"
    fi
    sleep "$poll"
  done
  had_slice=true
}

shown=0
show_log() {
  local text
  text=$(ssh_command ask "$worker" "$(on_worker log "$shown")") || return 0
  if [[ "${text%%$'\n'*}" =~ ^[0-9]+$ ]]; then
    shown="${text%%$'\n'*}"
    tail -n +2 <<<"$text"
  fi
}

# Follows the training; sets outcome to ended, lost, unreachable, interrupted, refused or failed,
# or, where it was not started yet, to new.
watch() {
  local state="" answers unreachable=0
  while true; do
    look
    if [[ "$state" == ABSENT ]] || is_lost "$state"; then
      outcome=lost
      return
    fi
    if [[ "$state" == READY ]]; then
      if answers=$(status) && [[ "$answers" == *"status: "* ]]; then
        unreachable=0
        if [[ "$answers" != *none* ]]; then show_log; fi
        if outcome_of "$answers"; then return; fi
      else
        # A VM that has just been made ready, or that is going away, does not answer either.
        unreachable=$((unreachable + 1))
        outcome=unreachable
        if [[ $unreachable -ge 20 ]]; then return; fi
      fi
    fi
    sleep "$poll"
  done
}

# Sets outcome from the workers' answers; while one still runs, sets started, and fails.
outcome_of() {
  local answers
  answers=$(grep '^status: ' <<<"$1" | sort -u)
  case "$answers" in
    *running*) started=true; return 1 ;;
    "status: exit 0") outcome=ended ;;
    "status: none") outcome=new ;;
    *"exit 143"*|*gone*|*none*) outcome=interrupted ;;
    *"exit 2"|*"exit 2"$'\n'*) outcome=refused ;;
    *) # 3 and 134 alone: each ended because another was lost, and nobody says of what.
      if grep -qvE '^status: exit (0|3|134)$' <<<"$answers"; then
        outcome=failed
      else
        outcome=interrupted
      fi ;;
  esac
}

finish() {
  if "$keep"; then
    say "the slice is kept, and somebody pays for it: launch/tpu_pod.sh delete --name=$name \
--zone=$zone"
  else
    delete
  fi
}

train() {
  local failures=0 started=false outcome
  trap 'say "the slice goes on, and so does the training; the same command watches it again, \
and delete ends it"; exit 130' INT
  while true; do
    acquire
    watch
    case "$outcome" in
      refused|ended|failed|interrupted)
        # What an earlier command started has nothing to say about this one.
        "$started" || outcome=new ;;
    esac
    case "$outcome" in
      new) ;;
      ended) say "the training has ended"; finish; return ;;
      refused) finish; fail "the training was refused (exit code 2); the log above says why" 1 ;;
      interrupted)
        count_restart "the training was interrupted"
        sleep "$poll"     # SIGTERM comes some time before the slice is seen to be lost
        acquire ;;
      lost) started=false; continue ;;
      unreachable)
        count_restart "the workers do not answer"
        delete || true
        started=false
        continue ;;
      failed)
        failures=$((failures + 1))
        if [[ $failures -gt $max_failures ]]; then
          finish
          fail "the training failed more than --max-failures=$max_failures times; the log above \
says why" 1
        fi
        say "the training failed: try $((failures + 1)) of $((max_failures + 1))" ;;
    esac
    shown=0
    if install && start; then
      started=true
    else
      count_restart "installing or starting failed"
      sleep "$poll"
    fi
  done
}

dry_train() {
  create
  echo "# until both are ready, every $poll seconds:"
  wait_ready
  install
  start
  echo "# then, every $poll seconds, until all workers have ended:"
  slice_state >/dev/null
  status
  show_log
  echo "# lost or preempted on the way: deleted, and all again from the top; at the end:"
  finish
}

check
cd "$(dirname "$0")/.."
where=(--zone="$zone")
if [[ -n "$project" ]]; then where+=(--project="$project"); fi
exec 3>&1
if "$dry_run"; then
  scratch=/tmp
  if [[ "$step" == train ]]; then step=dry_train; fi
else
  command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk"
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
fi
case "$step" in
  wait) wait_ready ;;
  logs) ssh_command run "$worker" "$(on_worker follow)" ;;
  stop) ssh_command run all "$(on_worker stop)" ;;
  status) status || fail "no answer: $(tail -n 1 "$scratch/error")" 1 ;;
  *) "$step" ;;
esac
