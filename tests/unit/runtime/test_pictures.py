"""A picture that cannot be drawn is refused before the work that it is to show."""

import pytest

from torchrec_hilomoe.runtime.pictures import check_picture


def test_an_ending_that_matplotlib_does_not_know_is_refused():
    pytest.importorskip("matplotlib")
    for file in (None, "noext", "a.b/noext", "x.png", "x.SVG"):
        check_picture("--plot", file)
    with pytest.raises(ValueError, match=r"--plot x\.xyz ends with \.xyz.* one of .*\.png, "):
        check_picture("--plot", "x.xyz")
