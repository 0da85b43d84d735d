"""Pictures that are drawn at the end of long work: refused before it, if they cannot be."""

from pathlib import PurePath

__all__ = ["check_picture"]


def check_picture(option: str, file: str | None) -> None:
    """Refuse a picture of a format that matplotlib does not write.

    Args:
        option: For the message.
        file: Its path, whose ending says the format, PNG where it has none; None draws nothing.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If it does not know the format.
    """
    if file is None:
        return
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError(f"{option} needs matplotlib: pip install 'matplotlib>=3.8,<4'") from error
    formats = FigureCanvasBase.get_supported_filetypes()
    ending = PurePath(file).suffix[1:]
    if ending and ending.lower() not in formats:
        raise ValueError(
            f"{option} {file} ends with .{ending}, of which matplotlib knows nothing. Let it end "
            f"with one of {', '.join(f'.{it}' for it in sorted(formats))}."
        )
