"""The converter's verbs: Hugging Face folder to checkpoint, back, their comparison, and the report's start point.

Tensors pass one at a time, so memory is bounded by the largest one, whatever the model's size. Names, shapes and dtypes
are all checked before the first is read; a verb that fails leaves nothing behind.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mimo_megatron.config.calibration import copy_calibration
from mimo_megatron.config.description import check_same_model
from mimo_megatron.config.manifest import MANIFEST_FILE, seal
from mimo_megatron.config.model import ModelConfig
from mimo_megatron.config.processor import has_processor, read_processor, write_processor
from mimo_megatron.config.run import EncodingConfig
from mimo_megatron.convert.checkpoint_io import CheckpointReader, CheckpointWriter
from mimo_megatron.convert.families import object_keys, rules_for
from mimo_megatron.convert.hf_config import check_exportable, encoding_of, model_of, write_hf_companions
from mimo_megatron.convert.hf_io import SafetensorsFolder, SafetensorsWriter
from mimo_megatron.convert.rules import Rule, Spec
from mimo_megatron.convert.storage import Scratch, check_tensors, new_folder, same_bits
from mimo_megatron.errors import CheckpointError

SHARD_BYTES = 5_000_000_000
_PROJECTOR_STD = 0.02


def from_hf(hf_dir: Path, ckpt_dir: Path, dtype: torch.dtype | None = None) -> ModelConfig:
    """The model of ``hf_dir``, now also in the checkpoint ``ckpt_dir``; in its own dtype where none is given.

    The folder's tokenizer and pixel limits go along, where it has a tokenizer.
    """
    source = _HfModel(hf_dir)
    rules = rules_for(source.model)
    source.check(rules, dtype)
    with new_folder(ckpt_dir) as folder, CheckpointWriter(folder, source.model) as writer:
        for key, tensor in source.our_tensors(rules):
            writer.add(key, tensor.to(dtype or tensor.dtype))
        for key in object_keys(source.model):
            writer.add_object(key, None)
        _copy_processor(hf_dir, folder)
        copy_calibration(hf_dir, folder)
    return source.model


def to_hf(
    ckpt_dir: Path,
    hf_dir: Path,
    dtype: torch.dtype | None = None,
    tokenizer_from: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> ModelConfig:
    """The model of ``ckpt_dir``, now also in the folder ``hf_dir``; in its own dtype where none is given.

    The tokenizer and pixel limits are those of the folder ``tokenizer_from``, else those in the checkpoint, if any.
    """
    reader = CheckpointReader(ckpt_dir)
    check_exportable(reader.model)
    rules = rules_for(reader.model)
    check_tensors(reader.tensors, [rule.ours for rule in rules], str(ckpt_dir), dtype)
    written = dtype or reader.tensors[rules[0].ours.name].dtype
    specs = [spec for rule in rules for spec in rule.hf]
    scratch = Scratch()
    with new_folder(hf_dir) as folder:
        write_hf_companions(folder, reader.model, written, _encoding(ckpt_dir, tokenizer_from))
        copy_calibration(ckpt_dir, folder)
        with SafetensorsWriter(folder, specs, written, shard_bytes) as writer:
            for rule in rules:
                ours = reader.read(rule.ours.name)
                for spec, tensor in zip(rule.hf, rule.to_hf(ours, _room(rule, scratch, ours.dtype)), strict=True):
                    writer.add(spec.name, tensor.to(written))
    return reader.model


@dataclass(frozen=True)
class Verification:
    """What ``verify`` compared."""

    num_tensors: int
    num_bytes: int
    mismatches: tuple[str, ...]
    """Names of the Hugging Face tensors whose bits or dtype differ."""

    @property
    def is_equal(self) -> bool:
        return not self.mismatches

    def __str__(self) -> str:
        verdict = "all equal, bit for bit" if self.is_equal else f"{len(self.mismatches)} differ:"
        lines = [f"{self.num_tensors} tensors, {self.num_bytes / 1e9:.3f} GB: {verdict}"]
        return "\n".join([*lines, *(f"  {name}" for name in self.mismatches)])


def verify(ckpt_dir: Path, hf_dir: Path) -> Verification:
    """Every tensor of the Hugging Face folder compared bit for bit with the checkpoint's, after the rules.

    ``CheckpointError`` where the two are not of the same model, or one is incomplete.
    """
    reader, source = CheckpointReader(ckpt_dir), _HfModel(hf_dir)
    # Hugging Face's configuration does not name every special token, and tokens do not change the weights.
    check_same_model(source.model.model_copy(update={"tokens": reader.model.tokens}), reader.model, str(hf_dir))
    rules = rules_for(reader.model)
    check_tensors(reader.tensors, [rule.ours for rule in rules], str(ckpt_dir), dtype=None)
    source.check(rules, dtype=None)
    scratch, mismatches, num_bytes = Scratch(), [], 0
    for rule in rules:
        ours = reader.read(rule.ours.name)
        for spec, tensor in zip(rule.hf, rule.to_hf(ours, _room(rule, scratch, ours.dtype)), strict=True):
            num_bytes += tensor.nbytes
            if not same_bits(tensor, source.folder.read(spec.name)):
                mismatches.append(spec.name)
    return Verification(sum(len(rule.hf) for rule in rules), num_bytes, tuple(mismatches))


def assemble(
    text_from: Path, vision_from: Path, out: Path, seed: int, dtype: torch.dtype | None = None, name: str | None = None
) -> ModelConfig:
    """The report's start point as a checkpoint: a text model, a vision encoder, and a random projector between them.

    Both are Hugging Face folders (the report: MiMo-7B-Base and Qwen2.5-VL-72B). The text model's prediction layers and
    the vision model's projector and text are left behind. Projector matrices are normal with standard deviation 0.02.
    """
    text, vision = _HfModel(text_from), _HfModel(vision_from)
    if vision.model.vision is None:
        raise CheckpointError(f"{vision_from} holds the text model {vision.model.name!r}; it has no vision encoder")
    model = ModelConfig(
        name=name or f"{text.model.name}+{vision.model.name}",
        text=text.model.text.model_copy(update={"num_mtp_layers": 0}),
        vision=vision.model.vision,
        tokens=text.model.tokens,
    )
    parts: dict[str, list[Rule]] = {"text": [], "vision": [], "projector": []}
    for rule in rules_for(model):
        parts[rule.ours.name.split(".")[0]].append(rule)
    text.check(parts["text"], dtype, others=rules_for(text.model))
    vision.check(parts["vision"], dtype, others=rules_for(vision.model))
    text_dtype, vision_dtype = (one.dtype_of(parts[part]) for one, part in ((text, "text"), (vision, "vision")))
    if dtype is None and text_dtype != vision_dtype:
        raise CheckpointError(f"{text_from} is in {text_dtype}, {vision_from} in {vision_dtype}; give a dtype for both")
    written = dtype or text_dtype
    with new_folder(out) as folder, CheckpointWriter(folder, model) as writer:
        for source, part in ((text, "text"), (vision, "vision")):
            for key, tensor in source.our_tensors(parts[part]):
                writer.add(key, tensor.to(written))
        for key, tensor in _random_projector([rule.ours for rule in parts["projector"]], seed):
            writer.add(key, tensor.to(written))
        for key in object_keys(model):
            writer.add_object(key, None)
        _copy_processor(text_from, folder)
    return model


def seal_checkpoint(ckpt_dir: Path) -> ModelConfig:
    """Write the manifest of a checkpoint from before there were manifests, as it now is. One that has its manifest is
    refused: sealing does not mend damage."""
    if (ckpt_dir / MANIFEST_FILE).exists():
        raise CheckpointError(f"{ckpt_dir} is sealed already; where it is damaged, take another checkpoint")
    model = CheckpointReader(ckpt_dir, is_sealed=False).model
    seal(ckpt_dir)
    return model


def _encoding(ckpt_dir: Path, tokenizer_from: Path | None) -> EncodingConfig | None:
    if tokenizer_from is not None:
        return encoding_of(tokenizer_from)
    return read_processor(ckpt_dir) if has_processor(ckpt_dir) else None


def _copy_processor(hf_dir: Path, ckpt_dir: Path) -> None:
    if (hf_dir / "tokenizer.json").is_file():
        write_processor(ckpt_dir, encoding_of(hf_dir))


class _HfModel:
    """A Hugging Face folder as a model: its configuration and its tensors under our keys."""

    def __init__(self, path: Path):
        self.path = path
        self.model = model_of(path)
        self.folder = SafetensorsFolder(path)

    def check(self, rules: list[Rule], dtype: torch.dtype | None, others: list[Rule] | None = None) -> None:
        """Refuse a folder without exactly the tensors of ``rules``; it may also hold those of ``others``."""
        expected = [spec for rule in rules for spec in rule.hf]
        optional = [spec for rule in rules for spec in rule.copies]
        optional += [spec for rule in others or () for spec in (*rule.hf, *rule.copies)]
        check_tensors(self.folder.tensors, expected, str(self.path), dtype, optional)

    def dtype_of(self, rules: list[Rule]) -> torch.dtype:
        return self.folder.tensors[rules[0].hf[0].name].dtype

    def our_tensors(self, rules: list[Rule]) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) for every rule. A tensor is good until the next one is asked for."""
        scratch = Scratch()
        for rule in rules:
            hf = [self.folder.read(spec.name) for spec in rule.hf]
            for copy in rule.copies:
                if copy.name in self.folder.tensors and not same_bits(hf[0], self.folder.read(copy.name)):
                    raise CheckpointError(
                        f"{self.path}: config.json ties {copy.name} to {rule.hf[0].name}, but their values differ; "
                        "set tie_word_embeddings to false"
                    )
            yield rule.ours.name, rule.to_ours(hf, _room(rule, scratch, hf[0].dtype))


def _room(rule: Rule, scratch: Scratch, dtype: torch.dtype) -> Tensor | None:
    """Where the rule may write, if it moves elements at all."""
    return scratch.take(rule.ours.numel, dtype) if rule.pieces else None


def _random_projector(specs: list[Spec], seed: int) -> Iterator[tuple[str, Tensor]]:
    """(key, fp32 tensor): matrices normal, biases 0, the norm 1."""
    generator = torch.Generator().manual_seed(seed)
    for spec in specs:
        if len(spec.shape) > 1:
            yield spec.name, torch.empty(spec.shape).normal_(0.0, _PROJECTOR_STD, generator=generator)
        else:
            yield spec.name, torch.zeros(spec.shape) if spec.name.endswith("bias") else torch.ones(spec.shape)
