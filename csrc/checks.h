// One helper per kind of check. Each names the tensor, what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <sstream>
#include <string>

namespace contaccum {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const int64_t* begin, size_t count) {
  std::ostringstream out;
  out << "(";
  for (size_t i = 0; i < count; ++i) out << (i ? ", " : "") << begin[i];
  out << (count == 1 ? ",)" : ")");
  return out.str();
}

inline std::string shape_text(const Tensor& t) {
  const auto sizes = t.sizes();
  return shape_text(sizes.data(), sizes.size());
}

inline void check_rank(const char* name, const Tensor& t, int64_t rank, const char* shape) {
  STD_TORCH_CHECK(t.dim() == rank, name, ": expected shape ", shape, ", got ", shape_text(t));
}

inline void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                        const char* meaning) {
  const auto sizes = t.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape.begin()[i];
  STD_TORCH_CHECK(same, name, ": expected ", meaning, " = ",
                  shape_text(shape.begin(), shape.size()), ", got ", shape_text(t));
}

inline const char* dtype_text(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline void check_dtype(const char* name, const Tensor& t, ScalarType expected) {
  STD_TORCH_CHECK(t.scalar_type() == expected, name, ": expected dtype ", dtype_text(expected),
                  ", got ", dtype_text(t.scalar_type()));
}

inline void check_floating(const char* name, const Tensor& t) {
  const ScalarType s = t.scalar_type();
  STD_TORCH_CHECK(s == ScalarType::Float || s == ScalarType::Double || s == ScalarType::BFloat16 ||
                      s == ScalarType::Half,
                  name, ": expected dtype float32, float64, bfloat16 or float16, got ",
                  dtype_text(s));
}

inline void check_same_device(const char* name, const Tensor& t, const Tensor& like,
                              const char* like_name) {
  STD_TORCH_CHECK(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(),
                  name, ": expected the device of ", like_name, ", got another");
}

// A buffer of the bank: written in place, so it cannot be copied into shape.
inline void check_buffer(const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                         ScalarType dtype, const Tensor& like) {
  check_shape(name, t, shape, "the bank's shape");
  check_dtype(name, t, dtype);
  check_same_device(name, t, like, "queries");
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous buffer");
}

}  // namespace contaccum
