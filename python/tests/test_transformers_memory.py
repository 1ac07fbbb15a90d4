# SPDX-License-Identifier: Apache-2.0
"""Parameters behind a packed copy: what they cost, and that nobody can tell that they are gone. fp8 models."""

import copy
import io
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")
import moesaic.integrations.transformers as integration  # noqa: E402
from moesaic.integrations._released import Packing, Released  # noqa: E402

IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])
_SIZES = dict(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              moe_intermediate_size=48, intermediate_size=96, num_experts=6, num_experts_per_tok=2, head_dim=16)


def _model(implementation="moesaic", family="Qwen3MoeConfig", **sizes):
    torch.manual_seed(0)
    config = getattr(transformers, family)(**{**_SIZES, **sizes})
    config._attn_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation=implementation).eval()


def _gpt_oss(implementation="moesaic"):
    return _model(implementation, "GptOssConfig", num_local_experts=4,
                  layer_types=["full_attention", "full_attention"])


def _released(model):
    return [p for p in model.parameters() if type(p) is Released]


@pytest.mark.parametrize("make", [_model, _gpt_oss], ids=["rows", "transposed"])
def test_released_parameters_come_back_when_touched(make):
    ours, eager = make(), make("eager")
    assert not _released(ours)
    with torch.no_grad():
        expected, logits = eager(IDS).logits, ours(IDS).logits
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
    gone = _released(ours)
    assert len(gone) == 4 and all(p.device.type == "cpu" and not p.is_meta and p.shape for p in gone)
    # state_dict has the values, and the next forward packs nothing again: the values did not change.
    layers = [held.packing.layer for held in integration._packed.values()]
    for name, value in ours.state_dict().items():
        assert torch.equal(value, eager.state_dict()[name]), name
    assert not _released(ours)
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, logits)
    assert len(_released(ours)) == 4 and all(
        any(held.packing.layer is layer for layer in layers) for held in integration._packed.values())
    # Copies, pickles and conversions see values.
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        assert torch.equal(twin(IDS).logits, logits) and torch.equal(ours(IDS).logits, logits)
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    with torch.no_grad():
        ours(IDS)
        assert ours.to(torch.bfloat16)(IDS).logits.dtype == torch.bfloat16


def test_changed_and_loaded_weights_are_used():
    ours, eager = _model(), _model(implementation="eager")
    with torch.no_grad():
        ours(IDS)
        for model in (ours, eager):
            for name, p in model.named_parameters():
                if name.endswith("down_proj") and "experts" in name:
                    p.mul_(1.5)
        assert torch.allclose(ours(IDS).logits, eager(IDS).logits, rtol=1e-4, atol=1e-4)
        other = _model(implementation="eager")
        ours.load_state_dict(other.state_dict())
        assert torch.allclose(ours(IDS).logits, other(IDS).logits, rtol=1e-4, atol=1e-4)


_DATA = {
    "mul_": lambda p: p.data.mul_(2), "copy_": lambda p: p.data.copy_(p.data * 2), "[:] =": lambda p: p.data.__setitem__(
        slice(None), p.data * 2), "clamp_": lambda p: p.data.clamp_(-0.01, 0.01), "=": lambda p: setattr(p, "data", p.data * 2),
    "one number": lambda p: p.data[-1, -1].__setitem__(-1, 40.0)}


@pytest.mark.parametrize("after", ["forward", "state_dict"])
@pytest.mark.parametrize("make", [_model, _gpt_oss], ids=["rows", "transposed"])
@pytest.mark.parametrize("how", _DATA)
def test_changes_through_data_are_used(how, make, after):
    """torch counts no version for them."""
    ours, eager = make(), make("eager")
    with torch.no_grad():
        before = ours(IDS).logits
        if after == "state_dict":
            ours.state_dict()
        for model in (ours, eager):
            for name, p in model.named_parameters():
                if name.endswith(("down_proj", "gate_up_proj")) and "experts" in name:
                    _DATA[how](p)
        assert len(_released(ours)) == 0
        expected, logits = eager(IDS).logits, ours(IDS).logits
        assert not torch.equal(logits, before)
        assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(ours(IDS).logits, logits)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, eager.state_dict()[name]), name


def test_nothing_is_compared_where_nothing_came_back(monkeypatch):
    ours, compared = _model(), []
    same = Packing._same_bits
    monkeypatch.setattr(Packing, "_same_bits", lambda self: compared.append(self) or same(self))
    with torch.no_grad():
        for _ in range(3):
            ours(IDS)
        assert not compared
        ours.state_dict()
        ours(IDS)
        ours(IDS)
    assert len(compared) == 2, "each layer's once"


_MEMORY = '''
import torch, transformers, moesaic.integrations.transformers
def peak(): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1024
config = transformers.Qwen3MoeConfig(vocab_size=97, hidden_size=512, num_hidden_layers=14, num_attention_heads=4,
    num_key_value_heads=2, moe_intermediate_size=256, intermediate_size=96, num_experts=14, num_experts_per_tok=2, head_dim=16)
ids = torch.tensor([[3, 4, 5, 6]])
tiny = transformers.Qwen3MoeConfig(**{**config.to_dict(), "num_hidden_layers": 1, "num_experts": 2})
with torch.no_grad():  # what the first forward of any model brings into memory is not this model's
    transformers.AutoModelForCausalLM.from_config(tiny, experts_implementation="moesaic").eval()(ids)
before = peak()
model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="moesaic").eval()
size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
with torch.no_grad():
    model(ids); model(ids)
print(size, peak() - before)
'''


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_memory_is_at_most_1_2_of_the_models():
    # Blocks of a real model (over 32 MiB) go back to the system when they are freed; these are smaller.
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="1048576")
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    size, grown = map(float, done.stdout.split())
    assert size > 250, size
    assert grown <= 1.2 * size, f"{grown:.0f} MiB for a model of {size:.0f} MiB"


