#!/bin/bash
# FAT5 on several nodes with torchrun. Copy this file, and run it on every node within ten minutes; only NODE_RANK differs:
#
#   node 0:  NODES=2 NODE_RANK=0 HEAD=10.0.0.1 bash nodes.sh pretrain --config fr/base --output_dir /shared/runs/base
#   node 1:  NODES=2 NODE_RANK=1 HEAD=10.0.0.1 bash nodes.sh pretrain --config fr/base --output_dir /shared/runs/base
#
# NODES      number of nodes                          HEAD       address of node 0, as the others reach it
# NODE_RANK  0, 1, … (one number a node)              PORT       a free port on node 0
# PROCESSES  processes on each node; auto: one a GPU  (without a GPU: one a core)
#
# Needs: the same FAT5 and PyTorch on all nodes; output_dir and the shards on a file system that all of them see;
# data.packs_per_step a multiple of data.packs_per_micro_batch times the number of all processes.
# Stop:  SIGTERM to the torchrun of any one node. All nodes finish the step, save and end; torchrun exits with 1.
# Go on: the same commands, on these or other nodes. If a node dies, the others end by themselves.
# Where a node has several networks, name one: export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0
set -u

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Seconds for a step and a save after SIGTERM. Older versions of torchrun do not read it, and kill after 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

exec torchrun --nnodes "$NODES" --node-rank "$NODE_RANK" --master-addr "$HEAD" --master-port "${PORT:-29500}" \
    --nproc-per-node "${PROCESSES:-auto}" -m fat5 "$@"
