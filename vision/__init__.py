"""Images as rows of patches: models that read them, and what they are trained to do.

Read vit first, the Vision Transformer, and classify_images, which trains it to name what it sees. mae masks
three quarters of an image and rebuilds them, and so learns from images without labels. Three other tasks
need no labels either: maskfeat predicts the edges in hidden patches, simclr finds two views of one image
among many, and colorize, with a small convolutional network, the colours of a grey picture.
"""
