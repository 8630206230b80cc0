"""What results are held to: one oracle, one rule of how far from it they may be, and the two ways to ask, `compare` and `verify`.

`compare` takes its cases from peers.py, with the formulas that users write, and its words from report.py. This package sits on top
of everything else, and nothing imports it except `fastelbo` itself and the command line.
"""
