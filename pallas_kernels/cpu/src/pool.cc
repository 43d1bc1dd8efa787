#include "pool.h"

#include "ahead.h"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace jaxinfer {
namespace {

using Clock = std::chrono::steady_clock;

// A worker that has nothing to do looks for work this long before it sleeps: as long as the gaps between the calls of a decode step.
constexpr auto kSpin = std::chrono::microseconds(40);

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Lines that a waiting thread asks for between two looks: about what memory delivers to a core in that time.
constexpr int kAsked = 8;

// Spins until ready(), at most for `limit`; says whether it is.
template <class Ready>
bool spin(const Ready& ready, Clock::duration limit) {
  Ahead& next = ahead();
  for (int i = 0; i < 64; ++i) {
    if (ready()) return true;
    pause();
    next.ask(kAsked);
  }
  const auto end = Clock::now() + limit;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      pause();
      next.ask(kAsked);
    }
  } while (Clock::now() < end);
  return ready();
}

// Waits for another running thread: it spins, then gives its core away, because the other one may need it.
template <class Ready>
void wait_for(const Ready& ready) {
  if (spin(ready, kSpin)) return;
  for (int i = 0; i < 100; ++i) {
    if (ready()) return;
    std::this_thread::yield();
  }
  while (!ready()) std::this_thread::sleep_for(std::chrono::microseconds(50));
}

// How far a worker is with a job.
enum State : uint32_t {
  kIdle,
  kCalled,     // by a caller that waits for it to come
  kJoined,     // it has come
  kGo,         // it has its place, where that was not certain from the start
  kDone,       // as good as idle, once its caller has seen it
  kCancelled,  // the caller has gone on without it
};

class Pool;

// A cache line takes some 200 ns from one core to another, and a decode step makes hundreds of calls. So the line of the state, on which
// both sides spin, holds nothing else, and what a job is lies ready on a line of its own before the state says that there is one.
struct Worker {
  alignas(64) std::atomic<uint32_t> state{kIdle};
  alignas(64) void (*body)(void*, const Lane&) = nullptr;
  void* argument = nullptr;
  Lane lane;
  bool certain = false;  // whether its place is, before it has come itself
  alignas(64) std::atomic<bool> asleep{true};  // or not started yet
  std::mutex mutex;
  std::condition_variable wake;
  Worker* next = nullptr;  // in the list of idle ones

  void loop(Pool& pool);

  void call() {
    state.store(kCalled, std::memory_order_seq_cst);
    if (asleep.load(std::memory_order_seq_cst)) {
      { std::lock_guard<std::mutex> lock(mutex); }  // it is in wait() by now, or will see the call
      wake.notify_one();
    }
  }
  // Whether it looks for work at this moment. It may fall asleep at the next, but comes when it is called.
  bool awake() const { return !asleep.load(std::memory_order_relaxed); }
};

class Pool {
 public:
  // Up to n idle workers; new ones are started as long as there are fewer workers than cores besides the caller.
  int take(int n, Worker** out) {
    std::lock_guard<std::mutex> lock(mutex_);
    int got = 0;
    for (; got < n && idle_; ++got) {
      out[got] = idle_;
      idle_ = idle_->next;
    }
    static const int most = static_cast<int>(std::thread::hardware_concurrency()) - 1;  // glibc reads a file each time
    for (; got < n && started_ < most; ++got, ++started_) {
      out[got] = new Worker;
      std::thread([this, worker = out[got]] { worker->loop(*this); }).detach();
    }
    return got;
  }

  void give_back(Worker* worker) {
    std::lock_guard<std::mutex> lock(mutex_);
    worker->next = idle_;  // the next one to be taken: it is awake
    idle_ = worker;
  }

 private:
  std::mutex mutex_;
  Worker* idle_ = nullptr;
  int started_ = 0;
};

