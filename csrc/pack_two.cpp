// Two capacities: best fit decreasing by tokens, among the packs that hold the item's patches too.
//
// A tree over the amounts of token space keeps the largest patch space at each amount, so one search finds the pack
// with the least token space that holds an item in both.
#include <algorithm>
#include <numeric>

#include "open_packs.hpp"
#include "packing.hpp"
#include "radix.hpp"

namespace packing {
namespace {

struct Item {
    std::uint32_t number;
    std::int32_t tokens, patches;
};

// By decreasing tokens / token_capacity + 2 patches / patch_capacity, then by decreasing tokens, then by number.
std::vector<Item> largest_first(const std::int64_t* tokens, const std::int64_t* patches, std::int64_t n,
                                std::int64_t token_capacity, std::int64_t patch_capacity) {
    struct Entry {
        std::uint64_t smallness;
        std::uint32_t fewer_tokens, number;
    };
    const std::int64_t divisor = std::gcd(token_capacity, patch_capacity);
    const std::int64_t token_weight = patch_capacity / divisor, patch_weight = 2 * (token_capacity / divisor);
    const std::uint64_t largest = token_weight * token_capacity + patch_weight * patch_capacity;
    std::vector<Entry> entries(n), scratch(n);
    for (std::int64_t i = 0; i < n; ++i)
        entries[i] = {largest - tokens[i] * token_weight - patches[i] * patch_weight,
                      static_cast<std::uint32_t>(token_capacity - tokens[i]), static_cast<std::uint32_t>(i)};
    radix_sort(entries, scratch, token_capacity, [](const Entry& entry) { return entry.fewer_tokens; });
    radix_sort(entries, scratch, largest, [](const Entry& entry) { return entry.smallness; });

    // Fetching the costs here, where the loads overlap, and not one by one while packing: half the time of pack_two.
    std::vector<Item> order(n);
    for (std::int64_t i = 0; i < n; ++i) {
        const std::uint32_t number = entries[i].number;
        order[i] = {number, static_cast<std::int32_t>(tokens[number]), static_cast<std::int32_t>(patches[number])};
    }
    return order;
}

}  // namespace

Offsets pack_two(const std::int64_t* tokens, const std::int64_t* patches, std::int64_t n,
                 std::int64_t token_capacity, std::int64_t patch_capacity, std::int64_t* items) {
    check_sizes(n, token_capacity, "tokens");
    check_sizes(n, patch_capacity, "patches");
    check_costs(tokens, n, token_capacity, "tokens");
    check_costs(patches, n, patch_capacity, "patches");

    const std::vector<Item> order = largest_first(tokens, patches, n, token_capacity, patch_capacity);
    std::vector<std::uint32_t> pack_of(n);  // by place in `order`
    OpenPacks packs(token_capacity);
    Offsets offsets{0};
    for (std::int64_t place = 0; place < n; ++place) {
        const Item& item = order[place];
        std::int64_t token_space = packs.find(item.tokens, item.patches);
        std::int64_t patch_space = patch_capacity;
        std::uint32_t pack;
        if (token_space < 0) {
            token_space = token_capacity;
            pack = packs.open();
            offsets.push_back(0);
        } else {
            patch_space = packs.patches_of_best(token_space);
            pack = packs.take_best(token_space);
        }
        packs.put(pack, token_space - item.tokens, static_cast<std::int32_t>(patch_space - item.patches),
                  static_cast<std::uint32_t>(place));
        pack_of[place] = pack;
        ++offsets[pack + 1];
    }

    std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
    std::vector<std::int64_t> cursor(offsets.begin(), offsets.end() - 1);
    for (std::int64_t place = 0; place < n; ++place) items[cursor[pack_of[place]]++] = order[place].number;
    return offsets;
}

}  // namespace packing
