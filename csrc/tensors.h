// Dtypes of the kernels and of torch, and the two ways in which ops.cpp makes tensors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "params.h"

namespace contaccum {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ScalarType accumulation(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Storage storage_of(ScalarType t) {
  switch (t) {
    case ScalarType::Double:
      return Storage::f64;
    case ScalarType::BFloat16:
      return Storage::bf16;
    case ScalarType::Half:
      return Storage::f16;
    default:
      return Storage::f32;
  }
}

inline ScalarType scalar_type_of(Storage s) {
  switch (s) {
    case Storage::f64:
      return ScalarType::Double;
    case Storage::bf16:
      return ScalarType::BFloat16;
    case Storage::f16:
      return ScalarType::Half;
    default:
      return ScalarType::Float;
  }
}

// Contiguous and of that dtype. Torch is not even asked where nothing needs to be done.
inline Tensor dense(const Tensor& t, ScalarType dtype) {
  const Tensor same = t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
  return same.is_contiguous() ? same : torch::stable::contiguous(same);
}

// Uninitialised, on the device of `like`. Not by torch::stable::new_empty, which looks its operator
// up by name in every call.
inline Tensor empty(const Tensor& like, IntHeaderOnlyArrayRef shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      shape.size(), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device,
      like.get_device_index(), &made));
  return Tensor(made);
}

}  // namespace contaccum