# --- fp8 ------------------------------------------------------------------------------------------------

def _fp8_experts(block, scheme="dynamic", sizes=_SIZES):
    from transformers.integrations.finegrained_fp8 import FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    cls = use_experts_implementation(experts_class=type("TinyFP8Experts", (FP8Experts,), {}),
                                     experts_interface=integration.ALL_FP8_EXPERTS_FUNCTIONS)
    config = transformers.Qwen3MoeConfig(**sizes)
    config._experts_implementation = "moesaic"
    module = cls(config, block_size=block, activation_scheme=scheme).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            weight, scale = getattr(module, name), getattr(module, name + "_scale_inv")
            weight.copy_((torch.randn(weight.shape, generator=g) * 60).to(torch.float8_e4m3fn))
            scale.copy_(torch.rand(scale.shape, generator=g) * 0.002 + 0.001)
            if scheme == "static":
                # Up to 448 of them: what lies beyond would be clipped (x reaches 4, its products 40).
                scale = 0.02 if name == "gate_up_proj" else 0.2
                getattr(module, name + "_activation_scale").copy_(torch.tensor(scale))
    return module


def check_fp8_experts(block, scheme, device="cpu", sizes=_SIZES):
    """A forward of random experts against float64, and the weights behind it. Returns the module."""
    module = _fp8_experts(block, scheme, sizes).to(device)

    def numbers(name):
        weight, scale = getattr(module, name).double(), getattr(module, name + "_scale_inv").double()
        bn, bk = block or (weight.shape[1] // scale.shape[1], weight.shape[2])
        return weight * scale.repeat_interleave(bn, 1).repeat_interleave(bk, 2)[:, :weight.shape[1], :weight.shape[2]]

    up, down = numbers("gate_up_proj"), numbers("down_proj")
    x = torch.randn(7, up.shape[2]).bfloat16().to(device)
    ids, p = torch.stack([torch.randperm(6)[:2] for _ in range(7)]), torch.rand(7, 2)
    ids[0, 0] = 6  # the sentinel of remote experts
    truth = torch.zeros(x.shape, dtype=torch.float64, device=device)
    for t in range(7):
        for e, w in zip(ids[t].tolist(), p[t].tolist()):
            if e < 6:
                gate, linear = (up[e] @ x[t].double()).chunk(2)
                truth[t] += w * (down[e] @ (torch.nn.functional.silu(gate) * linear))
    y = module(x, ids.to(device), p.to(device))
    assert y.dtype == torch.bfloat16 and (y.double() - truth).norm() <= 0.07 * truth.norm()
    assert torch.equal(numbers("down_proj"), down)
    y = module(x, ids.to(device), p.to(device))
    assert (y.double() - truth).norm() <= 0.07 * truth.norm()
    return module


@pytest.mark.parametrize("block,scheme", [((16, 16), "dynamic"), (None, "dynamic"), (None, "static")])
def test_fp8_experts(block, scheme):
    assert len(_released(check_fp8_experts(block, scheme))) == 2


def test_fp8_of_four_bits_is_refused_by_class_name():
    module = _fp8_experts(None)
    module.down_proj.requires_grad_(False)
    module.down_proj.data, module.gate_up_proj.data = (torch.zeros(p.shape, dtype=torch.int8) for p in (
        module.down_proj, module.gate_up_proj.requires_grad_(False)))
    with pytest.raises(ValueError, match="TinyFP8Experts.*e2m1"):
        module(torch.zeros(1, 64).bfloat16(), torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2))


def test_an_fp8_model_generates():
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    plain = _model(implementation="eager").bfloat16()
    fp8 = copy.deepcopy(plain)
    names = [n for n, m in fp8.named_modules() if not n.endswith("experts") and isinstance(m, torch.nn.Linear)]
    replace_with_fp8_linear(fp8, names, FineGrainedFP8Config(weight_block_size=(16, 16), modules_to_not_convert=names))
    fp8.set_experts_implementation("moesaic")
    for (name, old), new in zip(plain.named_modules(), fp8.modules()):
        if not name.endswith("experts"):
            continue
        new.to_empty(device="cpu")
        with torch.no_grad():
            for part in ("gate_up_proj", "down_proj"):
                w = getattr(old, part)
                e, n, k = w.shape
                blocks = w.float().view(e, n // 16, 16, k // 16, 16)
                scale = blocks.abs().amax((2, 4), keepdim=True) / 448
                q = (blocks / scale).to(torch.float8_e4m3fn)
                getattr(new, part).copy_(q.view(e, n, k))
                getattr(new, part + "_scale_inv").copy_(scale.view(e, n // 16, k // 16))
                w.copy_((q.float() * scale).view(e, n, k))
    with torch.no_grad():
        a, b = plain(IDS).logits.float(), fp8.eval()(IDS).logits.float()
    assert (a - b).norm() <= 0.05 * a.norm()
    assert fp8.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 8)
