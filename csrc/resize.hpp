// One frame, resized (bicubic, antialiased) straight into patches. Plain C++17.
//
// Every value is that of Pillow's ImagingResample for 8-bit channels, bit for bit: weights with 22 fractional bits, the
// horizontal pass rounded to bytes before the vertical one. mimo_megatron/data/patches.py says where a pixel goes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pixels {

struct PatchShape {
    std::int64_t patch;   // pixels along a side of a patch
    std::int64_t merge;   // patches along a side of a merge unit
    std::int64_t frames;  // frames of a patch
    std::int64_t frame;   // which of them is written
};

// `way`: one of resize_ways(), or empty for the first of them; all give the same bytes.
// `rgb` is [in_height, in_width, 3]; `out` begins at the frame's first patch, whose sides divide out_height, out_width.
void resize_to_patches(const std::uint8_t* rgb, std::int64_t in_height, std::int64_t in_width, std::int64_t out_height,
                       std::int64_t out_width, const PatchShape& shape, const std::string& way, std::uint8_t* out);

// The instructions by which this processor can do it, the fastest first.
std::vector<std::string> resize_ways();

}  // namespace pixels
