"""What goes into a run: text, tokenizers, conversations."""
