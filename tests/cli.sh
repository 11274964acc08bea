#!/usr/bin/env bash
# The command line as a user meets it: exit codes, messages, bad input, kills, resumed runs.
#   tests/cli.sh [BUILD_DIR]     default: build
# A line a case; the last line is "N passed, N failed". Exit 0 when none failed.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
build=$(cd "${1:-$root/build}" && pwd) || exit 1
ditmoe=$build/ditmoe
work=$(mktemp -d /tmp/ditmoe-cli-XXXXXX)
mounted=
trap '[ -n "$mounted" ] && umount "$work/small"; rm -rf "$work"' EXIT
cd "$work" || exit 1
passed=0 failed=0

ok() { printf 'ok      %s\n' "$1"; passed=$((passed + 1)); }
bad() {
    printf 'FAILED  %s: %s\n' "$1" "$2"
    failed=$((failed + 1))
    tail -n 5 err 2>/dev/null | sed 's/^/    /'
}

# run COMMAND...: leaves status, out and err behind
run() { "$@" >out 2>err </dev/null; status=$?; }

# fails STATUS NAME PATTERN COMMAND...: exit status, one line of message that matches, nothing on stdout
fails() {
    local want=$1 name=$2 pattern=$3
    shift 3
    run "$@"
    local lines
    lines=$(grep -c '^ditmoe' err)
    if [ "$status" -ne "$want" ]; then
        bad "$name" "exit status $status, not $want"
    elif ! grep -Eq -- "$pattern" err; then
        bad "$name" "no message like '$pattern'"
    elif [ "$lines" -ne 1 ]; then
        bad "$name" "$lines lines of message, not 1"
    else
        ok "$name"
    fi
}

# works NAME COMMAND...
works() {
    local name=$1
    shift
    run "$@"
    if [ "$status" -eq 0 ]; then ok "$name"; else bad "$name" "exit status $status"; fi
}

# check NAME CONDITION...: a test command
check() {
    local name=$1
    shift
    if "$@" >/dev/null 2>&1; then ok "$name"; else bad "$name" "not so: $*"; fi
}

# ---- data: IDX files with any bytes for pixels -------------------------------------------------------
idx() { # idx DIRECTORY: 64 training and 16 test images of 28x28 in 10 classes
    mkdir -p "$1"
    local n name
    for name in train t10k; do
        n=64
        [ $name = t10k ] && n=16
        { printf "\\x00\\x00\\x08\\x03\\x00\\x00\\x00\\x$(printf %02x $n)\\x00\\x00\\x00\\x1c\\x00\\x00\\x00\\x1c"
          head -c $((n * 784)) "$ditmoe"; } >"$1/$name-images-idx3-ubyte"
        { printf "\\x00\\x00\\x08\\x01\\x00\\x00\\x00\\x$(printf %02x $n)"
          for ((i = 0; i < n; i++)); do printf "\\x0$((i % 10))"; done; } >"$1/$name-labels-idx1-ubyte"
    done
}
idx data
tiny=(--layers 2 --hidden 32 --heads 2 --patch 8 --experts 4 --topk 2 --shared 1)
train=("$ditmoe" train "${tiny[@]}" --data data --batch 4 --sample-every 0)

# ---- usage -------------------------------------------------------------------------------------------
works "ditmoe --help" "$ditmoe" --help
check "ditmoe --help fits a screen" test "$(wc -l <out)" -le 24
works "ditmoe --version" "$ditmoe" --version
for command in devices info train sample encode decode eval forward convert upcycle calibrate plan bench; do
    run "$ditmoe" $command --help
    if [ $status -eq 0 ] && grep -q "^usage: ditmoe $command" out && [ ! -s err ] &&
        [ "$(awk '{ if (length > m) m = length } END { print m }' out)" -le 100 ]; then
        ok "$command --help"
    else
        bad "$command --help" "status $status, not on stdout, or wider than 100 columns"
    fi
done
fails 2 "unknown command" "unknown command 'trian'; did you mean 'train'" "$ditmoe" trian
fails 2 "unknown option" "train: unknown option --expert; did you mean --experts" "$ditmoe" train --expert 8
fails 2 "unknown letter" "unknown option -q" "$ditmoe" train -q
fails 2 "no number" "^ditmoe train: --experts x: not a number$" "$ditmoe" train --experts x
fails 2 "half a number" "not a number" "$ditmoe" train --steps=10x
fails 2 "too large a number" "too large" "$ditmoe" train --batch 99999999999999999999
fails 2 "out of range" "--batch 0: out of range" "$ditmoe" train --batch 0
fails 2 "negative seed" "--seed -1" "$ditmoe" train --seed -1
fails 2 "missing value" "--out needs a value" "$ditmoe" train --out
fails 2 "choice" "not one of logit-normal, uniform, stratified" "$ditmoe" train --time noon
fails 2 "flag with a value" "--flip takes no value" "$ditmoe" train --flip=yes
fails 2 "no argument wanted" "unexpected argument 'x'" "$ditmoe" train x
fails 2 "argument wanted" "missing argument" "$ditmoe" info
fails 2 "no --out" "--out RUN_DIR is needed" "$ditmoe" train --data data
fails 2 "no --data" "--data PATH is needed" "$ditmoe" train --out run
fails 2 "nothing to write" "nothing to write" "$ditmoe" sample --ckpt x
fails 2 "bad preset" "ditmoe info: .*Q/2" "$ditmoe" info Q/2-8E2A
fails 2 "experts < topk" "ditmoe train: .*2 experts" "$ditmoe" train --data data --out no --experts 2 --topk 3
fails 2 "heads do not divide the width" "ditmoe train: " "${train[@]}" --out no --heads 5
fails 2 "patch does not divide the image" "ditmoe train: " "${train[@]}" --out no --patch 5
fails 2 "size of memory" "not a size" "${train[@]}" --out no --memory much

# ---- devices -----------------------------------------------------------------------------------------
fails 1 "unknown device" "opencl:99" "${train[@]}" --out no --device opencl:99
fails 1 "unknown kind of device" "abacus" "${train[@]}" --out no --device abacus:0
mkdir none
fails 1 "no OpenCL platform" "ditmoe train: " env OCL_ICD_VENDORS="$work/none" "${train[@]}" --out no
run env OCL_ICD_VENDORS="$work/none" "$ditmoe" devices
check "devices without a platform is no crash" test $status -le 1

# ---- topology ----------------------------------------------------------------------------------------
machines=$root/tests/topologies
works "topology of this machine" "$ditmoe" devices --topology
check "it has the device" grep -q '\[opencl:' out
works "topology of another" "$ditmoe" devices --topology --xml "$machines/dgx2.xml" --png dgx2.png
check "NVLink through switches" grep -q '^NVLink: 150 GB/s one way between any two of 16 GPUs' out
check "its figure" test -s dgx2.png
works "topology as JSON" "$ditmoe" devices --topology --json --xml "$machines/power8.xml"
check "which says NVLink" grep -q '"nvlink_host": 40000000000' out
fails 1 "no topology file" "none.xml: No such file" "$ditmoe" devices --topology --xml none.xml
echo "not XML" >bad.xml
fails 1 "no XML" "bad.xml: not a topology" "$ditmoe" devices --topology --xml bad.xml
fails 2 "--xml without --topology" "xml needs --topology" "$ditmoe" devices --xml bad.xml

