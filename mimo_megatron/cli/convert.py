"""Verbs between checkpoints and Hugging Face folders."""

from pathlib import Path
from typing import TYPE_CHECKING

from mimo_megatron.cli.verb import Arguments, Values, Verb

if TYPE_CHECKING:
    import torch


def _add_dtype(parser: Arguments) -> None:
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the written weights (default: as they are)")


def _dtype(values: Values) -> "torch.dtype | None":
    import torch

    return {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}[values.dtype]


def _from_hf_arguments(parser: Arguments) -> None:
    parser.add_argument("hf_dir", type=Path)
    parser.add_argument("checkpoint", type=Path, help="the folder to write")
    _add_dtype(parser)


def _from_hf(values: Values) -> int:
    from mimo_megatron.convert.verbs import from_hf

    print(f"{values.checkpoint}: {from_hf(values.hf_dir, values.checkpoint, _dtype(values)).name}")
    return 0


def _to_hf_arguments(parser: Arguments) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("hf_dir", type=Path, help="the folder to write")
    parser.add_argument("--tokenizer-from", type=Path, help="a folder whose tokenizer files are copied")
    _add_dtype(parser)


def _to_hf(values: Values) -> int:
    from mimo_megatron.convert.verbs import to_hf

    model = to_hf(values.checkpoint, values.hf_dir, _dtype(values), values.tokenizer_from)
    print(f"{values.hf_dir}: {model.name}")
    return 0


def _verify_arguments(parser: Arguments) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("hf_dir", type=Path)


def _verify(values: Values) -> int:
    from mimo_megatron.convert.verbs import verify

    verification = verify(values.checkpoint, values.hf_dir)
    print(verification)
    return int(not verification.is_equal)


def _assemble_arguments(parser: Arguments) -> None:
    parser.add_argument("text_from", type=Path, help="Hugging Face folder of the text model (the report: MiMo-7B-Base)")
    parser.add_argument("vision_from", type=Path, help="of the model whose vision encoder is taken (Qwen2.5-VL-72B)")
    parser.add_argument("checkpoint", type=Path, help="the folder to write")
    parser.add_argument("--seed", type=int, default=1, help="of the random projector (default 1)")
    parser.add_argument("--name", help="of the model (default: both names)")
    _add_dtype(parser)


def _assemble(values: Values) -> int:
    from mimo_megatron.convert.verbs import assemble

    chosen = values.text_from, values.vision_from, values.checkpoint
    print(f"{values.checkpoint}: {assemble(*chosen, values.seed, _dtype(values), values.name).name}")
    return 0


def _seal_arguments(parser: Arguments) -> None:
    parser.add_argument("checkpoint", type=Path, help="a folder that an earlier version wrote")


def _seal(values: Values) -> int:
    from mimo_megatron.convert.verbs import seal_checkpoint

    print(f"{values.checkpoint}: {seal_checkpoint(values.checkpoint).name}")
    return 0


VERBS = (
    Verb("convert from-hf", "a Hugging Face folder into a checkpoint", _from_hf_arguments, _from_hf),
    Verb("convert to-hf", "a checkpoint into a Hugging Face folder", _to_hf_arguments, _to_hf),
    Verb("convert verify", "compare a checkpoint and a Hugging Face folder bit for bit", _verify_arguments, _verify),
    Verb("convert assemble", "a text model, a vision encoder and a random projector", _assemble_arguments, _assemble),
    Verb("convert seal", "give an older checkpoint the checksums that loading asks for", _seal_arguments, _seal),
)
