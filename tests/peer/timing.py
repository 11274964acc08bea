"""What the peers share: timing of PyTorch modules on a GPU, and the file that `ditmoe bench --compare` reads.

A way is (name, call, memory order): how one module is run. Each time is the median of 5 rounds of as many calls as take 0.3 s,
inputs on the device, TF32 off, cuDNN choosing its algorithms by trying them.
"""
import json
import time

import torch


def median_call(call):
    """Seconds of a call."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.time()
    call()
    torch.cuda.synchronize()
    calls, times = max(1, int(0.3 / (time.time() - start))), []
    for _ in range(5):
        start = time.time()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        times.append((time.time() - start) / calls)
    return sorted(times)[2]


@torch.no_grad()
def time_ways(out, ways, cases):
    """Times every way on every case, {label: (input, row)}, and writes each case's fastest: its row with seconds and mode."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    rows = {}
    for name, call, order in ways:
        for label, (x, row) in cases.items():
            x = x.contiguous(memory_format=order)
            try:
                seconds = median_call(lambda: call(x))
            except Exception as error:  # out of memory, say: the other rows still count
                print(f"{name} {label}: {error!r:.200}", flush=True)
                continue
            print(f"{name} {label}: {1e3 * seconds:.2f} ms, {row['batch'] / seconds:.1f} images/s", flush=True)
            if label not in rows or seconds < rows[label]["seconds"]:
                rows[label] = row | {"seconds": seconds, "mode": name}
            with open(out, "w") as f:
                json.dump(list(rows.values()), f, indent=1)
