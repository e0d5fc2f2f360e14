#!/usr/bin/env bash
# What launch/tpu_pod.sh runs on each worker of a slice, where it is sent together with the code.
#
#   install        Python, the packages and gcsfuse, beside the code
#   start ARGS...  python -m advprop_jax.main ARGS, detached: it goes on when the connection ends;
#                  the bucket of a workdir gs://BUCKET/FOLDER is mounted first
#   status         status: none | running | gone, without a word | exit CODE, 143 if the machine
#                  told all to end
#   log LINES      how many lines the log has, then those after the first LINES, at most 200
#   follow         the log as it grows
#   stop           SIGTERM: checkpoint at the next step, then the end
set -euo pipefail

code=$(cd "$(dirname "$0")/.." && pwd)
GCSFUSE=3.11.1
kept="$code-run"              # not in the code, which is replaced when it is sent again
mkdir -p "$kept"

# A process is noted with the machine's boot: after the next one its number is of another process.
boot=$(cat /proc/sys/kernel/random/boot_id)

note() {
  echo "$2 $boot" >"$kept/$1"
}

alive() {
  local of_boot=
  if [[ -f "$kept/$1" ]]; then read -r process of_boot <"$kept/$1"; fi
  [[ "$of_boot" == "$boot" ]] && kill -0 "$process" 2>/dev/null
}

install() {
  # The images of TPU VMs have an older Python than JAX needs; uv brings one that fits.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --allow-existing --python '>=3.11' "$kept/venv"
  python3 -m uv pip install --quiet --python "$kept/venv" 'jax[tpu]' gcsfs \
    -r "$code/requirements.txt"
  if ! command -v gcsfuse >/dev/null; then
    local package="gcsfuse_${GCSFUSE}_amd64.deb"
    curl --silent --show-error --fail --location --output "$kept/$package" \
      "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v$GCSFUSE/$package"
    sudo apt-get install --yes --quiet -o DPkg::Lock::Timeout=300 "$kept/$package"
  fi
}

start() {
  if alive supervisor; then
    echo "it runs already"
    return
  fi
  rm -f "$kept/exit_code" "$kept/told_to_stop"
  setsid nohup bash "$code/launch/tpu_worker.sh" supervise "$@" >>"$kept/log" 2>&1 </dev/null &
  note supervisor $!
}

# The training saves at SIGTERM and exits with 0, as it does when all is done. What tells the two
# apart is that a machine that is taken away sends SIGTERM to this process too.
supervise() {
  local ended="" status=0 training
  trap 'ended=143' TERM
  cd "$code"
  in_folders "$@" || status=$?
  if [[ $status -ne 0 ]]; then
    leave "${ended:-$status}"
    return
  fi
  if [[ -e "$kept/told_to_stop" ]]; then       # while the bucket was mounted
    leave 0
    return
  fi
  "$kept/venv/bin/python" -u -m advprop_jax.main "${arguments[@]}" &
  training=$!
  note training "$training"
  wait "$training" || status=$?
  while kill -0 "$training" 2>/dev/null; do    # the trap ended the wait, not the training
    status=0
    wait "$training" || status=$?
  done
  # Told to stop before it could hear of it: it has begun nothing that it could save.
  if [[ $status == 143 && -e "$kept/told_to_stop" ]]; then status=0; fi
  leave "${ended:-$status}"
}

leave() {
  echo "$1" >"$kept/exit_code.new"
  mv "$kept/exit_code.new" "$kept/exit_code"
}

# Sets arguments to those given, with the folder where the bucket is mounted in place of a workdir
# of gs://BUCKET/FOLDER: the program writes to folders.
in_folders() {
  local argument bucket folder
  arguments=()
  for argument in "$@"; do
    if [[ "$argument" =~ ^--workdir=gs://([^/]+)/*(.*)$ ]]; then
      bucket="${BASH_REMATCH[1]}" folder="${BASH_REMATCH[2]}"
      mounted "$bucket" || return
      argument="--workdir=$kept/buckets/$bucket/$folder"
    fi
    arguments+=("$argument")
  done
}

# Nothing of the bucket is remembered, as other workers write to it too; and folders are renamed in
# it, which gcsfuse refuses in a bucket without hierarchical namespace if it is not told to.
mounted() {
  local folder="$kept/buckets/$1" probe why="$kept/gcsfuse" attempt
  probe="$folder/.written_by_$(hostname)"
  for attempt in 1 2 3 4 5; do
    if ! mountpoint -q "$folder"; then
      fusermount -uz "$folder" 2>/dev/null || true     # of a gcsfuse that has died
      mkdir -p "$folder"
      gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
        --rename-dir-limit=1000000 "$1" "$folder" >"$why" 2>&1
    fi
    if mountpoint -q "$folder" && { : >"$probe" && rm "$probe"; } 2>"$why"; then return; fi
    if refused "$why" || [[ $attempt == 5 ]]; then break; fi
    sleep "${MOUNT_PAUSE:-10}"
  done
  cat "$why" >&2
  echo "Error: --workdir: the bucket gs://$1 cannot be mounted and written to (why: above); the" \
    "service account of the slice needs the role Storage Object User on it" >&2
  if refused "$why"; then return 2; else return 1; fi
}

# Of what will not pass, as a failure of the network does.
refused() {
  grep -qiE '(^|[^0-9.:])40[134]([^0-9]|$)|permission|forbidden|not found|does not exist' "$1"
}

status() {
  if alive supervisor; then      # looked at first: it leaves its exit code before it ends
    echo "status: running"
  elif [[ -f "$kept/exit_code" ]]; then
    echo "status: exit $(cat "$kept/exit_code")"
  elif [[ -f "$kept/supervisor" ]]; then
    echo "status: gone"
  else
    echo "status: none"
  fi
}

log() {
  touch "$kept/log"
  wc -l <"$kept/log" | tr -d ' '
  tail -n "+$(($1 + 1))" "$kept/log" | tail -n 200
}

case "${1:-}" in
  install|start|supervise|status|log) "$@" ;;
  follow) exec tail -n 100 -F "$kept/log" ;;
  # To the training alone: its data workers must live until it has saved.
  stop)
    if alive supervisor; then touch "$kept/told_to_stop"; fi
    if alive training; then kill -TERM "$process"; fi ;;
  *) echo "tpu_worker.sh: ${1:-nothing}: no such step" >&2; exit 2 ;;
esac
