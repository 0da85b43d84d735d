"""A search over a space, by Optuna, that goes on where it stopped. Needs the extra ``sweep``."""

import json
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TYPE_CHECKING

from torchrec_hilomoe.runtime.documents import parse_json, read_text
from torchrec_hilomoe.runtime.ownership import owned
from torchrec_hilomoe.runtime.paths import to_json, write_text
from torchrec_hilomoe.sweep.space import Dimension
from torchrec_hilomoe.sweep.trials import Outcome, RISING

if TYPE_CHECKING:
    from optuna import Study, Trial

__all__ = ["search"]

logger = logging.getLogger(__name__)

JOURNAL = "sweep.journal"
RESULT = "sweep.json"
ASKED = "asked.json"  # what all trials have in common
OWNER = ".owner"
FOLDER = "folder"
GIVE_UP = 3  # trials in a row that fail


def search(
    space: Sequence[Dimension],
    folder: Path,
    run: Callable[[Sequence[str], Path], Outcome],
    *,
    trials: int,
    metric: str,
    seed: int = 0,
    options: Sequence[str] = (),
    ranks: int = 1,
) -> Mapping[str, Any] | None:
    """Try options until so many trials are done in all, and write ``sweep.json`` after each.

    A trial that was interrupted is gone on with, in its own folder, before new ones are begun.

    Args:
        space: What is searched.
        folder: Holds the journal and a folder of each trial.
        run: Runs a trial with options, in a folder.
        trials: How many are to be done in all.
        metric: What is looked for.
        seed: Of the search.
        options: What ``run`` gives to every trial besides, as on a command line.
        ranks: Processes of a trial.

    Returns:
        The best trial so far; None if a trial was asked to stop, and the search with it.

    Raises:
        ImportError: If Optuna is not installed.
        ValueError: If trials fail one after the other, another search uses the folder, or it was
            begun with another space, metric, options or ranks, so that values do not compare.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked = {
        "metric": metric,
        "space": [asdict(it) for it in space],
        "options": sorted(f"--{name}={value}" for name, value in _options(options)),
        "ranks": ranks,
    }
    with owned(folder / OWNER, f"out_dir {folder}"):
        _keep(asked, folder)
        return _search(space, folder, run, trials=trials, metric=metric, seed=seed)


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values, however they were written."""
    left = iter(words)
    for word in left:
        name, is_given, value = word.removeprefix("--").partition("=")
        yield name, value if is_given else next(left, "")


def _keep(asked: Mapping[str, Any], folder: Path) -> None:
    """Keep what a search is of, or refuse another one in its folder."""
    file = folder / ASKED
    asked = json.loads(to_json(asked))
    if not file.exists():
        write_text(str(file), to_json(asked) + "\n")
        return
    before = parse_json(read_text(file), file)
    for name, value in asked.items():
        if before.get(name) != value:
            raise ValueError(
                f"sweep: {folder} was begun with {name} {before.get(name)!r}, and now {value!r} is "
                "asked for: values of its trials would not compare. Give another --out_dir, or ask "
                "for the same."
            )


def _search(
    space: Sequence[Dimension],
    folder: Path,
    run: Callable[[Sequence[str], Path], Outcome],
    *,
    trials: int,
    metric: str,
    seed: int,
) -> Mapping[str, Any] | None:
    """Search in a folder that nobody else uses."""
    study = _open(folder, metric, seed)
    _requeue(study)
    failed = 0
    while (done := len(_with_value(study))) < trials:
        trial = study.ask()
        place = folder / trial.user_attrs.get(FOLDER, f"trial_{trial.number:04d}")
        trial.set_user_attr(FOLDER, place.name)
        options = [f"--{it.option}={_text(_suggest(trial, it))}" for it in space]
        logger.info("trial %d of %d, %s: %s", done + 1, trials, place, shlex.join(options))
        outcome = run(options, place)
        if outcome.stopped:
            logger.info("stopped; run again to go on")
            return None
        if outcome.value is None:
            study.tell(trial, state=_state("FAIL"))
            failed += 1
            why = outcome.error or f"no validation has {metric}"
            logger.warning("%s failed: %s", place, why)
            if failed == GIVE_UP:
                raise ValueError(
                    f"sweep: {GIVE_UP} trials in a row have failed, the last with: "
                    f"{why}. See {place / 'log.txt'}."
                )
            continue
        failed = 0
        study.tell(trial, outcome.value)
        logger.info("%s %.5f, best so far %.5f", metric, outcome.value, study.best_value)
        _write(study, folder, metric)
    return _described(study.best_trial)


def _open(folder: Path, metric: str, seed: int) -> "Study":
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise ImportError("a sweep needs Optuna: pip install 'optuna>=4,<6'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    study = optuna.create_study(
        storage=storage,
        study_name=metric,
        direction="maximize" if metric in RISING else "minimize",
        load_if_exists=True,
    )
    # Another seed after each start, or a search that goes on would repeat its first guesses.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    return study


def _requeue(study: "Study") -> None:
    """Begin again with trials that were running when the search ended."""
    for trial in study.get_trials(states=(_state("RUNNING"),)):
        study.tell(trial.number, state=_state("FAIL"))
        study.enqueue_trial(trial.params, user_attrs=dict(trial.user_attrs))


def _suggest(trial: "Trial", dimension: Dimension) -> Any:
    it = dimension
    if it.choices:
        # Optuna keeps numbers and texts; a list goes as the text that the command line takes.
        return trial.suggest_categorical(it.option, [_text(value) for value in it.choices])
    if it.is_integer:
        step = int(it.step or 1)
        return trial.suggest_int(it.option, int(it.low), int(it.high), log=it.log, step=step)
    return trial.suggest_float(it.option, it.low, it.high, log=it.log, step=it.step)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _with_value(study: "Study") -> list:
    return study.get_trials(deepcopy=False, states=(_state("COMPLETE"),))


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]


def _described(trial: Any) -> dict[str, Any]:
    folder = trial.user_attrs[FOLDER]
    return {"folder": folder, "value": trial.value, "options": dict(trial.params)}


def _write(study: "Study", folder: Path, metric: str) -> None:
    found = sorted(_with_value(study), key=lambda trial: trial.value, reverse=metric in RISING)
    content = {"metric": metric, "trials": [_described(trial) for trial in found]}
    write_text(str(folder / RESULT), to_json(content) + "\n")
