#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/golden/quantized/NAME/: one tiny layer per quantized layout, and what the format's own
library says its weights are (expected.safetensors: E.fc1 [2I, H] gate first, E.fc2 [H, I]).

Packing and dequantization are foreign code throughout:
    fp8_*, mxfp4   transformers
    ct_*           compressed-tensors (pip install compressed-tensors)
    awq            autoawq: awq/utils/packing_utils.py of its source distribution   (--awq FILE)
    gptq_*         auto-gptq: nn_modules/qlinear/qlinear_cuda_old.py of its wheel   (--gptq FILE)
The two files are loaded alone: their packages want a GPU and an older transformers.

    make_quantized_golden.py --awq packing_utils.py --gptq qlinear_cuda_old.py
"""

import argparse
import importlib.util
import json
import os
import shutil

import torch
from safetensors.torch import save_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OUT = os.path.join(ROOT, "tests", "golden", "quantized")
EXPERTS = 2
E4M3 = torch.float8_e4m3fn
generator = torch.Generator().manual_seed(11)


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def randn(*shape):
    return torch.randn(shape, generator=generator)


class Case:
    """Collects one layer's tensors and the expected floats."""

    def __init__(self, name, quantization, hidden=64, intermediate=32, dtype="bfloat16"):
        self.name, self.quantization, self.dtype = name, quantization, dtype
        self.hidden, self.intermediate = hidden, intermediate
        self.tensors, self.expected = {}, {}

    def projections(self):
        """(tensor name prefix, [N, K], where its floats go)"""
        for e in range(EXPERTS):
            for name, shape in (("gate_proj", (self.intermediate, self.hidden)),
                                ("up_proj", (self.intermediate, self.hidden)),
                                ("down_proj", (self.hidden, self.intermediate))):
                yield f"model.layers.0.mlp.experts.{e}.{name}", shape, (e, name)

    def fill(self, quantize):
        """quantize(weight) -> ({suffix: tensor}, dequantized)"""
        parts = {}
        for prefix, shape, key in self.projections():
            stored, floats = quantize(randn(*shape) * 0.1)
            self.tensors.update({f"{prefix}.{k}": v for k, v in stored.items()})
            parts[key] = floats
        for e in range(EXPERTS):
            self.expected[f"{e}.fc1"] = torch.cat([parts[e, "gate_proj"], parts[e, "up_proj"]])
            self.expected[f"{e}.fc2"] = parts[e, "down_proj"]
        self.tensors["model.layers.0.mlp.gate.weight"] = randn(EXPERTS, self.hidden).to(torch.bfloat16)
        return self

    def save(self, **config):
        folder = os.path.join(OUT, self.name)
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        save_file({k: v.contiguous().clone() for k, v in self.tensors.items()}, os.path.join(folder, "model.safetensors"))
        save_file({k: v.contiguous().clone() for k, v in self.expected.items()}, os.path.join(folder, "expected.safetensors"))
        full = dict(model_type="qwen3_moe", num_experts=EXPERTS, num_experts_per_tok=1, norm_topk_prob=True,
                    hidden_act="silu", torch_dtype=self.dtype, quantization_config=self.quantization)
        full.update(config)
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(full, f, indent=1)
            f.write("\n")
        for name in os.listdir(folder):
            os.chmod(os.path.join(folder, name), 0o644)


