// Who used which bytes on which stream, and what each stream and the host know to have ended: vector clocks. Operators
// run at once, one after the other, so a program without the waits that a GPU needs would still compute the right thing;
// here it is told so.
#pragma once
#include <chrono>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "type.h"

namespace simulated {
using c10::DeviceIndex;
using Stream = std::pair<DeviceIndex, c10::StreamId>;  // number 0 is a device's default stream
constexpr c10::StreamId kCollectives = 1;              // NCCL's own stream of a device; later ones are the program's

// For each stream, how many of its operators are known to have ended.
struct Clock {
  std::map<Stream, int64_t> ended;
  void join(const Clock& other) {
    for (const auto& [stream, count] : other.ended) ended[stream] = std::max(ended[stream], count);
  }
  bool has(Stream stream, int64_t at) const {
    auto found = ended.find(stream);
    return found != ended.end() && found->second >= at;
  }
  bool covers(const Clock& other) const {
    for (const auto& [stream, count] : other.ended)
      if (!has(stream, count)) return false;
    return true;
  }
};

struct Use {
  Stream stream;
  int64_t at;
  const char *begin, *end;
  bool writes;
  std::string name;
};

// An allocation of the device.
struct Block {
  size_t bytes;
  Stream stream;  // on which it was made, and on which its bytes are used again once it is freed
  std::vector<Use> uses;
  std::set<Stream> recorded;  // by record_stream
};

struct Event {
  Clock clock;
  std::chrono::steady_clock::time_point time = std::chrono::steady_clock::now();
  bool asked = false;
};

// A copy into pinned memory that the host has not waited for: until then it reads what must not be taken for a figure.
struct Arrival {
  at::Tensor to, from;
  Stream stream;
  int64_t at;
};

inline std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;
inline thread_local DeviceIndex current = 0;
inline thread_local std::map<DeviceIndex, c10::StreamId> current_stream;
inline std::map<Stream, Clock> clocks;
inline Clock host;
inline c10::StreamId last_stream = kCollectives;
inline std::map<void*, Block> blocks;
inline std::vector<Arrival> arrivals;
inline std::vector<std::string> disorder;  // everything found
inline std::string pending_error;          // found in the allocator, raised by the next operator

inline Stream stream_of(DeviceIndex device) { return {device, current_stream[device]}; }

// Put one more operator on a stream; its number there. It begins after everything that the host has waited for.
inline int64_t launch(Stream stream) {
  clocks[stream].join(host);
  return ++clocks[stream].ended[stream];
}

inline void land_arrivals() {
  std::vector<Arrival> later;
  auto now = std::move(arrivals);
  arrivals.clear();
  for (auto& arrival : now) {
    if (host.has(arrival.stream, arrival.at))
      arrival.to.copy_(arrival.from);
    else
      later.push_back(std::move(arrival));
  }
  arrivals.insert(arrivals.end(), later.begin(), later.end());
}

inline void host_learns(const Clock& clock) {
  Lock lock(mutex);
  host.join(clock);
  land_arrivals();
}

inline std::string in_words(Stream stream) {
  return "stream " + std::to_string(stream.second) + " of " + c10::Device(own_type, stream.first).str();
}

inline Block* find_block(const void* pointer) {
  auto after = blocks.upper_bound(const_cast<void*>(pointer));
  if (after == blocks.begin()) return nullptr;
  auto& [begin, block] = *std::prev(after);
  return pointer < static_cast<char*>(begin) + block.bytes ? &block : nullptr;
}

// Operator number `at` of `stream` uses the bytes of a tensor: it must come after every use that it collides with.
inline void use(const at::Tensor& tensor, Stream stream, int64_t at, bool writes, const std::string& name) {
  if (!tensor.defined() || !is_ours(tensor) || tensor.numel() == 0) return;
  Lock lock(mutex);
  Block* block = find_block(tensor.storage().data());
  if (block == nullptr) return;
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  const char* begin = static_cast<const char*>(tensor.data_ptr());
  Use mine{stream, at, begin, begin + (last + 1) * tensor.element_size(), writes, name};
  const Clock& known = clocks[stream];
  std::string found;
  std::erase_if(block->uses, [&](const Use& other) {
    bool collides = other.begin < mine.end && mine.begin < other.end && (writes || other.writes);
    bool comes_before = known.has(other.stream, other.at);
    if (collides && !comes_before)
      found = name + (writes ? " writes on " : " reads on ") + in_words(stream) + " what " + other.name +
              (other.writes ? " writes on " : " reads on ") + in_words(other.stream) + ", without waiting for it";
    bool contained = mine.begin <= other.begin && other.end <= mine.end;
    return comes_before && ((contained && (writes || other.stream == stream) && !(other.writes && !writes)) ||
                            host.has(other.stream, other.at));
  });
  block->uses.push_back(std::move(mine));
  if (found.empty()) found.swap(pending_error);
  if (!found.empty()) {
    disorder.push_back(found);
    TORCH_CHECK(false, "simulated device: out of order: ", found);
  }
}

// Bytes that were freed while another stream still worked with them: the allocator gives them to the next that asks on
// their own stream, which by then must come after that work.
struct Freed {
  size_t bytes;
  Use use;
};
inline std::map<Stream, std::vector<Freed>> freed;

inline void note_free(const Block& block) {
  Clock known = clocks[block.stream];
  known.join(host);
  for (const Use& other : block.uses)
    if (other.stream != block.stream && !known.has(other.stream, other.at) && !block.recorded.count(other.stream))
      freed[block.stream].push_back({block.bytes, other});
}

inline void check_reuse(size_t bytes, Stream stream) {
  Clock known = clocks[stream];
  known.join(host);
  std::erase_if(freed[stream], [&](const Freed& old) {
    bool comes_before = known.has(old.use.stream, old.use.at);
    if (!comes_before && bytes <= old.bytes)
      pending_error = "memory of " + in_words(stream) + " is used again that was freed while " + old.use.name +
                      " worked with it on " + in_words(old.use.stream) + ", without record_stream";
    return comes_before || bytes <= old.bytes;
  });
}
}  // namespace simulated