# ---- plan --------------------------------------------------------------------------------------------
plan=("$ditmoe" plan --model S/2-8E2A --batch 64)
works "plan for another machine" "${plan[@]}" --topology "$machines/mixed.xml" --cpu --out placement.json --png plan.png
check "which says how long" grep -Eq '^step [0-9.]+ ms; [0-9.]+ images/s; exchange' out
check "its placement" grep -q '"ditmoe_placement": 1' placement.json
check "its figure" test -s plan.png
works "the same by hand" "${plan[@]}" --topology "$machines/mixed.xml" --cpu --placement placement.json
works "plan for this machine" "${plan[@]}" --here --precision f32 --json
check "as JSON" grep -q '"images_per_second"' out
works "plan for many machines" "${plan[@]}" --topology "$machines/hgx8.xml" --nodes 1,4,1024 --policy uniform --png many.png
check "a row for each" test "$(wc -l <out)" -eq 4
works "16.5 billion parameters, sampled on one GPU of 24 GiB" "$ditmoe" plan --sample -m G/2-16E2A -b 8 \
    --topology "$machines/hgx8.xml" --group 1 --memory 24GiB
check "experts are streamed" grep -q 'GiB of experts live in host memory' out
fails 1 "a placement for other ranks" "is for 3 ranks; this run has 2" "${plan[@]}" --topology "$machines/mixed.xml" --placement placement.json
run "$ditmoe" plan -m G/2-16E2A -b 64 --topology "$machines/mixed.xml"
check "what does not fit has status 1" test $status -eq 1
check "and says how many bytes" grep -Eq '^does not fit: [0-9]+ bytes' out
fails 1 "no machine" "bad.xml: not a topology" "${plan[@]}" --topology bad.xml
fails 2 "no place to plan for" "either --here or --topology" "${plan[@]}"
fails 2 "machines in no order" "nodes 4,2: not ascending" "${plan[@]}" --here --nodes 4,2
echo '{"ditmoe_rates": 1, "devices": []}' >rates.json
fails 1 "rates of another machine" "rates.json has no f32 rates of opencl:0" "${plan[@]}" --here --precision f32 --rates rates.json
fails 1 "rates that are none" "placement.json: not a file of rates" "${plan[@]}" --here --rates placement.json
fails 1 "load that is none" "rates.json: not a file of expert loads" "${plan[@]}" --here --load rates.json
fails 1 "too few images" "too small for" "$ditmoe" plan -b 2 --topology "$machines/hgx8.xml" --nodes 1024

# ---- calibrate ---------------------------------------------------------------------------------------
calibrate=(env DITMOE_CACHE="$work/rates" "$ditmoe" calibrate --model S/2-8E2A --hidden 64 --heads 1 --patch 4 --batch 2)
works "calibrate" "${calibrate[@]}" --device opencl:0 --out measured.json
check "rates by rows" grep -Eq '^  an expert +[0-9.]+ [GT]FLOP/s' out
works "calibrate again" "${calibrate[@]}" --device opencl:0
check "which knows the device" grep -q 'known; --force measures again' out
works "plan with its rates" env DITMOE_CACHE="$work/rates" "${plan[@]}" --here --precision f32
check "says that they are measured" grep -q '^rates: measured' out
works "plan with its file" "${plan[@]}" --here --precision f32 --rates measured.json
sed 's/"driver": "[^"]*"/"driver": "1.0"/' measured.json >rates/rates.json
run "${calibrate[@]}" --device opencl:0 --json
check "another driver: measured anew" test $status -eq 0 -a "$(grep -c '"driver": "1.0"' out)" -eq 0
echo "{" >rates/rates.json
works "a damaged cache is measured anew" "${calibrate[@]}" --device opencl:0
if command -v mpirun >/dev/null && [ -f "$build/ditmoe_mpi.so" ]; then
    works "calibrate the road between two ranks" env POCL_DEVICES="pthread pthread" "${calibrate[@]}" --device opencl:0,opencl:1
    check "its latency and bandwidth" grep -Eq ' to .*: [0-9]+ us and [0-9.]+ [GT]B/s' out
    check "rates of two ranks on one CPU" grep -q 'one of 2 ranks on these cores' out
fi
fails 1 "calibrate a device that is not there" "no device 'opencl:9'" "${calibrate[@]}" --device opencl:9
fails 2 "calibrate no model" "ditmoe calibrate: .*Q/2" "$ditmoe" calibrate --model Q/2

# ---- info --------------------------------------------------------------------------------------------
while read -r preset total active macs with; do
    run "$ditmoe" info "$preset"
    if grep -q "^parameters *$total\$" out && grep -q "^active per token *$active\$" out &&
        grep -Eq "^GMAC an image *$macs .*, $with " out; then
        ok "info $preset"
    else
        bad "info $preset" "$(grep -E '^param|^active|^GMAC' out | tr '\n' ' ')"
    fi
done <<END
S/2-8E2A 199,307,552 71,905,568 15.43 16.03
S/2-16E2A 369,213,728 71,942,432 15.44 16.04
B/2-8E2A 795,861,536 286,253,600 61.68 62.89
L/2-8E2A 2,823,764,000 1,011,824,672 219.3 222.5
XL/2-8E2A 4,168,172,192 1,492,730,528 323.7 328.0
G/2-16E2A 16,503,731,232 3,181,573,152 690.9 698.3
END

# ---- training data that cannot be used ---------------------------------------------------------------
bad_data() { # NAME PATTERN DIRECTORY [OPTION...]
    local name=$1 pattern=$2 dir=$3
    shift 3
    fails 1 "$name" "$pattern" "$ditmoe" train "${tiny[@]}" --data "$dir" --batch 4 --out bad-run --steps 1 "$@"
    check "$name: nothing written" test ! -e bad-run
}
bad_data "missing data" "nowhere" nowhere
mkdir empty
bad_data "empty folder" "empty" empty --image-size 32
cp -r data cut && truncate -s 1000 cut/train-images-idx3-ubyte
bad_data "truncated images" "train-images" cut
cp -r data magic && printf '\x00\x00\x09\x03' | dd of=magic/train-images-idx3-ubyte conv=notrunc status=none
bad_data "wrong magic" "train-images" magic
cp -r data counts && printf '\x00\x00\x08\x01\x00\x00\x00\x3f' | dd of=counts/train-labels-idx1-ubyte conv=notrunc status=none
bad_data "wrong counts" "train-labels" counts
mkdir -p text/a text/b && echo "no picture" >text/a/1.png && cp text/a/1.png text/b/1.png
run "$ditmoe" train "${tiny[@]}" --data text --image-size 32 --batch 4 --out text-run --steps 1 --sample-every 0
if [ $status -eq 1 ] && grep -q '1.png' err && [ ! -e text-run/step-00000001.safetensors ]; then
    ok "text named .png"
