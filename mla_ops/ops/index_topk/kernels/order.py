"""Order keys, the search of a threshold among keys in registers, and which keys a row may choose.

NOTE [Order keys]
A score is kept as an int32 of the same order: -0.0 as 0.0, every NaN as the largest number. `NO_KEY` is below the key
of -inf and marks slots that hold no key, so eligibility is never mistaken for a value.

NOTE [The threshold]
A row's choice follows from the largest t with at least topk keys >= t. A search for t counts keys against a guess. That
is one pass over the registers, and the number of passes is what a selection costs. So two guesses of three interpolate
between the two ends, whose counts are known; the third halves the values. Every fourth pass moves the lower end to a
key that exists and counts the keys above it: the search ends there if topk lies among equal keys. After 16 passes
guesses halve the bits, so a search ends after 16 + 32 of them on any data. It ends early where a count is right.
"""

import triton
import triton.language as tl

NO_KEY = tl.constexpr(-2147483648)
_LARGEST = tl.constexpr(2147483647)


@triton.jit
def order_key(score):
    """Return fp32 scores as order keys."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(score != score, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _score_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def narrow(keys, wanted, slack, low, count_low, high, count_high):
    """Return `(t, count)`, `count` keys being >= t: the largest t with `wanted` keys, or one with up to `slack` more.

    Known are `count_low >= wanted` keys >= `low` and `count_high < wanted` keys > `high`. See NOTE [The threshold].
    """
    count_low = tl.cast(count_low, tl.int32)
    count_high = tl.cast(count_high, tl.int32)
    step = 0
    while (low < high) & (count_low - wanted > slack):
        low_score = _score_of(low)
        share = (count_low - wanted).to(tl.float32) / (count_low - count_high).to(tl.float32)
        share = tl.where(step % 3 == 2, 0.5, share)
        guess = order_key(low_score + share * (_score_of(high) - low_score))
        halved = (low | high) - ((low ^ high) >> 1)
        guess = tl.where((step < 16) & (guess > low) & (guess <= high), guess, halved)
        count = tl.sum((keys >= guess).to(tl.int32), 0)
        is_low = count >= wanted
        low = tl.where(is_low, guess, low)
        count_low = tl.where(is_low, count, count_low)
        high = tl.where(is_low, high, guess - 1)
        count_high = tl.where(is_low, count_high, count)
        if (step % 4 == 3) & (count_low - wanted > slack):
            exists = tl.min(tl.where(keys >= low, keys, 0x7FFFFFFF), 0)
            count = tl.sum((keys > exists).to(tl.int32), 0)
            is_found = count < wanted
            low = tl.where(is_found, exists, exists + 1)
            high = tl.where(is_found, exists, high)
            count_low = tl.where(is_found, count_low, count)
        step += 1
    return low, count_low


@triton.jit
def narrow_all(keys, is_key, count, wanted, slack):
    """Return what `narrow` does, where nothing is known of `count` keys but their number."""
    low = tl.min(tl.where(is_key, keys, 0x7FFFFFFF), 0)
    return narrow(keys, wanted, slack, low, count, tl.max(keys, 0), 0)


@triton.jit
def taken(keys, threshold, count, TOPK: tl.constexpr):
    """Return which slots are chosen: those above the threshold, and of the keys equal to it the first ones."""
    is_taken = keys >= threshold
    if count > TOPK:
        is_above = keys > threshold
        is_equal = keys == threshold
        left = TOPK - tl.sum(is_above.to(tl.int32), 0)
        is_taken = is_above | (is_equal & (tl.cumsum(is_equal.to(tl.int32), 0) <= left))
    return is_taken


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
