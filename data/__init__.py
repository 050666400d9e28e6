"""What goes into a run: text, tokenizers, conversations.

Read first corpus (from files to documents), then tokenizer (byte-pair encoding) and text (from documents to
rows of tokens). wordpiece is BERT's tokenizer, special_tokens and words are what both tokenizers share,
conversations reads files of chats, and stdlib_questions makes such chats from Python's own documentation.
"""