else
    bad "text named .png" "status $status"
fi

# ---- memory ------------------------------------------------------------------------------------------
works "dry run" "${train[@]}" --dry-run
check "dry run prints the plan" grep -qi "activations" out
works "dry run without data" "$ditmoe" train --model XL/2-8E2A --dry-run --memory 1TiB --batch 8
fails 1 "not enough memory" "not enough memory: needs .*" "${train[@]}" --out big --memory 1MiB
check "not enough memory: the plan is shown" grep -qi "activations" err
check "not enough memory: no checkpoint" test ! -e big/step-00000000.safetensors
fails 1 "dry run that does not fit" "not enough memory" "${train[@]}" --dry-run --memory 1MiB

# ---- a run, a resumed run, a killed run ----------------------------------------------------------------
works "train 6 steps" "${train[@]}" --steps 6 --out whole --sample-every 6 --sample-steps 2
check "the seed is told" grep -q "^seed *0" err
check "log.csv has its columns" grep -Eq \
    '^step,loss,grad_norm,lr,balance,load_max,images_per_second,seconds,skipped,entropy_0,entropy_1$' whole/log.csv
check "log.csv has a row a step" test "$(wc -l <whole/log.csv)" -eq 7
for file in run.json loss.png samples/step-00000006.png step-00000006.safetensors; do
    check "whole/$file" test -s whole/$file
done
check "no leftovers" test -z "$(find whole -name '*.tmp*')"
works "train with experts in host memory" "${train[@]}" --steps 6 --out away --sample-every 6 --sample-steps 2 --offload 2
check "and say so" grep -q '^offload 8 experts, of 2 of 2 blocks, in .* of host memory; .* and .* back a step$' err
check "the same model to the bit" cmp whole/model.safetensors away/model.safetensors
check "the same checkpoint to the bit" cmp whole/step-00000006.safetensors away/step-00000006.safetensors
works "and sample" "$ditmoe" sample --ckpt whole --steps 3 --latents here.safetensors
works "and sample with experts in host memory" "$ditmoe" sample --ckpt whole --steps 3 --latents there.safetensors --offload 1
check "the same samples to the bit" cmp here.safetensors there.safetensors
echo '{"ditmoe_placement": 1, "ranks": 1, "layers": 2, "experts": 4, "batch": 4, "shares": [4],
    "groups": [{"owner": [[0, 0, 0, 0]], "home": ["dddd", "ssss"]}]}' >home.json
works "experts where a placement says" "$ditmoe" sample --ckpt whole --steps 3 --latents there.safetensors --placement home.json
check "one block of two" grep -q '^offload 4 experts, of 1 of 2 blocks' err
check "the same samples again" cmp here.safetensors there.safetensors
fails 1 "--offload" "--offload much: neither auto nor a number of blocks" "${train[@]}" --out no --offload much
fails 1 "too little device memory for the buffers" "the plan needs .* MiB for it" \
    "$ditmoe" sample --ckpt whole --steps 3 --latents no.safetensors --memory 100KiB
fails 1 "too little host memory" "experts of 2 blocks need .* of the host's memory.* are missing" \
    env DITMOE_HOST_MEMORY=100000 "${train[@]}" --steps 1 --out no --offload 2
fails 1 "experts in host memory and early updates" "early updates are for experts on the device" \
    "${train[@]}" --out no --offload 2 --early-update
rm -rf no
works "train 3 of 6 steps" "${train[@]}" --steps 3 --out halves
works "resume to 6" "$ditmoe" train --resume --steps 6 --out halves
check "resumed checkpoint is the same to the bit" cmp whole/step-00000006.safetensors halves/step-00000006.safetensors
untimed() { cut -d, -f1-6,9- "$1"; }
check "resumed log is the same but for times" cmp <(untimed whole/log.csv) <(untimed halves/log.csv)
cp -r halves older
rm older/step-00000006.safetensors
sed -i '1s/loss/lost/' older/log.csv
works "resume where the log has other columns" "$ditmoe" train --resume --steps 4 --out older
check "the old one is kept" bash -c "head -n 1 older/log.csv.old | grep -q lost && head -n 1 older/log.csv | grep -q loss"
works "resume with nothing left to do" "$ditmoe" train --resume --out halves
check "says that all is done" grep -q "done already" err
fails 1 "an old run is not overwritten" "holds a run already: continue it with --resume" "${train[@]}" --out halves
fails 1 "another model is not resumed" "another model" "$ditmoe" train --resume --out halves --steps 9 --layers 3
fails 1 "another seed is not resumed" "has seed 0" "$ditmoe" train --resume --out halves --steps 9 --seed 5
works "--resume without a run starts one" "${train[@]}" --steps 1 --resume --out fresh

wait_for() { # wait_for COMMAND...: until it is true, or the process $pid is gone
    local end=$((SECONDS + 120))
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] && kill -0 $pid 2>/dev/null || return 1
        sleep 0.05
    done
}
"${train[@]}" --steps 100000 --checkpoint-every 20 --out killed >out 2>err &
pid=$!
wait_for test -e killed/step-00000020.safetensors
kill -9 $pid
wait $pid 2>/dev/null
: >killed/step-00000999.safetensors.tmp.12345 # as a kill in the middle of writing leaves it
steps=$(ls killed | sed -n 's/^step-0*\([0-9]*\)\.safetensors$/\1/p' | sort -n | tail -n 1)
works "resume after kill -9" "$ditmoe" train --resume --steps $((steps + 2)) --out killed
check "the log goes on without gap or repeat" test "$(tail -n +2 killed/log.csv | cut -d, -f1 | uniq | wc -l)" \
    -eq $((steps + 2))
check "a killed write leaves nothing behind" test -z "$(find killed -name '*.tmp*')"
check "two checkpoints are kept" test "$(ls killed/step-*.safetensors | wc -l)" -le 2

for signal in INT TERM; do
    rm -rf stopped
    # a background job of a script ignores SIGINT unless it says otherwise
    (trap - INT; exec "${train[@]}" --steps 100000 --out stopped >out 2>err) &
    pid=$!
    wait_for test -s stopped/log.csv
    wait_for grep -q '^5,' stopped/log.csv
    kill -$signal $pid
    wait $pid
    status=$?
    steps=$(tail -n 1 stopped/log.csv | cut -d, -f1)
    check "SIG$signal: exit 0" test $status -eq 0
    check "SIG$signal: says how to go on" grep -q "stopped at step $steps of 100000; continue with --resume" err
    check "SIG$signal: checkpoint of the last step" test -s "$(printf 'stopped/step-%08d.safetensors' "$steps")"
