// The packs of a step to ranks, equally many each: longest processing time first, then swaps.
//
// A rank's potential is steep_cost^16 + steep_vision^16, where both are 1 at the mean and 2 at an excess of 1 % of
// cost, or of 6 % of vision cost; a swap of two packs is proposed at random and kept if the sum of potentials falls. A
// least maximum as the aim would end at the first rank that cannot be helped, and leave all others as they are.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <queue>
#include <utility>
#include <vector>

#include "balance.hpp"

namespace packing {
namespace {

constexpr double kCostSteepness = 100, kVisionSteepness = 16;
class Random {  // a linear congruential generator (Knuth's MMIX); its high bits are good enough to propose swaps
  public:
    std::int64_t below(std::int64_t bound) {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return static_cast<std::int64_t>(((state_ >> 32) * static_cast<std::uint64_t>(bound)) >> 32);
    }

  private:
    std::uint64_t state_ = 1;
};

double sixteenth_power(double excess) {
    if (excess <= 0) return 0;
    const double square = excess * excess, fourth = square * square, eighth = fourth * fourth;
    return eighth * eighth;
}

double potential(double cost, double vision) {
    return sixteenth_power(cost - (kCostSteepness - 1)) + sixteenth_power(vision - (kVisionSteepness - 1));
}

// Costs in units of which a mean rank has `steepness`.
std::vector<double> scaled(const std::int64_t* costs, std::int64_t n, std::int64_t num_ranks, double steepness) {
    const std::int64_t total = std::accumulate(costs, costs + n, std::int64_t{0});
    const double mean = static_cast<double>(std::max<std::int64_t>(total, 1)) / static_cast<double>(num_ranks);
    const double unit = mean / steepness;
    std::vector<double> values(n);
    for (std::int64_t i = 0; i < n; ++i) values[i] = static_cast<double>(costs[i]) / unit;
    return values;
}

}  // namespace

void deal(const std::int64_t* costs, const std::int64_t* vision_costs, std::int64_t n, std::int64_t num_ranks,
          std::int64_t proposals_per_pack, std::int64_t* rank_of, const Poll& poll) {
    if (num_ranks < 1 || n % num_ranks)
        throw std::invalid_argument(std::to_string(n) + " packs cannot be dealt equally to " +
                                    std::to_string(num_ranks) + " ranks");
    check_total(costs, n, "costs");
    check_total(vision_costs, n, "vision costs");
    const std::int64_t each = n / num_ranks;
    const std::vector<double> cost = scaled(costs, n, num_ranks, kCostSteepness);
    const std::vector<double> vision = scaled(vision_costs, n, num_ranks, kVisionSteepness);

    std::vector<std::int64_t> order(n), num_held(num_ranks, 0);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [=](std::int64_t a, std::int64_t b) { return costs[a] > costs[b]; });
    std::vector<double> cost_of(num_ranks, 0.0), vision_of(num_ranks, 0.0);
    using Entry = std::pair<double, std::int64_t>;
    std::priority_queue<Entry, std::vector<Entry>, std::greater<>> least;
    for (std::int64_t rank = 0; rank < num_ranks; ++rank) least.push({0.0, rank});
    for (const std::int64_t pack : order) {
        const std::int64_t rank = least.top().second;
        least.pop();
        rank_of[pack] = rank;
        cost_of[rank] += cost[pack];
        vision_of[rank] += vision[pack];
        if (++num_held[rank] < each) least.push({cost_of[rank], rank});
    }
    if (num_ranks == 1 || each == 1) return;

    std::vector<double> now(num_ranks);
    for (std::int64_t rank = 0; rank < num_ranks; ++rank) now[rank] = potential(cost_of[rank], vision_of[rank]);
    Random random;
    for (std::int64_t proposal = 0; proposal < proposals_per_pack * n; ++proposal) {
        if ((proposal & ((1 << 16) - 1)) == 0) poll();
        const std::int64_t one = random.below(n), two = random.below(n);
        const std::int64_t a = rank_of[one], b = rank_of[two];
        if (a == b) continue;
        const double more_cost = cost[two] - cost[one], more_vision = vision[two] - vision[one];
        const double a_then = potential(cost_of[a] + more_cost, vision_of[a] + more_vision);
        const double b_then = potential(cost_of[b] - more_cost, vision_of[b] - more_vision);
        if (a_then + b_then >= now[a] + now[b]) continue;
        std::swap(rank_of[one], rank_of[two]);
        cost_of[a] += more_cost;
        cost_of[b] -= more_cost;
        vision_of[a] += more_vision;
        vision_of[b] -= more_vision;
        now[a] = a_then;
        now[b] = b_then;
    }
}

}  // namespace packing
