#!/bin/bash
# FAT5 on a machine that may be taken away, or a process that may die: runs the same command until it ends with 0.
#
#   bash spot.sh fat5 pretrain --config fr/base --output_dir /data/runs/base
#   bash spot.sh torchrun --nproc-per-node 8 -m fat5 pretrain --config fr/base --output_dir /data/runs/base
#
# FAT5 continues from its last checkpoint by itself, exactly; after it has finished, the same command ends with 0 at once.
# output_dir must outlive the machine: a network disk, or a disk that is attached to the next machine.
# Boot:      fat5.service, beside this file, starts FAT5 at boot and restarts it without this loop.
# Stop:      SIGTERM or Ctrl-C to this script. The command saves and ends, and the script ends with its exit code.
# Notice:    a machine that is taken away shuts down first, which sends SIGTERM. A step and a save must fit into the
#            provider's notice (30 s to 2 min); save_every bounds what is lost without one.
# Failures:  LIMIT ends in a row within QUICK seconds of the start, as of a wrong key (exit code 2), end the loop.
set -u

PAUSE=${PAUSE:-30} # seconds before the next start; the lock of another machine is stale after 60
LIMIT=${LIMIT:-5}
QUICK=${QUICK:-120}

child='' stopping='' failures=0
stop() {
    stopping=yes
    [ -n "$child" ] && kill -TERM "$child" 2>/dev/null
}
trap stop TERM INT HUP USR1

while [ -z "$stopping" ]; do
    began=$SECONDS
    # A session of its own, so that Ctrl-C arrives once: FAT5 leaves without saving at a second signal.
    setsid "$@" &
    child=$!
    wait "$child"
    code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal to this script interrupts `wait` while the command saves
        wait "$child"
        code=$?
    done
    if [ "$code" -eq 0 ] || [ -n "$stopping" ]; then exit "$code"; fi
    failures=$((SECONDS - began < QUICK ? failures + 1 : 0))
    if [ "$failures" -ge "$LIMIT" ]; then
        echo "spot.sh: $failures ends in a row within $QUICK s; the last exit code is $code" >&2
        exit "$code"
    fi
    echo "spot.sh: exit code $code; the same command again in $PAUSE s" >&2
    sleep "$PAUSE" &
    child=$!
    wait "$child"
done
exit 143
