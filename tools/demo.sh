#!/usr/bin/env bash
# The whole road once, on a fresh Debian or Ubuntu machine: installs what is missing, builds, trains a
# small DiT-MoE on Fashion-MNIST on the best device found, draws samples, and checks them.
#   tools/demo.sh           about ten minutes on two CPU cores, less with a GPU
# Writes demo/samples.png, demo/loss.png, demo/model.safetensors. A second run goes on where the first
# was stopped, or says that all is there. Run again from nothing: rm -r demo.
set -euo pipefail
cd "$(dirname "$0")/.."
data=/usr/share/datasets/fashion-mnist
run=demo/run

tools/setup.sh
if [ ! -x build/ditmoe ] || [ -n "$(find devices runtime model tools kernels.cl CMakeLists.txt -newer build/ditmoe -type f 2>/dev/null | head -n 1)" ]; then
    echo "demo: building" >&2
    mkdir -p build
    { cmake -S . -B build -G Ninja && cmake --build build --target ditmoe; } >build/demo-build.log 2>&1 ||
        { tail -n 20 build/demo-build.log >&2; exit 1; }
fi
if [ -s demo/samples.png ] && [ -s demo/loss.png ] && [ -s demo/model.safetensors ] && [ -s demo/knn.txt ]; then
    echo "demo: all is there: demo/samples.png, demo/loss.png, demo/model.safetensors" >&2
    cat demo/knn.txt
    exit 0
fi

# 4 blocks of width 128, 8 experts of which 2 act on each token, and a shared one: 7.3 M parameters.
# The rate is high and the averaging short because the run is short.
build/ditmoe train --model S/4-8E2A --layers 4 --hidden 128 --heads 4 --shared 1 \
    --data "$data" --out "$run" --steps 1400 --batch 48 --lr 2e-3 --warmup 50 --clip 1 --ema 0.995 \
    --checkpoint-every 200 --sample-every 400 --seed 1 --resume
cp "$run/loss.png" demo/loss.png
cp "$run/model.safetensors" demo/model.safetensors.part
build/ditmoe sample --ckpt "$run" --classes all --per-class 8 --steps 50 --cfg 3 --seed 1 \
    --batch 40 --out demo/samples.png
build/ditmoe eval knn --ckpt "$run" --data "$data" --per-class 20 --steps 50 --cfg 3 --seed 2 \
    --batch 50 >demo/knn.txt.part
mv demo/model.safetensors.part demo/model.safetensors
mv demo/knn.txt.part demo/knn.txt
cat demo/knn.txt
echo "demo: look at demo/samples.png and demo/loss.png" >&2
