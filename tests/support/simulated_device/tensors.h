// The operators of the device: what makes tensors, views and copies, and for all others their CPU kernel.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include "memory.h"

namespace simulated {
using at::IntArrayRef;
using at::Tensor;

// Whether a parameter of one can be given the other as its data: PyTorch itself knows that of its own devices alone.
inline bool can_take_place(const Tensor& one, const Tensor& other) {
  return (one.is_cpu() || is_ours(one)) && (other.is_cpu() || is_ours(other)) && one.layout() == other.layout();
}

// Run `make` with the memory of a device.
template <typename Make>
Tensor on_device(std::optional<c10::Device> device, Make make) {
  DeviceIndex before = current;
  if (device && device->has_index()) current = device->index();
  Tensor made = make();
  current = before;
  return made;
}
inline Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                    std::optional<c10::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  auto made = dtype.value_or(at::get_default_dtype_as_scalartype());
  check_dtype(made);
  return on_device(device, [&] {
    return at::detail::empty_generic(size, &device_memory, c10::DispatchKeySet(own_key), made, format);
  });
}
inline Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                            std::optional<at::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  auto made = dtype.value_or(at::get_default_dtype_as_scalartype());
  check_dtype(made);
  return on_device(device, [&] {
    return at::detail::empty_strided_generic(size, stride, &device_memory, c10::DispatchKeySet(own_key), made);
  });
}

// The same bytes as a tensor of the CPU.
inline Tensor as_host(const Tensor& tensor) {
  if (tensor.device().is_cpu()) return tensor;
  auto options = at::TensorOptions().dtype(tensor.scalar_type()).device(at::kCPU);
  auto keep = [storage = tensor.storage()](void*) {};  // gloo still reads what DeepSpeed has let go, as NCCL does
  auto made = at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), keep, options);
  return tensor.is_neg() ? made._neg_view() : made;
}

// One operator on the current stream that reads and writes these tensors.
inline void check_use(const std::vector<Tensor>& reads, const std::vector<Tensor>& writes, const std::string& name) {
  std::optional<Stream> stream;
  for (const auto* list : {&reads, &writes})
    for (const auto& tensor : *list)
      if (!stream && tensor.defined() && is_ours(tensor)) stream = stream_of(tensor.device().index());
  if (!stream) return;
  Lock lock(mutex);
  int64_t at = launch(*stream);
  for (const auto& tensor : reads) use(tensor, *stream, at, false, name);
  for (const auto& tensor : writes) use(tensor, *stream, at, true, name);
}
inline void host_waits_for_current(const Tensor& tensor, const std::string& kind) {
  count_wait(kind);  // before the lock: it calls Python
  Lock lock(mutex);
  host_learns(clocks[stream_of(tensor.device().index())]);
}

inline Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  if (self.numel() == 0) return self;
  at::NoGradGuard no_grad;
  at::AutoDispatchBelowADInplaceOrView below;
  if (inside_operator) {
    as_host(self).copy_(as_host(from));
    return self;
  }
  operators.add("aten::copy_");
  bool to_host = self.is_cpu(), from_host = from.is_cpu();
  const Tensor& on_device = to_host ? from : self;
  {
    Lock lock(mutex);
    check_use({from}, {self}, "aten::copy_");
    const Clock& known = clocks[stream_of(on_device.device().index())];
    if (to_host && non_blocking && is_pinned(self.storage().data())) {
      Stream stream = stream_of(on_device.device().index());
      Tensor snapshot = at::empty(self.sizes(), self.options().pinned_memory(false)).copy_(as_host(from));
      if (self.is_contiguous()) std::memset(self.data_ptr(), 0xff, self.nbytes());  // not a number, or -1
      arrivals.push_back({self.detach(), snapshot, stream, known.ended.at(stream)});
      return self;
    }
    if (from_host)  // what this stream has copied to pinned memory before
      for (auto& arrival : arrivals)
        if (arrival.to.storage().data() == from.storage().data() && known.has(arrival.stream, arrival.at))
          arrival.to.copy_(arrival.from);
    as_host(self).copy_(as_host(from));
  }
  std::string pace = non_blocking ? ", not pinned" : "";
  if (to_host)
    host_waits_for_current(from, "copy to host" + pace);
  else if (from_host && !(non_blocking && is_pinned(from.storage().data())))
    host_waits_for_current(self, from.numel() <= 8 ? "copy from host, a few numbers" : "copy from host" + pace);
  return self;
}
inline Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  Tensor target = to;
  copy_(target, from, non_blocking);
  return to;
}
inline const Tensor& resize_(const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  size_t wanted = (c10::multiply_integers(size) + impl->storage_offset()) * impl->itemsize();
  auto& storage = impl->storage();
  if (wanted > storage.nbytes()) {
    auto fresh = device_memory.allocate(wanted);
    if (storage.nbytes()) std::memcpy(fresh.get(), storage.data(), storage.nbytes());
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(wanted);
  }
  impl->set_sizes_contiguous(size);
  return self;
}
inline Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}
inline Tensor view(const Tensor& self, IntArrayRef size) { return at::native::view(self, size); }
inline Tensor reshape_alias(const Tensor& self, IntArrayRef size, IntArrayRef stride) {
  return at::native::_reshape_alias(self, size, stride);
}
inline Tensor as_strided(const Tensor& self, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}
inline Tensor unfold(const Tensor& self, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(self, dim, size, step);
}
inline Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset);
  if (stride.data() == nullptr || stride.size() != size.size())
    impl->set_sizes_contiguous(size);
  else
    impl->set_sizes_and_strides(size, stride);
  return self;
}
inline Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}
inline Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  int64_t size = source.nbytes() / self.itemsize();
  return set_storage(self, std::move(source), 0, {size}, {1});
}
inline Tensor& set_empty(Tensor& self) {
  c10::Storage storage(c10::Storage::use_byte_size_t(), 0, device_memory.allocate(0), &device_memory, true);
  return set_storage(self, storage, 0, {0}, {1});
}
inline at::Scalar local_scalar(const Tensor& self) {
  check_use({self}, {}, "aten::item");
  host_waits_for_current(self, "read of a number");
  return as_host(self).item();
}
inline void record_stream(Tensor& self, c10::Stream stream) {
  device_memory.recordStream(self.storage().data_ptr(), stream);
}

