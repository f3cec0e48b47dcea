"""Read a recording, and compare two.

Shape suffixes: T recorded tokens · N tokens of a site · K chosen experts, -1 where a token has fewer · E experts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.optimize import linear_sum_assignment

from vlmoe.config import UserError, read_json

DESCRIPTION, TOKENS, ROUTING = "recording.json", "tokens.parquet", "routing.parquet"
FORMAT = 1
FACTOR = "factor."
PLAIN = ("sample", "kind", "modality", "position", "text")


class NoRecording(UserError):  # noqa: N818 - it says what is wrong with a folder
    """A folder that is not a whole recording; the message names the file and what was expected."""


@dataclass(frozen=True)
class Words:
    """A column of words: code_T into `values`."""

    code_T: np.ndarray
    values: list[str]

    def where(self, value: str) -> np.ndarray:
        """bool (T,): the tokens that have this value."""
        return self.code_T == (self.values.index(value) if value in self.values else -1)


@dataclass(frozen=True)
class SiteInfo:
    """A router. common: how many of its experts, the last ones, another modality's router may choose as well."""

    name: str
    layer: int
    modality: str
    experts: int
    k: int
    common: int = 0


@dataclass(frozen=True)
class Routed:
    """The decisions of one site. token_N: rows of the token table. expert_NK: best first, -1 where there is none.
    gate_NK, kept_NK: 0 and False there; kept is also False where a choice was dropped for capacity. entropy_N: nats."""

    site: SiteInfo
    token_N: np.ndarray
    expert_NK: np.ndarray
    gate_NK: np.ndarray
    kept_NK: np.ndarray
    entropy_N: np.ndarray

    @property
    def first_N(self) -> np.ndarray:
        """Each token's first choice, dropped or not; -1 for a token that has none."""
        return self.expert_NK[:, 0]


@dataclass
class Recording:
    """A recording on disk. Columns are read when they are asked for, and a site's decisions at each `at`."""

    folder: Path
    sites: dict[str, SiteInfo]
    tokens: int
    samples: int
    rate: float
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> Recording:
        """Raises NoRecording naming the file that is missing or broken."""
        folder = Path(folder)
        path = folder / DESCRIPTION
        try:
            said = read_json(path, nan=True)
            if said["format"] != FORMAT:
                raise NoRecording(f"{path}: format {said['format']}, expected {FORMAT}")
            sites = {s["name"]: SiteInfo(**s) for s in said["sites"]}
            found = cls(folder, sites, said["tokens"], said["samples"], said["rate"], said["about"])
        except FileNotFoundError:
            raise NoRecording(f"{folder}: no {DESCRIPTION}: not a recording, or an interrupted one") from None
        except (OSError, ValueError, KeyError, TypeError, UserError) as error:
            if isinstance(error, NoRecording):
                raise
            raise NoRecording(f"{path}: not a recording's description ({error!r})") from None
        for name in (TOKENS, ROUTING):
            found._open(name).close()
        rows = found._open(TOKENS).metadata.num_rows
        if rows != found.tokens:
            raise NoRecording(f"{folder / TOKENS}: holds {rows} tokens, {DESCRIPTION} says {found.tokens}")
        return found

    @functools.cached_property
    def factors(self) -> list[str]:
        """Names of the factors."""
        names = self._open(TOKENS).schema_arrow.names
        return [name.removeprefix(FACTOR) for name in names if name.startswith(FACTOR)]

    def factor(self, name: str) -> Words:
        """The value of a factor for each token, "" where nothing is known. Raises NoRecording for an unknown one."""
        if name not in self.factors:
            raise NoRecording(f"{self.folder}: no factor '{name}'; there are {', '.join(self.factors) or 'none'}")
        return self._words(FACTOR + name)

    def column(self, name: str) -> Words:
        """ "sample", "kind", "modality" or "text" of each token."""
        return self._words(name)

    @functools.cached_property
    def position_T(self) -> np.ndarray:
        return self._read(TOKENS, ["position"]).column("position").to_numpy()

    @functools.cached_property
    def sample_T(self) -> np.ndarray:
        """A number for each token's sample: those with one key that were put in as pair, image and text are three."""
        sample, kind = self.column("sample"), self.column("kind")
        return sample.code_T.astype(np.int64) * len(kind.values) + kind.code_T

    def at(self, site: str) -> Routed:
        """The decisions of one site. Raises NoRecording for one that was not recorded."""
        if site not in self.sites:
            raise NoRecording(f"{self.folder}: no site '{site}'; there are {', '.join(self.sites) or 'none'}")
        number = list(self.sites).index(site)
        table = self._read(ROUTING, None, [("site", "=", number)]).combine_chunks()
        return Routed(self.sites[site], *_padded(table))

    def site_order(self) -> list[str]:
        """Sites by layer."""
        return sorted(self.sites, key=lambda name: (self.sites[name].layer, name))

    # ---------------------------------------------------------------------------------------------------------- inside
    def _words(self, name: str) -> Words:
        cache = self.__dict__.setdefault("_columns", {})
        if name not in cache:
            column = pc.dictionary_encode(self._read(TOKENS, [name]).column(name)).combine_chunks()
            if isinstance(column, pa.ChunkedArray):
                column = column.chunk(0) if column.num_chunks else pa.array([], pa.dictionary(pa.int32(), pa.string()))
            cache[name] = Words(column.indices.to_numpy(zero_copy_only=False), column.dictionary.to_pylist())
        return cache[name]

    def _open(self, name: str) -> pq.ParquetFile:
        path = self.folder / name
        try:
            return pq.ParquetFile(path)
        except FileNotFoundError:
            raise NoRecording(f"{path}: missing") from None
        except (OSError, pa.ArrowException) as error:
            raise NoRecording(f"{path}: cannot be read as Parquet: {error}") from None

    def _read(self, name: str, columns: list[str] | None, filters: list[Any] | None = None) -> pa.Table:
        try:
            return pq.read_table(self.folder / name, columns=columns, filters=filters)
        except (OSError, pa.ArrowException) as error:
            raise NoRecording(f"{self.folder / name}: cannot be read: {error}") from None


