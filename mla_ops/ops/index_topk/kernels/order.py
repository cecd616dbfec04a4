"""The search of a threshold among scores in registers, and which keys a row may choose.

NOTE [Order keys]
Scores compare as floats do, which makes -0.0 equal to 0.0. NaN counts as the largest: a score reaches a guess if it is
*not below* it. Slots that hold no key have the score -inf, and eligibility is asked where -inf may be chosen, so it is
never mistaken for a value. An order key is an int32 of the same order: its successor is the next float, so half of the
way between two scores in bits takes 32 steps on any data.

NOTE [The threshold]
A row's choice follows from the largest t that at least topk scores reach. A search counts the scores that reach a
guess: one pass over the registers, and passes are what a selection costs. The logit of the share that reaches a
guess is nearly linear in the guess. So a search begins where the mean and the deviation of the scores put t, and
interpolates logits; an end that stays for two passes counts half (the Illinois rule). Scores of an indexer take 6 to
9 passes.

A count seen before says that scores are equal or far apart: then the lower end moves to a score that exists, and the
search ends there if topk lies among equal ones. After 16 passes guesses halve the bits, so a search ends after 16 + 32
of them on any data, infinities and NaN included, for which mean and deviation are of no use.
"""

import triton
import triton.language as tl

# Order keys of -inf, and of what is above +inf.
_LOWEST = tl.constexpr(-2139095041)
_ABOVE_ALL = tl.constexpr(2139095041)


@triton.jit
def _order_key(score):
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def next_above(score):
    """Return the next float above a score, +inf above itself."""
    return _score_of(tl.minimum(_order_key(score) + 1, _ABOVE_ALL - 1))


@triton.jit
def reaches(scores, guess):
    """Return which scores are not below a guess."""
    return (scores < guess) == 0