done
cp -r halves twice
truncate -s 100000 twice/step-00000006.safetensors
cp halves/step-00000003.safetensors twice/ 2>/dev/null || cp whole/step-00000006.safetensors twice/step-00000003.safetensors
run "$ditmoe" train --resume --steps 7 --out twice
check "a damaged newest checkpoint is passed over" grep -q "passed over: .*step-00000006" err

# ---- disk full ---------------------------------------------------------------------------------------
full_disk() { # full_disk NAME DIRECTORY COMMAND...: the old checkpoint must survive the failing one
    local name=$1 dir=$2
    shift 2
    local sum
    sum=$(cksum <"$dir/step-00000003.safetensors")
    fails 1 "$name" "ditmoe train: .*step-.*safetensors" "$@"
    check "$name: the previous checkpoint survives" test "$sum" = "$(cksum <"$dir/step-00000003.safetensors")"
    check "$name: no half file" test -z "$(find "$dir" -name '*.tmp*' -o -name 'step-00000004*')"
}
works "3 steps to go on from" "${train[@]}" --steps 3 --out limited
full_disk "file size limit" limited \
    bash -c 'ulimit -f 1500; exec "$@"' - "$ditmoe" train --resume --steps 4 --out limited
works "goes on when there is room" "$ditmoe" train --resume --steps 4 --out limited
mkdir small
if [ "$(id -u)" -eq 0 ] && mount -t tmpfs -o size=3500k tmpfs small 2>/dev/null; then
    mounted=yes
    works "3 steps on a small disk" "${train[@]}" --steps 3 --out small/run
    full_disk "disk full" small/run "$ditmoe" train --resume --steps 4 --out small/run
fi

# ---- autoencoders: encode, train on latents, decode -----------------------------------------------------
vae=$root/tests/vae
encode=("$ditmoe" encode --data data --image-size 32 --vae "$vae/kl.safetensors" --shard 20 --batch 4)
works "encode" "${encode[@]}" --out latents
check "four shards and the index" test "$(ls latents | wc -l)" -eq 5
works "encode what is encoded" "${encode[@]}" --out latents
check "says so" grep -q "complete already" err
"${encode[@]}" --out stopped >out 2>err & # one batch of 4 at a time, and killed after the first shard
for ((i = 0; i < 400; i++)); do [ -e stopped/shard-00000.safetensors ] && break; sleep 0.02; done
kill -9 $! 2>/dev/null
wait $! 2>/dev/null
rm -f stopped/shard-00002.safetensors stopped/shard-00003.safetensors
sed -i 's/"complete": true/"complete": false/' stopped/latents.json
fails 1 "train on half a set" "not complete.*ditmoe encode" "$ditmoe" train "${tiny[@]}" --data stopped --steps 1 --out no
works "encode goes on after a kill" "${encode[@]}" --out stopped
for ((i = 0; i < 4; i++)); do
    check "shard $i is that of the uninterrupted run" cmp latents/shard-0000$i.safetensors stopped/shard-0000$i.safetensors
done
fails 1 "encode with another autoencoder" "another autoencoder" \
    "$ditmoe" encode --data data --image-size 32 --vae "$vae/tiny.safetensors" --shard 20 --out latents
fails 1 "encode to a size that does not divide" "multiples of 2" \
    "$ditmoe" encode --data data --image-size 33 --vae "$vae/kl.safetensors" --out no
fails 1 "encode without an encoder" "holds no encoder" \
    "$ditmoe" encode --data data --image-size 32 --vae "$vae/taesd_decoder.pth" --out no
fails 1 "an autoencoder that is none" "no autoencoder" \
    "$ditmoe" encode --data data --image-size 32 --vae "$vae/expected.safetensors" --out no
fails 2 "encode without --vae" "are needed" "$ditmoe" encode --data data --out no
full=("$ditmoe" encode --data data --image-size 48 --vae "$vae/kl.safetensors" --type f32) # 2304 KiB of latents
works "encode in f32" "${full[@]}" --out wide
fails 1 "encode onto a full disk" "shard-00000" bash -c 'ulimit -f 1500; exec "$@"' - "${full[@]}" --out full
check "leaves no part of a shard" test "$(ls full)" = latents.json
works "encode goes on when there is room" "${full[@]}" --out full
head -c 5000 latents/shard-00001.safetensors >cut-shard
cp -r latents cut-latents && cp cut-shard cut-latents/shard-00001.safetensors
fails 1 "train on a cut shard" "shard-00001" "$ditmoe" train "${tiny[@]}" --data cut-latents --steps 1 --out no
latent_train=("$ditmoe" train "${tiny[@]}" --data latents --batch 4 --flip --vae "$vae/kl.safetensors" --sample-steps 2)
works "train on latents" "${latent_train[@]}" --steps 4 --out on-latents --sample-every 4
check "draws decoded samples" test -s on-latents/samples/step-00000004.png
works "train on latents, 2 of 4 steps" "${latent_train[@]}" --steps 2 --out on-latents-2 --sample-every 0
works "train on latents goes on" "$ditmoe" train --resume --steps 4 --out on-latents-2
check "as if never stopped" cmp on-latents/model.safetensors on-latents-2/model.safetensors
latent_draw=("$ditmoe" sample --ckpt on-latents --steps 2 --classes 0-1 --per-class 2)
fails 2 "sample latents without an autoencoder" "--vae" "${latent_draw[@]}" --out no.png
works "sample and decode" "${latent_draw[@]}" --vae "$vae/kl.safetensors" --latents l.safetensors --out l.png --images l
check "an image of 32x32" bash -c "file l/00000-class-0.png | grep -q '32 x 32'"
works "eval of latents" "$ditmoe" eval knn --data latents --samples l.safetensors --references 32 --json
works "decode what was sampled" "$ditmoe" decode --vae "$vae/kl.safetensors" --latents l.safetensors --images decoded --out d.png \
    --raw whole.safetensors
check "decode makes each image" test "$(ls decoded | wc -l)" -eq 4
works "decode in tiles" "$ditmoe" decode --vae "$vae/kl.safetensors" --latents l.safetensors --vae-tile 8 --raw tiles.safetensors
check "tiles are not the whole" bash -c '! cmp -s whole.safetensors tiles.safetensors'
works "decode with TAESD in bf16" "$ditmoe" decode --vae "$vae/taesd_decoder.pth" --latents l.safetensors --precision bf16 --out t.png
fails 1 "latents of other channels" "channels" "$ditmoe" decode --vae "$vae/plain.safetensors" --latents l.safetensors --out no.png
fails 1 "no latents in a file" "latents" "$ditmoe" decode --vae "$vae/kl.safetensors" --latents "$vae/kl.safetensors" --out no.png
fails 1 "tiles of an odd size" "tiles of 9" "$ditmoe" decode --vae "$vae/kl.safetensors" --latents l.safetensors --vae-tile 9 --out no.png

