#!/usr/bin/env bash
# Every test, on a fresh Debian or Ubuntu machine: installs what is missing, builds with gcc and clang,
# runs the op table, gradients, golden models, files, command line, sanitizers and oclgrind; where there
# is an NVIDIA GPU, tests/gpu.sh on it (else a line says that it was skipped).
#   tests/run.sh            everything               tests/run.sh quick    build and ditmoe_test only
# Ends with 'N passed, N failed, N skipped'; exit 0 when none failed. Logs: build*/log/.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
quick=${1:-}
passed=0 failed=0 skipped=0
tools/setup.sh --tests || { echo "0 passed, 1 failed, 0 skipped"; exit 1; }
mkdir -p build/log
export DITMOE_CACHE=$PWD/build/cache POCL_CACHE_DIR=$PWD/build/pocl-cache
mkdir -p "$DITMOE_CACHE" "$POCL_CACHE_DIR"

# step NAME COMMAND...: a command is one test, unless its last line is a tally, which is added instead
step() {
    local name=$1 log=build/log/$1.log start=$SECONDS code tally
    shift
    "$@" >"$log" 2>&1 </dev/null
    code=$?
    tally=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$log" | tail -n 1)
    if [ -n "$tally" ]; then
        set -- $(printf '%s' "$tally" | tr -dc '0-9 ')
        passed=$((passed + $1)) failed=$((failed + $2)) skipped=$((skipped + ${3:-0}))
        [ "$code" -ne 0 ] && [ "$2" -eq 0 ] && failed=$((failed + 1))
        grep -E '^FAILED|^skipped|^    ' "$log" | head -n 40
    elif [ "$code" -eq 77 ]; then
        skipped=$((skipped + 1)) tally="skipped: $(tail -n 1 "$log")"
    elif [ "$code" -eq 0 ]; then
        passed=$((passed + 1)) tally=ok
    else
        failed=$((failed + 1)) tally="FAILED (exit $code)"
        tail -n 20 "$log" | sed 's/^/    /'
    fi
    printf '%-12s %s (%d s)\n' "$name" "$tally" $((SECONDS - start))
}

build() { # build DIRECTORY CMAKE_ARGUMENTS...
    local dir=$1
    shift
    cmake -S . -B "$dir" -G Ninja "$@" && cmake --build "$dir"
}

asan() { # everything again under ASan and UBSan; leaks are looked for where no driver adds its own
    build build-asan -DCMAKE_BUILD_TYPE=RelWithDebInfo -DDITMOE_SANITIZE=ON || return 1
    export UBSAN_OPTIONS=halt_on_error=1
    ASAN_OPTIONS=detect_leaks=1 build-asan/ditmoe_test files/ images/ data/ torch/ interop/ fuzz/ npz/ \
        frechet/ latents/ plan/ topology/ placement/ policy/ cost/
}
asan_device() {
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
        build-asan/ditmoe_test devices/ transfers/ gemm/ pool/ layers/ attention/ conv/ moe/ experts/ fused/ \
        halves/ train_ops/ diffusion/ schedule/ sampler/ profile/ golden/ model/ streamed/ upcycle/ vae/ inception/features
}
asan_cli() {
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 tests/cli.sh build-asan
}

raced() { # oclgrind finds out-of-bounds accesses and races, but exits 0: its log decides
    local log=build/log/oclgrind-findings.log
    oclgrind --data-races --max-errors 20 --log "$log" \
        build/ditmoe_test --device opencl:0 model/smallest || return 1
    [ ! -s "$log" ] || { head -n 40 "$log"; return 1; }
}

cuda_declarations() { # what devices/cuda_api.h declares, against NVIDIA's headers
    cmake --build build --target help | grep -q cuda_declarations || { echo "no CUDA headers here"; return 77; }
    cmake --build build --target cuda_declarations
}

gpu() { # the tests on the first NVIDIA GPU: tuned, portable, OpenCL, sanitizers, losses
    tests/gpu.sh build
}

step build-gcc build build -DCMAKE_C_COMPILER=gcc
step tests build/ditmoe_test
if [ "$quick" != quick ]; then
    step layers tests/layers.sh
    step cli tests/cli.sh build
    step ranks tests/ranks.sh build
    step cuda-headers cuda_declarations
    step gpu gpu
    step build-clang build build-clang -DCMAKE_C_COMPILER=clang-14
    step asan asan
    step asan-device asan_device
    step asan-cli asan_cli
    step oclgrind raced
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
