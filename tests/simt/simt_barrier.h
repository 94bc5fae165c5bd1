// SPDX-License-Identifier: Apache-2.0
// Barriers that lose members as threads exit; for a block, and for the lanes that a mask names.
#pragma once

#include <atomic>
#include <bit>
#include <cstring>
#include <memory>
#include <mutex>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {

using Where = std::source_location;

constexpr int kMasks = 256;  // different masks of one warp

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// unwinds a kernel thread after another one has failed
struct Stopped {};

inline std::string place(const Where& where) {
  const char* name = std::strrchr(where.file_name(), '/');
  return std::string(name ? name + 1 : where.file_name()) + ":" + std::to_string(where.line());
}
inline bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

// what the launcher needs to know of all barriers of a block
struct Progress {
  std::atomic<int> alive{0}, waiting{0};
  std::atomic<unsigned> completed{0};
  std::atomic<bool> stopped{false};
};

// returns when the value may have changed: the crew's business
void wait_while(const std::atomic<unsigned>& value, unsigned old);

// A barrier for a number of threads that shrinks as threads exit, with a sum over the arrivals' votes.
class Barrier {
 public:
  void reset(Progress* progress, const char* name, int expected) {
    progress_ = progress, name_ = name, expected_ = expected;
    arrived_ = 0, votes_[0] = votes_[1] = 0;
  }
  unsigned phase() const { return generation_.load(std::memory_order_relaxed) & 1; }

  unsigned arrive(const Where& where, unsigned vote = 0) {
    unsigned generation;
    {
      std::lock_guard lock(mutex_);
      if (progress_->stopped.load(std::memory_order_relaxed)) throw Stopped{};
      if (arrived_ == 0) {
        where_ = where;
      } else if (!same(where, where_)) {
        throw Failure(std::string(name_) + ": threads meet at different calls, " + place(where_) + " and " +
                      place(where));
      }
      generation = generation_.load(std::memory_order_relaxed);
      votes_[generation & 1] += vote;
      progress_->waiting.fetch_add(1, std::memory_order_relaxed);
      if (++arrived_ >= expected_) {
        complete();
        return votes_[generation & 1];
      }
    }
    while (generation_.load(std::memory_order_acquire) == generation) {
      wait_while(generation_, generation);
    }
    if (progress_->stopped.load(std::memory_order_relaxed)) throw Stopped{};
    return votes_[generation & 1];
  }
  void expect(int expected) {
    std::lock_guard lock(mutex_);
    expected_ = expected;
  }
  void drop() {
    std::lock_guard lock(mutex_);
    --expected_;
    if (arrived_ > 0 && arrived_ >= expected_) complete();
  }
  void stop() {
    std::lock_guard lock(mutex_);
    complete();
  }
  std::string report() {
    std::lock_guard lock(mutex_);
    if (arrived_ == 0) return "";
    return "; " + std::to_string(arrived_) + " of " + std::to_string(expected_) + " at " + name_ + " " + place(where_);
  }

 private:
  void complete() {
    unsigned generation = generation_.load(std::memory_order_relaxed);
    votes_[(generation + 1) & 1] = 0;
    progress_->waiting.fetch_sub(arrived_, std::memory_order_relaxed);
    progress_->completed.fetch_add(1, std::memory_order_relaxed);
    arrived_ = 0;
    generation_.store(generation + 1, std::memory_order_release);
    generation_.notify_all();
  }

  std::mutex mutex_;
  std::atomic<unsigned> generation_{0};
  int expected_ = 0, arrived_ = 0;
  unsigned votes_[2] = {0, 0};
  Where where_;
  const char* name_ = "";
  Progress* progress_ = nullptr;
};

struct alignas(16) Slot {
  unsigned char bytes[16];
};

// the lanes that a mask names; two sets of slots, so one barrier per exchange is enough
struct Group {
  unsigned mask;
  Barrier barrier;
  Slot slots[2][32];
};

class Warp {
 public:
  void reset(Progress* progress, int lanes) {
    progress_ = progress;
    exited_ = lanes >= 32 ? 0u : ~0u << lanes;
    for (int i = 0; i < kMasks && groups_[i]; ++i) {
      groups_[i].load()->barrier.reset(progress, "warp collective", std::popcount(present(groups_[i].load()->mask)));
    }
  }
  Group& group(unsigned mask) {
    if (Group* found = find(mask)) return *found;
    std::lock_guard lock(mutex_);
    if (Group* found = find(mask)) return *found;
    int free = 0;
    while (free < kMasks && groups_[free]) ++free;
    if (free == kMasks) throw Failure("a warp used more than " + std::to_string(kMasks) + " different masks");
    storage_.push_back(std::make_unique<Group>());
    Group* made = storage_.back().get();
    made->mask = mask;
    made->barrier.reset(progress_, "warp collective", std::popcount(present(mask)));
    groups_[free].store(made, std::memory_order_release);
    return *made;
  }
  // the named lanes that have not exited
  unsigned present(unsigned mask) const { return mask & ~exited_.load(std::memory_order_relaxed); }
  void exit(int lane) {
    std::lock_guard lock(mutex_);
    exited_.fetch_or(1u << lane, std::memory_order_relaxed);
    for (int i = 0; i < kMasks && groups_[i]; ++i) {
      Group* group = groups_[i];
      if (group->mask >> lane & 1) group->barrier.drop();
    }
  }
  template <class Visit>
  void each(Visit visit) {
    for (int i = 0; i < kMasks && groups_[i]; ++i) visit(groups_[i].load()->barrier);
  }

 private:
  Group* find(unsigned mask) {
    for (auto& entry : groups_) {
      Group* group = entry.load(std::memory_order_acquire);
      if (!group || group->mask == mask) return group;
    }
    return nullptr;
  }
  std::mutex mutex_;
  std::atomic<unsigned> exited_{0};
  Progress* progress_ = nullptr;
  std::atomic<Group*> groups_[kMasks] = {};
  std::vector<std::unique_ptr<Group>> storage_;
};

}  // namespace simt
