# SPDX-License-Identifier: Apache-2.0
"""Writes routing.json: what the transformers library's own routers choose, and PyTorch formulas for
the methods that no model there has. route_test.cpp compares. Needs torch and transformers:

    python tests/golden/make_routing.py
"""

import json
import pathlib
from types import SimpleNamespace

import torch
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

TOKENS, HIDDEN, EXPERTS, TOP_K = 6, 12, 16, 4


def short(*shape, scale=1.0):
    """Random numbers that bf16 holds exactly: short to write, and no rounding to argue about."""
    return (torch.randn(*shape) * scale).bfloat16().float()


def config(**more):
    """The attributes that the routers read, under every name the models give them."""
    return SimpleNamespace(
        hidden_size=HIDDEN,
        num_experts=EXPERTS,
        num_local_experts=EXPERTS,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        **more,
    )


def sort_by_weight(ids, weights):
    order = torch.argsort(weights, dim=-1, descending=True, stable=True)
    return ids.gather(1, order), weights.gather(1, order)


class Cases:
    def __init__(self):
        self.rows = []

    def add(self, name, spec, x, weight, ids, weights, bias=None, selection_bias=None):
        ids, weights = sort_by_weight(ids, weights.float())
        row = {
            "name": name,
            "spec": spec,
            "hidden_states": x.tolist(),
            "weight": weight.tolist(),
            "ids": ids.tolist(),
            "weights": [[float(f"{w:.9g}") for w in line] for line in weights.tolist()],
        }
        if bias is not None:
            row["bias"] = bias.tolist()
        if selection_bias is not None:
            row["selection_bias"] = selection_bias.tolist()
        self.rows.append(row)

    def model(self, name, router, spec, scale=1.0):
        """Runs a model's router: (logits, weights, ids), or Llama-4's (scores over all E, logits)."""
        x = short(TOKENS, HIDDEN)
        with torch.no_grad():
            router.weight.copy_(short(EXPERTS, HIDDEN, scale=scale))
            bias = getattr(router, "bias", None)
            if bias is not None:
                bias.copy_(short(EXPERTS))
            selection_bias = getattr(router, "e_score_correction_bias", None)
            statics = getattr(router, "moe_statics", None)
            if statics is not None:
                selection_bias = statics.e_score_correction_bias
            if selection_bias is not None:
                selection_bias.copy_(short(*selection_bias.shape, scale=0.1))
                selection_bias = selection_bias.flatten()
            if isinstance(router, Llama4Router):
                scores, _ = router(x)
                weights, ids = scores.topk(1, dim=-1)
            elif isinstance(router, MiniMaxM2TopKRouter):
                selection_bias = short(EXPERTS, scale=0.1)
                _, weights, ids = router(x, selection_bias)
            else:
                _, weights, ids = router(x)
        self.add(name, spec, x, router.weight.detach(), ids, weights, bias, selection_bias)

    def formula(self, name, spec, weigh, select=None, top_k=TOP_K):
        x, weight = short(TOKENS, HIDDEN), short(EXPERTS, HIDDEN)
        z = x @ weight.T
        ids = (select or (lambda z: z))(z).topk(top_k, dim=-1).indices
        self.add(name, spec, x, weight, ids, weigh(z, ids))


def main():
    torch.manual_seed(20)
    cases = Cases()
    cases.model("mixtral", MixtralTopKRouter(config()), {"method": "renormalize"})
    for normalize in (True, False):
        cases.model(
            f"qwen3_moe_{normalize}".lower(),
            Qwen3MoeTopKRouter(config(norm_topk_prob=normalize)),
            {"method": "softmax_topk", "renormalize": "always" if normalize else "never"},
        )
    cases.model(
        "qwen2_moe", Qwen2MoeTopKRouter(config(norm_topk_prob=False)), {"method": "softmax_topk"}
    )
    cases.model("olmoe", OlmoeTopKRouter(config(norm_topk_prob=False)), {"method": "softmax_topk"})
    cases.model("gpt_oss", GptOssTopKRouter(config()), {"method": "renormalize"})
    cases.model("llama4", Llama4Router(config()), {"method": "llama4"})
    cases.model(
        "phimoe",
        PhimoeTopKRouter(
            SimpleNamespace(
                hidden_size=HIDDEN,
                num_local_experts=EXPERTS,
                num_experts_per_tok=2,
                router_jitter_noise=0.1,
                input_jitter_noise=0.0,
            )
        ).eval(),
        {"method": "sparsemixer", "jitter": 0.1},
        scale=0.25,
    )
    cases.model(
        "ernie4_5_moe",
        Ernie4_5_MoeTopKRouter(config(moe_norm_min=1e-12)),
        {"method": "softmax_bias", "sum_floor": 1e-12},
    )
    cases.model("minimax_m2", MiniMaxM2TopKRouter(config()), {"method": "minimax2"})
    for method in ("greedy", "group_limited_greedy"):
        grouped = method != "greedy"
        cases.model(
            f"deepseek_v2_{method}",
            DeepseekV2TopkRouter(
                config(routed_scaling_factor=16.0, topk_method=method, n_group=4, topk_group=2)
            ),
            {"method": "deepseek_v2", "scale": 16.0}
            | ({"groups": 4, "topk_groups": 2} if grouped else {}),
        )
    for router, name in ((DeepseekV3TopkRouter, "deepseek_v3"), (Glm4MoeTopkRouter, "glm4_moe")):
        cases.model(
            name,
            router(
                config(routed_scaling_factor=2.5, n_group=4, topk_group=2, norm_topk_prob=True)
            ),
            {"method": "deepseek_v3", "scale": 2.5, "groups": 4, "topk_groups": 2},
        )
    cases.model(
        "deepseek_v4",
        DeepseekV4TopKRouter(config(scoring_func="sqrtsoftplus", routed_scaling_factor=1.5)),
        {"method": "sqrtsoftplus", "scale": 1.5},
    )
    cases.formula("topk", {"method": "topk"}, lambda z, ids: z.gather(1, ids))
    cases.formula("sigmoid", {"method": "sigmoid"}, lambda z, ids: z.gather(1, ids).sigmoid())
    cases.formula(
        "sigmoid_renorm",
        {"method": "sigmoid_renorm"},
        lambda z, ids: torch.nn.functional.normalize(z.gather(1, ids).sigmoid(), p=1, dim=-1),
    )
    out = pathlib.Path(__file__).with_name("routing.json")
    out.write_text(json.dumps({"cases": cases.rows}, separators=(",", ":")) + "\n")
    print(f"{out.name}: {len(cases.rows)} cases, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
