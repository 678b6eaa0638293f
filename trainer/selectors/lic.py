"""lic: one trigger of each of the user's interests in turn. READING: lifelong interest clusters.

As PinnerSage does (Pal et al., KDD 2020): the triggers are clustered by Ward's method on their vectors (vectors.py),
a cluster weighs sum of DECAY^(position - 1) over its members (size and recency), and the clusters, the heaviest first,
give their medoids (the member nearest to the cluster's mean), then their second nearest, and so on.
"""

from __future__ import annotations

import numpy as np

from trainer.selectors.protocol import Selector

CLUSTERS, DECAY = 10, 0.97


class Lic(Selector):
    name = "lic"

    def score(self, table, block):
        requests = table.requests
        vector_TD = block.vectors_of(requests.trigger_row_T, requests.request_T)
        score_T = np.zeros(len(vector_TD))
        for begin, end in zip(requests.trigger_offset_R1[:-1], requests.trigger_offset_R1[1:], strict=True):
            score_T[begin:end] = -turn_of_each(vector_TD[begin:end])
        return self.over_channels(score_T, table)


def turn_of_each(vector_ND: np.ndarray, clusters: int = CLUSTERS) -> np.ndarray:
    """int64 (N,): the turn of each trigger of a request, 0 the first; vectors come in the order of their positions."""
    from scipy.cluster.hierarchy import fcluster, linkage

    count = len(vector_ND)
    if count < 2:
        return np.zeros(count, np.int64)
    cluster_N = fcluster(linkage(vector_ND, "ward"), clusters, "maxclust") - 1
    weight_K = np.bincount(cluster_N, weights=DECAY ** np.arange(count))
    mean_KD = np.zeros((len(weight_K), vector_ND.shape[1]))
    np.add.at(mean_KD, cluster_N, vector_ND)
    mean_KD /= np.bincount(cluster_N)[:, None]
    distance_N = np.linalg.norm(vector_ND - mean_KD[cluster_N], axis=1)
    by_cluster = np.lexsort((np.arange(count), distance_N, cluster_N))
    first_K = np.searchsorted(cluster_N[by_cluster], np.arange(len(weight_K)))
    turn_N = np.empty(count, np.int64)
    turn_N[by_cluster] = np.arange(count) - first_K[cluster_N[by_cluster]]
    order = np.lexsort((np.arange(count), -weight_K[cluster_N], turn_N))
    place_N = np.empty(count, np.int64)
    place_N[order] = np.arange(count)
    return place_N
