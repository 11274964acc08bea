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
with=(--data "$work/data" --batch 6 --lr 1e-3 --sample-every 0 --device opencl:0)
train=(train "${model[@]}" "${with[@]}")

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
place idle.json 3 '[2, 0, 4]' '[{"ranks": [0, 1, 2], "owner": [[0, 0, 2, 2], [2, 0, 0, 0]]}]'
place copies.json 2 '[4, 2]' '[{"ranks": [0], "owner": [[0, 0, 0, 0]]}, {"ranks": [1], "owner": [[1, 1, 1, 1]]}]'
place mixed.json 4 '[2, 1, 1, 2]' '[{"ranks": [0, 1], "owner": [[0, 1, 0, 1], [1, 0, 2, 0]]},
    {"ranks": [2, 3], "owner": [[2, 3, 0, 3], [3, 3, 2, 0]]}]'
for case in "unequal 3" "empty 3" "first 2" "idle 3" "copies 2" "mixed 4"; do
    set -- $case
    ranks "$2" "${train[@]}" --steps 50 --out "$1" --placement "$1.json"
    same "$2 ranks, placement $1" "$1" one 50
done
ranks 2 "${train[@]}" --steps 6 --out numbers --placement 4:2/3:1
[ "$status" -eq 0 ] && grep -q '^plan    4:2/3:1: images 4:2, experts 6:2' err && ok "a placement in numbers" || bad "a placement in numbers" "status $status"
ranks 2 "${train[@]}" --steps 6 --out no --placement 4:2/3:2
complains "numbers that do not add up" "--placement 4:2/3:2: not the images of 2 ranks"
DITMOE_CACHE=$work/empty ranks 2 "${train[@]}" --steps 6 --out no --placement cost
complains "no rates" "the rates of rank 0 .* are not known; first run: ditmoe calibrate --device opencl:0,opencl:0"
# by messages alone, as between machines: the same bits on two ranks, whose sums have one order
for case in "uniform2 2" "copies 2" "mixed 4"; do
    set -- $case
    place_option=()
    [ -f "$1.json" ] && place_option=(--placement "$1.json")
    DITMOE_SHARE=0 ranks "$2" "${train[@]}" --steps 50 --out "apart-$1" "${place_option[@]}"
    same "$2 ranks that see no windows, $1" "apart-$1" one 50
done
cmp <(cut -d, -f1-5 uniform2/log.csv) <(cut -d, -f1-5 apart-uniform2/log.csv) >/dev/null 2>&1 &&
    ok "windows and messages give the same bits" || bad "windows and messages" "losses differ"

# peer windows: devices wait for each other, the host does not
for case in "uniform 2" "unequal 3" "empty 3" "first 2" "uniform 4"; do
    set -- $case
    placed=()
    [ -f "$1.json" ] && placed=(--placement "$1.json")
    rm -rf peers
    ranks "$2" "${train[@]}" --steps 20 --out peers --fabric peer "${placed[@]}"
    same "$2 ranks by peer windows, $1" peers one 20
done

# ---- other ways to train ------------------------------------------------------------------------------
other() { # other NAME RANKS OPTIONS...: six steps on one process and on ranks
    local name=$1 n=$2
    shift 2
    rm -rf alone together
    run "$ditmoe" "${train[@]}" --steps 6 --out alone "$@"
    ranks "$n" "${train[@]}" --steps 6 --out together "$@"
    same "$name" together alone 6
}
other "recompute, accumulate, clip" 2 --recompute --accumulate 2 --clip 0.5
other "balance per sequence, experts in every other block" 3 --balance-per-sequence --moe alternate --layers 3
other "peer windows, recompute, accumulate, clip" 2 --recompute --accumulate 2 --clip 0.5 --fabric peer
other "peer windows, balance per sequence, every other block" 3 --balance-per-sequence --moe alternate --layers 3 \
    --fabric peer
export DITMOE_FORMS=gpu # what GPUs keep of the forward pass, and their kernels
other "as on GPUs" 3 --precision f32
other "peer windows, as on GPUs" 3 --precision f32 --fabric peer
unset DITMOE_FORMS
other "DDPM" 2 --diffusion ddpm
other "no shared expert, q and k normed, stratified times" 2 --shared 0 --qk-norm --time stratified --flip

run "$ditmoe" "${train[@]}" --steps 3 --out dense --moe none
run "$ditmoe" upcycle dense upcycled.safetensors --experts 4
train=(train --init upcycled.safetensors "${with[@]}")
other "GELU experts with biases, upcycled" 3
train=(train "${model[@]}" "${with[@]}")

