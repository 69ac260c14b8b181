"""Compiled two-dimensional best fit: which waiting examples go into a pack. `packing` drives it."""

import numpy as np

from fat5.data.examples.kernels import jit

NEAR = 24  # waiting examples that a pack chooses among
REPEATS = 512  # waiting examples that are looked at for repeated lengths
MOST_KINDS = 10
LAST = 6  # most examples that the search at the end of a pack places at once
GOOD_ENOUGH = 0.002  # sum of both sides' shares, free and avoidable, at which the search ends


@jit
def _steer(encoder, decoder, taken, count, room, used, target):  # type: ignore[no-untyped-def]
    """Of the oldest NEAR waiting examples, the one that fits and keeps the sides most even; -1 if none at all fits."""
    best = -1
    best_score = np.inf
    seen = 0
    for i in range(count):
        if not taken[i]:
            if encoder[i] <= room[0] and decoder[i] <= room[1]:
                score = abs((used[0] + encoder[i]) / target[0] - (used[1] + decoder[i]) / target[1])
                if score < best_score:
                    best_score = score
                    best = i
            seen += 1
            if seen >= NEAR and best >= 0:
                break
    return best


@jit
def _finish(encoder, decoder, taken, count, room, weight, near, pairs, best):  # type: ignore[no-untyped-def]
    """The up to four of the oldest NEAR waiting examples that fill the room best, written to `best` (-1 pads).

    Returns what it leaves free, both sides weighted. All pairs of disjoint pairs: NEAR^4/8 sums of two numbers.
    """
    found = 0
    for i in range(count):
        if not taken[i] and encoder[i] <= room[0] and decoder[i] <= room[1]:
            near[found] = i
            found += 1
            if found == NEAR:
                break
    # pairs[p] = (first, second, encoder sum, decoder sum); a pair may be one example or none
    held = 1
    pairs[0] = -1, -1, 0, 0
    for a in range(found):
        pairs[held] = a, -1, encoder[near[a]], decoder[near[a]]
        held += 1
        for b in range(a):
            e = encoder[near[a]] + encoder[near[b]]
            d = decoder[near[a]] + decoder[near[b]]
            if e <= room[0] and d <= room[1]:
                pairs[held] = a, b, e, d
                held += 1
    least = np.inf
    best_p = best_q = 0
    for p in range(held):
        free_encoder = room[0] - pairs[p, 2]
        free_decoder = room[1] - pairs[p, 3]
        for q in range(p + 1):
            e = free_encoder - pairs[q, 2]
            d = free_decoder - pairs[q, 3]
            if e >= 0 and d >= 0:
                free = e * weight[0] + d * weight[1]
                if free < least:
                    a, b = pairs[p, 0], pairs[p, 1]
                    c, f = pairs[q, 0], pairs[q, 1]
                    if a != c and a != f and (b < 0 or (b != c and b != f)):
                        least = free
                        best_p, best_q = p, q
    best[:] = -1
    best[0], best[1] = pairs[best_p, 0], pairs[best_p, 1]
    best[2], best[3] = pairs[best_q, 0], pairs[best_q, 1]
    for k in range(4):
        if best[k] >= 0:
            best[k] = near[best[k]]
    return least