def _padded(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """token_N, expert_NK, gate_NK, kept_NK, entropy_N of a site's rows."""
    N = len(table)
    token_N, entropy_N = (table.column(name).to_numpy() for name in ("token", "entropy"))
    length_N = pc.list_value_length(table.column("experts")).to_numpy()
    K = max(1, int(length_N.max(initial=0)))
    filled_NK = np.arange(K) < length_N[:, None]
    padded = []
    for name, filler in (("experts", -1), ("gates", 0.0), ("kept", False)):
        values = pc.list_flatten(table.column(name)).to_numpy()
        whole = np.full((N, K), filler, values.dtype)
        whole[filled_NK] = values
        padded.append(whole)
    return token_N, padded[0], padded[1], padded[2], entropy_N


# ------------------------------------------------------------------------------------------------------------ comparing
@dataclass
class Drift:
    """How far two recordings' choices at one site differ, over the tokens that both hold.

    first: share of tokens whose first choice changed; any: whose set of experts that served them changed. The same
    after the best matching of experts, which numbers them alike where they only changed places: expert e of the first
    recording is matching[e] of the second (-1: has no partner).
    """

    tokens: int
    first: float
    any: float
    first_matched: float
    any_matched: float
    matching: list[int]


def diff(a: Recording, b: Recording) -> dict[str, Drift]:
    """Site -> how far two recordings differ there: of two checkpoints, or of two inputs with the same keys.

    Tokens are matched by sample, modality and position. Sites that only one of them has are left out.
    Raises NoRecording when they share no token or no site.
    """
    row_a, row_b = _shared(a, b)
    names = [name for name in a.site_order() if name in b.sites]
    if not len(row_a) or not names:
        raise NoRecording(f"{a.folder} and {b.folder}: share no {'site' if len(row_a) else 'token'}")
    found = {}
    for name in names:
        routed_a, routed_b = a.at(name), b.at(name)
        place_a, place_b = _aligned(routed_a, row_a, a.tokens), _aligned(routed_b, row_b, b.tokens)
        both = (place_a >= 0) & (place_b >= 0)
        found[name] = _drift(routed_a, routed_b, place_a[both], place_b[both])
    return found


def token_keys(recording: Recording) -> pa.Table:
    """What a token is known by: sample, modality and position; and its row."""
    table = recording._read(TOKENS, ["sample", "modality", "position"])
    return table.append_column("row", pa.array(np.arange(len(table))))


def _shared(a: Recording, b: Recording) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a and of b that are the same token; of a key recorded twice, the first."""
    keys = ["sample", "modality", "position"]
    sides = [token_keys(r).group_by(keys).aggregate([("row", "min")]) for r in (a, b)]
    both = sides[0].join(sides[1], keys=keys, join_type="inner", right_suffix=" b").sort_by("row_min")
    return both.column("row_min").to_numpy(), both.column("row_min b").to_numpy()


def _aligned(routed: Routed, row_S: np.ndarray, tokens: int) -> np.ndarray:
    """For each shared token its place among the site's; -1: not there."""
    place_T = np.full(tokens, -1)
    place_T[routed.token_N] = np.arange(len(routed.token_N))
    return place_T[row_S]


def _drift(a: Routed, b: Routed, place_a: np.ndarray, place_b: np.ndarray) -> Drift:
    """place: of each token in either."""
    if not len(place_a):
        nan = float("nan")
        return Drift(0, nan, nan, nan, nan, [])
    first_a, first_b = a.first_N[place_a], b.first_N[place_b]
    set_a, set_b = (np.where(r.kept_NK, r.expert_NK, -1)[place] for r, place in ((a, place_a), (b, place_b)))
    known_N = (first_a >= 0) & (first_b >= 0)
    together_EE = np.zeros((a.site.experts, b.site.experts), np.int64)
    np.add.at(together_EE, (first_a[known_N], first_b[known_N]), 1)
    matching = np.full(a.site.experts, -1)
    rows, columns = linear_sum_assignment(together_EE, maximize=True)
    matching[rows] = columns
    renamed = np.append(matching, -1)  # -1, no expert, stays -1
    return Drift(
        tokens=len(place_a),
        first=float((first_a != first_b).mean()),
        any=_sets_differ(set_a, set_b),
        first_matched=float((renamed[first_a] != first_b).mean()),
        any_matched=_sets_differ(renamed[set_a], set_b),
        matching=matching.tolist(),
    )


def _sets_differ(a_NK: np.ndarray, b_NK: np.ndarray) -> float:
    K = max(a_NK.shape[1], b_NK.shape[1])
    a, b = (np.sort(np.pad(x, ((0, 0), (0, K - x.shape[1])), constant_values=-1), axis=1) for x in (a_NK, b_NK))
    return float((a != b).any(axis=1).mean())