# ---- experts in host memory --------------------------------------------------------------------------------
place home.json 2 '[4, 2]' '[{"ranks": [0, 1], "owner": [[0, 1, 0, 1], [1, 0, 0, 0]], "home": ["dsds", "dddd"]}]'
place both.json 2 '[2, 4]' '[{"ranks": [0, 1], "owner": [[0, 1, 0, 1], [1, 1, 0, 0]], "home": ["shsh", "ddds"]}]'
for case in home both; do
    ranks 2 "${train[@]}" --steps 20 --out "$case" --placement "$case.json" --clip 1e6
    cut -d, -f1-5 one/log.csv | head -n 21 >first20.csv
    [ "$status" -eq 0 ] && cp first20.csv "$case-one.csv" && mkdir -p "$case-one" && mv "$case-one.csv" "$case-one/log.csv"
    same "2 ranks, $case" "$case" "$case-one" 20
done
grep -q 'note: both.json: 2 experts for the host.s CPU are streamed' err && ok "experts of the host's CPU" ||
    bad "experts of the host's CPU" "no note"
other "offload, accumulate, recompute" 3 --offload 2 --recompute --accumulate 2

# ---- checkpoints do not know the number of ranks ---------------------------------------------------------
ranks 3 "${train[@]}" --steps 10 --out moved
run "$ditmoe" "${train[@]}" --steps 20 --out moved --resume
ranks 2 "${train[@]}" --steps 50 --out moved --resume --placement first.json
same "3 ranks, then 1, then 2" moved one 50

# ---- experts that move ---------------------------------------------------------------------------------
DITMOE_UNLIKE=1 ranks 2 "${train[@]}" --steps 50 --out agreed --checkpoint-every 10 --placement copies.json
same "copies that agree at checkpoints" agreed one 50
DITMOE_REPLAN=random ranks 3 "${train[@]}" --steps 50 --out anywhere --replan 7
same "experts anywhere, every 7 steps" anywhere one 50
grep -q '^49,7,2,all,' anywhere/ranks.csv && ok "ranks.csv" || bad "ranks.csv" "no row of rank 2 after step 49"
run "$ditmoe" plan "${model[@]}" --here --batch 6 --load anywhere/load.json
[ "$status" -eq 0 ] && ok "plan reads load.json" || bad "plan reads load.json" "exit status $status"
ranks 2 "${train[@]}" --steps 50 --out evened --replan 10
same "experts that even the load out" evened one 50
grep -q 'experts move after step' err && ok "and say so" || bad "and say so" "no such line"

# ---- samples -----------------------------------------------------------------------------------------------
draw=(sample --ckpt one --steps 3 --cfg 3 --batch 4 --device opencl:0)
run "$ditmoe" "${draw[@]}" --latents one.safetensors
for n in 2 3; do
    ranks $n "${draw[@]}" --latents "$n.safetensors"
    cmp one.safetensors "$n.safetensors" >/dev/null 2>&1 && ok "samples of $n ranks are those of one" ||
        bad "samples of $n ranks" "exit status $status, or they differ"
done
few=(sample --ckpt one --steps 3 --cfg 3 --batch 4 --device opencl:0 --count 10 --npz)
"$ditmoe" "${few[@]}" one.npz >/dev/null 2>&1
ranks 2 "${few[@]}" two.npz
cmp one.npz two.npz >/dev/null 2>&1 && ok "an archive of 2 ranks is that of one" ||
    bad "an archive of 2 ranks" "exit status $status, or they differ"
run "$ditmoe" "${draw[@]}" --sampler ddpm --latents noisy.safetensors
ranks 3 "${draw[@]}" --sampler ddpm --latents 3.safetensors
cmp noisy.safetensors 3.safetensors >/dev/null 2>&1 && ok "and with noise in every step" ||
    bad "samples with noise on 3 ranks" "exit status $status, or they differ"
for n in 2 3; do
    ranks $n "${draw[@]}" --latents peer$n.safetensors --fabric peer
    cmp one.safetensors peer$n.safetensors >/dev/null 2>&1 && ok "samples of $n ranks by peer windows" ||
        bad "samples of $n ranks by peer windows" "exit status $status, or they differ"
done
DITMOE_SHARE=0 ranks 2 "${draw[@]}" --latents apart.safetensors
cmp one.safetensors apart.safetensors >/dev/null 2>&1 && ok "and without windows" ||
    bad "samples of 2 ranks without windows" "exit status $status, or they differ"
ranks 2 "${draw[@]}" --latents away.safetensors --offload 2
cmp one.safetensors away.safetensors >/dev/null 2>&1 && grep -q 'offload 4 experts, of 2 of 2 blocks' err &&
    ok "and with experts in host memory" || bad "samples with experts in host memory" "exit status $status, or they differ"
