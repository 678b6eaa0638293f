"""pdn: a trigger's weight times the weight of the paths that leave it, after the Path-based Deep Network.

Source: Li et al., Path-based Deep Network for Candidate Item Matching in Recommenders, SIGIR 2021. There a trigger net
weighs how much the user cares for the trigger, a similarity net how near a candidate is to it, and an item's score sums
the products over its paths. READING for a choice of triggers:

    pdn(x, c) = P(R_c(x, t) holds the very next counted view | x alone) * mean neighbour score of R_c(x)

with P a logistic net for each channel on the trigger-side features, fitted on the training requests.
"""

from __future__ import annotations

import numpy as np

from trainer.selectors.protocol import Selector

MOST_TRIGGERS = 400_000  # training triggers that the net is fitted on
RIDGE, STEPS = 1e-3, 25


class Pdn(Selector):
    name = "pdn"
    learns = True

    def __init__(self, config, rows, seed):
        super().__init__(config, rows, seed)
        self.kept: list[tuple[int, np.ndarray, np.ndarray]] = []  # (hash of a request, features, next hits)
        self.count = 0

    def learn(self, training):
        requests = training.table.requests
        feature_TF, bounds = trigger_features(training.table), requests.trigger_offset_R1
        for r in np.argsort(training.hash_R, kind="stable"):
            mine = slice(bounds[r], bounds[r + 1])
            self.kept.append((int(training.hash_R[r]), feature_TF[mine].astype(np.float32),
                              training.next_hit_TC[mine]))
        self.kept.sort(key=lambda one: one[0])
        self.count = 0
        for place, (_, feature_XF, _) in enumerate(self.kept):
            self.count += len(feature_XF)
            if self.count >= MOST_TRIGGERS:
                del self.kept[place + 1:]
                break

    def ready(self):
        feature_TF = np.concatenate([one[1] for one in self.kept]).astype(np.float64)
        hit_TC = np.concatenate([one[2] for one in self.kept])
        self.mean_F, self.scale_F = feature_TF.mean(axis=0), feature_TF.std(axis=0).clip(1e-6)
        self.weight_CF = np.stack([logistic(self._scaled(feature_TF), hit_T) for hit_T in hit_TC.T])
        self.kept = []

    def _scaled(self, feature_TF):
        return np.column_stack([np.ones(len(feature_TF)), (feature_TF - self.mean_F) / self.scale_F])

    def score(self, table, block):
        chance_TC = 1 / (1 + np.exp(-(self._scaled(trigger_features(table)) @ self.weight_CF.T).clip(-30, 30)))
        return chance_TC * table.mean_score_TC


def trigger_features(table) -> np.ndarray:
    """float64 (T, F): what is known of a trigger alone."""
    watch_T, best_T, age_T = (np.log1p(np.nan_to_num(values.astype(np.float64)).clip(0))
                              for values in (table.watch_s_T, table.best_watch_s_T, table.age_s_T))
    columns = [watch_T, best_T, np.isnan(table.watch_s_T), np.isnan(table.best_watch_s_T), age_T,
               np.isnan(table.age_s_T), np.log1p(table.views_T), np.log(table.requests.position_T),
               table.requests.position_T, table.is_effective_T, table.is_target_T, table.popularity_T,
               table.tag_share_T, *(table.feedback[name] == 1 for name in sorted(table.feedback))]
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=1)


def logistic(feature_TF: np.ndarray, label_T: np.ndarray) -> np.ndarray:
    """float64 (F,): weights of a logistic regression with a small ridge, by Newton's method."""
    weight_F = np.zeros(feature_TF.shape[1])
    ridge_FF = RIDGE * len(feature_TF) * np.eye(len(weight_F))
    for _ in range(STEPS):
        chance_T = 1 / (1 + np.exp(-(feature_TF @ weight_F).clip(-30, 30)))
        gradient_F = feature_TF.T @ (chance_T - label_T) + ridge_FF @ weight_F
        curvature_FF = (feature_TF * (chance_T * (1 - chance_T))[:, None]).T @ feature_TF + ridge_FF
        step_F = np.linalg.solve(curvature_FF, gradient_F)
        weight_F -= step_F
        if np.abs(step_F).max() < 1e-8:
            break
    return weight_F