works "bench vae" "$ditmoe" bench vae --vae "$vae/kl.safetensors" --image-size 16,32 --batch 1,2 --part both --rounds 1 --json
check "a row for each part, size and batch" test "$(grep -c images_per_s out)" -eq 8
fails 1 "bench vae of no sizes" "not a list" "$ditmoe" bench vae --vae "$vae/kl.safetensors" --image-size x --rounds 1

# ---- checkpoints that cannot be used -----------------------------------------------------------------
good=whole/step-00000006.safetensors
sample=("$ditmoe" sample --steps 2 --classes 0,3 --latents no.safetensors)
for bytes in 0 5 8 100 3000 $(($(stat -c %s $good) - 1)); do
    head -c "$bytes" $good >cut.safetensors
    fails 1 "checkpoint cut at byte $bytes" "cut.safetensors" "${sample[@]}" --ckpt cut.safetensors
done
cp $good nan.safetensors # the data's first numbers become NaN
length=$(od -An -tu8 -N8 $good | tr -d ' ')
printf '\xff\xff\xff\x7f%.0s' $(seq 1 16) | dd of=nan.safetensors bs=1 seek=$((8 + length)) conv=notrunc status=none
fails 1 "NaN weights" "not finite|NaN|nan" "${sample[@]}" --ckpt nan.safetensors --weights model
# edit NAME SED: changes the header of the good checkpoint, keeping its length
edit() {
    { head -c 8 $good; head -c $((8 + length)) $good | tail -c "$length" | sed "$2"; tail -c +$((9 + length)) $good; } >"$1"
}
edit missing.safetensors 's/"blocks.1.moe.gate.weight"/"blocks.1.moe.gite.weight"/'
fails 1 "missing tensor" "blocks.1.moe.gate.weight" "${sample[@]}" --ckpt missing.safetensors
edit shape.safetensors 's/\("blocks.1.moe.gate.weight":{[^}]*"shape":\)\[4,32\]/\1[32,4]/'
if cmp -s shape.safetensors $good; then
    bad "wrong shape" "the header was not changed; does its writer put spaces?"
else
    fails 1 "wrong shape" "blocks.1.moe.gate.weight" "${sample[@]}" --ckpt shape.safetensors
fi
edit overlap.safetensors 's/"data_offsets":\[0,/"data_offsets":[1,/'
fails 1 "offsets that do not fit" "overlap.safetensors" "${sample[@]}" --ckpt overlap.safetensors
fails 1 "no checkpoint" "nothing.safetensors" "${sample[@]}" --ckpt nothing.safetensors
fails 1 "a folder without a checkpoint" "no weights" "${sample[@]}" --ckpt data
check "nothing was written" test ! -e no.safetensors

# ---- samples -----------------------------------------------------------------------------------------
draw=("$ditmoe" sample --ckpt whole --steps 3 --classes 0-2 --per-class 3 --seed 7)
works "sample: grid, images, latents" "${draw[@]}" --out grid.png --images single --latents a.safetensors --batch 9
check "grid.png is a PNG" grep -q PNG <(head -c 8 grid.png)
check "its text has the parameters" grep -qa "Euler steps" grid.png
check "nine images" test "$(ls single/*.png | wc -l)" -eq 9
works "sample in batches of 2" "${draw[@]}" --latents b.safetensors --batch 2
check "the batch does not change the samples" cmp a.safetensors b.safetensors
works "another seed" "${draw[@]}" --latents c.safetensors --seed 8
check "draws other samples" bash -c '! cmp -s a.safetensors c.safetensors'
works "weights of the model" "${draw[@]}" --latents d.safetensors --weights model
check "differ from the average's" bash -c '! cmp -s a.safetensors d.safetensors'
works "no guidance" "${draw[@]}" --latents e.safetensors --cfg 1
check "all channels at every t is the default" grep -qa "Euler steps, cfg 2, seed" grid.png
works "sample in 5 steps" "${draw[@]}" --steps 5 --latents five.safetensors
for way in "--sampler heun" "--sampler dpm++" "--cfg-to 0.5" "--cfg-from 0.6"; do
    # shellcheck disable=SC2086 # an option and its value
    works "sample $way" "${draw[@]}" --steps 5 $way --latents way.safetensors --out way.png
    check "differs from the plain one" bash -c '! cmp -s five.safetensors way.safetensors'
done
check "its text has the interval" grep -qa "for t 0.6 to 1" way.png
works "sample with every default said" "${draw[@]}" --sampler euler --cfg-channels all --cfg-from 0 --cfg-to 1 \
    --latents way.safetensors
check "is the plain one" cmp a.safetensors way.safetensors
works "guidance on 3 channels of 1" "${draw[@]}" --cfg-channels 3 --latents way.safetensors
check "is on all of them" cmp a.safetensors way.safetensors
fails 2 "a sampler that is none" "heun" "${draw[@]}" --sampler huen --latents no.safetensors
fails 2 "an empty guidance interval" "cfg-from 0.7 is above" "${draw[@]}" --cfg-from 0.7 --cfg-to 0.2 --latents no.safetensors
fails 2 "t out of range" "cfg-to" "${draw[@]}" --cfg-to 1.5 --latents no.safetensors
fails 2 "class out of range" "class 10 is out of range; the model has 0 to 9" \
    "$ditmoe" sample --ckpt whole --classes 3,10 --out no.png
fails 2 "classes that are no list" "not a list" "$ditmoe" sample --ckpt whole --classes 1,x --out no.png
fails 1 "noise file without z" "z" "${draw[@]}" --noise a.safetensors --out no.png
fails 1 "no room for the grid" "nodir" "${draw[@]}" --out nodir/x.png
fails 1 "forward without x" "'?x'?" "$ditmoe" forward --ckpt whole --input a.safetensors --output no.safetensors
works "eval of samples" "$ditmoe" eval knn --data data --samples a.safetensors --references 64 --json
check "eval prints JSON" grep -q '"share"' out
works "eval draws by itself" "$ditmoe" eval knn --data data --ckpt whole --per-class 1 --steps 2

# ---- many samples, and their figures -----------------------------------------------------------------
many=("$ditmoe" sample --ckpt whole --steps 1 --seed 5 --count 600)
works "sample --npz" "${many[@]}" --npz many.npz --batch 64
check "holds the images" test "$(stat -c %s many.npz)" -gt $((600 * 3 * 32 * 32))
check "leaves no part behind" test ! -e many.npz.part
fails 1 "sample --npz onto a full disk" "again.npz.part: cannot be written" \
    bash -c 'ulimit -f 1500; exec "$@"' - "${many[@]}" --npz again.npz --batch 60
