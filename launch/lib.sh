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

# Wait for a child, however often a signal interrupts that: its trap sets `interrupted`. Returns the child's status.
await() {
  local status
  while true; do
    interrupted=
    status=0
    wait "$1" || status=$?
    [[ -n $interrupted ]] || return "$status"
  done
}

# The manifest below CONCEPTS: there, or an error.
require_concepts() {
  [[ -f $CONCEPTS/concepts.jsonl ]] ||
    die "$CONCEPTS/concepts.jsonl: no such file; set CONCEPTS to the folder that holds concepts.jsonl and the photos"
}

# --- A run in a bucket: BUCKET/NAME/concepts goes to the hosts, BUCKET/NAME/host-I is what host I has done so far.

# The name becomes part of commands that remote shells read.
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
  run gcloud storage rsync --recursive "$CONCEPTS" "$store/concepts"
}

# What a host runs in the folder of the checkout, before and as the worker. The worker's first argument after this
# line is the host's index; the rest are flags of `catversion batch`.
fetch_concepts() {
  printf '%s\n' "mkdir -p concepts && gcloud storage rsync --recursive $store/concepts concepts"
}

batch_flags() {
  quoted --config="$CONFIG" --manifest=concepts/concepts.jsonl --distributed "$@"
}

# OUT/hosts is a mirror of the bucket; the hosts' shares of the manifest have no concept in common.
collect() {
  local hosts out
  hosts=$(quoted "$OUT/hosts") out=$(quoted "$OUT")
  run mkdir -p "$OUT/hosts" &&
    run gcloud storage rsync --recursive '--exclude=concepts/.*|.*/checkpoints\.tar$' "$store" "$OUT/hosts" &&
    run_line "cp -R $hosts/host-*/. $out && cat $hosts/host-*/report.jsonl > $out/report.jsonl"
}
