#!/usr/bin/env bash
# Does training in bf16 track training in f32? 500 steps of the same model, data and seed in both: the
# means of the last 50 losses may differ by 1%. Prints a line; exit 0 when they do not differ by more.
#   tests/bf16_tracks.sh DITMOE DATA_DIR DEVICE_KEY [TRAIN_OPTION...]
set -u
ditmoe=$1 data=$2 key=$3
shift 3
work=$(mktemp -d /tmp/ditmoe-bf16-XXXXXX)
trap 'rm -rf "$work"' EXIT
for precision in f32 bf16; do
    "$ditmoe" train --device "$key" --precision $precision --data "$data" --out "$work/$precision" \
        --model S/4-8E2A --layers 4 --batch 64 --lr 3e-4 --warmup 50 --steps 500 --seed 3 --sample-every 0 \
        --checkpoint-every 0 "$@" >&2 || { echo "training in $precision failed"; exit 1; }
done
mean() { tail -n 50 "$work/$1/log.csv" | awk -F, '{ s += $2 } END { printf "%.6f", s / NR }'; }
awk -v f="$(mean f32)" -v b="$(mean bf16)" 'BEGIN {
    d = (b - f) / f
    printf "mean of the last 50 of 500 losses: f32 %.5f, bf16 %.5f: %+.2f%%\n", f, b, 100 * d
    exit !(d < 0.01 && d > -0.01)
}'
