// Best-fit-decreasing packing of samples into packs. Plain C++17: knows neither Python nor torch.
//
// Both functions write the item numbers, pack after pack, into `items` (room for n) and return the bounds of the packs
// in it: pack b is items[offsets[b]] .. items[offsets[b + 1]]. The packs are those of
// mimo_megatron/data/packing_reference.py, which is the definition, item by item.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace packing {

using Offsets = std::vector<std::int64_t>;

// Working memory is a table over 0 .. capacity: at 2^26 it takes 0.5 GB, and 1.3 GB with two capacities.
constexpr std::int64_t kMaxCapacity = std::int64_t{1} << 26;
constexpr std::int64_t kMaxItems = std::int64_t{1} << 31;

// Linear in n + capacity, plus one step for each run of equal lengths that goes into one pack.
Offsets pack_one(const std::int64_t* lengths, std::int64_t n, std::int64_t capacity, std::int64_t* items);

// O(n log(n + capacity)): for each item one search in a tree over the token space, and one step in a heap.
Offsets pack_two(const std::int64_t* tokens, const std::int64_t* patches, std::int64_t n,
                 std::int64_t token_capacity, std::int64_t patch_capacity, std::int64_t* items);

inline void check_sizes(std::int64_t n, std::int64_t capacity, const char* unit) {
    if (capacity <= 0 || capacity > kMaxCapacity)
        throw std::invalid_argument("a capacity of " + std::to_string(capacity) + " " + unit + " is not in 1 .. " +
                                    std::to_string(kMaxCapacity));
    if (n > kMaxItems) throw std::invalid_argument(std::to_string(n) + " items are more than 2^31");
}

[[noreturn]] inline void refuse(std::int64_t item, std::int64_t cost, std::int64_t capacity, const char* unit) {
    throw std::invalid_argument("item " + std::to_string(item) + " has " + std::to_string(cost) + " " + unit +
                                ", outside 0 .. " + std::to_string(capacity));
}

inline void check_costs(const std::int64_t* costs, std::int64_t n, std::int64_t capacity, const char* unit) {
    for (std::int64_t i = 0; i < n; ++i)
        if (static_cast<std::uint64_t>(costs[i]) > static_cast<std::uint64_t>(capacity))
            refuse(i, costs[i], capacity, unit);
}

// Whole costs from 0 whose sum, times 10, is exact in double.
inline void check_total(const std::int64_t* costs, std::int64_t n, const char* unit) {
    constexpr std::int64_t kMost = std::int64_t{1} << 49;
    std::int64_t total = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        if (costs[i] < 0 || costs[i] > kMost - total)
            throw std::invalid_argument("item " + std::to_string(i) + " has " + unit + " of " +
                                        std::to_string(costs[i]) +
                                        "; they must not be negative, nor their sum above 2^49");
        total += costs[i];
    }
}

}  // namespace packing
