// The resize of resize.hpp by AVX-512, where has_avx512() says that this processor can.
#pragma once

#include <cstdint>

#include "resize.hpp"
#include "taps.hpp"

namespace pixels {

bool has_avx512();

// `starts_down`: whether the vertical pass comes first.
void resize_by_avx512(const std::uint8_t* rgb, std::int64_t in_height, std::int64_t in_width, const Taps& columns,
                      const Taps& down, bool starts_down, const PatchShape& shape, std::uint8_t* out);

}  // namespace pixels
