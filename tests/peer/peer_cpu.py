"""The speed peer of `ditmoe bench step`: one sampling or training step of the same network in PyTorch on the CPU.

Written as a good PyTorch user would today: fused scaled dot-product attention, tokens sorted by expert so that each
expert is a few dense products on contiguous rows, fused AdamW, float32, and on request torch.compile. Prints one line
of JSON: `ms` is the median wall-clock time of a step, `cpu_ms` the processor time per thread, which other load on the
machine disturbs less (set OMP_WAIT_POLICY=PASSIVE then, or waiting threads spin). Needs torch 2.4 or newer.
"""
import argparse
import json
import math
import os
import signal
import statistics
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

BALANCE = 0.01


class SwiGLU(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        # sampling: no gradient needs the operands, so two temporaries less
        return self.down_proj(F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x)))


class Gather(torch.autograd.Function):
    """Rows of x by `forth`, each row of x being taken k times; `back` holds the places it went to, so that the gradient is
    a gather as well (autograd's own is a scatter)."""

    @staticmethod
    def forward(ctx, x, forth, back, k):
        ctx.save_for_backward(back)
        ctx.k = k
        return x.index_select(0, forth)

    @staticmethod
    def backward(ctx, grad):
        back, = ctx.saved_tensors
        rows = grad.index_select(0, back)
        return (rows.view(-1, ctx.k, rows.shape[1]).sum(1) if ctx.k > 1 else rows), None, None, None


def swiglu(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


swiglu_compiled = torch.compile(swiglu, dynamic=True)
compiled = False


@torch.compiler.disable(recursive=False)
def walk(experts, rows, counts):
    """Each expert on its own contiguous rows, in a graph of its own where compiled: their number changes each time."""
    parts = [(e, part) for e, part in zip(experts, rows.split(counts.tolist())) if len(part)]
    if compiled:
        return torch.cat([swiglu_compiled(part, e.gate_proj.weight, e.up_proj.weight, e.down_proj.weight)
                          for e, part in parts])
    return torch.cat([e(part) for e, part in parts])


class MoE(nn.Module):
    def __init__(self, width, experts, topk, shared):
        super().__init__()
        self.topk = topk
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList([SwiGLU(width, 4 * width) for _ in range(experts)])
        self.shared_experts = SwiGLU(width, shared * width) if shared else None
        self.balance = None

    def forward(self, x):
        shape, k, count = x.shape, self.topk, len(self.experts)
        x = x.reshape(-1, shape[-1])
        probability = self.gate(x).softmax(-1)
        weight, chosen = probability.topk(k, -1, sorted=False)
        chosen = chosen.flatten()
        counts = F.one_hot(chosen, count).sum(0)
        if self.training:
            self.balance = BALANCE * count * (probability.mean(0) * counts / chosen.numel()).sum()
        order = chosen.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
        rows = walk(self.experts, Gather.apply(x, order // k, place, k), counts)
        rows = Gather.apply(rows, place, order, 1).view(-1, k, shape[-1])
        out = (rows * weight.unsqueeze(-1)).sum(1)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out.view(shape)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))


def modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    def __init__(self, width, heads, experts, topk, shared):
        super().__init__()
        self.attn = Attention(width, heads)
        self.moe = MoE(width, experts, topk, shared)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(x, shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.moe(modulate(x, shift_m, scale_m))


class Final(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        return self.linear(modulate(x, *self.adaLN_modulation(c).chunk(2, 1)))


class DiTMoE(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.patch, self.side, d = a.patch, a.size // a.patch, a.hidden
        self.outputs = 2 * a.channels
        self.x_embedder = nn.Conv2d(a.channels, d, a.patch, a.patch)
        self.register_buffer("pos_embed", torch.randn(1, self.side ** 2, d))
        self.t_embedder = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        self.y_embedder = nn.Embedding(a.classes + 1, d)
        self.blocks = nn.ModuleList([Block(d, a.heads, a.experts, a.topk, a.shared) for _ in range(a.layers)])
        self.final_layer = Final(d, a.patch ** 2 * self.outputs)
        self.register_buffer("frequency", torch.exp(-math.log(10000) * torch.arange(128) / 128))

    def forward(self, x, t, y):
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        angle = t.unsqueeze(1) * self.frequency
        c = self.t_embedder(torch.cat([angle.cos(), angle.sin()], 1)) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c).view(-1, self.side, self.side, self.patch, self.patch, self.outputs)
        side = self.side * self.patch
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.outputs, side, side)


# ---- steps -----------------------------------------------------------------------------------------------------------

def sample_step(a, model, forward):
    """One forward pass, as a step of a sampler without guidance; with guidance `batch` is twice the images."""
    model.eval()
    x, t = torch.randn(a.batch, a.channels, a.size, a.size), torch.rand(a.batch)
    y = torch.randint(a.classes, (a.batch,))

    def step():
        with torch.no_grad():
            forward(x, t, y)
    return step


def train_step(a, model, forward):
    """Rectified flow with balance loss, backward, AdamW, EMA."""
    model.train()
    average = [p.detach().clone() for p in model.parameters()]
    weights = list(model.parameters())
    adamw = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0, fused=True)
    shape = (a.batch, a.channels, a.size, a.size)
    x, y = torch.randn(shape), torch.randint(a.classes, (a.batch,))

    def step():
        t, noise = torch.sigmoid(torch.randn(a.batch)), torch.randn(shape)
        at = t.view(-1, 1, 1, 1)
        velocity = forward((1 - at) * x + at * noise, t, y)[:, :a.channels]
        loss = F.mse_loss(velocity, noise - x) + sum(block.moe.balance for block in model.blocks)
        adamw.zero_grad(set_to_none=True)
        loss.backward()
        adamw.step()
        torch._foreach_lerp_(average, [w.detach() for w in weights], 1e-4)
    return step


def timed(step, rounds, seconds):
    for _ in range(2):
        step()
    times, cpu, end = [], [], time.perf_counter() + seconds
    while len(times) < rounds and (len(times) < 3 or time.perf_counter() < end):
        start, used = time.perf_counter(), time.process_time()
        step()
        times.append(1e3 * (time.perf_counter() - start))
        cpu.append(1e3 * (time.process_time() - used) / torch.get_num_threads())
    return times, cpu


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in dict(layers=6, hidden=256, heads=4, patch=4, size=32, channels=1, classes=10, experts=8, topk=2,
                            shared=2, batch=64, rounds=9, threads=os.cpu_count(), compiled=0, limit=300).items():
        p.add_argument("--" + name, type=int, default=value)
    p.add_argument("--what", choices=("sample", "train"), default="sample")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    signal.alarm(a.limit)
    global compiled
    compiled = bool(a.compiled)
    model = DiTMoE(a)
    forward = torch.compile(model) if a.compiled else model
    start = time.perf_counter()
    step = (train_step if a.what == "train" else sample_step)(a, model, forward)
    step()
    first = time.perf_counter() - start
    times, cpu = timed(step, a.rounds, a.limit / 3)
    ms = statistics.median(times)
    print(json.dumps(dict(what=a.what, mode="compiled" if a.compiled else "eager", ms=round(ms, 2),
                          ms_best=round(min(times), 2), cpu_ms=round(statistics.median(cpu), 2),
                          images_per_s=round(1e3 * a.batch / ms, 2), batch=a.batch,
                          rounds=len(times), threads=torch.get_num_threads(), first_s=round(first, 1),
                          torch=torch.__version__, cpu=torch.backends.cpu.get_cpu_capability())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