@jit
def _finish_kinds(encoder, decoder, taken, room, weight, kinds, best):  # type: ignore[no-untyped-def]
    """As `_finish`, for a window of few pairs of lengths (long documents cut at one length): the best six.

    Four of a handful of kinds make too few sums to choose from, so this searches two multisets of up to three kinds.
    Returns infinity, and leaves `best` alone, if less than half of the oldest REPEATS waiting are of such kinds.
    """
    distinct = 0
    seen = 0
    for i in range(encoder.size):
        if taken[i]:
            continue
        seen += 1
        known = False
        for k in range(distinct):
            if kinds[k, 0] == encoder[i] and kinds[k, 1] == decoder[i]:
                kinds[k, 2] += 1
                known = True
                break
        if not known and distinct < kinds.shape[0]:
            kinds[distinct] = encoder[i], decoder[i], 1
            distinct += 1
        if seen == REPEATS:
            break
    usable = 0
    covered = 0
    for k in range(distinct):
        if kinds[k, 2] >= 6 and usable < MOST_KINDS:
            kinds[usable] = kinds[k]
            covered += kinds[k, 2]
            usable += 1
    if covered < seen // 2 or seen < REPEATS:
        return np.inf
    sums = np.empty(((usable + 1) * (usable + 2) * (usable + 3) // 6, 5), np.int64)
    held = 0
    for a in range(usable + 1):  # `usable` itself stands for none
        for b in range(a, usable + 1):
            for c in range(b, usable + 1):
                e = 0
                d = 0
                for k in (a, b, c):
                    if k < usable:
                        e += kinds[k, 0]
                        d += kinds[k, 1]
                if e <= room[0] and d <= room[1]:
                    sums[held] = a, b, c, e, d
                    held += 1
    least = np.inf
    best_p = best_q = 0
    for p in range(held):
        for q in range(p + 1):
            e = room[0] - sums[p, 3] - sums[q, 3]
            d = room[1] - sums[p, 4] - sums[q, 4]
            if e >= 0 and d >= 0:
                free = e * weight[0] + d * weight[1]
                if free < least:
                    least = free
                    best_p, best_q = p, q
    wanted = 0
    best[:] = -1
    for side in range(2):
        for turn in range(3):
            kind = sums[best_p if side == 0 else best_q, turn]
            if kind == usable:
                continue
            for i in range(encoder.size):
                if taken[i] or encoder[i] != kinds[kind, 0] or decoder[i] != kinds[kind, 1]:
                    continue
                used = False
                for k in range(wanted):
                    used |= best[k] == i
                if not used:
                    best[wanted] = i
                    wanted += 1
                    break
    return least


@jit
def fill_pack(encoder, decoder, taken, limits, used, mean, overall, chosen):  # type: ignore[no-untyped-def]
    """Adds waiting examples to a pack until it is full; returns their number n, or -1 - n if the window runs low.

    The oldest goes first, so that none waits forever; then near ones that keep both sides even; and once only a few
    more fit, the best few by exhaustive search.

    Args:
        encoder, decoder: int64 lengths of the waiting examples, oldest first.
        taken: bool, set for those chosen.
        limits: int64 (5,): encoder budget, decoder budget, most examples, fewest waiting examples to choose from
            (fewer: the caller refills), examples in the pack so far.
        used: int64 (2,) in and out: tokens of each side in the pack.
        mean: float64 (2,): mean lengths of the waiting examples.
        overall: float64 (2,): mean lengths of the whole stream, nearly.
        chosen: int64 out, indices into the window.
    """
    count = encoder.size
    held = limits[4]
    waiting = count
    room = np.empty(2, np.int64)
    near = np.empty(NEAR, np.int64)
    pairs = np.empty((1 + NEAR + NEAR * (NEAR - 1) // 2, 4), np.int64)
    kinds = np.empty((2 * MOST_KINDS, 3), np.int64)
    tail = np.empty(LAST, np.int64)
    # Where the stream's ratio differs from the budgets', aiming at both would hoard one kind in the window.
    packs = min(limits[0] / mean[0], limits[1] / mean[1])
    target = mean * packs
    weight = 1.0 / target
    long_run = min(limits[0] / overall[0], limits[1] / overall[1])
    good = GOOD_ENOUGH + limits[0] / (overall[0] * long_run) - 1 + limits[1] / (overall[1] * long_run) - 1
    best_free = np.inf
    best_held = -1
    best_tail = np.full(LAST, -1, np.int64)
    while held < limits[2]:
        if waiting <= limits[3] and best_held < 0:
            return -1 - held
        room[0] = limits[0] - used[0]
        room[1] = limits[1] - used[1]
        left = min(room[0] / mean[0], room[1] / mean[1])
        if held > 0 and left <= LAST + 0.5 and limits[2] - held >= LAST:
            free = _finish_kinds(encoder, decoder, taken, room, weight, kinds, tail)
            if free < best_free:
                best_free, best_held = free, held
                best_tail[:] = tail
            if free > good and left <= 4.5:
                free = _finish(encoder, decoder, taken, count, room, weight, near, pairs, tail)
                if free < best_free:
                    best_free, best_held = free, held
                    best_tail[:] = tail
            if best_free < good:
                break
        pick = _steer(encoder, decoder, taken, count, room, used, target) if held else 0
        if pick < 0:
            break
        taken[pick] = True
        chosen[held] = pick
        held += 1
        waiting -= 1
        used[0] += encoder[pick]
        used[1] += decoder[pick]
    if best_held >= 0:
        free = (limits[0] - used[0]) * weight[0] + (limits[1] - used[1]) * weight[1]
        if best_free < free:
            for k in range(best_held, held):
                taken[chosen[k]] = False
                used[0] -= encoder[chosen[k]]
                used[1] -= decoder[chosen[k]]
            held = best_held
            for k in range(LAST):
                pick = best_tail[k]
                if pick >= 0:
                    taken[pick] = True
                    chosen[held] = pick
                    held += 1
                    used[0] += encoder[pick]
                    used[1] += decoder[pick]
    return held
