"""The passes over logits from which `sampling.py` makes the op `sample`.

A row is cut into pieces, one a program, so that a single row keeps many processors busy. Weights are whole numbers,
2^42 for the most likely token: their sums do not depend on the order, so that neither the cut nor the batch changes a
draw. "The first token up to which more than x stands" is found in the order of likelihood without sorting: a key
combines logit and id, larger for the more likely token, and the search fixes two bits of it in each pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

PIECE = tl.constexpr(4096)  # tokens that one program looks at
ONE = tl.constexpr(float(1 << 42))  # the largest weight
ID_BITS = tl.constexpr(20)  # a vocabulary is smaller than 2^20
KEY_BITS = tl.constexpr(52)  # 32 of the logit above those of the id
LAST_ID = tl.constexpr((1 << 20) - 1)

CUTS = tl.constexpr(16)  # distances from the largest logit at which tokens are counted and weighed
LISTED = tl.constexpr(4096)  # most tokens that are searched as a list; where more are needed, the whole row is

PROMPT = tl.constexpr(1 << 24)  # in the notes on a token: it occurs in the prompt; below, how often in the output
ALLOWED = tl.constexpr(1 << 25)

# --- the most likely token -------------------------------------------------------------------------------------------


@triton.jit
def best_kernel(values_ptr, ids_ptr, x_ptr, vocab, stride, num_pieces, FINITE: tl.constexpr):
    """Each piece's largest logit, NaN where one is not finite, and the first id that has it: two [M, pieces]."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(x_ptr + row * stride + token, mask=token < vocab, other=-float("inf"))
    best = tl.max(x, axis=0)
    first = tl.min(tl.where(x == best, token, LAST_ID), axis=0)
    if FINITE:
        faults = tl.sum(((tl.abs(x) < float("inf")) == (token >= vocab)).to(tl.int32), axis=0)
        best = tl.where(faults > 0, float("nan"), best)
    tl.store(values_ptr + row * num_pieces + piece, best)
    tl.store(ids_ptr + row * num_pieces + piece, first)


@triton.jit
def _merge(values_ptr, ids_ptr, row, num_pieces, PIECES: tl.constexpr):
    """A row's largest logit, the first id that has it, whether all are finite where that was looked at."""
    piece = tl.arange(0, PIECES)
    values = tl.load(values_ptr + row * num_pieces + piece, mask=piece < num_pieces, other=-float("inf"))
    ids = tl.load(ids_ptr + row * num_pieces + piece, mask=piece < num_pieces, other=LAST_ID)
    best = tl.max(values, axis=0)
    first = tl.min(tl.where(values == best, ids, LAST_ID), axis=0)
    return best, first, tl.sum((values != values).to(tl.int32), axis=0) == 0


@triton.jit
def settle_kernel(
    tokens_ptr, raw_values_ptr, raw_ids_ptr, values_ptr, ids_ptr, slots_ptr, forced_ptr, num_pieces,
    PLAIN: tl.constexpr, PIECES: tl.constexpr,
):
    """Each row's token where nothing is drawn, or the code why there is none: int64 [M]."""
    row = tl.program_id(0).to(tl.int64)
    best, token, is_finite = _merge(raw_values_ptr, raw_ids_ptr, row, num_pieces, PIECES)
    if not PLAIN:
        slot = tl.load(slots_ptr + row)
        if slot >= 0:
            best, token, _ = _merge(values_ptr, ids_ptr, slot, num_pieces, PIECES)
            token = tl.where(best == -float("inf"), -2, token)
        forced = tl.load(forced_ptr + row)
        token = tl.where(forced >= 0, forced.to(tl.int32), token)
    tl.store(tokens_ptr + row, tl.where(is_finite, token, -1).to(tl.int64))


# --- what changes logits ---------------------------------------------------------------------------------------------


