// What Pillow's bicubic resize weighs, along one axis.
#pragma once

#include <cstdint>
#include <vector>

namespace pixels {

constexpr int kPrecision = 32 - 8 - 2;  // fractional bits of a weight, which lies within +-2
constexpr std::int32_t kHalf = 1 << (kPrecision - 1);

// The inputs and weights of every output: `weights[output * most + tap]` is that of input `first[output] + tap`.
struct Taps {
    std::int64_t most = 0;  // the room for the weights of each output
    std::vector<std::int64_t> first, count;
    std::vector<std::int32_t> weights;

    std::int64_t outputs() const { return first.size(); }
    const std::int32_t* weights_of(std::int64_t output) const { return &weights[output * most]; }
};

// Pillow's precompute_coeffs and normalize_coeffs_8bpc, operation by operation.
Taps taps(std::int64_t in_size, std::int64_t out_size);

}  // namespace pixels