def fp8():
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    block = [16, 16]

    def by_block(w):
        n, k = w.shape
        grid = torch.zeros(-(-n // 16), -(-k // 16))
        for i in range(grid.shape[0]):
            for j in range(grid.shape[1]):
                grid[i, j] = w[i * 16:i * 16 + 16, j * 16:j * 16 + 16].abs().max() / 448
        full = grid.repeat_interleave(16, 0)[:n].repeat_interleave(16, 1)[:, :k]
        q = (w / full).to(E4M3)
        return {"weight": q, "weight_scale_inv": grid}, _dequantize_fp8_weight(q, grid, block, torch.float32)

    # 40 is no multiple of 16: gate's and up's blocks do not lie on one grid when stacked.
    Case("fp8_block", dict(quant_method="fp8", activation_scheme="dynamic", weight_block_size=block),
         hidden=72, intermediate=40).fill(by_block).save()

    def by_tensor(w):
        scale = w.abs().max() / 448
        q = (w / scale).to(E4M3)
        return ({"weight": q, "weight_scale": scale, "input_scale": torch.rand((), generator=generator) + 0.01},
                _dequantize_fp8_weight(q, scale, None, torch.float32))

    Case("fp8_tensor_static", dict(quant_method="fp8", activation_scheme="static")).fill(by_tensor).save()


def compressed_tensors():
    from compressed_tensors.compressors.naive_quantized.base import (
        FloatQuantizationCompressor, IntQuantizationCompressor)
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    def scales(w, args):
        n, k = w.shape
        top = 448 if args.type == "float" else 2 ** (args.num_bits - 1) - 1
        cells = {"tensor": w.reshape(1, -1), "channel": w,
                 "group": w.reshape(n, -1, args.group_size) if args.strategy == "group" else None}[args.strategy]
        low, high = cells.amin(-1), cells.amax(-1)
        if args.symmetric:
            scale, zero = cells.abs().amax(-1) / top, torch.zeros_like(low)
        else:
            scale = (high - low) / (2 ** args.num_bits - 1)
            zero = (-low / scale).round() - 2 ** (args.num_bits - 1)
        if args.strategy == "tensor":
            scale, zero = scale.reshape(1), zero.reshape(1)
        if args.strategy == "channel":
            scale, zero = scale.reshape(n, 1), zero.reshape(n, 1)
        return scale.to(torch.bfloat16), zero.to(torch.int8)

    def case(name, compressor, layout, weights, acts=None, **shape):
        args = QuantizationArgs(**weights)
        scheme = QuantizationScheme(targets=["Linear"], weights=args,
                                    input_activations=QuantizationArgs(**acts) if acts else None)
        config = json.loads(json.dumps(QuantizationConfig(config_groups={"group_0": scheme}, format=layout).to_dict(),
                                       default=lambda v: getattr(v, "value", str(v))))

        def quantize(w):
            w = w.to(torch.bfloat16)
            scale, zero = scales(w, args)
            state = {"weight": w, "weight_scale": scale}
            if args.type == "int":
                state["weight_zero_point"] = zero
            stored = compressor.compress(state, scheme)
            floats = compressor.decompress(stored, scheme)["weight"]
            if acts and not acts.get("dynamic", False):
                stored["input_scale"] = torch.rand(1, generator=generator) + 0.01
            return stored, floats

        Case(name, config, **shape).fill(quantize).save()

    token = dict(num_bits=8, type="int", strategy="token", dynamic=True)
    fp8_token = dict(num_bits=8, type="float", strategy="token", dynamic=True)
    fp8_static = dict(num_bits=8, type="float", strategy="tensor", dynamic=False)
    whole = dict(hidden=60, intermediate=36)  # no multiple of eight codes
    case("ct_fp8_channel", FloatQuantizationCompressor, "float-quantized",
         dict(num_bits=8, type="float", strategy="channel"), fp8_token)
    case("ct_fp8_tensor_token", FloatQuantizationCompressor, "float-quantized",
         dict(num_bits=8, type="float", strategy="tensor"), fp8_token)
    case("ct_fp8_tensor_static", FloatQuantizationCompressor, "float-quantized",
         dict(num_bits=8, type="float", strategy="tensor"), fp8_static)
    case("ct_fp8_w8a16", FloatQuantizationCompressor, "float-quantized",
         dict(num_bits=8, type="float", strategy="channel"))
    case("ct_int8_channel", IntQuantizationCompressor, "int-quantized",
         dict(num_bits=8, type="int", strategy="channel"), token)
    case("ct_int4_group", PackedQuantizationCompressor, "pack-quantized",
         dict(num_bits=4, type="int", strategy="group", group_size=16))
    case("ct_int4_group_asym", PackedQuantizationCompressor, "pack-quantized",
         dict(num_bits=4, type="int", strategy="group", group_size=16, symmetric=False))
    case("ct_int4_channel", PackedQuantizationCompressor, "pack-quantized",
         dict(num_bits=4, type="int", strategy="channel"), **whole)
    case("ct_int4_w4a8", PackedQuantizationCompressor, "pack-quantized",
         dict(num_bits=4, type="int", strategy="group", group_size=32), token)
    case("ct_int8_packed_channel", PackedQuantizationCompressor, "pack-quantized",
         dict(num_bits=8, type="int", strategy="channel"), **whole)
    case("ct_int8_packed_group_asym", PackedQuantizationCompressor, "pack-quantized",
         dict(num_bits=8, type="int", strategy="group", group_size=16, symmetric=False))


def awq(path):
    utils = load(path, "awq_packing_utils")
    group = 16

    def quantize(w):
        n, k = w.shape
        cells = w.reshape(n, -1, group)
        low, high = cells.amin(-1), cells.amax(-1)
        scale = ((high - low) / 15).to(torch.float16)
        zero = (-low / scale).round().clamp(0, 15).to(torch.int32)
        q = ((cells / scale.unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(0, 15).to(torch.int32).reshape(n, k)

        def pack(m):  # [R, N] -> [R, N / 8] in AWQ's order
            m = m.reshape(m.shape[0], -1, 8)[:, :, utils.AWQ_ORDER].to(torch.int64)
            words = (m << (4 * torch.arange(8))).sum(-1)
            return torch.where(words >= 2 ** 31, words - 2 ** 32, words).to(torch.int32)

        stored = {"qweight": pack(q.t()), "qzeros": pack(zero.t()), "scales": scale.t().contiguous()}
        floats = utils.dequantize_gemm(stored["qweight"], stored["qzeros"], stored["scales"], 4, group)
        return stored, floats.t()

    Case("awq", dict(quant_method="awq", bits=4, group_size=group, zero_point=True, version="gemm"),
         dtype="float16").fill(quantize).save()


def gptq(path):
    QuantLinear = load(path, "gptq_qlinear").QuantLinear

    def case(name, bits, group, symmetric, version=1, order=False):
        def quantize(w):
            n, k = w.shape
            linear = torch.nn.Linear(k, n, bias=False, dtype=torch.float16)
            linear.weight.data = w.to(torch.float16)
            g = k if group == -1 else group
            cells = w.reshape(n, -1, g)
            top = 2 ** bits - 1
            if symmetric:
                scale = cells.abs().amax(-1) * 2 / top
                zero = torch.full_like(scale, (top + 1) / 2)
            else:  # a few zero points of 0 and of 15 or 255 among them
                low, high = cells.amin(-1), cells.amax(-1)
                scale = (high - low) / top
                zero = (-low / scale).round()
                zero = torch.where(torch.rand(zero.shape, generator=generator) < 0.1, torch.full_like(zero, top), zero)
                zero = zero.clamp(1, top)  # its packing of 0 spills into the neighbours
            scale = scale.to(torch.float16)
            layer = QuantLinear(bits, group, k, n, bias=False)
            linear.weight.data = ((w.reshape(n, -1, g) / scale.unsqueeze(-1)).round()
                                  .clamp(-zero.unsqueeze(-1), top - zero.unsqueeze(-1))
                                  * scale.unsqueeze(-1)).reshape(n, k).to(torch.float16)
            layer.pack(linear, scale.float(), zero.clone(), None)
            layer.scales = layer.scales.to(torch.float16)
            floats = layer(torch.eye(k, dtype=torch.float16)).t()
            stored = {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales, "g_idx": layer.g_idx}
            if version == 2:  # as converters from v1 do: one more in every code
                ones = sum(1 << (bits * i) for i in range(32 // bits))
                words = (stored["qzeros"].to(torch.int64) + ones) & 0xFFFFFFFF
                stored["qzeros"] = torch.where(words >= 2 ** 31, words - 2 ** 32, words).to(torch.int32)
            if order:
                stored["g_idx"] = stored["g_idx"].flip(0).contiguous()
            return stored, floats

        Case(name, dict(quant_method="gptq", bits=bits, group_size=group, desc_act=order, sym=symmetric,
                        checkpoint_format="gptq_v2" if version == 2 else "gptq"), dtype="float16").fill(quantize).save()

    case("gptq_v1_sym", 4, 16, True)
    case("gptq_v1_asym", 4, 16, False)
    case("gptq_v2_asym", 4, 16, False, version=2)
    case("gptq_whole_k", 4, -1, False)
    case("gptq_8bit", 8, 16, False)
    case("gptq_act_order", 4, 16, True, order=True)


def mxfp4():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    case = Case("mxfp4", dict(quant_method="mxfp4"), hidden=64, intermediate=32)
    block = "model.layers.0.mlp."
    for name, key, n, k in (("gate_up_proj", "fc1", 64, 64), ("down_proj", "fc2", 64, 32)):
        blocks = torch.randint(0, 256, (EXPERTS, n, k // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 126, (EXPERTS, n, k // 32), generator=generator, dtype=torch.uint8)
        case.tensors[f"{block}experts.{name}_blocks"] = blocks
        case.tensors[f"{block}experts.{name}_scales"] = scales
        case.tensors[f"{block}experts.{name}_bias"] = randn(EXPERTS, n).to(torch.bfloat16)
        floats = convert_moe_packed_tensors(blocks, scales)  # [E, K, N]
        for e in range(EXPERTS):
            case.expected[f"{e}.{key}"] = floats[e].t()
    case.tensors[f"{block}router.weight"] = randn(EXPERTS, 64).to(torch.bfloat16)
    case.tensors[f"{block}router.bias"] = randn(EXPERTS).to(torch.bfloat16)
    case.save(model_type="gpt_oss", swiglu_limit=7.0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--awq", required=True)
    parser.add_argument("--gptq", required=True)
    arguments = parser.parse_args()
    fp8()
    compressed_tensors()
    awq(arguments.awq)
    gptq(arguments.gptq)
    mxfp4()


if __name__ == "__main__":
    main()
