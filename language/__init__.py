"""More language models, and what they learn from their text.

Read masking, the task of bert.py, with sentence_pairs and span_boundary; then electra and encoder_inference.
deberta is an encoder with another attention, deberta_v3 its objective after electra's.
An encoder with a decoder is t5, which writes by beam_search; its task is span_corruption. bart builds on it,
with denoising; other tasks are pegasus and translate, which are measured by overlap.
prefix_lm makes one decoder of both. In multi_token a decoder predicts several tokens ahead; in
speculative these or a smaller model guess, with the cache of rewinding. routing, expert_usage and upcycle
belong to moe.py. retro reads passages that retrieval finds; its rows are in retro_rows. word2vec gives words
vectors: read word_corpus, windows, noise and huffman, then analogies and ppmi. backprop is where gradients
come from, in NumPy alone.
"""
