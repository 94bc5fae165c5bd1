// SPDX-License-Identifier: Apache-2.0
#include "cycles.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <queue>

#include "instruction.h"

namespace machine {
namespace {

using Time = std::int64_t;
constexpr Time kNever = std::numeric_limits<Time>::max();
constexpr int kPipes = 16;

struct Slot {  // of a resident warp
  const std::vector<Event>* events = nullptr;
  std::size_t at = 0;
  Time next = 0;  // when its control code lets it go on
  int counts[kScoreboards] = {};
  bool at_barrier = false;
  int generation = 0;  // of warps in this slot: what a former one waited for does not concern this one
  Time copies = 0, products = 0;  // when those issued so far have ended
  bool live() const { return events; }
};

struct Release {
  Time time;
  int slot, scoreboard, generation;
  bool operator>(const Release& other) const { return time > other.time; }
};

class Multiprocessor {
 public:
  Multiprocessor(const Trace& trace, const std::vector<Operation>& program, const Rates& rates, int resident)
      : trace_(trace), program_(program), rates_(rates), slots_(resident * trace.per_block), left_(resident) {
    out_.instructions.resize(program.size());
    for (auto& partition : pipes_) std::fill(std::begin(partition), std::end(partition), 0.0);
  }

  Played run() {
    for (std::size_t block = 0; block < left_.size(); ++block) start(static_cast<int>(block));
    while (live_) {
      for (; !releases_.empty() && releases_.top().time <= now_; releases_.pop()) release(releases_.top());
      cycle();
    }
    const double drained = std::max({double(last_), l2_free_, dram_free_});
    out_.cycles = drained;
    return std::move(out_);
  }

 private:
  const Operation& operation(const Slot& slot) const { return program_[(*slot.events)[slot.at].instruction]; }

  void start(int block) {
    const int warps = trace_.per_block;
    left_[block] = 0;
    if (started_ == trace_.warps.size()) return;
    for (int k = 0; k < warps; ++k, ++started_) {
      Slot& slot = slots_[block * warps + k];
      const int generation = slot.generation + 1;
      slot = Slot{};
      slot.generation = generation;
      if (trace_.warps[started_].empty()) continue;
      slot.events = &trace_.warps[started_];
      slot.next = now_ + rates_.start;
      ++left_[block], ++live_;
    }
  }

  void release(const Release& done) {
    Slot& slot = slots_[done.slot];
    if (slot.live() && slot.generation == done.generation) --slot.counts[done.scoreboard];
  }

  void cycle() {
    bool any = false;
    Idle idle[kPartitions];
    soon_ = releases_.empty() ? kNever : releases_.top().time;
    for (int p = 0; p < kPartitions; ++p) {
      const int chosen = choose(p, idle[p]);
      if (chosen >= 0) issue(p, chosen), any = true;
      if (chosen >= 0) idle[p] = kReasons;
    }
    const Time step = any ? 1 : std::max<Time>(1, soon_ - now_);
    if (!any && soon_ == kNever) throw Fault("the model of time stands still: every warp waits");
    for (Idle reason : idle)
      if (reason != kReasons) out_.idle[reason] += double(step);
    now_ += step;
  }

  // the warp that issued last, unless it yields; else the one that has been ready for longest
  int choose(int partition, Idle& idle) {
    int best = -1;
    const int last = issued_last_[partition];
    idle = kNoWarp;
    for (int k = partition; k < static_cast<int>(slots_.size()); k += kPartitions) {
      Idle reason = kNoWarp;
      if (!ready(partition, k, reason)) {
        idle = std::min(idle, reason);
        continue;
      }
      if (k == last && !yielded_[partition]) return k;
      const bool better = best < 0 || best == last || slots_[k].next < slots_[best].next;
      if (better && !(k == last && best >= 0)) best = k;
    }
    return best;
  }

  bool blocked_until(double time) {
    soon_ = std::min(soon_, static_cast<Time>(std::ceil(time)));
    return false;
  }

  bool ready(int partition, int k, Idle& reason) {
    Slot& slot = slots_[k];
    if (!slot.live()) return false;
    if (slot.at_barrier) return reason = kAtBarrier, false;
    if (slot.next > now_) return reason = kStalled, blocked_until(double(slot.next));
    const Operation& op = operation(slot);
    reason = kScoreboard;
    for (int s = 0; s < kScoreboards; ++s)
      if (op.waits >> s & 1 && slot.counts[s]) return false;
    if (op.effect == Effect::kWait && slot.counts[op.scoreboard] > op.left) return false;
    reason = kPipe;
    const bool queues = op.effect == Effect::kProduct;  // the warp goes on
    if (op.pipes && !queues && *pipe(partition, op) > double(now_)) return blocked_until(*pipe(partition, op));
    reason = kQueue;
    if (through_queue(op) && lsu_free_ > double(now_ + rates_.queue)) return blocked_until(lsu_free_ - rates_.queue);
    return true;
  }

  static bool through_queue(const Operation& op) {
    return op.effect >= Effect::kShared && op.effect <= Effect::kCopy;
  }

  // of those that can take it, the one that is free first
  double* pipe(int partition, const Operation& op) {
    double* best = nullptr;
    for (int k = 0; k < kPipes; ++k)
      if (op.pipes >> k & 1 && (!best || pipes_[partition][k] < *best)) best = &pipes_[partition][k];
    return best;
  }

