"""DDPM for reference.py's models: losses and samplers as guided-diffusion and DiT define them, in plain PyTorch.

Everything goes the long way (predicted image, posterior mean, logarithms of variances, differences of distribution
functions), in whatever precision the parameters are: the C code's short forms are checked against it. Letters: ab is
alpha_bar, x0 the predicted image. `model(x, t)` gives the output [N,2C,H,W] (or [N,C,H,W]: no learned variance).
"""
import math

import torch

import reference as ref

STEPS = 1000


def betas():
    return torch.linspace(1e-4, 2e-2, STEPS, dtype=torch.float64)


def respace(spec):
    """The steps kept, ascending: "ddimN" a whole stride from 0; "A,B,..": so many of each equal section, ends included."""
    if spec.startswith("ddim"):
        for stride in range(1, STEPS):
            kept = list(range(0, STEPS, stride))
            if len(kept) == int(spec[4:]):
                return kept
        raise ValueError(spec)
    counts = [int(n) for n in spec.split(",")]
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = STEPS // len(counts) + (1 if i < STEPS % len(counts) else 0)
        assert count <= size
        stride, at = (1 if count <= 1 else (size - 1) / (count - 1)), 0.0
        for _ in range(count):
            kept.append(start + round(at))
            at += stride
        start += size
    return sorted(set(kept))


# Five steps each; `channels` of the output are guided (None: all of the image's).
WAYS = {
    "ddpm": dict(sampler="ddpm", respacing="5", cfg=2.5, channels=3),
    "ddpm_all": dict(sampler="ddpm", respacing="ddim5", cfg=2.5),
    "ddpm_clip": dict(sampler="ddpm", respacing="5", cfg=1.0, clip=True),
    "ddim": dict(sampler="ddim", respacing="5", cfg=2.5, channels=3),
    "ddim_eta": dict(sampler="ddim", respacing="2,3", cfg=1.5, eta=0.7),
    "heun": dict(sampler="heun", respacing="5", cfg=2.5),
    "dpm++": dict(sampler="dpm++", respacing="5", cfg=2.5),
}


class Process:
    """A process of the kept steps: betas that make their ab the original ones."""

    def __init__(self, kept=range(STEPS)):
        full = torch.cumprod(1 - betas(), 0)
        self.kept = list(kept)
        self.ab = full[self.kept]
        self.before = torch.cat([torch.ones(1, dtype=torch.float64), self.ab[:-1]])
        self.beta = 1 - self.ab / self.before
        self.variance = self.beta * (1 - self.before) / (1 - self.ab)
        clipped = torch.cat([self.variance[1:2], self.variance[1:]])
        self.log_least, self.log_most = clipped.log(), self.beta.log()
        self.of_x0 = self.beta * self.before.sqrt() / (1 - self.ab)
        self.of_xt = (1 - self.before) * (1 - self.beta).sqrt() / (1 - self.ab)

    def at(self, values, i, like):
        return values[i].to(like.dtype).view(-1, 1, 1, 1)

    def diffuse(self, x, i, noise):
        return self.at(self.ab.sqrt(), i, x) * x + self.at((1 - self.ab).sqrt(), i, x) * noise

    def predict(self, out, xt, i, clip=False):
        """(x0, mean and log variance of the step before) from the network's output."""
        C = xt.shape[1]
        x0 = self.at((1 / self.ab).sqrt(), i, xt) * xt - self.at((1 / self.ab - 1).sqrt(), i, xt) * out[:, :C]
        if clip:
            x0 = x0.clamp(-1, 1)
        mean = self.at(self.of_x0, i, xt) * x0 + self.at(self.of_xt, i, xt) * xt
        if out.shape[1] == 2 * C:
            share = (out[:, C:] + 1) / 2
            log_variance = share * self.at(self.log_most, i, xt) + (1 - share) * self.at(self.log_least, i, xt)
        else:  # the larger bound, but at the end that of the posterior
            log_most = torch.cat([self.variance[1:2].log(), self.log_most[1:]])
            log_variance = self.at(log_most, i, xt).expand_as(xt)
        return x0, mean, log_variance

    def bound(self, out, x, xt, i):
        """The step's term of the variational bound, [N] in bits a value."""
        true_mean = self.at(self.of_x0, i, x) * x + self.at(self.of_xt, i, x) * xt
        true_log = self.at(self.log_least, i, x)
        _, mean, log = self.predict(out, xt, i)
        kl = 0.5 * (-1 + log - true_log + (true_log - log).exp() + (true_mean - mean) ** 2 * (-log).exp())

        def phi(u):
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))

        above = phi((x - mean + 1 / 255) * (-0.5 * log).exp())
        below = phi((x - mean - 1 / 255) * (-0.5 * log).exp())
        mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
        nll = -mass.clamp(min=1e-12).log()
        term = torch.where(i.view(-1, 1, 1, 1) == 0, nll, kl)
        return term.mean((1, 2, 3)) / math.log(2)


