// Pieces of work over ranks, so that the most loaded rank has as little as possible. Plain C++17.
//
// The assignment is that of mimo_megatron/parallel/spread_reference.py, which is the definition.
#pragma once

#include <cstdint>

namespace packing {

// Largest total cost times ranks: doubled sums stay within 64 bits.
constexpr std::int64_t kMaxSpread = std::int64_t{1} << 60;

// Writes the rank of each of the n pieces. O(n (log n + ranks)), and O(n log n) for each of at most n refinements.
void spread(const std::int64_t* costs, std::int64_t n, std::int64_t num_ranks, std::int64_t* rank_of);

}  // namespace packing
