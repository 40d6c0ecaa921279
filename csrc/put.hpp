// Where a row of pixels goes in patches: mimo_megatron/data/patches.py has the definition.
#pragma once

#include <cstdint>
#include <cstring>

#include "resize.hpp"

namespace pixels {

constexpr std::int64_t kChannels = 3;

// One row of one channel into the patches that it crosses, of which `out` is the first's place for it.
template <std::int64_t side>
inline void scatter(const std::uint8_t* row, std::int64_t width, const PatchShape& shape, std::uint8_t* out) {
    const std::int64_t patch = side ? side : shape.patch, patch_bytes = kChannels * shape.frames * patch * patch;
    for (std::int64_t x = 0; x < width; x += patch * shape.merge, out += shape.merge * shape.merge * patch_bytes)
        for (std::int64_t n = 0; n < shape.merge; ++n) std::memcpy(out + n * patch_bytes, row + x + n * patch, patch);
}

// Row `y` of one channel of a frame, `width` pixels, into the frame's patches.
inline void put(const std::uint8_t* row, std::int64_t channel, std::int64_t y, std::int64_t width,
                const PatchShape& shape, std::uint8_t* out) {
    const std::int64_t patch = shape.patch, merge = shape.merge, patch_row = y / patch;
    const std::int64_t before = patch_row / merge * merge * (width / patch) + patch_row % merge * merge;
    out += before * kChannels * shape.frames * patch * patch;
    out += ((channel * shape.frames + shape.frame) * patch + y % patch) * patch;
    patch == 14 ? scatter<14>(row, width, shape, out) : scatter<0>(row, width, shape, out);
}

}  // namespace pixels
