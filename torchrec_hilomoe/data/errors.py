"""The one error that says "your data", not "your settings" and not "our bug", and its remedy."""

__all__ = ["DataError", "how_to_prepare"]


class DataError(ValueError):
    """Data that is missing, unreadable or worse than the limit on bad rows allows.

    The message names the file, the place in it, and the remedy.
    """


# Data sets whose command has another name than they.
COMMANDS = {"movielens-1m": "movielens", "trivago-2019": "trivago"}
SAME = ("amazon-electronics", "taobao-ad", "kuaivideo", "microvideo", "criteo")


def how_to_prepare(dataset: str | None = None) -> str:
    """Return the sentence that names the command.

    Args:
        dataset: The name in its schema, if it is known.

    Example:
        >>> how_to_prepare("kuaivideo")
        'Make it with: python -m torchrec_hilomoe prepare kuaivideo --raw RAW --out DIR'
    """
    if dataset is None:
        return (
            "Make it with: python -m torchrec_hilomoe prepare NAME --raw RAW --out DIR; without "
            "arguments it lists the names."
        )
    name, options = COMMANDS.get(dataset, dataset), ""
    if dataset.startswith("amazon-") and dataset not in SAME:
        name, options = "amazon-sequences", f" --name {dataset.removeprefix('amazon-')}"
    elif name not in (*SAME, *COMMANDS.values()):
        name, options = "parquet", " --schema FILE"
    return f"Make it with: python -m torchrec_hilomoe prepare {name} --raw RAW --out DIR{options}"
