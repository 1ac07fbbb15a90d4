// SPDX-License-Identifier: Apache-2.0
// Everything, in the order of the data.
#pragma once

#include "moesaic/types.h"
#include "moesaic/version.h"
#include "moesaic/routing.h"
#include "moesaic/quant.h"
#include "moesaic/activation.h"
#include "moesaic/gemm.h"
#include "moesaic/layer.h"
#include "moesaic/stages.h"
#include "moesaic/runtime.h"
#include "moesaic/checkpoint.h"
