"""The known evaluators, derived anew from what they are described to do; slow and plain, for comparison.

distance [Q, G]; people and cameras as lists. `kind`: numpy's sort, whose default is unstable, as in the originals; "stable" makes ties comparable.
"""

from __future__ import annotations

import numpy as np
from sklearn.metrics import average_precision_score, roc_curve

JUNK = -1


def hits_in_order(distance, person, camera, people, cameras, kind=None):
    """Gallery indices by distance, without the query's own person in its own camera, and whether each is the same person."""
    order = [g for g in np.argsort(distance, kind=kind) if not (people[g] == person and cameras[g] == camera)]
    return order, [people[g] == person for g in order]


def common_core(distance, query, gallery, kind=None):
    """TransReID, torchreid, fast-reid: (mAP, mINP, CMC as long as the gallery), over the queries with a match."""
    precisions, penalties, curves = [], [], []
    for row, person, camera in zip(distance, *query, strict=True):
        _, hits = hits_in_order(row, person, camera, *gallery, kind)
        if not any(hits):
            continue
        found, at_hits = 0, []
        for place, hit in enumerate(hits):
            found += hit
            if hit:
                at_hits.append(found / (place + 1))
                last = place + 1
        precisions.append(sum(at_hits) / found)
        penalties.append(found / last)
        curves.append([float(any(hits[: k + 1])) for k in range(distance.shape[1])])
    return np.mean(precisions), np.mean(penalties), np.mean(curves, axis=0)


def cluster_contrast(distance, query, gallery, kind=None):
    """(mAP by scikit-learn, CMC)."""
    precisions = []
    for row, person, camera in zip(distance, *query, strict=True):
        order, hits = hits_in_order(row, person, camera, *gallery, kind)
        if any(hits):
            precisions.append(average_precision_score(hits, -row[order]))
    return np.mean(precisions), common_core(distance, query, gallery, kind)[2]


def oxford_area(hits):
    """Area under precision and recall by trapezoids, walking down the whole ranking."""
    area, recall, precision, found = 0.0, 0.0, 1.0, 0
    for place, hit in enumerate(hits, start=1):
        found += hit
        area += (found / sum(hits) - recall) * (precision + found / place) / 2
        recall, precision = found / sum(hits), found / place
    return area


def market_matlab(distance, query, gallery):
    """(mAP, CMC) over all queries; junk (person -1) is passed over while scoring. A stable ascending sort."""
    areas, curves = [], []
    for row, person, camera in zip(distance, *query, strict=True):
        order, hits = hits_in_order(row, person, camera, *gallery, kind="stable")
        hits = [hit for g, hit in zip(order, hits, strict=True) if gallery[0][g] != JUNK]
        areas.append(oxford_area(hits) if any(hits) else 0.0)
        curves.append([float(any(hits[: k + 1])) for k in range(distance.shape[1])])
    return np.mean(areas), np.mean(curves, axis=0)


def layumi(distance, query, gallery, kind=None):
    """The same with similarities sorted upwards and turned round."""
    turned = np.array([np.argsort(np.argsort(-row, kind=kind)[::-1]) for row in distance])  # the place of each image
    return market_matlab(turned, query, gallery)


def torchreid_single_shot(distance, query, gallery, seed, num_repeats=10, kind=None):
    """CMC of one random image of each person, drawn anew `num_repeats` times a query, with numpy's global generator."""
    np.random.seed(seed)
    curves = []
    for row, person, camera in zip(distance, *query, strict=True):
        order, hits = hits_in_order(row, person, camera, *gallery, kind)
        if not any(hits):
            continue
        places = {}
        for place, g in enumerate(order):
            places.setdefault(gallery[0][g], []).append(place)
        curve = np.zeros(distance.shape[1])
        for _ in range(num_repeats):
            chosen = sorted(np.random.choice(of_person) for of_person in places.values())
            first = [hits[place] for place in chosen].index(True)
            curve[first:] += 1
        curves.append(curve / num_repeats)
    return np.mean(curves, axis=0)


def kept_pairs(distance, query, gallery):
    """(distance, same person) of all pairs that are not left out."""
    pairs = []
    for row, person, camera in zip(distance, *query, strict=True):
        for g, value in enumerate(row):
            if not (gallery[0][g] == person and gallery[1][g] == camera):
                pairs.append((value, gallery[0][g] == person))
    return np.array([value for value, _ in pairs]), np.array([same for _, same in pairs], bool)


def fast_reid_rate(distance, query, gallery, rate):
    """fast-reid's TPR@FPR: scores are distances, class 1 is "different person", and the nearest point of the curve is taken."""
    values, same = kept_pairs(distance, query, gallery)
    false, true, _ = roc_curve(~same, values)
    return true[np.argmin(np.abs(false - rate))]
