#!/usr/bin/env bash
# `catversion batch` on the GPUs of this machine; local_gpu.md says how.
set -euo pipefail
set -m
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat << 'END'
usage: launch/local_gpu.sh [--split] [--dry-run] [FLAG...]

Runs `catversion batch FLAG...` as one process over all GPUs. The same command again skips what is done and resumes
the rest. SIGTERM and Ctrl-C save the state first.

--split     one process for each GPU, with its share of the manifest and its own log, OUT/logs/process-I.log; ends with
            the highest of their statuses
--dry-run   prints the commands and runs none

settings, from the environment, and their defaults
  CUDA_VISIBLE_DEVICES  all GPUs: which to use, such as 0,1
  CONCEPTS              concepts: a folder that holds concepts.jsonl and the photos it names
  CONFIG                sd15
  OUT                   runs/batch: where the results go
END
}

parse "$@"
split='' flags=()
for argument in "${arguments[@]}"; do
  case $argument in
    --split) split=yes ;;
    --*) flags+=("$argument") ;;
    *) die "$argument: expected --split, --dry-run or a flag of catversion batch; settings are environment variables" ;;
  esac
done
: "${CONCEPTS:=concepts}" "${CONFIG:=sd15}" "${OUT:=runs/batch}"
require_concepts
[[ -n $dry_run ]] || command -v catversion > /dev/null ||
  die "catversion: not found; install it and activate its environment: source .venv/bin/activate"

batch=(catversion batch --config="$CONFIG" --manifest="$CONCEPTS/concepts.jsonl" --config.run_dir="$OUT" "${flags[@]}")
if [[ -z $split ]]; then
  if [[ -n $dry_run ]]; then quoted "${batch[@]}"; else exec "${batch[@]}"; fi
  exit
fi

if [[ -z ${CUDA_VISIBLE_DEVICES:-} ]]; then
  CUDA_VISIBLE_DEVICES=$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | paste -sd,) &&
    [[ -n $CUDA_VISIBLE_DEVICES ]] || die "nvidia-smi lists no GPU; name them, such as CUDA_VISIBLE_DEVICES=0,1"
fi
IFS=, read -ra gpus <<< "$CUDA_VISIBLE_DEVICES"

pass_signals_on
export TQDM_MININTERVAL=30 # a log needs no bar that moves
run mkdir -p "$OUT/logs"
for i in "${!gpus[@]}"; do
  process=(env CUDA_VISIBLE_DEVICES="${gpus[i]}" "${batch[@]}" --num_processes="${#gpus[@]}" --process_id="$i")
  log=$OUT/logs/process-$i.log
  if [[ -n $dry_run ]]; then
    echo "$(quoted "${process[@]}") >> $(quoted "$log") 2>&1 &"
  else
    ((signals == 0)) || break
    spawn "${process[@]}" < /dev/null >> "$log" 2>&1
    echo "process $i on GPU ${gpus[i]}: $log"
  fi
done

worst=0
((signals == 0)) || worst=143
for i in "${!children[@]}"; do
  status=0
  await "${children[i]}" || status=$?
  ((status == 0)) || echo "process $i ended with status $status: $OUT/logs/process-$i.log" >&2
  ((status <= worst)) || worst=$status
done
exit "$worst"
