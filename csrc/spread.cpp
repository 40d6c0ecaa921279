// Longest processing time first, then moves and swaps away from the most loaded rank.
//
// A move is a swap with an empty place of cost 0, which every rank has. Taking d = cost(p) - cost(q) from a rank with
// `gap` more than the other leaves the larger of the two at half of (sum + |2 d - gap|), so the best partner q of a
// piece p is the one whose cost is nearest to cost(p) - gap / 2: one search in the other rank's sorted pieces.
#include "spread.hpp"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace packing {
namespace {

struct Piece {
    std::int64_t cost, number;
    bool operator<(const Piece& other) const {
        return std::tie(cost, number) < std::tie(other.cost, other.number);
    }
};

constexpr std::int64_t kEmptyPlace = -1;
constexpr std::int64_t kGoodEnough = 1000;  // refining ends where the most loaded rank is within 1 / 1000 of the mean

struct Swap {
    std::int64_t twice_larger;  // of the two loads afterwards; then what decides between equals
    std::int64_t rank;
    std::int64_t taken_number;
    Piece given;
    std::int64_t taken_cost;
    bool operator<(const Swap& other) const {
        return std::tie(twice_larger, rank, taken_number, given) <
               std::tie(other.twice_larger, other.rank, other.taken_number, other.given);
    }
};

using Held = std::vector<Piece>;  // sorted; the first is the empty place

void insert(Held& held, Piece piece) {
    if (piece.number != kEmptyPlace) held.insert(std::lower_bound(held.begin(), held.end(), piece), piece);
}

void erase(Held& held, Piece piece) {
    if (piece.number != kEmptyPlace) held.erase(std::lower_bound(held.begin(), held.end(), piece));
}

// The best swap that lowers the most loaded rank; false where there is none.
bool find_swap(const std::vector<Held>& held, const std::vector<std::int64_t>& loads, std::int64_t heavy, Swap& best) {
    bool is_found = false;
    const auto offer = [&](std::int64_t rank, std::int64_t gap, const Piece& taken, const Piece& given) {
        const std::int64_t off = std::abs(2 * (taken.cost - given.cost) - gap);
        if (off >= gap) return;  // the larger load would not fall
        const Swap swap{loads[heavy] + loads[rank] + off, rank, taken.number, given, taken.cost};
        if (!is_found || swap < best) best = swap;
        is_found = true;
    };
    const auto by_twice_cost = [](const Piece& piece, std::int64_t twice) { return 2 * piece.cost < twice; };
    const auto by_cost = [](const Piece& piece, std::int64_t cost) { return piece.cost < cost; };
    for (std::int64_t rank = 0; rank < static_cast<std::int64_t>(held.size()); ++rank) {
        const std::int64_t gap = loads[heavy] - loads[rank];
        if (gap <= 0) continue;
        const Held& other = held[rank];
        for (const Piece& taken : held[heavy]) {
            if (taken.number == kEmptyPlace) continue;
            const std::int64_t wanted = 2 * taken.cost - gap;  // twice the cost of the ideal partner
            const auto above = std::lower_bound(other.begin(), other.end(), wanted, by_twice_cost);
            if (above != other.end()) offer(rank, gap, taken, *above);
            if (above != other.begin())
                offer(rank, gap, taken, *std::lower_bound(other.begin(), above, (above - 1)->cost, by_cost));
        }
    }
    return is_found;
}

void refine(const std::int64_t* costs, std::int64_t n, std::vector<std::int64_t>& loads, std::int64_t* rank_of) {
    const std::int64_t num_ranks = static_cast<std::int64_t>(loads.size());
    const std::int64_t total = std::accumulate(loads.begin(), loads.end(), std::int64_t{0});
    std::vector<Held> held(num_ranks, Held{{0, kEmptyPlace}});
    for (std::int64_t i = 0; i < n; ++i) held[rank_of[i]].push_back({costs[i], i});
    for (Held& one : held) std::sort(one.begin(), one.end());

    for (std::int64_t step = 0; step < n; ++step) {
        const std::int64_t heavy = std::max_element(loads.begin(), loads.end()) - loads.begin();
        Swap swap;
        if (loads[heavy] * num_ranks - total <= total / kGoodEnough || !find_swap(held, loads, heavy, swap)) return;
        const Piece taken{swap.taken_cost, swap.taken_number};
        erase(held[heavy], taken);
        erase(held[swap.rank], swap.given);
        insert(held[heavy], swap.given);
        insert(held[swap.rank], taken);
        loads[heavy] -= taken.cost - swap.given.cost;
        loads[swap.rank] += taken.cost - swap.given.cost;
        rank_of[taken.number] = swap.rank;
        if (swap.given.number != kEmptyPlace) rank_of[swap.given.number] = heavy;
    }
}

}  // namespace

void spread(const std::int64_t* costs, std::int64_t n, std::int64_t num_ranks, std::int64_t* rank_of) {
    if (num_ranks < 1) throw std::invalid_argument(std::to_string(num_ranks) + " ranks; at least 1 is needed");
    std::int64_t total = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        if (costs[i] < 0 || costs[i] > kMaxSpread / num_ranks - total)
            throw std::invalid_argument("piece " + std::to_string(i) + " costs " + std::to_string(costs[i]) +
                                        "; costs must not be negative, nor their sum times ranks above 2^60");
        total += costs[i];
    }

    std::vector<std::int64_t> order(n), loads(num_ranks, 0);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [=](std::int64_t a, std::int64_t b) { return costs[a] > costs[b]; });
    for (const std::int64_t i : order) {
        rank_of[i] = std::min_element(loads.begin(), loads.end()) - loads.begin();
        loads[rank_of[i]] += costs[i];
    }
    refine(costs, n, loads, rank_of);
}

}  // namespace packing
