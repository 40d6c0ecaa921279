// mimo_megatron._packing: packing, spreading over ranks, and frames into patches, on numpy arrays. The GIL is released while they run.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "balance.hpp"
#include "packing.hpp"
#include "resize.hpp"
#include "spread.hpp"

namespace py = pybind11;

namespace {

// Narrower integers are widened; any other type is a TypeError, since `forcecast` is left out.
using Costs = py::array_t<std::int64_t, py::array::c_style>;

void check_flat(const Costs& costs, const char* name) {
    if (costs.ndim() != 1)
        throw std::invalid_argument(std::string(name) + " has " + std::to_string(costs.ndim()) + " dims, not 1");
}

// (offsets, items) from one call of `pack(items)`.
template <typename Pack>
py::tuple run(std::int64_t n, Pack pack) {
    py::array_t<std::int64_t> items(n);
    std::int64_t* items_data = items.mutable_data();
    packing::Offsets offsets;
    {
        py::gil_scoped_release release;
        offsets = pack(items_data);
    }
    return py::make_tuple(py::array_t<std::int64_t>(offsets.size(), offsets.data()), items);
}

py::tuple pack_one(const Costs& lengths, std::int64_t capacity) {
    check_flat(lengths, "lengths");
    const std::int64_t n = lengths.size();
    const std::int64_t* data = lengths.data();
    return run(n, [=](std::int64_t* items) { return packing::pack_one(data, n, capacity, items); });
}

py::tuple pack_two(const Costs& tokens, const Costs& patches, std::int64_t token_capacity,
                   std::int64_t patch_capacity) {
    check_flat(tokens, "tokens");
    check_flat(patches, "patches");
    const std::int64_t n = tokens.size();
    if (patches.size() != n)
        throw std::invalid_argument(std::to_string(n) + " token counts but " + std::to_string(patches.size()) +
                                    " patch counts");
    const std::int64_t *token_data = tokens.data(), *patch_data = patches.data();
    return run(n, [=](std::int64_t* items) {
        return packing::pack_two(token_data, patch_data, n, token_capacity, patch_capacity, items);
    });
}

// Ends the work on Ctrl-C, and with a RuntimeError where the caller's `is_cancelled` says so.
packing::Poll poll_of(const py::object& is_cancelled) {
    return [is_cancelled] {
        py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (!is_cancelled.is_none() && is_cancelled().cast<bool>()) throw std::runtime_error("cancelled");
    };
}

py::tuple pack_balanced(const Costs& tokens, const Costs& patches, const Costs& costs, const Costs& vision_costs,
                        std::int64_t token_capacity, std::int64_t patch_capacity, const py::object& is_cancelled) {
    check_flat(tokens, "tokens");
    check_flat(patches, "patches");
    check_flat(costs, "costs");
    check_flat(vision_costs, "vision_costs");
    if (patches.size() != tokens.size() || costs.size() != tokens.size() || vision_costs.size() != tokens.size())
        throw std::invalid_argument("tokens, patches and costs must be equally many");
    const packing::Samples samples{tokens.data(), patches.data(), costs.data(), vision_costs.data(), tokens.size()};
    const packing::Poll poll = poll_of(is_cancelled);
    return run(samples.n, [&](std::int64_t* items) {
        return packing::pack_balanced(samples, token_capacity, patch_capacity, items, poll);
    });
}

py::array_t<std::int64_t> deal(const Costs& costs, const Costs& vision_costs, std::int64_t num_ranks,
                              std::int64_t proposals_per_pack) {
    check_flat(costs, "costs");
    check_flat(vision_costs, "vision_costs");
    const std::int64_t n = costs.size();
    if (vision_costs.size() != n) throw std::invalid_argument("costs and vision costs must be equally many");
    py::array_t<std::int64_t> rank_of(n);
    const std::int64_t *cost_data = costs.data(), *vision_data = vision_costs.data();
    std::int64_t* rank_data = rank_of.mutable_data();
    const packing::Poll poll = poll_of(py::none());
    {
        py::gil_scoped_release release;
        packing::deal(cost_data, vision_data, n, num_ranks, proposals_per_pack, rank_data, poll);
    }
    return rank_of;
}

py::array_t<std::int64_t> spread(const Costs& costs, std::int64_t num_ranks) {
    check_flat(costs, "costs");
    const std::int64_t n = costs.size();
    py::array_t<std::int64_t> rank_of(n);
    const std::int64_t* data = costs.data();
    std::int64_t* rank_data = rank_of.mutable_data();
    {
        py::gil_scoped_release release;
        packing::spread(data, n, num_ranks, rank_data);
    }
    return rank_of;
}

using Bytes = py::array_t<std::uint8_t, py::array::c_style>;

// `out` is the room for the frame's patches, whose sides divide `height` and `width`.
void resize_to_patches(const Bytes& frame, std::int64_t height, std::int64_t width, pixels::PatchShape shape,
                       const std::string& way, Bytes& out) {
    if (frame.ndim() != 3 || frame.shape(2) != 3 || frame.size() == 0)
        throw std::invalid_argument("a frame is bytes of [height, width, 3], none of them 0");
    const std::int64_t unit = shape.patch * shape.merge;
    if (unit < 1 || height < 1 || width < 1 || height % unit || width % unit || shape.frame < 0 ||
        shape.frame >= shape.frames || out.size() != height * width * 3 * shape.frames)
        throw std::invalid_argument("the patches of " + std::to_string(height) + " x " + std::to_string(width) +
                                    " pixels do not fill " + std::to_string(out.size()) + " bytes");
    const std::uint8_t* from = frame.data();
    std::uint8_t* to = out.mutable_data();
    py::gil_scoped_release release;
    pixels::resize_to_patches(from, frame.shape(0), frame.shape(1), height, width, shape, way, to);
}

}  // namespace

PYBIND11_MODULE(_packing, m) {
    m.doc() = "Packing (see mimo_megatron.data.packing) and spreading (see mimo_megatron.parallel.spread).";
    m.attr("MAX_CAPACITY") = packing::kMaxCapacity;
    m.def("pack_one", &pack_one, py::arg("lengths"), py::arg("capacity"));
    m.def("pack_two", &pack_two, py::arg("tokens"), py::arg("patches"), py::arg("token_capacity"),
          py::arg("patch_capacity"));
    m.def("resize_ways", &pixels::resize_ways);
    m.def(
        "resize_to_patches",
        [](const Bytes& frame, std::int64_t height, std::int64_t width, std::int64_t patch, std::int64_t merge,
           std::int64_t frames, std::int64_t number, Bytes& out, const std::string& way) {
            resize_to_patches(frame, height, width, {patch, merge, frames, number}, way, out);
        },
        py::arg("frame"), py::arg("height"), py::arg("width"), py::arg("patch"), py::arg("merge"), py::arg("frames"),
        py::arg("number"), py::arg("out").noconvert(), py::arg("way") = "");
    m.def("pack_balanced", &pack_balanced, py::arg("tokens"), py::arg("patches"), py::arg("costs"),
          py::arg("vision_costs"), py::arg("token_capacity"), py::arg("patch_capacity"),
          py::arg("is_cancelled") = py::none());
    m.def("deal", &deal, py::arg("costs"), py::arg("vision_costs"), py::arg("num_ranks"),
          py::arg("proposals_per_pack"));
    m.def("spread", &spread, py::arg("costs"), py::arg("num_ranks"));
}
