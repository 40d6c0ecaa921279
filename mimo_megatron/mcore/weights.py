"""Whole tensors and this rank's shards of them: one rule, to draw weights and to compare a layout with one process.

A parameter's *global name* is its key in checkpoints: it numbers the layer over all pipeline stages, so it is the same
for every layout, and names a norm by the linear layer it feeds, as Transformer Engine's fused layers do.
Fused tensors are cut where megatron cuts them: ``linear_qkv`` by key-value group, ``linear_fc1`` in gate and up apart.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from mimo_megatron.parallel.mesh import Axis

_LAYER = re.compile(r"(.*\bdecoder\.layers\.)(\d+)(\..*)")
_NORMS = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}
INIT_STD = 0.02


def global_parameters(chunks: Iterable[Module]) -> Iterator[tuple[str, Parameter]]:
    """(global name, parameter) of this rank's stages."""
    for model in chunks:
        yield from _of_stage(model)


def _of_stage(model: Module) -> Iterator[tuple[str, Parameter]]:
    first_layer = 0
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if layers is not None and len(layers) and hasattr(layers[0], "layer_number"):
            first_layer = layers[0].layer_number - 1
            break
    for name, param in model.named_parameters():
        if match := _LAYER.fullmatch(name):
            name = f"{match[1]}{int(match[2]) + first_layer}{match[3]}"
        elif getattr(param, "shared_embedding", False):  # a tied head on the last stage is the embedding
            name = name.replace("output_layer.", "embedding.word_embeddings.")
        for plain, fused in _NORMS.items():
            name = name.replace(plain, fused)
        yield name, param


def shard(name: str, whole: Tensor, param: Tensor, tp: Axis) -> Tensor:
    """This tp rank's part of ``whole``, as ``param`` holds it."""
    if not is_cut(param, tp):
        return whole
    dim = param.partition_dim  # type: ignore[attr-defined]
    if _is_gate_and_up(name):
        return torch.cat([half.chunk(tp.size, dim)[tp.rank] for half in whole.chunk(2, dim)], dim)
    return whole.chunk(tp.size, dim)[tp.rank]


def unshard(name: str, local: Tensor, param: Tensor, tp: Axis) -> Tensor:
    """The whole tensor, from all tp ranks' parts. A collective over tp."""
    if not is_cut(param, tp):
        return local
    parts = [torch.empty_like(local) for _ in range(tp.size)]
    dist.all_gather(parts, local.contiguous(), group=tp.group)
    return join(name, parts, param, local.new_empty(whole_shape(param, tp)))


def is_cut(param: Tensor, tp: Axis) -> bool:
    """Whether each tp rank holds another part of it."""
    return tp.size > 1 and getattr(param, "tensor_model_parallel", False)


def join(name: str, parts: Sequence[Tensor], param: Tensor, whole: Tensor) -> Tensor:
    """``whole``, now filled with the parts that the tp ranks hold of it, in their order."""
    dim = param.partition_dim  # type: ignore[attr-defined]
    num_fused = 2 if _is_gate_and_up(name) else 1
    for fused, room in enumerate(whole.chunk(num_fused, dim)):
        for part, place in zip(parts, room.chunk(len(parts), dim), strict=True):
            place.copy_(part.chunk(num_fused, dim)[fused])
    return whole


def whole_shape(param: Tensor, tp: Axis) -> tuple[int, ...]:
    shape = list(param.shape)
    if is_cut(param, tp):
        shape[param.partition_dim] *= tp.size  # type: ignore[attr-defined]
    return tuple(shape)


def draw_weights(chunks: Iterable[Module], seed: int, tp: Axis) -> None:
    """Fill every parameter from (seed, global name) alone, so that the start is the same in every layout.

    Norm weights are 1, biases 0, matrices normal with standard deviation 0.02 (as MiMo-7B and Qwen2 configure). They
    are drawn by as many threads as torch computes with: a generator uses one.
    """

    @torch.no_grad()  # which holds for the thread that enters it
    def draw(name: str, param: Parameter) -> None:
        if name.endswith(("bias", "norm_bias")):
            param.zero_()
        elif param.dim() == 1:
            param.fill_(1.0)
        else:
            whole = torch.empty(whole_shape(param, tp)).normal_(0.0, INIT_STD, generator=_generator(seed, name))
            param.copy_(shard(name, whole, param, tp))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for drawn in [pool.submit(draw, name, param) for name, param in global_parameters(chunks)]:
            drawn.result()


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _is_gate_and_up(name: str) -> bool:
    return ".linear_fc1." in name
