#!/bin/bash
# shellcheck disable=SC1091,SC2329  # a line of slurm.setup is not here to be followed; the trap calls stop
# gistembed-base on Slurm: sbatch THIS_FILE, in a folder that all nodes share; relative paths of the recipe start there.
# 8 to 16 workers, each with 1 GPU, 8 CPU and 13 GB; 8 a node: 1 to 2 nodes
# Memory estimated; BAAI/bge-base-en-v1.5 and WhereIsAI/UAE-Large-V1 not found here: 335 M parameters each assumed.
# How to use it: docs/cluster.md
#SBATCH --job-name=gistembed-base
#SBATCH --nodes=1-2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Exclusive nodes: ray symmetric-run refuses a node with another Ray on it, and its `ray stop` ends all of a user's.
set -euo pipefail
source .venv/bin/activate
run_dir=runs/gistembed-base

export NCCL_DEBUG=WARN
export RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR=1
export RAY_TRAIN_ENABLE_STATE_TRACKING=1
# Without the token anyone who reaches these nodes could run code on them.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600 RAY_USAGE_STATS_ENABLED=0
export RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"

# This script runs on the first node, which becomes the head. Its name may stand for 127.0.1.1 in its own hosts file.
head_ip=$(hostname -I | awk '{print $1; exit}')
address="$head_ip:6379"

recipe="$PWD/.gistembed-base-$SLURM_JOB_ID.yaml"
cat > "$recipe" <<'END_OF_RECIPE'
name: gistembed-base
seed: 0
student:
  model: BAAI/bge-base-en-v1.5
  max_tokens: 512
  precision: bf16
guide:
  model: WhereIsAI/UAE-Large-V1
  max_tokens: 512
  precision: bf16
  mode: cache
data:
  sources:
  - path: avsolatorio/medi-data-mteb_avs_triplets
    revision: 238a0499b6e6b690cc64ea56fde8461daa8341bb
    columns:
      anchor: query
      positive:
      - pos
      negatives:
      - neg
    split_by: task_name
  mixing: homogeneous
batch:
  global_size: 16384
  chunk_tokens: 65536
  activation_gb: 20.0
loss:
  temperature: 0.01
optim:
  learning_rate: 5.0e-06
  warmup_ratio: 0.1
  epochs: 10.0
checkpoint:
  every_steps: 50
evaluate:
  tasks:
  - STSBenchmark
  - SICK-R
  - Banking77Classification
  - SciFact
cluster:
  num_workers:
  - 8
  - 16
  gpus_per_worker: 1
  cpus_per_worker: 8
END_OF_RECIPE

srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task=64 \
  ray symmetric-run --address "$address" --min-nodes "$SLURM_NNODES" \
  --num-cpus=64 --num-gpus=8 --object-store-memory=4000000000 -- \
  gist-dist train "$recipe" "cluster.address=$address" &
srun=$!

time_is_up=false
stop() {
  time_is_up=true
  while kill -0 "$srun" 2> /dev/null; do  # again and again: a run that is only starting clears the file
    mkdir -p "$run_dir"
    touch "$run_dir/STOP"  # finish the step, write a checkpoint, end
    sleep 2
  done &
}
trap stop TERM

while true; do
  status=0
  wait "$srun" || status=$?
  kill -0 "$srun" 2> /dev/null || break  # else it was the signal that ended `wait`
done
rm -f "$recipe"
if "$time_is_up" && [ "$status" -ne 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"  # the same command goes on from that checkpoint
fi
exit "$status"
