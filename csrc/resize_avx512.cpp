// The same resize for processors with AVX-512's products of bytes (VNNI), of which one instruction adds four taps of 16
// outputs. Values therefore lie in words of four: for the horizontal pass four columns of a row, for the vertical one
// four rows of a column. The inputs of an output begin at a whole word; what is in the word before them weighs nothing.
// A weight is split into three signed digits to the base 256, whose sums are put together at the end: integers, so that
// the result is that of resize.cpp.
#include "resize_avx512.hpp"

#ifdef __x86_64__

#include <algorithm>
#include <cstring>
#include <vector>

#include "put.hpp"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 says so of its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#define AVX512 __attribute__((target("avx512bw,avx512vl,avx512vnni")))

namespace pixels {
namespace {

constexpr std::int64_t kWord = 4;             // values side by side
constexpr std::int64_t kRows = 16;            // rows that the horizontal pass takes together
constexpr std::int64_t kQuads = kRows / kWord;
constexpr std::int64_t kTriple = kWord * kChannels;  // bytes of four columns of a row
constexpr std::int64_t kLanes = kRows * kChannels;   // values of a column of those rows
constexpr int kDigits = 3;

std::int64_t rounded_up(std::int64_t value, std::int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// The words and digits of every output along one axis.
struct WordTaps {
    explicit WordTaps(const Taps& taps) {
        for (std::int64_t output = 0; output < taps.outputs(); ++output) {
            const std::int64_t begin = taps.first[output], end = begin + taps.count[output];
            first.push_back(begin / kWord);
            count.push_back((end + kWord - 1) / kWord - begin / kWord);
            most = std::max(most, count.back());
        }
        digits.resize(taps.outputs() * most * kDigits);
        auto* bytes = reinterpret_cast<std::int8_t*>(digits.data());
        for (std::int64_t output = 0; output < taps.outputs(); ++output)
            for (std::int64_t tap = 0; tap < taps.count[output]; ++tap) {
                const std::int64_t place = taps.first[output] - kWord * first[output] + tap;
                std::int32_t rest = taps.weights_of(output)[tap];
                for (int power = 0; power < kDigits; ++power) {
                    const auto digit = static_cast<std::int8_t>(rest & 0xff);
                    bytes[((output * most + place / kWord) * kDigits + power) * kWord + place % kWord] = digit;
                    rest = (rest - digit) >> 8;
                }
            }
    }

    std::int64_t outputs() const { return first.size(); }
    const std::int32_t* digits_of(std::int64_t output) const { return &digits[output * most * kDigits]; }

    std::int64_t most = 0;  // words of an output
    std::vector<std::int64_t> first, count;
    std::vector<std::int32_t> digits;  // of each word four last digits, then the four before them, then the four first
};

struct Sums {
    __m512i of[kDigits];
};

AVX512 inline Sums no_sums() { return {{_mm512_set1_epi32(kHalf), _mm512_setzero_si512(), _mm512_setzero_si512()}}; }

AVX512 inline __m512i whole(const Sums& sums) {
    const __m512i upper = _mm512_add_epi32(sums.of[1], _mm512_slli_epi32(sums.of[2], 8));
    return _mm512_srai_epi32(_mm512_add_epi32(sums.of[0], _mm512_slli_epi32(upper, 8)), kPrecision);
}

// 16 bytes of each of four sums, in order.
AVX512 inline __m512i bytes_of(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i turned = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(turned, _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)));
}

template <bool at_the_border>
AVX512 inline __m128i load_16(const std::uint8_t* from, std::int64_t room) {
    if (!at_the_border) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm_maskz_loadu_epi8(static_cast<__mmask16>((1 << std::min<std::int64_t>(room, 16)) - 1), from);
}

// Four columns of 16 rows, `room` bytes of which are there, as words in the order (quad of rows, channel, row).
template <bool at_the_border>
AVX512 inline void turn_one(const std::uint8_t* const* rows, std::int64_t offset, std::int64_t room,
                            std::uint8_t* out) {
    const __m512i by_channel = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, 0, 0, 0, 0));
    const __m512i by_row = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (std::int64_t quad = 0; quad < kQuads; ++quad, rows += kWord, out += kWord * kTriple) {
        __m512i four = _mm512_castsi128_si512(load_16<at_the_border>(rows[0] + offset, room));
        four = _mm512_inserti32x4(four, load_16<at_the_border>(rows[1] + offset, room), 1);
        four = _mm512_inserti32x4(four, load_16<at_the_border>(rows[2] + offset, room), 2);
        four = _mm512_inserti32x4(four, load_16<at_the_border>(rows[3] + offset, room), 3);
        // 16 bytes too many, which the next quad writes over
        _mm512_storeu_si512(out, _mm512_permutexvar_epi32(by_row, _mm512_shuffle_epi8(four, by_channel)));
    }
}

