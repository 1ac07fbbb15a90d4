# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of many families: logits against eager, greedy generation equal in float32.

MOESAIC_TEST_DEVICE=cuda runs them there.
"""

import copy
import os

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
import moesaic.integrations.transformers as integration  # noqa: E402

DEVICE = os.environ.get("MOESAIC_TEST_DEVICE", "cpu")
_SMALL = dict(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
              eos_token_id=2)

FAMILIES = {
    "MixtralConfig": dict(intermediate_size=96, num_local_experts=4, num_experts_per_tok=2),
    "Qwen2MoeConfig": dict(moe_intermediate_size=48, intermediate_size=96, num_experts=6,
                           num_experts_per_tok=2, shared_expert_intermediate_size=80),
    "Qwen3MoeConfig": dict(moe_intermediate_size=48, intermediate_size=96, num_experts=8,
                           num_experts_per_tok=3, head_dim=16),
    "OlmoeConfig": dict(intermediate_size=48, num_experts=8, num_experts_per_tok=3),
    "DeepseekV3Config": dict(moe_intermediate_size=48, intermediate_size=96, n_routed_experts=8,
                             num_experts_per_tok=2, n_group=4, topk_group=2, n_shared_experts=1,
                             first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=24,
                             qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
                             num_key_value_heads=4),
    "DeepseekV2Config": dict(moe_intermediate_size=48, intermediate_size=96, n_routed_experts=8,
                             num_experts_per_tok=2, n_group=4, topk_group=2, n_shared_experts=1,
                             first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=24,
                             qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
                             num_key_value_heads=4),
    "GptOssConfig": dict(intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, head_dim=16,
                         layer_types=["full_attention", "full_attention"]),
    "Glm4MoeConfig": dict(moe_intermediate_size=48, intermediate_size=96, n_routed_experts=8,
                          num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1,
                          first_k_dense_replace=1, head_dim=16),
    "PhimoeConfig": dict(intermediate_size=48, num_local_experts=4, num_experts_per_tok=2),
    "Ernie4_5_MoeConfig": dict(moe_intermediate_size=48, intermediate_size=96, moe_num_experts=8, moe_k=2,
                               moe_num_shared_experts=1, moe_layer_start_index=0),
    "MiniMaxM2Config": dict(intermediate_size=48, num_local_experts=8, num_experts_per_tok=2, head_dim=16),
}


def _models(family, dtype):
    config_class = getattr(transformers, family, None)
    if config_class is None:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    config = config_class(**{**_SMALL, **FAMILIES[family]})
    config._attn_implementation = "eager"
    eager = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    eager = eager.to(DEVICE, dtype).eval()
    with torch.no_grad():
        for p in eager.parameters():  # buffers of zeros (biases, norms) should matter, too
            p.add_(torch.randn_like(p) * 0.02)
    ours = copy.deepcopy(eager)
    ours.set_experts_implementation("moesaic")
    return eager, ours


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_equal_in_float32(family):
    eager, ours = _models(family, torch.float32)
    ids = torch.randint(3, 97, (2, 7), device=DEVICE)
    with torch.no_grad():
        a, b = eager(ids).logits, ours(ids).logits
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * a.abs().max())
    assert len(integration._packed) > 0, "the moesaic implementation was not called"
    generate = dict(max_new_tokens=6, do_sample=False, use_cache=True)
    assert torch.equal(eager.generate(ids, **generate), ours.generate(ids, **generate))


@pytest.mark.parametrize("family", ["MixtralConfig", "Qwen3MoeConfig", "GptOssConfig"])
def test_bf16_is_as_close_as_eager(family):
    eager, ours = _models(family, torch.bfloat16)
    exact = copy.deepcopy(eager).float()
    ids = torch.randint(3, 97, (2, 7), device=DEVICE)
    with torch.no_grad():
        truth = exact(ids).logits
        a = (eager(ids).logits.float() - truth).norm() / truth.norm()
        b = (ours(ids).logits.float() - truth).norm() / truth.norm()
    assert b <= 2 * a + 5e-3


def test_weights_are_packed_again_when_they_change():
    eager, ours = _models("MixtralConfig", torch.float32)
    ids = torch.randint(3, 97, (1, 5), device=DEVICE)
    with torch.no_grad():
        ours(ids)
        for model in (eager, ours):
            for name, p in model.named_parameters():
                if "experts" in name:
                    p.mul_(1.5)
        a, b = eager(ids).logits, ours(ids).logits
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * a.abs().max())
    assert set(ours.state_dict()) == set(eager.state_dict())


def test_training_is_refused_by_name():
    _, ours = _models("MixtralConfig", torch.float32)
    ours.train()
    with pytest.raises(RuntimeError, match="MixtralExperts.*no gradients"):
        ours(torch.tensor([[3, 4, 5]], device=DEVICE))


def test_an_unknown_gate_is_refused_by_class_name():
    _, ours = _models("MixtralConfig", torch.float32)
    experts = next(m for m in ours.modules() if type(m).__name__ == "MixtralExperts")
    experts._apply_gate = lambda x: torch.sin(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2:]
    with pytest.raises(ValueError, match="MixtralExperts"):
        integration.activation_of(experts)


def test_under_torch_compile():
    eager, ours = _models("MixtralConfig", torch.float32)
    experts = next(m for m in ours.modules() if type(m).__name__ == "MixtralExperts")
    x = torch.randn(5, 64, device=DEVICE)
    index, weights = torch.randint(0, 4, (5, 2), device=DEVICE), torch.rand(5, 2, device=DEVICE)
    with torch.no_grad():
        experts(x, index, weights)  # packs outside the graph
        number = integration._packed[experts].number
        compiled = torch.compile(lambda *a: integration.torch_op.forward(*a) * 2, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x, index, weights, number), experts(x, index, weights) * 2)
