// Packs of nearly equal cost, and the packs of a step dealt to ranks. Plain C++17: knows neither Python nor torch.
//
// Both give what mimo_megatron/data/balance_reference.py gives, which is the definition.
#pragma once

#include <cstdint>
#include <functional>

#include "packing.hpp"

namespace packing {

// Called every 2^16 samples or proposals; it throws where the caller no longer wants an answer.
using Poll = std::function<void()>;

struct Samples {
    const std::int64_t *tokens, *patches;
    const std::int64_t *costs, *vision_costs;  // the sum of each at most 2^49: what is added up here is exact in double
    std::int64_t n;
};

// Writes the sample numbers, pack after pack, into `items` and returns the bounds of the packs, as pack_two does.
// O(n log n), memory linear in n + capacity.
Offsets pack_balanced(const Samples& samples, std::int64_t token_capacity, std::int64_t patch_capacity,
                      std::int64_t* items, const Poll& poll);

// Writes the rank of each of the n packs of a step, equally many for each rank. O(n log n + proposals).
void deal(const std::int64_t* costs, const std::int64_t* vision_costs, std::int64_t n, std::int64_t num_ranks,
          std::int64_t proposals_per_pack, std::int64_t* rank_of, const Poll& poll);

}  // namespace packing
