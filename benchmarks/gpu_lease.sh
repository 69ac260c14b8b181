#!/usr/bin/env bash
# Everything that one GPU can say in under ten minutes: compilations side by side, one lock around whatever is timed.
#   bash benchmarks/gpu_lease.sh OUTPUT_DIR [SECONDS]
# Wants about 140 GB of GPU memory for large and the longest context; shards for the run of `pretrain` are made before, on any
# machine, by `python benchmarks/gpu_shards.py .whl/data/shards`. A section that fails or is late is left out; logs tell.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
limit=${2:-570}
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}src" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4

left() { echo $((limit - SECONDS > 1 ? limit - SECONDS : 1)); }
training() { # name, then options of gpu_training.py; with ALONE=1 for sections that take no turns themselves
  local name=$1
  shift
  ${ALONE:+flock "$out/turn"} timeout "$(left)" python3 benchmarks/gpu_training.py --output_dir "$out/$name" --turn "$out/turn" --examples 512 --measured 4 \
    --seconds "$(left)" "$@" > "$out/$name.log" 2>&1
  echo "[$SECONDS s] $name"
}
alone() { flock "$out/turn" timeout "$(left)" "$@"; }
kernels() { # name, then a benchmark and its options
  local name=$1
  shift
  alone python3 "benchmarks/$1" --output_dir "$out/$name" "${@:2}" > "$out/$name.log" 2>&1
  echo "[$SECONDS s] $name"
}

training small --sections profile --presets fat5-small &
small=$!
training base --sections profile --presets fat5-base &
base=$!
# Half the rows of a padded batch: both models and the two above fit beside each other.
training hf --sections hf --stock_rows 16 &
hf=$!
wait $small $base
kernels attention gpu_attention.py --sections check,ceilings,tune,speed,cross,packed --seconds 110
wait $hf
training large --sections profile --presets fat5-large &
large=$!
ALONE=1 training pretrain --sections pretrain --run_steps 400 --run_seconds 130
wait $large
ALONE=1 training long --sections long --measured 3
ALONE=1 training encoder --sections encoder --stock_eager --measured 2
ALONE=1 training decode --sections decode --measured 2
kernels counters gpu_counters.py
alone python3 -m pytest tests/ops tests/train/test_cuda_graph.py -q -m "not slow" > "$out/tests.log" 2>&1
grep -hE "MFU|times the useful|new tokens/s|steps, last" "$out"/*.log
