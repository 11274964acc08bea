#!/usr/bin/env bash
# The table of docs/performance.md for one NVIDIA GPU, all in one call: this program's steps first (seconds), then the PyTorch
# peer's (minutes: it compiles), each as it is known, then the ratios. Nothing else should run on the GPU.
#   tests/peer/gpu_table.sh BUILD_DIR PEER_FOLDER OUT_DIR
set -u
[ $# -eq 3 ] || { sed -n '4s/^#   /usage: /p' "$0" >&2; exit 2; }
bench="$1/ditmoe bench step --device cuda:0 --rounds 7" peer=$2 out=$3
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out" || exit 1
ours() { # ours NAME OPTION...: kept as JSON, each once
    local name=$1
    shift
    $bench "$@" --json >"$out/$name.json" && python3 "$here/peer_gpu.py" --show "$out/$name.json"
}
ours sample --precision bf16 --model S/2-8E2A,XL/2-8E2A --batch 16,128 --what sample
ours small --precision bf16 --model XL/2-8E2A --batch 1,2,4,8 --what sample
ours train --precision bf16 --model S/2-8E2A,B/2-8E2A --batch 128 --what train
ours train-xl --precision bf16 --model XL/2-8E2A --batch 32 --what train
ours train-xl-80 --precision bf16 --model XL/2-8E2A --batch 32 --what train --recompute --early-update
"$1/ditmoe" bench step --device opencl:0 --precision f32 --model S/2-8E2A --batch 128 --what sample --rounds 5 --steps 5 | tail -n 1
python3 "$here/peer_gpu.py" "$peer" "$out/peer.json" sample:S/2:16:reduce-overhead sample:S/2:128:default \
    sample32:S/2:128:eager sample:XL/2:16:reduce-overhead sample:XL/2:128:default train:S/2:128:default \
    train:B/2:128:default train:XL/2:32:default
python3 "$here/peer_gpu.py" --show "$out/sample.json" "$out/train.json" "$out/train-xl.json" --peer "$out/peer.json"
for precision in bf16 f32; do # features of images, beside PyTorch
    python3 "$here/peer_inception.py" "$out/inception-$precision.json" 32 128 $([ $precision = f32 ] && echo --f32)
    "$1/ditmoe" bench inception --device cuda:0 --precision $precision --batch 32,128 --compare "$out/inception-$precision.json"
done
python3 "$here/peer_vae.py" "$out/vae.json" # and decoding
"$1/ditmoe" bench vae --device cuda:0 --precision bf16 --batch 1,4,16 --image-size 256,512 --compare "$out/vae.json"
