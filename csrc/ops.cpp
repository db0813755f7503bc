// The only source that knows torch, with checks.h and tensors.h: schemas, checks, allocation,
// dispatch by device and processor.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "params.h"
#include "tensors.h"
#ifdef CONTACCUM_WITH_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/launch.h"
#endif

namespace contaccum {
namespace {

// The buffers of a bank, in the order of the schema.
struct BankTensors {
  const Tensor &queries, &passages, &ids, &cursor, &block_lse, &group_lse, &row_state, &means;
  const std::optional<Tensor>& expected;
};

BankState state_of(const BankTensors& b) {
  return {b.queries.mutable_data_ptr(),
          b.passages.mutable_data_ptr(),
          b.ids.mutable_data_ptr<int64_t>(),
          b.cursor.mutable_data_ptr<int64_t>(),
          b.block_lse.mutable_data_ptr(),
          b.group_lse.mutable_data_ptr(),
          b.row_state.mutable_data_ptr(),
          b.means.mutable_data_ptr(),
          b.expected ? b.expected->mutable_data_ptr() : nullptr};
}

// What comes in with a call.
struct BatchTensors {
  const Tensor &queries, &passages;
  const std::optional<Tensor>&ids, &companions;
};

void check_batch(const BatchTensors& batch, const BankTensors& bank) {
  const Tensor &queries = batch.queries, &passages = batch.passages;
  check_floating("queries", queries);
  check_rank("queries", queries, 2, "(n, d)");
  check_rank("passages", passages, 3, "(n, m, d)");
  const int64_t n = queries.size(0), m = bank.passages.size(1), d = bank.queries.size(1);
  STD_TORCH_CHECK(n > 0, "queries: expected at least one row, got shape ", shape_text(queries));
  check_shape("queries", queries, {n, d}, "(n, d of the bank)");
  check_shape("passages", passages, {n, m, d}, "(n of queries, m and d of the bank)");
  check_dtype("passages", passages, queries.scalar_type());
  check_same_device("passages", passages, queries, "queries");
  STD_TORCH_CHECK((queries.scalar_type() == ScalarType::Double) ==
                      (bank.queries.scalar_type() == ScalarType::Double),
                  "queries: expected ",
                  bank.queries.scalar_type() == ScalarType::Double
                      ? "dtype float64 as the bank's"
                      : "dtype float32, bfloat16 or float16 with a bank narrower than float64",
                  ", got ", dtype_text(queries.scalar_type()));
  if (batch.ids) {
    check_shape("passage_ids", *batch.ids, {n, m}, "(n, m)");
    check_dtype("passage_ids", *batch.ids, ScalarType::Long);
    check_same_device("passage_ids", *batch.ids, queries, "queries");
  }
  if (batch.companions) {
    const Tensor& c = *batch.companions;
    check_rank("companions", c, 3, "(n, k, d)");
    check_shape("companions", c, {n, c.size(1), d}, "(n of queries, k, d of the bank)");
    check_dtype("companions", c, queries.scalar_type());
    check_same_device("companions", c, queries, "queries");
  }
}

Layout check_bank(const Tensor& queries, const BankTensors& bank,
                  const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(sizes.size() == 3 && sizes[0] >= 1 && sizes[1] >= 1 && sizes[2] >= 1 &&
                      sizes[1] % sizes[0] == 0 && sizes[2] % sizes[1] == 0,
                  "layout: expected [group, offset_block, block], each dividing the next");
  check_floating("bank_queries", bank.queries);
  check_rank("bank_queries", bank.queries, 2, "(C, d)");
  check_rank("bank_passages", bank.passages, 3, "(C, m, d)");
  const int64_t capacity = bank.queries.size(0), d = bank.queries.size(1);
  const int64_t m = bank.passages.size(1);
  STD_TORCH_CHECK(m > 0 && d > 0, "bank_passages: expected m and d of at least 1, got shape ",
                  shape_text(bank.passages));
  const Layout y{capacity, m, d, sizes[0], sizes[1], sizes[2]};
  const ScalarType storage = bank.queries.scalar_type(), acc = accumulation(storage);
  check_buffer("bank_queries", bank.queries, {capacity, d}, storage, queries);
  check_buffer("bank_passages", bank.passages, {capacity, m, d}, storage, queries);
  check_buffer("bank_ids", bank.ids, {capacity, m}, ScalarType::Long, queries);
  check_buffer("cursor", bank.cursor, {2}, ScalarType::Long, queries);
  check_buffer("block_lse", bank.block_lse, {y.blocks(), capacity}, acc, queries);
  check_buffer("group_lse", bank.group_lse, {y.groups(), capacity}, acc, queries);
  check_buffer("row_state", bank.row_state, {kRowStates, capacity}, acc, queries);
  check_buffer("means", bank.means, {2 + y.offset_blocks(), 1 + m, d}, acc, queries);
  if (bank.expected)
    check_buffer("expected", *bank.expected, {y.expected_rows(), capacity}, acc, queries);
  return y;
}

void check_options(double scale, double drift_decay, int64_t rebuild) {
  STD_TORCH_CHECK(std::isfinite(scale) && scale > 0,
                  "scale: expected a positive finite number, got ", scale);
  STD_TORCH_CHECK(drift_decay < 1, "drift_decay: expected a number below 1, got ", drift_decay);
  STD_TORCH_CHECK(rebuild >= 0 && rebuild <= 2, "rebuild: expected 0, 1 or 2, got ", rebuild);
}

void check_scale_grad(const StepOptions& options, const Layout& y) {
  STD_TORCH_CHECK(!options.with_scale_grad || options.with_grad,
                  "with_scale_grad: expected true only with with_grad");
  STD_TORCH_CHECK(!options.with_scale_grad || options.keep_expected || y.capacity == 0,
                  "expected: expected a table of expected scores where the gradient of the scale "
                  "is wanted, got none");
}

// The widest instruction set of the processor, or the one that CONTACCUM_CPU_ISA names.
StepKernel cpu_kernel() {
  bool avx2 = false, avx512 = false;
#if defined(__x86_64__) && defined(__GNUC__)
  avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  const char* wish = std::getenv("CONTACCUM_CPU_ISA");
  const std::string isa = wish ? wish : avx512 ? "avx512" : avx2 ? "avx2" : "baseline";
  if (isa == "avx512" && avx512) return step_avx512;
  if (isa == "avx2" && avx2) return step_avx2;
  STD_TORCH_CHECK(isa == "baseline",
                  "CONTACCUM_CPU_ISA: expected baseline, avx2 or avx512 as far as the processor "
                  "has them, got ",
                  isa);
  return step_baseline;
}

void step_cpu(const StepArgs& step) {
  const int64_t head = step.state.cursor[0], fill = step.state.cursor[1];
  const int64_t capacity = step.layout.capacity;
  STD_TORCH_CHECK(fill >= 0 && fill <= capacity && head >= 0 && (head == 0 || head < capacity) &&
                      (fill == capacity || head == fill),
                  "cursor: expected head and fill of a ring of ", capacity, " slots, got (", head,
                  ", ", fill, ")");
  static const StepKernel kernel = cpu_kernel();
  kernel(step, make_plan(step.layout, step.options, head, fill, step.batch.n));
}

// The product is in the accumulation type, the rounding is torch's.
Tensor scaled_cpu(const Tensor& gradient, const Tensor& factor, ScalarType dtype) {
  const auto multiply = [&](auto acc) {
    using A = decltype(acc);
    const Tensor scaled = empty(gradient, gradient.sizes(), gradient.scalar_type());
    const A* from = gradient.const_data_ptr<A>();
    A* to = scaled.mutable_data_ptr<A>();
    const A by = *factor.const_data_ptr<A>();
    for (int64_t i = 0, count = gradient.numel(); i < count; ++i) to[i] = by * from[i];
    return dense(scaled, dtype);
  };
  return dtype == ScalarType::Double ? multiply(double()) : multiply(float());
}

// As csrc/cuda/center.cu does it, one column of the sums after the other.
template <class A>
void center_cpu(const Centering& c) {
  A* const gradients = static_cast<A*>(c.gradients);
  A* const left = static_cast<A*>(c.state);
  A* const batches = left + c.d;
  std::vector<A> sums(c.d, A(0));
  for (int64_t row = 0; row < c.rows; ++row)
    for (int64_t k = 0; k < c.d; ++k) sums[k] += gradients[row * c.d + k];
  for (int64_t k = 0; k < c.d; ++k) {
    const A rest = batches[k] < A(c.over) ? A(c.over) - batches[k] : A(1);
    const A total = left[k] + sums[k], taken = total / rest;
    const bool finite = std::isfinite(total);  // if not, the batch was refused
    sums[k] = finite ? taken / A(c.rows) : A(0);
    if (!finite || !c.keep) continue;
    left[k] = total - taken;
    batches[k] = batches[k] + 1 < A(c.over) ? batches[k] + 1 : A(0);
  }
  for (int64_t row = 0; row < c.rows; ++row)
    for (int64_t k = 0; k < c.d; ++k) gradients[row * c.d + k] -= sums[k];
}

#ifdef CONTACCUM_WITH_CUDA

// The one symbol that only a CUDA build of torch has, so it cannot be linked against: the same
// module must load where there is no such torch. By the time this runs torch has loaded it.
void* current_stream(int device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (!library) library = RTLD_DEFAULT;
    return reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(getter, "queries: expected a torch that is built for CUDA, found none");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, "queries: torch gave no current stream of device ",
                  device);
  return stream;
}

// Asked for once.
CudaDevice device_properties(int index) {
  constexpr int kDevices = 64;
  static std::once_flag once[kDevices];
  static CudaDevice devices[kDevices];
  STD_TORCH_CHECK(index >= 0 && index < kDevices, "queries: expected a device below ", kDevices,
                  ", got ", index);
  std::call_once(once[index], [&] {
    const char* error = cuda_device(index, &devices[index]);
    STD_TORCH_CHECK(!error, "queries: device ", index, " gave no properties: ", error);
  });
  return devices[index];
}

// aten::mm into memory that is there. It follows torch's own settings, of tf32 and of determinism.
void multiply(int device, const MatrixProduct& p) {
  using torch::stable::detail::from;
  const ScalarType storage = scalar_type_of(p.storage), acc = accumulation(storage);
  const auto view = [&](const void* data, int64_t rows, int64_t columns, const Matrix& like,
                        ScalarType dtype) {
    const int64_t strides[] = {like.transposed ? 1 : like.stride,
                               like.transposed ? like.stride : 1};
    return torch::stable::from_blob(const_cast<void*>(data), {rows, columns}, strides,
                                    {torch::headeronly::DeviceType::CUDA, device}, dtype);
  };
  const Tensor left = view(p.left.data, p.rows, p.depth, p.left, storage);
  const Tensor right = view(p.right.data, p.depth, p.columns, p.right, storage);
  const Tensor out = view(p.out, p.rows, p.columns, {p.out, p.columns, false}, acc);
  AOTITorchError error;
  if (storage == acc) {
    StableIValue stack[] = {from(left), from(right), from(out)};
    error = torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION);
    if (error == TORCH_SUCCESS) torch::stable::detail::to<Tensor>(stack[0]);
  } else {
    StableIValue stack[] = {from(left), from(right), from(acc), from(out)};
    error = torch_call_dispatcher("aten::mm", "dtype_out", stack, TORCH_ABI_VERSION);
    if (error == TORCH_SUCCESS) torch::stable::detail::to<Tensor>(stack[0]);
  }
  STD_TORCH_CHECK(error == TORCH_SUCCESS, "banked_loss_: expected torch to multiply matrices of ",
                  dtype_text(storage), " of shapes (", p.rows, ", ", p.depth, ") and (", p.depth,
                  ", ", p.columns, "), but it failed. Deterministic algorithms need ",
                  "CUBLAS_WORKSPACE_CONFIG to be set; or memory has run out");
}

