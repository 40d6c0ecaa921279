// How it goes fast: both passes are sums of rows of bytes, each times one weight, so both vectorise. For the horizontal
// pass 16 rows at a time are transposed, so that what was one column's value in 16 rows lies side by side, and its
// results are turned back, one plane a channel. What lies between the passes is a few rows, in the cache. The weighing
// itself is there three times, for any processor, for AVX2 and for AVX-512's products of bytes; it is all integers, so
// that all give the same.
#include "resize.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __x86_64__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 says so of its own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace pixels {
namespace {

constexpr int kPrecision = 32 - 8 - 2;   // fractional bits of a weight
constexpr std::int32_t kHalf = 1 << (kPrecision - 1);
constexpr std::int64_t kRows = 16;       // rows that are transposed together
constexpr std::int64_t kChannels = 3;
constexpr std::int64_t kLanes = kRows * kChannels;  // bytes that are weighed together, in both passes

// The inputs and weights of every output along one axis.
struct Taps {
    std::int64_t most = 0;  // the room for the weights of each output
    std::vector<std::int64_t> first, count;
    std::vector<std::int32_t> weights;
    // The weights again, of four taps at a time, as signed digits to the base 256: the four last digits side by side in
    // one word, then the four before them, then the four first. (A weight lies within +-2 and has 22 fractional bits.)
    std::vector<std::int32_t> digits;

    std::int64_t fours() const { return (most + 3) / 4; }
    const std::int32_t* weights_of(std::int64_t output) const { return &weights[output * most]; }
    const std::int32_t* digits_of(std::int64_t output) const { return &digits[output * fours() * 3]; }
};

double bicubic(double x) {
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

void write_digits(Taps& taps) {
    const std::int64_t outputs = taps.first.size();
    taps.digits.resize(outputs * taps.fours() * 3);
    auto* bytes = reinterpret_cast<std::int8_t*>(taps.digits.data());
    for (std::int64_t output = 0; output < outputs; ++output)
        for (std::int64_t tap = 0; tap < taps.most; ++tap) {
            std::int32_t rest = taps.weights[output * taps.most + tap];
            for (int place = 0; place < 3; ++place) {
                const auto digit = static_cast<std::int8_t>(rest & 0xff);
                bytes[((output * taps.fours() + tap / 4) * 3 + place) * 4 + tap % 4] = digit;
                rest = (rest - digit) >> 8;
            }
        }
}

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
    write_digits(result);
    return result;
}

#ifdef __x86_64__
using Row = __m128i;
inline Row load(const std::uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const Row*>(from)); }
inline void store(Row row, std::uint8_t* to) { _mm_storeu_si128(reinterpret_cast<Row*>(to), row); }
inline Row low_halves(Row a, Row b) { return _mm_unpacklo_epi8(a, b); }
inline Row high_halves(Row a, Row b) { return _mm_unpackhi_epi8(a, b); }
#else
using Row = std::array<std::uint8_t, 16>;
inline Row load(const std::uint8_t* from) {
    Row row;
    std::memcpy(row.data(), from, 16);
    return row;
}
inline void store(Row row, std::uint8_t* to) { std::memcpy(to, row.data(), 16); }
inline Row shuffled(const Row& a, const Row& b, int half) {
    Row row;
    for (int i = 0; i < 8; ++i) row[2 * i] = a[half + i], row[2 * i + 1] = b[half + i];
    return row;
}
inline Row low_halves(const Row& a, const Row& b) { return shuffled(a, b, 0); }
inline Row high_halves(const Row& a, const Row& b) { return shuffled(a, b, 8); }
#endif

// Four perfect shuffles of 256 bytes swap the two halves of their 8-bit places: the transpose of 16 x 16.
void transpose(const std::uint8_t* in, std::int64_t in_stride, std::uint8_t* out, std::int64_t out_stride) {
    Row rows[2][16];
#pragma GCC unroll 16
    for (int row = 0; row < 16; ++row) rows[0][row] = load(in + row * in_stride);
#pragma GCC unroll 4
    for (int round = 0; round < 4; ++round)
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const Row a = rows[round % 2][i], b = rows[round % 2][i + 8];
            rows[1 - round % 2][2 * i] = low_halves(a, b);
            rows[1 - round % 2][2 * i + 1] = high_halves(a, b);
        }
