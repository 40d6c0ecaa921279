"""The engine's side of an update, the same for every engine: nothing is taken that was not announced and is not whole.

Invariants, each tested with a planted fault:

* The manifest names exactly the expected tensors, shapes and dtypes, and a later version than the one held.
* Buckets come in order, none missing and none twice; tensors come in the manifest's order, each once.
* ``take`` gives a tensor out only after the checksum of its bytes was found right.
* After any fault the receiver is closed until the next ``begin``: the whole update is sent again.

What went wrong half-way leaves the engine's weights mixed, so its gate stays closed until an update ends well.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor
from xxhash import xxh3_64

from mimo_megatron.errors import SyncError
from mimo_megatron.rl.sync.buckets import (
    Bucket,
    Manifest,
    PackedTensor,
    TensorEntry,
    TensorOf,
    check_entries,
    checksum,
    copy_hashed,
    entry_of,
)

_NAMES_SHOWN = 5
_AGAIN = "send the whole update again"


class Receiver:
    """Checks one update after another; ``version`` is that of the last one that ended well.

    For each bucket: ``for name, tensor in receiver.take(bucket): weights[name].copy_(tensor)``. The loop must run to
    its end before the next call, and the tensors are views of the bucket: they are to be copied, not kept. An engine
    whose weights lie on the CPU says ``receiver.copy(bucket, weights.__getitem__)``.
    """

    def __init__(self, expected: Mapping[str, TensorEntry]):
        self._expected = dict(expected)
        self._manifest: Manifest | None = None
        self._checksums: dict[str, int] = {}
        """Of the tensors given out so far, in order."""
        self._next_bucket = 0
        self._is_taking = False
        self.version: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether an update is under way and without fault."""
        return self._manifest is not None

    def begin(self, manifest: Manifest) -> None:
        """Take ``manifest`` as what will come. ``SyncError`` by name where it is not exactly what is expected."""
        self._manifest = None
        check_entries(manifest.tensors)
        if self.version is not None and manifest.version <= self.version:
            raise SyncError(
                f"version {manifest.version} is announced, and {self.version} is held: versions must rise; "
                "publish the trainer's current one"
            )
        self._check_expected(manifest)
        self._checksums, self._next_bucket, self._is_taking = {}, 0, False
        self._manifest = manifest

    def take(self, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
        """(name, view of its bytes) of every tensor in the bucket, each checked before it is given out."""
        self._admit(bucket)
        return self._tensors(bucket)

    def copy(self, bucket: Bucket, place_of: TensorOf) -> None:
        """As ``take`` and a copy of each tensor to ``place_of(name)``, a contiguous CPU tensor, in one go: a third
        faster. Wrong bytes are found when they have been copied; the engine's gate is closed, and stays so."""
        self._admit(bucket)
        for packed in bucket.tensors:
            digest = xxh3_64()
            copy_hashed(place_of(packed.entry.name), bucket.view(packed), digest)
            self._verify(bucket, packed, digest.intdigest())
        self._is_taking = False

    def finish(self, read_back: TensorOf | None = None) -> None:
        """``SyncError`` unless every tensor came. With ``read_back`` also what the engine now holds is compared with
        the checksums, which finds a copy into the wrong place."""
        manifest = self._under_way()
        self._manifest = None
        missing = [entry.name for entry in manifest.tensors if entry.name not in self._checksums]
        if missing:
            raise SyncError(
                f"the update to version {manifest.version} ended after bucket {self._next_bucket - 1} without "
                f"{_shown(missing)}; {_AGAIN}"
            )
        if read_back is not None:
            _check_held(manifest, self._checksums, read_back)
        self.version = manifest.version

    def _under_way(self) -> Manifest:
        if self._manifest is None:
            raise SyncError(f"no update is under way, or it has failed: begin one with a manifest and {_AGAIN}")
        if self._is_taking:
            self._manifest = None
            raise SyncError(f"bucket {self._next_bucket - 1} was not copied to its end; {_AGAIN}")
        return self._manifest

    def _tensors(self, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
        for packed in bucket.tensors:
            tensor = bucket.view(packed)
            self._verify(bucket, packed, checksum(tensor))
            yield packed.entry.name, tensor
        self._is_taking = False

    def _verify(self, bucket: Bucket, packed: PackedTensor, found: int) -> None:
        if found != packed.checksum:
            self._manifest = None
            raise SyncError(
                f"bucket {bucket.number}: the bytes of {packed.entry.name} are not those that were sent: checksum "
                f"{found:016x}, announced {packed.checksum:016x}; {_AGAIN}"
            )
        self._checksums[packed.entry.name] = packed.checksum

    def _admit(self, bucket: Bucket) -> None:
        manifest = self._under_way()
        try:
            self._check_bucket(bucket, manifest)
        except SyncError:
            self._manifest = None
            raise
        self._next_bucket += 1
        self._is_taking = True

    def _check_expected(self, manifest: Manifest) -> None:
        announced = {entry.name: entry for entry in manifest.tensors}
        both = [(entry, self._expected[name]) for name, entry in announced.items() if name in self._expected]
        faults = {
            "missing": [name for name in self._expected if name not in announced],
            "extra": [str(entry) for name, entry in announced.items() if name not in self._expected],
            "of another shape": [
                f"{one}, the engine's is {list(own.shape)}" for one, own in both if one.shape != own.shape
            ],
            "of another dtype": [f"{one}, the engine's is {own.dtype}" for one, own in both if one.dtype != own.dtype],
        }
        lines = [f"  {len(names)} {kind}: {_shown(names)}" for kind, names in faults.items() if names]
        if lines:
            head = f"the manifest of version {manifest.version} is not of the engine's model:"
            remedy = "  Start the engine from an export of the model that is trained."
            raise SyncError("\n".join([head, *lines, remedy]))

    def _check_bucket(self, bucket: Bucket, manifest: Manifest) -> None:
        if bucket.version != manifest.version:
            raise SyncError(
                f"a bucket of version {bucket.version} came within the update to {manifest.version}; {_AGAIN}"
            )
        if bucket.number != self._next_bucket:
            kind = "came twice" if bucket.number < self._next_bucket else "came too early: one before it was dropped"
            raise SyncError(f"bucket {bucket.number} {kind} (expected: {self._next_bucket}); {_AGAIN}")
        bucket.header.with_data(bucket.data)
        bucket.header.check()
        first = len(self._checksums)
        wanted = manifest.tensors[first : first + len(bucket.tensors)]
        for position, packed in enumerate(bucket.tensors):
            if position >= len(wanted) or packed.entry != wanted[position]:
                raise SyncError(self._misplaced(bucket, packed, wanted[position:]))

    def _misplaced(self, bucket: Bucket, packed: PackedTensor, wanted: tuple[TensorEntry, ...]) -> str:
        announced = wanted[0] if wanted else "nothing more"
        again = " for the second time" if packed.entry.name in self._checksums else ""
        return f"bucket {bucket.number} holds {packed.entry}{again}, where the manifest has {announced}; {_AGAIN}"


def _check_held(manifest: Manifest, checksums: Mapping[str, int], read_back: TensorOf) -> None:
    wrong = []
    for entry in manifest.tensors:
        held = read_back(entry.name)
        if entry_of(entry.name, held) != entry or checksum(held.contiguous()) != checksums[entry.name]:
            wrong.append(entry.name)
    if wrong:
        raise SyncError(
            f"after the update to version {manifest.version} the engine holds other values than were sent in "
            f"{_shown(wrong)}: it copied them wrongly; {_AGAIN}, and replace the engine if that fails too"
        )


def _shown(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return "; ".join(names[:_NAMES_SHOWN]) + (f"; and {more} more" if more > 0 else "")