// On the current stream. Head and fill stay on the device: nothing is read back.
void step_cuda(const StepArgs& args, const Tensor& queries) {
  constexpr int64_t kLargestDim = 4096, kLargestIndex = int64_t(1) << 30;
  const Layout& y = args.layout;
  const int64_t n = args.batch.n;
  STD_TORCH_CHECK(y.d <= kLargestDim, "queries: expected d of at most ", kLargestDim,
                  " on a CUDA device, got ", y.d);
  STD_TORCH_CHECK(y.capacity * y.m <= kLargestIndex && n * y.m <= kLargestIndex,
                  "passages: expected at most ", kLargestIndex, " of them on a CUDA device, got ",
                  y.capacity * y.m, " in the bank and ", n * y.m, " in the batch");
  const int index = queries.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const CudaStep step{args, device_properties(index), multiply};
  const Tensor scratch =
      empty(queries, {static_cast<int64_t>(cuda_scratch_bytes(step))}, ScalarType::Byte);
  const char* error = cuda_step(step, scratch.mutable_data_ptr(), current_stream(index));
  STD_TORCH_CHECK(!error, "banked_loss_: CUDA error: ", error);
}

// Both in one launch; the factor stays on the device.
std::tuple<Tensor, Tensor> scaled_cuda(const Tensor& d_queries, const Tensor& d_passages,
                                       const Tensor& factor, ScalarType dtype) {
  const Tensor queries = empty(d_queries, d_queries.sizes(), dtype);
  const Tensor passages = empty(d_passages, d_passages.sizes(), dtype);
  const int index = d_queries.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const char* error =
      cuda_scale({storage_of(dtype),
                  storage_of(factor.scalar_type()),
                  factor.const_data_ptr(),
                  {d_queries.const_data_ptr(), queries.mutable_data_ptr(), d_queries.numel()},
                  {d_passages.const_data_ptr(), passages.mutable_data_ptr(), d_passages.numel()}},
                 current_stream(index));
  STD_TORCH_CHECK(!error, "scaled_gradients: CUDA error: ", error);
  return {queries, passages};
}