#pragma GCC unroll 16
    for (int row = 0; row < 16; ++row) store(rows[0][row], out + row * out_stride);
}

// kLanes bytes of one output: the weighted sums of as many columns of rows, which begin at `rows[tap] + offset`.
void weigh_portably(const std::uint8_t* const* rows, std::int64_t offset, const Taps& taps, std::int64_t output,
                    std::uint8_t* out) {
    const std::int32_t* weights = taps.weights_of(output);
    std::int32_t sums[kLanes];
    std::fill_n(sums, kLanes, kHalf);
    for (std::int64_t tap = 0; tap < taps.count[output]; ++tap)
        for (std::int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += rows[tap][offset + lane] * weights[tap];
    for (std::int64_t lane = 0; lane < kLanes; ++lane)
        out[lane] = static_cast<std::uint8_t>(std::clamp(sums[lane] >> kPrecision, 0, 255));
}

#ifdef __x86_64__
__attribute__((target("avx2"))) void weigh_by_avx2(const std::uint8_t* const* rows, std::int64_t offset,
                                                   const Taps& taps, std::int64_t output, std::uint8_t* out) {
    const std::int32_t* weights = taps.weights_of(output);
    __m256i sums[kLanes / 8];
    for (auto& one : sums) one = _mm256_set1_epi32(kHalf);
    for (std::int64_t tap = 0; tap < taps.count[output]; ++tap) {
        const std::uint8_t* from = rows[tap] + offset;
        const __m256i weight = _mm256_set1_epi32(weights[tap]);
        for (std::int64_t i = 0; i < kLanes / 8; ++i) {
            const __m256i values = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i)));
            sums[i] = _mm256_add_epi32(sums[i], _mm256_mullo_epi32(values, weight));
        }
    }
    for (std::int64_t i = 0; i < kLanes / 8; i += 2) {
        const __m256i first = _mm256_srai_epi32(sums[i], kPrecision), second = _mm256_srai_epi32(sums[i + 1], kPrecision);
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0b11011000);
        const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8 * i), bytes);
    }
}

// Four taps of a lane lie in one word, and one instruction adds their products with one digit each of four weights.
__attribute__((target("avx512bw,avx512vnni"))) void weigh_by_avx512(const std::uint8_t* const* rows,
                                                                    std::int64_t offset, const Taps& taps,
                                                                    std::int64_t output, std::uint8_t* out) {
    constexpr __mmask64 lanes = (__mmask64{1} << kLanes) - 1;
    const std::int32_t* digits = taps.digits_of(output);
    const std::int64_t last = taps.count[output] - 1;
    __m512i sums[3][4];  // by place of the digit and quarter of the lanes
    for (auto& place : sums)
        for (auto& one : place) one = _mm512_setzero_si512();
    for (std::int64_t tap = 0; tap <= last; tap += 4, digits += 3) {
        __m512i row[4];
        for (std::int64_t i = 0; i < 4; ++i)  // taps beyond the last have the weight 0
            row[i] = _mm512_maskz_loadu_epi8(lanes, rows[std::min(tap + i, last)] + offset);
        const __m512i pairs[4] = {_mm512_unpacklo_epi8(row[0], row[1]), _mm512_unpacklo_epi8(row[2], row[3]),
                                  _mm512_unpackhi_epi8(row[0], row[1]), _mm512_unpackhi_epi8(row[2], row[3])};
        const __m512i fours[4] = {_mm512_unpacklo_epi16(pairs[0], pairs[1]), _mm512_unpackhi_epi16(pairs[0], pairs[1]),
                                  _mm512_unpacklo_epi16(pairs[2], pairs[3]), _mm512_unpackhi_epi16(pairs[2], pairs[3])};
        for (std::int64_t place = 0; place < 3; ++place)
            for (std::int64_t i = 0; i < 4; ++i)
                sums[place][i] = _mm512_dpbusd_epi32(sums[place][i], fours[i], _mm512_set1_epi32(digits[place]));
    }
    __m512i whole[4];
    for (std::int64_t i = 0; i < 4; ++i) {
        const __m512i upper = _mm512_add_epi32(sums[1][i], _mm512_slli_epi32(sums[2][i], 8));
        whole[i] = _mm512_add_epi32(_mm512_add_epi32(sums[0][i], _mm512_set1_epi32(kHalf)), _mm512_slli_epi32(upper, 8));
        whole[i] = _mm512_srai_epi32(whole[i], kPrecision);
    }
    const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(whole[0], whole[1]), _mm512_packs_epi32(whole[2], whole[3]));
    _mm512_mask_storeu_epi8(out, lanes, bytes);
}
#endif

