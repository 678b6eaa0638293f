"""nic: the triggers nearest to the user's centre of interest. READING: nearest interest centre.

    nic(x) = cos(v(x), mean of v(y) over the user's latest effective views y)

with the item vectors of vectors.py, made from the neighbour lists that the request sees.
"""

from __future__ import annotations

import numpy as np

from trainer.selectors.protocol import Selector


class Nic(Selector):
    name = "nic"

    def score(self, table, block):
        offset_R1, row_H = block.latest_views
        request_H = np.repeat(np.arange(len(offset_R1) - 1), np.diff(offset_R1))
        request_T = table.requests.request_T
        vector = block.vectors_of(np.concatenate([table.requests.trigger_row_T, row_H]),
                                  np.concatenate([request_T, request_H]))
        vector_TD, vector_HD = vector[:len(request_T)], vector[len(request_T):]
        centre_RD = np.zeros((len(offset_R1) - 1, vector.shape[1]))
        np.add.at(centre_RD, request_H, vector_HD)
        centre_RD /= np.linalg.norm(centre_RD, axis=1, keepdims=True).clip(1e-9)
        return self.over_channels(np.einsum("td,td->t", vector_TD, centre_RD[request_T]), table)
