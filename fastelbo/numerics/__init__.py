"""What results are held to: one oracle, one rule of how far from it they may be, and the two ways to ask, `compare` and `verify`.

    oracle.py     the float64 truth of every output and gradient of every op, and the size of what is added up to it
    tolerance.py  the rule; and the bound of `fastelbo compare`, beside what eager PyTorch makes of the same inputs
    compare.py    `fastelbo.compare`: cases and their errors, with peers.py (the formulas that users write) and report.py
    verify.py     `fastelbo.verify`: the same oracle inside a user's own program

This package sits on top of everything else, and nothing imports it except `fastelbo` itself and the command line.
"""
