// The device guard: devices, streams and events.
#pragma once
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "tensors.h"

namespace simulated {
inline Stream key(const c10::Stream& stream) { return {stream.device_index(), stream.id()}; }
inline c10::Stream as_stream(DeviceIndex device, c10::StreamId id) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(own_type, device), id);
}
inline void synchronize_device(DeviceIndex device) {
  count_wait("device synchronize");
  Lock lock(mutex);
  for (const auto& [stream, clock] : std::map<Stream, Clock>(clocks))
    if (stream.first == device) host_learns(clock);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return own_type; }
  c10::Device exchangeDevice(c10::Device to) const override {
    c10::Device before = getDevice();
    uncheckedSetDevice(to);
    return before;
  }
  c10::Device getDevice() const override { return c10::Device(own_type, current); }
  void setDevice(c10::Device to) const override {
    TORCH_CHECK(to.index() < device_count, "invalid device ordinal (simulated)");
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
    if (is_apple()) return getDefaultStream(device);
    Lock lock(mutex);
    return as_stream(index_of(device), ++last_stream);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = getStream(stream.device());
    current_stream[stream.device_index()] = stream.id();
    return before;
  }
  c10::DeviceCapability getDeviceCapability(c10::Device) const override {
    c10::DeviceCapability all;
    auto& types = all.capability_data.supported_scalar_types;
    if (is_apple()) types.has_Double = types.has_ComplexDouble = 0;
    return all;
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
    TORCH_CHECK(host.covers(last->clock), "device not ready (simulated): the host has not waited for the event");
    return std::chrono::duration<double, std::milli>(last->time - first->time).count();
  }
};
inline Guard guard;
}  // namespace simulated
