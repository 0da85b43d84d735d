"""Which command makes a data set's folder: what messages about a missing folder end with."""

__all__ = ["how_to_prepare"]

# Data sets whose command has another name than they.
COMMANDS = {"movielens-1m": "movielens", "trivago-2019": "trivago"}
SAME = ("amazon-electronics", "taobao-ad", "kuaivideo", "microvideo", "criteo")


def how_to_prepare(dataset: str | None = None) -> str:
    """Return the sentence that names the command.

    Args:
        dataset: The name in its schema, if it is known.

    Example:
        >>> how_to_prepare("kuaivideo")
        'Make it with: python apps/prepare.py kuaivideo --raw RAW --out DIR'
    """
    if dataset is None:
        return (
            "Make it with: python apps/prepare.py NAME --raw RAW --out DIR; without arguments it "
            "lists the names."
        )
    name, options = COMMANDS.get(dataset, dataset), ""
    if dataset.startswith("amazon-") and dataset not in SAME:
        name, options = "amazon-sequences", f" --name {dataset.removeprefix('amazon-')}"
    elif name not in (*SAME, *COMMANDS.values()):
        name, options = "parquet", " --schema FILE"
    return f"Make it with: python apps/prepare.py {name} --raw RAW --out DIR{options}"
