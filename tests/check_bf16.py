"""How far bf16 may be from f32: compares a ditmoe program with PyTorch on one model of full size. Needs torch with CUDA.

    check_bf16.py build/ditmoe [--preset S/2] [--images 2] [--device cuda:0] [--peer FOLDER]

Writes random weights (representable in bf16, so that both precisions start from the same model), runs `ditmoe forward`
in f32 and in bf16, and judges both by PyTorch in f32 without TF32. With --peer, a folder with a module ditmoe_torch that
has a class DiTMoE, that network in bf16 is the bar: the program's bf16 output must be no further from f32 than its.
The experts that the program's bf16 pass chooses must be those of its f32 pass for 99% of tokens.
"""
import argparse
import json
import math
import os
import sys
import tempfile

import torch
from safetensors.torch import save_file

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from check_parity import Program, ref  # noqa: E402

WIDTHS = {"S/2": (12, 384, 6), "B/2": (12, 768, 12), "L/2": (24, 1024, 16), "XL/2": (28, 1152, 16)}


def random_weights(cfg, seed):
    """As reference.random_params, but made on the GPU, rounded to bf16, and with residual branches of a trained size."""
    g = torch.Generator("cuda").manual_seed(seed)
    params = {}
    for name, shape in ref.shapes(cfg).items():
        if name == "pos_embed":
            params[name] = ref.position_table(cfg["hidden"], cfg["size"] // cfg["patch"]).cuda()
            continue
        z = torch.randn(shape, generator=g, device="cuda")
        if "_norm.weight" in name:
            z = 1 + 0.2 * z
        elif name.endswith(".bias"):
            z = 0.1 * z
        elif "embedding_table" in name:
            z = 0.3 * z
        else:
            z = z * (0.3 if "adaLN" in name else 1.0) / math.sqrt(math.prod(shape[1:]))
        params[name] = z.bfloat16()
    return params


def peer_output(folder, preset, cfg, p, i):
    """The output of the PyTorch peer with these weights, everything in bf16."""
    sys.path.insert(0, folder)
    from ditmoe_torch import DiTMoE
    m = DiTMoE(preset, cfg["experts"], cfg["topk"], "grouped", cfg["size"], cfg["classes"], cfg["qk_norm"])
    m = m.to("cuda", torch.bfloat16).eval()
    state = {"patch.weight": p["x_embedder.proj.weight"], "patch.bias": p["x_embedder.proj.bias"],
             "pos": p["pos_embed"], "y.weight": p["y_embedder.embedding_table.weight"]}

    def copy(to, name, bias=True):
        state[to + ".weight"] = p[name + ".weight"]
        if bias:
            state[to + ".bias"] = p[name + ".bias"]

    copy("t1", "t_embedder.mlp.0")
    copy("t2", "t_embedder.mlp.2")
    copy("fada", "final_layer.adaLN_modulation.1")
    copy("flin", "final_layer.linear")
    for layer in range(cfg["layers"]):
        b = f"blocks.{layer}."
        copy(b + "attn.Wqkv", b + ("attn.Wqkv" if cfg["qk_norm"] else "attn.qkv"))
        copy(b + "attn.out_proj", b + ("attn.out_proj" if cfg["qk_norm"] else "attn.proj"))
        for norm in ("q_norm", "k_norm") if cfg["qk_norm"] else ():
            copy(b + "attn." + norm, b + "attn." + norm)
        copy(b + "ada.1", b + "adaLN_modulation.1")
        state[b + "moe.gate"] = p[b + "moe.gate.weight"]
        for part in ("gate_proj", "up_proj", "down_proj"):
            copy(f"{b}moe.shared.{part}", f"{b}moe.shared_experts.{part}", False)
        experts = [f"{b}moe.experts.{e}." for e in range(cfg["experts"])]
        state[b + "moe.w_gu"] = torch.stack([torch.cat([p[e + "gate_proj.weight"], p[e + "up_proj.weight"]]).T
                                             for e in experts])
        state[b + "moe.w_d"] = torch.stack([p[e + "down_proj.weight"].T for e in experts])
    m.load_state_dict({n: v.bfloat16() for n, v in state.items()})
    return m(i["x"].bfloat16(), i["t"], i["y"]).float()


def far(got, want):
    """|got - want| / |want|, both as one vector."""
    return ((got.double().cpu() - want.double().cpu()).norm() / want.double().norm().cpu()).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ditmoe")
    parser.add_argument("--preset", default="S/2", choices=WIDTHS)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--peer", metavar="FOLDER")
    a = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    layers, hidden, heads = WIDTHS[a.preset]
    cfg = ref.make_config(layers=layers, hidden=hidden, heads=heads, size=32, classes=1000, experts=8, topk=2,
                          qk_norm=a.preset == "XL/2")
    params, inputs = random_weights(cfg, 1), ref.random_inputs(cfg, a.images, 2)
    inputs.pop("noise")
    with tempfile.TemporaryDirectory(prefix="ditmoe-bf16-", dir="/dev/shm") as folder:
        program = Program(a.ditmoe, a.device, folder)
        checkpoint = folder + "/model.safetensors"
        save_file({n: v.cpu() for n, v in params.items()}, checkpoint, {"ditmoe.config": json.dumps(cfg)})
        ours = {kind: program.forward(checkpoint, inputs, "--precision", kind) for kind in ("f32", "bf16")}
    for kind, result in ours.items():
        if isinstance(result, str):
            print(f"FAILED {kind}: {result}")
            return 1
    with torch.no_grad(), torch.device("cuda"):
        on_gpu = {n: v.cuda() for n, v in inputs.items()}
        peer = peer_output(a.peer, a.preset, cfg, params, on_gpu) if a.peer else None
        whole = {n: v.float() for n, v in params.items()}
        want, record = ref.forward(whole, cfg, on_gpu["x"], on_gpu["t"], on_gpu["y"])
    same = total = 0
    for r in record:
        name = f"experts.{r['layer']}"
        chosen = {kind: result[name].long().sort(-1).values for kind, result in ours.items()}
        same += (chosen["bf16"] == chosen["f32"]).all(-1).sum().item()
        total += chosen["f32"].shape[0]
    f32, bf16 = far(ours["f32"]["out"], want), far(ours["bf16"]["out"], want)
    bar = far(peer, want) if peer is not None else None
    wrong = not f32 < 1e-3 or same < 0.99 * total or (bar is not None and bf16 > bar)
    print(f"{'FAILED' if wrong else 'ok':7}{a.preset}-8E2A, {a.images} images: f32 is off by {f32:.1e}, bf16 by {bf16:.2e}"
          + (f" (the peer's bf16 by {bar:.2e})" if peer is not None else "")
          + f"; bf16 chooses the experts of f32 for {100 * same / total:.2f}% of tokens")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
