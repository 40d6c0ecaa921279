// One capacity: exact best fit decreasing on the histogram of lengths.
//
// Best fit puts an item of length L into the pack with the smallest remaining space r >= L. While r - L >= L that same
// pack is the best fit for the next item of length L, because no other pack had its space in [L, r). So a pack takes
// min(items left, r / L) equal items in one step, and the order of the items is only needed to write them out.
// Measured: 1,000,000 lognormal lengths need about 110,000 steps.
#include <algorithm>

#include "packing.hpp"

namespace packing {
namespace {

// The set of remaining spaces that some pack has: 64-way bitmaps, each level marking the non-empty words below.
class SpaceSet {
  public:
    explicit SpaceSet(std::int64_t size) {
        do {
            size = (size + 63) / 64;
            levels_.emplace_back(size, 0);
        } while (size > 1);
    }

    void insert(std::int64_t value) {
        for (auto& words : levels_) {
            words[value >> 6] |= std::uint64_t{1} << (value & 63);
            value >>= 6;
        }
    }

    void erase(std::int64_t value) {
        for (auto& words : levels_) {
            words[value >> 6] &= ~(std::uint64_t{1} << (value & 63));
            if (words[value >> 6] != 0) return;
            value >>= 6;
        }
    }

    // The smallest member that is at least `value`, or -1.
    std::int64_t at_least(std::int64_t value) const {
        for (std::size_t level = 0; level < levels_.size(); ++level) {
            const std::int64_t word = value >> 6;
            if (word >= static_cast<std::int64_t>(levels_[level].size())) return -1;
            const std::uint64_t rest = levels_[level][word] >> (value & 63);
            if (rest != 0) {
                value += __builtin_ctzll(rest);
                while (level-- > 0) value = (value << 6) + __builtin_ctzll(levels_[level][value]);
                return value;
            }
            value = word + 1;
        }
        return -1;
    }

  private:
    std::vector<std::vector<std::uint64_t>> levels_;
};

struct Run {  // the next `count` items, in decreasing order of length, go into `pack`
    std::uint32_t pack;
    std::uint32_t count;
};

constexpr std::uint32_t kNone = ~std::uint32_t{0};

// The runs in decreasing order of length, and in `num_items` the number of items of each pack.
std::vector<Run> best_fit(const std::vector<std::uint32_t>& histogram, std::vector<std::uint32_t>& num_items) {
    const std::int64_t capacity = static_cast<std::int64_t>(histogram.size()) - 1;
    SpaceSet spaces(capacity + 1);
    std::vector<std::uint32_t> last_with(capacity + 1, kNone);  // of the packs with this space, the one filled last
    std::vector<std::uint32_t> previous;                        // pack -> the one with the same space filled before it
    std::vector<Run> runs;

    for (std::int64_t length = capacity; length >= 0; --length) {
        std::uint32_t left = histogram[length];
        while (left > 0) {
            std::int64_t space = spaces.at_least(length);
            std::uint32_t pack;
            if (space < 0) {
                space = capacity;
                pack = static_cast<std::uint32_t>(previous.size());
                previous.push_back(kNone);
                num_items.push_back(0);
            } else {
                pack = last_with[space];
                last_with[space] = previous[pack];
                if (last_with[space] == kNone) spaces.erase(space);
            }
            const std::uint32_t count =
                length == 0 ? left : static_cast<std::uint32_t>(std::min<std::int64_t>(left, space / length));
            space -= count * length;
            left -= count;
            num_items[pack] += count;
            runs.push_back({pack, count});
            if (last_with[space] == kNone) spaces.insert(space);
            previous[pack] = last_with[space];
            last_with[space] = pack;
        }
    }
    return runs;
}

}  // namespace

Offsets pack_one(const std::int64_t* lengths, std::int64_t n, std::int64_t capacity, std::int64_t* items) {
    check_sizes(n, capacity, "tokens");
    std::vector<std::uint32_t> histogram(capacity + 1, 0);
    for (std::int64_t i = 0; i < n; ++i) {
        if (static_cast<std::uint64_t>(lengths[i]) > static_cast<std::uint64_t>(capacity))
            refuse(i, lengths[i], capacity, "tokens");
        ++histogram[lengths[i]];
    }

    std::vector<std::uint32_t> num_items;
    const std::vector<Run> runs = best_fit(histogram, num_items);

    Offsets offsets(num_items.size() + 1, 0);
    for (std::size_t pack = 0; pack < num_items.size(); ++pack) offsets[pack + 1] = offsets[pack] + num_items[pack];

    // Counting sort: longest first, equal lengths by item number.
    std::uint32_t place = 0;
    for (std::int64_t length = capacity; length >= 0; --length) {
        const std::uint32_t count = histogram[length];
        histogram[length] = place;
        place += count;
    }
    std::vector<std::uint32_t> sorted(n);
    for (std::int64_t i = 0; i < n; ++i) sorted[histogram[lengths[i]]++] = static_cast<std::uint32_t>(i);

    std::vector<std::int64_t> cursor(offsets.begin(), offsets.end() - 1);
    const std::uint32_t* next = sorted.data();
    for (const Run& run : runs) {
        std::int64_t& to = cursor[run.pack];
        for (std::uint32_t k = 0; k < run.count; ++k) items[to++] = *next++;
    }
    return offsets;
}

}  // namespace packing