AVX512 void turn(const std::uint8_t* const* rows, std::int64_t bytes, std::uint8_t* out) {
    std::int64_t offset = 0;
    for (; offset + 16 <= bytes; offset += kTriple, out += kWord * kLanes) turn_one<false>(rows, offset, 16, out);
    for (; offset < bytes; offset += kTriple, out += kWord * kLanes) turn_one<true>(rows, offset, bytes - offset, out);
}

// The horizontal pass over turned rows: of every output its kLanes values.
AVX512 void weigh_across(const std::uint8_t* turned, const WordTaps& taps, std::uint8_t* out) {
    for (std::int64_t x = 0; x < taps.outputs(); ++x, out += kLanes) {
        const std::uint8_t* from = turned + taps.first[x] * kWord * kLanes;
        const std::int32_t* digits = taps.digits_of(x);
        Sums sums[kChannels] = {no_sums(), no_sums(), no_sums()};
        for (std::int64_t word = 0; word < taps.count[x]; ++word, from += kWord * kLanes, digits += kDigits) {
            const __m512i weights[kDigits] = {_mm512_set1_epi32(digits[0]), _mm512_set1_epi32(digits[1]),
                                              _mm512_set1_epi32(digits[2])};
            for (std::int64_t i = 0; i < kChannels; ++i) {
                const __m512i values = _mm512_loadu_si512(from + 64 * i);
                for (int digit = 0; digit < kDigits; ++digit)
                    sums[i].of[digit] = _mm512_dpbusd_epi32(sums[i].of[digit], values, weights[digit]);
            }
        }
        // 16 bytes too many, which the next output writes over
        _mm512_storeu_si512(out, bytes_of(whole(sums[0]), whole(sums[1]), whole(sums[2]), _mm512_setzero_si512()));
    }
}

// What weigh_across wrote, as rows of words of four rows: `out(quad, channel)` points at one.
template <typename Out>
AVX512 inline void turn_back(const std::uint8_t* narrowed, std::int64_t width, Out out) {
    for (std::int64_t x = 0; x < width; x += 16, narrowed += 16 * kLanes)
        for (std::int64_t begin = 0; begin < kQuads * kChannels; begin += 4) {
            __m512i column[4];  // x, x + 4, x + 8, x + 12; and so on
            for (std::int64_t i = 0; i < 4; ++i) {
                const auto* from = reinterpret_cast<const __m128i*>(narrowed + i * kLanes + begin * kWord);
                column[i] = _mm512_castsi128_si512(_mm_loadu_si128(from));
                column[i] = _mm512_inserti32x4(column[i], _mm_loadu_si128(from + 4 * kLanes / 16), 1);
                column[i] = _mm512_inserti32x4(column[i], _mm_loadu_si128(from + 8 * kLanes / 16), 2);
                column[i] = _mm512_inserti32x4(column[i], _mm_loadu_si128(from + 12 * kLanes / 16), 3);
            }
            const __m512i pairs[4] = {
                _mm512_unpacklo_epi32(column[0], column[1]), _mm512_unpacklo_epi32(column[2], column[3]),
                _mm512_unpackhi_epi32(column[0], column[1]), _mm512_unpackhi_epi32(column[2], column[3])};
            for (std::int64_t i = 0; i < 4; ++i) {
                const __m512i row = i % 2 ? _mm512_unpackhi_epi64(pairs[i / 2 * 2], pairs[i / 2 * 2 + 1])
                                          : _mm512_unpacklo_epi64(pairs[i / 2 * 2], pairs[i / 2 * 2 + 1]);
                _mm512_storeu_si512(out((begin + i) / kChannels, (begin + i) % kChannels) + x * kWord, row);
            }
        }
}

