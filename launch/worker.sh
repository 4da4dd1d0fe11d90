#!/usr/bin/env bash
# What every host of a fleet runs; tpu_vm.sh, gke_xpk.sh and skypilot.yaml start it.
#
#   worker.sh OUT COPY FLAG...
#
# Runs `catversion batch FLAG... --config.run_dir=OUT`, again after a crash. COPY is a gs:// address or a folder that
# outlives the host: what OUT holds is copied there as it appears, and a new host begins with what is there.
#
# Ends with 0 when no concept is left, also where some failed: report.jsonl names those, and a scheduler that was told
# 2 would take this for a broken host and stop the others. Otherwise with the status of `catversion batch`.
set -euo pipefail
set -m
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

COPY_EVERY=300 # seconds
PAUSE=30       # seconds from a crash to the next start
RESTARTS=20    # more crashes than that are not the host's fault

(($# >= 3)) || die "$# arguments; expected OUT COPY FLAG..."
out=$1 copy=${2%/}
shift 2

mkdir -p "$out"
exec 9> "$out.lock"
flock --nonblock 9 || die "$out: a worker runs here already; nothing to do"
rm -f "$out.status" "$out.copied"
trap 'echo $? > "$out.status"' EXIT

restore() {
  [[ ! -f $out/started ]] || return 0 # this disk has been at work, and is ahead of the copy
  case $copy in
    gs://*)
      gcloud storage ls "$copy" > /dev/null 2>&1 || return 0 # the first host finds nothing
      gcloud storage rsync "$copy" "$out" --recursive
      ;;
    *)
      mkdir -p "$copy"
      cp --recursive "$copy/." "$out"
      ;;
  esac
  [[ ! -f $out/checkpoints.tar ]] || tar -xf "$out/checkpoints.tar" -C "$out"
}

# All but the checkpoints: file by file, a set that is being written could arrive torn.
copy_results() {
  case $copy in
    gs://*) gcloud storage rsync "$out" "$copy" --recursive '--exclude=checkpoints/.*' ;;
    *)
      local since=()
      [[ ! -f $out.copied ]] || since=(-newer "$out.copied")
      touch --date='5 seconds ago' "$out.copying" # what changes while it is copied is copied again
      find "$out" -path "$out/checkpoints" -prune -o -type f "${since[@]}" -print0 | copy_files &&
        mv "$out.copying" "$out.copied"
      ;;
  esac
}

# Each arrives whole, or not at all.
copy_files() {
  local file target
  while IFS= read -r -d '' file; do
    target=$copy/${file#"$out/"}
    mkdir -p "$(dirname "$target")" && cp "$file" "$target.part" && mv "$target.part" "$target" || return
  done
}

copy_now_and_then() {
  while sleep "$COPY_EVERY"; do
    copy_results > /dev/null 2>&1 || echo "worker.sh: $copy: copying failed; tried again in $COPY_EVERY s"
  done
}

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

restore
date >> "$out/started"
copy_results || die "$copy: cannot be written; give this host's account the right to, or name another place"
copy_now_and_then 9>&- &
copier=$!
disown # it ends unannounced

status=143
for ((starts = 0; starts <= RESTARTS; starts++)); do
  if ((starts)); then
    echo "worker.sh: catversion batch ended with status $status; again in $PAUSE s"
    spawn sleep "$PAUSE"
    await "$child" || break
  fi
  ((signals == 0)) || break
  children=() status=0
  spawn catversion batch "$@" --config.run_dir="$out"
  await "$child" || status=$?
  case $status in 0 | 1 | 2) break ;; esac
  ((signals == 0)) || break
done

kill -KILL -- "-$copier" || true # and what it runs: a copy that is cut off leaves nothing
# Now that nothing writes, the checkpoints are whole; as one file they arrive whole, or not at all.
case $status in
  0 | 1 | 2) ;;
  *) [[ ! -d $out/checkpoints ]] || tar -cf "$out/checkpoints.tar" -C "$out" checkpoints ;;
esac
copy_results || die "$copy: copying failed; the results are in $out on this host"
if ((status == 2)); then
  echo "worker.sh: some concepts failed; $out/report.jsonl names them"
  exit 0
fi
exit "$status"
