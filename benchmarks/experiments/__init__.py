"""What the results claim, each claim a command: ``python -m benchmarks.experiments.NAME``.

evidence.py      do experts pay in whole CTR models? data, backbones, variants and seeds
capacity.py      do they pay where capacity binds? a stream of nothing but compositions
worlds.py        what do the generated worlds ask of a model? AUC by width of a dense head
distillation.py  does a wide teacher help a narrow student with experts?
predicted.py     does a probe say the truth? what it predicted, and what came of it
routers.py       can routers be better than random keys?      router_starts.py  how they begin
grids.py         which options matter? one at a time
streams.py       streams at the paper's limits: few clicks, a deciding feature that hardly varies
variants.py      what is compared: data, backbones, variants of a model
runs.py          one run of an experiment
report.py        tables of paired differences     plot.py  AUC over FLOPs
"""
