// What the device counts: waits of the host by kind, and operators by name.
#pragma once
#include <torch/extension.h>

#include <map>
#include <mutex>
#include <string>

namespace simulated {
// While an operator runs by its CPU kernel, its own copies are no waits of the program.
inline thread_local bool inside_operator = false;
struct InsideOperator {
  bool before = inside_operator;
  InsideOperator() { inside_operator = true; }
  ~InsideOperator() { inside_operator = before; }
};

struct Counts {
  std::mutex mutex;
  std::map<std::string, int64_t> rows;
  void add(const std::string& name) {
    std::lock_guard<std::mutex> lock(mutex);
    rows[name]++;
  }
};
inline Counts waits, operators;
inline PyObject* on_wait = nullptr;  // is called with the kind, to find who waits

inline void count_wait(const std::string& kind) {
  if (inside_operator) return;
  waits.add(kind);
  if (on_wait != nullptr) {
    pybind11::gil_scoped_acquire gil;
    pybind11::reinterpret_borrow<pybind11::object>(on_wait)(kind);
  }
}
}  // namespace simulated
