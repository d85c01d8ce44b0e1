// What PyTorch asks of a device outside its operators: one answer for all types, and beside it each type's own questions.
#pragma once
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/detail/XPUHooksInterface.h>

#include "guard.h"

namespace simulated {
struct DeviceGenerator : at::CPUGeneratorImpl {
  explicit DeviceGenerator(DeviceIndex index) {
    device_ = c10::Device(own_type, index);
    key_set_ = c10::DispatchKeySet(own_key);
  }
};
inline at::Generator& default_generator(DeviceIndex index) {
  static std::map<DeviceIndex, at::Generator> made;
  if (index < 0) index = current;
  auto found = made.find(index);
  if (found == made.end()) found = made.emplace(index, at::make_generator<DeviceGenerator>(index)).first;
  return found->second;
}

template <class Interface>
struct Hooks : Interface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<DeviceGenerator>(index < 0 ? current : index);
  }
  c10::Device getDeviceFromPtr(void* pointer) const override {
    Lock lock(mutex);
    Block* block = find_block(pointer);
    TORCH_CHECK(block != nullptr, "not a pointer of the device");
    return c10::Device(own_type, block->stream.first);
  }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  DeviceIndex deviceCount() const override { return device_count; }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return std::exchange(current, index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return index < 0 ? current : std::exchange(current, index);
  }
};

struct CudaHooks final : Hooks<at::CUDAHooksInterface> {
  bool hasCUDA() const override { return true; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
  DeviceIndex current_device() const override { return current; }
  int getNumGPUs() const override { return device_count; }
  void deviceSynchronize(DeviceIndex index) const override { synchronize_device(index); }
};

struct XpuHooks final : Hooks<at::XPUHooksInterface> {
  bool hasXPU() const override { return true; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getNumGPUs() const override { return device_count; }
  void deviceSynchronize(DeviceIndex index) const override { synchronize_device(index); }
};

struct NpuHooks final : Hooks<at::PrivateUse1HooksInterface> {};

inline std::map<uint32_t, void*> apple_events;
inline void* apple_event(uint32_t number) {
  Lock lock(mutex);
  return apple_events.at(number);
}
struct MpsHooks final : Hooks<at::MPSHooksInterface> {
  bool hasMPS() const override { return device_count > 0; }
  bool isOnMacOSorNewer(unsigned major, unsigned) const override { return major <= 14; }
  c10::Allocator* getMPSDeviceAllocator() const override { return &device_memory; }
  void deviceSynchronize() const override { synchronize_device(0); }
  void commitStream() const override {}
  void emptyCache() const override { device_memory.resetPeakStats(0); }
  size_t getCurrentAllocatedMemory() const override { return allocated[0].first; }
  // The driver keeps what was freed until the cache is emptied.
  size_t getDriverAllocatedMemory() const override { return allocated[0].second; }
  size_t getRecommendedMaxMemory() const override { return total; }
  void setMemoryFraction(double ratio) const override { capacity = size_t(double(total) * ratio); }
  uint32_t acquireEvent(bool) const override {
    Lock lock(mutex);
    uint32_t number = apple_events.empty() ? 1 : apple_events.rbegin()->first + 1;
    apple_events[number] = nullptr;
    return number;
  }
  void releaseEvent(uint32_t number) const override {
    guard.destroyEvent(apple_event(number), 0);
    Lock lock(mutex);
    apple_events.erase(number);
  }
  void recordEvent(uint32_t number) const override {
    void* event = apple_event(number);
    guard.record(&event, guard.getDefaultStream({own_type, 0}), 0, c10::EventFlag::PYTORCH_DEFAULT);
    Lock lock(mutex);
    apple_events[number] = event;
  }
  void waitForEvent(uint32_t number) const override { guard.block(apple_event(number), guard.getDefaultStream({own_type, 0})); }
  void synchronizeEvent(uint32_t number) const override { guard.synchronizeEvent(apple_event(number)); }
  bool queryEvent(uint32_t number) const override { return guard.queryEvent(apple_event(number)); }
  double elapsedTimeOfEvents(uint32_t begin, uint32_t end) const override {
    return guard.elapsedTime(apple_event(begin), apple_event(end), 0);
  }
};

// PyTorch asked for its hooks while it was imported and keeps what it got: the object is replaced where it lies.
template <class Made, class Interface>
void replace(const Interface& hooks) {
  static_assert(sizeof(Made) == sizeof(Interface));
  new (const_cast<Interface*>(&hooks)) Made();
}
inline void install_hooks() {
  switch (own_type) {
    case c10::DeviceType::CUDA:
      return replace<CudaHooks>(at::detail::getCUDAHooks());
    case c10::DeviceType::XPU:
      return replace<XpuHooks>(at::detail::getXPUHooks());
    case c10::DeviceType::MPS:
      return replace<MpsHooks>(at::detail::getMPSHooks());
    default:
      return at::RegisterPrivateUse1HooksInterface(new NpuHooks());
  }
}
}  // namespace simulated
