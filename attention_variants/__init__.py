"""What takes the place of gpt.py's attention: one file each, so that a diff of two is that of two ideas.

Read talking_heads, the smallest change; local_global, in which most layers see only the last tokens; latent,
whose cache is one small vector per token; and linear, which has no softmax and no cache that grows. deepseek
and minimax are latent and linear in a mixture of experts. In moba and native_sparse a query chooses a few
blocks of keys. longer_context slows rotary positions down, for all of them.
"""
