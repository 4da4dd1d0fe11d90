#!/usr/bin/env bash
# What every host of a TPU VM runs; tpu_vm.sh starts it.
#
#   worker.sh HERE FLAG...
#
# Runs `catversion batch FLAG...`, again after a crash. The run_dir among the flags is in a bucket: a host that takes
# over goes on from there. HERE.lock keeps a second worker of this host away, HERE.status is what it ended with.
#
# Ends with 0 when no concept is left, also where some failed: `catversion status` lists those, and a scheduler that was
# told 2 would take this for a broken host and stop the others. Otherwise with the status of `catversion batch`.
set -euo pipefail
set -m
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

PAUSE=30    # seconds from a crash to the next start
RESTARTS=20 # more crashes than that are not the host's fault

(($# >= 2)) || die "$# arguments; expected HERE FLAG..."
here=$1
shift

mkdir -p "$(dirname "$here")"
exec 9> "$here.lock"
flock --nonblock 9 || die "$here: a worker runs here already; nothing to do"
rm -f "$here.status"
trap 'echo $? > "$here.status"' EXIT

# Every host is on its own: without this, the TPU's library would wait for the other hosts of the slice.
alone_on_tpu() {
  local chips bounds
  chips=$({ compgen -G '/dev/accel[0-9]*' || compgen -G '/dev/vfio/[0-9]*'; } | wc -l) || return 0
  case $chips in
    1) bounds=1,1,1 ;;
    4) bounds=2,2,1 ;;
    8) bounds=2,4,1 ;;
    *) return 0 ;;
  esac
  export TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS=$bounds
  export TPU_WORKER_ID=0 CLOUD_TPU_TASK_ID=0 TPU_WORKER_HOSTNAMES=localhost
}

export TQDM_MININTERVAL=30 # a log needs no bar that moves
alone_on_tpu
pass_signals_on

status=143
for ((starts = 0; starts <= RESTARTS; starts++)); do
  if ((starts)); then
    echo "worker.sh: catversion batch ended with status $status; again in $PAUSE s"
    spawn sleep "$PAUSE"
    await "$child" || break
  fi
  ((signals == 0)) || break
  children=() status=0
  spawn catversion batch "$@"
  await "$child" || status=$?
  case $status in 0 | 1 | 2) break ;; esac
  ((signals == 0)) || break
done

if ((status == 2)); then
  echo "worker.sh: some concepts failed; catversion status lists them"
  exit 0
fi
exit "$status"
