"""A finished or running run as one HTML page that needs nothing else.

files.py  what a run's folder holds     pictures.py  drawn with matplotlib     html.py  the page
"""

from torchrec_hilomoe.training.page.html import write_page

__all__ = ["write_page"]
