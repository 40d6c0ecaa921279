// Two capacities: best fit decreasing where the scarcer resource decides the fit.
//
// The resource whose total needs more packs is the tight one. An item goes into the pack with the least tight space
// that holds it in both resources; a tree over the amounts of tight space keeps the largest loose space at each
// amount, so one search finds that pack.
#include <algorithm>
#include <numeric>

#include "packing.hpp"

namespace packing {
namespace {

constexpr std::uint32_t kNone = ~std::uint32_t{0};

// All packs that have room, by their tight space. Those with equal tight space form a skew heap whose root has the
// most loose space, and of those with equal loose space the one filled last.
class OpenPacks {
  public:
    explicit OpenPacks(std::int64_t tight_capacity) : root_(tight_capacity + 1, kNone) {
        while (num_leaves_ <= tight_capacity) num_leaves_ *= 2;
        most_loose_.assign(2 * num_leaves_, -1);
    }

    std::uint32_t open() {
        loose_.push_back(0);
        filled_at_.push_back(0);
        left_.push_back(kNone);
        right_.push_back(kNone);
        return static_cast<std::uint32_t>(loose_.size() - 1);
    }

    // The least tight space >= `tight` at which a pack has loose space >= `loose`, or -1.
    std::int64_t find(std::int64_t tight, std::int32_t loose) const {
        std::int64_t node = num_leaves_ + tight;
        while (most_loose_[node] < loose) {
            while (node & 1) node /= 2;  // a right child: nothing further right below its parent
            if (node == 0) return -1;
            ++node;
        }
        while (node < num_leaves_) node = 2 * node + (most_loose_[2 * node] < loose);
        return node - num_leaves_;
    }

    std::int32_t loose_of_best(std::int64_t tight) const { return loose_[root_[tight]]; }

    std::uint32_t take_best(std::int64_t tight) {
        const std::uint32_t pack = root_[tight];
        root_[tight] = merge(left_[pack], right_[pack]);
        refresh(tight);
        return pack;
    }

    void put(std::uint32_t pack, std::int64_t tight, std::int32_t loose, std::uint32_t now) {
        loose_[pack] = loose;
        filled_at_[pack] = now;
        left_[pack] = right_[pack] = kNone;
        root_[tight] = merge(root_[tight], pack);
        refresh(tight);
    }

  private:
    bool before(std::uint32_t a, std::uint32_t b) const {
        return loose_[a] != loose_[b] ? loose_[a] > loose_[b] : filled_at_[a] > filled_at_[b];
    }

    std::uint32_t merge(std::uint32_t a, std::uint32_t b) {
        std::uint32_t result = kNone;
        std::uint32_t* link = &result;
        while (a != kNone && b != kNone) {
            if (before(b, a)) std::swap(a, b);
            *link = a;  // a's right subtree joins b and becomes its left one
            link = &left_[a];
            const std::uint32_t rest = right_[a];
            right_[a] = left_[a];
            a = rest;
        }
        *link = a != kNone ? a : b;
        return result;
    }

    void refresh(std::int64_t tight) {
        std::int64_t node = num_leaves_ + tight;
        std::int32_t most = root_[tight] == kNone ? -1 : loose_[root_[tight]];
        while (node > 0 && most_loose_[node] != most) {
            most_loose_[node] = most;
            most = std::max(most, most_loose_[node ^ 1]);
            node /= 2;
        }
    }

    std::int64_t num_leaves_ = 1;
    std::vector<std::int32_t> most_loose_;  // of the packs below a node; -1 without any
    std::vector<std::uint32_t> root_;       // tight space -> its heap
    std::vector<std::int32_t> loose_;       // the rest: by pack
    std::vector<std::uint32_t> filled_at_, left_, right_;
};

struct Item {
    std::uint32_t number;
    std::int32_t tokens, patches;
};

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

// By decreasing tokens / token_capacity + patches / patch_capacity, then by decreasing tokens, then by number.
std::vector<Item> largest_first(const std::int64_t* tokens, const std::int64_t* patches, std::int64_t n,
                                std::int64_t token_capacity, std::int64_t patch_capacity) {
    struct Entry {
        std::uint64_t smallness;
        std::uint32_t fewer_tokens, number;
    };
    const std::int64_t divisor = std::gcd(token_capacity, patch_capacity);
    const std::int64_t token_weight = patch_capacity / divisor, patch_weight = token_capacity / divisor;
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

// The total over the capacity, rounded up.
std::int64_t packs_needed(const std::int64_t* costs, std::int64_t n, std::int64_t capacity, const char* unit) {
    std::int64_t total = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        if (static_cast<std::uint64_t>(costs[i]) > static_cast<std::uint64_t>(capacity))
            refuse(i, costs[i], capacity, unit);
        total += costs[i];
    }
    return (total + capacity - 1) / capacity;
}

}  // namespace

Offsets pack_two(const std::int64_t* tokens, const std::int64_t* patches, std::int64_t n,
                 std::int64_t token_capacity, std::int64_t patch_capacity, std::int64_t* items) {
    check_sizes(n, token_capacity, "tokens");
    check_sizes(n, patch_capacity, "patches");
    const std::int64_t token_packs = packs_needed(tokens, n, token_capacity, "tokens");
    const std::int64_t patch_packs = packs_needed(patches, n, patch_capacity, "patches");
    const bool patches_are_tight = patch_packs > token_packs;
    const std::int64_t tight_capacity = patches_are_tight ? patch_capacity : token_capacity;
    const std::int64_t loose_capacity = patches_are_tight ? token_capacity : patch_capacity;

    const std::vector<Item> order = largest_first(tokens, patches, n, token_capacity, patch_capacity);
    std::vector<std::uint32_t> pack_of(n);  // by place in `order`
    OpenPacks packs(tight_capacity);
    Offsets offsets{0};
    for (std::int64_t place = 0; place < n; ++place) {
        const Item& item = order[place];
        const std::int32_t tight = patches_are_tight ? item.patches : item.tokens;
        const std::int32_t loose = patches_are_tight ? item.tokens : item.patches;
        std::int64_t tight_space = packs.find(tight, loose);
        std::int64_t loose_space = loose_capacity;
        std::uint32_t pack;
        if (tight_space < 0) {
            tight_space = tight_capacity;
            pack = packs.open();
            offsets.push_back(0);
        } else {
            loose_space = packs.loose_of_best(tight_space);
            pack = packs.take_best(tight_space);
        }
        packs.put(pack, tight_space - tight, static_cast<std::int32_t>(loose_space - loose),
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
