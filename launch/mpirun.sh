#!/usr/bin/env bash
# Train on ranks that mpirun starts: Open MPI, MPICH or Intel MPI, whichever `mpirun` is first on the PATH.
#
#   launch/mpirun.sh -n 8 my-run.yaml [section.key=value ...]
#   launch/mpirun.sh -n 16 --hostfile hosts my-run.yaml         # arguments before the file are mpirun's
#
# Also read: PYTHON, MPIRUN. Needs mpi4py for that MPI (`pip install mpi4py`; the extra `mpi` brings MPICH too), or
# MASTER_ADDR and MASTER_PORT. To stop with a checkpoint: `qlora-dist cancel NAME`.
set -euo pipefail

options=()
while (($# > 0)) && [[ "$1" != *.yaml && "$1" != *.yml ]]; do
  options+=("$1")
  shift
done
(($# > 0)) || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2; }

mpirun="${MPIRUN:-mpirun}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # otherwise every rank computes on all cores

if [[ "$("$mpirun" --version 2>&1)" == *"Open MPI"* ]]; then
  # Ranks in the order of nodes, and not bound to a core each, because they have threads that read and tokenize.
  options+=(--map-by "slot${OVERSUBSCRIBE:+:OVERSUBSCRIBE}" --bind-to none)
  # Open MPI refuses to run as root, which is usual in containers, unless these are set.
  if ((EUID == 0)); then options+=(--allow-run-as-root); fi
  # Other nodes get only the variables named here. MPICH and Intel MPI forward all variables.
  for name in $(compgen -e); do
    case "$name" in
      PATH | PYTHONPATH | LD_LIBRARY_PATH | VIRTUAL_ENV | OMP_* | MASTER_* | NCCL_* | GLOO_* | TORCH_* | HF_* | CUDA_HOME)
        options+=(-x "$name")
        ;;
    esac
  done
fi
exec "$mpirun" "${options[@]}" "${PYTHON:-python}" -m qlora_dist train "$@"
