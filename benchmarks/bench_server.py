"""What a request over HTTP costs under load: examples/server.py and some clients that do not wait.

    python -m benchmarks.bench_server --out benchmarks/results/server.jsonl

A request is one user and some candidates, on generated data with the sizes of the recipe
``bst-synthetic``; each client asks again as soon as it is answered, over one connection. The first
answer is compared with the scorer's, to the bit. Clients and server share this machine.
"""

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.bench_serving import MODELS, ranker
from benchmarks.harness import append, environment, FEWEST_ROUNDS
from torchrec_hilomoe.data.synthetic import SyntheticSource
from torchrec_hilomoe.serving import export_model, ExportOptions, Scorer

SERVER = Path(__file__).parents[1] / "examples" / "server.py"
HEADERS = {"Content-Type": "application/json"}


def body_of(scorer: Scorer, candidates: int) -> dict[str, Any]:
    """One user and some candidates, in raw values."""
    source = SyntheticSource(world="composed", split="test", rows=candidates, seed=0)
    rows = source.read(0, 0).slice(0, candidates).select(list(scorer.columns))
    own = {field.name for field in scorer.artifact.schema.candidate}
    user = {name: it for name, it in rows.to_pylist()[0].items() if name not in own}
    return {"user": user, "candidates": rows.select(sorted(own)).to_pydict()}


@contextmanager
def serving(path: str, *options: str) -> Iterator[int]:
    """Start the server as a process of its own; give its port."""
    command = [sys.executable, str(SERVER), path, "--port=0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            found = (re.search(r"running on http://127.0.0.1:(\d+)", it) for it in process.stderr)
            yield next(int(match[1]) for match in found if match)
        finally:
            process.terminate()


def ask(connection: http.client.HTTPConnection, text: str) -> list[float]:
    """Send a request, and return its probabilities."""
    connection.request("POST", "/score", text, HEADERS)
    reply = connection.getresponse()
    answer = reply.read()
    assert reply.status == 200, answer
    return json.loads(answer)["probabilities"]


def load(port: int, text: str, clients: int, seconds: float) -> dict[str, float]:
    """Let clients ask for so long, after a second that is not counted; return the latencies."""
    begin = time.perf_counter() + 1.0
    times: list[list[float]] = [[] for _ in range(clients)]
    failed: list[Exception] = []

    def client(mine: list[float]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            while True:
                start = time.perf_counter()
                if start >= begin + seconds and len(mine) >= FEWEST_ROUNDS:
                    return
                ask(connection, text)
                if start >= begin:
                    mine.append(time.perf_counter() - start)
        except (OSError, AssertionError, http.client.HTTPException) as error:
            failed.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=client, args=(mine,)) for mine in times]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    every = sorted(it for mine in times for it in mine)
    return {
        "median_us": statistics.median(every) * 1e6,
        "p99_us": every[int(0.99 * len(every))] * 1e6,
        "requests": len(every),
        "requests_per_second": len(every) / seconds,
    }


def main() -> None:
    """Run the benchmark."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["bst", "din"])
    parser.add_argument("--providers", nargs="+", choices=["plain", "experts"], default=["experts"])
    parser.add_argument("--candidates", nargs="+", type=int, default=[1, 200])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--form", choices=["program", "package"], default="package")
    parser.add_argument("--at_once", type=int, default=2, help="as the server's")
    parser.add_argument("--seconds", type=float, default=10.0, help="spent on a case")
    parser.add_argument("--out", type=Path, required=True, help="append JSON lines to this file")
    args = parser.parse_args()
    compiled = args.form == "package"
    options = [f"--at_once={args.at_once}", *(["--compiled"] if compiled else [])]
    for name, provider in ((it, who) for it in args.models for who in args.providers):
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/model"
            export_model(ranker(name, provider), path, options=ExportOptions(package=compiled))
            scorer = Scorer(path, compiled=compiled)
            with serving(path, *options) as port:
                for count in args.candidates:
                    body = body_of(scorer, count)
                    text = json.dumps(body)
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                    want = scorer.score_request(body["user"], body["candidates"]).tolist()
                    assert ask(connection, text) == want, "the server's answer differs"
                    connection.close()
                    case = {"model": name, "provider": provider, "form": args.form}
                    for clients in args.clients:
                        found = load(port, text, clients, args.seconds)
                        line = {**case, "candidates": count, "clients": clients, **found}
                        append(args.out, [{**line, "at_once": args.at_once, **environment("cpu")}])
                        print(
                            f"{name:5s} {provider:8s} {count:>5} candidates {clients:>3} clients "
                            f"p50 {found['median_us'] / 1e3:>8.2f} ms "
                            f"p99 {found['p99_us'] / 1e3:>8.2f} ms "
                            f"{found['requests_per_second']:>7.0f} a second"
                        )


if __name__ == "__main__":
    main()
