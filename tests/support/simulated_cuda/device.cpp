// A device called cuda:N that lives in host memory: enough of CUDA's place in PyTorch (allocator, device guard, hooks,
// streams, events, copies, views; every other operator runs by its CPU kernel) to run a program's CUDA branches without
// a GPU, to count what makes the host wait, and to check the order of streams. It proves nothing about speed.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/profiler/stubs/base.h>
#include <torch/extension.h>

#include "tensors.h"

namespace simulated {
REGISTER_ALLOCATOR(kDevice, &device_memory);

Stream key(const c10::Stream& stream) { return {stream.device_index(), stream.id()}; }
c10::Stream as_stream(DeviceIndex device, c10::StreamId id) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(kDevice, device), id);
}
void synchronize_device(DeviceIndex device) {
  count_wait("device synchronize");
  Lock lock(mutex);
  for (const auto& [stream, clock] : std::map<Stream, Clock>(clocks))
    if (stream.first == device) host_learns(clock);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kDevice;
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device to) const override {
    c10::Device before = getDevice();
    uncheckedSetDevice(to);
    return before;
  }
  c10::Device getDevice() const override { return c10::Device(kDevice, current); }
  void setDevice(c10::Device to) const override {
    TORCH_CHECK(to.index() < device_count, "CUDA error: invalid device ordinal (simulated)");
    uncheckedSetDevice(to);
  }
  void uncheckedSetDevice(c10::Device to) const noexcept override {
    if (to.has_index()) current = to.index();
  }
  DeviceIndex index_of(c10::Device device) const { return device.has_index() ? device.index() : current; }
  c10::Stream getStream(c10::Device device) const override {
    return as_stream(index_of(device), current_stream[index_of(device)]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return as_stream(index_of(device), 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    Lock lock(mutex);
    return as_stream(index_of(device), ++last_stream);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = getStream(stream.device());
    current_stream[stream.device_index()] = stream.id();
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return device_count; }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void record(void** event, const c10::Stream& stream, const DeviceIndex, const c10::EventFlag) const override {
    Lock lock(mutex);
    delete static_cast<Event*>(*event);
    *event = new Event{clocks[key(stream)]};
  }
  void block(void* event, const c10::Stream& stream) const override {
    Lock lock(mutex);
    if (event != nullptr) clocks[key(stream)].join(static_cast<Event*>(event)->clock);
  }
  // The first answer about an event that the host has not waited for is no: a program must not count on a yes.
  bool queryEvent(void* pointer) const override {
    Lock lock(mutex);
    auto* event = static_cast<Event*>(pointer);
    if (event == nullptr || host.covers(event->clock)) return true;
    if (!std::exchange(event->asked, true)) return false;
    host_learns(event->clock);
    return true;
  }
  bool queryStream(const c10::Stream& stream) const override {
    Lock lock(mutex);
    host_learns(clocks[key(stream)]);
    return true;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    count_wait("stream synchronize");
    Lock lock(mutex);
    host_learns(clocks[key(stream)]);
  }
  void synchronizeEvent(void* pointer) const override {
    auto* event = static_cast<Event*>(pointer);
    if (event == nullptr || host.covers(event->clock)) return;
    count_wait("event synchronize");
    host_learns(event->clock);
  }
  void synchronizeDevice(const DeviceIndex device) const override { synchronize_device(device); }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    device_memory.recordStream(data, stream);
  }
  double elapsedTime(void* begin, void* end, const DeviceIndex) const override {
    TORCH_CHECK(begin && end, "Both events must be recorded before calculating elapsed time.");
    auto *first = static_cast<Event*>(begin), *last = static_cast<Event*>(end);
    TORCH_CHECK(host.covers(last->clock), "CUDA error: device not ready (simulated): the host has not waited for the event");
    return std::chrono::duration<double, std::milli>(last->time - first->time).count();
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct DeviceGenerator : at::CPUGeneratorImpl {
  explicit DeviceGenerator(DeviceIndex index) {
    device_ = c10::Device(kDevice, index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::CUDA);
  }
};
at::Generator& default_generator(DeviceIndex index) {
  static std::map<DeviceIndex, at::Generator> made;
  if (index < 0) index = current;
  auto found = made.find(index);
  if (found == made.end()) found = made.emplace(index, at::make_generator<DeviceGenerator>(index)).first;
  return found->second;
}

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<DeviceGenerator>(index < 0 ? current : index);
  }
  c10::Device getDeviceFromPtr(void* pointer) const override {
    Lock lock(mutex);
    Block* block = find_block(pointer);
    TORCH_CHECK(block != nullptr, "not a pointer of the device");
    return c10::Device(kDevice, block->stream.first);
  }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex deviceCount() const override { return device_count; }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return std::exchange(current, index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return index < 0 ? current : std::exchange(current, index);
  }
  int getNumGPUs() const override { return device_count; }
  void deviceSynchronize(DeviceIndex index) const override { synchronize_device(index); }
};

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
}  // namespace simulated

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&simulated::fallback>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  using namespace simulated;
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
}
namespace at {
using CUDAHooks = ::simulated::Hooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at
namespace at::native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &simulated::choose_attention)
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace simulated;
  // PyTorch asked for its hooks while it was imported and keeps what it got: the object is replaced where it lies.
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks(at::CUDAHooksArgs{});
  torch::profiler::impl::registerCUDAMethods(&profiler_events);
  py::class_<Collective>(m, "Collective").def("wait", &Collective::wait);
  m.def("set_devices", [](int count, size_t bytes) {
    device_count = count;
    capacity = bytes;
  });
  m.def("set_has_flash", [](bool value) { has_flash = value; });
  m.def("capacity", [] { return capacity; });
  m.def("set_capacity", [](size_t bytes) { capacity = bytes; });
  m.def("current_device", [] { return int(current); });
  m.def("set_device", [](int index) {
    TORCH_CHECK(index >= 0 && index < device_count, "CUDA error: invalid device ordinal (simulated)");
    current = index;
  });
  m.def("current_stream", [](int device) { return current_stream[device]; });
  m.def("set_stream", [](int device, c10::StreamId id) { current_stream[device] = id; });
  m.def("synchronize", [](int device) { synchronize_device(device); });
  m.def("elapsed_time", [](uintptr_t begin, uintptr_t end) {
    return Guard().elapsedTime(reinterpret_cast<void*>(begin), reinterpret_cast<void*>(end), 0);
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