def losses(p, cfg, x, t, y, noise):
    """(mse [N], vb [N] or None, sum of the balance losses, record) at integer t."""
    process, C = Process(), cfg["channels"]
    i = t.long()
    xt = process.diffuse(x, i, noise)
    out, record = ref.forward(p, cfg, xt, t, y)
    mse = (noise - out[:, :C]).square().mean((1, 2, 3))
    vb = process.bound(torch.cat([out[:, :C].detach(), out[:, C:]], 1), x, xt, i) if cfg["learn_sigma"] else None
    return mse, vb, sum((r["aux"] for r in record), torch.zeros((), dtype=x.dtype)), record


def evaluate(params, cfg, inputs, dtype):
    """Everything the golden files hold: out, experts.L, loss, mse, vb, aux, grad.NAME and, where the inputs have z,
    latents.WAY; and the smallest top-k gap."""
    p, i = ref.convert(params, dtype, trained=True), ref.convert(inputs, dtype)
    with torch.no_grad():
        out, record = ref.forward(p, cfg, i["x"], i["t"], i["y"])
    result = {"out": out} | {f"experts.{r['layer']}": r["experts"] for r in record}
    mse, vb, aux, more = losses(p, cfg, i["x"], i["t"], i["y"], i["noise"])
    loss = (mse if vb is None else mse + vb).mean()
    (loss + aux).backward()
    result |= {"loss": loss.detach().view(1), "mse": mse.detach(), "aux": aux.detach().view(1)}
    if vb is not None:
        result["vb"] = vb.detach()
    result |= {"grad." + n: torch.zeros_like(v) if v.grad is None else v.grad for n, v in p.items() if v.requires_grad}
    gaps = [r["gap"] for r in record + more]
    for name, way in WAYS.items() if "z" in inputs else ():
        result["latents." + name], gap = trajectory(params, cfg, inputs, dtype, way)
        gaps.append(gap)
    return result, min(gaps, default=1.0)


def guided_model(p, cfg, y, scale, channels):
    """model(x, t) with guidance, and the list of smallest top-k gaps that it met. `channels` counts those of the
    output; scale 1: none."""
    gaps = []

    def model(x, t):
        both = scale != 1
        null = torch.full_like(y, cfg["classes"])
        time = torch.full((len(x) * (1 + both),), float(t), dtype=x.dtype)
        out, record = ref.forward(p, cfg, torch.cat([x, x]) if both else x, time, torch.cat([y, null]) if both else y)
        gaps.extend(r["gap"] for r in record)
        if not both:
            return out
        one, other = out.chunk(2)
        return torch.cat([other[:, :channels] + scale * (one - other)[:, :channels], one[:, channels:]], 1)

    return model, gaps


def sample_ddpm(process, model, z, step_noise, clip=False):
    for n, i in enumerate(reversed(range(len(process.kept)))):
        at = torch.full((len(z),), i)
        _, mean, log_variance = process.predict(model(z, process.kept[i]), z, at, clip)
        z = mean + (0.5 * log_variance).exp() * step_noise[n] if i > 0 else mean
    return z


