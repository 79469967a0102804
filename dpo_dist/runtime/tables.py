"""Parquet files with a checksum for each page; a damaged one is told, and read as if it were missing. No torch here."""
from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_dist.runtime.files import replacing

log = logging.getLogger(__name__)

Columns = Mapping[str, NDArray[Any]]         # {name: (n,) values}


def write_columns(path: Path, columns: Columns, **how: Any) -> None:
    """Writes the file, in place of an earlier one, and its folder. how: as pyarrow's write_table has it."""
    import pyarrow as pa  # only who writes or reads one, and only now: the library takes 60 MB
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        pq.write_table(pa.table(dict(columns)), file, write_page_checksum=True, **how)


def read_columns(path: Path, kinds: Mapping[str, Any], say: Callable[[str], None] = log.warning
                 ) -> dict[str, NDArray[Any]] | None:
    """The columns of these names and dtypes; None where the file is not there, or damaged, which `say` tells."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
        found = {name: table[name].to_numpy() for name in kinds}
        if wrong := [name for name, values in found.items() if values.dtype != np.dtype(kinds[name])]:
            raise ValueError(f"its column {wrong[0]} is of another kind")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, UnicodeError, MemoryError, pa.ArrowException) as error:
        what = next(iter(str(error).splitlines()), type(error).__name__)
        say(f"{path} is damaged and is left out ({what})")
        return None
