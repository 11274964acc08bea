"""Times rows of a PyTorch peer on a GPU, one by one. A developer's tool; the peer is a folder with a module bench_torch.

    peer_gpu.py FOLDER OUT.json ROW...        ROW: sample:S/2:128:default, train:B/2:128:default, sample32:S/2:128:eager

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


def main():
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