using Weigh = decltype(&weigh_portably);

struct Way {
    const char* name;
    Weigh weigh;
};

// Those that run here, the fastest first.
std::vector<Way> ways() {
    std::vector<Way> found;
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni"))
        found.push_back({"avx512", weigh_by_avx512});
    if (__builtin_cpu_supports("avx2")) found.push_back({"avx2", weigh_by_avx2});
#endif
    found.push_back({"portable", weigh_portably});
    return found;
}

Weigh weigh_by(const std::string& name) {
    for (const Way& way : ways())
        if (name.empty() || name == way.name) return way.weigh;
    throw std::invalid_argument("no resize by " + name + " on this processor");
}

std::int64_t rounded_up(std::int64_t value, std::int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The horizontal pass of 16 rows, or fewer, of interleaved channels into one plane a channel.
class Across {
  public:
    Across(const Taps& taps, std::int64_t in_width, Weigh weigh)
        : taps_(taps),
          weigh_(weigh),
          bytes_(in_width * kChannels),
          turned_(rounded_up(bytes_, kRows) * kRows),
          narrowed_(rounded_up(width(), kRows) * kLanes),
          columns_(in_width) {
        for (std::int64_t x = 0; x < in_width; ++x) columns_[x] = &turned_[x * kLanes];
    }

    std::int64_t width() const { return taps_.first.size(); }

    // `plane` points at the first row of a channel's 16, each with room for a multiple of 16 bytes.
    template <typename Plane>
    void run(const std::uint8_t* rows, std::int64_t in_stride, std::int64_t num_rows, Plane plane,
             std::int64_t out_stride) {
        for (std::int64_t column = 0; column < bytes_; column += kRows) {
            const std::int64_t columns = std::min(kRows, bytes_ - column);
            if (num_rows == kRows && columns == kRows) {
                transpose(rows + column, in_stride, &turned_[column * kRows], kRows);
                continue;
            }
            std::uint8_t block[kRows * kRows] = {};  // beyond the border is nothing
            for (std::int64_t row = 0; row < num_rows; ++row)
                std::memcpy(block + row * kRows, rows + row * in_stride + column, columns);
            transpose(block, kRows, &turned_[column * kRows], kRows);
        }
        for (std::int64_t x = 0; x < width(); ++x)
            weigh_(&columns_[taps_.first[x]], 0, taps_, x, &narrowed_[x * kLanes]);
        for (std::int64_t channel = 0; channel < kChannels; ++channel)
            for (std::int64_t x = 0; x < width(); x += kRows)
                transpose(&narrowed_[x * kLanes + channel * kRows], kLanes, plane(channel) + x, out_stride);
    }

  private:
    const Taps& taps_;
    Weigh weigh_;
    std::int64_t bytes_;
    std::vector<std::uint8_t> turned_, narrowed_;
    std::vector<const std::uint8_t*> columns_;
};

// One row of one channel into the patches that it crosses, of which `out` is the first's place for it.
template <std::int64_t side>
void scatter(const std::uint8_t* row, std::int64_t width, const PatchShape& shape, std::uint8_t* out) {
    const std::int64_t patch = side ? side : shape.patch, patch_bytes = kChannels * shape.frames * patch * patch;
    for (std::int64_t x = 0; x < width; x += patch * shape.merge, out += shape.merge * shape.merge * patch_bytes)
        for (std::int64_t n = 0; n < shape.merge; ++n) std::memcpy(out + n * patch_bytes, row + x + n * patch, patch);
}

void put(const std::uint8_t* row, std::int64_t channel, std::int64_t y, std::int64_t width, const PatchShape& shape,
         std::uint8_t* out) {
    const std::int64_t patch = shape.patch, merge = shape.merge, patch_row = y / patch;
    const std::int64_t before = patch_row / merge * merge * (width / patch) + patch_row % merge * merge;
    out += before * kChannels * shape.frames * patch * patch;
    out += ((channel * shape.frames + shape.frame) * patch + y % patch) * patch;
    patch == 14 ? scatter<14>(row, width, shape, out) : scatter<0>(row, width, shape, out);
}

// One row from several. All have room for kLanes bytes at least.
void vertical(const std::uint8_t* const* rows, const Taps& taps, std::int64_t output, std::int64_t width, Weigh weigh,
              std::uint8_t* out) {
    for (std::int64_t begin = 0; begin < width; begin += kLanes) {
        const std::int64_t x = std::max<std::int64_t>(std::min(begin, width - kLanes), 0);  // the last ones overlap
        weigh(rows, x, taps, output, out + x);
    }
}

void horizontal_first(const std::uint8_t* rgb, std::int64_t in_height, std::int64_t in_width, const Taps& down,
                      Across& across, Weigh weigh, const PatchShape& shape, std::uint8_t* out) {
    const std::int64_t bytes = in_width * kChannels, stride = rounded_up(across.width(), kLanes);
    const std::int64_t kept = rounded_up(down.most, kRows) + 2 * kRows;  // rows of the ring
    std::vector<std::uint8_t> ring(kChannels * kept * stride), row(stride);
    std::vector<const std::uint8_t*> rows(down.most);
    std::int64_t made = 0;
    for (std::size_t y = 0; y < down.first.size(); ++y) {
        for (; made < down.first[y] + down.count[y]; made += kRows)
            across.run(rgb + made * bytes, bytes, std::min(kRows, in_height - made),
                       [&](std::int64_t channel) { return &ring[(channel * kept + made % kept) * stride]; }, stride);
        for (std::int64_t channel = 0; channel < kChannels; ++channel) {
            for (std::int64_t tap = 0; tap < down.count[y]; ++tap)
                rows[tap] = &ring[(channel * kept + (down.first[y] + tap) % kept) * stride];
            vertical(rows.data(), down, y, across.width(), weigh, row.data());
            put(row.data(), channel, y, across.width(), shape, out);
        }
    }
}

void vertical_first(const std::uint8_t* rgb, std::int64_t in_height, std::int64_t in_width, const Taps& down,
                    Across& across, Weigh weigh, const PatchShape& shape, std::uint8_t* out) {
    const std::int64_t bytes = in_width * kChannels, stride = rounded_up(across.width(), kLanes);
    const std::int64_t wide = std::max(bytes, kLanes), out_height = down.first.size();
    std::vector<std::uint8_t> padded, lowered(kRows * wide), planes(kChannels * kRows * stride);
    if (bytes < kLanes) {
        padded.resize(in_height * wide);
        for (std::int64_t y = 0; y < in_height; ++y) std::memcpy(&padded[y * wide], rgb + y * bytes, bytes);
        rgb = padded.data();
    }
    std::vector<const std::uint8_t*> rows(down.most);
    for (std::int64_t y = 0; y < out_height; y += kRows) {
        const std::int64_t num_rows = std::min(kRows, out_height - y);
        for (std::int64_t row = 0; row < num_rows; ++row) {
            for (std::int64_t tap = 0; tap < down.count[y + row]; ++tap)
                rows[tap] = rgb + (down.first[y + row] + tap) * wide;
            vertical(rows.data(), down, y + row, bytes, weigh, &lowered[row * wide]);
        }
        const auto plane = [&](std::int64_t channel) { return &planes[channel * kRows * stride]; };
        across.run(lowered.data(), wide, num_rows, plane, stride);
        for (std::int64_t channel = 0; channel < kChannels; ++channel)
            for (std::int64_t row = 0; row < num_rows; ++row)
                put(plane(channel) + row * stride, channel, y + row, across.width(), shape, out);
    }
}

}  // namespace

std::vector<std::string> resize_ways() {
    std::vector<std::string> names;
    for (const Way& way : ways()) names.push_back(way.name);
    return names;
}

void resize_to_patches(const std::uint8_t* rgb, std::int64_t in_height, std::int64_t in_width, std::int64_t out_height,
                       std::int64_t out_width, const PatchShape& shape, const std::string& way, std::uint8_t* out) {
    const Weigh weigh = weigh_by(way);
    const Taps columns = taps(in_width, out_width), down = taps(in_height, out_height);
    Across across(columns, in_width, weigh);
    // Pillow's choice (from its release 13): where the height shrinks by more than twice what the width does.
    const bool starts_down = in_height > out_height && in_height - out_height > 2 * (in_width - out_width);
    (starts_down ? vertical_first : horizontal_first)(rgb, in_height, in_width, down, across, weigh, shape, out);
}

}  // namespace pixels