check "writes no archive" test ! -e again.npz
fails 1 "going on with another seed" "other settings" "${many[@]}" --npz again.npz --seed 6
works "going on with another batch" "${many[@]}" --npz again.npz --batch 50
check "goes on where it was" grep -Eq "600 images, [1-5]?[0-9]?[0-9] to draw" err
check "gives the same archive" cmp many.npz again.npz
works "sample --npz --balanced" "$ditmoe" sample --ckpt whole --steps 1 --count 20 --classes 3,5 --balanced --npz few.npz
works "sample --npz with an autoencoder" "$ditmoe" sample --ckpt "$root/tests/golden/s_qkv/model.safetensors" --heads 2 \
    --diffusion rf --vae "$root/tests/vae/tiny.safetensors" --steps 2 --count 5 --batch 2 --npz decoded.npz
fails 1 "an autoencoder of other latents" "latents of 3 channels" "$ditmoe" sample --ckpt "$root/tests/golden/s_qkv/model.safetensors" \
    --heads 2 --diffusion rf --vae "$root/tests/vae/plain.safetensors" --count 5 --npz no.npz
check "leaves nothing" test ! -e no.npz.part
fails 2 "--npz without --count" "go together" "$ditmoe" sample --ckpt whole --npz no.npz
fails 2 "--npz with --out" "does not go with" "${many[@]}" --npz no.npz --out no.png
echo nonsense >wrong.npz.part
fails 1 "a part file that is none" "wrong.npz.part" "${many[@]}" --npz wrong.npz
eval=$root/tests/eval
fid=("$ditmoe" eval fid --inception "$eval/narrow.pth" --batch 16)
near() { awk -v key="\"$1\"" -v want="$2" -F'[:,]' \
    'index($0, key) { d = $2 / want - 1; near = d * d < 1e-6 } END { exit !near }' out; }
works "eval fid" "${fid[@]}" --samples "$eval/samples.npz" --reference "$eval/reference.npz" --json
check "FID as in Python" near fid 0.0253563288
check "sFID as in Python" near sfid 25.6702694
check "Inception Score as in Python" near inception_score 1.71725848
check "recall as in Python" near recall 0.923076923
check "says that 18 samples are few" grep -q "note: 18 samples" err
works "eval fid --as adm --save-stats" "${fid[@]}" --as adm --reference "$eval/reference.npz" --save-stats stats.npz
works "eval fid against statistics" "${fid[@]}" --as adm --samples "$eval/samples.npz" --reference stats.npz --json
check "the same FID" near fid 0.0265332526
check "no precision" grep -q '"precision": null' out
works "eval fid of directories" "${fid[@]}" --samples single --reference single --pr-images 0
check "nothing between equal sets" grep -Eq "^FID +-?0.0000" out
works "eval fid of what was drawn" "${fid[@]}" --samples few.npz --reference "$eval/reference.npz"
works "eval knn" "$ditmoe" eval knn --data data --samples a.safetensors --references 64
fails 2 "eval fid without --reference" "reference PATH" "${fid[@]}" --samples few.npz
fails 2 "eval fid without weights" "inception FILE" "$ditmoe" eval fid --samples few.npz --reference few.npz
fails 1 "weights of another network" "not FID's Inception" "$ditmoe" eval fid --inception whole/step-00000006.safetensors \
    --samples few.npz --reference few.npz
head -c 9000 few.npz >cut.npz
fails 1 "an archive cut short" "cut.npz" "${fid[@]}" --samples cut.npz --reference few.npz
fails 1 "statistics of another network" "'mu' is not \[64\]" "${fid[@]}" --samples few.npz --reference "$eval/frechet.npz"
fails 1 "an array of objects" "objects.npz.*'arr_0'" "${fid[@]}" --samples "$eval/objects.npz" --reference few.npz
fails 1 "a directory without images" "no PNG or JPEG" "${fid[@]}" --samples data --reference few.npz
fails 1 "no such directory" "nowhere" "${fid[@]}" --samples nowhere --reference few.npz
fails 1 "nowhere to keep statistics" "nodir/no.npz" "${fid[@]}" --reference few.npz --save-stats nodir/no.npz

# ---- what files hold ---------------------------------------------------------------------------------
works "info of a run" "$ditmoe" info whole
check "says what is inside" grep -q "model, EMA, Adam moments" out

# ---- DDPM --------------------------------------------------------------------------------------------
ddpm=("${train[@]}" --diffusion ddpm)
works "train with DDPM" "${ddpm[@]}" --steps 4 --out noisy --sample-every 4 --sample-steps 2
works "train with DDPM, 2 of 4 steps" "${ddpm[@]}" --steps 2 --out noisy-2
works "goes on with DDPM" "$ditmoe" train --resume --steps 4 --out noisy-2
check "as if never stopped" cmp noisy/model.safetensors noisy-2/model.safetensors
works "info of it" "$ditmoe" info noisy
check "says DDPM" grep -Eq '^diffusion +DDPM' out
fails 1 "DDPM is not resumed as rectified flow" "another model" \
    "$ditmoe" train --resume --out noisy --steps 9 --diffusion rf
fails 2 "t is uniform with DDPM" "--time" "${ddpm[@]}" --time uniform --out no
noisy=("$ditmoe" sample --ckpt noisy --classes 0-2 --seed 7 --cfg 3)
works "sample: DDPM of itself" "${noisy[@]}" --steps 4 --latents a.safetensors --out noisy.png --batch 3
check "says so" grep -qa "4 DDPM steps" noisy.png
works "one at a time" "${noisy[@]}" --steps 4 --latents b.safetensors --batch 1
check "the same noise in every step" cmp a.safetensors b.safetensors
works "respaced alike" "${noisy[@]}" --respacing 4 --latents b.safetensors
check "is the same" cmp a.safetensors b.safetensors
for way in "--respacing ddim4" "--respacing 1,3" "--steps 4 --sampler ddim" "--steps 4 --sampler ddim --eta 1" \
    "--steps 4 --sampler heun" "--steps 4 --sampler dpm++" "--steps 4 --clip" "--steps 4 --cfg-channels 3" \
    "--steps 4 --cfg-to 0.5" "--steps 4 --diffusion rf"; do
    # shellcheck disable=SC2086 # options and their values
    works "sample $way" "${noisy[@]}" $way --latents way.safetensors
    check "differs from the plain one" bash -c '! cmp -s a.safetensors way.safetensors'
done
works "rectified flow with noise" "$ditmoe" sample --ckpt whole --classes 0 --sampler ddpm --steps 3 --latents way.safetensors
fails 1 "a respacing that is none" "respacing '4;4'" "${noisy[@]}" --respacing "4;4" --latents no.safetensors
fails 1 "a section too short" "section 2 has only 500 steps" "${noisy[@]}" --respacing 1,501 --latents no.safetensors
fails 1 "no such stride" "no whole stride makes 999" "${noisy[@]}" --respacing ddim999 --latents no.safetensors
fails 1 "more steps than there are" "must be 1 to 1000" "${noisy[@]}" --steps 1001 --latents no.safetensors
fails 1 "rectified flow is not respaced" "only DDPM models" \
    "$ditmoe" sample --ckpt whole --classes 0 --respacing 5 --latents no.safetensors
