"""``examples/server.py`` as a process of its own: what it answers, refuses, and how it ends."""

import http.client
import json
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.datasets import toy_table
from tests.helpers.processes import ROOT
from tests.helpers.rounding import assert_same
from tests.helpers.serving import ranker
from torchrec_hilomoe.serving import export_model, Scorer

pytestmark = pytest.mark.slow

MOST = 50
OWN = ("item", "kind", "price")  # the columns that differ from candidate to candidate
SERVER = ROOT / "examples" / "server.py"


@dataclass(frozen=True, kw_only=True)
class Server:
    process: subprocess.Popen
    port: int
    scorer: Scorer

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Mapping[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            text = body if isinstance(body, str | None) else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())
        finally:
            connection.close()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "din"
    torch.manual_seed(0)
    export_model(ranker("din", "row").model, out)
    return out


@pytest.fixture(scope="module")
def server(artifact) -> Iterator[Server]:
    pytest.importorskip("fastapi", reason="pip install --no-deps -r requirements/dev.txt")
    threads = f"--threads={torch.get_num_threads()}"  # other numbers of them may add up otherwise
    command = [sys.executable, SERVER, artifact, "--port=0", f"--most_candidates={MOST}", threads]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        try:
            found = (re.search(r"running on http://127.0.0.1:(\d+)", it) for it in process.stderr)
            port = next((int(match[1]) for match in found if match), None)
            assert port is not None
            yield Server(process=process, port=port, scorer=Scorer(artifact))
        finally:
            process.kill()


def request(first: int, candidates: int) -> dict[str, Any]:
    rows = toy_table(first + candidates, seed=3).slice(first)
    user = {name: column for name, column in rows.to_pylist()[0].items() if name not in OWN}
    del user["label"]
    return {"user": user, "candidates": rows.select(OWN).to_pydict()}


def test_probabilities_are_the_scorers_to_the_bit_whoever_asks_at_the_same_time(server):
    requests = [request(first, candidates) for first in range(8) for candidates in (1, 7, MOST)]
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda body: server.ask("POST", "/score", body), requests))
    for body, (code, reply) in zip(requests, replies, strict=True):
        assert code == 200
        got = torch.from_numpy(np.array(reply["probabilities"], dtype=np.float32))
        want = server.scorer.score_request(body["user"], body["candidates"])
        assert_same(got, torch.from_numpy(want))


def test_it_says_what_is_served(server):
    code, health = server.ask("GET", "/health")
    assert code == 200
    assert (health["status"], health["backbone"]) == ("ok", "DIN")
    assert tuple(health["columns"]) == server.scorer.columns


GOOD = request(0, 2)
BAD = [
    ("{", "JSON decode error"),
    ("[" * 100_000, "error parsing the body"),
    ([], "Input should be a valid dictionary"),
    ({"user": {}}, "body.candidates: Field required"),
    (GOOD | {"users": {}}, "body.users: Extra inputs"),
    (GOOD | {"candidates": {"item": 3}}, "body.candidates.item: Input should be a valid list"),
    (GOOD | {"user": {}}, "column 'clicks_item' is missing"),
    (GOOD | {"candidates": {**GOOD["candidates"], "item": [3]}}, "of equal length"),
    (GOOD | {"user": {**GOOD["user"], "item": 3}}, "column 'item' is given of the user and of the"),
    (GOOD | {"candidates": {}}, "no column is given of the candidates"),
    (GOOD | {"candidates": {**GOOD["candidates"], "item": [3, 999]}}, "row 1: item has id 999"),
    (GOOD | {"candidates": {**GOOD["candidates"], "price": [1, None]}}, "price is null"),
    (request(0, MOST + 1), f"has {MOST + 1} candidates, and {MOST} are the most"),
]


@pytest.mark.parametrize(("body", "said"), BAD, ids=[said for _, said in BAD])
def test_a_bad_request_is_refused_in_a_sentence_and_the_next_is_answered(server, body, said):
    code, reply = server.ask("POST", "/score", body)
    assert code == 422
    assert said in reply["error"]
    assert "\n" not in reply["error"]
    assert server.ask("POST", "/score", GOOD)[0] == 200


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere"], "error: there is no artifact at nowhere"),
        (["nowhere", "--threads=0"], "--threads must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_sentence(argv, said, capsys):
    pytest.importorskip("fastapi", reason="pip install --no-deps -r requirements/dev.txt")
    main = runpy.run_path(str(SERVER))["main"]
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_it_ends_well_when_it_is_told_to(server):
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=60) == 0
