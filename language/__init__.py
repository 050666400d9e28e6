"""More language models, and what they are asked."""
