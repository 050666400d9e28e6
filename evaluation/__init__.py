"""Figures about a trained model, with their errors and the figures of no model beside them.

Read perplexity.py (how well a text is predicted), multiple_choice.py (which continuation is likeliest),
generation.py (what is found in a written answer), sandbox.py and jail.py (programs that a model wrote),
glue.py (classifiers), probe.py (features of images). stdlib_suite.py makes the default tasks, published.py
reads benchmark files, and `python -m evaluation MODEL` runs them all.

Studies of what a model makes of its prompt: prompting.py (formats and orders of examples) measures any
decoder; in_context.py, scratchpad.py, spelling.py and injection.py train small ones by the loop of
small_runs.py.

What search and verification add has studies of its own: expressions.py (programs that are safe to run by
the thousand) and small_models.py, then functions_to_find.py and generate_and_verify.py (selection by
execution, or by a learned verifier), tool_loop.py (a calculator), cap_sets.py and funsearch.py (a search for
programs).
"""
