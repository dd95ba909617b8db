// The operator of bidensify/deploy/runtimes/cpp on plain memory: recorded calls on every kernel of this processor must give the
// recorded bits, and calls whose arguments were changed at random must be refused with a reason, or run inside their memory (built
// with AddressSanitizer, every array in a block of its size). Usage: operator CASES MUTATIONS
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "call.h"

using bidensify::Arguments;
using bidensify::Call;
using bidensify::Message;
using bidensify::Type;
using bidensify::View;

namespace {

FILE* file;
std::mt19937_64 generator(1);

int64_t random_below(int64_t n) { return (int64_t)(generator() % (uint64_t)n); }

void read_exactly(void* to, size_t bytes) {
  if (bytes && fread(to, 1, bytes, file) != bytes) {
    fprintf(stderr, "the case file is truncated\n");
    exit(2);
  }
}

// A tensor with memory of exactly its size.
struct Tensor {
  bool given = false;
  View view;
  std::vector<std::unique_ptr<char[]>> memory;
  int64_t bytes = 0;
  int64_t count() const {
    int64_t n = 1;
    for (int i = 0; i < view.dims; ++i) n *= view.sizes[i];
    return n;
  }
  int64_t element() const { return view.type == Type::kBFloat16 ? 2 : 4; }
  void fill(const char* from, int64_t size) {
    bytes = size;
    memory.clear();
    memory.emplace_back(new char[(size_t)std::max<int64_t>(size, 1)]);
    if (from) memcpy(memory[0].get(), from, (size_t)size);
    view.data = memory[0].get();
  }
  Tensor copy() const {
    Tensor other;
    other.given = given, other.view = view;
    if (given) other.fill(memory[0].get(), bytes);
    return other;
  }
  void read() {
    int32_t head[4];
    read_exactly(head, 4);
    if (head[0] < 0) return;
    read_exactly(head + 1, 12);
    given = true;
    view.type = (Type)head[0], view.dims = head[1];
    read_exactly(view.sizes, (size_t)view.dims * 8);
    view.last = head[3] != 0;
    view.plain = head[3] == 0;
    std::vector<char> data((size_t)head[2]);
    read_exactly(data.data(), data.size());
    fill(data.data(), head[2]);
  }
  // Another size or type: memory of that size, of whatever values.
  bool renew() {
    int64_t size = element();
    for (int i = 0; i < view.dims; ++i)
      if (view.sizes[i] < 0 || __builtin_mul_overflow(size, view.sizes[i], &size) || size > 1 << 22) return false;
    std::vector<char> data((size_t)size);
    for (int64_t i = 0; i < size; ++i) data[(size_t)i] = i < bytes ? memory[0][i] : (char)generator();
    fill(data.data(), size);
    return true;
  }
};

struct Case {
  std::vector<int64_t> up, spec;
  std::vector<Tensor> parts;
  Tensor tiles, side, thresholds, levels, residual, want;
  Case copy() const {
    Case other;
    other.up = up, other.spec = spec;
    for (const Tensor& part : parts) other.parts.push_back(part.copy());
    other.tiles = tiles.copy(), other.side = side.copy(), other.thresholds = thresholds.copy(), other.levels = levels.copy();
    other.residual = residual.copy();
    return other;
  }
  Arguments arguments() const {
    Arguments a;
    a.part_count = parts.size();
    for (size_t i = 0; i < parts.size() && i < (size_t)bidensify::kMostParts; ++i) a.parts[i] = parts[i].view;
    a.up = up.data(), a.up_count = up.size(), a.spec = spec.data(), a.spec_count = spec.size();
    a.tiles = tiles.view, a.side = side.view;
    if (thresholds.given) a.thresholds = thresholds.view;
    if (levels.given) a.levels = levels.view;
    if (residual.given) a.residual = residual.view;
    return a;
  }
};

std::vector<int64_t> read_list() {
  int64_t count;
  read_exactly(&count, 8);
  std::vector<int64_t> list((size_t)count);
  read_exactly(list.data(), list.size() * 8);
  return list;
}

int64_t odd_number(int64_t was) {
  const int64_t some[] = {0, 1, -1, 2, 3, 16, 31, 32, 4096, 4097, 1 << 20, (1 << 24) + 1, 2147483647, -2147483648LL, INT64_MAX, INT64_MIN};
  switch (random_below(4)) {
    case 0: return some[random_below(16)];
    case 1: return was + random_below(5) - 2;
    case 2: return (int64_t)((uint64_t)was ^ (uint64_t{1} << random_below(64)));
    default: return random_below(8);
  }
}

// Changes one thing; false where the change would need too much memory here.
bool mutate(Case& c) {
  std::vector<Tensor*> tensors = {&c.tiles, &c.side, &c.thresholds, &c.levels, &c.residual};
  for (Tensor& part : c.parts) tensors.push_back(&part);
  Tensor& t = *tensors[(size_t)random_below((int64_t)tensors.size())];
  switch (random_below(12)) {
    case 0: case 1: case 2: case 3:
      if (!c.spec.empty()) {
        int64_t& number = c.spec[(size_t)random_below((int64_t)c.spec.size())];
        number = odd_number(number);
      }
      return true;
    case 4: c.spec.resize((size_t)random_below((int64_t)c.spec.size() + 3)); return true;
    case 5: {
      if (c.up.empty()) return true;
      int64_t& number = c.up[(size_t)random_below((int64_t)c.up.size())];
      number = random_below(2) ? odd_number(number) : 1 + random_below(4);
      return true;
    }
    case 6: c.up.resize((size_t)random_below((int64_t)c.up.size() + 2), 1); return true;
    case 7:
      if (!t.given) {
        t.given = true;
        t.view = View();
        t.view.type = Type::kFloat32, t.view.dims = 2, t.view.plain = true;
        t.view.sizes[0] = c.parts.empty() ? 1 : c.parts[0].view.sizes[0];
        t.view.sizes[1] = random_below(2) ? 2 : 1 + random_below(70);
        return t.renew();
      }
      t.view.type = (Type)random_below(4);
      return t.renew();
    case 8:
      if (!t.given || t.view.dims == 0) return true;
      {
        int64_t& size = t.view.sizes[random_below(t.view.dims)];
        size = random_below(2) ? size + random_below(5) - 2 : random_below(40);
      }
      return t.renew();
    case 9:
      if (!t.given) return true;
      if (random_below(2)) t.view.last = !t.view.last;
      else t.view.plain = !t.view.plain;
      return true;
    case 10:
      if (!t.given) return true;
      t.view.dims = (int)random_below(7);
      for (int i = 0; i < t.view.dims; ++i) t.view.sizes[i] = 1 + random_below(6);
      return t.renew();
    default:
      if (random_below(2) && !c.parts.empty()) {
        if (random_below(2)) c.parts.pop_back();
        else c.parts.push_back(c.parts[0].copy());
      } else if (&t != &c.tiles && &t != &c.side && t.given && &t >= &c.thresholds && &t <= &c.residual) {
        t = Tensor();
      }
      return true;
  }
}

int check(const Case& c, int number) {
  int failures = 0;
  for (int32_t tier = 0; tier < BD_TIERS; ++tier) {
    if (!(bd_tiers() >> tier & 1u)) continue;
    for (int threads : {1, 3}) {
      Arguments a = c.arguments();
      Call call;
      Message why;
      std::vector<char> y((size_t)c.want.bytes, 1);
      if (!call.prepare(a, why) || !call.run(y.data(), tier, threads, why)) {
        fprintf(stderr, "case %d, kernel %d: refused: %s\n", number, tier, why.text);
        ++failures;
      } else if (call.dims() != c.want.view.dims || !std::equal(call.sizes(), call.sizes() + call.dims(), c.want.view.sizes) ||
                 memcmp(y.data(), c.want.memory[0].get(), y.size())) {
        fprintf(stderr, "case %d, kernel %d: other bits than the reference's\n", number, tier);
        ++failures;
      }
    }
  }
  return failures;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 || !(file = fopen(argv[1], "rb"))) return fprintf(stderr, "usage: operator CASES MUTATIONS\n"), 2;
  int64_t count;
  read_exactly(&count, 8);
  std::vector<Case> cases((size_t)count);
  int failures = 0;
  for (size_t i = 0; i < cases.size(); ++i) {
    Case& c = cases[i];
    c.up = read_list();
    c.spec = read_list();
    c.parts.resize(c.up.size());
    for (Tensor& part : c.parts) part.read();
    for (Tensor* tensor : {&c.tiles, &c.side, &c.thresholds, &c.levels, &c.residual, &c.want}) tensor->read();
    failures += check(c, (int)i);
  }
  int64_t ran = 0, refused = 0;
  const int64_t mutations = atoll(argv[2]);
  while (ran + refused < mutations) {
    Case c = cases[(size_t)random_below(count)].copy();
    bool fits = true;
    for (int64_t i = 1 + random_below(3); i > 0 && fits; --i) fits = mutate(c);
    if (!fits || c.parts.size() > (size_t)bidensify::kMostParts) continue;
    Arguments a = c.arguments();
    Call call;
    Message why;
    bool good = call.prepare(a, why);
    if (good) {
      int64_t bytes = call.type() == Type::kFloat32 ? 4 : 2, work = c.tiles.bytes;
      for (int i = 0; i < call.dims(); ++i) bytes *= call.sizes()[i];
      // Not for want of checks: some layers are sound and would run for hours here.
      if (bytes > 1 << 22 || work > 1 << 22) continue;
      std::vector<char> y((size_t)bytes);
      int32_t tier;
      do tier = (int32_t)random_below(BD_TIERS);
      while (!(bd_tiers() >> tier & 1u));
      good = call.run(y.data(), tier, 1 + (int32_t)random_below(2), why);
    }
    if (!good && why.text[0] == 0) ++failures, fprintf(stderr, "refused without a reason\n");
    ++(good ? ran : refused);
  }
  printf("%lld calls on every kernel, %lld changed calls: %lld refused with a reason, %lld ran\n", (long long)count,
         (long long)mutations, (long long)refused, (long long)ran);
  if (failures) fprintf(stderr, "%d failures\n", failures);
  return failures != 0;
}