check "the log has both parts of the loss" bash -c "head -n 1 noisy/log.csv | grep -q ',skipped,mse,vb,entropy_0'"
check "which add up" awk -F, 'NR > 1 { d = $2 - $10 - $11; if (d < 0) d = -d; if (d > 1e-5 * $2 || $11 <= 0) exit 1 }' noisy/log.csv
fails 2 "eta without ddim" "--eta 0.5 goes with --sampler ddim, not with auto" "${noisy[@]}" --eta 0.5 --latents no.safetensors
fails 2 "steps said twice" "--steps and --respacing both" "${noisy[@]}" --steps 4 --respacing 4 --latents no.safetensors
fails 2 "an interval of no guidance" "--cfg-to: with --cfg 1 nothing is guided" \
    "$ditmoe" sample --ckpt noisy --cfg 1 --cfg-to 0.5 --latents no.safetensors
fails 2 "tiles of no autoencoder" "--vae-tile goes with --vae" "${noisy[@]}" --vae-tile 8 --latents no.safetensors
fails 2 "an autoencoder with nothing to decode" "--vae makes images" "${noisy[@]}" --vae v --latents no.safetensors
fails 2 "names without a grid" "--names are for the grid" "${noisy[@]}" --names a,b --latents no.safetensors
fails 2 "--balanced without an archive" "--balanced goes with --npz" "${noisy[@]}" --balanced --latents no.safetensors
fails 2 "--per-class of an archive" "--per-class does not go with --npz" \
    "$ditmoe" sample --ckpt noisy --npz no.npz --count 2 --per-class 2
fails 2 "drawing what is drawn" "--cfg is for drawing" "$ditmoe" eval knn --data data --samples a.safetensors --cfg 2
fails 2 "two models" "--model and --init both" "${ddpm[@]}" --init noisy --model S/2-8E2A --out no
fails 1 "an autoencoder for images" "--vae shows samples of latents" "${train[@]}" --vae v --out no
fails 2 "eta out of range" "eta" "${noisy[@]}" --sampler ddim --eta 2 --latents no.safetensors
works "eval of a DDPM model" "$ditmoe" eval knn --data data --ckpt noisy --per-class 1 --steps 2
latent=$root/tests/golden/ddpm_latent
given=("$ditmoe" sample --ckpt "$latent/model.safetensors" --classes 1 --noise "$latent/input.safetensors")
works "noise of every step from a file" "${given[@]}" --steps 5 --latents way.safetensors
fails 1 "noise of another number of steps" "step_noise is for 5 steps, and there are 7" \
    "${given[@]}" --steps 7 --latents no.safetensors
works "of one step more, which takes none" "${given[@]}" --steps 6 --latents way.safetensors
fails 1 "noise for other images" "step_noise|z holds" "${given[@]}" --per-class 3 --steps 5 --latents no.safetensors
compare=("$ditmoe" forward --ckpt "$latent/model.safetensors" --output loss.safetensors --input)
works "forward --loss ddpm" "${compare[@]}" "$latent/input.safetensors" --loss ddpm
check "writes mse and vb" bash -c 'head -c 4000 loss.safetensors | grep -qa "\"mse\".*\"vb\""'
fails 1 "t that are no steps" "t\[0\] is .* wants whole numbers from 0 to 999" \
    "$ditmoe" forward --ckpt "$root/tests/golden/s_qkv/model.safetensors" --loss ddpm \
    --input "$root/tests/golden/s_qkv/input.safetensors" --output no.safetensors

interop=$root/tests/interop
works "info of DeepSpeed's directory" "$ditmoe" info "$interop/zero2" --heads 2
check "says how it was written" grep -q "DeepSpeed, ZeRO 2 of 3 ranks" out
check "and what is assumed" grep -q "2 heads (given), 2 active experts (assumed), DDPM (assumed)" out
works "info of a file that is no DiT" "$ditmoe" info "$root/tests/torch/small.pt" --json
check "says so" grep -q "no_model.*not a DiT" out
fails 1 "heads that no shape tells" "give --heads" "$ditmoe" info "$interop/sharded"
fails 1 "a hint against the file's configuration" "heads 4: its configuration says 2" "$ditmoe" info whole --heads 4
works "sample from shards" "$ditmoe" sample --ckpt "$interop/sharded" --heads 2 --diffusion rf --steps 2 --classes 0 --latents no.safetensors
check "says what it took" grep -q "2 heads (given), 2 active experts (assumed), rectified flow (given)" err
rm -f no.safetensors
works "convert a run to .pt" "$ditmoe" convert whole run.pt --dtype bf16
check "says what is left out" grep -q "moments.*left out" err
works "and sample from that" "$ditmoe" sample --ckpt run.pt --steps 2 --classes 0 --latents from-pt.safetensors
works "convert a plain DiT to diffusers" "$ditmoe" convert "$interop/dense.pt" dit --heads 2 --to diffusers
check "it has a configuration" grep -q DiTTransformer2DModel dit/config.json
fails 1 "no diffusers for experts" "no layout for a mixture of experts" "$ditmoe" convert whole no --to diffusers
fails 2 "convert to what?" "give --to" "$ditmoe" convert whole no
fails 1 "convert onto a full disk" "ditmoe convert: no.pt" bash -c 'ulimit -f 20; exec "$@"' - "$ditmoe" convert whole no.pt
check "leaves nothing" test ! -e no.pt -a -z "$(find . -maxdepth 1 -name '*.tmp*')"
# ---- a dense model becomes a mixture of experts, and is trained on ------------------------------------
works "train a plain DiT" "${train[@]}" --moe none --steps 3 --out dense
works "upcycle it" "$ditmoe" upcycle dense up.safetensors --experts 4 --seed 3
works "what it is" "$ditmoe" info up.safetensors
check "GELU experts, renormalised" grep -q "4 GELU MLPs of width 128, 2 active, 0 shared; in all blocks; weights renormalised" out
works "both draw" "$ditmoe" sample --ckpt dense --steps 2 --classes 0 --latents dense-z.safetensors
works "the same" "$ditmoe" sample --ckpt up.safetensors --steps 2 --classes 0 --latents up-z.safetensors
init=("$ditmoe" train --init up.safetensors --data data --batch 4 --sample-every 0)
works "train goes on from there" "${init[@]}" --steps 2 --out more
works "and resumes" "$ditmoe" train --resume --steps 3 --out more
works "a model of it is a model" "$ditmoe" info more/model.safetensors
check "of the same kind" grep -q "4 GELU MLPs" out
fails 1 "--init of other images" "is of images 32x32x1 in 10 classes, but the data are 64x64x1" \
    "${init[@]}" --image-size 64 --out other
