"""Scaling laws: fitting, planning and exploring the law of chinchilla.py.

Read in this order: huber_fit (the search for the law's parameters), points (reading, checking and resampling
what it is fitted to), outliers (points that are left out), identified (what the points leave open) and
fit_report (the command fit); isoflop (approaches 1 and 2); plan, hardware, shapes and plan_report (the
command plan); sweep, sweep_runs and sweep_report (a law from your own runs); page; pictures (ticks and marks
that all pictures share).
"""
