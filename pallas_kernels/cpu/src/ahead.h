// What a thread reads next, asked for while it waits.
//
// A decode step reads every weight once, from memory, and has no other use for its time. But threads wait for each other at the ends of
// matrices, attend to keys that are in the cache, and wait for the next call: a quarter of a step of a small model, in which memory would
// stand still. So a thread notes what it will read, and asks for it piece by piece wherever it does not read. Asking changes no result.
#pragma once
#include <cstdint>

#include "pool.h"

namespace jaxinfer {

// What a matrix is read from: up to three arrays (values, scales, minima), each of as many units of its own size.
struct Reads {
  static constexpr int kArrays = 3;
  const char* from[kArrays] = {};  // null: no such array
  int64_t bytes[kArrays] = {};     // of a unit
  int64_t units = 0;

  // Where a thread's share of the first array begins; null where there is none.
  const char* begin(const Lane& lane) const { return units ? from[0] + share(units, 1, lane).begin * bytes[0] : nullptr; }
};

class Ahead {
 public:
  void clear() { count_ = at_ = 0; }
  // A thread's share of a matrix, or any bytes; what does not fit any more is left out.
  void add(const Reads& reads, const Lane& lane);
  void add(const char* from, int64_t bytes);
  // What is read now, of which something may have been asked for already.
  void open(const Reads& reads, const Lane& lane);
  // Asks for the next `lines` cache lines. A core waits for some 70 lines at a time; what it is asked beyond that is lost.
  void ask(int lines);
  // How many of what was added there are, and how many of them have been asked for.
  int count() const { return count_; }
  int asked() const { return at_; }

 private:
  static constexpr int kMost = 8;
  static constexpr int64_t kMostBytes = 262144;  // of a matrix: half of a small second-level cache
  struct Piece {
    Reads reads;
    int64_t unit, end;  // of the thread's share: the next unit, and the one after the last
    int array;
    int64_t offset, left;  // of the array's unit; bytes that may still be asked for
  };
  Piece pieces_[kMost];
  int count_ = 0, at_ = 0;
};

// This thread's.
Ahead& ahead();

// Says that this thread's call reads `now` first, and returns what the call after it read first when `now` was read the last time: the
// calls of a decode step come in the same order for every token. Nothing, where that is not known.
Reads follows(const Reads& now);

}  // namespace jaxinfer
