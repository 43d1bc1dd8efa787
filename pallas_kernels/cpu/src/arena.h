// Scratch memory of a thread: given out in order, taken back all at once, kept for the next call.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace jaxinfer {

class Arena {
  struct Block {
    char* data;
    int64_t size, used;
    Block* next;
  };

 public:
  ~Arena() {
    while (head_) pop();
  }

  // What was given out becomes free. Afterwards all of it lies in one block, as large as what was ever in use at once.
  void reset() {
    if (head_ && head_->size < peak_) {
      while (head_) pop();
      push(peak_);
    }
    while (head_ && head_->next) pop();
    if (head_) head_->used = 0;
  }

  // What is taken while a Scope lives becomes free with its end.
  class Scope {
   public:
    explicit Scope(Arena& arena) : arena_(arena), block_(arena.head_), used_(arena.head_ ? arena.head_->used : 0) {}
    ~Scope() {
      while (arena_.head_ != block_) arena_.pop();
      if (block_) block_->used = used_;
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Arena& arena_;
    Block* block_;
    int64_t used_;
  };

  // n elements, aligned to a cache line, with room for a vector to be read or written past the end. Not initialised.
  template <class T>
  T* take(int64_t n) {
    const int64_t bytes = (n * static_cast<int64_t>(sizeof(T)) + 64 + 63) / 64 * 64;
    if (!head_ || head_->used + bytes > head_->size) push(bytes > kLeast ? bytes : kLeast);
    char* const out = head_->data + head_->used;
    head_->used += bytes;
    return reinterpret_cast<T*>(out);
  }

 private:
  static constexpr int64_t kLeast = 1 << 16;
  void push(int64_t size) {
    void* data = nullptr;
    if (posix_memalign(&data, 64, static_cast<size_t>(size)) != 0) throw std::bad_alloc();
    head_ = new Block{static_cast<char*>(data), size, 0, head_};
    held_ += size;
    if (held_ > peak_) peak_ = held_;
  }
  void pop() {
    Block* const next = head_->next;
    held_ -= head_->size;
    free(head_->data);
    delete head_;
    head_ = next;
  }

  Block* head_ = nullptr;
  int64_t held_ = 0, peak_ = 0;
};

}  // namespace jaxinfer
