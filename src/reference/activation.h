// SPDX-License-Identifier: Apache-2.0
// The functions between the two products, as moesaic/activation.h has them.
#pragma once

#include <span>
#include <vector>

#include "moesaic/activation.h"
#include "reference/bounded.h"

namespace moesaic::reference {

struct ActivationParameters {
  double alpha = 0, beta = 0, limit = 0;
};
// Of one local expert: the tensors where given, else the scalars of the spec.
ActivationParameters parameters_of(const ActivationSpec& spec, const ActivationWeights& weights,
                                   std::int64_t expert);

// g alone for ungated functions; u is then ignored.
double activate(Activation kind, const ActivationParameters& parameters, double g, double u);
Bounded activate(Activation kind, const ActivationParameters& parameters, Bounded g, Bounded u);
// A whole fc1 row, gate and up taken from where order and layout put them.
std::vector<Bounded> activate(const ActivationSpec& spec, const ActivationParameters& parameters,
                              std::span<const Bounded> fc1);

}  // namespace moesaic::reference
