"""Recall of an exact search.

Shape suffixes: N queries · M gallery · D width · C queries of one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmoe.metrics.scores import Score, mean_score

KS = (1, 5, 10)
TIE = 1e-5  # of unit vectors: two images alike differ by float32's rounding, which hangs on how they were batched


def ranks(query_ND: Tensor, gallery_MD: Tensor, positives: Sequence[Sequence[int]], chunk: int = 1024) -> Tensor:
    """(N,) the place, from 0, of each query's best right item by inner product; at most `chunk` x M scores are held.

    Wrong items that tie with it, to within TIE, stand before it: embeddings that are all alike find nothing. A query
    without a right item has the rank M.

    Raises ValueError: an embedding holds nan or infinity; nothing can be ranked by such numbers.
    """
    for name, x in (("queries", query_ND), ("gallery items", gallery_MD)):
        broken = int((~x.isfinite().all(dim=-1)).sum())
        if broken:
            raise ValueError(f"{broken} of {len(x)} {name} have embeddings that are no numbers (nan or infinite)")
    gallery_MD = gallery_MD.double()
    found = []
    for start in range(0, len(query_ND), chunk):
        score_CM = query_ND[start : start + chunk].double() @ gallery_MD.T
        right_CM = torch.zeros_like(score_CM, dtype=torch.bool)
        for row, items in enumerate(positives[start : start + chunk]):
            right_CM[row, list(items)] = True
        best_C = score_CM.masked_fill(~right_CM, -torch.inf).amax(dim=1, keepdim=True)
        found.append(((score_CM >= best_C - TIE) & ~right_CM).sum(dim=1))
    rank_N = torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)
    missing = torch.tensor([not items for items in positives], dtype=torch.bool, device=rank_N.device)
    return rank_N.masked_fill(missing, len(gallery_MD))


def recall(rank_N: Tensor, ks: Sequence[int] = KS) -> dict[str, Score]:
    """{"R@1": ..., "R@5": ..., "R@10": ...}: shares of queries with a right item among the first k."""
    return {f"R@{k}": mean_score((rank_N < k).double().tolist()) for k in ks}
