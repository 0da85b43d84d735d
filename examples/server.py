"""Serve a folder that export has made: a user and candidates in, probabilities out, over HTTP.

    pip install "fastapi>=0.115,<0.200" "uvicorn>=0.30,<0.60"
    python examples/server.py models/NAME --port 8000

``POST /score`` takes ``{"user": {...}, "candidates": {...}}``: a value, or a list of them, of each
column that all candidates have in common, and a list, one entry a candidate, of each other column.
It answers ``{"probabilities": [...]}``, or 422 and ``{"error": ...}``, one sentence.
``GET /health`` says what is served. Encryption, who may ask, and a limit on the bytes of a body are
for the proxy in front of it.
"""

# FastAPI and uvicorn are of an extra, which a type checker need not have.
# pyright: reportMissingImports=false

import argparse
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TYPE_CHECKING

import torch

from torchrec_hilomoe.serving import Scorer

if TYPE_CHECKING:
    from fastapi import FastAPI


def application(scorer: Scorer, *, most_candidates: int, at_once: int) -> "FastAPI":
    """Return the two routes.

    Args:
        scorer: The model.
        most_candidates: Requests with more are refused, for memory grows with them.
        at_once: How many requests are computed at a time; the others wait.
    """
    import anyio.to_thread
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, ConfigDict
    from starlette.exceptions import HTTPException

    class ScoreRequest(BaseModel):
        model_config = ConfigDict(extra="forbid")

        user: dict[str, Any] = {}
        candidates: dict[str, list[Any]]

    class Scores(BaseModel):
        probabilities: list[float]

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = at_once
        scorer.warm_up()
        yield

    app = FastAPI(title="Scores of an exported model", lifespan=lifespan)

    def refusal(sentence: str, code: int = 422) -> JSONResponse:
        return JSONResponse({"error": sentence}, status_code=code)

    @app.exception_handler(RequestValidationError)
    async def refuse_form(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        form = '{"user": {COLUMN: VALUE}, "candidates": {COLUMN: [VALUE, ...]}}'
        return refusal(f"{where}: {first['msg']}; a request is {form}.")

    @app.exception_handler(HTTPException)
    async def refuse_request(_: Request, error: HTTPException) -> JSONResponse:
        # What FastAPI cannot read as JSON for another reason than its form is 400 there.
        return refusal(str(error.detail), 422 if error.status_code == 400 else error.status_code)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        origin = scorer.artifact.origin
        model = {"backbone": origin.backbone, "step": origin.step, "commit": origin.commit}
        return {"status": "ok", **model, "columns": scorer.columns}

    # Not async: it is computed in a thread, so that other requests are read and answered meanwhile.
    @app.post("/score", response_model=Scores)
    def score(request: ScoreRequest) -> JSONResponse:
        most = max(map(len, request.candidates.values()), default=0)
        if most > most_candidates:
            return refusal(
                f"the request has {most} candidates, and {most_candidates} are the most that are "
                "scored at once; send them in several requests."
            )
        try:
            found = scorer.score_request(request.user, request.candidates)
        except ValueError as error:
            return refusal(str(error))
        return JSONResponse({"probabilities": found.tolist()})

    return app


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or Ctrl-C; return 0 then, 2 when the user must mend something."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", metavar="DIR", help="a folder that export has made")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one and says which")
    parser.add_argument(
        "--compiled", action="store_true", help="run the package, which is machine code"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads that compute one request")
    parser.add_argument(
        "--at_once",
        type=int,
        default=os.cpu_count() or 1,
        help="requests that are computed at a time",
    )
    parser.add_argument(
        "--most_candidates", type=int, default=10_000, help="requests with more are refused"
    )
    args = parser.parse_args(argv)
    for name in ("threads", "at_once", "most_candidates"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    try:
        import uvicorn

        torch.set_num_threads(args.threads)
        scorer = Scorer(args.artifact, compiled=args.compiled)
        app = application(scorer, most_candidates=args.most_candidates, at_once=args.at_once)
    except ImportError as error:
        packages = '"fastapi>=0.115,<0.200" "uvicorn>=0.30,<0.60"'
        print(f"error: {error}: pip install {packages}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # uvicorn ends what it has begun and then raises the signal once more, which would be an error.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    uvicorn.run(app, host=args.host, port=args.port, access_log=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