fails 1 "--init with another model" "holds another model than these options give" "${init[@]}" --layers 3 --out other
fails 1 "--init of nothing" "nothing.pt" "${init[@]}" --init nothing.pt --out other
fails 1 "upcycle what has experts" "experts already" "$ditmoe" upcycle whole no.safetensors
fails 1 "upcycle to one active expert" "one active expert" "$ditmoe" upcycle dense no.safetensors --topk 1
check "nothing was written" test ! -e no.safetensors -a ! -e other/step-00000000.safetensors
works "devices --json" "$ditmoe" devices --json
small=("${tiny[@]}" --size 32 --channels 1 --classes 10 --rounds 1)
works "bench step" "$ditmoe" bench step "${small[@]}" --batch 2,3 --json
cp out steps.json
check "bench step: two batches, training and sampling" test "$(grep -c '"bench": "step"' steps.json)" -eq 4
check "bench step: share of the ceiling" grep -q '"of_product": 0.0*[1-9]' steps.json
works "bench step --profile --trace --compare" "$ditmoe" bench step "${small[@]}" --batch 2 --what train \
    --profile --trace trace.json --compare steps.json
check "the earlier run is compared with" grep -Eq '^ *earlier +[0-9.]+x .* ms' out
check "the profile names operations" grep -Eq '^attention_bwd[a-z_]* +2 ' err
check "the profile has a total" grep -Eq '^all operations +[0-9]+ +[0-9.]+$' err
check "the trace has an event for each" test "$(grep -c '"ph": "X"' trace.json)" -eq \
    "$(awk '/^all operations/ { print $3 }' err)"
if command -v python3 >/dev/null; then
    check "the trace is JSON" python3 -m json.tool trace.json
fi
cat >peer.json <<'END'
[["sample", "S/4", "8", "grouped", "1", "default", "20.00 ms", "1.0 GiB"],
 ["sample", "S/4", "8", "grouped", "1", "reduce-overhead", "10.00 ms", "1.0 GiB"],
 ["sample", "S/4", "8", "loop", "1", "None", "ERR out of memory"],
 ["train", "S/4", "8", "grouped", "1", "True", "59.3 ms", "18.1 GiB"]]
END
works "bench step beside a peer's file" "$ditmoe" bench step --model S/4-8E2A --batch 1 --what sample --rounds 1 --steps 1 \
    --compare peer.json
check "the peer's best comes first" bash -c "grep -E 'x +[0-9.]+ ms' out | head -n 1 | grep -q 'sample batch 1 .*reduce-overhead'"
check "and then its others" test "$(grep -Ec 'x +[0-9.]+ ms' out)" -eq 2
echo '{"no": "list"}' >wrong.json
fails 1 "bench --compare of another file" "wrong.json has no row" \
    "$ditmoe" bench step "${small[@]}" --batch 1 --what sample --compare wrong.json
fails 1 "bench --compare without a file" "nothing.json" \
    "$ditmoe" bench step "${small[@]}" --batch 1 --what sample --compare nothing.json
fails 2 "bench: no such model" "Q/2" "$ditmoe" bench step --model S/4-8E2A,Q/2
fails 2 "bench: no batch" "--batch x: not a number" "$ditmoe" bench ops --batch 2,x
works "bench inception" "$ditmoe" bench inception --batch 1 --rounds 1 --json
check "bench inception prints images/s" grep -q '"images_per_s"' out
works "bench ops" "$ditmoe" bench ops "${small[@]}" --batch 2 --json
check "bench ops: forward, backward, optimiser" bash -c \
    "grep -q '\"attention_bwd\"' out && grep -q '\"experts gate, up dw\"' out && grep -q '\"adamw\"' out"
check "bench ops: no time is zero" bash -c "! grep -Eq '\"seconds\": (0\.0,|-|nan)' out"

if [ -d "$root/tests/golden/s_qkv" ]; then
    golden=$root/tests/golden/s_qkv
    works "forward" "$ditmoe" forward --ckpt "$golden/model.safetensors" --input "$golden/input.safetensors" \
        --output forward.safetensors
    works "forward --loss rf" "$ditmoe" forward --ckpt "$golden/model.safetensors" --loss rf \
        --input "$golden/input.safetensors" --output loss.safetensors
    check "has the gradients" grep -qa '"grad.x_embedder.proj.weight"' loss.safetensors
    fails 1 "forward of another model's input" "input.safetensors.*x" "$ditmoe" forward --ckpt whole \
        --input "$golden/input.safetensors" --output no.safetensors
fi

# ---- PyTorch files -------------------------------------------------------------------------------------
pt=$root/tests/torch
works "info of a .pt" "$ditmoe" info "$pt/s_qkv.pt" --heads 2
check "says what it holds" grep -q 'weights.*model, EMA' out
works "info of a .pth of the old form" "$ditmoe" info "$pt/xl_wqkv_old.pth"
works "forward of a .pt" "$ditmoe" forward --ckpt "$pt/s_qkv.pt" --heads 2 --weights ema \
    --input "$root/tests/golden/s_qkv/input.safetensors" --output pt.safetensors
works "sample from a .pt" "$ditmoe" sample --ckpt "$pt/s_qkv.pt" --heads 2 --topk 2 --steps 2 --classes 0-1 \
    --latents pt-latents.safetensors
fails 1 "a .pt whose heads nothing shows" "give --heads" "$ditmoe" sample --ckpt "$pt/s_qkv.pt" --latents no.safetensors
fails 1 "a .pt that wants to run a program" "evil.pt: refused: .*posix.system" "$ditmoe" info "$pt/evil.pt"
head -c 50000 "$pt/s_qkv.pt" >cut.pt
fails 1 "a .pt cut short" "cut.pt: not a whole PyTorch file" "$ditmoe" info cut.pt

# ---- the installed library ---------------------------------------------------------------------------
cat >user.c <<'END'
#include <stdio.h>
#include "model/config.h"
#include "model/sampler.h"
int main(void)
{
    struct config c;
    struct device_info info[8];
    if (config_preset("S/2-8E2A", &c) < 0 || devices_list(info, 8) < 0)
        return fprintf(stderr, "%s\n", error_message()), 1;
    return printf("%lld\n", (long long)config_count(&c).total) < 0;
}
END
works "install" cmake --install "$build" --prefix "$work/prefix"
flags=
grep -q '^DITMOE_SANITIZE:BOOL=ON' "$build/CMakeCache.txt" && flags=-fsanitize=address,undefined
pc=$(dirname "$(find "$work/prefix" -name ditmoe.pc)")
works "a program builds against the installed library" bash -c \
    "gcc -std=c17 $flags user.c -o user \$(PKG_CONFIG_PATH=$pc pkg-config --cflags --libs ditmoe)"
works "and runs" env LD_LIBRARY_PATH="$work/prefix/lib" ./user
check "and is right" grep -q '^199307552$' out
works "the installed program runs" "$work/prefix/bin/ditmoe" devices

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
