"""Images as rows of patches: models that read them, and what they are trained to do.

Read vit first, the Vision Transformer, and classify_images, which trains it to name what it sees. mae masks
three quarters of an image and rebuilds them, and so learns from images without labels. Four others need no
labels either: maskfeat predicts the edges in hidden patches, simclr finds two views of one image among many,
igpt predicts one pixel after another, by the decoder of gpt.py, and colorize, with a small convolutional
network, the colours of a grey picture. clip places images and their captions in one space: clip_towers holds
its two Transformers, and zero_shot what a trained one is good for. llava puts features of such an image tower
in the place of words of the decoder of gpt.py; visual_instruct trains it, and visual_questions measures it.
spectrogram reads sounds as pictures of their frequencies, and classify_sounds trains it to name what it
hears.

Models that draw images are a chapter of their own, docs/generative.md. Of latent diffusion read
autoencoder_kl, then latent_diffusion and text_to_image, which trains it; dit is a denoiser of patches, and
prior, which image_embeddings trains, draws embeddings, of which unclip, which embedding_to_image trains,
draws images. first_stage makes the model that another needs.
vae, flow, gan and energy draw without words, and frechet measures how far what they draw is from real images.
"""
