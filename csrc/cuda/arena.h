// Scratch memory of a step, handed out piece by piece.
#pragma once

#include <cstddef>
#include <cstdint>

namespace contaccum {

// In the order in which it is asked for; with a null base only its size counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    const size_t at = size_;
    size_ += (count * sizeof(T) + kUnit - 1) / kUnit * kUnit;
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  size_t size() const { return size_; }

 private:
  static constexpr size_t kUnit = 256;
  char* base_;
  size_t size_ = 0;
};

}  // namespace contaccum
