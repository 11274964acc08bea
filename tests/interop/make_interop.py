"""Writes the files that tests/interop_test.c reads: python3 make_interop.py

tiny.safetensors is a model of two blocks; everything else holds the same numbers as other tools write them:
sharded/ (safetensors and an index, as Hugging Face splits them), consolidated/ (pytorch_model.bin shards, what
DeepSpeed's zero_to_fp32.py leaves), zero2/ and zero1/ (DeepSpeed's save_checkpoint; deepspeed itself needs GPUs, so the
dictionaries here follow its engine.py _save_checkpoint, zero/stage_1_and_2.py state_dict (fp16 training, ZeRO 2) and
bf16_optimizer.py state_dict (bf16, ZeRO 1), key by key, with stand-ins of its classes under their own names).
dense.pt: a plain DiT as facebookresearch/DiT publishes it (the bare dict); dense_diffusers/: the same as diffusers'
DiTTransformer2DModel, made by diffusers' own classes, with what it answers to dense_input.safetensors.
"""
import collections
import dataclasses
import enum
import json
import os
import sys
import types

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))


def at(*names):
    path = os.path.join(HERE, *names)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return path


def position(side, width):
    """The 2-D sin-cos table, [1, side*side, width]."""
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    parts = []
    for p in (column, row):
        angle = p.reshape(-1, 1).double() * omega
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, 1).float()[None]


def model(D=8, L=2, E=3, C=4, p=2, side=2, classes=3, shared=1, dense=False, scale=0.2):
    torch.manual_seed(5)
    sd = collections.OrderedDict()

    def add(name, *shape):
        sd[name] = torch.randn(*shape) * scale

    sd["pos_embed"] = position(side, D)
    add("x_embedder.proj.weight", D, C, p, p)
    add("x_embedder.proj.bias", D)
    add("t_embedder.mlp.0.weight", D, 256)
    add("t_embedder.mlp.0.bias", D)
    add("t_embedder.mlp.2.weight", D, D)
    add("t_embedder.mlp.2.bias", D)
    add("y_embedder.embedding_table.weight", classes + 1, D)
    for l in range(L):
        b = f"blocks.{l}."
        add(b + "attn.qkv.weight", 3 * D, D)
        add(b + "attn.qkv.bias", 3 * D)
        add(b + "attn.proj.weight", D, D)
        add(b + "attn.proj.bias", D)
        if dense:
            add(b + "mlp.fc1.weight", 4 * D, D)
            add(b + "mlp.fc1.bias", 4 * D)
            add(b + "mlp.fc2.weight", D, 4 * D)
            add(b + "mlp.fc2.bias", D)
        else:
            add(b + "moe.gate.weight", E, D)
            for e in range(E):
                add(b + f"moe.experts.{e}.gate_proj.weight", 4 * D, D)
                add(b + f"moe.experts.{e}.up_proj.weight", 4 * D, D)
                add(b + f"moe.experts.{e}.down_proj.weight", D, 4 * D)
            add(b + "moe.shared_experts.gate_proj.weight", shared * D, D)
            add(b + "moe.shared_experts.up_proj.weight", shared * D, D)
            add(b + "moe.shared_experts.down_proj.weight", D, shared * D)
        add(b + "adaLN_modulation.1.weight", 6 * D, D)
        add(b + "adaLN_modulation.1.bias", 6 * D)
    add("final_layer.linear.weight", p * p * 2 * C, D)
    add("final_layer.linear.bias", p * p * 2 * C)
    add("final_layer.adaLN_modulation.1.weight", 2 * D, D)
    add("final_layer.adaLN_modulation.1.bias", 2 * D)
    return sd


# ---- shards ----------------------------------------------------------------------------------------------------


def shards(sd, directory, weights_name, save):
    pattern = weights_name.replace(".bin", "{suffix}.bin").replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(sd, filename_pattern=pattern, max_shard_size=12000)
    for name, tensors in split.filename_to_tensors.items():
        save({k: sd[k].contiguous() for k in tensors}, at(directory, name))
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    with open(at(directory, weights_name + ".index.json"), "w", encoding="utf-8") as f:
        f.write(json.dumps(index, indent=2, sort_keys=True) + "\n")


