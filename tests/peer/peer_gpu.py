"""Times rows of a PyTorch peer on a GPU, one by one. A developer's tool; the peer is a folder with a module bench_torch.

    peer_gpu.py FOLDER OUT.json ROW...        ROW: sample:S/2:128:default, train:B/2:128:default, sample32:S/2:128:eager

    peer_gpu.py --show OURS.json... [--peer OUT.json]     rows of `ditmoe bench step --json`, and the peer's time over ours

Each row is printed and written to OUT.json (what `ditmoe bench step --compare` reads) as soon as it is known: compiling
takes up to four minutes a row, and whatever ends the run early loses only what is not measured yet. The last part of a
row is how it is compiled: eager, default, reduce-overhead (CUDA graphs). sample32 is f32 without TF32, expert by expert.
"""
import json
import sys
import time


def measure(peer, kind, preset, batch, mode):
    if kind == "train":
        ms, memory = peer.train_step(preset, 8, "grouped", batch, mode != "eager")
        return ["train", preset, "8", "grouped", str(batch), str(mode != "eager")], ms, memory
    whole = kind == "sample32"
    for backend in (peer.torch.backends.cuda.matmul, peer.torch.backends.cudnn):
        backend.allow_tf32 = not whole
    way, dtype = ("loop", peer.torch.float32) if whole else ("grouped", peer.torch.bfloat16)
    ms, memory = peer.sample_step(preset, 8, way, batch, None if mode == "eager" else mode, dtype=dtype)
    return ["sample f32" if whole else "sample", preset, "8", way, str(batch), mode], ms, memory


def show(arguments):
    """A line a row of ours; with a peer, its bf16 row of the same step, model (8 experts) and batch."""
    peer = {}
    if "--peer" in arguments:
        at = arguments.index("--peer")
        with open(arguments[at + 1]) as f:
            peer = {(r[0], r[1], r[4]): float(r[6].split()[0]) for r in json.load(f) if len(r) > 6}
        arguments = arguments[:at]
    for name in arguments:
        with open(name) as f:
            rows = json.load(f)
        for r in (r for r in rows if "what" in r): # the others are ceilings
            line = f"{r['name']:12} {r['what']:7} {r['batch']:5} {r['ms']:9.2f} ms {r['images_per_s']:9.1f} images/s " \
                   f"{r['allocated'] / 2**30:6.1f} GiB"
            theirs = peer.get((r["what"], r["name"].split("-")[0], str(r["batch"])))
            print(line + (f"   peer {theirs:.2f} ms, ratio {theirs / r['ms']:.2f}" if theirs else ""), flush=True)


def main():
    if sys.argv[1] == "--show":
        return show(sys.argv[2:])
    folder, out, *specs = sys.argv[1:]
    sys.path.insert(0, folder)
    import bench_torch as peer
    rows = []
    for spec in specs:
        kind, preset, batch, mode = spec.split(":")
        start = time.time()
        try:
            row, ms, memory = measure(peer, kind, preset, int(batch), mode)
            rows.append(row + [f"{ms:.2f} ms", f"{memory:.1f} GiB"])
        except Exception as error:  # out of memory, say: the other rows still count
            rows.append([spec, "ERR " + repr(error)[:200]])
        print(*rows[-1], f"[{time.time() - start:.0f} s]", flush=True)
        with open(out, "w") as f:
            json.dump(rows, f)


if __name__ == "__main__":
    main()