#endif  // CONTACCUM_WITH_CUDA

// Forward, both gradients and enqueue in one call; see contaccum_ext/reference.py for the meaning.
// Nothing of the bank is written before every argument has been checked.
std::tuple<Tensor, Tensor, Tensor, Tensor> banked_loss(
    const Tensor& queries, const Tensor& passages, const std::optional<Tensor>& passage_ids,
    const std::optional<Tensor>& companions, const Tensor& bank_queries,
    const Tensor& bank_passages, const Tensor& bank_ids, const Tensor& cursor,
    const Tensor& block_lse, const Tensor& group_lse, const Tensor& row_state, const Tensor& means,
    const std::optional<Tensor>& expected, const std::vector<int64_t>& layout, double scale,
    int64_t window_blocks, bool weight_all_rows, bool banked_rows, bool banked_columns,
    bool use_offsets, double drift_decay, bool with_grad, bool with_scale_grad, bool enqueue,
    int64_t rebuild) {
  const BankTensors bank{bank_queries, bank_passages, bank_ids, cursor,  block_lse,
                         group_lse,    row_state,     means,    expected};
  const Layout y = check_bank(queries, bank, layout);
  check_batch({queries, passages, passage_ids, companions}, bank);
  check_options(scale, drift_decay, rebuild);
  const StepOptions options{scale,
                            window_blocks,
                            weight_all_rows,
                            banked_rows,
                            banked_columns,
                            use_offsets,
                            drift_decay,
                            expected.has_value(),
                            with_grad,
                            with_scale_grad,
                            enqueue && y.capacity > 0,
                            static_cast<Rebuild>(rebuild)};
  check_scale_grad(options, y);

  const int64_t n = queries.size(0), gradients = with_grad ? n : 0;
  const ScalarType storage = bank_queries.scalar_type(), acc = accumulation(storage);
  const Tensor q = dense(queries, storage), p = dense(passages, storage);
  std::optional<Tensor> ids, beside;
  if (passage_ids) ids = dense(*passage_ids, ScalarType::Long);
  if (companions) beside = dense(*companions, storage);
  const Tensor loss = empty(queries, {}, acc);
  const Tensor dq = empty(queries, {gradients, y.d}, acc);
  const Tensor dp = empty(queries, {gradients, y.m, y.d}, acc);
  const Tensor ds = empty(queries, {with_scale_grad ? 1 : 0}, acc);

  const Batch batch{q.const_data_ptr(),
                    p.const_data_ptr(),
                    ids ? ids->const_data_ptr<int64_t>() : nullptr,
                    n,
                    beside ? beside->const_data_ptr() : nullptr,
                    beside ? beside->size(1) : 0};
  const StepArgs step{storage_of(storage),
                      y,
                      state_of(bank),
                      batch,
                      options,
                      {loss.mutable_data_ptr(), with_grad ? dq.mutable_data_ptr() : nullptr,
                       with_grad ? dp.mutable_data_ptr() : nullptr,
                       with_scale_grad ? ds.mutable_data_ptr() : nullptr}};
#ifdef CONTACCUM_WITH_CUDA
  if (!queries.is_cpu()) {
    step_cuda(step, queries);
    return {loss, dq, dp, ds};
  }
#endif
  step_cpu(step);
  return {loss, dq, dp, ds};
}

