// SPDX-License-Identifier: Apache-2.0
#pragma once
#define MOESAIC_VERSION_MAJOR 0
#define MOESAIC_VERSION_MINOR 1
#define MOESAIC_VERSION_PATCH 0
#define MOESAIC_VERSION_STRING "0.1.0"
