"""Results as people want to read them: one HTML page that needs nothing else, and PNGs.

results.py   cells, grouped and summed up       style.py     how a policy looks in every figure
figures.py   curves over load                   steps.py     what happened step by step
tables.py    numbers with their intervals       page.py      all of it, in one file
"""
