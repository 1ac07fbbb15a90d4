// SPDX-License-Identifier: Apache-2.0
// Pairs, the special cases, and the full product.
#include <algorithm>
#include <array>
#include <set>

#include "harness/cases.h"
#include "scheme.h"

namespace moesaic::harness {
namespace {

constexpr std::int64_t kTokens[] = {17, 3, 257, 1, 1024, 0};
constexpr Format kFormats[] = {Format::kStandard, Format::kSorted, Format::kBatched};

bool four_bit(const Variant& v) {
  const WeightFormat f = traits(v.quant.scheme).weight;
  return f == WeightFormat::kU4 || f == WeightFormat::kE2M1;
}
// Refused by name in every backend: two weights in a byte along K.
bool makes_sense(const Variant& v, const Shape& s) {
  return !four_bit(v) || (s.hidden % 2 == 0 && s.intermediate % 2 == 0);
}
// Products the oracle and a debug build finish in well under a second, and a batched buffer of some
// megabytes.
bool is_affordable(const Shape& s, std::int64_t tokens, Format format, Load load) {
  const std::int64_t slots = tokens * s.top_k;
  const std::int64_t capacity = load == Load::kUniform ? slots / s.experts * 2 + 4 : slots;
  if (format == Format::kBatched && s.experts * capacity * s.hidden > (INT64_C(1) << 23))
    return false;
  return slots * s.hidden * s.intermediate * 3 <= INT64_C(60'000'000);
}

// What is not part of a case's coordinates changes from case to case.
void vary(Case* c, std::uint64_t index) {
  const std::uint64_t r = mix(0xca5e, index);
  c->seed = mix(r, 1);
  if (is_gated(c->activation.kind)) {
    c->activation.order = (r >> 8) % 3 == 0 ? GateOrder::kUpFirst : GateOrder::kGateFirst;
    c->activation.layout = (r >> 16) % 3 == 0 ? GateLayout::kInterleaved : GateLayout::kHalves;
  }
  const bool has_parameters = c->activation.kind >= Activation::kSwigluOai;
  c->activation.limit = 1.25f;  // random numbers of variance 1 reach it
  if (has_parameters && (r >> 24) % 2 == 0) c->parameters = ExpertParameters::kTensors;
  if ((r >> 32) % 3 == 0) c->placement = Placement::kStrided;
  if ((r >> 40) % 4 == 0) c->id_dtype = DType::kI64;
}

// --- pairs ---------------------------------------------------------------------------------------
// A case as one value per factor. Pairs are covered greedily: each new case starts from a pair
// still missing and takes, of some random completions, the one that covers most.
constexpr int kFactors = 7;
using Levels = std::array<int, kFactors>;

struct Factors {
  Levels count;
  Factors()
      : count{static_cast<int>(variants().size()),
              3,
              kNumActivations,
              2,
              static_cast<int>(test_shapes().size()),
              static_cast<int>(std::size(kTokens)),
              kNumLoads} {}