rm -rf alone together # at rate 0, so that rounding in the steps changes no pixel
cp -r one alone && cp -r one together
# An archive of samples, its ranks killed in the middle: what was drawn is kept, and the end is that of one rank.
archive=(sample --ckpt one --steps 4 --cfg 3 --batch 4 --count 600 --device opencl:0 --npz)
run "$ditmoe" "${archive[@]}" alone.npz
setsid mpirun --oversubscribe --bind-to none -n 2 "$ditmoe" "${archive[@]}" killed.npz >out 2>err </dev/null &
pid=$!
drawn() { tail -c +4097 killed.npz.part 2>/dev/null | head -c 600 | tr -d '\000' | wc -c; } # after a page: a byte an image
for ((i = 0; i < 400 && $(drawn) < 40; i++)); do sleep 0.05; done
kill -KILL -- -$pid
wait $pid 2>/dev/null
for ((i = 0; i < 100; i++)); do # a rank ends when its mpirun is gone
    pgrep -f "ditmoe sample.*killed[.]npz" >/dev/null || break
    sleep 0.1
done
if [ -s killed.npz.part ] && [ ! -e killed.npz ]; then ok "a killed archive leaves its part"; else bad "a killed archive" "no part"; fi
ranks 2 "${archive[@]}" killed.npz
grep -qE '^600 images, [1-5]?[0-9]{1,2} to draw' err &&
    ok "it goes on where it was" || bad "a killed archive" "begins anew"
cmp alone.npz killed.npz >/dev/null 2>&1 && [ ! -e killed.npz.part ] && ok "and is that of one rank" ||
    bad "a killed archive" "exit status $status, or it differs"

# ---- evaluation ------------------------------------------------------------------------------------------------
eval=$root/tests/eval
fid=(eval fid --inception "$eval/narrow.pth" --samples "$eval/samples.npz" --reference "$eval/reference.npz" --batch 4
    --json --device opencl:0)
run "$ditmoe" "${fid[@]}"
cp out fid.json
ranks 3 "${fid[@]}"
[ "$status" -eq 0 ] && cmp -s fid.json out && ok "figures of 3 ranks are those of one, to the bit" ||
    bad "eval fid on 3 ranks" "exit status $status, or the figures differ"
ranks 2 eval fid --inception "$eval/narrow.pth" --samples none --reference "$eval/reference.npz" --device opencl:0
complains "eval fid of what is not there, on 2 ranks" "none"
ranks 2 eval knn --data data --ckpt one --device opencl:0
complains "eval knn on ranks" "knn runs on one device"

again=("${train[@]}" --resume --lr 0 --steps 54 --sample-every 54 --sample-steps 2)
run "$ditmoe" "${again[@]}" --out alone
ranks 3 "${again[@]}" --out together --placement empty.json
cmp alone/samples/step-00000054.png together/samples/step-00000054.png >/dev/null 2>&1 &&
    ok "grids during training" || bad "grids during training" "exit status $status, or they differ"

# ---- what goes wrong ---------------------------------------------------------------------------------------
rm -rf together
run "$ditmoe" "${train[@]}" --steps 3 --out together --device opencl:0,opencl:0
[ "$status" -eq 0 ] && grep -q 'rank 1: ' err && ok "--device A,B starts mpirun itself" ||
    bad "--device A,B" "exit status $status"
run env PATH=/nowhere "$ditmoe" "${train[@]}" --out no --device opencl:0,opencl:0
complains "no mpirun" "several devices need mpirun.*openmpi-bin"
run mpirun -n 2 env DITMOE_MPI=/nowhere/module.so "$ditmoe" "${train[@]}" --out no
grep -q 'no MPI module /nowhere/module.so' err && [ "$status" -ne 0 ] && ok "no module" || bad "no module" "status $status"
ranks 2 "${train[@]}" --out no --device auto
complains "more ranks than devices" "2 ranks on this machine, but [0-9]* device"
run mpirun --oversubscribe -n 1 "$ditmoe" "${train[@]}" --out no : -n 1 "$ditmoe" "${train[@]}" --out no --lr 1
complains "other options" "rank 1 was started with other options than rank 0"
mkdir here there && cp -r moved here/run && cp -r moved there/run && rm there/run/step-00000050.safetensors
run mpirun --oversubscribe -n 1 --wdir "$work/here" "$ditmoe" "${train[@]}" --steps 60 --out run --resume \
    : -n 1 --wdir "$work/there" "$ditmoe" "${train[@]}" --steps 60 --out run --resume
