// How it goes fast: both passes are sums of rows of bytes, each times one weight, so both vectorise. For the horizontal
// pass 16 rows at a time are transposed, so that what was one column's value in 16 rows lies side by side, and its
// results are turned back, one plane a channel. What lies between the passes is a few rows, in the cache. The weighing
// itself is there for any processor and for AVX2; resize_avx512.cpp is a third way. All are integers and give the same.
#include "resize.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "put.hpp"
#include "resize_avx512.hpp"
#include "taps.hpp"

#ifdef __x86_64__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 says so of its own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace pixels {
namespace {

constexpr std::int64_t kRows = 16;       // rows that are transposed together
constexpr std::int64_t kLanes = kRows * kChannels;  // bytes that are weighed together, in both passes

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

#endif

using Weigh = decltype(&weigh_portably);

std::int64_t rounded_up(std::int64_t value, std::int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

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

    std::int64_t width() const { return taps_.outputs(); }

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
    for (std::int64_t y = 0; y < down.outputs(); ++y) {
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
    const std::int64_t wide = std::max(bytes, kLanes), out_height = down.outputs();
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

template <Weigh weigh>
void resize_by(const std::uint8_t* rgb, std::int64_t in_height, std::int64_t in_width, const Taps& columns,
               const Taps& down, bool starts_down, const PatchShape& shape, std::uint8_t* out) {
    Across across(columns, in_width, weigh);
    (starts_down ? vertical_first : horizontal_first)(rgb, in_height, in_width, down, across, weigh, shape, out);
}

struct Way {
    const char* name;
    decltype(&resize_by_avx512) resize;
};

// Those that run here, the fastest first.
std::vector<Way> ways() {
    std::vector<Way> found;
    if (has_avx512()) found.push_back({"avx512", resize_by_avx512});
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2")) found.push_back({"avx2", resize_by<weigh_by_avx2>});
#endif
    found.push_back({"portable", resize_by<weigh_portably>});
    return found;
}

}  // namespace

std::vector<std::string> resize_ways() {
    std::vector<std::string> names;
    for (const Way& way : ways()) names.push_back(way.name);
    return names;
}

void resize_to_patches(const std::uint8_t* rgb, std::int64_t in_height, std::int64_t in_width, std::int64_t out_height,
                       std::int64_t out_width, const PatchShape& shape, const std::string& name, std::uint8_t* out) {
    // Pillow's choice (from its release 13): where the height shrinks by more than twice what the width does.
    const bool starts_down = in_height > out_height && in_height - out_height > 2 * (in_width - out_width);
    for (const Way& way : ways())
        if (name.empty() || name == way.name)
            return way.resize(rgb, in_height, in_width, taps(in_width, out_width), taps(in_height, out_height),
                              starts_down, shape, out);
    throw std::invalid_argument("no resize by " + name + " on this processor");
}

}  // namespace pixels
