#!/usr/bin/env python3
"""The same conversations as parquet files in every compression that is in use, and as JSON lines: tests/fixtures/parquet.

    python3 make_parquet.py OUT_FOLDER          (needs pyarrow)
"""
import datetime
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet

out = Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
rows = [
    {
        "messages": [{"role": "user", "content": f"What is {n} and {n}?"}, {"role": "assistant", "content": f"Größe {2 * n} 🙂"}]
        + ([{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Sure."}] if n % 3 == 0 else []),
        "id": n,
        "score": None if n % 2 else n / 4,
    }
    for n in range(40)
]
# Two row groups, dictionaries where strings repeat, and a column of a kind that JSON has not.
made = pyarrow.array([datetime.datetime(2026, 1, 1, 0, 0, n) for n in range(40)], pyarrow.timestamp("us"))
table = pyarrow.Table.from_pylist(rows).append_column("made", made)
for compression in ["none", "snappy", "gzip", "zstd", "lz4", "brotli"]:
    pyarrow.parquet.write_table(table, out / f"{compression}.parquet", compression=compression, row_group_size=25)
(out / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