// The vertical pass: one row of `lanes` values, a multiple of 64, from rows of words.
AVX512 void weigh_down(const std::uint8_t* const* rows, const WordTaps& taps, std::int64_t output, std::int64_t lanes,
                       std::uint8_t* out) {
    for (std::int64_t lane = 0; lane < lanes; lane += 64) {
        const std::int32_t* digits = taps.digits_of(output);
        Sums sums[4] = {no_sums(), no_sums(), no_sums(), no_sums()};
        for (std::int64_t word = 0; word < taps.count[output]; ++word, digits += kDigits) {
            const __m512i weights[kDigits] = {_mm512_set1_epi32(digits[0]), _mm512_set1_epi32(digits[1]),
                                              _mm512_set1_epi32(digits[2])};
            for (std::int64_t i = 0; i < 4; ++i) {
                const __m512i values = _mm512_loadu_si512(rows[word] + kWord * lane + 64 * i);
                for (int digit = 0; digit < kDigits; ++digit)
                    sums[i].of[digit] = _mm512_dpbusd_epi32(sums[i].of[digit], values, weights[digit]);
            }
        }
        _mm512_storeu_si512(out + lane, bytes_of(whole(sums[0]), whole(sums[1]), whole(sums[2]), whole(sums[3])));
    }
}

// Words of four rows, or fewer.
AVX512 void join(const std::uint8_t* rows, std::int64_t bytes, std::int64_t num_rows, std::uint8_t* out) {
    const std::uint8_t* from[kWord];
    for (std::int64_t i = 0; i < kWord; ++i) from[i] = rows + std::min(i, num_rows - 1) * bytes;
    for (std::int64_t lane = 0; lane < bytes; ++lane) {
        const std::uint32_t word = from[0][lane] | from[1][lane] << 8 | from[2][lane] << 16 |
                                   static_cast<std::uint32_t>(from[3][lane]) << 24;
        std::memcpy(out + lane * kWord, &word, kWord);
    }
}

// The `number`-th row of a row of words of four.
AVX512 void take(const std::uint8_t* words, std::int64_t number, std::int64_t width, std::uint8_t* row) {
    for (std::int64_t x = 0; x < width; ++x) row[x] = words[x * kWord + number];
}

// The horizontal pass of 16 rows of pixels, or fewer, into rows of words of four rows.
class Across {
  public:
    Across(const Taps& taps, std::int64_t in_width)
        : taps_(taps),
          bytes_(in_width * kChannels),
          turned_(rounded_up(in_width, kWord) * kLanes + 64),
          narrowed_(rounded_up(taps_.outputs(), 16) * kLanes + 64) {}

    std::int64_t width() const { return taps_.outputs(); }

    template <typename Out>
    void run(const std::uint8_t* rgb, std::int64_t stride, std::int64_t num_rows, Out out) {
        const std::uint8_t* rows[kRows];
        for (std::int64_t row = 0; row < kRows; ++row) rows[row] = rgb + std::min(row, num_rows - 1) * stride;
        turn(rows, bytes_, turned_.data());
        weigh_across(turned_.data(), taps_, narrowed_.data());
        turn_back(narrowed_.data(), width(), out);
    }

  private:
    WordTaps taps_;
    std::int64_t bytes_;
    std::vector<std::uint8_t> turned_, narrowed_;
};

