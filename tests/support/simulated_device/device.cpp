// A device that lives in host memory, in the place of CUDA, XPU, MPS or PrivateUse1 in PyTorch: enough of it (allocator,
// device guard, hooks, streams, events, copies, views; every other operator runs by its CPU kernel) to run a program's
// branches for such a device, to count what makes the host wait, and to check the order of streams. It proves nothing
// about speed.
#include <torch/csrc/profiler/stubs/base.h>
#include <torch/extension.h>

#include "hooks.h"

namespace simulated {
// torch.profiler times the operators of a device with events of its own where Kineto cannot.
struct ProfilerEvents final : torch::profiler::impl::ProfilerStubs {
  using Moment = std::chrono::steady_clock::time_point;
  void record(DeviceIndex* device, torch::profiler::impl::ProfilerVoidEventStub* event, int64_t* cpu_ns) const override {
    auto now = std::chrono::steady_clock::now();
    if (device) *device = current;
    if (cpu_ns) *cpu_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(now.time_since_epoch()).count();
    *event = std::make_shared<Moment>(now);
  }
  float elapsed(const torch::profiler::impl::ProfilerVoidEventStub* begin,
                const torch::profiler::impl::ProfilerVoidEventStub* end) const override {  // microseconds
    auto *first = static_cast<Moment*>(begin->get()), *last = static_cast<Moment*>(end->get());
    return std::chrono::duration<float, std::micro>(*last - *first).count();
  }
  void mark(const char*) const override {}
  void rangePush(const char*) const override {}
  void rangePop() const override {}
  bool enabled() const override { return true; }
  void onEachDevice(std::function<void(int)> call) const override {
    for (int i = 0; i < device_count; ++i) call(i);
  }
  void synchronize() const override {}
};
ProfilerEvents profiler_events;

// What a collective of NCCL used, on the device's stream of collectives: `wait` lets the current stream wait for it.
struct Collective {
  DeviceIndex device;
  Clock clock;
  void wait() {
    Lock lock(mutex);
    clocks[stream_of(device)].join(clock);
  }
};
Collective collective(const std::vector<Tensor>& reads, const std::vector<Tensor>& writes, const std::string& name) {
  Lock lock(mutex);
  DeviceIndex device = (reads.empty() ? writes : reads).front().device().index();
  Stream stream{device, kCollectives};
  clocks[stream].join(clocks[stream_of(device)]);
  int64_t at = launch(stream);
  for (const auto* list : {&reads, &writes})
    for (const auto& tensor : *list) {
      use(tensor, stream, at, list == &writes, name);
      // NCCL's process group keeps its tensors until they are no longer used.
      device_memory.recordStream(tensor.storage().data_ptr(), as_stream(device, kCollectives));
    }
  return {device, clocks[stream]};
}

// Take a device type's place in PyTorch. Once, and before anything is made on it.
void install(const std::string& name) {
  own_type = c10::Device(name).type();
  own_key = c10::computeDispatchKey(std::nullopt, std::nullopt, c10::Device(own_type));
  c10::SetAllocator(own_type, &device_memory);
  c10::impl::DeviceGuardImplRegistrar registrar(own_type, &guard);
  install_hooks();
  static torch::Library all(torch::Library::IMPL, "_", own_key, __FILE__, __LINE__);
  all.fallback(torch::CppFunction::makeFromBoxedFunction<&simulated::fallback>());
  static torch::Library m(torch::Library::IMPL, "aten", own_key, __FILE__, __LINE__);
  m.impl("empty.memory_format", simulated::empty);
  m.impl("empty_strided", simulated::empty_strided);
  m.impl("copy_", simulated::copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", simulated::resize_);
  m.impl("view", simulated::view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("as_strided", simulated::as_strided);
  m.impl("unfold", simulated::unfold);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_", set_empty);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("record_stream", simulated::record_stream);
  if (own_type == c10::DeviceType::CUDA) {
    at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);
    torch::profiler::impl::registerCUDAMethods(&profiler_events);
  } else {
    auto key = c10::getAutogradKeyFromBackend(c10::toBackendComponent(own_key));
    static torch::Library autograd(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
    for (torch::Library* library : {&m, &autograd}) {
      library->impl("scaled_dot_product_attention", plain_attention);
      if (own_type == c10::DeviceType::PrivateUse1) library->impl("_has_compatible_shallow_copy_type", can_take_place);
    }
  }
}
}  // namespace simulated

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace simulated;
  py::class_<Collective>(m, "Collective").def("wait", &Collective::wait);
  m.def("install", &simulated::install);
  m.def("set_devices", [](int count, size_t bytes) {
    device_count = count;
    capacity = total = bytes;
  });
  m.def("set_has_flash", [](bool value) { has_flash = value; });
  m.def("capacity", [] { return capacity; });
  m.def("set_capacity", [](size_t bytes) { capacity = bytes; });
  m.def("current_device", [] { return int(current); });
  m.def("set_device", [](int index) {
    TORCH_CHECK(index >= 0 && index < device_count, "invalid device ordinal (simulated)");
    current = index;
  });
  m.def("current_stream", [](int device) { return current_stream[device]; });
  m.def("set_stream", [](int device, c10::StreamId id) { current_stream[device] = id; });
  m.def("synchronize", [](int device) { synchronize_device(device); });
  m.def("elapsed_time", [](uintptr_t begin, uintptr_t end) {
    return guard.elapsedTime(reinterpret_cast<void*>(begin), reinterpret_cast<void*>(end), 0);
  });
  m.def("collective", &collective);
  m.def("check_use", &check_use);
  m.def("count_wait", [](const std::string& kind) { count_wait(kind); });
  m.def("disorder", [] { return disorder; });
  m.def("waits", [] { return waits.rows; });
  m.def("operators", [] { return operators.rows; });
  m.def("reset_counts", [] {
    waits.rows.clear();
    operators.rows.clear();
  });
  m.def("on_wait", [](pybind11::object called) { on_wait = called.is_none() ? nullptr : called.release().ptr(); });
  m.def("allocated", [](int device) { return allocated[device]; });
  m.def("reset_peak", [](int device) { device_memory.resetPeakStats(device); });
  m.def("as_host", &as_host);
  m.def("default_generator", [](int index) { return default_generator(index); });
}
