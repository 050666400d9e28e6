"""What goes into a run: text, tokenizers, conversations, images, sounds.

Read first rows (the form that all data takes), corpus (from files to documents), then tokenizer (byte-pair
encoding) and text (from documents to rows of tokens). records reads the formats of files, and shards keeps
tokens on disk. wordpiece is BERT's tokenizer. pipeline is any other: normalize (with charsmap), pre_tokenize,
a model (merges, or unigram, which trains on lattices), piece_decoders. special_tokens and words are what all
tokenizers share.

conversations, preferences, labelled and text_pairs read files of chats, of answers that were compared, of
labelled texts, and of sources with their targets. stdlib_questions makes chats from Python's own
documentation, and docstrings functions with their summaries.

clean takes what is worth training on out of raw text, by cleaning_stages over parts on disk: quality_rules,
near_duplicates, exact_substrings, decontaminate. curate then chooses documents by scores and mixes sources:
quality_classifier and model_scores give scores, selection has the rules, mixture the weights.

Images: glyphs draws characters from fonts, scenes two objects with a caption, landscapes pictures in colour;
images reads folders, published_images MNIST's and CIFAR's files, captions and tar_images images with
captions, image_conversations conversations about images. augment makes other views of an image, palette turns
pixels into ids of colours, lab is another space of colours, and baselines classifies by pixels alone.

Sounds: notes synthesises chords of instruments, and sounds reads folders. class_folders is what folders of
images and of sounds share.
"""
