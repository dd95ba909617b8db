#include "digest.h"

#include <string.h>

#include <algorithm>

namespace bidensify {
namespace {

// lower.py has the same.
constexpr char kMark[] = "bidensify sha256";
constexpr size_t kSeal = sizeof kMark - 1 + 32, kPiece = 1 << 16;

constexpr uint32_t kRounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

uint32_t turned(uint32_t x, int by) { return x >> by | x << (32 - by); }

void block(const uint8_t* data, uint32_t state[8]) {
  uint32_t w[64], s[8];
  for (int i = 0; i < 16; ++i)
    w[i] = (uint32_t)data[4 * i] << 24 | (uint32_t)data[4 * i + 1] << 16 | (uint32_t)data[4 * i + 2] << 8 | data[4 * i + 3];
  for (int i = 16; i < 64; ++i)
    w[i] = w[i - 16] + w[i - 7] + (turned(w[i - 15], 7) ^ turned(w[i - 15], 18) ^ w[i - 15] >> 3) +
           (turned(w[i - 2], 17) ^ turned(w[i - 2], 19) ^ w[i - 2] >> 10);
  std::copy(state, state + 8, s);
  for (int i = 0; i < 64; ++i) {
    const uint32_t one = s[7] + (turned(s[4], 6) ^ turned(s[4], 11) ^ turned(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6])) +
                         kRounds[i] + w[i];
    const uint32_t two =
        (turned(s[0], 2) ^ turned(s[0], 13) ^ turned(s[0], 22)) + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
    std::copy_backward(s, s + 7, s + 8);
    s[4] += one;
    s[0] = one + two;
  }
  for (int i = 0; i < 8; ++i) state[i] += s[i];
}

}  // namespace

bool sha256(FILE* file, uint64_t size, uint8_t out[32]) {
  uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  // Room for the padding behind the last bytes.
  uint8_t piece[kPiece + 128] = {};
  for (uint64_t left = size;;) {
    const size_t count = (size_t)std::min<uint64_t>(left, kPiece);
    if (fread(piece, 1, count, file) != count) return false;
    left -= count;
    size_t blocks = count / 64;
    if (count < kPiece) {
      const size_t rest = count % 64, end = count - rest + (rest < 56 ? 64 : 128);
      memset(piece + count, 0, end - count);
      piece[count] = 0x80;
      for (size_t i = 0; i < 8; ++i) piece[end - 1 - i] = (uint8_t)(size * 8 >> 8 * i);
      blocks = end / 64;
    }
    for (size_t i = 0; i < blocks; ++i) block(piece + 64 * i, state);
    if (count < kPiece) break;
  }
  for (size_t i = 0; i < 32; ++i) out[i] = (uint8_t)(state[i / 4] >> (24 - 8 * (i % 4)));
  return true;
}

bool sealed(FILE* file) {
  uint8_t seal[kSeal], found[32];
  if (fseek(file, 0, SEEK_END) != 0) return false;
  const long size = ftell(file);
  if (size < (long)kSeal || fseek(file, size - (long)kSeal, SEEK_SET) != 0 || fread(seal, 1, kSeal, file) != kSeal) return false;
  if (memcmp(seal, kMark, sizeof kMark - 1) != 0 || fseek(file, 0, SEEK_SET) != 0) return false;
  return sha256(file, (uint64_t)size - kSeal, found) && memcmp(seal + sizeof kMark - 1, found, 32) == 0;
}

}  // namespace bidensify
