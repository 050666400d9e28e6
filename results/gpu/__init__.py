"""Measure everything on a GPU with one command: `python -m results.gpu --minutes 7 --out FOLDER`.

Reading order: steps.py, what is measured, in which order; measure.py, how, in a process for each step;
rows.py, the file of the rows; __main__.py, the command, which starts these processes and keeps to the time;
table.py, the aims beside what was reached; ahead.py, what the processor prepares while the GPU works.
docs/gpu.md explains the use.
"""