// The gradients that banked_loss_ gave, times the factor that came from behind the loss, rounded
// once to the dtype of `like`.
std::tuple<Tensor, Tensor> scaled_gradients(const Tensor& d_queries, const Tensor& d_passages,
                                            const Tensor& factor, const Tensor& like) {
  const ScalarType acc = d_queries.scalar_type(), dtype = like.scalar_type();
  STD_TORCH_CHECK(acc == ScalarType::Float || acc == ScalarType::Double,
                  "d_queries: expected dtype float32 or float64, got ", dtype_text(acc));
  check_dtype("d_passages", d_passages, acc);
  check_same_device("d_passages", d_passages, d_queries, "d_queries");
  check_floating("factor", factor);
  STD_TORCH_CHECK(factor.numel() == 1, "factor: expected one element, got shape ",
                  shape_text(factor));
  check_same_device("factor", factor, d_queries, "d_queries");
  check_floating("like", like);
  STD_TORCH_CHECK(accumulation(dtype) == acc, "like: expected ",
                  acc == ScalarType::Double ? "dtype float64 as the gradients'"
                                            : "a dtype narrower than float64",
                  ", got ", dtype_text(dtype));
  const Tensor dq = dense(d_queries, acc), dp = dense(d_passages, acc);
#ifdef CONTACCUM_WITH_CUDA
  if (!dq.is_cpu()) return scaled_cuda(dq, dp, factor, dtype);
#endif
  const Tensor by = dense(factor, acc);
  return {scaled_cpu(dq, by, dtype), scaled_cpu(dp, by, dtype)};
}

