#!/usr/bin/env bash
# `catversion batch` as a workload of a GKE cluster with TPUs, through xpk; fleets.md says how.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"

usage() {
  cat << 'END'
usage: launch/gke_xpk.sh COMMAND [--dry-run]

  image           build IMAGE from this checkout and push it
  run [FLAG...]   start `catversion batch FLAG...` on the hosts of one slice
  logs            follow what all hosts print
  collect         bring the results back; at any time
  delete          delete the workload; the cluster stays

--dry-run prints the commands and runs none.

settings, from the environment, and their defaults
  NAME         none: of the workload and of the run
  CLUSTER      none: made with `xpk cluster create` (run, delete)
  IMAGE        none: REGION-docker.pkg.dev/PROJECT/REPOSITORY/catversion:TAG (image, run)
  BUCKET       none: gs://...; what is done outlives the hosts there (run, collect)
  ACCELERATOR  v5litepod-8
  PROJECT      gcloud's
  ZONE         gcloud's
  CONCEPTS     concepts: a folder that holds concepts.jsonl and the photos it names
  CONFIG       sd15
  OUT          runs/NAME: where collect puts the results
END
}

COMMANDS='image, run, logs, collect or delete; see --help'
parse "$@"
set -- "${arguments[@]}"
command=${1:-}
[[ -n $command ]] || die "no command; expected $COMMANDS"
shift
case $command in
  image | logs | collect | delete)
    (($# == 0)) || die "$command takes no argument, got $1; settings are environment variables, see --help"
    ;;
  run) ;;
  *) die "$command: no such command; expected $COMMANDS" ;;
esac

require_cluster() {
  [[ -n ${CLUSTER:-} ]] || die "CLUSTER: not set; expected the name of a cluster made with xpk cluster create"
}

require_image() {
  [[ -n ${IMAGE:-} ]] ||
    die "IMAGE: not set; expected where to push to, such as IMAGE=us-west4-docker.pkg.dev/PROJECT/images/catversion:1"
}

: "${ACCELERATOR:=v5litepod-8}" "${CONCEPTS:=concepts}" "${CONFIG:=sd15}"
place=(${PROJECT:+"--project=$PROJECT"} ${ZONE:+"--zone=$ZONE"})

case $command in
  image)
    require_image
    run docker build --platform=linux/amd64 --file="$here/Dockerfile" --tag="$IMAGE" "$here/.."
    run docker push "$IMAGE"
    ;;
  run)
    require_name
    require_cluster
    require_image
    require_bucket
    require_concepts
    upload_concepts
    # `exec`: xpk sends SIGTERM to what it starts, and that has to be the worker. xpk restarts the workload where a
    # host is lost or ends with 42 or 127 to 255, so with 143 after a preemption, and gives up at 1, a user's mistake.
    run xpk workload create --cluster="$CLUSTER" --workload="$NAME" "${place[@]}" --tpu-type="$ACCELERATOR" \
      --docker-image="$IMAGE" --max-restarts=100 \
      --command="cd /catversion && hosts=\${TPU_WORKER_HOSTNAMES:-me} && hosts=\${hosts//[!,]/} && \
exec $(worker "\${TPU_WORKER_ID:-0}" "\$((\${#hosts} + 1))" "$@")"
    ;;
  logs)
    require_name
    run kubectl logs --follow --prefix --tail=100 --max-log-requests=64 --selector="xpk.google.com/workload=$NAME" \
      --container=jax-tpu
    ;;
  collect)
    require_name
    require_bucket
    : "${OUT:=runs/$NAME}"
    collect
    ;;
  delete)
    require_name
    require_cluster
    run xpk workload delete --cluster="$CLUSTER" --workload="$NAME" "${place[@]}"
    ;;
esac
