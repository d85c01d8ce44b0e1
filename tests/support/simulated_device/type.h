// Which device this is to PyTorch: `install` says it before anything else is done.
#pragma once
#include <ATen/ATen.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/Stream.h>

namespace simulated {
inline c10::DeviceType own_type = c10::DeviceType::CUDA;
inline c10::DispatchKey own_key = c10::DispatchKey::CUDA;

inline bool is_ours(const at::Tensor& tensor) { return tensor.device().type() == own_type; }

// Apple's GPU has one stream and no float64.
inline bool is_apple() { return own_type == c10::DeviceType::MPS; }
inline void check_dtype(at::ScalarType dtype) {
  TORCH_CHECK_TYPE(!is_apple() || (dtype != at::kDouble && dtype != at::kComplexDouble),
                   "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
                   "Please use float32 instead. (simulated)");
}
}  // namespace simulated
