"""Times the decoder of Stable Diffusion's autoencoder in PyTorch on a GPU, for `ditmoe bench vae --compare OUT.json`.

    peer_vae.py OUT.json [--eager] [SIZE:BATCH ...]        default: 256:1 256:16 512:1 512:4

With diffusers, where it is installed, its AutoencoderKL; else the same layers as plain modules. bf16, random weights, the
fastest of: eager in PyTorch's usual memory order, eager in channels_last, compiled (torch.compile, max-autotune-no-cudagraphs)
in channels_last (not with `--eager`: compiling takes minutes). timing.py says how; without transfers, as in the benchmark.
`--check` compares the plain modules with diffusers' in float32 on the CPU instead of timing.
"""
import sys

import torch
from torch import nn
from torch.nn import functional as F

import timing

WIDTHS, LAYERS, LATENTS = (128, 256, 512, 512), 2, 4


class ResnetBlock2D(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, a, 1e-6), nn.Conv2d(a, b, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, b, 1e-6), nn.Conv2d(b, b, 3, padding=1)
        if a != b:
            self.conv_shortcut = nn.Conv2d(a, b, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, c, 1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(c, c) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):
        n, c, h, w = x.shape
        t = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (f(t)[:, None] for f in (self.to_q, self.to_k, self.to_v))
        o = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + o.transpose(1, 2).reshape(n, c, h, w)


class MidBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock2D(c, c), ResnetBlock2D(c, c)])
        self.attentions = nn.ModuleList([Attention(c)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Upsample2D(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UpBlock(nn.Module):
    def __init__(self, a, b, last):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock2D(a if i == 0 else b, b) for i in range(LAYERS + 1)])
        self.upsamplers = nn.ModuleList([] if last else [Upsample2D(b)])

    def forward(self, x):
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        up = WIDTHS[::-1]
        self.conv_in = nn.Conv2d(LATENTS, up[0], 3, padding=1)
        self.mid_block = MidBlock(up[0])
        self.up_blocks = nn.ModuleList([UpBlock(up[max(i - 1, 0)], up[i], i == 3) for i in range(4)])
        self.conv_norm_out = nn.GroupNorm(32, up[-1], 1e-6)
        self.conv_out = nn.Conv2d(up[-1], 3, 3, padding=1)

    def forward(self, x):
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.post_quant_conv, self.decoder = nn.Conv2d(LATENTS, LATENTS, 1), Decoder()

    def forward(self, z):
        return self.decoder(self.post_quant_conv(z))


def of_diffusers():
    from diffusers import AutoencoderKL
    model = AutoencoderKL(block_out_channels=WIDTHS, down_block_types=("DownEncoderBlock2D",) * 4,
                          up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=LAYERS, latent_channels=LATENTS)
    model.forward = lambda z: model.decode(z, return_dict=False)[0]
    return model


def check():
    torch.manual_seed(0)
    theirs, ours = of_diffusers().eval(), Plain().eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k in ours.state_dict()})
    z = torch.randn(1, LATENTS, 8, 8)
    with torch.no_grad():
        print("largest difference", (theirs.forward(z) - ours(z)).abs().max().item())


def ways(compiled):
    """For timing.py; the slow one to make last."""
    try:
        model = of_diffusers()
        name = "diffusers"
    except ImportError:
        model = Plain()
        name = "plain torch"
    model = model.cuda().bfloat16().eval()
    yield f"{name}, eager", model.forward, torch.contiguous_format
    model = model.to(memory_format=torch.channels_last)
    yield f"{name}, eager, channels_last", model.forward, torch.channels_last
    if compiled:
        plain = Plain().cuda().bfloat16().eval().to(memory_format=torch.channels_last)
        yield ("plain torch, compiled, channels_last", torch.compile(plain, mode="max-autotune-no-cudagraphs"),
               torch.channels_last)


def main():
    out, *specs = [a for a in sys.argv[1:] if a != "--eager"]
    cases = {}
    for spec in specs or ["256:1", "256:16", "512:1", "512:4"]:
        size, batch = map(int, spec.split(":"))
        z = torch.randn(batch, LATENTS, size // 8, size // 8, device="cuda", dtype=torch.bfloat16)
        cases[spec] = z, {"bench": "vae", "name": f"AutoencoderKL {size}", "what": "decode", "type": "bf16", "batch": batch}
    timing.time_ways(out, ways("--eager" not in sys.argv), cases)


if __name__ == "__main__":
    check() if sys.argv[1:] == ["--check"] else main()