def sample_ddim(process, model, z, step_noise, eta, clip=False):
    for n, i in enumerate(reversed(range(len(process.kept)))):
        at = torch.full((len(z),), i)
        x0, _, _ = process.predict(model(z, process.kept[i]), z, at, clip)
        e = (process.at((1 / process.ab).sqrt(), at, z) * z - x0) / process.at((1 / process.ab - 1).sqrt(), at, z)
        ab, before = process.ab[i], process.before[i]
        s = eta * ((1 - before) / (1 - ab) * (1 - ab / before)).sqrt().item()
        z = before.sqrt().item() * x0 + math.sqrt(1 - before.item() - s * s) * e
        if i > 0:
            z = z + s * step_noise[n]
    return z


def sample_sigma(process, model, z, second):
    """Euler's or Heun's rule on dx/ds = e, where x = z / sqrt(ab) and s = sqrt(1/ab - 1), down to s = 0."""
    C = z.shape[1]
    s = [math.sqrt(1 / ab - 1) for ab in process.ab.tolist()]

    def slope(x, i):
        return model(x / math.sqrt(1 + s[i] ** 2), process.kept[i])[:, :C]

    x = z * math.sqrt(1 + s[-1] ** 2)
    for i in reversed(range(len(s))):
        to, e = (s[i - 1] if i else 0.0), slope(x, i)
        ahead = x + (to - s[i]) * e
        x = x + (to - s[i]) * (e + slope(ahead, i - 1)) / 2 if second and i else ahead
    return x


def sample_dpm(process, model, z):
    """DPM-Solver++(2M), as in the paper's algorithm 2; the last step of first order, to ab = 1."""
    C, before, h_before = z.shape[1], None, None
    alpha, sigma = process.ab.sqrt().tolist(), (1 - process.ab).sqrt().tolist()
    for i in reversed(range(len(alpha))):
        x0 = (z - sigma[i] * model(z, process.kept[i])[:, :C]) / alpha[i]
        if i == 0:
            return x0
        h = math.log(alpha[i - 1] / sigma[i - 1]) - math.log(alpha[i] / sigma[i])
        D = x0 if before is None else (1 + h / (2 * h_before)) * x0 - h / (2 * h_before) * before
        z = sigma[i - 1] / sigma[i] * z - alpha[i - 1] * math.expm1(-h) * D
        before, h_before = x0, h


def trajectory(params, cfg, inputs, dtype, way):
    """(result, smallest gap) of way = dict(sampler, respacing, cfg, channels, eta, clip) from inputs z, step_noise, label."""
    p, i = ref.convert(params, dtype), ref.convert(inputs, dtype)
    model, gaps = guided_model(p, cfg, i["label"], way["cfg"], way.get("channels") or cfg["channels"])
    process, z, noise = Process(respace(way["respacing"])), i["z"], i["step_noise"]
    clip = way.get("clip", False)
    with torch.no_grad():
        if way["sampler"] == "ddpm":
            z = sample_ddpm(process, model, z, noise, clip)
        elif way["sampler"] == "ddim":
            z = sample_ddim(process, model, z, noise, way.get("eta", 0.0), clip)
        elif way["sampler"] == "dpm++":
            z = sample_dpm(process, model, z)
        else:
            z = sample_sigma(process, model, z, way["sampler"] == "heun")
    return z, min(gaps, default=1.0)


def random_inputs(cfg, count, seed, steps=5):
    """reference.random_inputs with whole t, both ends among them, pixels at and beyond the ends of the grey scale, and
    what trajectories start from: z, step_noise [S,N,..] and one label."""
    inputs = ref.random_inputs(cfg, count, seed)
    g = torch.Generator().manual_seed(seed + 1)
    t = torch.randint(STEPS, (count,), generator=g)
    t[:3] = torch.tensor([0, STEPS - 1, 1])[:min(3, count)]
    inputs["t"] = t.float()
    inputs["x"][0].clamp_(-1, 1)
    shape = (2, cfg["channels"], cfg["size"], cfg["size"])
    return inputs | dict(z=torch.randn(shape, generator=g), step_noise=torch.randn((steps, *shape), generator=g),
                         label=torch.full((2,), cfg["classes"] // 2))