@triton.jit
def note_kernel(addresses_ptr, notes_ptr, count, BLOCK: tl.constexpr):
    """Write notes at addresses: 1 is added, flags are set."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    address = tl.load(addresses_ptr + i, mask=i < count, other=0).to(tl.pointer_type(tl.int32))
    note = tl.load(notes_ptr + i, mask=i < count, other=0)
    tl.atomic_add(address, note, mask=note == 1)
    tl.atomic_or(address, note, mask=note > 1)


@triton.jit
def adjust_kernel(out_ptr, x_ptr, wholes_ptr, factors_ptr, masks_ptr, vocab, stride, mask_stride):
    """Adjusted logits [A, V] of some rows of x: what is not allowed to minus infinity, and penalties."""
    slot = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    inside = token < vocab
    row, mask_row = tl.load(wholes_ptr + slot * 4), tl.load(wholes_ptr + slot * 4 + 1)
    has_allowed, address = tl.load(wholes_ptr + slot * 4 + 2), tl.load(wholes_ptr + slot * 4 + 3)
    repetition, frequency = tl.load(factors_ptr + slot * 3), tl.load(factors_ptr + slot * 3 + 1)
    x = tl.load(x_ptr + row * stride + token, mask=inside, other=-float("inf"))
    if mask_row >= 0:
        bits = tl.load(masks_ptr + mask_row * mask_stride + token // 8, mask=inside, other=0).to(tl.int32)
        x = tl.where((bits >> (token % 8)) & 1 == 1, x, -float("inf"))
    if address != 0:
        notes = tl.load(address.to(tl.pointer_type(tl.int32)) + token, mask=inside, other=0)
        x = tl.where((has_allowed == 0) | (notes & ALLOWED != 0), x, -float("inf"))
        penalised = tl.where(x > 0, tl.div_rn(x, tl.broadcast_to(repetition, x.shape)), x * repetition)
        x = tl.where(notes & (ALLOWED - 1) != 0, penalised, x)
        count = notes & (PROMPT - 1)
        presence = tl.load(factors_ptr + slot * 3 + 2)
        x = tl.where(count > 0, x - (frequency * count.to(tl.float32) + presence), x)
    tl.store(out_ptr + slot * vocab + token, x, mask=inside)


# --- draws -----------------------------------------------------------------------------------------------------------


@triton.jit
def _draw_of(draw, wholes_ptr, factors_ptr):
    """The numbers of a draw: row, slot, top_k; 1 / temperature, log(min_p), top_p, the uniform number."""
    row, slot, top_k = tl.load(wholes_ptr + draw * 3), tl.load(wholes_ptr + draw * 3 + 1), tl.load(
        wholes_ptr + draw * 3 + 2
    )
    scale = tl.load(factors_ptr + draw * 4).to(tl.float32)
    min_power = tl.load(factors_ptr + draw * 4 + 1).to(tl.float32)
    return row, slot, top_k, scale, min_power, tl.load(factors_ptr + draw * 4 + 2), tl.load(factors_ptr + draw * 4 + 3)


@triton.jit
def _row_of(
    row, slot, raw_ptr, raw_values_ptr, raw_ids_ptr, x_ptr, values_ptr, ids_ptr, vocab, stride, num_pieces,
    PIECES: tl.constexpr,
):
    """Where a row's logits are, as they came or adjusted, and the largest of them."""
    if slot >= 0:
        place = x_ptr + slot * vocab
        best, _, _ = _merge(values_ptr, ids_ptr, slot, num_pieces, PIECES)
    else:
        place = raw_ptr + row * stride
        best, _, _ = _merge(raw_values_ptr, raw_ids_ptr, row, num_pieces, PIECES)
    return place, best


@triton.jit
def _weigh(x, best, scale, min_power):
    """The weights of logits."""
    power = (x - best) * scale
    return tl.where(power < min_power, 0.0, tl.exp(power) * ONE).to(tl.int64)


@triton.jit
def _cuts(best):
    """Logits, the last the least likely."""
    return best - 0.5 * tl.exp2(0.375 * tl.arange(0, CUTS).to(tl.float32))


