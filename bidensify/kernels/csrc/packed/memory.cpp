// Memory of outputs: blocks out of a few large mappings, which stay with the process between layers, so that a network's
// tensors are not fresh pages in every run, whatever the C library's allocator does with what it is given back.
//
// A block is the first hole that is large enough, counted from the lowest address (so that high addresses fall free), and
// neighbouring holes are one. What no run of late has needed goes back to the system.
#include <stddef.h>

#include <algorithm>
#include <exception>
#include <iterator>
#include <list>
#include <map>
#include <mutex>
#include <utility>

#include "bidensify_kernels.h"

#if !defined(_WIN32)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace {

// A tensor as DLPack hands it over (dmlc/dlpack, the structures of version 0): its layout is a contract between programs.
struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct View {
  void* data;
  Device device;
  int32_t dimensions;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t offset;
};
struct Managed {
  View view;
  void* context;
  void (*deleter)(Managed*);
};
constexpr int32_t kCpu = 1;

struct Tensor {
  Managed managed;
  int64_t shape[4], strides[4];
};

#if !defined(_WIN32)

// Of 4 to 512 MiB, what left the fewest unused stretches in nine networks' outputs.
constexpr size_t kSegment = 32u << 20;
constexpr size_t kLargePage = 2u << 20;
// Room behind every block: a multiple of the alignment that keeps equal places of equal tensors off equal addresses modulo
// a page, where a load seems to the processor to wait for a store.
constexpr size_t kAlign = 64, kBetween = 5 * kAlign;
// Blocks handed out between two looks at what is still needed: some runs of a network.
constexpr int kEpoch = 256;

size_t round_up(size_t v, size_t to) { return (v + to - 1) / to * to; }

struct Segment {
  char* mapping;
  size_t mapped;
  char* base;
  size_t size;
  std::map<size_t, size_t> holes;  // offset -> length
  // How far blocks reached: since pages last went back, in this epoch, in the one before.
  size_t touched = 0, recent = 0, before = 0;

  size_t reach() const {
    // Behind the last block there is one hole at most.
    if (holes.empty()) return size;
    const auto last = std::prev(holes.end());
    return last->first + last->second == size ? last->first : size;
  }
  bool empty() const { return holes.size() == 1 && holes.begin()->second == size; }
};

class Memory {
 public:
  char* get(size_t bytes) {
    const size_t wanted = round_up(bytes, kAlign) + kBetween;
    if (wanted < bytes) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (++handed_ >= kEpoch) turn();
    for (Segment& segment : segments_)
      for (auto hole = segment.holes.begin(); hole != segment.holes.end(); ++hole)
        if (hole->second >= wanted) return take(segment, hole, wanted, bytes);
    if (!map(std::max(kSegment, round_up(wanted, kLargePage)))) return nullptr;
    return take(segments_.back(), segments_.back().holes.begin(), wanted, bytes);
  }

  void put(char* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = blocks_.find(data);
    const auto [length, segment] = found->second;
    blocks_.erase(found);
    ASAN_POISON_MEMORY_REGION(data, length);
    size_t offset = (size_t)(data - segment->base), size = length;
    auto next = segment->holes.lower_bound(offset);
    if (next != segment->holes.end() && next->first == offset + size) {
      size += next->second;
      next = segment->holes.erase(next);
    }
    if (next != segment->holes.begin()) {
      const auto previous = std::prev(next);
      if (previous->first + previous->second == offset) {
        previous->second += size;
        return;
      }
    }
    segment->holes.emplace_hint(next, offset, size);
  }

