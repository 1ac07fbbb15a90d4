# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of a vLLM or an SGLang of yours, for python_cuda_peers.py: of each package one file is imported, and all that
it imports besides is replaced by stand-ins that do nothing."""
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import types

import torch

import moesaic

BLOCK = 128  # of scales, along N and K in fp8_block, along K in int4_w4a16


class Inert:
    """Stands for whatever a peer's file imports and does not need here: takes any call, is false, is nothing in a sum."""
    def __call__(self, *args, **kwargs):
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __bool__(self):
        return False

    def __or__(self, other):
        return other

    __ror__ = __or__


INERT = Inert()


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports `package`.`module` from its file in `folder`, and everything else of that package as stand-ins."""
    def __init__(self, folder, package, module, given):
        self.folder, self.package, self.module, self.given = folder, package, f"{package}.{module}", given

    def load(self):
        sys.meta_path.insert(0, self)
        return importlib.import_module(self.module)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] != self.package:
            return None
        if name == self.module:
            file = os.path.join(self.folder, *name.split(".")) + ".py"
            if not os.path.exists(file):
                raise SystemExit(f"--{self.package}: no {file}; give the folder that holds the package, of a version with that file")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = lambda name: INERT if not name.startswith("__") else self.missing(name)
        vars(module).update(self.given.get(spec.name, {}))
        return module

    @staticmethod
    def missing(name):
        raise AttributeError(name)

    def exec_module(self, module):
        pass


class Tiles:
    """Candidates of tile configurations, by what they are for."""
    def __init__(self, path):
        self.rows = json.load(open(path)) if path else []

    def of(self, peer, case):
        return [dict(r["config"]) for r in self.rows
                if (r["peer"], r["scheme"], r["shape"], r["tokens"]) == (peer, case.scheme, case.shape, case.tokens)]


class Vllm:
    name = "vllm"

    def __init__(self, folder):
        import triton

        platform = types.SimpleNamespace(get_device_name=torch.cuda.get_device_name, is_cuda=lambda: False, is_rocm=lambda: False)
        self.kernels = StandIns(folder, "vllm", "model_executor.layers.fused_moe.fused_moe", {
            "vllm.envs": dict(VLLM_BATCH_INVARIANT=False, VLLM_TUNED_CONFIG_FOLDER=None),
            "vllm.platforms": dict(current_platform=platform),  # is_cuda: its compiled kernel for a few rows of int4 is not Triton's
            "vllm.triton_utils": dict(triton=triton, tl=triton.language),
        }).load()
        self.compute = triton.language.bfloat16

    def own(self, case):
        dtype = {"fp8_block": "fp8_w8a8", "int4_w4a16": "int4_w4a16"}.get(case.scheme)
        block = {"fp8_block": [BLOCK, BLOCK], "int4_w4a16": [0, BLOCK]}.get(case.scheme)
        configs = self.kernels.get_moe_configs(case.experts, case.intermediate, dtype, *(block or (0, 0)))
        if configs:
            return dict(configs[min(configs, key=lambda tokens: abs(tokens - case.tokens))])
        return dict(self.kernels.get_default_config(case.tokens, case.experts, case.intermediate, case.hidden, case.top_k, dtype, block))

    def product(self, case, config, a, b, c, lists, weights, second):
        config = dict(config)
        config.setdefault("SPLIT_K", 1)
        block = {"fp8_block": [BLOCK, BLOCK], "int4_w4a16": [0, BLOCK]}.get(case.scheme)
        self.kernels.dispatch_fused_moe_kernel(
            a[0], b[0], c.view(-1, case.top_k, c.shape[-1]), a[1], b[1], None, weights if second else None, *lists, second,
            1 if second else case.top_k, config, compute_type=self.compute, use_fp8_w8a8=case.scheme == "fp8_block", use_int8_w8a8=False,
            use_int8_w8a16=False, use_int4_w4a16=case.scheme == "int4_w4a16", per_channel_quant=False, block_shape=block)

    layer = None  # its activation and its sum are compiled


class Sglang:
    name = "sglang"

    def __init__(self, folder):
        import triton

        yes, no = lambda *a: True, lambda *a: False
        self.kernels = StandIns(folder, "sglang", "kernels.ops.moe.fused_moe_triton_kernels", {
            "sglang.kernels.jit.utils": dict(is_arch_support_pdl=yes),
            "sglang.srt.layers.moe.utils": dict(get_moe_padding_size=lambda *a: 0),
            "sglang.srt.utils": dict(is_cuda=yes, is_sm90_supported=yes, is_cpu=no, is_hip=no, cpu_has_amx_support=no),
        }).load()
        self.compute = triton.language.bfloat16

    def own(self, case):
        few = case.tokens <= case.experts
        if case.scheme == "fp8_block":
            return dict(BLOCK_SIZE_M=16 if few else 64, BLOCK_SIZE_N=BLOCK, BLOCK_SIZE_K=BLOCK, GROUP_SIZE_M=1 if few else 32, num_warps=4,
                        num_stages=3)
        if case.scheme == "int4_w4a16":
            return dict(BLOCK_SIZE_M=16 if few else 64, BLOCK_SIZE_N=64, BLOCK_SIZE_K=64, GROUP_SIZE_M=1, num_warps=4, num_stages=3)
        return dict(BLOCK_SIZE_M=16, BLOCK_SIZE_N=64, BLOCK_SIZE_K=128, GROUP_SIZE_M=1, num_warps=4, num_stages=4) if few else dict(
            BLOCK_SIZE_M=64, BLOCK_SIZE_N=128, BLOCK_SIZE_K=64, GROUP_SIZE_M=8, num_warps=4, num_stages=3)

    def product(self, case, config, a, b, c, lists, weights, second, ids=None):
        config = dict(config)
        up, down = config.pop("up_tma", False), config.pop("down_tma", False)
        block = {"fp8_block": [BLOCK, BLOCK], "int4_w4a16": [0, BLOCK]}.get(case.scheme)
        self.kernels.invoke_fused_moe_kernel(
            a[0], b[0], None, c, a[1], b[1], None, weights, ids if ids is not None else weights, *lists, second,
            1 if second else case.top_k, config, self.compute, case.scheme == "fp8_block", False, False, case.scheme == "int4_w4a16", False,
            block_shape=block, b_use_tma=down if second else up, a_use_tma=second and down, c_sorted=down and not second,
            filter_expert=False)

    def layer(self, case, config, x, weights, ids, p):
        """Its whole layer, but for lists and quantizers, whose originals are compiled: these are ours."""
        down = config.get("down_tma", False)
        lists = moesaic.align(ids, case.experts, config["BLOCK_SIZE_M"])
        rows = lists[0].numel() if down else case.slots
        h = torch.empty(rows, 2 * case.intermediate, dtype=torch.bfloat16, device=x.device)
        act = torch.empty(rows, case.intermediate, dtype=torch.bfloat16, device=x.device)
        c = torch.empty(case.tokens, case.top_k, case.hidden, dtype=torch.bfloat16, device=x.device)
        y = torch.empty_like(x)
        self.product(case, config, case.quantized(x), weights.fc1, h, lists, p, False, ids)
        self.kernels.act_and_mul_triton(h, act, config, lists[1] if down else ids, lists[1] if down else None, down)
        self.product(case, config, case.quantized(act), weights.fc2, c, lists, p, True, ids)
        self.kernels.moe_sum_reduce_triton(c, y, 1.0)
        return y