@triton.jit
def _share(total, share):
    """The least whole number, but 1, that is a share of the total."""
    part = total.to(tl.float64) * share
    whole = part.to(tl.int64)
    whole += (whole.to(tl.float64) < part).to(tl.int64)
    return tl.minimum(tl.maximum(whole, 1), total)


@triton.jit
def weigh_kernel(
    weights_ptr, cut_weights_ptr, cut_counts_ptr, wholes_ptr, factors_ptr, raw_ptr, raw_values_ptr, raw_ids_ptr,
    x_ptr, values_ptr, ids_ptr, vocab, stride, num_pieces, PIECES: tl.constexpr, BLOCK: tl.constexpr,
):
    """Each piece's weight [G, pieces], and where top_k or top_p applies the weight and number of its tokens above
    each cut: two [G, pieces, CUTS]."""
    draw, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, slot, top_k, scale, min_power, top_p, _ = _draw_of(draw, wholes_ptr, factors_ptr)
    place, best = _row_of(
        row, slot, raw_ptr, raw_values_ptr, raw_ids_ptr, x_ptr, values_ptr, ids_ptr, vocab, stride, num_pieces, PIECES
    )
    at = draw * num_pieces + piece
    if (top_k == 0) & (top_p >= 1.0):
        token = piece * PIECE + tl.arange(0, PIECE)
        x = tl.load(place + token, mask=token < vocab, other=-float("inf"))
        tl.store(weights_ptr + at, tl.sum(_weigh(x, best, scale, min_power), axis=0))
    else:
        cuts = _cuts(best)[None, :]
        total = tl.zeros([BLOCK], tl.int64)
        weights, counts = tl.zeros([BLOCK, CUTS], tl.int64), tl.zeros([BLOCK, CUTS], tl.int32)
        for start in range(0, PIECE, BLOCK):
            token = piece * PIECE + start + tl.arange(0, BLOCK)
            x = tl.load(place + token, mask=token < vocab, other=-float("inf"))
            weight = _weigh(x, best, scale, min_power)
            total += weight
            above = x[:, None] >= cuts
            weights += tl.where(above, weight[:, None], 0)
            counts += above.to(tl.int32)
        tl.store(weights_ptr + at, tl.sum(total, axis=0))
        tl.store(cut_weights_ptr + at * CUTS + tl.arange(0, CUTS), tl.sum(weights, axis=0))
        tl.store(cut_counts_ptr + at * CUTS + tl.arange(0, CUTS), tl.sum(counts, axis=0))


@triton.jit
def _total(weights_ptr, draw, num_pieces, PIECES: tl.constexpr):
    """The weights of a row's pieces, and their sum."""
    piece = tl.arange(0, PIECES)
    weights = tl.load(weights_ptr + draw * num_pieces + piece, mask=piece < num_pieces, other=0)
    return weights, tl.sum(weights, axis=0)