  Case make(const Levels& l) const {
    Case c;
    c.variant = variants()[static_cast<std::size_t>(l[0])];
    c.format = kFormats[l[1]];
    c.activation.kind = static_cast<Activation>(l[2]);
    c.bias = static_cast<Biases>(l[3]);
    c.shape = test_shapes()[static_cast<std::size_t>(l[4])];
    c.tokens = kTokens[l[5]];
    c.load = static_cast<Load>(l[6]);
    return c;
  }
  bool possible(const Levels& l) const {
    const Shape& s = test_shapes()[static_cast<std::size_t>(l[4])];
    return makes_sense(variants()[static_cast<std::size_t>(l[0])], s) &&
           is_affordable(s, kTokens[l[5]], kFormats[l[1]], static_cast<Load>(l[6]));
  }
};

using Pair = std::array<int, 4>;  // factor, level, factor, level

std::vector<Pair> pairs_of(const Levels& l) {
  std::vector<Pair> pairs;
  for (int a = 0; a < kFactors; ++a)
    for (int b = a + 1; b < kFactors; ++b)
      pairs.push_back({a, l[static_cast<std::size_t>(a)], b, l[static_cast<std::size_t>(b)]});
  return pairs;
}

std::vector<Levels> cover_pairs(const Factors& f) {
  std::set<Pair> missing;
  for (int a = 0; a < kFactors; ++a)
    for (int b = a + 1; b < kFactors; ++b)
      for (int i = 0; i < f.count[static_cast<std::size_t>(a)]; ++i)
        for (int j = 0; j < f.count[static_cast<std::size_t>(b)]; ++j) missing.insert({a, i, b, j});
  Rng rng(0x9a125);
  std::vector<Levels> chosen;
  while (!missing.empty()) {
    const Pair start = *missing.begin();
    Levels best{};
    std::size_t most = 0;
    for (int attempt = 0; attempt < 40; ++attempt) {
      Levels l;
      for (int a = 0; a < kFactors; ++a)
        l[static_cast<std::size_t>(a)] =
            static_cast<int>(rng.below(f.count[static_cast<std::size_t>(a)]));
      l[static_cast<std::size_t>(start[0])] = start[1];
      l[static_cast<std::size_t>(start[2])] = start[3];
      if (!f.possible(l)) continue;
      std::size_t covers = 0;
      for (const Pair& p : pairs_of(l)) covers += missing.count(p);
      if (covers > most) {
        most = covers;
        best = l;
      }
    }
    missing.erase(start);  // even when no completion makes sense (an odd shape with 4-bit weights)
    if (most == 0) continue;
    for (const Pair& p : pairs_of(best)) missing.erase(p);
    chosen.push_back(best);
  }
  return chosen;
}

// --- special cases -------------------------------------------------------------------------------

Case plain(Scheme scheme, Format format) {
  Case c;
  c.variant = default_variant(scheme);
  c.format = format;
  c.shape = test_shapes()[0];
  c.activation.limit = 1.25f;
  return c;
}

void add_routing_methods(std::vector<Case>* list) {
  for (int m = 0; m < kNumRoutingMethods; ++m) {
    for (const RoutingSource source : {RoutingSource::kLogits, RoutingSource::kRouter}) {
      Case c = plain(Scheme::kBF16, Format::kStandard);
      c.shape = {"routed", 16, 64, 32, 4};
      c.source = source;
      c.routing.method = static_cast<RoutingMethod>(m);
      if (c.routing.method == RoutingMethod::kDeepSeekV3 ||
          c.routing.method == RoutingMethod::kDeepSeekV2) {
        c.routing.groups = 4;
        c.routing.topk_groups = 2;
        c.routing.scale = 2.5f;
      }
      if (c.routing.method == RoutingMethod::kLlama4) {
        c.shape.top_k = 1;
        c.weight_on = WeightOn::kInput;
      }
      if (c.routing.method == RoutingMethod::kSparseMixer) c.shape.top_k = 2;
      list->push_back(c);
    }
  }
}

}  // namespace

std::vector<Case> pair_cases() {
  const Factors factors;
  std::vector<Case> list;
  for (const Levels& l : cover_pairs(factors)) {
    list.push_back(factors.make(l));
    vary(&list.back(), list.size());
  }
  return list;
}

std::vector<Case> special_cases() {
  std::vector<Case> list;
  const auto each = [&](auto change) {  // every scheme in every format
    for (int s = 0; s < kNumSchemes; ++s) {
      for (const Format f : kFormats) {
        Case c = plain(static_cast<Scheme>(s), f);
        if (change(&c)) list.push_back(c);
      }
    }
  };
  each([](Case* c) {  // NaN and Inf stay in their own token's row
    c->values = Values::kNonFinite;
    return true;
  });
  each([](Case* c) {
    c->placement = Placement::kStrided;
    c->bias = Biases::kAll;
    return true;
  });
  each([](Case* c) {  // a part of the experts, ids of every kind
    c->local = {2, 3};
    c->load = Load::kRemote;
    c->id_dtype = DType::kI64;
    c->tokens = 33;
    return true;
  });
  each([](Case* c) {  // no id is local
    c->local = {6, 2};
    c->load = Load::kOne;
    return true;
  });
  each([](Case* c) {
    c->shape = {"2048x32", 2048, 32, 16, 32};
    c->tokens = 5;
    return c->format == Format::kStandard || c->variant.quant.scheme == Scheme::kBF16;
  });
  each([](Case* c) {
    c->shared_experts = 2;
    c->bias = Biases::kAll;
    return c->format == Format::kStandard;
  });
  each([](Case* c) {
    c->accumulate = Accumulate::kAdd;
    return c->format != Format::kSorted;
  });
  each([](Case* c) {  // Llama-4: the weight multiplies the input
    c->weight_on = WeightOn::kInput;
    c->shape.top_k = 1;
    c->shape.name = "small-k1";
    return true;
  });
  for (const Format f : kFormats) {  // GPT-OSS: interleaved, biases everywhere, alpha and limit
    Case c = plain(Scheme::kMxfp4W4A16, f);
    c.shape = {"gpt-oss", 8, 96, 96, 4};
    c.activation = {.kind = Activation::kSwigluOai, .layout = GateLayout::kInterleaved};
    c.bias = Biases::kAll;
    list.push_back(c);
  }
  add_routing_methods(&list);
  std::uint64_t index = 1;
  for (Case& c : list) c.seed = mix(0x5bec1a1, index++);
  return list;
}

std::vector<Case> product_cases(const CaseFilter& filter) {
  std::vector<Case> list;
  std::vector<Shape> shapes(test_shapes().begin(), test_shapes().end());
  if (filter.shape) shapes = {*filter.shape};
  std::uint64_t index = 0;
  for (const Variant& v : variants()) {
    for (const Format format : kFormats) {
      for (int a = 0; a < kNumActivations; ++a) {
        for (const Biases bias : {Biases::kNone, Biases::kAll}) {
          for (const Shape& shape : shapes) {
            Case c;
            c.variant = v;
            c.format = format;
            c.activation.kind = static_cast<Activation>(a);
            c.bias = bias;
            c.shape = shape;
            ++index;  // before any filter: a case keeps its numbers whatever is asked for
            std::uint64_t r = mix(0x9d0d, index);
            do {
              c.tokens = filter.tokens ? *filter.tokens : kTokens[r % std::size(kTokens)];
              c.load = static_cast<Load>((r >> 16) % kNumLoads);
              r = mix(r, 1);
            } while (!filter.shape && !filter.tokens &&
                     !is_affordable(shape, c.tokens, format, c.load));
            if (filter.scheme && v.quant.scheme != *filter.scheme) continue;
            if (filter.variant && v.name != *filter.variant) continue;
            if (filter.format && format != *filter.format) continue;
            if (filter.activation && c.activation.kind != *filter.activation) continue;
            if (!makes_sense(v, shape)) continue;
            vary(&c, index);
            list.push_back(c);
          }
        }
      }
    }
  }
  if (filter.shape || filter.tokens) return list;
  for (Case& c : special_cases()) {
    if (filter.scheme && c.variant.quant.scheme != *filter.scheme) continue;
    if (filter.variant && c.variant.name != *filter.variant) continue;
    if (filter.format && c.format != *filter.format) continue;
    if (filter.activation && c.activation.kind != *filter.activation) continue;
    list.push_back(std::move(c));
  }
  return list;
}

}  // namespace moesaic::harness