complains "another checkpoint" "rank 1 has found another checkpoint than rank 0"
ranks 2 "${train[@]}" --out no --placement empty.json
complains "a placement for other ranks" "empty.json.*3 ranks"
ranks 2 "${train[@]}" --out no --headroom 0.5 --steps 2
complains "too little room for rows" "layer 0: .* rows for the experts of rank .* --headroom"
ranks 2 "${train[@]}" --out no --memory 1MiB
complains "too little memory" "not enough memory: needs .*--headroom 2"
ranks 2 "${train[@]}" --out no --placement replicated --fabric peer
complains "peer windows and copies" "--fabric peer: .*--placement replicated"
ranks 2 "${train[@]}" --out no --headroom 2 --fabric peer
complains "peer windows and headroom" "--fabric peer: .*--headroom"
ldd "$ditmoe" | grep -qi libmpi && bad "the program links no MPI" "it does" || ok "the program links no MPI"
ranks 2 "${train[@]}" --out no --layers x
complains "a mistake on all ranks is told once" "--layers x: not a number"
ranks 2 "${train[@]}" --out copied --steps 3 --replan 1 --placement copies.json
complains "copies do not move" "--replan: this placement has copies"
place twice.json 2 '[4, 2]' '[{"ranks": [0], "owner": [[0, 0, 0, 0]], "home": ["ssss"]}, {"ranks": [1], "owner": [[1, 1, 1, 1]]}]'
ranks 2 "${train[@]}" --out no --placement twice.json
complains "copies in host memory" "lives in the host memory of a rank and has copies on others"
DITMOE_HOST_MEMORY=1500000 ranks 2 "${train[@]}" --out no --offload 2 # enough for one of them
complains "host memory for one rank of two" "with those of the machine's other ranks, .* are missing"
rm -rf no
ranks 2 "${train[@]}" --out stays --steps 3 --replan 1 --placement home.json
complains "experts in host memory by a placement do not move" "--replan: this placement has experts in host memory"
DITMOE_REPLAN=random ranks 3 "${train[@]}" --steps 50 --out wander --replan 9 --offload 1
same "with --offload they do" wander one 50
ranks 2 "${train[@]}" --out no --early-update
complains "early updates" "early updates are for one rank"

# A rank dies: the others end within seconds, say who and where, and the run goes on from its checkpoint.
slow=("${train[@]}" --lr 1e-4 --checkpoint-every 5)
lose() { # lose NAME SECONDS OPTIONS...: the others end within that time
    rm -rf killed
    mpirun --oversubscribe --bind-to none -n 3 "$ditmoe" "${slow[@]}" --steps 100000 --out killed "${@:3}" \
        >out 2>err </dev/null &
    launcher=$!
    for ((i = 0; i < 600; i++)); do
        [ -f killed/step-00000005.safetensors ] && break
        sleep 0.05
    done
    for p in $(pgrep -P $launcher); do
        grep -qz '^OMPI_COMM_WORLD_RANK=1$' /proc/"$p"/environ && kill -9 "$p"
    done
    start=$SECONDS
    wait $launcher
    status=$?
    complains "$1" "rank 1 \(process [0-9]+\) has died; it was: .* in step [0-9]+.* with --resume"
    [ $((SECONDS - start)) -le "$2" ] && ok "the others end soon" || bad "the others end soon" "$((SECONDS - start)) s"
}
export OMPI_MCA_odls_base_sigkill_timeout=4 # devices that wait on few cores take their time
lose "a rank that dies for which devices wait" 20 --fabric peer
unset OMPI_MCA_odls_base_sigkill_timeout
lose "a rank that dies" 8
steps=$(ls killed | sed -n 's/^step-0*\([0-9]*\).safetensors$/\1/p' | sort -n | tail -n 1)
steps=$((${steps:-0} + 5))
ranks 2 "${slow[@]}" --steps $steps --out killed --resume
resumed=$status
run "$ditmoe" "${slow[@]}" --steps $steps --out whole
status=$resumed
same "and the run goes on" killed whole $steps

# One rank is asked to stop: all finish the step and write a checkpoint.
mpirun --oversubscribe --bind-to none -n 2 "$ditmoe" "${slow[@]}" --steps 100000 --out stopped >out 2>err </dev/null &
launcher=$!
for ((i = 0; i < 600; i++)); do
    [ -f stopped/step-00000005.safetensors ] && break
    sleep 0.05
done
for p in $(pgrep -P $launcher); do
    grep -qz '^OMPI_COMM_WORLD_RANK=1$' /proc/"$p"/environ && kill -TERM "$p"
done
wait $launcher
status=$?
[ "$status" -eq 0 ] && grep -q 'stopped at step .* continue with --resume' err && ok "a rank that is asked to stop" ||
    bad "a rank that is asked to stop" "exit status $status"

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