// The sizes of what they give depend on numbers of the device, so the host has to read those.
inline const std::set<std::string> kDataDependent = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::equal",
    "aten::repeat_interleave.Tensor", "aten::bincount"};

inline void collect(const c10::IValue& value, std::vector<Tensor>& into) {
  if (value.isTensor())
    into.push_back(value.toTensor());
  else if (value.isTensorList())
    for (const Tensor& tensor : value.toTensorList()) into.push_back(tensor);
  else if (value.isOptionalTensorList())
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorList())
      if (tensor) into.push_back(*tensor);
}

inline void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  std::string name = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  // Collectives have no CPU kernel to fall back on: gloo takes no tensor of a device.
  TORCH_CHECK(name.rfind("c10d::", 0) != 0, "No backend type associated with device type ", c10::DeviceTypeName(own_type, true));
  size_t first = stack->size() - schema.arguments().size();
  std::vector<Tensor> reads, writes, made;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    auto& value = (*stack)[first + i];
    auto* alias = schema.arguments()[i].alias_info();
    collect(value, alias != nullptr && alias->isWrite() ? writes : reads);
    // A generator of the device is of no use to a kernel of the CPU.
    if (value.isGenerator() && value.toGenerator().device().type() == own_type) value = at::detail::getDefaultCPUGenerator();
  }
  if (!inside_operator) {
    operators.add(name);
    check_use(reads, writes, name);
    if (kDataDependent.count(name) || kDataDependent.count(schema.name()))
      for (const auto& tensor : reads)
        if (is_ours(tensor)) {
          host_waits_for_current(tensor, name);
          break;
        }
  }
  {
    InsideOperator inside;
    at::native::cpu_fallback(op, stack);
  }
  if (inside_operator) return;
  size_t results = schema.returns().size();
  for (size_t i = 0; i < results; ++i) collect((*stack)[stack->size() - results + i], made);
  Lock lock(mutex);
  for (const auto& tensor : made)
    if (tensor.defined() && is_ours(tensor)) {
      Stream stream = stream_of(tensor.device().index());
      use(tensor, stream, clocks[stream].ended[stream], true, name);
    }
}

inline bool has_flash = true;  // from Ampere on

inline int64_t choose_attention(const Tensor& query, const Tensor& key, const Tensor&,
                                const std::optional<Tensor>& mask, double dropout, bool is_causal,
                                std::optional<double>, bool) {
  bool fits = (query.scalar_type() == at::kHalf || query.scalar_type() == at::kBFloat16) && query.size(-1) <= 256;
  bool is_square = !is_causal || query.size(-2) == key.size(-2);
  // Flash attention, or the plain form: products and a softmax.
  return has_flash && fits && is_square && !mask.has_value() && dropout == 0.0 ? 1 : 0;
}
// A build for CPUs cannot choose for the others: the plain form.
inline Tensor plain_attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                              double dropout, bool is_causal, std::optional<double> scale, bool enable_gqa) {
  std::optional<Tensor> added = mask;
  if (mask && mask->scalar_type() == at::kBool)
    added = at::zeros(mask->sizes(), query.options()).masked_fill(mask->logical_not(), -INFINITY);
  return std::get<0>(at::_scaled_dot_product_attention_math(query, key, value, added, dropout, is_causal, {}, scale, enable_gqa));
}
}  // namespace simulated
