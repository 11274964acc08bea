"""Why DDIM draws worse than ancestral sampling from a network that is a little wrong, in closed form: python3 ddim_study.py

Data N(0, 1); a network that answers gain * e, e the expected noise given z, or adds `noise` of its own to it. z stays
normal and its variance follows exactly through the published updates (golden/ddpm.py has them, checked against
PyTorch), so nothing is sampled. Prints the deviation of the images drawn, which should be 1; docs/diffusion.md has what
follows from it. Needs torch.
"""
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden"))
import ddpm  # noqa: E402


def deviation(steps, eta, gain=1.0, noise=0.0, clipped=None):
    """Of the images, after `steps` by DDIM's update (eta 1: ancestral, the posterior's variance)."""
    p = ddpm.Process(ddpm.respace(str(steps)))
    variance = 1.0
    for i in reversed(range(steps)):
        ab, before = p.ab[i].item(), p.before[i].item()
        s = eta * ((1 - before) / (1 - ab) * (1 - ab / before)) ** 0.5
        e = gain * (1 - ab) ** 0.5  # the answer for z = 1: e = sqrt(1-ab) z where the data are N(0, 1)
        x0 = (1 - (1 - ab) ** 0.5 * e) / ab ** 0.5
        factor = before ** 0.5 * x0 + (1 - before - s * s) ** 0.5 * e
        of_noise = (1 - before - s * s) ** 0.5 - (before * (1 - ab) / ab) ** 0.5
        variance = factor ** 2 * variance + (of_noise * noise) ** 2 + s * s
    return variance ** 0.5


if __name__ == "__main__":
    print("                          ancestral      DDIM eta 0")
    for steps in (25, 50, 250, 1000):
        print(f"exact, {steps:4} steps       {deviation(steps, 1):12.4f} {deviation(steps, 0):15.4f}")
    for gain in (0.9, 0.95, 0.98, 0.99, 1.01, 1.02):
        print(f"answer x {gain:4}, 250 steps {deviation(250, 1, gain):12.4f} {deviation(250, 0, gain):15.4f}")
    for noise in (0.05, 0.1, 0.2):
        print(f"its own noise {noise:4}, 250  {deviation(250, 1, 1, noise):12.4f} {deviation(250, 0, 1, noise):15.4f}")
