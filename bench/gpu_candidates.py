"""The tiles that `bench.gpu --tune` tries: what is changed of each row of the default table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Change = dict[str, int]
Setting = tuple[tuple[str, int], ...]  # a tile's names and numbers


def _changes(names: str, *rows: tuple[int, ...]) -> list[Change]:
    return [dict(zip(names.split(), row, strict=True)) for row in rows]


_PRODUCTS = _changes(
    "m n warps stages",
    *((128, 128, 8, 3), (128, 64, 4, 4), (128, 64, 8, 3), (64, 64, 4, 3)),
    *((64, 128, 4, 3), (256, 64, 8, 3), (128, 32, 4, 3), (64, 32, 4, 4)),
)
_PATCHES = _changes(
    "rows cols block warps",
    *((7, 2, 256, 2), (7, 2, 256, 4), (7, 1, 512, 4), (7, 1, 256, 4)),
    *((4, 2, 512, 4), (2, 2, 512, 4), (7, 2, 1024, 8), (4, 1, 256, 2)),
)
_STEMS = _changes("m warps", (64, 2), (64, 4), (128, 8), (256, 8), (256, 4))
# Channels of a program are lanes by patches: fewer patches, longer runs of memory.
_COLUMNS = _changes(
    "rows cols patches lanes warps",
    *((7, 2, 16, 256, 4), (7, 1, 32, 256, 4), (4, 2, 16, 256, 4)),
)
_NORMS = _changes(
    "m n warps", (32, 64, 4), (128, 64, 8), (64, 32, 4), (128, 32, 4), (32, 128, 4), (64, 64, 8)
)
# Of a row whose "n" says which layers have the "wide" row, that is kept.
_NARROW = _changes(
    "m k warps stages",
    *((128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 8, 3), (128, 32, 8, 3), (128, 64, 4, 2)),
)
_WIDE = _changes(
    "m n k warps stages",
    *((64, 256, 32, 16, 2), (64, 128, 64, 8, 3), (64, 128, 32, 8, 3), (64, 64, 64, 4, 3)),
    *((64, 256, 32, 8, 3), (128, 128, 32, 8, 3)),
)
_PROJECTED = _changes(
    "m n k warps stages used",
    *((64, 256, 32, 8, 2, 1), (64, 128, 32, 8, 2, 1), (64, 64, 32, 4, 2, 1), (32, 64, 32, 4, 2, 1)),
    (128, 64, 32, 8, 2, 1),
)
# By table and the beginning of a row, of which the longest that fits counts.
CHANGES: Mapping[str, Sequence[Change]] = {
    "stem": _STEMS,
    "depthwise large": _PATCHES,
    "depthwise small": _changes(
        "rows cols block warps", (1, 1, 128, 1), (1, 2, 128, 2), (2, 1, 256, 2), (2, 2, 256, 4)
    ),
    "pointwise large": [*_PRODUCTS, {"k": 32}],
    "pointwise small": [
        *_changes(
            "m n warps stages", (16, 32, 1, 4), (16, 64, 2, 4), (32, 64, 4, 4), (64, 32, 4, 3), (64, 64, 4, 3)
        ),
        {"k": 32},
    ],
    "head": [*_PRODUCTS, {"images": 2}, {"images": 8}, {"images": 1}],
    "depthwise_input_s2 large": _changes(
        "rows block warps", (2, 512, 4), (4, 256, 2), (7, 512, 4), (4, 512, 8), (1, 512, 4)
    ),
    "depthwise_input_s2 small": _changes("rows block warps", (1, 128, 1), (2, 256, 2)),
    "depthwise_weight": _PATCHES,
    "pointwise_gradient": [*_PRODUCTS[:5], {"k": 32}, {"k": 128, "stages": 2}],
    "block": _changes("slab warps", (32, 8), (64, 8), (32, 4), (64, 4)),
    # What is not `used` is two launches.
    "depthwise_project large": [{"used": 0}, {"used": 1}, *_PROJECTED],
    "depthwise_project small": [
        *({"used": used} for used in (0, 1)),
        *_changes(
            "m n k warps stages used",
            *((16, 64, 32, 4, 2, 1), (16, 32, 64, 2, 2, 1)),
        ),
    ],
    "train_stem": _STEMS,
    "train_depthwise": _COLUMNS,
    "train_pointwise forward": _NARROW,
    "train_pointwise forward_wide": _WIDE,
    "train_pointwise input": _NARROW,
    "train_pointwise input_wide": _WIDE,
    "train_pointwise weight": _WIDE,
    # Where so few sums are allowed no layer has both gradients from one kernel.
    "train_pointwise_both": [
        {"most": 1},
        {"most": 8192},
        *_changes("k warps stages", (16, 8, 2)),
    ],
    "train_pointwise_both ieee": [{"most": 1}, {"most": 512}, {"most": 2048}, {"k": 16}],
    "norm": _NORMS,
}


def changes(table: str, row: str) -> Sequence[Change]:
    """What is tried of a row."""
    name = f"{table} {row}"
    of_table = (key for key in CHANGES if key.partition(" ")[0] == table)
    key = max((key for key in of_table if name.startswith(key)), key=len)
    # Products in full float32 are made on CUDA cores: a wide tile has no registers left.
    exact = row.endswith("ieee") and not key.endswith("ieee")
    return CHANGES[key][2:6] if exact else CHANGES[key]


def candidates(table: str, row: str, shape: str, rows: Mapping[str, Mapping[str, int]]) -> list[Setting]:
    """Of one row on one shape, each once: what the default table has for them, and the row's changes."""
    base = rows[row]
    made = [rows.get(f"{row}_{shape}", base), base]
    made += [{**base, **change} for change in changes(table, row) if change.keys() <= base.keys()]
    return list(dict.fromkeys(tuple(tile.items()) for tile in made))
