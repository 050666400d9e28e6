"""Figures about a trained model, with their errors and the figures of no model beside them.

Read perplexity.py (how well a text is predicted), multiple_choice.py (which continuation is likeliest),
generation.py (what is found in a written answer), sandbox.py and jail.py (programs that a model wrote),
glue.py (classifiers), probe.py (features of images). stdlib_suite.py makes the default tasks, published.py
reads benchmark files, and `python -m evaluation MODEL` runs them all.

Studies of what a model makes of its prompt: prompting.py (formats and orders of examples) measures any
decoder; in_context.py, scratchpad.py, spelling.py and injection.py train small ones by the loop of
small_runs.py.
"""
