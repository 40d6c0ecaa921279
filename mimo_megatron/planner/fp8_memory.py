"""Bytes of a linear layer in FP8: what it keeps for its backward instead of its input, and what it takes for a moment.

``twin`` and ``scaled_mm`` are ``fp8/linear.py``: both keep their input in FP8 with every microbatch, of all slots of
this rank, and round the weight again in the backward. Where plain torch calls round they take 8 bytes a number, with
tiles 12; kernels write what is multiplied and nothing else. The twin multiplies what operands stand for, in 4 bytes.
Transformer Engine's layers are counted by their sources and have not been run: input in FP8, one FP8 copy of the weight
in each orientation for as long as the run lasts, rounding in one kernel. Counted against real steps of the twin:
tests/distributed/test_memory_model.py; against single layers: tests/unit/test_planner_fp8.py.
"""

from dataclasses import dataclass

from mimo_megatron.planner.packs import PackShape
from mimo_megatron.planner.setting import WIDE, Setting

_TILE = 128
_LINEAR_LAYERS = 4
"""Of a decoder layer."""
_NUM_OPERANDS = 3


@dataclass(frozen=True)
class Product:
    """A linear layer on one rank: [rows, inputs] by [outputs, inputs]."""

    rows: int
    inputs: int
    outputs: int
    is_gathered: bool = False
    """Whether its input comes together from the tp ranks, under sequence parallelism."""

    @property
    def of_input(self) -> int:
        return self.rows * self.inputs

    @property
    def of_weight(self) -> int:
        return self.outputs * self.inputs

    @property
    def of_output(self) -> int:
        return self.rows * self.outputs


@dataclass(frozen=True)
class LayerProducts:
    """The four of a decoder layer on one rank."""

    qkv: Product
    projection: Product
    fc1: Product
    fc2: Product

    @classmethod
    def of(cls, setting: Setting, pack: PackShape) -> "LayerProducts":
        text, tp, t = setting.model.text, setting.layout.tp, setting.local_slots(pack)
        queries, keys = (heads * text.head_width // tp for heads in (text.num_heads, text.num_kv_heads))
        return cls(
            Product(t, text.width, queries + 2 * keys, setting.layout.sequence_parallel),
            Product(t, queries, text.width),
            Product(t, text.width, 2 * text.ffn_width // tp, setting.layout.sequence_parallel),
            Product(t, text.ffn_width // tp, text.width),
        )


def kept(setting: Setting, product: Product) -> int:
    """By one microbatch: the input, where the weight is trained."""
    of_input = product.of_input + _is_tiled(setting) * WIDE * product.of_input // _TILE
    if setting.engine == "transformer-engine" and product.is_gathered:
        of_input //= setting.layout.tp
    return _if_trained(setting, of_input)


def forward(setting: Setting, product: Product) -> int:
    """At most, with what it keeps and its output, beside its input."""
    x, w, y, b = product.of_input, product.of_weight, product.of_output, setting.value_bytes
    if setting.engine == "transformer-engine":
        return 2 * x + y * b
    wide, copies = _wide_bytes(setting), _copies(setting)
    multiplied = max(wide * x, WIDE * x + wide * w, WIDE * (x + w + y), _result_bytes(setting) * y)
    rounded = 0 if _by_kernels(setting) else max((wide + copies - 1) * x, copies * x + wide * w)
    return max(rounded, copies * x + w + (multiplied if setting.engine == "twin" else y * b))


def backward(setting: Setting, product: Product) -> int:
    """At most, with the gradients of input and weight, beside that of the output and what is kept."""
    x, w, y, b = product.of_input, product.of_weight, product.of_output, setting.value_bytes
    if setting.engine == "transformer-engine":
        return 2 * y + x * b + _if_trained(setting, w * b)
    wide, copies = _wide_bytes(setting), _copies(setting)
    if _by_kernels(setting):
        return copies * y + max(w + b * x, _if_trained(setting, b * x + b * w))
    if setting.engine == "twin":
        of_result = _result_bytes(setting)
        of_input = w + max(wide * y, WIDE * y + wide * w, WIDE * (y + w + x), of_result * x)
        of_weight = b * x + max(wide * y, WIDE * y + wide * x, WIDE * (y + x + w), of_result * w)
    else:  # both transposed operands are copied
        of_input, of_weight = 2 * w + b * x, b * x + y + x + b * w
    rounded = max((wide + copies - 1) * y, copies * y + wide * w)
    return max(rounded, copies * y + max(of_input, _if_trained(setting, of_weight)))


def weight_bytes(setting: Setting, stage: int) -> int:
    """What one stage holds for the whole run: histories, and Transformer Engine's copies of weights."""
    fp8, text = setting.fp8, setting.model.text
    layers = setting.layout.layers_of_stages(text.num_layers)
    first = sum(layers[:stage])
    num_layers = sum(setting.is_in_fp8(layer) for layer in range(first, first + layers[stage]))
    if fp8 is None or not num_layers:
        return 0
    total = 0
    if fp8.scaling == "delayed":  # history, scale, and the largest seen in the step
        total += num_layers * _LINEAR_LAYERS * (fp8.history + 2) * _NUM_OPERANDS * WIDE
    if setting.engine == "transformer-engine":
        heads = 2 * (text.num_heads + text.num_kv_heads) * text.head_width
        total += num_layers * 2 * text.width * (heads + 3 * text.ffn_width) // setting.layout.tp
    return total


def _is_tiled(setting: Setting) -> bool:
    return setting.fp8 is not None and setting.fp8.scaling == "blockwise"


def _wide_bytes(setting: Setting) -> int:
    """Of a number while an operand is rounded, or made wide again: two of 4; with tiles its own scale too."""
    return (2 + _is_tiled(setting)) * WIDE


def _result_bytes(setting: Setting) -> int:
    """Of a number of the twin's product while it is made: in fp32, and beside that in half precision."""
    return WIDE + (setting.value_bytes if setting.value_bytes < WIDE else 0)


def _by_kernels(setting: Setting) -> bool:
    return setting.engine == "scaled_mm" and setting.rounding == "triton"


def _copies(setting: Setting) -> int:
    """FP8 copies of an input or gradient: one in each orientation, where tiles or kernels round; else the other is the
    same memory, read another way. Of a frozen layer there is no other."""
    return 1 + ((_is_tiled(setting) or _by_kernels(setting)) and "text" in setting.trained)


def _if_trained(setting: Setting, num_bytes: int) -> int:
    return num_bytes if "text" in setting.trained else 0
