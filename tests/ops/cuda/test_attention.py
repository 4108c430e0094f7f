"""Attention against the body of its op. Keys and values that no token sees are NaN."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from pelton import ops
from pelton.ops.cuda import attention, rows
from pelton.ops.cuda.launch import counters

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy's

F32, BF16, F16, FP8, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8
ALLOWED = {F32: 2e-5, BF16: 2e-2, F16: 2e-3}
STEPS = {F32: 2e-6, BF16: 2**-7, F16: 2**-10, FP8: 2**-3, INT8: 1.0}
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, FP8), (F32, FP8), (BF16, INT8), (F32, INT8), (F32, BF16)]
NEW, LENS = [20, 1, 0, 3, 1], [90, 70, 5, 45, 1]  # new tokens and context length of each request of a mixed batch


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 keys are a part, 32 if there were more than 2 of them, and more if there were more than 16."""
    monkeypatch.setattr(attention, "PART", 16)
    monkeypatch.setattr(attention, "MAX_PARTS", 16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_cache(num_blocks: int, block_size: int, num_heads: int, head_size: int, dtype: torch.dtype) -> list[Tensor]:
    """Keys and values, for int8 with their scales, as GPUs keep them."""
    numbers = [random(num_blocks, num_heads, block_size, head_size, seed=i).transpose(1, 2) for i in (1, 2)]
    if dtype != INT8:
        return [x.to(dtype) for x in numbers]
    scales = [random(num_blocks, num_heads, block_size, seed=i).transpose(1, 2).abs() / 40 for i in (3, 4)]
    return [(x * 40).clamp(-127, 127).to(dtype) for x in numbers] + scales


def arguments(
    device: torch.device, new: list[int], lens: list[int], heads: tuple[int, int, int] = (4, 2, 16),
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32), window: int | None = None, softcap: float | None = None,
    block_size: int = 16,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The op's arguments, twice: with NaN wherever no token looks, and with numbers there.

    heads: H, G, D; dtypes: of queries and of the cache. Tables of requests are scattered; what a window has left behind
    is the null block.
    """
    (num_heads, num_kv_heads, head_size), (dtype, kv_dtype) = heads, dtypes
    columns = max(lens) // block_size + 2
    table = 1 + torch.randperm(len(lens) * columns, generator=torch.Generator().manual_seed(5)).view(-1, columns)
    clean = random_cache(1 + table.numel(), block_size, num_kv_heads, head_size, kv_dtype)
    unseen = torch.ones(clean[0].shape[:2], dtype=torch.bool)
    for row, length, count in zip(table, lens, new, strict=True):
        first = 0 if window is None else max(0, length - count - window + 1)
        at = torch.arange(first, length)
        unseen[row[at // block_size], at % block_size] = False
        row[: first // block_size], row[-(-length // block_size) :] = 0, 0
    spoilt = [x.clone() for x in clean]
    for x in spoilt:
        where = unseen.view(*unseen.shape, *[1] * (x.dim() - 2))
        x.copy_(torch.where(where, 99 if x.dtype == INT8 else torch.nan, x.float()))
    qkv = random(sum(new) + 2, num_heads + 2 * num_kv_heads, head_size).to(dtype)
    query = qkv.to(device)[: sum(new), :num_heads]
    rest = (
        table.to(device), torch.tensor([0, *accumulate(new)], device=device), torch.tensor(lens, device=device),
        0.8 * head_size**-0.5, window, softcap,
    )
    caches = [ops.LayerCache(*(x.to(device) for x in numbers)) for numbers in (spoilt, clean)]
    return (query, caches[0], *rest), (query, caches[1], *rest)


def check(args: tuple[Any, ...], clean: tuple[Any, ...]) -> None:
    """The kernels with some arguments, against the body."""
    assert attention.accepts_paged_attention(*args)
    got, expected = attention.paged_attention(*args), ops.paged_attention.reference(*clean)
    torch.testing.assert_close(got, expected, atol=ALLOWED[got.dtype], rtol=ALLOWED[got.dtype])


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dtypes(device: torch.device, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(*arguments(device, NEW, LENS, dtypes=dtypes))


@pytest.mark.parametrize("heads", [(2, 2, 64), (6, 2, 80), (4, 1, 128), (8, 1, 256), (17, 1, 16), (5, 5, 96)], ids=str)
def test_heads(device: torch.device, heads: tuple[int, int, int]) -> None:
    check(*arguments(device, [10, 1], [50, 70], heads))


@pytest.mark.parametrize("window", [1, 30, 64, 500])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_windows_and_softcap(device: torch.device, window: int, softcap: float | None) -> None:
    check(*arguments(device, NEW, LENS, window=window, softcap=softcap, block_size=32))


@pytest.mark.parametrize("window", [None, 100])
def test_decodes_in_several_parts(device: torch.device, window: int | None) -> None:
    """From less than one part to more keys than MAX_PARTS of the smallest size, with requests of no rows."""
    new, lens = [1, 1, 1, 0, 1, 1, 0], [31, 32, 33, 40, 128, 300, 0]
    check(*arguments(device, new, lens, window=window))
    (query, *args), (_, *clean) = arguments(device, new, lens, window=window)
    padded = torch.cat((query, query[:2]))  # as many rows as requests: decodes only, the last two of no request
    assert padded.shape[0] == len(new)
    got, expected = attention.paged_attention(padded, *args), ops.paged_attention.reference(query, *clean)
    torch.testing.assert_close(got[: sum(new)], expected, atol=2e-5, rtol=2e-5)


def test_one_decode_over_many_parts(device: torch.device) -> None:
    check(*arguments(device, [1], [700]))


def test_many_decodes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More programs share them, which leaves all bits as they are."""
    args, clean = arguments(device, [1] * 6, [300, 31, 33, 1, 128, 90], (4, 2, 64), (BF16, BF16))
    programs, make_parts = [], attention._parts
    monkeypatch.setattr(attention, "num_processors", lambda device: 4)
    monkeypatch.setattr(attention, "_parts", lambda num, *given: programs.append(num) or make_parts(num, *given))
    few = attention.paged_attention(*args)
    monkeypatch.setattr(attention, "MANY_REQUESTS", 6)
    check(args, clean)
    assert torch.equal(attention.paged_attention(*args), few) and programs == [8, 12, 12]
    assert not counters(device).any()


@pytest.mark.parametrize("window", [None, 40])
def test_tokens_of_an_image_see_each_other(device: torch.device, window: int | None) -> None:
    """Eight tokens within a chunk, all four of a short one, and a decode that sees only itself and what is before."""
    args, clean = arguments(device, [20, 4, 1], [90, 70, 50], window=window)
    span_ends = torch.tensor([*range(70, 75), *[82] * 8, *range(83, 90), *[69] * 4, 0], device=device)
    check((*args, span_ends), (*clean, span_ends))
    assert not torch.equal(
        attention.paged_attention(*args)[5], attention.paged_attention(*args, span_ends)[5]
    )


@pytest.mark.parametrize(("window", "dtype"), [(None, F32), (70, BF16)])
def test_a_token_does_not_depend_on_its_company(device: torch.device, window: int | None, dtype: torch.dtype) -> None:
    """Decodes alone, together, beside a chunk, and as a request with few tokens: the same bits."""
    new, lens = [1, 20, 1, 3], [110, 60, 180, 70]
    (query, cache, table, starts, _, *rest), _ = arguments(device, new, lens, dtypes=(dtype, dtype), window=window)
    together = attention.paged_attention(query, cache, table, starts, torch.tensor(lens, device=device), *rest)

    def alone(row: int, r: int, length: int) -> Tensor:
        return attention.paged_attention(
            query[row : row + 1], cache, table[r : r + 1], starts.new_tensor([0, 1]), starts.new_tensor([length]), *rest
        )[0]

    for row, r, length in ((0, 0, 110), (21, 2, 180), (22, 3, 68), (24, 3, 70)):
        assert torch.equal(together[row], alone(row, r, length))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("heads", [(4, 2, 16), (6, 2, 16)], ids=str)
def test_a_token_does_not_depend_on_where_its_prompt_is_cut(
    device: torch.device, heads: tuple[int, int, int], window: int | None
) -> None:
    """In chunks of more than FEW_ROWS tokens, beside another request. Of the second heads, ten tokens are a tile."""
    (query, cache, table, starts, lens, *rest), _ = arguments(device, [110, 9], [110, 30], heads)
    rest[1] = window
    whole = attention.paged_attention(query, cache, table, starts, lens, *rest)
    for cuts in ((9, 41), (16, 64, 96), (37, 101)):
        for begin, end in pairwise((0, *cuts, 110)):
            chunk, ends = torch.cat((query[110:], query[begin:end])), [30, end]
            out = attention.paged_attention(
                chunk, cache, table.flip(0), starts.new_tensor([0, 9, len(chunk)]), lens.new_tensor(ends), *rest
            )
            assert torch.equal(out[9:], whole[begin:end]), (begin, end)
            assert torch.equal(out[:9], whole[110:])


def test_rows_of_no_request_are_left_alone(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    (query, *args), _ = arguments(device, NEW, LENS)
    longer = torch.cat((query, query[:9]))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kinds: empty(*size, **kinds).fill_(7))
    assert (attention.paged_attention(longer, *args)[query.shape[0] :] == 7).all()


# --- with the rotation of what is new --------------------------------------------------------------------------------


def parts_of(cache: ops.LayerCache) -> list[Tensor]:
    """All that a cache holds."""
    return [x for x in (cache.key, cache.value, cache.key_scale, cache.value_scale) if x is not None]


def with_rotation(
    device: torch.device, lens: list[int], heads: tuple[int, int, int] = (4, 2, 16),
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32), norm: bool = True, new: list[int] | None = None,
    **options: Any,
) -> tuple[list[Any], ops.LayerCache]:
    """The arguments of `rope_and_attend_`, and a cache with numbers where no token looks. There are as many tokens as
    requests, the last of no request; the slots of the others hold NaN."""
    new = [1] * len(lens) if new is None else new
    (_, cache, table, starts, *rest), (_, clean, *_) = arguments(device, new, lens, heads, dtypes, **options)
    num_heads, num_kv_heads, head_size = heads
    num_tokens, block_size = len(lens), cache.key.shape[1]
    size = (num_heads + 2 * num_kv_heads) * head_size
    qkv = random(num_tokens, size + 8, seed=6).to(device, dtypes[0])[:, 8:]
    angles = random(num_tokens, head_size // 2, seed=7).to(device)
    norms = [random(head_size, seed=i).to(device) for i in (8, 9)] if norm else [None, None]
    slots = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    owners = [r for r, count in enumerate(new) if count]
    for token, r in enumerate(owners):
        block, offset = int(table[r, (lens[r] - 1) // block_size]), (lens[r] - 1) % block_size
        slots[token] = block * block_size + offset
        for x in parts_of(cache):
            x[block, offset] = 99 if x.dtype == INT8 else torch.nan
    return [qkv, angles.cos(), angles.sin(), cache, slots, *norms, 1e-6, table, starts, *rest], clean


def run_apart(
    rope_and_store_: Callable[..., None], paged_attention: Callable[..., Tensor], cache: ops.LayerCache,
    args: list[Any], num_rows: int,
) -> Tensor:
    """What `rope_and_attend_` stands for, for some rows of attention."""
    qkv, cos, sin, _, slots, q_norm, k_norm, eps, *rest = args
    qkv = qkv.clone()
    rope_and_store_(qkv, cos, sin, cache, slots, q_norm, k_norm, eps)
    return paged_attention(ops.split_heads(qkv, cache)[0][:num_rows], cache, *rest)


def check_with_rotation(*args: Any, **options: Any) -> None:
    """The kernel against the kernels of the two ops, to the bit, and against their bodies."""
    args, clean = with_rotation(*args, **options)
    num_rows, num_tokens = int(args[9][-1]), args[0].shape[0]
    fused, apart, plain = (copy.deepcopy(args[3]) for _ in range(3))
    args[3] = fused
    assert attention.accepts_rope_and_attend(*args)
    got = attention.rope_and_attend_(*args)[:num_rows]

    same = run_apart(rows.rope_and_store_, attention.paged_attention, apart, args, num_tokens)
    assert torch.equal(got, same[:num_rows])
    for a, b in zip(parts_of(fused), parts_of(apart), strict=True):  # but for the null block
        assert torch.equal(a[1:].contiguous().view(torch.uint8), b[1:].contiguous().view(torch.uint8))

    expected = run_apart(ops.rope_and_store_.reference, ops.paged_attention.reference, clean, args, num_rows)
    allowed = max(ALLOWED[got.dtype], ALLOWED.get(clean.key.dtype, 0))  # the interpreter does not round to bfloat16
    torch.testing.assert_close(got, expected, atol=allowed, rtol=allowed)
    ops.rope_and_store_.reference(args[0].clone(), *args[1:3], plain, *args[4:8])
    for a, b in zip(parts_of(fused), parts_of(plain), strict=True):
        allowed = 2 * max(STEPS[a.dtype], STEPS[got.dtype])
        torch.testing.assert_close(a[1:].float(), b[1:].float(), atol=allowed, rtol=allowed, equal_nan=True)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_rotation_and_dtypes(device: torch.device, dtypes: tuple[torch.dtype, torch.dtype], norm: bool) -> None:
    check_with_rotation(device, [90, 1, 33], dtypes=dtypes, norm=norm)


@pytest.mark.parametrize(
    "heads", [(2, 2, 64), (6, 2, 80), (4, 1, 128), (8, 1, 256), (17, 1, 16), (14, 1, 8), (5, 5, 96)], ids=str
)
def test_rotation_and_heads(device: torch.device, heads: tuple[int, int, int]) -> None:
    for dtype in (F32, BF16):
        check_with_rotation(device, [70, 16], heads, (dtype, dtype))


@pytest.mark.parametrize("window", [1, 30, 64, 500])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_rotation_and_windows(device: torch.device, window: int, softcap: float | None) -> None:
    check_with_rotation(device, [90, 1, 32, 33, 65], window=window, softcap=softcap, block_size=32)


@pytest.mark.parametrize("window", [None, 100])
def test_rotation_and_parts(device: torch.device, window: int | None) -> None:
    """The borders of blocks and parts, alone and together, many parts, and requests of no rows."""
    check_with_rotation(device, [31, 32, 33, 40, 128, 300, 0], new=[1, 1, 1, 0, 1, 1, 0], window=window)
    for length in (1, 2, 16, 17, 64, 65, 129, 256, 257, 700):
        check_with_rotation(device, [length], window=window)


def test_rotation_of_decodes_alone(device: torch.device) -> None:
    """Any other step, and groups that leave no room, have two kernels."""
    for num_heads, accepted in ((28, True), (30, False), (32, False), (34, True)):
        args, _ = with_rotation(device, [20, 30], (num_heads, 2, 16))
        assert attention.accepts_rope_and_attend(*args) == accepted
    args, _ = with_rotation(device, [20, 30])
    assert not attention.accepts_rope_and_attend(*[x[:1] for x in args[:3]], args[3], args[4][:1], *args[5:])
    assert not attention.accepts_rope_and_attend(*args[:6], None, *args[7:])
    assert not attention.accepts_rope_and_attend(*args[:4], args[4].int(), *args[5:])
    assert not attention.accepts_rope_and_attend(*args[:8], args[8].int(), *args[9:])


def test_a_head_of_a_block_is_one_piece() -> None:
    for dtype in (BF16, FP8, INT8):
        cache = ops.make_cache(5, 16, 3, 24, dtype, torch.device("meta"))
        assert cache.key.shape == (5, 16, 3, 24) and cache.key.stride() == cache.value.stride() == (1152, 24, 384, 1)
        assert (cache.key_scale is not None) == (dtype == INT8)


def test_accepts(device: torch.device) -> None:
    (query, cache, table, *rest), _ = arguments(device, NEW, LENS)
    assert attention.accepts_paged_attention(query, cache, table, *rest)
    assert not attention.accepts_paged_attention(query.double(), cache, table, *rest)
    assert not attention.accepts_paged_attention(query.mT.contiguous().mT, cache, table, *rest)
    assert not attention.accepts_paged_attention(query, cache, table.int(), *rest)
    other = ops.LayerCache(cache.key.transpose(1, 3).contiguous().transpose(1, 3), cache.value)
    assert not attention.accepts_paged_attention(query, other, table, *rest)
