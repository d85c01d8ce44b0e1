// The memory of the devices and pinned memory: host memory, counted and limited.
#pragma once
#include <c10/core/CachingDeviceAllocator.h>

#include "counts.h"
#include "order.h"

namespace simulated {
inline int device_count = 1;
inline size_t total = size_t(80) << 30;  // of each device
inline size_t capacity = total;          // what a process may take of it
inline std::set<void*> pinned;
inline std::map<DeviceIndex, std::pair<size_t, size_t>> allocated;  // now, peak

inline std::string readable(size_t bytes) {
  char text[32];
  bool is_large = bytes >= (size_t(1) << 30);
  std::snprintf(text, sizeof(text), "%.2f %s", double(bytes) / double(size_t(1) << (is_large ? 30 : 20)), is_large ? "GiB" : "MiB");
  return text;
}

inline void release(void* pointer) {
  Lock lock(mutex);
  auto found = blocks.find(pointer);
  if (found == blocks.end()) return;
  note_free(found->second);
  allocated[found->second.stream.first].first -= found->second.bytes;
  blocks.erase(found);
  std::free(pointer);
}

struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = nullptr;
    if (bytes != 0) {
      Lock lock(mutex);
      auto& [now, peak] = allocated[current];
      size_t rounded = (bytes + 511) / 512 * 512;  // as CUDA's allocator rounds
      // Apple's is a plain RuntimeError.
      TORCH_CHECK(!is_apple() || now + rounded <= capacity, "MPS backend out of memory (MPS allocated: ",
                  readable(now), ", max allowed: ", readable(capacity), "). Tried to allocate ", readable(bytes), " (simulated)");
      TORCH_CHECK_WITH(OutOfMemoryError, now + rounded <= capacity, c10::DeviceTypeName(own_type),
                       " out of memory. Tried to allocate ", readable(bytes), ". GPU ", int(current),
                       " has a total capacity of ", readable(capacity), " of which ",
                       readable(capacity - std::min(now, capacity)), " is free. (simulated)");
      check_reuse(rounded, stream_of(current));
      pointer = std::aligned_alloc(512, rounded);
      blocks[pointer] = {rounded, stream_of(current), {}, {}};
      now += rounded;
      peak = std::max(peak, now);
    }
    return {pointer, pointer, &release, c10::Device(own_type, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
    Lock lock(mutex);
    if (Block* block = find_block(data.get())) block->recorded.insert({stream.device_index(), stream.id()});
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    stats.allocated_bytes[0].current = allocated[device].first;
    stats.allocated_bytes[0].peak = allocated[device].second;
    stats.reserved_bytes[0] = stats.allocated_bytes[0];
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex device) override { allocated[device].second = allocated[device].first; }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    if (is_apple()) return c10::DeviceAllocator::getMemoryInfo(device);  // an error
    return {capacity - std::min(capacity, allocated[device].first), total};
  }
};
inline DeviceMemory device_memory;

inline void release_pinned(void* pointer) {
  Lock lock(mutex);
  pinned.erase(pointer);
  std::free(pointer);
}
struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    TORCH_CHECK(!is_apple(), "Attempted to set the storage of a tensor on device \"cpu\" to a "
                "storage on different device \"mps:0\".  This is no longer allowed; the devices must match. (simulated)");
    void* pointer = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    if (pointer) {
      Lock lock(mutex);
      pinned.insert(pointer);
    }
    return {pointer, pointer, &release_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
inline PinnedMemory pinned_memory;

inline bool is_pinned(const void* pointer) {
  Lock lock(mutex);
  return pinned.count(const_cast<void*>(pointer)) != 0;
}
}  // namespace simulated
