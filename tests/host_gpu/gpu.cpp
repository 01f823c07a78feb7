// Two GPUs made of host memory: their tensors say cuda:0 and cuda:1, the CPU's kernels compute, and what CUDA would refuse is refused.
//
// torch asks a device for an allocator, a guard, hooks and kernels. The wheel without CUDA leaves all four out, so they can be given
// here: every operator without a kernel of its own (all but a handful) goes to `fallback`, which looks at the arguments as CUDA would,
// lends the CPU's kernel the same memory, and counts. Written against the pinned torch; gpu.py says what Python is told.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <sstream>
#include <utility>

namespace {

using at::Tensor;
using c10::DeviceType;
using Ints = c10::IntArrayRef;

constexpr c10::DeviceIndex GPUS = 2;
thread_local c10::DeviceIndex current = 0;
c10::Device gpu(c10::DeviceIndex index) { return {DeviceType::CUDA, index < 0 ? current : index}; }
const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

// What was asked of the device since the last look: kernels, and moments at which the CPU waits for the GPU, by name.
std::map<std::string, int64_t> launched, waited;

// Operators whose result's shape, or a check of theirs, is known only once the GPU has come so far.
const std::set<std::string> WAITS = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
                                     "aten::equal", "aten::repeat_interleave", "aten::bincount", "aten::histc", "aten::_linalg_eigh",
                                     "aten::_linalg_svd"};
// Operators that take indices from the CPU too.
const std::set<std::string> INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"};

struct HostMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? std::malloc(bytes) : nullptr;
    if (memory) std::memset(memory, 0xC3, bytes);  // memory that was used before, not a fresh page's zeros
    return {memory, memory, &std::free, gpu(current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
HostMemory memory;

bool ours(const Tensor& t) { return t.defined() && t.device().type() == DeviceType::CUDA; }

// The same memory as a tensor of the CPU.
Tensor lent(const Tensor& t) {
  if (!ours(t)) return t;
  Tensor out = at::from_blob(t.data_ptr(), t.sizes(), t.strides(), at::TensorOptions().dtype(t.dtype()));
  if (t.is_conj()) out = at::native::_conj(out);
  if (t.is_neg()) out = at::native::_neg_view(out);
  return out;
}

struct On {  // what is allocated meanwhile lies there
  explicit On(c10::Device device) : before(current) { current = gpu(device.index()).index(); }
  ~On() { current = before; }
  c10::DeviceIndex before;
};

Tensor on_gpu(const Tensor& t, c10::Device device) {
  On there(device);
  Tensor out = at::detail::empty_strided_generic(t.sizes(), t.strides(), &memory, KEYS, t.scalar_type());
  lent(out).copy_(t);
  return out;
}

std::vector<Tensor> tensors_of(const c10::IValue& value) {
  std::vector<Tensor> out;
  if (value.isTensor()) out.push_back(value.toTensor());
  if (value.isTensorList()) out = value.toTensorVector();
  if (value.isOptionalTensorList())
    for (const std::optional<Tensor>& t : value.toOptionalTensorList())
      if (t) out.push_back(*t);
  return out;
}

void refuse_what_cuda_refuses(const c10::FunctionSchema& schema, c10::ArrayRef<c10::IValue> given) {
  std::optional<c10::Device> device;
  for (const auto& value : given)
    for (const auto& t : tensors_of(value))
      if (ours(t) && !device) device = t.device();
  for (size_t i = 0; i < given.size(); ++i) {
    const bool index = i == 1 && INDEXING.count(schema.name());
    for (const auto& t : tensors_of(given[i]))
      TORCH_CHECK(!device || !t.defined() || t.device() == device || (!ours(t) && (t.dim() == 0 || index)),
                  "Expected all tensors to be on the same device, but found at least two devices, ", *device, " and ", t.device(), "! (",
                  schema.arguments()[i].name(), " of ", schema.name(), ")");
    if (given[i].isGenerator())
      TORCH_CHECK(given[i].toGenerator().device().type() == DeviceType::CUDA,
                  "Expected a 'cuda' device type for generator but found 'cpu' (", schema.name(), ")");
  }
}

void count(const c10::FunctionSchema& schema, c10::ArrayRef<c10::IValue> given) {
  ++launched[schema.name()];
  bool waits = WAITS.count(schema.name());
  if (INDEXING.count(schema.name()))  // a mask's places are looked for first
    for (const auto& t : tensors_of(given[1])) waits |= t.defined() && t.scalar_type() == at::kBool;
  if (waits) ++waited[schema.name()];
}

struct Loan {
  Tensor theirs, cpu;
  bool unshaped;  // an out= argument whose shape the operator decides
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t first = stack->size() - schema.arguments().size();
  const auto given = c10::ArrayRef<c10::IValue>(*stack).slice(first);
  refuse_what_cuda_refuses(schema, given);
  count(schema, given);

  std::vector<Loan> loans;
  c10::Device where = gpu(-1);  // of the results: that of the arguments
  auto lend = [&](const Tensor& t, bool is_out) {
    if (!ours(t)) return t;
    where = t.device();
    const bool unshaped = is_out && t.numel() == 0;
    loans.push_back({t, unshaped ? at::empty({0}, at::TensorOptions().dtype(t.dtype())) : lent(t), unshaped});
    return loans.back().cpu;
  };
  for (size_t i = first; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    const bool is_out = schema.arguments()[i - first].is_out();
    if (value.isTensor()) {
      value = lend(value.toTensor(), is_out);
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const auto& t : value.toTensorVector()) list.push_back(lend(t, is_out));
      value = c10::IValue(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& t : value.toOptionalTensorList()) list.push_back(t ? std::make_optional(lend(*t, false)) : std::nullopt);
      value = c10::IValue(list);
    } else if (value.isDevice() && value.toDevice().type() == DeviceType::CUDA) {
      where = gpu(value.toDevice().index());
      value = c10::IValue(c10::Device(DeviceType::CPU));
    }
  }
  op.callBoxed(stack);

  for (const auto& loan : loans) {
    if (!loan.unshaped || loan.cpu.sizes().equals(loan.theirs.sizes())) continue;
    On there(loan.theirs.device());
    at::native::resize_(loan.theirs, loan.cpu.sizes());
    loan.theirs.unsafeGetTensorImpl()->set_sizes_and_strides(loan.cpu.sizes(), loan.cpu.strides());
    lent(loan.theirs).copy_(loan.cpu);
  }
  auto give_back = [&](const Tensor& t) -> Tensor {
    if (!t.defined() || ours(t)) return t;
    for (const auto& loan : loans)
      if (loan.cpu.unsafeGetTensorImpl() == t.unsafeGetTensorImpl()) return loan.theirs;
    for (const auto& loan : loans)  // a view of an argument stays one
      if (t.numel() && t.storage().unsafeGetStorageImpl() == loan.cpu.storage().unsafeGetStorageImpl()) {
        const auto bytes = static_cast<char*>(t.data_ptr()) - static_cast<char*>(loan.cpu.data_ptr());
        const auto offset = loan.theirs.storage_offset() + bytes / static_cast<int64_t>(t.itemsize());
        return at::native::as_strided_tensorimpl(loan.theirs, t.sizes(), t.strides(), offset);
      }
    return on_gpu(t, where);
  };
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = give_back(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const auto& t : value.toTensorVector()) list.push_back(give_back(t));
      value = c10::IValue(list);
    }
  }
}

