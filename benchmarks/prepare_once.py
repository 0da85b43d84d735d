"""Prepare raw files of AmazonElectronics_x1's form, with whichever package is on the path.

``bench_data`` runs this in fresh processes, also over another checkout: it prints the time, the
peak memory, and a sum over every file that was written.
"""

import hashlib
import json
import resource
import shutil
import sys
import time
from pathlib import Path

from torchrec_hilomoe.data.prepare.registry import DATASETS

raw, out = sys.argv[1:]
before = time.perf_counter(), time.process_time()
DATASETS["amazon-electronics"](raw=raw, out=out)
seconds, cpu_seconds = time.perf_counter() - before[0], time.process_time() - before[1]
written = hashlib.sha256()
for path in sorted(Path(out).rglob("*")):
    if path.is_file():
        written.update(path.read_bytes())
shutil.rmtree(out)
peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
found = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2), "peak_mb": peak_mb}
print(json.dumps({**found, "sum": written.hexdigest()}))