void Worker::loop(Pool& pool) {
  asleep.store(false, std::memory_order_relaxed);
  const auto is = [&](uint32_t wanted) { return state.load(std::memory_order_acquire) == wanted; };
  for (;;) {
    const auto called = [&] { return state.load(std::memory_order_seq_cst) == kCalled || is(kCancelled); };
    if (!spin(called, kSpin)) {
      std::unique_lock<std::mutex> lock(mutex);
      asleep.store(true, std::memory_order_seq_cst);
      wake.wait(lock, called);
      asleep.store(false, std::memory_order_relaxed);
    }
    uint32_t expected = kCalled;
    if (!state.compare_exchange_strong(expected, kJoined, std::memory_order_acq_rel)) {
      state.store(kIdle, std::memory_order_relaxed);  // it came too late
      pool.give_back(this);
      continue;
    }
    if (!certain) wait_for([&] { return is(kGo); });
    body(argument, lane);
    state.store(kDone, std::memory_order_release);
  }
}

Pool& pool() {
  static Pool* const instance = new Pool;  // never destroyed: its threads run until the process ends
  return *instance;
}

}  // namespace

void Barrier::wait(const Lane& lane) {
  const uint32_t mine = ++lane.step;
  flags_[lane.id].value.store(mine, std::memory_order_release);
  for (int other = 0; other < lane.size; ++other) {
    if (other == lane.id) continue;
    wait_for([&] { return static_cast<int32_t>(flags_[other].value.load(std::memory_order_acquire) - mine) >= 0; });
  }
}

// How long a caller waits for its workers to come. One that sleeps on an idle virtual core may take 100 us and more, and a prompt's call
// that goes on without it takes twice its 20 ms; one whose core is busy with something else may be milliseconds away.
static Clock::duration patience(int64_t products) {
  constexpr int64_t kProductsPerNs = 10, kShare = 8, kMostNs = 2'000'000;
  const int64_t ns = products / (kProductsPerNs * kShare);
  return kSpin + std::chrono::nanoseconds(ns < kMostNs ? ns : kMostNs);
}

void run_team(int threads, int64_t products, void (*body)(void*, const Lane&), void* argument) {
  static thread_local Barrier barrier;
  static thread_local uint32_t step = 0;  // that all flags of the barrier have reached, or are behind
  Worker* workers[kMaxTeam];
  int helpers = 0;
  if (threads > 1) helpers = pool().take((threads < kMaxTeam ? threads : kMaxTeam) - 1, workers);
  // Between the calls of a step all are awake: nobody waits to see them come, which takes as long as a tenth of a half layer.
  bool certain = true;
  for (int i = 0; i < helpers; ++i) certain = certain && workers[i]->awake();
  for (int i = 0; i < helpers; ++i) {
    workers[i]->body = body;
    workers[i]->argument = argument;
    workers[i]->lane = Lane{i + 1, helpers + 1, &barrier, step};
    workers[i]->certain = certain;
    workers[i]->call();
  }
  if (!certain) {
    const auto all_joined = [&] {
      for (int i = 0; i < helpers; ++i)
        if (workers[i]->state.load(std::memory_order_acquire) != kJoined) return false;
      return true;
    };
    if (!spin(all_joined, patience(products))) {
      int joined = 0;
      for (int i = 0; i < helpers; ++i) {
        uint32_t expected = kCalled;
        if (!workers[i]->state.compare_exchange_strong(expected, kCancelled, std::memory_order_acq_rel)) workers[joined++] = workers[i];
      }
      helpers = joined;
    }
    for (int i = 0; i < helpers; ++i) {
      workers[i]->lane = Lane{i + 1, helpers + 1, &barrier, step};
      workers[i]->state.store(kGo, std::memory_order_release);
    }
  }
  if (helpers == 0) return body(argument, Lane{});
  const Lane mine{0, helpers + 1, &barrier, step};
  body(argument, mine);
  step = mine.step;
  for (int i = 0; i < helpers; ++i) wait_for([&] { return workers[i]->state.load(std::memory_order_acquire) == kDone; });
  for (int i = helpers; i-- > 0;) pool().give_back(workers[i]);
}

}  // namespace jaxinfer
