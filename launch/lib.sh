# shellcheck shell=bash
# Shared by the scripts of this folder; sourced, never run.

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  die "needs bash 4.4 or later, this is $BASH_VERSION; on macOS: brew install bash"

# Set `dry_run`, and `arguments` to all that is neither --dry-run nor --help.
parse() {
  local argument
  dry_run='' arguments=()
  for argument in "$@"; do
    case $argument in
      --dry-run) dry_run=yes ;;
      -h | --help) usage && exit ;;
      *) arguments+=("$argument") ;;
    esac
  done
}

# The words as one line of shell, for a person to paste or a remote shell to read.
quoted() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# Run a command, or print it under --dry-run.
run() {
  if [[ -n $dry_run ]]; then quoted "$@"; else "$@"; fi
}

# The same for a line of shell.
run_line() {
  if [[ -n $dry_run ]]; then printf '%s\n' "$1"; else bash -c "set -euo pipefail; $1"; fi
}

# --- Processes in the background, and signals

# Pass SIGTERM and SIGINT on to `children`, as SIGTERM; `signals` counts them. With `set -m` every child has a process
# group of its own, so that a signal to the script's group reaches it once.
pass_signals_on() {
  signals=0 children=()
  trap '((++signals)); kill -TERM "${children[@]}" 2> /dev/null || true' TERM INT
}

# Start a command in the background, as `child`.
spawn() {
  local before=$signals
  "$@" &
  child=$!
  children+=("$child")
  ((signals == before)) || kill -TERM "$child" # came before the trap knew of the child
}

# Wait for a child, however often a signal interrupts that, and return its status.
await() {
  local before status
  while true; do
    before=$signals status=0
    wait "$1" || status=$?
    ((signals > before)) || return "$status"
  done
}

# --- Runs

# The manifest below CONCEPTS: there, or an error.
require_concepts() {
  [[ -f $CONCEPTS/concepts.jsonl ]] ||
    die "$CONCEPTS/concepts.jsonl: no such file; set CONCEPTS to the folder that holds concepts.jsonl and the photos"
}

# --- A run in a bucket: BUCKET/NAME/concepts has the photos, BUCKET/NAME/out is the run_dir of all hosts.

# The name becomes part of lines that remote shells read.
require_name() {
  [[ -n ${NAME:-} ]] || die "NAME: not set; expected a name for the run, such as NAME=mugs"
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,37}[a-z0-9])?$ ]] ||
    die "NAME=$NAME: expected a small letter, then at most 38 small letters, digits and hyphens"
}

require_bucket() {
  [[ ${BUCKET:-} =~ ^gs://[-a-z0-9._]+(/[-A-Za-z0-9._/]+)?$ ]] ||
    die "BUCKET=${BUCKET:-}: expected a bucket that you and the hosts may write to, such as BUCKET=gs://my-bucket"
  store=${BUCKET%/}/$NAME
}

upload_concepts() {
  run gcloud storage rsync "$CONCEPTS" "$store/concepts" --recursive
}

# $1, $2: the host's index and how many there are, as its shell sees them; then flags of `catversion batch`.
worker() {
  echo "launch/worker.sh runs/$NAME" \
    "$(quoted --config="$CONFIG" --manifest="$store/concepts/concepts.jsonl" --config.run_dir="$store/out")" \
    "--num_processes=$2 --process_id=$1 $(quoted "${@:3}")"
}

collect() {
  run mkdir -p "$OUT" &&
    run gcloud storage rsync "$store/out" "$OUT" --recursive '--exclude=checkpoints/.*|\.claim-.*'
}
