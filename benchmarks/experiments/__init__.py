"""What the results claim, each claim a command: ``python -m benchmarks.experiments.NAME``.

evidence.py      do experts pay in whole CTR models? data, backbones, variants and seeds
capacity.py      do they pay where capacity binds? a stream of nothing but compositions
worlds.py        what do the generated worlds ask of a model? AUC by width of a dense head
distillation.py  does a wide teacher help a narrow student with experts?
runs.py          one run of an experiment
report.py        tables of paired differences     plot.py  AUC over FLOPs
"""
