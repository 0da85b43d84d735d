"""Hyper-parameter sweeps: which options are tried, and the trials, one run each.

space.py  what is searched     trials.py  one run a trial     search.py  the search, resumable
"""
