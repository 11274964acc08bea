"""DiT-MoE (arXiv 2407.11633) in plain PyTorch: the reference that the C code is checked against.

Written for reading, not for speed: a model is a dictionary from published parameter names to tensors, the forward
pass a few functions over it, and gradients come from autograd. Works in float32 or float64, whatever the
parameters are. Letters as in runtime/tensor.h: N images, T tokens an image, D width, H heads, E experts, K active.
"""
import math

import torch
import torch.nn.functional as F

FREQUENCIES = 256  # width of the sinusoidal timestep embedding
EPS = 1e-6         # of every LayerNorm
MLP_RATIO = 4      # width of the dense MLP and of one routed expert, in D

DEFAULTS = dict(layers=2, hidden=32, heads=2, patch=2, channels=4, size=8, classes=10, experts=4, topk=2, shared=2,
                moe="all", expert="swiglu", qk_norm=False, learn_sigma=True, renormalise=False, balance=0.01,
                balance_per_sequence=False, class_dropout=0.1, diffusion="rf")


def make_config(**changes):
    unknown = set(changes) - set(DEFAULTS)
    assert not unknown, unknown
    return DEFAULTS | changes


def is_moe(cfg, layer):
    """Which blocks have experts; the others have the plain MLP of DiT."""
    half = cfg["layers"] // 2
    return {"all": True, "none": False, "alternate": layer % 2 == 1,
            "shallow": layer < half, "deep": layer >= half}[cfg["moe"]]


def label_rows(cfg):
    """The null class that dropped labels become is the last row."""
    return cfg["classes"] + (cfg["class_dropout"] > 0)


def out_channels(cfg):
    return cfg["channels"] * (2 if cfg["learn_sigma"] else 1)


# ---- parameters ------------------------------------------------------------------------------------------------------

