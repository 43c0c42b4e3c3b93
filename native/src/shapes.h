// Shapes in messages.
#pragma once

#include <string>

#include "xla/ffi/api/ffi.h"

namespace mamba_eqx {

inline std::string shown(xla::ffi::AnyBuffer::Dimensions shape) {
  std::string text = "(";
  for (size_t axis = 0; axis < shape.size(); ++axis)
    text += (axis ? ", " : "") + std::to_string(shape[axis]);
  return text + ")";
}

}  // namespace mamba_eqx