@triton.jit
def _sum(values, WARPS: tl.constexpr):
    """Return the fp32 sum of values, of fewer than 2**24 ones and zeros exactly.

    Every thread first adds what it holds itself, in four chains. So a count takes one comparison and one addition for
    each score; in a single chain of 32 the compiler packs the bits of comparisons instead, which takes three times as
    many instructions.
    """
    SIZE: tl.constexpr = values.shape[0]
    HELD: tl.constexpr = SIZE // (128 * WARPS) if SIZE > 128 * WARPS else 1
    return tl.sum(tl.sum(tl.reshape(values, [HELD, SIZE // HELD]), 0), 0)


@triton.jit
def _count(scores, guess, WARPS: tl.constexpr):
    """Return how many scores reach a guess."""
    return scores.shape[0] - _sum(tl.where(scores < guess, 1.0, 0.0), WARPS).to(tl.int32)


@triton.jit
def _logit(part, count):
    part = part.to(tl.float32)
    return tl.log2(part + 0.5) - tl.log2(count - part + 0.5)


@triton.jit
def narrow(scores, values, count, wanted, slack, WARPS: tl.constexpr):
    """Return `(t, reaching)`: the largest t that `wanted < count` scores reach, or one that up to `slack` more reach.

    `scores` hold `count` keys, and -inf where there is none. `values` are about the same, with zeros there: they decide
    where a search begins, never what it finds. See NOTE [The threshold].
    """
    wanted = tl.cast(wanted, tl.int32)
    reaching = tl.cast(count, tl.int32)
    size = reaching.to(tl.float32)
    mean = _sum(values, WARPS) / size
    deviation = tl.sqrt(_sum(values * values, WARPS) / size - mean * mean)
    goal = _logit(wanted, size)
    # 2.45 is the slope of the logistic distribution's logit, in bits per deviation.
    begin = mean - goal * deviation / 2.45
    low_score, low_error = begin - 2.0 * deviation, 4.9
    high_score, high_error = begin + 2.0 * deviation, -4.9
    low = tl.full([], _LOWEST, tl.int32)
    high = tl.full([], _ABOVE_ALL, tl.int32)
    reaching_high = 0
    last_side = 0
    step = 0
    while (reaching - wanted > slack) & (low + 1 < high):
        guess = _order_key(low_score + low_error / (low_error - high_error) * (high_score - low_score))
        halved = (low & high) + ((low ^ high) >> 1)
        guess = tl.where((step < 16) & (guess > low) & (guess < high), guess, halved)
        guess_score = _score_of(guess)
        in_guess = _count(scores, guess_score, WARPS)
        is_known = (in_guess == reaching) | ((in_guess == reaching_high) & (reaching_high > 0))
        error = _logit(in_guess, size) - goal
        is_low = in_guess >= wanted
        side = tl.where(is_low, 1, -1)
        kept = tl.where(side == last_side, 0.5, 1.0)
        last_side = side
        low = tl.where(is_low, guess, low)
        low_score = tl.where(is_low, guess_score, low_score)
        low_error = tl.where(is_low, error, low_error * kept)
        reaching = tl.where(is_low, in_guess, reaching)
        high = tl.where(is_low, high, guess)
        high_score = tl.where(is_low, high_score, guess_score)
        high_error = tl.where(is_low, high_error * kept, error)
        reaching_high = tl.where(is_low, reaching_high, in_guess)
        if is_known & (reaching - wanted > slack):
            least = tl.min(tl.where(scores >= _score_of(low), scores, float("inf")), 0)
            above = _order_key(least) + 1
            in_above = _count(scores, _score_of(above), WARPS)
            is_found = (in_above < wanted) | (least == float("inf"))
            low = tl.where(is_found, above - 1, above)
            high = tl.where(is_found, above, high)
            reaching = tl.where(is_found, reaching, in_above)
            low_score = least
            low_error = _logit(reaching, size) - goal
        step += 1
    return _score_of(low), reaching


@triton.jit
def chosen_places(scores, is_key, threshold, reaching, TOPK: tl.constexpr):
    """Return the place of every slot among those chosen, -1 where it is not.

    Chosen are the scores above the threshold, and of those equal to it the first ones that are keys. Where these are
    counted, scores tell the choice from there on: a compiler packs 32 predicates that leave a branch into bits, and
    takes as many instructions for it as for a search.
    """
    if (reaching > TOPK) | (threshold == -float("inf")):
        is_above = (scores <= threshold) == 0
        is_equal = (scores == threshold) & is_key
        num_above = tl.sum(is_above.to(tl.int32), 0)
        # So many are above the threshold only where they are NaN, and equal.
        is_nan = num_above >= TOPK
        is_equal = (is_above & is_nan) | (is_equal & (is_nan == 0))
        left = tl.where(is_nan, TOPK, TOPK - num_above)
        is_first = is_equal & (tl.cumsum(is_equal.to(tl.int32), 0) <= left)
        scores = tl.where(is_first | (is_above & (is_nan == 0)), 1.0, -1.0)
        threshold = 0.0
    place = tl.cumsum(tl.where(scores < threshold, 0, 1), 0) - 1
    return tl.where(scores < threshold, -1, place)


@triton.jit
def sample_rank(count, TOPK: tl.constexpr, SAMPLE: tl.constexpr):
    """Return `(rank, margin)`: about which rank in a sample key number TOPK of `count` has, give or take `margin`.

    The margin is two standard deviations of a random sample.
    """
    rank = TOPK * SAMPLE / count.to(tl.float32)
    return rank.to(tl.int32), 2 + (2.0 * tl.sqrt(rank)).to(tl.int32)


@triton.jit
def eligible(queries, starts, ends, seq_q, seq_kv, IS_CAUSAL: tl.constexpr):
    """Return `(first, past)`: the first key that each query may choose, and one past the last.

    `starts` and `ends` have any integer type and are clamped before they are narrowed: 2**40 is not key 0.
    """
    first = tl.maximum(tl.minimum(starts, seq_kv), 0).to(tl.int32)
    past = tl.maximum(tl.minimum(ends, seq_kv), 0).to(tl.int32)
    if IS_CAUSAL:
        past = tl.minimum(past, queries + (seq_kv - seq_q) + 1)
    return first, tl.maximum(past, first)


@triton.jit
def store_all(indices_ptr, first, count, TOPK: tl.constexpr, TOPK_BLOCK: tl.constexpr):
    """Choose every one of `count <= TOPK` keys from `first` on, and store -1 behind them."""
    slots = tl.arange(0, TOPK_BLOCK)
    tl.store(indices_ptr + slots, tl.where(slots < count, first + slots, -1), mask=slots < TOPK)
