// Packs that are not full yet, for best fit under two costs. Plain C++17.
//
// "Tokens" are the cost that decides what fits best, "patches" the other one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace packing {

constexpr std::uint32_t kNone = ~std::uint32_t{0};

// All packs, by the token space they have left. Those with equal token space form a skew heap whose root has the most
// patch space, and of those with equal patch space is the one filled last.
class OpenPacks {
  public:
    explicit OpenPacks(std::int64_t token_capacity) : root_(token_capacity + 1, kNone) {
        while (num_leaves_ <= token_capacity) num_leaves_ *= 2;
        most_patches_.assign(2 * num_leaves_, -1);
    }

    std::uint32_t open() {
        patches_.push_back(0);
        filled_at_.push_back(0);
        left_.push_back(kNone);
        right_.push_back(kNone);
        return static_cast<std::uint32_t>(patches_.size() - 1);
    }

    std::int64_t size() const { return static_cast<std::int64_t>(patches_.size()); }

    // The least token space >= `tokens` at which a pack has patch space >= `patches`, or -1.
    std::int64_t find(std::int64_t tokens, std::int32_t patches) const {
        std::int64_t node = num_leaves_ + tokens;
        while (most_patches_[node] < patches) {
            while (node & 1) node /= 2;  // a right child: nothing further right below its parent
            if (node == 0) return -1;
            ++node;
        }
        while (node < num_leaves_) node = 2 * node + (most_patches_[2 * node] < patches);
        return node - num_leaves_;
    }

    std::int32_t patches_of_best(std::int64_t tokens) const { return patches_[root_[tokens]]; }

    std::uint32_t take_best(std::int64_t tokens) {
        const std::uint32_t pack = root_[tokens];
        root_[tokens] = merge(left_[pack], right_[pack]);
        refresh(tokens);
        return pack;
    }

    void put(std::uint32_t pack, std::int64_t tokens, std::int32_t patches, std::uint32_t now) {
        patches_[pack] = patches;
        filled_at_[pack] = now;
        left_[pack] = right_[pack] = kNone;
        root_[tokens] = merge(root_[tokens], pack);
        refresh(tokens);
    }

  private:
    bool before(std::uint32_t a, std::uint32_t b) const {
        return patches_[a] != patches_[b] ? patches_[a] > patches_[b] : filled_at_[a] > filled_at_[b];
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

    void refresh(std::int64_t tokens) {
        std::int64_t node = num_leaves_ + tokens;
        std::int32_t most = root_[tokens] == kNone ? -1 : patches_[root_[tokens]];
        while (node > 0 && most_patches_[node] != most) {
            most_patches_[node] = most;
            most = std::max(most, most_patches_[node ^ 1]);
            node /= 2;
        }
    }

    std::int64_t num_leaves_ = 1;
    std::vector<std::int32_t> most_patches_;  // of the packs below a node; -1 without any
    std::vector<std::uint32_t> root_;         // token space -> its heap
    std::vector<std::int32_t> patches_;       // the rest: by pack
    std::vector<std::uint32_t> filled_at_, left_, right_;
};

}  // namespace packing