  // Gives back every page that holds no block.
  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto segment = segments_.begin(); segment != segments_.end();) {
      if (segment->empty()) {
        segment = unmap(segment);
        continue;
      }
      for (const auto& [offset, length] : segment->holes) discard(*segment, offset, offset + length);
      segment->touched = segment->recent = segment->before = segment->reach();
      ++segment;
    }
  }

  void count(int64_t* live, int64_t* kept) {
    const std::lock_guard<std::mutex> lock(mutex_);
    *live = *kept = 0;
    for (const auto& block : blocks_) *live += (int64_t)block.second.first;
    for (const Segment& segment : segments_) *kept += (int64_t)segment.touched;
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  typedef std::list<Segment>::iterator Place;

  char* take(Segment& segment, std::map<size_t, size_t>::iterator hole, size_t wanted, size_t bytes) {
    const size_t offset = hole->first, left = hole->second - wanted;
    char* data = segment.base + offset;
    blocks_.emplace(data, std::make_pair(wanted, &segment));
    if (left != 0) segment.holes.emplace_hint(std::next(hole), offset + wanted, left);
    segment.holes.erase(hole);
    segment.recent = std::max(segment.recent, offset + wanted);
    segment.touched = std::max(segment.touched, offset + wanted);
    ASAN_UNPOISON_MEMORY_REGION(data, bytes);
    return data;
  }

  bool map(size_t size) {
    const size_t mapped = size + kLargePage;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#if defined(MAP_NORESERVE)
    flags |= MAP_NORESERVE;
#endif
    void* mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (mapping == MAP_FAILED) return false;
    char* base = reinterpret_cast<char*>(round_up(reinterpret_cast<size_t>(mapping), kLargePage));
    segments_.push_back({static_cast<char*>(mapping), mapped, base, size, {{0, size}}});
#if defined(MADV_HUGEPAGE)
    madvise(base, size, MADV_HUGEPAGE);
#endif
    ASAN_POISON_MEMORY_REGION(base, size);
    return true;
  }

  Place unmap(Place segment) {
    ASAN_UNPOISON_MEMORY_REGION(segment->base, segment->size);
    munmap(segment->mapping, segment->mapped);
    return segments_.erase(segment);
  }

  void discard(const Segment& segment, size_t from, size_t to) {
    static const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    from = round_up(from, page);
    to = to / page * page;
    if (from < to) madvise(segment.base + from, to - from, MADV_DONTNEED);
  }

  // A new epoch: what was out of reach in the last two goes back.
  void turn() {
    handed_ = 0;
    for (auto segment = segments_.begin(); segment != segments_.end();) {
      const size_t needed = std::max(segment->recent, segment->before);
      if (needed == 0) {
        segment = unmap(segment);
        continue;
      }
      if (needed < segment->touched) {
        discard(*segment, needed, segment->touched);
        segment->touched = needed;
      }
      segment->before = segment->recent;
      segment->recent = segment->reach();
      ++segment;
    }
  }

  std::mutex mutex_;
  std::list<Segment> segments_;
  std::map<char*, std::pair<size_t, Segment*>> blocks_;
  int handed_ = 0;
};

// Never destroyed: tensors may outlive the library's other objects. A child process must not inherit a lock that another
// thread of its parent held.
Memory& memory() {
  static Memory* const instance = [] {
    Memory* made = new Memory;
    pthread_atfork([] { memory().lock(); }, [] { memory().unlock(); }, [] { memory().unlock(); });
    return made;
  }();
  return *instance;
}

#else

class Memory {
 public:
  char* get(size_t) { return nullptr; }
  void put(char*) {}
  void release() {}
  void count(int64_t* live, int64_t* kept) { *live = *kept = 0; }
};

Memory& memory() {
  static Memory instance;
  return instance;
}

#endif

void drop(Managed* managed) {
  memory().put(static_cast<char*>(managed->view.data));
  delete reinterpret_cast<Tensor*>(managed);
}

}  // namespace

extern "C" {

void* bd_tensor_new(const int64_t* shape, int32_t code, int32_t bits) {
  if (shape == nullptr || code < 0 || code > 255 || bits < 8 || bits > 64 || bits % 8) return nullptr;
  const int64_t c = shape[1], h = shape[2], w = shape[3];
  int64_t bytes = bits / 8;
  for (int i = 0; i < 4; ++i)
    if (shape[i] < 1 || __builtin_mul_overflow(bytes, shape[i], &bytes)) return nullptr;
  char* data = nullptr;
  try {
    data = memory().get((size_t)bytes);
    if (data == nullptr) return nullptr;
    Tensor* made = new Tensor{};
    for (int i = 0; i < 4; ++i) made->shape[i] = shape[i];
    const int64_t strides[4] = {h * w * c, 1, w * c, c};
    for (int i = 0; i < 4; ++i) made->strides[i] = strides[i];
    View& view = made->managed.view;
    view.data = data;
    view.device = {kCpu, 0};
    view.dimensions = 4;
    view.dtype = {(uint8_t)code, (uint8_t)bits, 1};
    view.shape = made->shape;
    view.strides = made->strides;
    made->managed.deleter = drop;
    return &made->managed;
  } catch (const std::exception&) {
    if (data != nullptr) memory().put(data);
    return nullptr;
  }
}

void bd_tensor_free(void* tensor) {
  if (tensor != nullptr) drop(static_cast<Managed*>(tensor));
}

void bd_memory_release(void) { memory().release(); }

void bd_memory_count(int64_t* live, int64_t* kept) { memory().count(live, kept); }

}  // extern "C"
