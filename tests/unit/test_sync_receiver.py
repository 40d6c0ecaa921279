"""What goes wrong between trainer and engine is caught by name, and nothing is taken until all is sent again."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mimo_megatron.errors import SyncError
from mimo_megatron.rl.sync.buckets import Bucket, Manifest, TensorEntry, entry_of, pack
from mimo_megatron.rl.sync.receiver import Receiver

WEIGHTS = {f"layer.{i}.weight": torch.randn(5, i + 1).to(torch.bfloat16) for i in range(6)}
VERSION = 4
ENTRIES = tuple(entry_of(name, tensor) for name, tensor in WEIGHTS.items())
EXPECTED = {entry.name: entry for entry in ENTRIES}


def manifest(version: int = VERSION) -> Manifest:
    return Manifest(version, ENTRIES)


def sent(version: int = VERSION) -> list[Bucket]:
    """Three buckets of two tensors each."""
    items = list(WEIGHTS.items())
    return [pack(version, number, items[2 * number : 2 * number + 2]) for number in range(3)]


def run(receiver: Receiver, announced: Manifest, buckets: list[Bucket], in_one_go: bool = False) -> dict[str, Tensor]:
    """One update, as an engine runs it."""
    receiver.begin(announced)
    held = {name: torch.zeros_like(tensor) for name, tensor in WEIGHTS.items()}
    for bucket in buckets:
        if in_one_go:
            receiver.copy(bucket, held.__getitem__)
        else:
            for name, tensor in receiver.take(bucket):
                held[name].copy_(tensor)
    receiver.finish(held.__getitem__)
    return held


def assert_closed_until_a_full_resend(receiver: Receiver) -> None:
    assert not receiver.is_open and receiver.version is None
    for attempt in (lambda: receiver.take(sent()[0]), lambda: receiver.finish()):
        with pytest.raises(SyncError, match="no update is under way"):
            attempt()
    assert run(receiver, manifest(), sent()).keys() == WEIGHTS.keys()
    assert receiver.version == VERSION


@pytest.mark.parametrize("in_one_go", [False, True], ids=["take", "copy"])
def test_a_whole_update_is_taken(in_one_go: bool) -> None:
    receiver = Receiver(EXPECTED)
    held = run(receiver, manifest(), sent(), in_one_go)
    assert list(held) == list(WEIGHTS) and all(torch.equal(held[name], WEIGHTS[name]) for name in WEIGHTS)
    assert receiver.version == VERSION and not receiver.is_open
    run(receiver, manifest(5), sent(5))
    assert receiver.version == 5


def replaced(position: int, entry: TensorEntry) -> Manifest:
    return Manifest(VERSION, (*ENTRIES[:position], entry, *ENTRIES[position + 1 :]))


EXTRA = TensorEntry("layer.9.weight", "BF16", (2,))
MANIFESTS = {
    "missing name": (Manifest(VERSION, ENTRIES[:-1]), r"1 missing: layer\.5\.weight"),
    "extra name": (Manifest(VERSION, (*ENTRIES, EXTRA)), r"1 extra: layer\.9\.weight BF16 \[2\]"),
    "wrong shape": (
        replaced(2, replace(ENTRIES[2], shape=(3, 5))),
        r"1 of another shape: layer\.2\.weight BF16 \[3, 5\], the engine's is \[5, 3\]",
    ),
    "wrong dtype": (
        replaced(2, replace(ENTRIES[2], dtype="F16")),
        r"1 of another dtype: layer\.2\.weight F16 \[5, 3\], the engine's is BF16",
    ),
    "repeated name": (Manifest(VERSION, (*ENTRIES, ENTRIES[0])), r"layer\.0\.weight is announced twice"),
}


@pytest.mark.parametrize("announced, words", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_of_another_model_is_refused_by_name(announced: Manifest, words: str) -> None:
    receiver = Receiver(EXPECTED)
    with pytest.raises(SyncError, match=words):
        receiver.begin(announced)
    assert_closed_until_a_full_resend(receiver)


@pytest.mark.parametrize("version", [VERSION, VERSION - 1], ids=["same", "older"])
def test_a_version_that_does_not_rise_is_refused(version: int) -> None:
    receiver = Receiver(EXPECTED)
    run(receiver, manifest(), sent())
    with pytest.raises(SyncError, match=f"version {version} is announced, and 4 is held"):
        receiver.begin(manifest(version))
    assert not receiver.is_open and receiver.version == VERSION


def flipped(bucket: Bucket, at: int) -> Bucket:
    data = bucket.data.clone()
    data[at] ^= 1
    return replace(bucket, data=data)


def entry_changed(bucket: Bucket, entry: TensorEntry) -> Bucket:
    return replace(bucket, tensors=(replace(bucket.tensors[0], entry=entry), *bucket.tensors[1:]))


Fault = Callable[[list[Bucket]], list[Bucket]]
FAULTS: dict[str, tuple[Fault, str]] = {
    "dropped bucket": (lambda b: [b[0], b[2]], "bucket 2 came too early"),
    "dropped last bucket": (lambda b: b[:2], r"ended after bucket 1 without layer\.4\.weight; layer\.5\.weight"),
    "repeated bucket": (lambda b: [b[0], b[0]], "bucket 0 came twice"),
    "flipped first bit": (lambda b: [b[0], flipped(b[1], 0)], r"the bytes of layer\.2\.weight are not those"),
    "flipped last bit": (lambda b: [b[0], flipped(b[1], -1)], r"the bytes of layer\.3\.weight are not those"),
    "bucket of another version": (lambda b: [b[0], replace(b[1], version=3)], "a bucket of version 3 came"),
    "wrong shape": (
        lambda b: [entry_changed(b[0], replace(ENTRIES[0], shape=(1, 5)))],
        r"holds layer\.0\.weight BF16 \[1, 5\], where the manifest has layer\.0\.weight BF16 \[5, 1\]",
    ),
    "wrong dtype": (
        lambda b: [entry_changed(b[0], replace(ENTRIES[0], dtype="F16"))],
        r"holds layer\.0\.weight F16",
    ),
    "extra name": (
        lambda b: [entry_changed(b[0], replace(ENTRIES[0], name="other"))],
        r"holds other BF16 \[5, 1\], where",
    ),
    "repeated tensor": (
        lambda b: [b[0], replace(b[0], number=1)],
        r"bucket 1 holds layer\.0\.weight BF16 \[5, 1\] for the second time",
    ),
    "one tensor too many": (
        lambda b: [*b, replace(b[0], number=3)],
        "for the second time, where the manifest has nothing more",
    ),
    "exchanged tensors": (
        lambda b: [pack(VERSION, 0, [*WEIGHTS.items()][1::-1])],
        r"holds layer\.1\.weight BF16 \[5, 2\], where the manifest has layer\.0",
    ),
    "cut bytes": (lambda b: [replace(b[0], data=b[0].data[:-2])], r"layer\.1\.weight BF16 \[5, 2\] cannot lie"),
}


@pytest.mark.parametrize("in_one_go", [False, True], ids=["take", "copy"])
@pytest.mark.parametrize("fault, words", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_caught_by_name(fault: Fault, words: str, in_one_go: bool) -> None:
    receiver = Receiver(EXPECTED)
    with pytest.raises(SyncError, match=words):
        run(receiver, manifest(), fault(sent()), in_one_go)
    assert_closed_until_a_full_resend(receiver)


def test_a_flipped_bit_is_never_given_out() -> None:
    receiver = Receiver(EXPECTED)
    receiver.begin(manifest())
    given = []
    with pytest.raises(SyncError):
        given.extend(name for name, _ in receiver.take(flipped(sent()[0], -1)))
    assert "layer.1.weight" not in given


def test_a_copy_to_the_wrong_place_is_found_by_reading_back() -> None:
    receiver = Receiver(EXPECTED)
    receiver.begin(manifest())
    held = {name: tensor.clone() for bucket in sent() for name, tensor in receiver.take(bucket)}
    held["layer.3.weight"][0, 0] += 1
    with pytest.raises(SyncError, match=r"holds other values than were sent in layer\.3\.weight:"):
        receiver.finish(held.__getitem__)
    assert_closed_until_a_full_resend(receiver)


def test_a_bucket_that_is_not_copied_to_its_end_closes_the_receiver() -> None:
    receiver = Receiver(EXPECTED)
    receiver.begin(manifest())
    next(iter(receiver.take(sent()[0])))
    with pytest.raises(SyncError, match="bucket 0 was not copied to its end"):
        receiver.take(sent()[1])
    assert_closed_until_a_full_resend(receiver)


def test_nothing_is_taken_before_an_update_begins() -> None:
    assert_closed_until_a_full_resend(Receiver(EXPECTED))