# ---- DeepSpeed -------------------------------------------------------------------------------------------------


def module(name, **members):
    m = types.ModuleType(name)
    for key, value in members.items():
        value.__module__ = name
        setattr(m, key, value)
    sys.modules[name] = m
    return m


class ZeroStageEnum(int, enum.Enum):
    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3


class DynamicLossScaler:
    def __init__(self):
        self.cur_scale, self.cur_iter, self.dynamic, self.dtype = 65536.0, 10, True, torch.half


@dataclasses.dataclass
class fragment_address:
    numel: int
    start: int


for parent in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", "deepspeed.runtime.fp16", "deepspeed.utils"):
    module(parent)
module("deepspeed.runtime.zero.config", ZeroStageEnum=ZeroStageEnum)
module("deepspeed.runtime.fp16.loss_scaler", DynamicLossScaler=DynamicLossScaler)
module("deepspeed.utils.tensor_fragment", fragment_address=fragment_address)


def flat_parts(params, ranks):
    """Flattened, aligned to 2 * ranks, cut into equal parts."""
    flat = torch.cat([p.reshape(-1) for p in params])
    lean = flat.numel()
    align = 2 * ranks
    flat = torch.cat([flat, torch.zeros(-lean % align)])
    size = flat.numel() // ranks
    return [flat[r * size:(r + 1) * size].clone() for r in range(ranks)], lean


