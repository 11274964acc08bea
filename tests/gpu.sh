#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU: the tests three ways (tuned, portable, through OpenCL), the op
# suites under compute-sanitizer, equal losses on all backends, and bf16 beside f32.
#   tests/gpu.sh [BUILD_DIR [PART...]]    default: build, all parts
# PARTS: tuned portable opencl memcheck initcheck racecheck losses bf16. A line a part; the last line is
# "N passed, N failed, N skipped". Exit 0: none failed; 77: no GPU. DITMOE_DATA: Fashion-MNIST's files
# (default /usr/share/datasets/fashion-mnist).
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
build=$(cd "${1:-$root/build}" && pwd) || exit 1
[ $# -gt 0 ] && shift
parts=${*:-tuned portable opencl memcheck initcheck racecheck losses bf16}
data=${DITMOE_DATA:-/usr/share/datasets/fashion-mnist}
ops="gemm conv pool layers attention moe fused halves train_ops"
work=$(mktemp -d /tmp/ditmoe-gpu-XXXXXX)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0 skipped=0

"$build/ditmoe" devices >"$work/devices" 2>&1
grep -q '^ *cuda:0 ' "$work/devices" || { echo "no CUDA device here"; exit 77; }
twin=$(awk '/^ *cuda:0 /{on=1} on && $1=="twin"{print $2; exit}' "$work/devices")
cpu=$(awk '$1 ~ /^opencl:/{key=$1} $1=="kind" && $2 ~ /^CPU/{print key; exit}' "$work/devices")

ok() { printf 'ok      %-10s %s\n' "$1" "$2"; passed=$((passed + 1)); }
skip() { printf 'skipped %-10s %s\n' "$1" "$2"; skipped=$((skipped + 1)); }
bad() {
    printf 'FAILED  %-10s %s\n' "$1" "$2"
    failed=$((failed + 1))
    [ -s "$work/log" ] && grep -E '^FAILED|^    |=====|ditmoe' "$work/log" | head -n 20 | sed 's/^/    /'
}

# suites NAME COMMAND...: its last line is a tally, of which nothing may have failed
suites() {
    local name=$1 start=$SECONDS tally
    shift
    "$@" >"$work/log" 2>&1
    local status=$?
    tally=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$work/log" | tail -n 1)
    if [ $status -eq 0 ] && [ -n "$tally" ]; then
        ok "$name" "$tally ($((SECONDS - start)) s)"
    else
        bad "$name" "exit $status, ${tally:-no tally} ($((SECONDS - start)) s)"
    fi
}

# What the sanitizer watches is slowed down by 10 to 100 times: fewer tests for the slower tools.
sanitizer() { # sanitizer TOOL SUITES...
    local tool=$1 program=
    shift
    program=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
    [ -n "$program" ] || { skip "$tool" "no compute-sanitizer here"; return; }
    # --error-exitcode: found errors are a failure whatever the tests say
    suites "$tool" "$program" --tool "$tool" --error-exitcode 9 --print-limit 10 \
        "$build/ditmoe_test" --device cuda:0 "$@"
}

# run_losses KEY DIRECTORY OPTION...: trains and leaves DIRECTORY/log.csv
run_losses() {
    local key=$1 dir=$2
    shift 2
    "$build/ditmoe" train --device "$key" --out "$dir" --data "$work/data" --sample-every 0 \
        --checkpoint-every 0 --seed 1 "$@" >"$work/log" 2>&1
}

# 256 images of noise, so that no data set is needed: every device sees the same.
make_data() {
    mkdir -p "$work/data"
    local name
    for name in train t10k; do
        { printf '\x00\x00\x08\x03\x00\x00\x01\x00\x00\x00\x00\x1c\x00\x00\x00\x1c'
          head -c $((256 * 784)) "$build/ditmoe"; } >"$work/data/$name-images-idx3-ubyte"
        { printf '\x00\x00\x08\x01\x00\x00\x01\x00'
          for ((i = 0; i < 256; i++)); do printf "\\x0$((i % 10))"; done; } >"$work/data/$name-labels-idx1-ubyte"
    done
}

# The first 20 losses in f32 agree between backends to 1e-4 of their size.
losses() {
    local key worst first=
    make_data
    for key in cuda:0 $twin $cpu; do
        if ! run_losses "$key" "$work/losses-$key" --model S/4-8E2A --layers 4 --batch 8 --steps 20 --lr 1e-3; then
            bad losses "training on $key failed"
            return
        fi
        [ -n "$first" ] || { first=$key; continue; }
        worst=$(paste -d, <(cut -d, -f2 "$work/losses-$first/log.csv") <(cut -d, -f2 "$work/losses-$key/log.csv") |
            awk -F, 'NR > 1 { d = ($1 > $2 ? $1 - $2 : $2 - $1) / $1; if (d > m) m = d; n++ }
                     END { print n == 20 ? m : "not 20 losses" }')
        if awk -v d="$worst" 'BEGIN { exit !(d + 0 == d && d <= 1e-4) }'; then
            ok losses "20 losses of $key agree with $first to $worst"
        else
            bad losses "20 losses of $key and $first differ by $worst"
        fi
    done
}

bf16() {
    [ -e "$data/train-images-idx3-ubyte.gz" ] || [ -e "$data/train-images-idx3-ubyte" ] ||
        { skip bf16 "no Fashion-MNIST in $data"; return; }
    local line
    if line=$("$root/tests/bf16_tracks.sh" "$build/ditmoe" "$data" cuda:0 2>"$work/log"); then
        ok bf16 "$line"
    else
        bad bf16 "$line"
    fi
}

for part in $parts; do
    : >"$work/log"
    case $part in
    tuned) suites tuned "$build/ditmoe_test" --device cuda:0 ;;
    portable) suites portable "$build/ditmoe_test" --device cuda:0 --portable ;;
    opencl)
        if [ -n "$twin" ]; then suites opencl "$build/ditmoe_test" --device "$twin"
        else skip opencl "this GPU has no OpenCL driver"; fi ;;
    memcheck) sanitizer memcheck $ops ;;
    initcheck) sanitizer initcheck $ops ;;
    racecheck) sanitizer racecheck $ops ;;
    losses) losses ;;
    bf16) bf16 ;;
    *) echo "no part '$part'"; exit 2 ;;
    esac
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
