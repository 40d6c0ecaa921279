// Packing that balances predicted cost: large samples spread over a fixed number of packs, small ones by best fit.
// Where that needs too many packs, or would, again with vision levelled above all, and at last plain best fit.
//
// The packs are the leaves of a binary tree. A large sample goes down it, at each fork to the half whose packs have the
// smaller mean excess, among the halves that seem to have room. So packs of every aligned group have nearly equal sums,
// and one fork is one comparison. What counts is a sample's *excess*: its cost beyond that of as many tokens of filler.
//
// Samples go by tokens, the longest first. What comes last, and what fills, goes to the neighbours of a very long sample;
// there a token's attention is dear and an image is welcome, so it should be the shortest samples, with their images.
#include "balance.hpp"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "open_packs.hpp"
#include "radix.hpp"

namespace packing {
namespace {

// Share of the binding cost that is kept to fill gaps with. Measured on 200,000 log-normal samples, mean over maximum of
// 256 ranks with four packs each, cost and vision: 10 % 0.989 and 0.948, 15 % 0.990 and 0.949, 25 % 0.991 and 0.947,
// 40 % 0.990 and 0.944. The fill is 0.9999 in all. Filler of the smallest size, as `fill` orders it, has hardly an image,
// and gives 0.990 and 0.945.
constexpr std::int64_t kFillerPercent = 15;
constexpr std::int64_t kToleratedFraction = 500;  // packs beyond the lower bound that are taken without another try
// Where the cost that does not bind needs so much of the lower bound, text is the filler. Measured with the shortest
// samples instead, where tokens bind: patches 52 % full, 3 packs of 50,000 beyond the lower bound; 58 %, over 0.2 % beyond
// it, as patches run out where there is room for tokens.
constexpr std::int64_t kTightPercent = 55;
// How much more vision counts in the second try. With patches 87 % full, packs of the first try are 0.5 to 1 % too many;
// 2 to 8 give the lower bound, and 8 the best balance.
constexpr std::int64_t kVisionEmphasis = 8;
constexpr std::int64_t kPollMask = (1 << 16) - 1;

struct Keyed {
    std::int64_t key;
    std::uint32_t number;
};

// By decreasing key; entries with equal keys keep their order.
void sort_largest_first(std::vector<Keyed>& entries) {
    std::int64_t largest = 0;
    for (const Keyed& one : entries) largest = std::max(largest, one.key);
    std::vector<Keyed> scratch(entries.size());
    const auto smallness = [=](const Keyed& one) { return static_cast<std::uint64_t>(largest - one.key); };
    radix_sort(entries, scratch, largest, smallness);
}

void sort_by_number(std::vector<Keyed>& entries) {
    std::vector<Keyed> scratch(entries.size());
    radix_sort(entries, scratch, ~std::uint32_t{0}, [](const Keyed& one) { return one.number; });
}

class PackTree {
  public:
    PackTree(std::int64_t num_packs, std::int64_t token_capacity, std::int64_t patch_capacity) {
        while (num_leaves_ < num_packs) num_leaves_ *= 2;
        nodes_.assign(2 * num_leaves_, Node{0, 0, -1, -1});
        for (std::int64_t pack = 0; pack < num_packs; ++pack)
            nodes_[num_leaves_ + pack] = {0, 1, static_cast<std::int32_t>(token_capacity),
                                          static_cast<std::int32_t>(patch_capacity)};
        for (std::int64_t node = num_leaves_ - 1; node > 0; --node) {
            nodes_[node].num_packs = nodes_[2 * node].num_packs + nodes_[2 * node + 1].num_packs;
            refresh_room(node);
        }
    }

    // The pack that takes the sample, or -1 where the way down ends before one with room for both its costs.
    std::int64_t put(std::int64_t tokens, std::int64_t patches, std::int64_t excess) {
        std::int64_t node = 1;
        if (!seems_to_hold(node, tokens, patches)) return -1;
        while (node < num_leaves_) {
            const bool left = seems_to_hold(2 * node, tokens, patches);
            const bool right = seems_to_hold(2 * node + 1, tokens, patches);
            if (!left && !right) return -1;
            const bool goes_right = !left || (right && is_lighter(nodes_[2 * node + 1], nodes_[2 * node]));
            node = 2 * node + goes_right;
        }
        const std::int64_t pack = node - num_leaves_;
        nodes_[node].tokens -= static_cast<std::int32_t>(tokens);
        nodes_[node].patches -= static_cast<std::int32_t>(patches);
        nodes_[node].excess += excess;
        for (node /= 2; node > 0; node /= 2) {
            nodes_[node].excess += excess;
            refresh_room(node);
        }
        return pack;
    }

    std::int32_t token_space(std::int64_t pack) const { return nodes_[num_leaves_ + pack].tokens; }
    std::int32_t patch_space(std::int64_t pack) const { return nodes_[num_leaves_ + pack].patches; }