def deepspeed(sd, directory, ranks, bf16):
    """Two optimizer groups (matrices; the rest), pos_embed frozen, in ZeRO 1 (bf16) or 2 (fp16)."""
    step, version = "global_step7", "0.16.4"
    half = torch.bfloat16 if bf16 else torch.float16
    trained = {k: v for k, v in sd.items() if k != "pos_embed"}
    groups = [{k: v for k, v in trained.items() if v.ndim > 1}, {k: v for k, v in trained.items() if v.ndim == 1}]
    config = {"train_batch_size": 8, "bf16": {"enabled": bf16}, "zero_optimization": {"stage": 1 if bf16 else 2}}
    frozen = {"pos_embed": sd["pos_embed"].to(half)}
    state = dict(module=collections.OrderedDict((k, v.to(half)) for k, v in sd.items()),
                 buffer_names=[],
                 optimizer=None,
                 param_shapes=[collections.OrderedDict((k, v.shape) for k, v in g.items()) for g in groups],
                 frozen_param_shapes=None if bf16 else collections.OrderedDict((k, v.shape) for k, v in frozen.items()),
                 shared_params={},
                 frozen_param_fragments=None if bf16 else collections.OrderedDict(frozen),
                 lr_scheduler={"last_batch_iteration": 6},
                 data_sampler=None, random_ltd=None,
                 sparse_tensor_module_names=set(),
                 skipped_steps=0, global_steps=7, global_samples=56, dp_world_size=ranks, mp_world_size=1,
                 ds_config=config, ds_version=version)
    torch.save(state, at(directory, step, "mp_rank_00_model_states.pt"))
    parts = [flat_parts(list(g.values()), ranks) for g in groups]
    for r in range(ranks):
        row, padding, count = [], [], []
        for cut, lean in parts:
            size = cut[0].numel()
            pad = min(size, max(0, (r + 1) * size - lean))
            padding.append(pad)
            # ZeRO 2 saves what is left without padding (a view), the bf16 optimizer saves it with it
            row.append(torch.nn.Parameter(cut[r]) if bf16 else cut[r][:size - pad])
            count.append(ranks)
        inner = {"state": {i: {"exp_avg": torch.zeros(2), "exp_avg_sq": torch.ones(2)} for i in range(2)},
                 "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "step": 7, "params": [0]}]}
        slices = [collections.OrderedDict((k, fragment_address(v.numel(), 0)) for k, v in g.items()) for g in groups]
        optimizer = {"clip_grad": 0.0, "base_optimizer_state": inner, "single_partition_of_fp32_groups": row,
                     "group_paddings": padding, "partition_count": count, "ds_version": version,
                     "param_slice_mappings": slices}
        if not bf16:
            optimizer = {"loss_scaler": DynamicLossScaler(), "dynamic_loss_scale": True, "overflow": False,
                         **optimizer, "zero_stage": ZeroStageEnum.gradients}
        prefix = "bf16_" if bf16 else ""
        torch.save(dict(optimizer_state_dict=optimizer, ds_config=config, ds_version=version),
                   at(directory, step, f"{prefix}zero_pp_rank_{r}_mp_rank_00_optim_states.pt"))
    with open(at(directory, "latest"), "w") as f:
        f.write(step)


# ---- plain DiT -------------------------------------------------------------------------------------------------


def to_diffusers(sd, L, heads):
    """Names of diffusers' scripts/convert_dit_to_diffusers.py, written anew."""
    out = collections.OrderedDict()
    out["pos_embed.proj.weight"], out["pos_embed.proj.bias"] = sd["x_embedder.proj.weight"], sd["x_embedder.proj.bias"]
    for l in range(L):
        b, t = f"blocks.{l}.", f"transformer_blocks.{l}."
        for i, name in ((0, "1"), (2, "2")):
            for kind in ("weight", "bias"):
                out[t + f"norm1.emb.timestep_embedder.linear_{name}.{kind}"] = sd[f"t_embedder.mlp.{i}.{kind}"]
        out[t + "norm1.emb.class_embedder.embedding_table.weight"] = sd["y_embedder.embedding_table.weight"]
        for kind in ("weight", "bias"):
            out[t + f"norm1.linear.{kind}"] = sd[b + f"adaLN_modulation.1.{kind}"]
            q, k, v = sd[b + f"attn.qkv.{kind}"].chunk(3)
            out[t + f"attn1.to_q.{kind}"], out[t + f"attn1.to_k.{kind}"], out[t + f"attn1.to_v.{kind}"] = q, k, v
            out[t + f"attn1.to_out.0.{kind}"] = sd[b + f"attn.proj.{kind}"]
            out[t + f"ff.net.0.proj.{kind}"] = sd[b + f"mlp.fc1.{kind}"]
            out[t + f"ff.net.2.{kind}"] = sd[b + f"mlp.fc2.{kind}"]
    for kind in ("weight", "bias"):
        out[f"proj_out_1.{kind}"] = sd[f"final_layer.adaLN_modulation.1.{kind}"]
        out[f"proj_out_2.{kind}"] = sd[f"final_layer.linear.{kind}"]
    return out


def diffusers_dense(sd, D, heads, C, side, p, classes):
    from diffusers import DiTTransformer2DModel
    net = DiTTransformer2DModel(num_attention_heads=heads, attention_head_dim=D // heads, in_channels=C,
                                out_channels=2 * C, num_layers=2, sample_size=side, patch_size=p,
                                num_embeds_ada_norm=classes)
    missing, unexpected = net.load_state_dict(to_diffusers(sd, 2, heads), strict=False)
    assert not unexpected and all("pos_embed.pos_embed" in k for k in missing), (missing, unexpected)
    net.eval()
    x, t, y = torch.randn(3, C, side, side), torch.tensor([3.0, 500.0, 999.0]), torch.tensor([0, 2, classes])
    with torch.no_grad():
        out = net(x, timestep=t, class_labels=y).sample
    save_file({"x": x, "t": t, "y": y, "out": out}, at("dense_input.safetensors"))
    net.save_pretrained(at("dense_diffusers", "transformer", "x").rsplit("/", 1)[0])


moe = model()
save_file(moe, at("tiny.safetensors"))
shards(moe, "sharded", "model.safetensors", lambda sd, path: save_file(sd, path, metadata={"format": "pt"}))
shards(moe, "consolidated", "pytorch_model.bin", torch.save)
deepspeed(moe, "zero2", 3, False)
deepspeed(moe, "zero1", 2, True)
dense = model(D=16, side=4, dense=True)
torch.save(dense, at("dense.pt"))
diffusers_dense(dense, 16, 2, 4, 8, 2, 3)
