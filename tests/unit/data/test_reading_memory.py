"""Reading takes as much memory for a large folder as for a small one."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import run_command
from torchrec_hilomoe.data.synthetic import write_synthetic

PEAKS = """
import json, sys
from torchrec_hilomoe.data.loader import Loader
from torchrec_hilomoe.data.parquet import ParquetSource
from torchrec_hilomoe.runtime.process import peak_resident_bytes

workers, *folders = sys.argv[1:]
peaks = []
for folder in folders:
    source = ParquetSource(folder, "train", block_bytes=1)
    batches = Loader(source, batch_size=1024, epochs=1, workers=int(workers))
    rows = sum(len(batch.labels) for batch in batches)
    peaks.append(peak_resident_bytes())
print(json.dumps([rows, *peaks]))
"""


def many_times(folder: Path, times: int) -> Path:
    """A folder of the same files many times over, by links; of a file nothing is kept."""
    out = folder.with_name(f"times{times}")
    (out / "train").mkdir(parents=True)
    for name in ("schema.json", "_SUCCESS"):
        shutil.copy(folder / name, out / name)
    for number in range(times):
        for file in (folder / "train").iterdir():
            os.link(file, out / "train" / f"part-{number}-{file.name}")
    return out


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "train").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_does_not_grow_with_the_files(workers, tmp_path):
    write_synthetic(str(tmp_path / "set"), train_rows=16_384, eval_rows=64)
    small, large = (many_times(tmp_path / "set", times) for times in (8, 128))
    command = [sys.executable, "-c", PEAKS, str(workers), small, small, large]
    done = run_command(command, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    rows, _, before, after = json.loads(done.stdout)
    assert rows == 128 * 16_384
    # The heap comes and goes by some blocks; decoded, the rows are larger than their files.
    assert after - before < (size(large) - size(small)) / 4
