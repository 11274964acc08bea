#!/usr/bin/env bash
# One model on several ranks, under mpirun on a CPU device: the same losses, checkpoints and samples as
# on one, whatever the placement; ranks that die; what is wrong told in one line.
#   tests/ranks.sh [BUILD_DIR]     default: build
# A line a case; the last line is "N passed, N failed". Exit 77 where there is no MPI.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
build=$(cd "${1:-$root/build}" && pwd) || exit 1
ditmoe=$build/ditmoe
command -v mpirun >/dev/null || { echo "no mpirun here"; exit 77; }
[ -f "$build/ditmoe_mpi.so" ] || { echo "built without MPI"; exit 77; }
work=$(mktemp -d /tmp/ditmoe-ranks-XXXXXX)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
passed=0 failed=0
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_btl_vader_single_copy_mechanism=none

ok() { printf 'ok      %s\n' "$1"; passed=$((passed + 1)); }
bad() {
    printf 'FAILED  %s: %s\n' "$1" "$2"
    failed=$((failed + 1))
    tail -n 8 err 2>/dev/null | sed 's/^/    /'
}
run() { timeout 60 "$@" >out 2>err </dev/null; status=$?; }
ranks() { # ranks N COMMAND...
    local n=$1
    shift
    run mpirun --oversubscribe --bind-to none -n "$n" "$ditmoe" "$@"
}
# one line of ours that matches, and a status that is not 0
complains() { # complains NAME PATTERN
    local lines
    lines=$(grep -c '^ditmoe' err)
    if [ "$status" -eq 0 ] || [ "$status" -eq 124 ]; then
        bad "$1" "exit status $status"
    elif [ "$lines" -ne 1 ]; then
        bad "$1" "$lines lines of message, not 1"
    elif ! grep -Eq -- "^ditmoe.*$2" err; then
        bad "$1" "no message like '$2'"
    else
        ok "$1"
    fi
}

idx() { # idx DIRECTORY: 64 training images of 28x28 in 10 classes
    mkdir -p "$1"
    { printf '\x00\x00\x08\x03\x00\x00\x00\x40\x00\x00\x00\x1c\x00\x00\x00\x1c'
      head -c $((64 * 784)) "$root/kernels.cl"; } >"$1/train-images-idx3-ubyte"
    { printf '\x00\x00\x08\x01\x00\x00\x00\x40'
      for ((i = 0; i < 64; i++)); do printf "\\x0$((i % 10))"; done; } >"$1/train-labels-idx1-ubyte"
}
idx data
model=(--layers 2 --hidden 32 --heads 2 --patch 8 --experts 4 --topk 2 --shared 1)
train=(train "${model[@]}" --data data --batch 6 --sample-every 0 --device opencl:0)

# Largest relative difference of loss, gradient norm and balance between two logs, and the rows compared.
difference() {
    awk -F, 'function rel(a, b) { a -= b; if (a < 0) a = -a; return b < 0 ? -a / b : a / b }
        NR == FNR { loss[$1] = $2; norm[$1] = $3; balance[$1] = $5; next }
        FNR > 1 { n++; d = rel($2, loss[$1]); if (d > m) m = d; d = rel($3, norm[$1]); if (d > m) m = d
                  d = rel($5, balance[$1]); if (d > m) m = d; if ($2 == "nan") m = 1 }
        END { printf "%d %.3g\n", n, m }' "$1" "$2"
}
# same NAME RUN REFERENCE STEPS: every step's figures within 1e-5
same() {
    local d
    [ "$status" -eq 0 ] || { bad "$1" "exit status $status"; return; }
    d=$(difference "$3/log.csv" "$2/log.csv")
    if awk -v d="${d#* }" -v n="${d% *}" -v steps="$4" 'BEGIN { exit !(n == steps && d < 1e-5) }'; then
        ok "$1 (off by ${d#* })"
    else
        bad "$1" "rows and largest relative difference: $d"
    fi
}

# ---- equal losses ---------------------------------------------------------------------------------------
run "$ditmoe" "${train[@]}" --steps 50 --out one
[ "$status" -eq 0 ] && ok "one process, the reference" || bad "one process" "exit status $status"
for n in 2 3 4; do
    ranks $n "${train[@]}" --steps 50 --out "uniform$n"
    same "$n ranks, uniform" "uniform$n" one 50
done
place() { # place FILE RANKS SHARES GROUPS
    printf '{"ditmoe_placement": 1, "ranks": %s, "layers": 2, "experts": 4, "batch": 6, "shares": %s, "groups": %s}' \
        "$2" "$3" "$4" >"$1"
}
place unequal.json 3 '[3, 1, 2]' '[{"ranks": [0, 1, 2], "owner": [[2, 0, 1, 0], [1, 1, 1, 1]]}]'
place empty.json 3 '[2, 0, 4]' '[{"ranks": [0, 1, 2], "owner": [[1, 0, 1, 1], [1, 2, 1, 0]]}]'
place first.json 2 '[0, 6]' '[{"ranks": [0, 1], "owner": [[0, 0, 0, 0], [0, 0, 0, 0]]}]'
place copies.json 2 '[4, 2]' '[{"ranks": [0], "owner": [[0, 0, 0, 0]]}, {"ranks": [1], "owner": [[1, 1, 1, 1]]}]'
place mixed.json 4 '[2, 1, 1, 2]' '[{"ranks": [0, 1], "owner": [[0, 1, 0, 1], [1, 0, 2, 0]]},
    {"ranks": [2, 3], "owner": [[2, 3, 0, 3], [3, 3, 2, 0]]}]'
for case in "unequal 3" "empty 3" "first 2" "copies 2" "mixed 4"; do
    set -- $case
    ranks "$2" "${train[@]}" --steps 50 --out "$1" --placement "$1.json"
    same "$2 ranks, placement $1" "$1" one 50
done
