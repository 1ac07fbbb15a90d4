// SPDX-License-Identifier: Apache-2.0
// Where exceptions end: every function of the C interface runs its body in here.
#pragma once

#include <exception>
#include <new>
#include <string>
#include <string_view>

#include "check.h"
#include "moesaic/c_api.h"
#include "moesaic/layer.h"

// The opaque handle of level 1.
struct moesaic_layer {
  moesaic::Layer layer;
};

namespace moesaic::c {

// Keeps the message for moesaic_last_error of this thread; returns the status of `code`.
moesaic_status fail(ErrorCode code, std::string_view message);

template <typename Body>
moesaic_status guarded(const Body& body) noexcept {
  try {
    body();
    return MOESAIC_OK;
  } catch (const Error& error) {
    return fail(error.code(), error.what());
  } catch (const std::bad_alloc&) {
    return fail(ErrorCode::kOutOfMemory, "host memory: allocation failed");
  } catch (const std::exception& error) {
    return fail(ErrorCode::kInternal, error.what());
  } catch (...) {
    return fail(ErrorCode::kInternal, "an exception of unknown type");
  }
}

template <typename T>
T& needed(const char* argument, T* pointer) {
  if (pointer == nullptr) invalid(std::string(argument) + ": expected a pointer, got NULL");
  return *pointer;
}

template <typename Args>
Workspace workspace_of(const Args& args) {
  return {.data = args.workspace, .bytes = args.workspace_bytes};
}

}  // namespace moesaic::c
