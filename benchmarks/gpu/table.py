"""What a session on a GPU has found, for people: short enough to be read whole."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

__all__ = ["table"]

MOST = 9_500  # characters
LONGEST_SAY = 330
COUNTED = ("sites", "warm")  # parts of which only failures are told one by one


def table(lines: Sequence[dict[str, Any]], *, took: float) -> str:
    """Return figures, then failures with the last of their tracebacks."""
    rows = []
    for part in dict.fromkeys(line["part"] for line in lines):
        own = [line for line in lines if line["part"] == part]
        counts = Counter(line["status"] for line in own)
        rows.append(f"{part}: " + ", ".join(f"{n} {status}" for status, n in counts.items()))
        if part in COUNTED:
            kinds = Counter((" ".join(line["case"].split()[:2]), line["status"]) for line in own)
            text = "; ".join(f"{kind} {n} {status}" for (kind, status), n in kinds.items())
            rows.append(f"  {text}"[:900])
            continue
        rows += [f"  {line['case']}: {_say(line)}" for line in own if line["status"] == "ok"]
        left = [line["case"] for line in own if line["status"] == "left out"]
        if left:
            rows.append(f"  left out: {', '.join(left)}"[:400])
    failed = [line for line in lines if line["status"] == "failed"]
    if failed:
        rows.append(f"{len(failed)} failed:")
    for line in failed:
        rows.append(f"  {line['part']} / {line['case']}: {_say(line)}")
        rows += [f"      {said[:160]}" for said in line.get("traceback", [])[-4:-1]]
    rows.append(f"{len(lines)} lines in {took:.0f} s")
    whole = "\n".join(rows)
    return whole if len(whole) <= MOST else f"{whole[: MOST // 2]}\n  [...]\n{whole[-MOST // 2 :]}"


def _say(line: dict[str, Any]) -> str:
    return str(line.get("say", ""))[:LONGEST_SAY]
