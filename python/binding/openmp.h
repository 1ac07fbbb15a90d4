// SPDX-License-Identifier: Apache-2.0
// The CPU's work on the threads of an OpenMP runtime that the process has loaded already (torch's).
#pragma once

#include <string>

namespace moesaic::python {

// `path`: of the runtime's shared object, as the process loaded it; "": back to the library's own threads. Throws
// kInvalidArgument where that is not loaded, or has no GOMP_parallel (libgomp, libomp and libiomp5 have one).
void use_openmp(const std::string& path);

}  // namespace moesaic::python
