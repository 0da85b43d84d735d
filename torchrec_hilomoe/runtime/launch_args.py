"""What a launcher leaves in a script's arguments, and how to drop it.

``torchx run -s local_cwd dist.ddp -j 1x8 apps/train.py`` reads naturally, but TorchX takes the path
as the script's first *argument*; ``.torchxconfig`` names the script itself. With flags after a
``--``, that separator arrives too::

    argv                                            what the user meant
    apps/train.py                                   (nothing)
    apps/train.py -- --train.max_steps 50           --train.max_steps 50
    --train.max_steps 50                            --train.max_steps 50
"""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["drop_launcher_residue"]


def drop_launcher_residue(argv: Sequence[str], script: str) -> list[str]:
    """Drop the script's own leading path, and a ``--`` at the front, from its arguments.

    Args:
        argv: The arguments without the program's name, as in ``sys.argv[1:]``.
        script: Path of the running script, as in ``__file__``.

    Returns:
        The arguments that the user meant; anything not at the front is left alone.

    Example:
        >>> drop_launcher_residue(["apps/train.py", "--", "--seed", "3"], script="apps/train.py")
        ['--seed', '3']
    """
    arguments = list(argv)
    if arguments and Path(arguments[0]).resolve() == Path(script).resolve():
        arguments = arguments[1:]
    if arguments and arguments[0] == "--":
        arguments = arguments[1:]
    return arguments
