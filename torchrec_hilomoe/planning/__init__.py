"""What a run would need and how fast it should be on machines that are not here.

estimate.py  configuration and machines -> RunPlan    run_plan.py  RunPlan and its report
cluster.py   the machines                             plots.py     the same as a picture
memory.py    bytes of each rank                       step.py      milliseconds of a step
activations.py  what the backward pass needs         remedies.py  what helps if tables do not fit
"""