def shapes(cfg):
    """Every parameter's published name and shape, in the published order. pos_embed is fixed, all others are trained."""
    D, p, C = cfg["hidden"], cfg["patch"], cfg["channels"]
    s = {}

    def linear(name, o, i, bias=True):
        s[name + ".weight"] = (o, i)
        if bias:
            s[name + ".bias"] = (o,)

    def swiglu(name, width):
        linear(name + ".gate_proj", width, D, False)
        linear(name + ".up_proj", width, D, False)
        linear(name + ".down_proj", D, width, False)

    def mlp(name, width):
        linear(name + ".fc1", width, D)
        linear(name + ".fc2", D, width)

    s["pos_embed"] = (1, (cfg["size"] // p) ** 2, D)
    s["x_embedder.proj.weight"] = (D, C, p, p)
    s["x_embedder.proj.bias"] = (D,)
    linear("t_embedder.mlp.0", D, FREQUENCIES)
    linear("t_embedder.mlp.2", D, D)
    s["y_embedder.embedding_table.weight"] = (label_rows(cfg), D)
    for layer in range(cfg["layers"]):
        b = f"blocks.{layer}."
        if cfg["qk_norm"]:
            linear(b + "attn.Wqkv", 3 * D, D)
            for norm in ("q_norm", "k_norm"):
                s[f"{b}attn.{norm}.weight"] = s[f"{b}attn.{norm}.bias"] = (D // cfg["heads"],)
            linear(b + "attn.out_proj", D, D)
        else:
            linear(b + "attn.qkv", 3 * D, D)
            linear(b + "attn.proj", D, D)
        if is_moe(cfg, layer):
            for e in range(cfg["experts"]):
                (mlp if cfg["expert"] == "gelu" else swiglu)(f"{b}moe.experts.{e}", MLP_RATIO * D)
            s[b + "moe.gate.weight"] = (cfg["experts"], D)
            if cfg["shared"]:
                swiglu(b + "moe.shared_experts", cfg["shared"] * D)
        else:
            mlp(b + "mlp", MLP_RATIO * D)
        linear(b + "adaLN_modulation.1", 6 * D, D)
    linear("final_layer.linear", p * p * out_channels(cfg), D)
    linear("final_layer.adaLN_modulation.1", 2 * D, D)
    return s


def position_table(D, side):
    """[1, side*side, D]: first half of D from the column, second from the row; in each half sines, then cosines.
    Angles in float64, rounded to float32 at the end."""
    omega = 10000.0 ** (-torch.arange(D // 4, dtype=torch.float64) / (D / 4))
    token = torch.arange(side * side)
    halves = [torch.outer(place.double(), omega) for place in (token % side, token // side)]
    return torch.cat([f(a) for a in halves for f in (torch.sin, torch.cos)], 1).float().unsqueeze(0)


def random_params(cfg, seed):
    """Random float32 weights under which every path matters: nothing is zero, activations stay near 1."""
    g = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in shapes(cfg).items():
        if name == "pos_embed":
            params[name] = position_table(cfg["hidden"], cfg["size"] // cfg["patch"])
            continue
        z = torch.randn(shape, generator=g)
        if "_norm.weight" in name:
            params[name] = 1 + 0.2 * z
        elif name.endswith(".bias"):
            params[name] = 0.1 * z
        elif "embedding_table" in name:
            params[name] = 0.3 * z
        else:  # a matrix: variance kept, the modulations a third of that, the router sharper
            gain = 0.3 if "adaLN" in name else 1.5 if "gate.weight" in name and "proj" not in name else 1.0
            params[name] = z * gain / math.sqrt(math.prod(shape[1:]))
    return params


# ---- the network -----------------------------------------------------------------------------------------------------

def linear(p, name, x):
    return F.linear(x, p[name + ".weight"], p.get(name + ".bias"))


def swiglu(p, name, x):
    return linear(p, name + ".down_proj", F.silu(linear(p, name + ".gate_proj", x)) * linear(p, name + ".up_proj", x))


def mlp(p, name, x):
    return linear(p, name + ".fc2", F.gelu(linear(p, name + ".fc1", x), approximate="tanh"))


def modulate(x, shift, scale):
    """adaLN: x [N,T,D] normalised without affine, then moved by [N,D] of each image."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def timestep_embedding(t, dtype):
    half = FREQUENCIES // 2
    frequency = torch.exp((-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half).double()).float()
    angle = torch.outer(t.float(), frequency).to(dtype)  # both rounded to float32, whatever the rest, as published
    return torch.cat([angle.cos(), angle.sin()], 1)


def attention(p, name, cfg, x):
    N, T, D = x.shape
    H = cfg["heads"]
    projection = linear(p, name + (".Wqkv" if cfg["qk_norm"] else ".qkv"), x)
    q, k, v = projection.view(N, T, 3, H, D // H).permute(2, 0, 3, 1, 4)  # each [N,H,T,D/H]
    if cfg["qk_norm"]:
        q, k = (F.layer_norm(z, z.shape[-1:], p[f"{name}.{norm}.weight"], p[f"{name}.{norm}.bias"], EPS)
                for z, norm in ((q, "q_norm"), (k, "k_norm")))
    probability = (q @ k.transpose(-1, -2) / math.sqrt(D // H)).softmax(-1)
    mixed = (probability @ v).transpose(1, 2).reshape(N, T, D)
    return linear(p, name + (".out_proj" if cfg["qk_norm"] else ".proj"), mixed)


def balance_loss(cfg, probability, chosen):
    """alpha * sum_i P_i f_i, f_i = E * share of the choices that fell on i; over the batch, or averaged over images.
    probability [N,T,E], chosen [N,T,K]. The shares are counts: no gradient flows through them."""
    E = cfg["experts"]
    hits = F.one_hot(chosen, E).to(probability.dtype).sum(2)  # [N,T,E]
    over = (1,) if cfg["balance_per_sequence"] else (0, 1)
    share = E * hits.mean(over) / cfg["topk"]
    return cfg["balance"] * (share * probability.mean(over)).sum(-1).mean()


def moe(p, name, cfg, x, record):
    N, T, D = x.shape
    probability = linear(p, name + ".gate", x).softmax(-1)
    weight, chosen = probability.topk(cfg["topk"], dim=-1)
    if cfg["renormalise"] and cfg["topk"] > 1:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    out = torch.zeros_like(x)
    for e in range(cfg["experts"]):
        share = (weight * (chosen == e)).sum(-1)  # [N,T], zero where e is not chosen
        image, token = (chosen == e).any(-1).nonzero(as_tuple=True)
        expert = mlp if cfg["expert"] == "gelu" else swiglu
        rows = expert(p, f"{name}.experts.{e}", x[image, token]) * share[image, token].unsqueeze(-1)
        out = out.index_put((image, token), rows, accumulate=True)
    if cfg["shared"]:
        out = out + swiglu(p, name + ".shared_experts", x)

    ranked = probability.sort(-1, descending=True).values
    K = cfg["topk"]
    gap = (ranked[..., K - 1] - ranked[..., K]).min().item() if K < cfg["experts"] else 1.0
    record.append(dict(layer=int(name.split(".")[1]), aux=balance_loss(cfg, probability, chosen),
                       experts=chosen.reshape(N * T, K).sort(-1).values, gap=gap))
    return out


def block(p, layer, cfg, x, c, record):
    name = f"blocks.{layer}."
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = \
        linear(p, name + "adaLN_modulation.1", F.silu(c)).chunk(6, 1)
    x = x + gate_msa.unsqueeze(1) * attention(p, name + "attn", cfg, modulate(x, shift_msa, scale_msa))
    h = modulate(x, shift_mlp, scale_mlp)
    if is_moe(cfg, layer):
        h = moe(p, name + "moe", cfg, h, record)
    else:
        h = mlp(p, name + "mlp", h)
    return x + gate_mlp.unsqueeze(1) * h


def unpatchify(cfg, x):
    """[N,T,p*p*C] -> [N,C,S,S]"""
    p, C, side = cfg["patch"], out_channels(cfg), cfg["size"] // cfg["patch"]
    x = x.reshape(-1, side, side, p, p, C)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(-1, C, side * p, side * p)


def forward(p, cfg, x, t, y):
    """The network's output [N,Co,S,S] and, for each MoE layer, its balance loss, choices and smallest top-k gap."""
    record = []
    x = F.conv2d(x, p["x_embedder.proj.weight"], p["x_embedder.proj.bias"], stride=cfg["patch"])
    x = x.flatten(2).transpose(1, 2) + p["pos_embed"]
    c = linear(p, "t_embedder.mlp.0", timestep_embedding(t, x.dtype))
    c = linear(p, "t_embedder.mlp.2", F.silu(c)) + p["y_embedder.embedding_table.weight"][y]
    for layer in range(cfg["layers"]):
        x = block(p, layer, cfg, x, c, record)
    shift, scale = linear(p, "final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, 1)
    return unpatchify(cfg, linear(p, "final_layer.linear", modulate(x, shift, scale))), record


# ---- rectified flow --------------------------------------------------------------------------------------------------

def flow_loss(p, cfg, x, t, y, noise):
    """(loss, sum of the balance losses, record): t = 1 is noise, the velocity is noise - x."""
    at = t.to(x.dtype).view(-1, 1, 1, 1)
    out, record = forward(p, cfg, (1 - at) * x + at * noise, t, y)
    loss = (out[:, :cfg["channels"]] - (noise - x)).square().mean((1, 2, 3)).mean()
    return loss, sum((r["aux"] for r in record), torch.zeros((), dtype=x.dtype)), record


def convert(tensors, dtype, trained=False):
    """A copy in another precision; with `trained`, of leaves that collect gradients (all but the position table)."""
    return {name: (v.detach().to(dtype) if v.is_floating_point() else v.clone())
            .requires_grad_(trained and name != "pos_embed") for name, v in tensors.items()}


def evaluate(params, cfg, inputs, dtype):
    """Everything the golden files hold, in one precision: out, experts.L, loss, aux and grad.NAME; and the gap."""
    p, i = convert(params, dtype, trained=True), convert(inputs, dtype)
    with torch.no_grad():
        out, record = forward(p, cfg, i["x"], i["t"], i["y"])
    result = {"out": out} | {f"experts.{r['layer']}": r["experts"] for r in record}
    gaps = [r["gap"] for r in record]
    if "noise" in i:
        loss, aux, record = flow_loss(p, cfg, i["x"], i["t"], i["y"], i["noise"])
        (loss + aux).backward()
        result |= {"loss": loss.detach().view(1), "aux": aux.detach().view(1)}
        result |= {"grad." + n: torch.zeros_like(v) if v.grad is None else v.grad
                   for n, v in p.items() if v.requires_grad}
        gaps += [r["gap"] for r in record]
    return result, min(gaps, default=1.0)


def train_losses(params, cfg, inputs, dtype, steps):
    """Losses before each of `steps` AdamW steps on one batch, and the smallest top-k gap on the way."""
    p, i = convert({n: v.clone() for n, v in params.items()}, dtype, trained=True), convert(inputs, dtype)
    adamw = torch.optim.AdamW([v for v in p.values() if v.requires_grad], lr=1e-3, betas=(0.9, 0.999), eps=1e-8,
                              weight_decay=0)
    losses, gap = [], 1.0
    for _ in range(steps):
        loss, aux, record = flow_loss(p, cfg, i["x"], i["t"], i["y"], i["noise"])
        adamw.zero_grad()
        (loss + aux).backward()
        adamw.step()
        losses.append(loss.detach())
        gap = min([gap] + [r["gap"] for r in record])
    return torch.stack(losses), gap


def random_inputs(cfg, count, seed):
    g = torch.Generator().manual_seed(seed)
    shape = (count, cfg["channels"], cfg["size"], cfg["size"])
    y = torch.randint(cfg["classes"], (count,), generator=g)
    y[-1] = label_rows(cfg) - 1  # the null label, which guidance uses
    return dict(x=torch.randn(shape, generator=g), t=torch.rand(count, generator=g) * 0.98 + 0.01, y=y,
                noise=torch.randn(shape, generator=g))


def distance(got, want, floor=0.0):
    """Largest absolute difference over the root mean square of `want` (or `floor`, where that is larger).
    The floor matters for tensors that are zero but for rounding: the bias of k_norm moves all scores of a query alike."""
    got, want = got.double(), want.double()
    if got.shape != want.shape or not torch.isfinite(got).all():
        return math.inf
    return ((got - want).abs().max() / max(want.square().mean().sqrt().item(), floor, 1e-30)).item()


def gradient_floor(tensors):
    """A hundredth of the root mean square over all gradients."""
    squares = [v.double().square() for n, v in tensors.items() if n.startswith("grad.")]
    return 1e-2 * math.sqrt(sum(s.sum().item() for s in squares) / max(1, sum(s.numel() for s in squares)))
