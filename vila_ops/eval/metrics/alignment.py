"""Chamfer similarity of two sets of embeddings. Pure."""

# V visual tokens, T textual tokens, D dimension of the states

import numpy as np
from numpy.typing import NDArray


def chamfer_similarity(visual: NDArray[np.float64], textual: NDArray[np.float64]) -> float:
    """The Chamfer similarity of two sets of embeddings, (V, D) and (T, D), in [-1, 1].

    The mean over the visual tokens of the highest cosine to a textual one, and the same with the sets exchanged,
    averaged. This is the Chamfer distance (Barrow et al., IJCAI 1977) with cosines in place of distances, which do not
    depend on lengths (VILA, arXiv:2312.07533, Fig. 3).
    Raises ValueError for an empty set, or for an embedding that is zero or not finite.
    """
    if not len(visual) or not len(textual):
        raise ValueError(f"{len(visual)} visual and {len(textual)} textual tokens; a similarity needs both")
    cosines = _directions(visual) @ _directions(textual).T
    return float(cosines.max(axis=1).mean() + cosines.max(axis=0).mean()) / 2


def _directions(states: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(states, axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and lengths.all()):
        raise ValueError("a state is zero or not finite, so it has no direction")
    directions: NDArray[np.float64] = states / lengths
    return directions
