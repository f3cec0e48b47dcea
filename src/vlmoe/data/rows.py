"""The entries of a split among many files, without a number in memory for each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from vlmoe.data.files import HELD_OUT, chosen_rows, hash_entries, is_held_out

_KEPT = 64  # files whose rows are kept


def rows_of_file(file: str, count: int, split: str, share: float = HELD_OUT) -> np.ndarray:
    """Entry numbers of a split in one file of many: without the one that `split_rows` may hold out of few.

    share: of the entries, that is held out."""
    return chosen_rows(is_held_out(hash_entries(file, count), share), split)


class SplitRows(Sequence[int]):
    """`split_rows` of all files' entries in a row, computed a file at a time when asked for: eight bytes a sample would
    be gigabytes in each process.

    files, counts: names and entries of each. share: of the entries, that is held out. at_least_one: hold one out even
    where the hashes choose none, unless the share is 0.
    """

    def __init__(
        self,
        files: Sequence[str],
        counts: Sequence[int],
        split: str,
        share: float = HELD_OUT,
        at_least_one: bool = True,
    ) -> None:
        self.files, self.counts, self.split, self.share = files, counts, split, share
        self.starts = np.cumsum([0, *counts])
        self.only: tuple[int, int] | None = None  # file and entry of the one held out where the hashes choose none
        sizes: list[int] = []  # held-out entries of each file
        least = (1 << 64, 0, 0)
        none = at_least_one and share > 0  # and no entry is held out so far
        for number, (file, count) in enumerate(zip(files, counts, strict=True)):
            hashes = hash_entries(file, count)
            sizes.append(int(np.count_nonzero(is_held_out(hashes, share))))
            none = none and not sizes[-1]
            if none and count:
                entry = int(hashes.argmin())
                least = min(least, (int(hashes[entry]), number, entry))
        if none and self.starts[-1] > 1:
            self.only = least[1], least[2]
            sizes[least[1]] = 1
        held_out = np.array(sizes, dtype=np.int64)
        whole = np.asarray(counts, dtype=np.int64)
        chosen = {"all": whole, "val": held_out}.get(split, whole - held_out)
        self.ends = np.cumsum(chosen)
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> int:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = int(np.searchsorted(self.ends, index, side="right"))
        rows = self._rows(file)
        return int(self.starts[file] + rows[index - (int(self.ends[file]) - len(rows))])

    def __iter__(self) -> Iterator[int]:
        for file, start in enumerate(self.starts[:-1].tolist()):
            yield from (self._rows(file) + start).tolist()

    def _rows(self, file: int) -> np.ndarray:
        if file in self._kept:
            self._kept.move_to_end(file)
            return self._kept[file]
        held_out = is_held_out(hash_entries(self.files[file], self.counts[file]), self.share)
        if self.only is not None and self.only[0] == file:
            held_out[self.only[1]] = True
        self._kept[file] = chosen_rows(held_out, self.split)
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return self._kept[file]
