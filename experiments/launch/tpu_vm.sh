#!/bin/bash
# A run on a slice of Cloud TPU VMs, from any machine with gcloud: requests the slice,
# starts the run on every worker, both until status.json says finished:
#
#   TPU=mot7b ZONE=us-west4-a TYPE=v5litepod-256 RUNTIME=v2-alpha-tpuv5-lite SPOT=1 \
#   SETUP='mountpoint -q /shared || sudo mount 10.0.0.2:/shared /shared' \
#   REPO=/shared/fusionlab CONFIG=configs/mot_chameleon.py:7b PRESET=tpu_v5e_256 \
#   WORKDIR=/shared/runs/mot7b bash experiments/launch/tpu_vm.sh --config.train.seed=1
#
# SETUP runs on every worker before each start. REPO has the repository and .venv.
# DRY_RUN=1 prints the command of the start. The slice stays when the run is done.
set -euo pipefail
: "${TPU:?is missing, a name for the slice}" "${ZONE:?is missing}"
: "${TYPE:?is missing, e.g. v5litepod-16}" "${RUNTIME:?is missing}"
: "${REPO:?is missing, folder of the repository on all workers}"
: "${CONFIG:?is missing, e.g. configs/mot_chameleon.py:7b}"
: "${WORKDIR:?is missing, a folder that all workers see}" "${PRESET:?is missing}"

at=("$TPU" --zone="$ZONE")
slice=(gcloud compute tpus queued-resources)
run=(.venv/bin/python -m experiments.run --config="$CONFIG" --workdir="$WORKDIR"
  --config.mesh.preset="$PRESET" "$@")
# A start that outlived its connection holds the TPU: it saves and leaves first.
python='^[^ ]*python -m experiments[.]run'
remote="{ ${SETUP:-true}; } && cd $(printf %q "$REPO") && \
{ timeout 600 bash -c \"while pkill -f '$python'; do sleep 5; done\" || \
pkill -KILL -f '$python' || true; } && $(printf '%q ' "${run[@]}")"
start=(gcloud compute tpus tpu-vm ssh "${at[@]}" --worker=all --command="$remote")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${start[@]}" && echo
  exit
fi

tell=(gcloud compute tpus tpu-vm ssh "${at[@]}" --worker=0
  --command="cat $(printf %q "$WORKDIR")/status.json || echo none")
failed=-1 # step that the last start came to, if it failed
while :; do
  state=$("${slice[@]}" describe "${at[@]}" --format='value(state.state)' || :)
  case $state in
    FAILED | SUSPENDED) "${slice[@]}" delete "${at[@]}" --force --quiet || : ;;
    "") "${slice[@]}" create "${at[@]}" --node-id="$TPU" --runtime-version="$RUNTIME" \
      --accelerator-type="$TYPE" ${SPOT:+--spot} || : ;;
  esac
  if [ "$state" = ACTIVE ]; then
    code=0
    "${start[@]}" || code=$?
    said=$("${tell[@]}") || said= # the slice is gone
    step=$(sed -n 's/.*"step": \([0-9]*\).*/\1/p' <<<"$said")
    case $said in
      *'"status": "finished"'*) exit "$code" ;;
      *'"status": "preempted"'* | "") failed=-1 ;;
      *) [ "$code" -eq 0 ] || [ "${step:-0}" -gt "$failed" ] || {
        echo "failed again at step $failed of $WORKDIR: not started again" >&2
        exit "$code"
      }
      failed=${step:-0} ;;
    esac
  fi
  sleep "${PAUSE:-60}"
done
