# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism with an exchange that is not ours, around prepare, experts and finalize.

Four ranks are simulated in one process; `all_to_all` stands for what a communication library does. Each rank holds two
of eight experts and has tokens of its own: prepare sorts them by expert, the exchange sends every expert's rows to the
rank that holds it, experts runs there, the rows travel back the same way, finalize sums.
"""

from typing import Any

import numpy as np

import moesaic

RANKS, EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, TOKENS, CAPACITY = 4, 8, 64, 48, 2, 10, 16
LOCAL = EXPERTS // RANKS
rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.2)


fc1, fc2 = normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN), normal(EXPERTS, HIDDEN, INTERMEDIATE)
shape: dict[str, Any] = dict(experts=EXPERTS, hidden=HIDDEN, intermediate=INTERMEDIATE, top_k=TOP_K, scheme="f32")


def all_to_all(sent):
    """sent[r][e]: what rank r has for expert e. Returns what each rank holds for its experts, from every rank."""
    return [np.stack([sent[source][rank * LOCAL:(rank + 1) * LOCAL] for source in range(RANKS)])
            for rank in range(RANKS)]


def all_to_all_back(held):
    """The inverse: held[r][source, local expert] goes home."""
    return [np.concatenate([held[rank][source] for rank in range(RANKS)]) for source in range(RANKS)]


whole = moesaic.Layer(max_tokens=TOKENS, **shape).load(dict(weight=fc1), dict(weight=fc2))  # to compare with
tokens = [normal(TOKENS, HIDDEN) for _ in range(RANKS)]
routing = [moesaic.route(normal(TOKENS, EXPERTS), TOP_K) for _ in range(RANKS)]

# Every rank: tokens -> rows of all experts, [E, capacity, H], and how many rows each has.
rows, counts = [], []
for x, (ids, _) in zip(tokens, routing):
    buffer, count = np.empty((EXPERTS, CAPACITY, HIDDEN), np.float32), np.empty(EXPERTS, np.int32)
    moesaic.prepare(whole, x, ids, buffer, count)
    rows.append(buffer)
    counts.append(count)

arrived, arrived_counts = all_to_all(rows), all_to_all(counts)

# Every rank: its own experts on what came in. A source's rows of an expert are that expert's batch.
results = []
for rank in range(RANKS):
    mine = slice(rank * LOCAL, (rank + 1) * LOCAL)
    config = moesaic.Layer(max_tokens=CAPACITY, local_first=rank * LOCAL, local_count=LOCAL, **shape)
    config.load(dict(weight=fc1[mine]), dict(weight=fc2[mine]))
    out = np.zeros_like(arrived[rank])
    for source in range(RANKS):
        moesaic.experts(config, arrived[rank][source], out[source], num_tokens=arrived_counts[rank][source])
    results.append(out)

home = all_to_all_back(results)
same = []
for x, (ids, weights), back in zip(tokens, routing, home):
    y = moesaic.finalize(whole, back, weights, np.empty_like(x), topk_ids=ids)
    same.append(np.array_equal(y, whole(x, ids, weights)))
print(f"{RANKS} ranks, {LOCAL} experts each; the same bits as one layer: {all(same)}")
