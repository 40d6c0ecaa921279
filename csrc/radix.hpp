// Sorting by whole keys, in linear time.
#pragma once

#include <cstdint>
#include <iterator>
#include <numeric>
#include <vector>

namespace packing {

// Stable radix sort by increasing key(entry) <= largest, least significant digit first.
template <typename Entry, typename Key>
void radix_sort(std::vector<Entry>& entries, std::vector<Entry>& scratch, std::uint64_t largest, Key key) {
    constexpr int kBits = 11;
    for (int shift = 0; largest >> shift; shift += kBits) {
        std::uint32_t start[(1 << kBits) + 1] = {};
        const auto digit = [=](const Entry& entry) { return key(entry) >> shift & ((1 << kBits) - 1); };
        for (const Entry& entry : entries) ++start[digit(entry) + 1];
        std::partial_sum(std::begin(start), std::end(start), std::begin(start));
        for (const Entry& entry : entries) scratch[start[digit(entry)]++] = entry;
        entries.swap(scratch);
    }
}

}  // namespace packing
