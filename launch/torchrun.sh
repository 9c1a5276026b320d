#!/usr/bin/env bash
# Train on all GPUs of this node, or of several:
#
#   launch/torchrun.sh my-run.yaml [section.key=value ...]
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first-node launch/torchrun.sh my-run.yaml    # NODE_RANK=1 on the other node
#
# Also read: NPROC_PER_NODE (number of GPUs, or of cores without GPUs), MASTER_PORT (29500), MAX_RESTARTS (0),
# PYTHON. To stop with a checkpoint: `qlora-dist cancel NAME`, or end this process with SIGTERM.
set -euo pipefail
(($# > 0)) || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }

nodes="${NNODES:-1}"
if [[ "$nodes" == 1 ]]; then
  where=(--standalone) # a free port on this node
else
  where=(
    --node-rank "${NODE_RANK:?is the number of this node, from 0}"
    --master-addr "${MASTER_ADDR:?is the name or address of node 0}"
    --master-port "${MASTER_PORT:-29500}"
  )
fi

# A signal for the ranks, such as SLURM's before a time limit, would end torchrun and leave them behind. A signal ignored
# here stays ignored in torchrun, and the ranks handle it again.
trap '' USR1 USR2
exec "${PYTHON:-python}" -m qlora_dist.launch.agent \
  --nnodes "$nodes" --nproc-per-node "${NPROC_PER_NODE:-auto}" --max-restarts "${MAX_RESTARTS:-0}" "${where[@]}" \
  -m qlora_dist train "$@"
