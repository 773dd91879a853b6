"""`fedsb compare`: methods on the same data, with the same tuning budget and seeds, and with their costs.

contenders.py  what is compared, from the TOML file      search.py   the next learning rate to try
cells.py       one run, and the file that stores it      compare.py  tunes, runs and writes everything
figures.py     means, differences, the Pareto front      page.py     comparison.html
"""