@triton.jit
def list_kernel(
    list_x_ptr, list_ids_ptr, sizes_ptr, weights_ptr, cut_weights_ptr, cut_counts_ptr, wholes_ptr, factors_ptr,
    raw_ptr, raw_values_ptr, raw_ids_ptr, x_ptr, values_ptr, ids_ptr, vocab, stride, num_pieces,
    PIECES: tl.constexpr, BLOCK: tl.constexpr,
):
    """Lists [G, LISTED] of the tokens above the first cut that leaves enough for top_k or top_p, in the order of ids,
    and their sizes [G]: V where there is no such list."""
    draw, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, slot, top_k, _, _, top_p, _ = _draw_of(draw, wholes_ptr, factors_ptr)
    if (top_k > 0) | (top_p < 1.0):
        place, best = _row_of(
            row, slot, raw_ptr, raw_values_ptr, raw_ids_ptr, x_ptr, values_ptr, ids_ptr, vocab, stride, num_pieces,
            PIECES,
        )
        every, cut = tl.arange(0, PIECES)[:, None], tl.arange(0, CUTS)
        at = (draw * num_pieces + every) * CUTS + cut[None, :]
        counts = tl.load(cut_counts_ptr + at, mask=every < num_pieces, other=0)
        count = tl.sum(counts, axis=0)
        weight = tl.sum(tl.load(cut_weights_ptr + at, mask=every < num_pieces, other=0), axis=0)
        _, total = _total(weights_ptr, draw, num_pieces, PIECES)
        is_enough = tl.where(top_k > 0, count >= top_k, weight >= _share(total, top_p))
        chosen = tl.min(tl.where(is_enough & (count <= LISTED), cut, CUTS), axis=0)
        if chosen < CUTS:
            low = tl.max(tl.where(cut == chosen, _cuts(best), -float("inf")), axis=0)
            before = tl.sum(tl.where((every < piece) & (cut[None, :] == chosen), counts, 0))
            for start in range(0, PIECE, BLOCK):
                token = piece * PIECE + start + tl.arange(0, BLOCK)
                x = tl.load(place + token, mask=token < vocab, other=-float("inf"))
                is_listed = (x >= low) & (token < vocab)
                to = draw * LISTED + before + tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
                tl.store(list_x_ptr + to, x, mask=is_listed)
                tl.store(list_ids_ptr + to, token, mask=is_listed)
                before += tl.sum(is_listed.to(tl.int32), axis=0)
        if piece == 0:
            size = tl.sum(tl.where(cut == chosen, count, 0), axis=0)
            tl.store(sizes_ptr + draw, tl.where(chosen < CUTS, size, vocab))


