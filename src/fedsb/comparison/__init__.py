"""Methods compared on one's own data: each tuned by the same budget, run over the same seeds, with what it costs.

contenders.py  what is compared, from the TOML        search.py   which learning rate to try next
cells.py       one run, and the file that keeps it     compare.py  the story: tune, run, write
figures.py     means, differences, the front           page.py     comparison.html
"""
