#include "taps.hpp"

#include <algorithm>
#include <cmath>

namespace pixels {
namespace {

double bicubic(double x) {
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

}  // namespace

// Pillow's precompute_coeffs and normalize_coeffs_8bpc, operation by operation.
Taps taps(std::int64_t in_size, std::int64_t out_size) {
    const double scale = static_cast<double>(in_size) / out_size;
    const double filter_scale = std::max(scale, 1.0), support = 2.0 * filter_scale;
    Taps result;
    result.most = static_cast<std::int64_t>(std::ceil(support)) * 2 + 1;
    result.first.resize(out_size);
    result.count.resize(out_size);
    result.weights.resize(out_size * result.most);
    std::vector<double> exact(result.most);
    for (std::int64_t output = 0; output < out_size; ++output) {
        const double center = (output + 0.5) * scale;
        const double inverse = 1.0 / filter_scale;
        const std::int64_t first = std::max<std::int64_t>(static_cast<std::int64_t>(center - support + 0.5), 0);
        const std::int64_t end = std::min(static_cast<std::int64_t>(center + support + 0.5), in_size);
        double total = 0.0;
        for (std::int64_t tap = 0; tap < end - first; ++tap) {
            exact[tap] = bicubic((tap + first - center + 0.5) * inverse);
            total += exact[tap];
        }
        for (std::int64_t tap = 0; tap < end - first; ++tap) {
            const double weight = (total != 0.0 ? exact[tap] / total : exact[tap]) * (1 << kPrecision);
            result.weights[output * result.most + tap] = static_cast<std::int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        result.first[output] = first;
        result.count[output] = end - first;
    }
    return result;
}

}  // namespace pixels
