"""How kernels over weights cut their work: few_rows.cu, dense_rows.cu, more_rows.cu and many_rows.cu, each by the shape
of the product and what the GPU has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import ClassVar

from pelton.ops.tiles import COLUMNS, ROWS

MAX_ROWS = 64
MMA_ROWS = 8  # of x that one mma multiplies with: the most of dense_rows.cu
MAX_SHARING = 4  # blocks for each multiprocessor, of those that share columns with others; so many are counted
TABLE_BYTES = 10 << 10  # of a block's shared memory: what is not counted, and more_rows.cu's table of values
RESERVED_BYTES = 2 << 10  # of a block's shared memory: what is not counted
MANY_OUTS = 128  # rows of a weight that a block of many_rows.cu has
MANY_PAIR = 2  # blocks that have x copied together
MANY_TILES = {8: (1130, 4640), 16: (1660, 6000), 32: (2400, 7000)}  # rows of x / 8: cycles of a chunk, and of a block
MANY_SPLITS = (1, 2, 4)  # blocks that share columns


def num_sums(processors: int) -> int:
    """Sums that are kept in memory for one product at a time, of parts that are joined there."""
    return MAX_SHARING * processors * 8 * 2 * ROWS * MAX_ROWS


class Cut(ABC):
    """Fields in capitals are compiled in."""

    kernel: ClassVar[str]

    @property
    def defines(self) -> Mapping[str, int]:
        return {name: value for name, value in vars(self).items() if name.isupper()}

    @property
    @abstractmethod
    def num_threads(self) -> int:
        """Of a block."""

    @abstractmethod
    def grid(self, num_out: int) -> tuple[int, int]:
        """Blocks beside each other, each with rows of the weight, and blocks that share columns. With a gate the former
        have rows of either half."""

    @abstractmethod
    def shared_bytes(self, piece_bytes: int) -> int:
        """Memory of a block, beside what is compiled in. piece_bytes: what a lane needs of 16 rows and 64 columns."""


@dataclass(frozen=True)
class Few(Cut):
    """How few_rows.cu cuts the work: the most rows of x (1, 2, or a multiple of 8), tiles of 16 weight rows of a team,
    its warps, and how many pieces a warp asks for ahead; teams of a block; bytes from one pair to the next in its table
    of values, for codes that are looked up."""

    ROWS: int
    MT: int
    WARPS: int
    AHEAD: int
    TEAMS: int = 1
    ENTRY: int = 0

    kernel = "few_rows"

    @property
    def num_threads(self) -> int:
        return 32 * self.WARPS * self.TEAMS

    def grid(self, num_out: int) -> tuple[int, int]:
        return -(-num_out // (ROWS * self.MT * self.TEAMS)), 1

    def shared_bytes(self, piece_bytes: int) -> int:
        sums = 4 * self.WARPS * 16 * self.MT * (max(8, self.ROWS) + 1)
        return 256 * self.ENTRY + self.TEAMS * sums


@dataclass(frozen=True)
class More(Cut):
    """How more_rows.cu cuts the work: rows of x / 8, tiles of 16 weight rows of a warp, warps of a team, blocks that
    share columns, chunks in memory, and blocks of a multiprocessor; bytes from one pair to the next in its table of
    values, for codes that are looked up; parts of a sum, if not one for each block and team. On Hopper a block may have
    several teams."""

    NT: int
    MT: int
    WARPS: int
    SPLIT: int
    STAGES: int
    BLOCKS: int
    TEAMS: int = 1
    WGMMA: int = 0
    ENTRY: int = 32
    PARTS: int = 0

    kernel = "more_rows"

    @property
    def num_threads(self) -> int:
        return 32 * self.WARPS * self.TEAMS

    def grid(self, num_out: int) -> tuple[int, int]:
        return -(-num_out // (ROWS * self.MT * self.WARPS)), self.SPLIT

    def shared_bytes(self, piece_bytes: int) -> int:
        chunks, columns = (2, 128) if self.WGMMA else (self.STAGES, 128 + 32)  # of x
        weights = self.STAGES * self.WARPS * 2 * self.MT * 32 * piece_bytes
        return self.TEAMS * (weights + chunks * 2 * 8 * self.NT * columns)


@dataclass(frozen=True)
class Dense(Cut):
    """How dense_rows.cu cuts the work: warps of a block, of which so many share columns, columns that a warp copies at
    a time, how many such copies of 16 rows are on their way, and chains of products. Beside that, blocks of the grid,
    and the rows and columns of x, all of which a block holds in memory: they are given at launch."""

    WARPS: int
    PARTS: int
    CHUNK: int
    STAGES: int
    CHAINS: int
    num_blocks: int
    num_rows: int
    num_in: int

    kernel = "dense_rows"

    @property
    def num_threads(self) -> int:
        return 32 * self.WARPS

    def grid(self, num_out: int) -> tuple[int, int]:
        return self.num_blocks, 1

    def shared_bytes(self, piece_bytes: int) -> int:
        x_and_sums = 2 * self.num_in + self.WARPS * (16 + 2 * ROWS * 4)
        return self.WARPS * self.STAGES * ROWS * (2 * self.CHUNK + 16) + self.num_rows * x_and_sums


@dataclass(frozen=True)
class Many(Cut):
    """How many_rows.cu cuts the work: rows of x of a block / 8, blocks that share columns, and how many chunks of x are
    on their way; bytes from one pair to the next in its table of values, for codes that are looked up. Beside that,
    rows of x: they are given at launch."""

    NT: int
    SPLIT: int
    STAGES: int
    ENTRY: int
    num_rows: int

    kernel = "many_rows"

    @property
    def num_threads(self) -> int:
        return 32 * (8 + 4)  # those that multiply, and those of which one copies

    def grid(self, num_out: int) -> tuple[int, int]:
        pairs = -(-num_out // (MANY_PAIR * MANY_OUTS)) * -(-self.num_rows // (8 * self.NT))
        return MANY_PAIR * pairs, self.SPLIT

    def shared_bytes(self, piece_bytes: int) -> int:
        rows = 8 * self.NT
        return max(self.STAGES * rows * 4 * COLUMNS, rows * 4 * (MANY_OUTS + 4))  # of x, then sums


def is_few(num_rows: int, num_out: int, num_in: int, processors: int, same: bool) -> bool:
    """Whether few_rows.cu is faster: to join sums through memory takes longer than a small weight. With `same`, for one
    kernel for any number of rows."""
    return (num_rows <= 8 and not same) or (num_out <= 4 * ROWS * processors and num_in < 8192)


def _row_tiles(num_rows: int) -> int:
    """Rows of x / 8 that kernels are compiled for: a power of two."""
    return max(8, 1 << (num_rows - 1).bit_length()) // 8


@cache
def few(
    num_rows: int, num_out: int, num_in: int, is_gated: bool, is_dense: bool, processors: int, same: bool = False
) -> Few:
    """Enough warps to keep the memory busy, as measured on an H100 and an H200. With `same`, as many for any number of
    rows: nothing else changes the order of a sum."""
    rows = num_rows if num_rows <= 2 and not (is_dense or same) else 8 * _row_tiles(num_rows)
    tiles = -(-num_out // ROWS)
    few, wide = tiles <= 2 * processors, tiles > 4 * processors
    if is_dense:
        mt = 2 if is_gated or (rows == 8 and not wide) else 1
        return Few(rows, mt, 8, 4 if few or is_gated else 2)
    if rows <= 16:
        mt, warps = (1 if rows <= 2 else 2, 16) if few else (2, 4) if wide else (1, 8)
    else:
        mt, warps = (2, 8 if few else 4) if rows == 32 else (1, 8)
    mt = 2 if is_gated else mt
    if same:
        return Few(rows, mt, 8, 4 if rows == 8 else 3 if rows <= 32 else 2)
    return Few(rows, mt, warps, 4 if rows < 8 else 3 if rows <= 32 else 2)


@cache
def with_table(cut: Few, num_out: int, processors: int, memory: int) -> Few:
    """The cut for codes that are looked up. In a table of 64 KiB that takes fewer instructions; it is chosen where a
    multiprocessor's memory has room for as many warps as its registers, in blocks of two teams if need be."""
    blocks = min((16 if cut.MT == 2 else 32) // cut.WARPS, -(-cut.grid(num_out)[0] // processors))
    can_share = blocks == 4 and cut.ROWS * cut.WARPS < 64  # with eight rows, 32 warps have too few registers
    for teams in (1, 2) if can_share else (1,):
        large = replace(cut, TEAMS=teams, ENTRY=256)
        if cut.ROWS <= 8 and blocks // teams * (large.shared_bytes(0) + RESERVED_BYTES) <= memory:
            return large
    return replace(cut, ENTRY=128)


@cache
def with_more_table(cut: More, piece_bytes: int, shared_memory: int) -> More:
    """The cut for codes that are looked up: the more copies of a table there are, the less do lanes wait for others."""
    for entry in (128, 64):
        room = cut.shared_bytes(piece_bytes) + 256 * entry + RESERVED_BYTES
        if cut.BLOCKS * room <= shared_memory and cut.num_threads % entry == 0:  # for each thread as many
            return replace(cut, ENTRY=entry)
    return cut


@cache
def same_parts(num_out: int, num_in: int, processors: int) -> int:
    """Parts of a sum in more_rows.cu where a row has the same bits whatever the number of rows: as many as give eight
    warps of a multiprocessor work where x has few rows."""
    parts = 1
    while parts < 8 and -(-num_out // ROWS) * parts < 8 * processors and num_in >= 8 * COLUMNS * parts:
        parts *= 2
    return parts


@cache
def same_of_few(
    num_out: int, piece_bytes: int, has_values: bool, parts: int, processors: int, shared_memory: int
) -> More:
    """For up to eight rows of x, in so many parts: small blocks, so that few warps wait for each other; larger ones for
    codes that are looked up, as each fills a table."""
    cut = More(1, 2, 4 if has_values else 2, parts, 1, 1, PARTS=parts)
    needed = -(-cut.grid(num_out)[0] * parts // processors)
    for blocks in range(min(needed, 4), 0, -1):
        stages = min(4, (shared_memory // blocks - TABLE_BYTES) // cut.shared_bytes(piece_bytes))
        if stages >= 3:
            break
    return replace(cut, STAGES=stages, BLOCKS=blocks)


@cache
def more(
    num_rows: int, num_out: int, num_in: int, is_gated: bool, piece_bytes: int, processors: int, shared_memory: int,
    parts: int | None = None,
) -> More:
    """As many warps as two stages have memory for, two blocks of a multiprocessor if they can be, and all
    multiprocessors with as much to do as others. parts: of a sum, if it is to have so many."""
    nt = _row_tiles(num_rows)
    mt = 2 if is_gated or (nt <= 4 and piece_bytes < 64) else 1
    num_warps, num_chunks = -(-num_out // (ROWS * mt)), -(-num_in // (2 * COLUMNS))

    def stage_bytes(warps: int) -> int:
        return More(nt, mt, warps, 1, 1, 1).shared_bytes(piece_bytes)

    def cost(cut: tuple[int, int]) -> tuple[float, int]:
        warps, split = cut
        rounds = -(-(-(-num_warps // warps) * split) // processors)
        return rounds * warps / split * (1.0 if rounds > 1 else 1.2), split

    splits = [n for n in (1, 2, 3, 4, 6, 8) if n == 1 or (num_chunks >= 4 * n and (parts or n) % n == 0)]
    most = max(warps for warps in range(1, 9) if 2 * stage_bytes(warps) <= shared_memory - TABLE_BYTES)
    cuts = [
        (warps, split) for warps in range(most, min(most, 4) - 1, -1) for split in splits
        if split == 1 or -(-num_warps // warps) * split <= MAX_SHARING * processors
    ]
    warps, split = min(cuts, key=cost)
    blocks = 2 if nt * mt <= 8 and shared_memory // 2 - TABLE_BYTES >= 3 * stage_bytes(warps) else 1
    stages = min(4, (shared_memory // blocks - TABLE_BYTES) // stage_bytes(warps))
    return More(nt, mt, warps, split, stages, blocks, PARTS=parts or 0)


@cache
def more_on_hopper(
    num_rows: int, num_out: int, num_in: int, is_gated: bool, piece_bytes: int, has_min: bool, processors: int,
    shared_memory: int, parts: int | None = None,
) -> More:
    """The same for Hopper: one block of a multiprocessor, with two teams of eight warps where registers allow it."""
    nt = _row_tiles(num_rows)
    num_chunks = -(-num_in // (2 * COLUMNS))

    def cut(mt: int, split: int) -> More:
        fit = nt <= 4 and nt * mt * (4 if has_min else 1) <= 8
        most_teams = 2 if fit and (parts is None or (parts, split) == (2, 1)) else 1
        for warps, teams in ((8, most_teams), (8, 1), (4, 1)):
            found = More(nt, mt, warps, split, 0, 1, teams, 1, PARTS=parts or 0)
            free = shared_memory - TABLE_BYTES - found.shared_bytes(piece_bytes)
            stage_bytes = teams * warps * 2 * mt * 32 * piece_bytes
            if free >= 2 * stage_bytes:
                break
        return replace(found, STAGES=min(3, free // stage_bytes))

    def cost(cut: More) -> tuple[float, int]:
        """By the chunks that a multiprocessor multiplies, what it takes to begin, sums that go through memory, and
        parts that a team sums one after the other."""
        rounds = -(-cut.grid(num_out)[0] * cut.SPLIT // processors)
        chunks = -(-num_chunks // (cut.SPLIT * cut.TEAMS)) * cut.TEAMS
        joins = 0.4 * cut.SPLIT * cut.MT if cut.SPLIT > 1 else 0.0
        turns = 4.0 * (cut.PARTS // (cut.SPLIT * cut.TEAMS) - 1) if cut.PARTS else 0.0
        return rounds * (3 + chunks * cut.WARPS * (1 + 2 * cut.MT) / 40) + joins + turns, cut.SPLIT

    def cuts(mt: int) -> list[More]:
        found = [cut(mt, split) for split in range(1, 9) if (parts or split) % split == 0]
        return [
            cut for cut in found
            if cut.SPLIT == 1 or (num_chunks >= 2 * cut.SPLIT and cut.SPLIT * cut.grid(num_out)[0] <= processors)
        ]

    return min(cuts(2) if is_gated or has_min else [*cuts(1), *cuts(2)], key=cost)


@cache
def dense(num_rows: int, num_out: int, num_in: int, processors: int, shared_memory: int) -> Dense | None:
    """A block for each multiprocessor, if its memory holds x and what is on its way. One of two tiles at most leaves
    room for a block of attention: else it begins when attention has ended, with all of its share to read."""
    num_tiles = -(-num_out // ROWS)
    for warps in (16, 8):
        for stages in (2,) if num_tiles <= 2 * processors else (3, 2):
            cut = Dense(warps, warps, 128, stages, 4, min(processors, num_tiles), num_rows, num_in)
            if num_rows <= MMA_ROWS and cut.shared_bytes(0) + RESERVED_BYTES <= shared_memory:
                return cut
    return None


@cache
def dense_in_parts(
    num_rows: int, num_out: int, num_in: int, parts: int, processors: int, shared_memory: int
) -> Dense | None:
    """The same, where a sum is to have so many parts, each one chain of products: a warp for each part of each of a
    block's tiles, if there are not too many. The fewer they are, the more does one copy bring: a warp's are issued one
    by one."""
    num_tiles = -(-num_out // ROWS)
    num_blocks = min(processors, num_tiles)
    needed = 1 << (-(-num_tiles // num_blocks) * parts - 1).bit_length()
    warps = max(parts, min(16, needed))
    for stages in (2,) if num_tiles <= 2 * processors else (3, 2):
        cut = Dense(warps, parts, min(512, 2048 // warps), stages, 1, num_blocks, num_rows, num_in)
        most_rows = 2 * max(2, parts)  # so that a team has a thread for each number; with one part it needs none
        if num_rows <= min(most_rows, MMA_ROWS) and cut.shared_bytes(0) + RESERVED_BYTES <= shared_memory:
            return cut
    return None


@cache
def many(
    num_rows: int, num_out: int, num_in: int, has_values: bool, processors: int, shared_memory: int,
    split: int | None = None,
) -> Many:
    """What takes the fullest processor the fewest cycles, as measured on an H200: to open codes and to multiply, to
    begin and to store, and to join parts of sums. split: the blocks that share columns, if they are given."""

    def cost(cut: Many) -> int:
        blocks, split = cut.grid(num_out)
        rounds, chunks = -(-blocks * split // processors), -(-num_in // (2 * COLUMNS * split))
        of_chunk, of_block = MANY_TILES[cut.NT]
        joins = 2000 + 150 * split * cut.NT if split > 1 else 0
        return rounds * (chunks * of_chunk + of_block + joins)

    def fits(cut: Many) -> bool:
        """Whether there are columns to share, counters, and room for sums."""
        blocks, split = cut.grid(num_out)
        has_room = blocks * split * 8 * cut.NT * MANY_OUTS <= num_sums(processors)
        return split == 1 or (num_in >= 8 * COLUMNS * split and blocks <= MAX_SHARING * processors and has_room)

    splits = MANY_SPLITS if split is None else (split,)
    cuts = [_many_of(nt, split, has_values, shared_memory, num_rows) for nt, split in product(MANY_TILES, splits)]
    return min(filter(fits, cuts), key=cost)


@cache
def same_split(num_out: int, num_in: int, processors: int) -> int:
    """Blocks of many_rows.cu that share columns where a row has the same bits whatever the number of rows: two if few
    rows would else be the work of few processors with many columns each, though many rows take a tenth longer then."""
    blocks = MANY_PAIR * -(-num_out // (MANY_PAIR * MANY_OUTS))
    return 2 if 4 * blocks <= processors and num_in >= 8192 else 1


def _many_of(nt: int, split: int, has_values: bool, shared_memory: int, num_rows: int) -> Many:
    """With as much of x on its way as there is room for."""
    entry = 64 if has_values else 0
    stages = (shared_memory - RESERVED_BYTES - 256 * entry) // (8 * nt * 4 * COLUMNS)
    return Many(nt, split, min(8, stages), entry or 4, num_rows)


@cache
def all_many(
    most_rows: int, num_out: int, num_in: int, has_values: bool, processors: int, shared_memory: int,
    split: int | None = None,
) -> list[Many]:
    """`many` of all numbers of rows up to some: it is the same between multiples of the fewest rows of a block."""
    step = 8 * min(MANY_TILES)
    given = num_out, num_in, has_values, processors, shared_memory, split
    return [many(num_rows, *given) for num_rows in range(step, most_rows + step, step)]
