#!/bin/bash
# Train on several machines of a SLURM cluster:  DATA=/shared/photos RUN=/shared/runs/photos sbatch examples/slurm.sh
# What follows the name of this file goes to `ddpmctl train`. DATA and RUN lie where all machines see them.
#SBATCH --job-name=ddpmctl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --array=1-5%1
#SBATCH --output=%x-%A-%a.log
# One task a machine: torchrun starts a process for each GPU. --array=1-5%1: five stretches of a day, one after another;
# each saves before its time is over (--max-time), the next goes on, and those left over find nothing to do.
set -eu
: "${DATA:?a folder or .zip of images}" "${RUN:?the run folder}"

resume=()
if [ -e "$RUN/run.yaml" ]; then resume=(--resume); fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# --max-restarts: when a process dies, all start again, and go on from the newest checkpoint.
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$first:${PORT:-29500}" --rdzv-id "$SLURM_JOB_ID" \
  -m ddpmctl train "$DATA" --out "$RUN" --max-time 23h30m "${resume[@]}" "$@"
