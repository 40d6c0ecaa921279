"""The byte forms of an update: what is written is read back, and anything else is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64, xxh3_64_intdigest

from mimo_megatron.errors import SyncError
from mimo_megatron.rl.sync import buckets
from mimo_megatron.rl.sync.buckets import ALIGNMENT, BucketHeader, Manifest, TensorEntry, checksum, copy_hashed, pack
from mimo_megatron.rl.sync.shared_memory import SlotNotice

TENSORS = [
    ("model.embed_tokens.weight", torch.randn(7, 5)),
    ("model.norm.weight", torch.randn(3).to(torch.bfloat16)),
    ("empty", torch.empty(0, 4)),
    ("scalar", torch.tensor(1.5, dtype=torch.float16)),
]
BUCKET = pack(3, 1, TENSORS)
MANIFEST = Manifest(3, tuple(packed.entry for packed in BUCKET.tensors))
NOTICE = SlotNotice(1, 4096, BUCKET.header)
FORMS: list[Any] = [MANIFEST, BUCKET.header, NOTICE]


def test_a_bucket_holds_its_tensors_at_multiples_of_64_bytes_with_their_checksums() -> None:
    assert [packed.offset for packed in BUCKET.tensors] == [0, 192, 256, 256]
    for (name, tensor), packed in zip(TENSORS, BUCKET.tensors, strict=True):
        assert packed.entry.name == name and packed.offset % ALIGNMENT == 0
        assert torch.equal(BUCKET.view(packed), tensor) and BUCKET.view(packed).dtype == tensor.dtype
        written = BUCKET.data[packed.offset : packed.end].numpy().tobytes()
        assert packed.checksum == xxh3_64_intdigest(written)
    assert [packed.entry.dtype for packed in BUCKET.tensors] == ["F32", "BF16", "F32", "F16"]


@pytest.mark.parametrize("length", [0, 1, 1 << 16, (1 << 16) + 1, 300_001])
def test_copying_by_blocks_gives_the_same_bytes_and_checksum(length: int) -> None:
    here, there, digest = torch.randn(length).to(torch.bfloat16), torch.zeros(length, dtype=torch.bfloat16), xxh3_64()
    copy_hashed(there, here, digest)
    assert torch.equal(there, here) and digest.intdigest() == checksum(here)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
def test_what_is_written_is_read_back(form: Any) -> None:
    assert type(form).from_json(form.to_json()) == form


def test_a_bucket_is_its_header_and_its_bytes() -> None:
    again = BucketHeader.from_json(BUCKET.header.to_json()).with_data(BUCKET.data.clone())
    assert again.header == BUCKET.header and torch.equal(again.data, BUCKET.data)


def edited(form: Any, edit: Any) -> bytes:
    tree = json.loads(form.to_json())
    edit(tree)
    return json.dumps(tree, separators=(",", ":")).encode()


EDITS = {
    "unknown key": lambda tree: tree.update(more=1),
    "unknown inner key": lambda tree: tree["tensors"][0].update(more=1),
    "missing key": lambda tree: tree.pop("version"),
    "text for a number": lambda tree: tree.update(version="3"),
    "true for a number": lambda tree: tree.update(version=True),
    "a fraction": lambda tree: tree.update(version=3.0),
    "a negative number": lambda tree: tree.update(version=-1),
    "a huge number": lambda tree: tree.update(version=1 << 60),
    "null": lambda tree: tree.update(tensors=None),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("form", [MANIFEST, BUCKET.header], ids=lambda form: type(form).__name__)
def test_another_schema_is_refused(form: Any, edit: Any) -> None:
    with pytest.raises(SyncError, match="this is not"):
        type(form).from_json(edited(form, edit))


TEXTS = {
    "cut": lambda text: text[:-1],
    "a space": lambda text: text.replace(b":", b": ", 1),
    "more after it": lambda text: text + b"{}",
    "a repeated key": lambda text: text.replace(b'"version":3', b'"version":3,"version":3'),
    "an escaped letter": lambda text: text.replace(b"norm", b"nor\\u006d"),
    "nothing": lambda text: b"",
    "not text": lambda text: b"\xff" + text,
    "nested without end": lambda text: b"[" * 100_000,
    "pickle": lambda text: b"\x80\x04K\x01.",
}


@pytest.mark.parametrize("change", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: type(form).__name__)
def test_other_bytes_are_refused(form: Any, change: Any) -> None:
    changed = change(form.to_json())
    assert changed != form.to_json()
    with pytest.raises(SyncError, match="this is not"):
        type(form).from_json(changed)


@given(st.integers(0, len(BUCKET.header.to_json()) - 1), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_means_another_header(at: int, byte: int) -> None:
    data = bytearray(BUCKET.header.to_json())
    data[at] = byte
    try:
        found = BucketHeader.from_json(bytes(data))
    except SyncError:
        return
    assert found.to_json() == bytes(data)


def test_a_long_header_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "MOST_HEADER_BYTES", 100)
    with pytest.raises(SyncError, match="at most 100"):
        Manifest.from_json(MANIFEST.to_json())


def test_an_unknown_dtype_and_a_repeated_name_are_refused() -> None:
    for entries, word in (
        ((TensorEntry("a", "F31", (2,)),), "unknown dtype 'F31'"),
        ((TensorEntry("a", "F32", (2,)), TensorEntry("a", "F32", (2,))), "a is announced twice"),
    ):
        with pytest.raises(SyncError, match=word):
            Manifest.from_json(Manifest(1, entries).to_json())


@pytest.mark.parametrize("offset", [4, 128, 320], ids=["not aligned", "over the one before", "past the end"])
def test_a_tensor_that_cannot_lie_where_it_is_said_to_is_refused(offset: int) -> None:
    first, second = BUCKET.tensors[:2]
    header = replace(BUCKET.header, tensors=(first, replace(second, offset=offset)))
    with pytest.raises(SyncError, match=r"model\.norm\.weight BF16 \[3\] cannot lie"):
        BucketHeader.from_json(header.to_json())


@pytest.mark.parametrize("data", [BUCKET.data[:-1], BUCKET.data.view(torch.int8)], ids=["short", "another dtype"])
def test_other_bytes_than_announced_are_refused(data: torch.Tensor) -> None:
    with pytest.raises(SyncError, match=f"announces {len(BUCKET.data)} bytes"):
        BUCKET.header.with_data(data)


def test_a_slot_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SyncError, match="slot"):
        SlotNotice.from_json(replace(NOTICE, slot=2).to_json())