  private:
    struct Node {
        std::int64_t excess;  // summed over its packs
        std::int32_t num_packs;
        std::int32_t tokens, patches;  // the largest space of its packs, each on its own
    };

    bool seems_to_hold(std::int64_t node, std::int64_t tokens, std::int64_t patches) const {
        return nodes_[node].tokens >= tokens && nodes_[node].patches >= patches;
    }

    static bool is_lighter(const Node& a, const Node& b) {
        if (a.num_packs == b.num_packs) return a.excess < b.excess;  // as most are: spares two divisions
        return static_cast<double>(a.excess) / a.num_packs < static_cast<double>(b.excess) / b.num_packs;
    }

    void refresh_room(std::int64_t node) {
        nodes_[node].tokens = std::max(nodes_[2 * node].tokens, nodes_[2 * node + 1].tokens);
        nodes_[node].patches = std::max(nodes_[2 * node].patches, nodes_[2 * node + 1].patches);
    }

    std::int64_t num_leaves_ = 1;
    std::vector<Node> nodes_;
};

class Balancer {
  public:
    Balancer(const Samples& samples, std::int64_t token_capacity, std::int64_t patch_capacity,
             std::int64_t vision_emphasis, const Poll& poll)
        : in_(samples),
          vision_emphasis_(vision_emphasis),
          token_capacity_(token_capacity),
          patch_capacity_(patch_capacity),
          poll_(poll) {
        const std::int64_t tokens = std::accumulate(in_.tokens, in_.tokens + in_.n, std::int64_t{0});
        const std::int64_t patches = std::accumulate(in_.patches, in_.patches + in_.n, std::int64_t{0});
        const std::int64_t by_tokens = (tokens + token_capacity - 1) / token_capacity;
        const std::int64_t by_patches = (patches + patch_capacity - 1) / patch_capacity;
        tokens_bind_ = by_tokens >= by_patches;
        binding_ = tokens_bind_ ? in_.tokens : in_.patches;
        wanted_filler_ = (tokens_bind_ ? tokens : patches) * kFillerPercent / 100;
        lower_bound_ = std::max({by_tokens, by_patches, std::int64_t{1}});
        other_bound_ = std::min(by_tokens, by_patches);
        is_tight_ = vision_emphasis_ > 0 || 100 * other_bound_ >= kTightPercent * lower_bound_;
    }

    Offsets pack(std::int64_t* items) {
        pack_of_.resize(in_.n);
        split();
        spread_large();
        fill();
        return write(items);
    }

    bool both_nearly_bind() const { return 5 * other_bound_ >= 4 * lower_bound_; }

    bool needs_too_many(const Offsets& offsets) const {
        return static_cast<std::int64_t>(offsets.size()) - 1 - lower_bound_ > lower_bound_ / kToleratedFraction;
    }

  private:
    std::int64_t size(std::int64_t i) const {  // the measure of pack_two
        return in_.tokens[i] * patch_capacity_ + 2 * in_.patches[i] * token_capacity_;
    }

    std::int64_t weighted(std::int64_t i) const { return in_.costs[i] + vision_emphasis_ * in_.vision_costs[i]; }

    // The samples with the fewest tokens are the filler, as many as were wanted. The others go by decreasing tokens. Where
    // patches are tight, text is the filler, since it fits where no patch does, and the others go by decreasing cost.
    void split() {
        std::vector<Keyed> order(in_.n);
        for (std::int64_t i = 0; i < in_.n; ++i) order[i] = {in_.tokens[i], static_cast<std::uint32_t>(i)};
        sort_largest_first(order);
        poll_();
        std::vector<char> is_filler(in_.n, 0);
        std::int64_t so_far = 0;
        const auto take_shortest = [&](bool with_patches) {
            for (std::int64_t place = in_.n; place-- > 0 && so_far < wanted_filler_;) {
                const std::uint32_t i = order[place].number;
                if (is_filler[i] || (!with_patches && in_.patches[i] > 0)) continue;
                is_filler[i] = 1;
                so_far += binding_[i];
            }
        };
        if (tokens_bind_ && is_tight_) take_shortest(false);
        take_shortest(true);
        for (std::uint32_t i = 0; i < in_.n; ++i) {
            if (is_filler[i])
                filler_.push_back({size(i), i});
            else
                large_.push_back({is_tight_ ? in_.costs[i] : in_.tokens[i], i});
        }
        sort_largest_first(large_);
    }

