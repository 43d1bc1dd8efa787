// A pool of threads that any number of callers share without waiting for each other.
#pragma once
#include <atomic>
#include <cstdint>

namespace jaxinfer {

constexpr int kMaxTeam = 64;

struct Lane;

// All threads of a team meet here. One flag a thread, each on its own cache line: nobody writes what another one writes. Flags only grow,
// from one call to the next.
class Barrier {
 public:
  void wait(const Lane& lane);

 private:
  struct alignas(64) Flag {
    std::atomic<uint32_t> value{0};
  };
  Flag flags_[kMaxTeam];
};

// A thread's place in the team that runs a call.
struct Lane {
  int id = 0, size = 1;
  Barrier* barrier = nullptr;
  mutable uint32_t step = 0;  // of the barrier
  void sync() const {
    if (size > 1) barrier->wait(*this);
  }
};

// body(argument, lane) on up to `threads` threads, the caller among them. Takes only workers that are idle, and waits for none that
// others have, so that callers on several devices cannot block each other: with all workers taken the caller runs alone. A body must not
// depend on the size of its team. products: multiplications of the whole call, about; a caller waits the longer for workers that sleep.
void run_team(int threads, int64_t products, void (*body)(void*, const Lane&), void* argument);

// The part [begin, end) of n items, in whole units, that falls to a thread.
struct Range {
  int64_t begin, end;
};
inline Range share(int64_t n, int64_t unit, const Lane& lane) {
  const int64_t units = (n + unit - 1) / unit;
  const int64_t begin = units * lane.id / lane.size * unit, end = units * (lane.id + 1) / lane.size * unit;
  return {begin < n ? begin : n, end < n ? end : n};
}

}  // namespace jaxinfer
