// What `bidensify export` puts behind a program: a mark and the SHA-256 (FIPS 180-4) of all bytes before them.
#ifndef BIDENSIFY_DIGEST_H
#define BIDENSIFY_DIGEST_H

#include <stdint.h>
#include <stdio.h>

namespace bidensify {

// Whether a file's bytes are those that were sealed. Reads it piece by piece.
bool sealed(FILE* file);
// Of the next `size` bytes of a file; false where it has fewer.
bool sha256(FILE* file, uint64_t size, uint8_t out[32]);

}  // namespace bidensify
#endif
