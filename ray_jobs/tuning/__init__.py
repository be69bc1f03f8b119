"""The parts of `tune.py`, in running order.

spec.py        settings of a search: space, scheduler, searcher, budget
"""