    void spread_large() {
        // At most the mean of all samples, so that sums of excess are within the sum of costs, and exact in double.
        std::int64_t tokens = 0, cost = 0, all_tokens = 0, all_cost = 0;
        for (const Keyed& one : filler_) tokens += in_.tokens[one.number], cost += weighted(one.number);
        for (std::int64_t i = 0; i < in_.n; ++i) all_tokens += in_.tokens[i], all_cost += weighted(i);
        const std::int64_t per_token = tokens ? std::min(cost / tokens, all_cost / all_tokens) : 0;

        PackTree tree(lower_bound_, token_capacity_, patch_capacity_);
        for (std::size_t place = 0; place < large_.size(); ++place) {
            if ((place & kPollMask) == 0) poll_();
            const std::uint32_t i = large_[place].number;
            const std::int64_t excess = weighted(i) - per_token * in_.tokens[i];
            const std::int64_t pack = tree.put(in_.tokens[i], in_.patches[i], excess);
            pack_of_[i] = static_cast<std::uint32_t>(pack);
            if (pack < 0) filler_.push_back({size(i), i});
        }
        spaces_.reserve(lower_bound_);
        for (std::int64_t pack = 0; pack < lower_bound_; ++pack)
            spaces_.push_back({tree.token_space(pack), tree.patch_space(pack)});
    }

    // Best fit, largest first, in the cost that binds; what fits nowhere opens a pack.
    void fill() {
        sort_by_number(filler_);
        sort_largest_first(filler_);
        const std::int64_t capacity = tokens_bind_ ? token_capacity_ : patch_capacity_;
        const std::int64_t other_capacity = tokens_bind_ ? patch_capacity_ : token_capacity_;
        const std::int64_t* others = tokens_bind_ ? in_.patches : in_.tokens;
        OpenPacks packs(capacity);
        std::uint32_t now = 0;
        for (auto [tokens, patches] : spaces_) {
            if (!tokens_bind_) std::swap(tokens, patches);
            packs.put(packs.open(), tokens, patches, now++);
        }
        for (std::size_t place = 0; place < filler_.size(); ++place) {
            if ((place & kPollMask) == 0) poll_();
            const std::uint32_t i = filler_[place].number;
            std::int64_t space = packs.find(binding_[i], static_cast<std::int32_t>(others[i]));
            std::int64_t other_space = other_capacity;
            std::uint32_t pack;
            if (space < 0) {
                space = capacity;
                pack = packs.open();
            } else {
                other_space = packs.patches_of_best(space);
                pack = packs.take_best(space);
            }
            packs.put(pack, space - binding_[i], static_cast<std::int32_t>(other_space - others[i]), now++);
            pack_of_[i] = pack;
        }
        num_packs_ = packs.size();
    }

    Offsets write(std::int64_t* items) const {
        Offsets offsets(num_packs_ + 1, 0);
        for (const std::uint32_t pack : pack_of_) ++offsets[pack + 1];
        std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
        std::vector<std::int64_t> cursor(offsets.begin(), offsets.end() - 1);
        for (std::int64_t i = 0; i < in_.n; ++i) items[cursor[pack_of_[i]]++] = i;
        return offsets;
    }

    const Samples& in_;
    const std::int64_t vision_emphasis_;
    const std::int64_t token_capacity_, patch_capacity_;
    const Poll& poll_;
    bool tokens_bind_, is_tight_;
    const std::int64_t* binding_;
    std::int64_t wanted_filler_, lower_bound_, other_bound_, num_packs_ = 0;
    std::vector<Keyed> large_, filler_;
    std::vector<std::pair<std::int32_t, std::int32_t>> spaces_;  // tokens and patches left after the large samples
    std::vector<std::uint32_t> pack_of_;
};

}  // namespace

Offsets pack_balanced(const Samples& samples, std::int64_t token_capacity, std::int64_t patch_capacity,
                      std::int64_t* items, const Poll& poll) {
    check_sizes(samples.n, token_capacity, "tokens");
    check_sizes(samples.n, patch_capacity, "patches");
    check_costs(samples.tokens, samples.n, token_capacity, "tokens");
    check_costs(samples.patches, samples.n, patch_capacity, "patches");
    check_total(samples.costs, samples.n, "costs");
    check_total(samples.vision_costs, samples.n, "vision costs");
    if (samples.n == 0) return {0};
    Offsets best;
    std::vector<std::int64_t> tried(samples.n);
    const auto keep = [&](Offsets offsets) {
        if (!best.empty() && offsets.size() >= best.size()) return;
        best = std::move(offsets);
        std::copy(tried.begin(), tried.end(), items);
    };
    for (const std::int64_t emphasis : {std::int64_t{0}, kVisionEmphasis}) {
        Balancer balancer(samples, token_capacity, patch_capacity, emphasis, poll);
        if (emphasis == 0 && balancer.both_nearly_bind()) continue;
        keep(balancer.pack(tried.data()));
        if (!balancer.needs_too_many(best)) return best;
    }
    keep(pack_two(samples.tokens, samples.patches, samples.n, token_capacity, patch_capacity, tried.data()));
    return best;
}

}  // namespace packing
