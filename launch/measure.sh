#!/usr/bin/env bash
# Measure this machine in one call, for docs/performance.md: what is installed, the attention kernels against float32,
# the step at several sizes with its compile times (beside PyTorch where that is installed), a profile, the mini model
# from photos to pictures, and how fast pictures are drawn. What fails is said in the report, and does not keep the rest
# from running.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "${BASH_SOURCE[0]%/*}/lib.sh"

usage() {
  cat <<'USAGE'
launch/measure.sh OUT [--config=CONFIG] [--first=1x2] [--sizes=16x2,4x2,32x2] [--dry-run]

  OUT       folder for report.md, its numbers as JSON, the profile and the mini model's pictures
  --config  the config to time; if not set, as `catversion bench`: Stable Diffusion 1.5, on a CPU the mini model
  --first   the size that is timed first, beside PyTorch, and profiled
  --sizes   those that follow, most wanted first; "" for none

It runs the catversion on the PATH. PyTorch is timed if PYTHON, by default python3, has it and diffusers.
USAGE
}

parse "$@"
out='' first=1x2 sizes=16x2,4x2,32x2 config=()
for argument in "${arguments[@]}"; do
  case $argument in
    --config=*) config=("$argument") ;;
    --first=*) first=${argument#*=} ;;
    --sizes=*) sizes=${argument#*=} ;;
    -*) die "$argument: expected --config, --first, --sizes or --dry-run; see --help" ;;
    *) [[ -z $out ]] || die "$argument: expected one folder"; out=$argument ;;
  esac
done
[[ -n $out ]] || die "OUT: missing; expected a folder for the report; see --help"
report=$out/report.md failed=0
if [[ -z $dry_run ]]; then
  command -v catversion > /dev/null || die "catversion: not on the PATH; pip install it, or activate its environment"
  mkdir -p "$out"
  printf '# Measured on %s\n' "$(date -u +%F)" > "$report"
fi

# A part of the report: its title, then the command, whose output goes there.
part() {
  local title=$1 begun=$SECONDS status=0
  shift
  if [[ -n $dry_run ]]; then quoted "$@"; return; fi
  # shellcheck disable=SC2016 # a dollar sign of Markdown
  printf '\n## %s\n\n```console\n$ %s\n```\n\n' "$title" "$(quoted "$@")" >> "$report"
  "$@" | sed 's/\x1b\[[0-9;]*m//g' >> "$report" || status=$?
  printf '\n%s s' $((SECONDS - begun)) >> "$report"
  if ((status)); then
    printf ', FAILED with status %s' "$status" >> "$report"
    failed=1
  fi
  printf '\n' >> "$report"
}

vs=()
if "${PYTHON:-python3}" -c 'import diffusers, torch, transformers' 2> /dev/null; then vs=(--vs=torch); fi
teapot=${BASH_SOURCE[0]%/*}/../catversion_jax/concepts/teapot

part "What is installed" catversion doctor
part "Attention kernels against float32" catversion bench --kernels "${config[@]}" --out="$out/kernels.json"
part "The step, $first" catversion bench "${config[@]}" --sizes="$first" "${vs[@]}" --out="$out/first.json" --trace="$out/trace"
part "The mini model, from photos to pictures" catversion train --config=mini --config.run_dir="$out/mini" \
  --config.concept.class_word=teapot --config.data.dir="$teapot/train" --config.data.masks_dir="$teapot/train_masks"
part "Pictures" catversion bench "${config[@]}" --pictures=1,8 --out="$out/pictures.json"
if [[ -n $sizes ]]; then
  part "The step, more sizes" catversion bench "${config[@]}" --sizes="$sizes" --out="$out/sizes.json"
fi
[[ -n $dry_run ]] || printf '%s\n' "$report"
exit "$failed"
