"""The workbench behind the five files: what a run leaves behind and how it is read, experiments, pages, speed.

None of it is the paper's story. madsim.py and plot.py call it, and it imports neither (bench.py and flower_round.py,
which measure madsim's speed, aside): it is given Configs and `simulate`, and knows only the leaves data, model, trust.
"""
