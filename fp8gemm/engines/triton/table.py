"""Choosing the Triton kernel and tiles for a problem: from measured tables if they have it, else by a formula.

Tables are JSON: ``{"source", "card", "versions", "date", "rows": [{"arch", "kind", "n", "k", "m", "plan"}]}``. The
user's table, in the cache directory, takes precedence over the one in the package.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch

from ... import native
from ...scaled import Scheme
from ..base import PackedWeight
from .plan import Kind, PathName, Place, Plan, bucket, formula, in_library

SHIPPED = Path(__file__).with_name("table.json")
USER_FILE = "triton_table.json"  # in the cache directory, beside the compiled CPU kernels
MOST_SPLIT_TILES = 1024  # a product of more tiles fills any GPU without a split, and has no counters for one

Key = tuple[str, str, int, int, int]  # arch, kind, and the buckets of N, K and M


def kind_of(weight: PackedWeight, *, native: bool) -> Kind:
    """The kind of a packed weight's products."""
    return kind_for(weight.scheme, weight.data.dtype, native=native)


def kind_for(scheme: Scheme, stored: torch.dtype, *, native: bool) -> Kind:
    """The kind of products under a scheme; weight-only if no kernel quantizes activations as the scheme says."""
    grid, activation = scheme.weight, scheme.activation
    constant = grid.cols is None
    if native and activation is not None and stored == torch.float8_e4m3fn:
        if constant and activation.cols is None and activation.rows in (1, None):
            return "row"
        groups = activation.rows == 1 and activation.cols == 128 and not scheme.static
        if groups and grid.rows == 128 and grid.cols == 128:
            return "block"
    return "weight" if constant else "weight_k"


def size_bucket(n: int) -> int:
    """N or K rounded up to its three leading bits: 4096, 5120, 6144, 7168, 8192."""
    step = max(1, 1 << max(n.bit_length() - 3, 0))
    return -(-n // step) * step


def plan(where: Place, kind: Kind, n: int, k: int, m: int, *, wide: bool = False, scale_cols: int = 0) -> Plan:
    """The plan for M tokens; ``wide`` means float32 activations, ``scale_cols`` is the extent of a scale along K."""
    return _plan(where, kind, n, k, bucket(m), wide, scale_cols)


@cache
def _plan(where: Place, kind: Kind, n: int, k: int, m: int, wide: bool, scale_cols: int) -> Plan:
    key = key_of(where, kind, n, k, m)
    if not wide and kind != "weight_k":
        for rows in (_user_rows(where.card), _shipped_rows()):
            found = rows.get(key)
            if found is not None and runs(where, kind, found, n, k, m, scale_cols=scale_cols):
                return found
    return formula(where, kind, n, k, m, wide=wide, scale_cols=scale_cols)


def key_of(where: Place, kind: Kind, n: int, k: int, m: int) -> Key:
    """The row of a table that covers a problem."""
    return (where.arch, kind, size_bucket(n), size_bucket(k), bucket(m))


def runs(where: Place, kind: Kind, chosen: Plan, n: int, k: int, m: int, *, scale_cols: int = 0) -> bool:
    """Whether a plan that was measured for one problem of a bucket can run this one.

    Tables are measured with N and K multiples of 16. If K is not, rows of w are loaded byte by byte, and if N is not,
    rows of y are stored that way: both need other tiles, and rule out TMA.
    """
    if chosen.path == "library":
        return in_library(where, kind, n, k)
    tiles = -(-n // max(chosen.block_n, 1)) * -(-m // max(chosen.block_m, 1))
    if k % 16 or (chosen.splits > 1 and tiles > MOST_SPLIT_TILES):
        return False
    if chosen.path == "vectors":
        return m <= 4 and kind in ("row", "weight")
    if chosen.path == "tokens":
        return scale_cols % chosen.block_k == 0
    if chosen.path == "rows":
        return kind == "row" and n % 16 == 0 and (where.tma or not chosen.tma)
    return chosen.path == "dense" or (kind == "block" and n % 16 == 0 and chosen.block_n <= 128)


def forget() -> None:
    """Reads the tables again at the next call."""
    for cached in (_plan, _user_rows, _shipped_rows):
        cached.cache_clear()


@cache
def _shipped_rows() -> Mapping[Key, Plan]:
    return read_table(SHIPPED)[1]


@cache
def _user_rows(card: str) -> Mapping[Key, Plan]:
    try:
        path = native.cache_directory() / USER_FILE
    except RuntimeError:  # no home directory, so no table of the user's
        return {}
    if not path.is_file():
        return {}
    header, rows = read_table(path)
    return rows if header["card"] == card else {}


def read_table(path: Path) -> tuple[dict[str, Any], dict[Key, Plan]]:
    """A table's header and its plans by (arch, kind, N bucket, K bucket, M bucket).

    Raises:
        ValueError: the file is not such a table; the message has its name and what is wrong.
    """
    known = {field.name for field in fields(Plan)}
    rows = {}
    try:
        table = json.loads(path.read_text())
        header = {name: table[name] for name in ("source", "card", "versions", "date")}
        for row in table["rows"]:
            chosen = row["plan"]
            if not known >= set(chosen) or chosen["path"] not in get_args(PathName):
                raise ValueError(f"plan {chosen} has fields other than {', '.join(sorted(known))}, or an unknown path")
            rows[row["arch"], row["kind"], row["n"], row["k"], row["m"]] = Plan(**chosen)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a table of plans: {error!r}; delete it, or tune again") from error
    return header, rows


def write_table(path: Path, header: Mapping[str, Any], rows: Mapping[Key, Plan]) -> None:
    """Writes a table for ``read_table``, atomically, so that no reader sees half of it."""
    names = ("arch", "kind", "n", "k", "m")
    table = {
        **{name: header[name] for name in ("source", "card", "versions", "date")},
        "rows": [{**dict(zip(names, key, strict=True)), "plan": vars(chosen)} for key, chosen in sorted(rows.items())],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(table, indent=1) + "\n")
    part.replace(path)