void horizontal_first(const std::uint8_t* rgb, std::int64_t in_height, std::int64_t in_width, const WordTaps& down,
                      Across& across, const PatchShape& shape, std::uint8_t* out) {
    const std::int64_t bytes = in_width * kChannels, stride = rounded_up(across.width(), 16);
    const std::int64_t lanes = rounded_up(kChannels * stride, 64);
    const std::int64_t kept = rounded_up(down.most, kQuads) + kQuads;  // rows of words in the ring
    std::vector<std::uint8_t> ring(kept * lanes * kWord), row(lanes);
    std::vector<const std::uint8_t*> rows(down.most);
    std::int64_t made = 0;
    for (std::int64_t y = 0; y < down.outputs(); ++y) {
        for (; made < down.first[y] + down.count[y]; made += kQuads)
            across.run(rgb + made * kWord * bytes, bytes, std::min(kRows, in_height - made * kWord),
                       [&](std::int64_t quad, std::int64_t channel) {
                           return &ring[((made % kept + quad) * lanes + channel * stride) * kWord];
                       });
        for (std::int64_t word = 0; word < down.count[y]; ++word)
            rows[word] = &ring[(down.first[y] + word) % kept * lanes * kWord];
        weigh_down(rows.data(), down, y, lanes, row.data());
        for (std::int64_t channel = 0; channel < kChannels; ++channel)
            put(&row[channel * stride], channel, y, across.width(), shape, out);
    }
}

void vertical_first(const std::uint8_t* rgb, std::int64_t in_height, std::int64_t in_width, const WordTaps& down,
                    Across& across, const PatchShape& shape, std::uint8_t* out) {
    const std::int64_t bytes = in_width * kChannels, lanes = rounded_up(bytes, 64), width = across.width();
    const std::int64_t stride = rounded_up(width, 16);
    std::vector<std::uint8_t> ring(down.most * lanes * kWord), lowered(kRows * lanes);
    std::vector<std::uint8_t> words(kLanes * stride), row(width);
    std::vector<const std::uint8_t*> rows(down.most);
    std::int64_t made = 0;
    for (std::int64_t begin = 0; begin < down.outputs(); begin += kRows) {
        const std::int64_t num_rows = std::min(kRows, down.outputs() - begin);
        for (std::int64_t y = begin; y < begin + num_rows; ++y) {
            for (; made < down.first[y] + down.count[y]; ++made)
                join(rgb + made * kWord * bytes, bytes, in_height - made * kWord,
                     &ring[made % down.most * lanes * kWord]);
            for (std::int64_t word = 0; word < down.count[y]; ++word)
                rows[word] = &ring[(down.first[y] + word) % down.most * lanes * kWord];
            weigh_down(rows.data(), down, y, lanes, &lowered[(y - begin) * lanes]);
        }
        const auto place = [&](std::int64_t quad, std::int64_t channel) {
            return &words[(quad * kChannels + channel) * stride * kWord];
        };
        across.run(lowered.data(), lanes, num_rows, place);
        for (std::int64_t i = 0; i < num_rows; ++i)
            for (std::int64_t channel = 0; channel < kChannels; ++channel) {
                take(place(i / kWord, channel), i % kWord, width, row.data());
                put(row.data(), channel, begin + i, width, shape, out);
            }
    }
}

}  // namespace

bool has_avx512() {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

void resize_by_avx512(const std::uint8_t* rgb, std::int64_t in_height, std::int64_t in_width, const Taps& columns,
                      const Taps& down, bool starts_down, const PatchShape& shape, std::uint8_t* out) {
    Across across(columns, in_width);
    (starts_down ? vertical_first : horizontal_first)(rgb, in_height, in_width, WordTaps(down), across, shape, out);
}

}  // namespace pixels

#else

namespace pixels {

bool has_avx512() { return false; }

void resize_by_avx512(const std::uint8_t*, std::int64_t, std::int64_t, const Taps&, const Taps&, bool,
                      const PatchShape&, std::uint8_t*) {}

}  // namespace pixels

#endif
