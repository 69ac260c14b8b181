#!/bin/bash
# FAT5 on N nodes under Slurm. Copy this file, adapt the lines below to the cluster, and submit it:
#
#   sbatch --nodes 2 --partition gpu slurm.sh pretrain --config fr/base --output_dir /shared/runs/base
#
# Slurm starts one process for each GPU, without torchrun, so its signals reach FAT5 directly.
# Time limit:  300 seconds before it, SIGUSR1. FAT5 finishes the step, saves, exits with 138, and the job queues again.
# Preemption:  SIGTERM (or SIGUSR1, with send_user_signal). FAT5 saves, exits with 143 (138), and the job queues again.
# Dead node:   Slurm queues the job again (--requeue); it continues from the last checkpoint.
# scancel:     SIGTERM. FAT5 saves if a step and a save fit into KillWait (30 s by default); the job stays cancelled.
# Any other exit code (2: something to mend, named in the log) ends the job.
#
#SBATCH --job-name=fat5
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Processes and GPUs of a node must be as many as each other: sbatch --ntasks-per-node 4 --gpus-per-node 4 …
# output_dir and the shards must lie on a file system that all nodes see. The requeued job runs the same command, which
# continues the run. A step and a save that take longer than 300 s need an earlier signal: sbatch --signal USR1@900 …
set -u

# source /path/to/environment/bin/activate     # if the environment of the submitting shell is not inherited
# export NCCL_SOCKET_IFNAME=ib0                 # where a node has several networks

# What torchrun would say to the processes; RANK and LOCAL_RANK differ, and are set by each of them.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# A script that ends takes the processes with it, so it outlasts SIGTERM until they have saved.
trap : TERM

# All processes see all GPUs of their node, and take the one of their LOCAL_RANK. If one dies, the others end within
# seconds by themselves; --wait ends those that hang in the GPU.
srun --kill-on-bad-exit=0 --wait=60 --gpu-bind=none --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec fat5 "$@"' fat5 "$@"
code=$?

# A job that ends within the grace period of a preemption counts as finished, so it asks to be queued again itself. One
# that the user cancelled is not RUNNING any more.
if [[ $code == 138 || $code == 143 ]]; then
    if scontrol show job "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING'; then
        echo "fat5: stopped and saved (exit code $code); job $SLURM_JOB_ID is queued again"
        scontrol requeue "$SLURM_JOB_ID" && exit 0
    fi
fi
exit "$code"
