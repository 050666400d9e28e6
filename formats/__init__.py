"""What comes out of a run, and can be opened again: directories that other libraries read and write.

Saved models are in Hugging Face's layout, or in PEFT's or our own where that has no class for them. Read
first safetensors_dir (the files of a model), then decoders (their config and names, translated), encoders and
mixtures (the same for their families), peft (adapters) and native (models of our own); open_model opens any
of them. tokenizer_json, wordpiece_json, pipeline_json, sentencepiece_model and chat_template are the files of
tokenizers. All are written through atomic and json_file, so that a crash never leaves half a file. figures
saves pictures in the same way.
"""
