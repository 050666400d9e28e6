"""More language models, and what they learn from their text.

Read masking, the task of bert.py, with sentence_pairs and span_boundary; then electra and encoder_inference.
expert_usage belongs to moe.py.
"""