  void count(int k, int scoreboard, Time until) {
    if (scoreboard >= kScoreboards) return;
    ++slots_[k].counts[scoreboard];
    releases_.push({until, k, scoreboard, slots_[k].generation});
  }

  void issue(int partition, int k) {
    Slot& slot = slots_[k];
    const Event& event = (*slot.events)[slot.at];
    const Operation& op = program_[event.instruction];
    note(event, double(now_ - slot.next));
    double begin = double(now_), end = double(now_ + op.latency);
    if (op.pipes) *pipe(partition, op) = std::max(*pipe(partition, op), begin) + op.interval;
    if (through_queue(op)) {
      begin = std::max(lsu_free_, begin);
      lsu_free_ = begin + std::max<int>(1, event.wavefronts);
      end = lsu_free_ - 1 + op.latency;
      if (op.effect != Effect::kShared) end = memory(op, event, lsu_free_ - 1);
    }
    const Time done = static_cast<Time>(std::ceil(end));
    if (op.effect == Effect::kCopy) slot.copies = std::max(slot.copies, done);
    if (op.effect == Effect::kProduct) product(slot, k, partition, op, event);
    count(k, op.writes, op.effect == Effect::kCommit ? std::max(slot.copies, now_ + 1) : done);
    count(k, op.reads, std::min(done, static_cast<Time>(begin) + rates_.operands_read));
    slot.next = now_ + std::max(1, op.stall);
    last_ = std::max(last_, slot.next);
    issued_last_[partition] = k, yielded_[partition] = op.yields;
    const bool ends = ++slot.at == slot.events->size();
    if (!ends && (*slot.events)[slot.at].instruction != event.instruction + 1) slot.next += rates_.branch;
    if (op.effect == Effect::kBarrier) slot.at_barrier = true;
    if (ends) finish(k);
    if (ends || op.effect == Effect::kBarrier) open_barrier(k / trace_.per_block);
  }

  void note(const Event& event, double waited) {
    OfInstruction& of = out_.instructions[event.instruction];
    ++of.executions, ++out_.issued;
    of.lanes += event.active, of.wavefronts += event.wavefronts;
    of.sectors += event.sectors, of.fresh += event.fresh;
    of.waited += waited;
    out_.wavefronts += event.wavefronts;
  }

  // when the data of a global access are there; stores only take their share of the rates
  double memory(const Operation& op, const Event& event, double leaves) {
    if (!event.sectors) return leaves + rates_.l1;
    const bool write = op.effect == Effect::kStore;
    const double bytes = double(event.sectors) * kSectorBytes;
    const double fresh = event.fresh ? event.fresh * kSectorBytes * own(event.region, write) : 0;
    l2_free_ = std::max(l2_free_, leaves) + bytes / rates_.l2_bytes;
    if (fresh) dram_free_ = std::max(dram_free_, leaves) + fresh / rates_.dram_bytes;
    out_.l2_bytes += bytes, out_.dram_bytes += fresh;
    // the queues' ends include this access' own bytes, whose time is part of the latency
    const double l2_wait = l2_free_ - bytes / rates_.l2_bytes - leaves;
    const double dram_wait = fresh ? dram_free_ - fresh / rates_.dram_bytes - leaves : 0;
    return leaves + (fresh ? rates_.dram : rates_.l2) + std::max(l2_wait, dram_wait);
  }

  double own(int region, bool write) {
    const auto [at, made] = own_.try_emplace({region, write}, 0.0);
    if (made) at->second = trace_.own(region, write, rates_.multiprocessors);
    return at->second;
  }

  // ends after those before it, and not before shared memory has delivered its factors
  void product(Slot& slot, int k, int partition, const Operation& op, const Event& event) {
    lsu_free_ = std::max(lsu_free_, double(now_)) + event.wavefronts;
    const double end = std::max(*pipe(partition, op), lsu_free_) + op.latency;
    slot.products = std::max(slot.products, static_cast<Time>(std::ceil(end)));
    if (op.left) count(k, op.scoreboard, slot.products);
  }

  void finish(int k) {
    slots_[k].events = nullptr;
    --live_;
    const int block = k / trace_.per_block;
    if (--left_[block] == 0) start(block);
  }

  void open_barrier(int block) {
    const auto begin = slots_.begin() + block * trace_.per_block, end = begin + trace_.per_block;
    if (std::any_of(begin, end, [](const Slot& s) { return s.live() && !s.at_barrier; })) return;
    std::for_each(begin, end, [&](Slot& s) {
      if (!s.at_barrier) return;
      s.at_barrier = false;
      s.next = std::max(s.next, now_ + rates_.barrier);
    });
  }

  const Trace& trace_;
  const std::vector<Operation>& program_;
  const Rates& rates_;
  std::vector<Slot> slots_;
  std::vector<int> left_;  // live warps of each resident block
  std::size_t started_ = 0, live_ = 0;
  Time now_ = 0, soon_ = kNever, last_ = 0;
  double lsu_free_ = 0, l2_free_ = 0, dram_free_ = 0;
  double pipes_[kPartitions][kPipes];  // when each is free
  int issued_last_[kPartitions] = {-1, -1, -1, -1};
  bool yielded_[kPartitions] = {};
  std::map<std::pair<int, bool>, double> own_;
  std::priority_queue<Release, std::vector<Release>, std::greater<Release>> releases_;
  Played out_;
};

}  // namespace

Played play(const Trace& trace, const std::vector<Operation>& program, const Rates& rates, int resident) {
  return Multiprocessor(trace, program, rates, resident).run();
}

}  // namespace machine
