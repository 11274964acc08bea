"""Writes the autoencoders that tests/vae_test.c reads, and what diffusers makes of them: python3 make_vae.py

Weights are random and rounded to float16, so that files are small and every reader starts from the same numbers.
kl.safetensors: AutoencoderKL, newer attention names. kl_old.bin: the same weights with the older names, and with
1x1 convolutions where newer files have matrices. plain.safetensors: three levels, other channels, neither quant_conv nor post_quant_conv.
tiny.safetensors: AutoencoderTiny; taesd_encoder.pth and taesd_decoder.pth: the same weights in TAESD's own layout.
expected.safetensors: inputs and outputs, in float32. Small weights would leave everything linear: gains are about 1.
"""
import collections
import os

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))


def at(name):
    return os.path.join(HERE, name)


def randomise(model, seed):
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            fan_in = p[0].numel()
            value = torch.randn(p.shape, generator=g) * (1.3 / fan_in) ** 0.5
        elif name.endswith("bias"):
            value = torch.randn(p.shape, generator=g) * 0.1
        else:
            value = 1 + 0.2 * torch.randn(p.shape, generator=g)
        p.data = value.half().float()
    return model.eval()


def halves(model):
    return {k: v.half().contiguous() for k, v in model.state_dict().items()}


def old_names(state):
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    out = collections.OrderedDict()
    for name, t in state.items():
        for new, old in renamed.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        if "attentions" in name and t.ndim == 2 and "value" in name:
            t = t[:, :, None, None]
        out[name] = t
    return out


def taesd(state, part, first):
    prefix = f"{part}.layers."
    out = collections.OrderedDict()
    for name, t in state.items():
        if name.startswith(prefix):
            number, rest = name[len(prefix):].split(".", 1)
            out[f"{int(number) + first}.{rest}"] = t
    return out


def run(name, model, image, latent, expected, tiles=None):
    expected[f"{name}.image"] = image
    expected[f"{name}.latent"] = latent
    encoded = model.encode(image)
    if hasattr(encoded, "latent_dist"):
        expected[f"{name}.mean"] = encoded.latent_dist.mean
        expected[f"{name}.logvar"] = encoded.latent_dist.logvar
    else:
        expected[f"{name}.mean"] = encoded.latents
    expected[f"{name}.decoded"] = model.decode(latent).sample
    if tiles:
        factor = image.shape[-1] // expected[f"{name}.mean"].shape[-1]
        model.tile_latent_min_size = tiles
        model.tile_sample_min_size = tiles * factor
        model.enable_tiling()
        expected[f"{name}.tiled"] = model.decode(latent).sample


@torch.no_grad()
def main():
    g = torch.Generator().manual_seed(1)
    expected = {}
    kl = randomise(AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
                                 up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4,
                                 norm_num_groups=8), 2)
    state = halves(kl)
    save_file(state, at("kl.safetensors"))
    torch.save(old_names(state), at("kl_old.bin"))
    run("kl", kl, torch.rand(2, 3, 12, 20, generator=g) * 2 - 1, torch.randn(2, 4, 13, 9, generator=g), expected, 8)
    plain = randomise(AutoencoderKL(block_out_channels=(4, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
                                    up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=2, latent_channels=3,
                                    norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False), 3)
    save_file(halves(plain), at("plain.safetensors"))
    run("plain", plain, torch.rand(1, 3, 8, 16, generator=g) * 2 - 1, torch.randn(1, 3, 1, 5, generator=g), expected)
    tiny = randomise(AutoencoderTiny(encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
                                     num_encoder_blocks=(1, 2, 1), num_decoder_blocks=(1, 2, 1)), 4)
    state = halves(tiny)
    save_file(state, at("tiny.safetensors"))
    torch.save(taesd(state, "encoder", 0), at("taesd_encoder.pth"))
    torch.save(taesd(state, "decoder", 1), at("taesd_decoder.pth"))
    run("tiny", tiny, torch.rand(2, 3, 8, 12, generator=g) * 2 - 1, torch.randn(2, 4, 3, 5, generator=g) * 2, expected)
    save_file({k: v.contiguous() for k, v in expected.items()}, at("expected.safetensors"))
    for k, v in expected.items():
        print(k, tuple(v.shape), f"rms {v.square().mean().sqrt().item():.3f}")


main()