// Kernels of its own ---------------------------------------------------------------------------------------------------

Tensor empty(Ints size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>, std::optional<c10::Device> device,
             std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  On there(device.value_or(gpu(-1)));
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(Ints size, Ints stride, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                     std::optional<c10::Device> device, std::optional<bool>) {
  On there(device.value_or(gpu(-1)));
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}
Tensor& copy_(Tensor& self, const Tensor& from, bool) {
  ++launched["aten::copy_"];
  if (!ours(self)) ++waited["copy to the CPU"];
  if (!ours(from)) ++waited["copy to the GPU"];  // of pageable memory
  lent(self).copy_(lent(from));
  return self;
}
c10::Scalar item(const Tensor& self) {
  ++waited["item"];
  return at::_local_scalar_dense(lent(self));
}
Tensor as_strided(const Tensor& self, Ints size, Ints stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}
Tensor view(const Tensor& self, Ints size) { return at::native::view(self, size); }
Tensor reshape_alias(const Tensor& self, Ints size, Ints stride) { return at::native::_reshape_alias(self, size, stride); }
const Tensor& resize_(const Tensor& self, Ints size, std::optional<c10::MemoryFormat> format) {
  On there(self.device());
  return at::native::resize_(self, size, format);
}
Tensor& set_storage(Tensor& self, c10::Storage source, int64_t offset, Ints size, Ints stride) {
  return at::native::set_storage_cpu_(self, source, offset, size, stride);
}
Tensor& set_whole(Tensor& self, c10::Storage source) {
  return at::native::set_storage_cpu_(self, source, 0, {static_cast<int64_t>(source.nbytes() / self.dtype().itemsize())}, {1});
}
int64_t attention_from_parts(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>,
                             bool) {
  return 0;  // no fused kernel
}

}  // namespace

namespace c10::impl {
struct HostGuard final : DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return gpu(current); }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override { current = gpu(device.index()).index(); }
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, gpu(device.index())); }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return getStream(stream.device()); }
  DeviceIndex deviceCount() const noexcept override { return GPUS; }
  void record(void**, const Stream&, DeviceIndex, EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, HostGuard)
}  // namespace c10::impl

namespace at {
struct CUDAHooks final : CUDAHooksInterface {  // torch looks for this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return GPUS; }
  int getNumGPUs() const override { return GPUS; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex device) const override { current = gpu(device).index(); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return std::exchange(current, gpu(device).index()); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  bool isPinnedPtr(const void*) const override { return false; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(DeviceType::CPU); }
  void deviceSynchronize(DeviceIndex) const override {}
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("_local_scalar_dense", TORCH_FN(item));
  m.impl("as_strided", TORCH_FN(as_strided));
  m.impl("view", TORCH_FN(view));
  m.impl("_reshape_alias", TORCH_FN(reshape_alias));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Storage", TORCH_FN(set_whole));
}

// Called once torch is imported.
extern "C" void plug_in() {
  c10::SetAllocator(DeviceType::CUDA, &memory, 1);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&attention_from_parts);
}

// What was counted since the last call: lines "launched NAME N" and "waited NAME N".
extern "C" const char* counted() {
  static std::string text;
  std::ostringstream out;
  for (const auto& [name, times] : launched) out << "launched\t" << name << '\t' << times << '\n';
  for (const auto& [name, times] : waited) out << "waited\t" << name << '\t' << times << '\n';
  launched.clear();
  waited.clear();
  return (text = out.str()).c_str();
}