// The gradients of a batch's columns less their mean. Those of the loss itself do not sum to zero
// where the bank's columns are constants.
void center_gradients(const Tensor& gradients, const Tensor& state, int64_t over, bool keep) {
  const ScalarType acc = gradients.scalar_type();
  STD_TORCH_CHECK(acc == ScalarType::Float || acc == ScalarType::Double,
                  "gradients: expected dtype float32 or float64, got ", dtype_text(acc));
  check_rank("gradients", gradients, 3, "(n, m, d)");
  const int64_t rows = gradients.size(0) * gradients.size(1), d = gradients.size(2);
  STD_TORCH_CHECK(rows > 0 && gradients.is_contiguous(),
                  "gradients: expected a contiguous tensor with rows, got shape ",
                  shape_text(gradients));
  check_buffer("state", state, {2, d}, acc, gradients);
  STD_TORCH_CHECK(over >= 1, "over: expected at least 1, got ", over);
  const Centering centering{
      storage_of(acc), gradients.mutable_data_ptr(), state.mutable_data_ptr(), rows, d, over, keep};
#ifdef CONTACCUM_WITH_CUDA
  if (!gradients.is_cpu()) {
    const int index = gradients.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(index);
    const char* error = cuda_center(centering, current_stream(index));
    STD_TORCH_CHECK(!error, "center_gradients_: CUDA error: ", error);
    return;
  }
#endif
  acc == ScalarType::Double ? center_cpu<double>(centering) : center_cpu<float>(centering);
}

}  // namespace

void run_tasks(int64_t count, void (*task)(int64_t, const void*), const void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i, context);
  });
}

}  // namespace contaccum

STABLE_TORCH_LIBRARY(contaccum_ext, m) {
  m.def(
      "banked_loss_(Tensor queries, Tensor passages, Tensor? passage_ids, Tensor? companions, "
      "Tensor(a!) bank_queries, Tensor(b!) bank_passages, Tensor(c!) bank_ids, Tensor(d!) cursor, "
      "Tensor(e!) block_lse, Tensor(f!) group_lse, Tensor(g!) row_state, Tensor(h!) means, "
      "Tensor(i!)? expected, int[] layout, float scale, int window_blocks, bool weight_all_rows, "
      "bool banked_rows, bool banked_columns, bool use_offsets, float drift_decay, bool with_grad, "
      "bool with_scale_grad, bool enqueue, int rebuild) -> "
      "(Tensor loss, Tensor d_queries, Tensor d_passages, Tensor d_scale)");
  m.def(
      "scaled_gradients(Tensor d_queries, Tensor d_passages, Tensor factor, Tensor like) -> "
      "(Tensor, Tensor)");
  m.def("center_gradients_(Tensor(a!) gradients, Tensor(b!) state, int over, bool keep) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(contaccum_ext, CPU, m) {
  m.impl("banked_loss_", TORCH_BOX(&contaccum::banked_loss));
  m.impl("scaled_gradients", TORCH_BOX(&contaccum::scaled_gradients));
  m.impl("center_gradients_", TORCH_BOX(&contaccum::center_gradients));
}

#ifdef CONTACCUM_WITH_CUDA
// For tests and benchmarks: which families of kernels may run, by the bits of KernelFamily.
extern "C" __attribute__((visibility("default"))) void contaccum_allow_kernels(unsigned families) {
  contaccum::cuda_allow_kernels(families);
}

STABLE_TORCH_LIBRARY_IMPL(contaccum_ext, CUDA, m) {
  m.impl("banked_loss_", TORCH_BOX(&contaccum::banked_loss));
  m.impl("scaled_gradients", TORCH_BOX(&contaccum::scaled_gradients));
  m.impl("center_gradients_", TORCH_BOX(&contaccum::center_gradients));
}
#endif

// An empty module: importing it runs the registrations above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
