#!/usr/bin/env bash
# `catversion batch` on a Cloud TPU VM of one host or many; tpu_vm.md says how.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"

usage() {
  cat << 'END'
usage: launch/tpu_vm.sh COMMAND [--dry-run]

  create          a TPU VM at once, or an error where there is no capacity
  queue           a TPU VM as soon as there is capacity
  setup           copy this checkout to every host and install it
  run [FLAG...]   start `catversion batch FLAG...` on every host, detached; where it runs already, nothing happens
  logs [HOST]     follow what all hosts print, or one: 0, 1, ...
  collect         bring the results back; at any time
  delete          delete the TPU VM and its place in the queue
  keep [FLAG...]  all of it: queue, setup and run, again after each preemption, until no concept is left; then collect
                  and delete

--dry-run prints the commands and runs none.

settings, from the environment, and their defaults
  NAME         none: of the VM and of the run
  BUCKET       none: gs://...; what is done outlives the VM there (run, collect, keep)
  ACCELERATOR  v5litepod-8
  VERSION      of the VM's image: the one for JAX on ACCELERATOR
  SPOT         yes: cheaper, and may be taken away at any time; or no
  PROJECT      gcloud's
  ZONE         gcloud's
  CONCEPTS     concepts: a folder that holds concepts.jsonl and the photos it names
  CONFIG       sd15
  OUT          runs/NAME: where collect puts the results
END
}

COMMANDS='create, queue, setup, run, logs, collect, delete or keep; see --help'
parse "$@"
set -- "${arguments[@]}"
command=${1:-}
[[ -n $command ]] || die "no command; expected $COMMANDS"
shift
case $command in
  create | queue | setup | collect | delete)
    (($# == 0)) || die "$command takes no argument, got $1; settings are environment variables, see --help"
    ;;
  logs) [[ $# -le 1 && ${1:-0} =~ ^[0-9]+$ ]] || die "logs takes the number of one host or nothing, got $*" ;;
  run | keep) ;;
  *) die "$command: no such command; expected $COMMANDS" ;;
esac

require_name
: "${ACCELERATOR:=v5litepod-8}" "${SPOT:=yes}" "${CONCEPTS:=concepts}" "${CONFIG:=sd15}" "${OUT:=runs/$NAME}"
case $SPOT in
  yes) spot=(--spot) ;;
  no) spot=() ;;
  *) die "SPOT=$SPOT: expected yes or no" ;;
esac
case $ACCELERATOR in # https://cloud.google.com/tpu/docs/runtimes
  v6e-*) image=v2-alpha-tpuv6e ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  v[234]-*) image=tpu-ubuntu2204-base ;;
  *) die "ACCELERATOR=$ACCELERATOR: expected v2-, v3-, v4-, v5litepod-, v5p- or v6e- and a size, such as v5litepod-8" ;;
esac
: "${VERSION:=$image}"
place=(${PROJECT:+"--project=$PROJECT"} ${ZONE:+"--zone=$ZONE"} --quiet)

create() {
  run gcloud compute tpus tpu-vm create "$NAME" "${place[@]}" \
    --accelerator-type="$ACCELERATOR" --version="$VERSION" "${spot[@]}"
}

queue() {
  run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${place[@]}" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$VERSION" "${spot[@]}"
}

delete() {
  local queued vm
  queued=$(quoted gcloud compute tpus queued-resources delete "$NAME" "${place[@]}" --force)
  vm=$(quoted gcloud compute tpus tpu-vm delete "$NAME" "${place[@]}")
  run_line "$queued || $vm" # the second: made by `create`
}

# On host $1, or all, the line of shell $2.
on_host() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${place[@]}" --worker="$1" \
    --ssh-flag='-o ServerAliveInterval=30' --command="$2"
}

setup() {
  local archive=${TMPDIR:-/tmp}/catversion-$NAME.tar.gz
  run tar --exclude=__pycache__ -czf "$archive" -C "$here/.." \
    setup.py pyproject.toml README.md LICENSE NOTICE catversion_jax configs launch &&
    run gcloud compute tpus tpu-vm scp "$archive" "$NAME:catversion.tar.gz" "${place[@]}" --worker=all &&
    on_host all 'mkdir -p catversion && tar -xzf catversion.tar.gz -C catversion && catversion/launch/install.sh tpu,gcs'
}

# By a host's number in the VM's metadata it takes the same share of the manifest each time. The status of an earlier
# run goes before the worker starts, unless one runs already: the lock is then taken, and the new worker ends at once.
start() {
  local metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes
  upload_concepts && on_host all "cd catversion && mkdir -p runs && \
host=\$(curl -sf -H Metadata-Flavor:Google $metadata/agent-worker-number) && \
hosts=\$(curl -sf -H Metadata-Flavor:Google $metadata/worker-network-endpoints) && hosts=\${hosts//[!,]/} && \
{ flock --nonblock runs/$NAME.lock rm -f runs/$NAME.status; \
PATH=\$PWD/.venv/bin:\$PATH setsid nohup $(worker "\$host" "\$((\${#hosts} + 1))" "$@") \
< /dev/null >> runs/$NAME.log 2>&1 & }"
}

logs() {
  on_host "${1:-all}" "tail -n 100 -F catversion/runs/$NAME.log | stdbuf -oL tr '\\r' '\\n' | \
sed -u \"s/^/\$(hostname): /\""
}

# Returns 0, or what the first host that failed ended with, or 255 where the connection was lost.
await_hosts() {
  on_host all "cd catversion && until [ -f runs/$NAME.status ]; do sleep 10; done; exit \$(cat runs/$NAME.status)"
}

# Of the request in the queue; nothing where there is none.
request_state() {
  run gcloud compute tpus queued-resources list "${place[@]}" --filter="name~/$NAME\$" --format='value(state.state)'
}

keep() {
  local state before=none status failures=0
  while true; do
    state=$(request_state) || state=unknown # the network is down, perhaps; asked again
    [[ $state == "$before" ]] || echo "$(date '+%F %T') $NAME: ${state:-not queued}"
    before=$state
    case $state in
      '') queue ;;
      SUSPENDED | FAILED) delete ;; # taken away; such a request is not filled again
      ACTIVE)
        if ! { setup && start "$@"; }; then
          ((++failures < 3)) || die "the VM is there but was not set up in 3 attempts, see above; it is paid for: \
fix that and keep on, or delete it"
        else
          failures=0 status=0
          await_hosts || status=$?
          if ((status == 0)); then
            collect
            delete
            return
          elif ((status != 255 && status != 143)); then # the connection, or the VM, is being taken away
            collect || true
            die "a host ended with status $status, see the logs; the VM is still there and paid for: \
fix that and keep on, or delete it"
          fi
        fi
        ;;
    esac
    sleep 60
  done
}

case $command in
  run)
    require_bucket
    require_concepts
    start "$@"
    ;;
  collect)
    require_bucket
    collect
    ;;
  keep)
    require_bucket
    require_concepts
    if [[ -n $dry_run ]]; then # one round of it
      request_state && queue && setup && start "$@" && await_hosts && collect && delete
    else
      keep "$@"
    fi
    ;;
  *) "$command" "$@" ;;
esac
