#!/usr/bin/env bash
# Fuzzes the readers of files, one after the other, from the committed corpora.
#   tests/fuzz/run.sh SECONDS [TARGET...]     each target for SECONDS; all targets by default
# Builds into build-fuzz (or $BUILD) with clang. Memory is bounded: 64 MB an allocation, 512 MB in all, for inputs of
# up to 64 KiB (PNG and JPEG: 4 KiB); an input that takes 10 s is a hang. What is found is left in $BUILD/found; exit 1 then.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
seconds=${1:?usage: tests/fuzz/run.sh SECONDS [TARGET...]}
shift
build=${BUILD:-build-fuzz}
clang=$(command -v clang clang-14 | head -n 1)
cmake -S . -B "$build" -G Ninja -DCMAKE_C_COMPILER="$clang" -DCMAKE_BUILD_TYPE=Release -DDITMOE_FUZZ=ON \
    -DDITMOE_CUDA_ARCHS= >/dev/null && cmake --build "$build" --target fuzzers || exit 1
mkdir -p "$build/found"
[ $# -gt 0 ] || set -- $(sed -n 's/^    X(\([a-z]*\)).*/\1/p' tests/fuzz/targets.h)
bad=0
for target in "$@"; do
    corpus=$build/corpus-$target
    mkdir -p "$corpus"
    dictionary=
    [ -e "tests/fuzz/$target.dict" ] && dictionary=-dict=tests/fuzz/$target.dict
    longest=65536
    case $target in png | jpeg) longest=4096 ;; esac # pixels may be a thousand times their file
    if "$build/fuzz_$target" -max_total_time="$seconds" -max_len=$longest -malloc_limit_mb=64 -rss_limit_mb=512 \
        -timeout=10 -artifact_prefix="$build/found/$target-" $dictionary "$corpus" "tests/fuzz/corpus/$target" \
        >"$build/$target.log" 2>&1; then
        tail -n 1 "$build/$target.log" | sed "s/^/$target: /"
    else
        bad=1
        echo "$target: FOUND something: $build/$target.log"
        grep -E "ERROR|SUMMARY|runtime error" "$build/$target.log" | head -n 3
    fi
done
exit $bad
