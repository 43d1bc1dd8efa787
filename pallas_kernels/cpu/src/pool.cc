#include "pool.h"

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

// Spins until ready(), at most for `limit`; says whether it is.
template <class Ready>
bool spin(const Ready& ready, Clock::duration limit) {
  for (int i = 0; i < 64; ++i) {
    if (ready()) return true;
    pause();
  }
  const auto end = Clock::now() + limit;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      pause();
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
  kJoined,     // it has come and waits for its place in the team
  kGo,         // it has its place
  kCancelled,  // the caller has gone on without it
};

class Pool;

struct Worker {
  std::atomic<uint32_t> state{kIdle};
  std::atomic<bool> asleep{false};
  std::mutex mutex;
  std::condition_variable wake;
  void (*body)(void*, const Lane&) = nullptr;
  void* argument = nullptr;
  Lane lane;
  std::atomic<int>* left = nullptr;
  Worker* next = nullptr;  // in the list of idle ones

  void loop(Pool& pool);

  void call() {
    state.store(kCalled, std::memory_order_seq_cst);
    if (asleep.load(std::memory_order_seq_cst)) {
      { std::lock_guard<std::mutex> lock(mutex); }  // it is in wait() by now, or will see the call
      wake.notify_one();
    }
  }
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
    const int most = static_cast<int>(std::thread::hardware_concurrency()) - 1;
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
  for (;;) {
    const auto called = [&] { return state.load(std::memory_order_seq_cst) != kIdle; };
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
    wait_for([&] { return state.load(std::memory_order_acquire) == kGo; });
    body(argument, lane);
    state.store(kIdle, std::memory_order_relaxed);
    left->fetch_sub(1, std::memory_order_release);
  }
}

Pool& pool() {
  static Pool* const instance = new Pool;  // never destroyed: its threads run until the process ends
  return *instance;
}

}  // namespace

void Barrier::reset(int size) {
  for (int i = 0; i < size; ++i) flags_[i].value.store(0, std::memory_order_relaxed);
}

void Barrier::wait(int id, int size) {
  const uint32_t mine = flags_[id].value.load(std::memory_order_relaxed) + 1;
  flags_[id].value.store(mine, std::memory_order_release);
  for (int other = 0; other < size; ++other) {
    if (other == id) continue;
    wait_for([&] { return static_cast<int32_t>(flags_[other].value.load(std::memory_order_acquire) - mine) >= 0; });
  }
}

void run_team(int threads, void (*body)(void*, const Lane&), void* argument) {
  Worker* workers[kMaxTeam];
  int found = 0;
  if (threads > 1) found = pool().take((threads < kMaxTeam ? threads : kMaxTeam) - 1, workers);
  for (int i = 0; i < found; ++i) workers[i]->call();
  // a worker whose core is busy with something else may be milliseconds away: better without it
  spin(
      [&] {
        for (int i = 0; i < found; ++i)
          if (workers[i]->state.load(std::memory_order_acquire) != kJoined) return false;
        return true;
      },
      kSpin);
  int helpers = 0;
  for (int i = 0; i < found; ++i) {
    uint32_t expected = kCalled;
    if (!workers[i]->state.compare_exchange_strong(expected, kCancelled, std::memory_order_acq_rel)) workers[helpers++] = workers[i];
  }
  if (helpers == 0) return body(argument, Lane{});
  static thread_local Barrier barrier;
  const int size = helpers + 1;
  barrier.reset(size);
  std::atomic<int> left{helpers};
  for (int i = 0; i < helpers; ++i) {
    workers[i]->body = body;
    workers[i]->argument = argument;
    workers[i]->lane = Lane{i + 1, size, &barrier};
    workers[i]->left = &left;
    workers[i]->state.store(kGo, std::memory_order_release);
  }
  body(argument, Lane{0, size, &barrier});
  wait_for([&] { return left.load(std::memory_order_acquire) == 0; });
  for (int i = helpers; i-- > 0;) pool().give_back(workers[i]);
}

}  // namespace jaxinfer