@triton.jit
def key_of(x, token):
    """A number that is larger for the more likely token: by its logit, then by the lower id."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # both zeros are one
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000
    return (order << ID_BITS) | (token ^ LAST_ID).to(tl.int64)


@triton.jit
def _load_keys(x_ptr, ids_ptr, is_list, start, size, best, scale, min_power, BLOCK: tl.constexpr):
    """Keys and weights of some tokens of a list, or of a whole row."""
    i = start + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size, other=-float("inf"))
    token = tl.where(is_list, tl.load(ids_ptr + i, mask=(i < size) & is_list, other=0), i)
    return tl.where(i < size, key_of(x, token), 0), _weigh(x, best, scale, min_power)


@triton.jit
def _find(
    x_ptr, ids_ptr, is_list, size, best, scale, min_power, target, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """The key of the first token up to which more than `target` stands, in weight or number, and how much that is."""
    key, reached = target * 0, target * 0
    for i in range(KEY_BITS // 2):
        step = (target * 0 + 1) << (KEY_BITS - 2 - 2 * i)
        sum1, sum2, sum3 = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
        for start in range(0, size, BLOCK):
            keys, amount = _load_keys(x_ptr, ids_ptr, is_list, start, size, best, scale, min_power, BLOCK)
            if not WEIGHTED:
                amount = tl.full([BLOCK], 1, tl.int64)
            sum1 += tl.where(keys >= key + step, amount, 0)
            sum2 += tl.where(keys >= key + 2 * step, amount, 0)
            sum3 += tl.where(keys >= key + 3 * step, amount, 0)
        above1, above2, above3 = tl.sum(sum1, axis=0), tl.sum(sum2, axis=0), tl.sum(sum3, axis=0)
        digit = (above1 > target).to(tl.int64) + (above2 > target).to(tl.int64) + (above3 > target).to(tl.int64)
        reached = tl.where(digit == 3, above3, tl.where(digit == 2, above2, tl.where(digit == 1, above1, reached)))
        key += digit * step
    return key, reached


@triton.jit
def _weight_from(x_ptr, ids_ptr, is_list, size, best, scale, min_power, key, BLOCK: tl.constexpr):
    """What all tokens from a key on weigh."""
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, size, BLOCK):
        keys, weights = _load_keys(x_ptr, ids_ptr, is_list, start, size, best, scale, min_power, BLOCK)
        total += tl.where(keys >= key, weights, 0)
    return tl.sum(total, axis=0)


@triton.jit
def _place(total, chance):
    """The whole number below the total at which a draw falls."""
    return tl.minimum((total.to(tl.float64) * chance).to(tl.int64), total - 1)


@triton.jit
def _draw_by_id(place, weights_ptr, draw, best, scale, min_power, chance, vocab, num_pieces, PIECES: tl.constexpr):
    """The first token, in the order of ids, up to which more than chance * total stands."""
    weights, total = _total(weights_ptr, draw, num_pieces, PIECES)
    mass = _place(total, chance)
    is_before = tl.cumsum(weights, axis=0) <= mass
    piece = tl.sum(is_before.to(tl.int32), axis=0)
    rest = mass - tl.sum(tl.where(is_before, weights, 0), axis=0)
    token = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(place + token, mask=token < vocab, other=-float("inf"))
    cumulative = tl.cumsum(_weigh(x, best, scale, min_power), axis=0)
    return piece * PIECE + tl.sum((cumulative <= rest).to(tl.int32), axis=0)


@triton.jit
def draw_kernel(
    tokens_ptr, list_x_ptr, list_ids_ptr, sizes_ptr, weights_ptr, wholes_ptr, factors_ptr,
    raw_ptr, raw_values_ptr, raw_ids_ptr, x_ptr, values_ptr, ids_ptr, vocab, stride, num_pieces,
    PIECES: tl.constexpr, BLOCK: tl.constexpr,
):
    """The token of one row that has any, where the largest logit is finite."""
    draw = tl.program_id(0).to(tl.int64)
    row, slot, top_k, scale, min_power, top_p, chance = _draw_of(draw, wholes_ptr, factors_ptr)
    place, best = _row_of(
        row, slot, raw_ptr, raw_values_ptr, raw_ids_ptr, x_ptr, values_ptr, ids_ptr, vocab, stride, num_pieces, PIECES
    )
    if (tl.load(tokens_ptr + row) >= 0) & (best < float("inf")):
        if (top_k == 0) & (top_p >= 1.0):
            token = _draw_by_id(
                place, weights_ptr, draw, best, scale, min_power, chance, vocab, num_pieces, PIECES
            ).to(tl.int64)
        else:
            size = tl.load(sizes_ptr + draw)
            is_list = size < vocab
            ids = list_ids_ptr + draw * LISTED
            if is_list:
                place = list_x_ptr + draw * LISTED
            _, total = _total(weights_ptr, draw, num_pieces, PIECES)
            if top_k > 0:
                key, _ = _find(place, ids, is_list, size, best, scale, min_power, top_k - 1, False, BLOCK)
                total = _weight_from(place, ids, is_list, size, best, scale, min_power, key, BLOCK)
            if top_p < 1.0:
                share = _share(total, top_p) - 1
                _, total = _find(place, ids, is_list, size, best, scale, min_power, share, True, BLOCK)
            mass = _place(total, chance)
            key, _ = _find(place, ids, is_list, size, best, scale, min_power, mass, True, BLOCK)
            token = (key & LAST_ID) ^ LAST_ID
        tl.store(tokens_ptr + row, token)


# --- scores ----------------------------------------------------------------------------------------------------------


@triton.jit
def key_kernel(keys_ptr, x_ptr, rows_ptr, vocab, stride):
    """The keys of some rows: int64 [S, V]."""
    i, token = tl.program_id(0).to(tl.int64), tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    x = tl.load(x_ptr + tl.load(rows_ptr + i) * stride + token, mask=token < vocab, other=0.0)
    tl.store(keys_ptr + i * vocab + token, key_of(x, token), mask=token < vocab)


@triton.jit
def rank_kernel(ranks_ptr, x_ptr, rows_ptr, ids_ptr, vocab, stride):
    """Add to each rank how many of a piece's logits are larger than that of a token: int32 [E]."""
    i, token = tl.program_id(0).to(tl.int64), tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    row = x_ptr + tl.load(rows_ptr + i) * stride
    x = tl.load(row + token, mask=token < vocab, other=-float("inf"))
    tl.atomic_add(ranks_ptr + i, tl.sum((x > tl.load(row + tl.load(ids_ptr + i))).to(tl.int32), axis=0))
