# SPDX-License-Identifier: Apache-2.0
"""A layer in a torch program: routing inside, a residual added in place, torch.compile, and CUDA when it is there."""

import torch

import moesaic
from moesaic import torch_op

device = "cuda:0" if torch.cuda.is_available() and any(d["device"] == "cuda:0" for d in moesaic.devices()) else "cpu"
EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 8, 128, 256, 2
torch.manual_seed(0)
fc1 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, dtype=torch.bfloat16, device=device) * 0.1
fc2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, dtype=torch.bfloat16, device=device) * 0.1
layer = moesaic.Layer(experts=EXPERTS, hidden=HIDDEN, intermediate=INTERMEDIATE, top_k=TOP_K, max_tokens=1024,
                      scheme="bf16", device=device).load(dict(weight=fc1), dict(weight=fc2))
x = torch.randn(16, HIDDEN, dtype=torch.bfloat16, device=device)
logits = torch.randn(16, EXPERTS, dtype=torch.float32, device=device)

y = layer(x, router_logits=logits)                           # routing inside the layer
residual = x.clone()
layer(x, router_logits=logits, output=residual, add=True)    # x + layer(x), nothing allocated for the result
ids, weights = moesaic.route(logits, TOP_K)
number = torch_op.register(layer)
compiled = torch.compile(lambda x: torch_op.forward(x, ids, weights, number), backend="eager", fullgraph=True)
print(f"{device}: y {tuple(y.shape)} {y.dtype}; the same bits through torch.compile: {torch.equal(compiled(x), y)}; "
      f"residual off by {(residual.float() - x.float() - y.float()).abs().max():.4f}")
